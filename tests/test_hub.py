"""Publishing to a Hub on the loopback address, from real processes, and reading it back elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from card_results import RESULTS, TWIN
from minihub import MiniHub, Repository, sha256
from models import patched_tiny, token_ids
from safetensors.torch import load_file, save_file

import hf_polyattn
from hf_polyattn import hub
from hf_polyattn.training.tokenizers import byte_tokenizer

HERE = Path(__file__).parent
TOKEN = "hf_neverToBeSeenAnywhere42"
# the processes behind `world` take a minute of CPU, which is longer on a busy machine
pytestmark = pytest.mark.timeout(3600)
PARTS = ["README.md", "config.json", "generation_config.json", "modeling_polyattn.py"]


def start(script: str, environment: dict[str, str], *words: object) -> SimpleNamespace:
    """What a process reports, and all that it printed."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(
        report=json.loads("{" + done.stdout.splitlines()[-1].partition("{")[2]), text=done.stdout + done.stderr
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A Hub that one process has published to and two others, with and without the plugin, have read from."""
    folder, outputs = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("outputs")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    for name, options in (("first", {}), ("second", {"max_shard_size": "20KB"})):
        model = patched_tiny("gpt2", double=False, vocab_size=len(tokenizer))
        model.save_pretrained(folder / name, **options)
        tokenizer.save_pretrained(folder / name)
        if name == "first":
            ids = token_ids()
            with torch.no_grad():
                logits = model(ids)[0].clone()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "twin.json").write_text(json.dumps(TWIN))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.5, "validation_loss": 3.6}\n'
    )
    save_file({"input_ids": ids}, folder / "input.safetensors")

    def environment(place: str, **more: str) -> dict[str, str]:
        root = str(Path(hf_polyattn.__file__).parents[1])
        clean = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        home = {"HF_HOME": str(folder / place), "PYTHONPATH": f"{root}:{HERE}", "OMP_NUM_THREADS": "1"}
        return {**clean, **home, **server.environment, **more}

    with MiniHub(token=TOKEN) as server:
        published = start("hub_publisher.py", environment("publisher", HF_TOKEN=TOKEN), folder)
        readers = {
            who: start(
                "hub_reader.py",
                environment(who, **more),
                who,
                folder / "input.safetensors",
                outputs / f"{who}.safetensors",
            )
            for who, more in (("plugin", {"HF_TOKEN": TOKEN}), ("alone", {}))
        }
        yield SimpleNamespace(
            server=server,
            folder=folder,
            outputs=outputs,
            logits=logits,
            published=published,
            said=published.report,
            readers=readers,
        )


def test_card_comes_first_and_asks_for_a_license(world):
    status, said = world.said["without_card"]
    assert status == 1
    assert "has no model card: write one with `hf-polyattn card" in said
    status, said = world.said["without_license"]
    assert status == 1
    assert "--license" in said
    assert world.said["card"][0] == 0


def test_push_uploads_the_model_in_one_commit_and_nothing_else(world):
    status, said = world.said["push"]
    assert status == 0
    done = json.loads(said)
    commits = world.server.repositories["user/first"].branches["main"]
    assert done["commit"] == commits[1][0]
    assert done["url"].endswith(done["commit"])
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    rest = ["losses.png", "model.safetensors", "results.json", "results_softmax.json"]
    # the Hub adds a .gitattributes of its own, this one does not
    assert world.said["files"] == sorted([*PARTS, *tokenizer, *rest])
    assert commits[1][1] == "Upload PolyGPT2LMHeadModel"


def test_second_push_of_the_same_content_commits_nothing(world):
    status, said = world.said["push_again"]
    assert status == 0
    assert json.loads(said)["commit"] == json.loads(world.said["push"][1])["commit"]
    assert world.said["commits_of_two_pushes"] == 1


def test_broken_connections_leave_no_half_model_and_can_be_repeated(world):
    assert "ConnectionError: the connection to the Hub broke" in world.said["cut_upload"]
    assert "nothing was committed" in world.said["cut_upload"]
    assert world.said["commits_after_cut_upload"] == 1
    assert "ConnectionError" in world.said["cut_commit"]
    assert world.said["commits_after_cut_commit"] == 1
    commits = world.server.repositories["user/first"].branches["main"]
    assert len(commits) == 3
    # a loader would take the old single file for the new shards
    files = set(world.said["files_of_second"])
    assert "model.safetensors" not in files
    assert "model.safetensors.index.json" in files
    assert sum(name.startswith("model-0") for name in files) > 1


def test_two_cut_connections_are_made_up_for(world):
    assert world.said["push"][0] == 0
    first = world.server.repositories["user/first"].branches["main"][1][2]["model.safetensors"][0]
    assert world.server.log.count(f"PUT /lfs/{sha256(first)}") == 3


def test_private_stays_private(world):
    repository = world.server.repositories["user/private"]
    assert world.said["private"][0] == 0
    assert repository.private
    assert repository.branches["main"][1][1] == "Say why"
    status, said = world.said["private_over_public"]
    assert status == 1
    assert "is there already and public" in said
    assert (
        "RepositoryNotFound" in world.readers["alone"].report["private"]
        or "OSError" in (world.readers["alone"].report["private"])
    )
    assert world.readers["plugin"].report["private"] == ""


def test_branches_and_pull_requests(world):
    repository = world.server.repositories["user/second"]
    assert world.said["branch"][0] == world.said["pull_request"][0] == 0
    assert "/discussions/1" in world.said["pull_request"][1]
    assert len(repository.branches["main"]) == 1
    assert len(repository.branches["cubic"]) == len(repository.branches["refs/pr/1"]) == 2


@pytest.mark.parametrize("who", ["plugin", "alone"])
@pytest.mark.parametrize("name", ["user/trained", "user/pushed", "user/second"])
def test_downloaded_elsewhere_it_computes_the_same(world, who, name):
    reader = world.readers[who]
    assert reader.report[name] == ("hf_polyattn" if who == "plugin" else "transformers_modules")
    logits = load_file(world.outputs / f"{who}.safetensors")[name]
    if name == "user/trained":
        # trained for a step at the side
        assert logits.shape == world.logits.shape
        assert not torch.equal(logits, world.logits)
    elif who == "plugin":
        assert torch.equal(logits, world.logits)
    else:
        # another order of additions in float32
        torch.testing.assert_close(logits, world.logits, rtol=1e-4, atol=1e-5)


def test_head_of_a_repository_is_the_last_whole_push(world):
    for reader, options in (("plugin", {"rtol": 0, "atol": 0}), ("alone", {"rtol": 1e-4, "atol": 1e-5})):
        logits = load_file(world.outputs / f"{reader}.safetensors")["user/first"]
        second = hf_polyattn.models.PolyGPT2LMHeadModel.from_pretrained(world.folder / "second").eval()
        with torch.no_grad():
            for tensor in (*second.parameters(), *second.buffers()):
                tensor.data = tensor.data.clone()
            torch.testing.assert_close(logits, second(token_ids())[0], **options)


def test_tokenizer_travels_with_the_model(world):
    expected = byte_tokenizer()("hi").input_ids
    assert [reader.report["tokens"] for reader in world.readers.values()] == [expected] * 2


def test_without_plugin_and_consent_it_is_refused(world):
    assert "trust_remote_code=True" in world.readers["alone"].report["refused"]


def test_saved_again_from_the_hub_nothing_points_back(world):
    auto_map = world.readers["alone"].report["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_polyattn.PolyGPT2LMHeadModel"
    assert not any("--" in name for name in auto_map.values())


def test_trainer_and_push_to_hub_bring_the_code(world):
    for files in (world.said["files_of_trainer"], world.said["files_of_push_to_hub"]):
        assert set(PARTS) <= set(files)


def test_token_is_asked_for_and_never_shown(world):
    assert "PermissionError: no token for the Hub: run `hf auth login`" in world.said["without_token"]
    assert TOKEN not in world.published.text + "".join(reader.text for reader in world.readers.values())
    mine = world.folder / "first" / ".env"
    assert TOKEN in mine.read_text()
    holders = [p for p in world.folder.rglob("*") if p.is_file() and p != mine and TOKEN.encode() in p.read_bytes()]
    assert not holders
    for name, repository in world.server.repositories.items():
        for commits in repository.branches.values():
            for content, _ in commits[-1][2].values():
                assert TOKEN.encode() not in content, name


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no config.json"),
        (["adapter_config.json"], "an adapter only: merge it"),
        (["config.json", "README.md"], "lacks weights: model.safetensors"),
        (["config.json", "model.safetensors"], "no model card"),
        (["config.json", "README.md", "model.safetensors.index.json", "model-1.safetensors"], "model-2.safetensors"),
    ],
)
def test_folders_that_are_no_whole_model_are_refused(tmp_path, files, message):
    for name in files:
        shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / name).write_text(json.dumps(shards) if "index" in name else "{}")
    with pytest.raises(FileNotFoundError, match=message):
        hub.push(tmp_path, "user/name")


def test_the_mini_hub_hides_private_repositories():
    repository = Repository(private=True)
    assert repository.at("main")[2] == {}
    assert repository.at("nowhere") is None
