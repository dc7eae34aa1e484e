"""What the README shows is true: its commands run, in their short form, and print the lines that it prints.

A comment above a block changes how it is tested: `<!-- test: skip: reason -->`, `<!-- test: run as COMMAND -->`.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from recipe_runs import in_fork, in_processes, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_polyattn import activations, architectures
from hf_polyattn.activations import default_start, frobenius_gain
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "openai-community/gpt2"


@dataclass(frozen=True)
class Block:
    language: str
    note: str
    text: str


def blocks(markdown: str) -> list[Block]:
    pattern = re.compile(r"(?:<!-- test: ([^>]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
    return [Block(m.group(2), m.group(1) or "", m.group(3)) for m in pattern.finditer(markdown)]


# the block of several commands has its own test, test_whole_way.py
SHELL = [block for block in blocks(README) if block.language == "bash" and "whole way" not in block.note]
PYTHON = [block for block in blocks(README) if block.language == "python"]
TABLE = [
    command
    for line in README.splitlines()
    if line.startswith("|")
    for command in re.findall(r"`([^`]+)`", line)
    if re.match(r"accelerate launch |hf-polyattn |\w+=\w+ torchrun ", command)
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the recipes, a small model under the name of one on the Hub, and a text."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    tokenizer = byte_tokenizer()
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=len(tokenizer), eos_token_id=256)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / HUB_MODEL)
    tokenizer.save_pretrained(folder / HUB_MODEL)
    return folder


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for block in blocks(README)} == {"bash", "python", "text"}
    assert len(SHELL) == 2
    assert len(PYTHON) >= 4
    assert len(TABLE) >= 10


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.text.strip())
def test_make_knows_the_commands(block):
    planned = subprocess.run(
        [*shlex.split(block.text), "--dry-run", "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"make demo": "hf-polyattn demo", "make test": "pytest"}[block.text.strip()] in planned.stdout


@pytest.mark.parametrize(
    "block", [b for b in SHELL if b.note.startswith("skip")], ids=lambda block: block.text.strip()
)
def test_blocks_that_are_not_run(block):
    pytest.skip(block.note.removeprefix("skip: "))


def skeleton(text: str) -> set[str]:
    """Lines with their numbers and widths taken out."""
    return {re.sub(r"\s+", " ", re.sub(r"[\d.,]*\d", "#", line)).strip() for line in text.splitlines()} - {""}


KEY_LINES = [
    r"^text: the standard library of Python #, # byte-level BPE tokens; # blocks of # to train on",
    r"^the cubic: (compiled for this processor|plain torch)",
    r"^softmax softmax: GPT#LMHeadModel as it is, # parameters$",
    r"^cubic poly: patched # of # attention modules \(# of # heads\), normalization l#, # parameters$",
    r"^softmax step #/# validation loss #$",
    r"^cubic step #/# validation loss #$",
    r"^attention validation loss \(nats/token\) tokens/s peak memory \(MiB\) ‖A‖_F/√N layer # ‖A‖_F/√N layer #$",
    # of so few steps as the test trains, the demo tells no speed
    r"^softmax # [#-] # # #$",
    r"^cubic # [#-] # # #$",
    r"^# steps of # tokens, seed #; measured while both trained side by side on ",
    r"^reloaded \S+ in a fresh process as PolyGPT#LMHeadModel: # logits identical$",
    r"^without the plugin a fresh process refuses it:$",
    r"^ValueError: .*(contains custom code which must be executed|but Transformers does not recognize this)",
    r"^the reloaded cubic model writes:$",
    r"^saved model: \S+cubic$",
    r"^next: hf-polyattn inspect \S+cubic$",
    r"^figure of the losses: \S+losses\.png$",
    r"^done in # s$",
]


def test_demo_prints_what_the_readme_shows(tmp_path):
    (block,) = [block for block in SHELL if block.text.strip() == "make demo"]
    command = shlex.split(block.note.removeprefix("run as "))
    assert command[0] == "hf-polyattn"
    result = subprocess.run(
        [sys.executable, "-m", "hf_polyattn_cli", *command[1:], "--out", str(tmp_path / "demo"), "--steps", "8"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^cubic +\d+\.\d+ +- +\d+ .*\n.*; no speed, which fewer than 100 steps", result.stdout, re.M)
    shown = next(b.text for b in blocks(README) if b.language == "text")
    for where, lines in (("demo", skeleton(result.stdout)), ("README", skeleton(shown))):
        missing = [pattern for pattern in KEY_LINES if not any(re.search(pattern, line) for line in lines)]
        assert not missing, f"not in the output of the {where}: {missing}\n{result.stdout}"
    saved = tmp_path / "demo" / "cubic"
    assert AutoModelForCausalLM.from_pretrained(saved).config.model_type == "polyattn_gpt2"
    assert AutoTokenizer.from_pretrained(saved)("import os")["input_ids"]
    assert (tmp_path / "demo" / "losses.png").read_bytes().startswith(b"\x89PNG")


def run_here(command: str) -> None:
    """One command of the table, in this process or forks of it: starting Python anew takes most of the time."""
    words = shlex.split(command)
    script = next((i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py")), None)
    if script is None:
        assert words[0] == "hf-polyattn"
        assert main(words[1:]) == 0
        return

    def train() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        recipe(Path(words[script]).stem).main(words[script + 1 :])

    if "--nproc_per_node" in words:
        in_processes(int(words[words.index("--nproc_per_node") + 1]), train)
    else:
        assert in_fork(train) == 0


def test_commands_of_the_table_run_one_after_another(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for command in TABLE:
        if any(word in command for word in ("CONFIG.yaml", "COMMAND", "FOLDER")):
            # a pattern for the reader to fill in; only what it names must be there
            for name in re.findall(r"recipes/\S+\.\w+", command):
                assert (ROOT / name).exists(), command
            continue
        print(command)
        run_here(command)


def test_python_blocks_run_one_after_another(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(activations, "_REGISTRY", dict(activations._REGISTRY))
    # other tests of this process register the readme's example too
    stock = {name: entry for name, entry in architectures._REGISTRY.items() if name in ("gpt2", "llama", "bert")}
    monkeypatch.setattr(architectures, "_REGISTRY", stock)
    names = {"tokenizer": AutoTokenizer.from_pretrained(HUB_MODEL), "rows": [{"input_ids": [1, 2, 3]}] * 16}
    for block in PYTHON:
        print(block.text)
        exec(compile(block.text, "README.md", "exec"), names)
    assert names["out"].shape == (2, 8, 128, 64)
    assert {group["name"]: group["weight_decay"] for group in names["trainer"].optimizer.param_groups} == {
        "decay": 0.1,
        "plain": 0.0,
        "polyattn": 0.0,
    }
    assert type(names["model"]).__name__ == "GPT2LMHeadModel"
    assert torch.isfinite(names["out"]).all()


def test_files_that_are_linked_exist():
    for document in (ROOT / "README.md", ROOT / "docs" / "definition.md"):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
        headings = {
            re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_definition_page_shows_the_constants_of_the_code():
    page = (ROOT / "docs" / "definition.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| c_F |"))
    shown = [float(cell) for cell in row.strip("|").split("|")[1:]]
    assert shown == pytest.approx([frobenius_gain(p) for p in (1, 2, 3, 4)], abs=6e-4)
    rows = dict(re.findall(r"^\| (\d) \| (c = [^|]*) \|", page, re.M))
    assert set(rows) == {"1", "2", "3", "4"}
    for degree, row in rows.items():
        assert [float(c) for c in row[4:].split(", ")] == pytest.approx(default_start(int(degree)), abs=1e-3)
    for name in ("sqrt_length", "length", "sum", "l1", "l2", "none"):
        assert f'| `"{name}"`' in page
