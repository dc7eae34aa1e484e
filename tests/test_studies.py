"""The studies: which rows count as done, and for what."""

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import scale_attention
from recipe_runs import RECIPES, recipe
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config

from hf_polyattn.training.tokenizers import byte_tokenizer


@pytest.fixture
def study(monkeypatch):
    """The study of checkpoints, with a recipe that returns at once; `calls` holds the arguments of its runs."""
    module = recipe("study_checkpoints")
    calls = []
    versions = {"torch": "0", "transformers": "0", "hf-polyattn": "0"}

    def run(argv):
        calls.append(argv)
        return {"accuracy": 0.5, "seconds": 1.0, "versions": versions, "device": "cpu"}

    tasks = {**module.TASKS, "sentiment": (run, *module.TASKS["sentiment"][1:])}
    monkeypatch.setattr(module, "TASKS", tasks)
    module.calls = calls
    return module


def test_finished_rows_are_those_of_the_same_checkpoint(study, tmp_path, capsys):
    def start(checkpoint):
        before = len(study.calls)
        arguments = [
            "--data",
            "reviews.csv",
            "--seeds",
            "1",
            "--runs",
            str(tmp_path),
            "--out",
            str(tmp_path / "r.csv"),
        ]
        study.main(["sentiment", "--checkpoint", checkpoint, *arguments])
        return len(study.calls) - before

    (tmp_path / "mine").mkdir()
    assert start("some/model") == 3
    assert start("some/model") == 0
    assert start(str(tmp_path / "mine")) == 3
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == ["some--model"] * 3 + ["mine"] * 3
    folders = [call[call.index("--output_dir") + 1] for call in study.calls]
    assert len(set(folders)) == 6
    assert "| sentiment | mine | accuracy | 0.5000 | 0.5000 | 0.5000 | 1 |" in capsys.readouterr().out


def test_sampled_stories_are_those_of_the_checkpoint(study, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"stories-{name}.jsonl").touch()
    words = [study.stories_data(tmp_path, name) for name in ("one", "two")]
    assert words[0] != words[1]


def test_the_committed_rows_name_their_checkpoint(study):
    rows = study.rows_of(RECIPES / "results" / "checkpoints.csv")
    assert rows
    assert all(f"--model {row['checkpoint']} " in row["command"] for row in rows)


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_in_the_repository_are_those_of_their_rows(study):
    results = RECIPES / "results"
    activations = recipe("study_activations")
    for name, table in (("shakespeare_activations", activations.table), ("checkpoints", study.table)):
        assert (results / f"{name}.md").read_text() == table(rows_in(results / f"{name}.csv")) + "\n"


def test_a_run_of_the_activations_names_the_device_that_it_reports(tmp_path, monkeypatch):
    activations = recipe("study_activations")
    versions = {"torch": "0", "transformers": "0", "hf-polyattn": "0"}
    results = {"validation_loss": 1.5, "seconds": 2.0, "versions": versions, "device": "abacus"}

    def run(command, **options):
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(activations, "subprocess", SimpleNamespace(run=run))
    row = activations.run("poly", 3, str(tmp_path / "text.txt"), tmp_path / "poly-3")
    committed = rows_in(RECIPES / "results" / "shakespeare_activations.csv")
    assert list(row) == list(committed[0])
    assert row["device"] == "abacus"
    like = next(each["command"] for each in committed if each["variant"] == "poly" and each["seed"] == "2")
    assert row["command"] == like.replace("--seed 2", "--seed 3")


def test_the_readme_shows_lines_of_those_tables():
    readme = (RECIPES.parent / "README.md").read_text()
    shown = readme[readme.index("<!-- results: begin -->") : readme.index("<!-- results: end -->")]
    written = "\n".join(
        path.read_text() for path in [*RECIPES.glob("results/*.md"), *RECIPES.glob("../benchmarks/results/*.md")]
    )
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(lines) > 8
    assert not [line for line in lines if line not in written.splitlines()]


@pytest.fixture
def conversion():
    return recipe("study_conversion")


def test_conversion_is_measured_stage_by_stage_and_only_once(conversion, tmp_path, capsys):
    text = "to be, or not to be: that is the question. " * 60
    (tmp_path / "text.txt").write_text(text)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(set(text))}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    scale_attention(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "tiny")
    out = tmp_path / "conversion.csv"
    words = ["text", "--checkpoint", str(tmp_path / "tiny"), "--train", str(tmp_path / "text.txt"), "--out", str(out)]
    words += ["--transfer_steps", "20", "--distill_steps", "10", "--runs", str(tmp_path / "runs"), "--degrees", "3"]
    words += ["--normalizations", "length"]
    conversion.main([*words, "--stages", "coefficients", "gain"])
    rows = conversion.rows_of(out)
    assert [row["stage"] for row in rows] == ["softmax", "gain", "coefficients"]
    conversion.main(words)
    after = conversion.rows_of(out)
    assert after[:3] == rows
    assert [row["stage"] for row in after[3:]] == ["softmax-tuned", "patched", "transfer", "distilled"]
    value = {row["stage"]: float(row["value"]) for row in after}
    tokens = {row["stage"]: int(row["training_tokens"]) for row in after}
    assert tokens["softmax-tuned"] == tokens["distilled"] == 30 * 768
    assert tokens["transfer"] == 20 * 768
    assert value["distilled"] < value["transfer"]
    assert value["softmax-tuned"] < value["softmax"]
    assert str(tmp_path) not in out.read_text()
    assert "| tiny, loss | degree 3 / length |" in capsys.readouterr().out
    conversion.main(words)
    assert conversion.rows_of(out) == after


def test_correlation_of_sentences(conversion, tmp_path):
    """Pooling leaves padding out, and pairs that are alike score high."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    pairs = [("abc", "abc", 5), ("abc", "abcabcabc", 4), ("abc", "abx", 3), ("abc", "xyzxyz", 0)]
    (tmp_path / "pairs.csv").write_text("".join(f"{a},{b},{score}\n" for a, b, score in pairs))
    path = str(tmp_path / "pairs.csv")
    arguments = argparse.Namespace(checkpoint=str(tmp_path / "encoder"), train=path, validation=path)
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    task = conversion.Sentences(arguments, model)
    batch = next(task.batches(0))
    assert batch["input_ids"].shape[0] == 32
    one = task.score(model)
    assert 0.4 <= one <= 1
    task.pairs.reverse()
    assert task.score(model) == pytest.approx(one)


def test_the_committed_conversions_name_their_checkpoint(conversion):
    rows = conversion.rows_of(RECIPES / "results" / "conversion.csv")
    assert rows
    assert all(f"--checkpoint {row['checkpoint']} " in row["command"] for row in rows)
    # the guide prints what stands there
    guide = (RECIPES.parent / "docs" / "conversion.md").read_text()
    table = conversion.table(rows)
    assert table in guide
