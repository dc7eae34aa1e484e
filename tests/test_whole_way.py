"""The README's way from a checkpoint to the Hub and back, command by command, in processes of their own."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from minihub import MiniHub, Repository
from transformers import AutoModelForCausalLM, GPT2Config

from hf_polyattn.training.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTE = "<!-- test: the whole way, in tests/test_whole_way.py -->\n```bash\n"
TOKEN = "hf_neverToBeSeenAnywhere43"
# six processes that import torch, on a busy machine
pytestmark = pytest.mark.timeout(1800)


def commands() -> list[str]:
    return [line for line in README.partition(NOTE)[2].partition("```")[0].splitlines() if line]


def stock_repository(folder: Path) -> Repository:
    """A small GPT-2 as the Hub holds the real one: configuration, weights, tokenizer, and a card with a licence."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
    config = GPT2Config(**sizes, vocab_size=len(tokenizer), bos_token_id=256, eos_token_id=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA small GPT-2.\n")
    files = {path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    return Repository(branches={"main": [("1" * 40, "", files)]})


def test_way_is_short():
    # the clone, its folder and `make demo` come before
    typed = [line for line in commands() if not line.startswith("#")]
    assert len(typed) + 3 <= 12
    assert [line.split()[1] for line in typed if line.startswith("hf-polyattn")] == [
        *("patch", "train", "card", "push", "eval"),
    ]


def test_every_command_of_the_way_works(tmp_path, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
        (folder / "README.md").write_text(README)
    place, said, seconds = home, {}, 0.0
    with MiniHub(user="me", token=TOKEN) as hub:
        hub.repositories["openai-community/gpt2"] = stock_repository(tmp_path / "stock")
        for line in commands():
            words = shlex.split(line.replace("USER", "me"), comments=True)
            if not words:
                assert line.startswith("# on another machine")
                place = elsewhere
            elif words[0] == "source" or words[:3] == ["hf", "auth", "login"]:
                # this test's own environment, and the token in it
                continue
            else:
                start = time.perf_counter()
                done = subprocess.run(
                    [str(Path(sys.executable).parent / words[0]), *words[1:]],
                    cwd=place,
                    env=environment(hub, place),
                    capture_output=True,
                    text=True,
                    stdin=subprocess.DEVNULL,
                )
                seconds += time.perf_counter() - start
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                assert TOKEN not in done.stdout + done.stderr
                said[line] = done.stdout
        files = set(hub.repositories["me/gpt2-cubic"].branches["main"][-1][2])
    assert {"README.md", "config.json", "model.safetensors", "modeling_polyattn.py", "tokenizer.json"} <= files
    evaluated = next(text for line, text in said.items() if " eval " in line)
    assert re.search(r"nats/token +\d", evaluated), evaluated
    assert "generated_text" in list(said.values())[-1]
    with capsys.disabled():
        print(f"\nthe whole way: {len(commands()) - 1} commands, {seconds:.0f} s")


def environment(hub: MiniHub, place: Path) -> dict[str, str]:
    """Of a user whose cache is empty at first; only the one who trains has a token."""
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    token = {"HF_TOKEN": TOKEN} if place.name == "home" else {}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    caches = {"HF_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**clean, **hub.environment, **token, **caches}
