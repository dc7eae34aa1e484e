"""docs/private_inference.md: its code runs, its tables are those of rows and graphs; and the study behind them."""

import csv
import re
from pathlib import Path

import pytest
import torch
from models import scale_attention
from recipe_runs import RECIPES, recipe
from transformers import AutoModel, AutoTokenizer, BertConfig

from hf_polyattn.models import read_settings
from hf_polyattn.private.report import depth_table
from hf_polyattn.training.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "private_inference.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: run -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
RESULTS = RECIPES / "results"


def part(name: str) -> str:
    """What stands between two marks of the guide."""
    return re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", GUIDE, re.DOTALL).group(1)


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A small BERT with a tokenizer, under the name of one on the Hub."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    folder = tmp_path / MODEL
    scale_attention(AutoModel.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_code_of_the_guide_runs(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = ["the length is counted", "a sum of products", "short", "additions and multiplications only"]
    names = {"batches": [dict(tokenizer(texts[i:], padding=True, return_tensors="pt")) for i in (0, 1)]}
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(compile(block, "guide", "exec"), names)
    shown = capsys.readouterr().out
    assert "Depth(products=3, levels=3)" in shown
    assert "integer bits" in shown
    assert read_settings(names["student"].config).normalization == 15
    assert torch.isfinite(names["hidden"]).all()
    reloaded = AutoModel.from_pretrained(tmp_path / "minilm-private")
    assert read_settings(reloaded.config) == read_settings(names["student"].config)


def test_tables_of_the_guide_are_those_of_graphs_and_rows(study):
    assert part("depth").strip() == depth_table([1, 2, 3, 4, 8])
    rows = study.rows_of(RESULTS / "private.csv")
    assert (RESULTS / "private.md").read_text() == study.table(rows) + "\n"
    assert part("results").startswith(study.table(rows) + "\n")
    assert (RESULTS / "private_ranges_bounded.txt").read_text() in part("ranges")


def test_committed_rows_name_their_checkpoint_and_target(study):
    rows = study.rows_of(RESULTS / "private.csv")
    assert all(f"--checkpoint {row['checkpoint']} " in row["command"] for row in rows)
    assert all(row["torch"] and row["transformers"] and row["device"] for row in rows)


@pytest.fixture
def study():
    return recipe("study_private")


def test_study_measures_each_stage_once_on_pairs_that_are_not_trained_on(study, encoder, tmp_path, capsys):
    words = ["sum", "root", "even", "odd", "length", "norm", "key", "row"]
    pairs = [(f"{a} of {b}", f"{b} {a}", i % 5) for i, (a, b) in enumerate(zip(words, words[1:] + words[:1]))]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    data = str(tmp_path / "pairs.csv")
    out = tmp_path / "private.csv"
    # as a study leaves it that was stopped before its first row
    out.touch()
    arguments = ["--checkpoint", str(encoder), "--train", data, "--validation", data, "--held_out", "3"]
    arguments += ["--transfer_steps", "8", "--seeds", "1", "--out", str(out)]
    arguments += ["--score_bound", "0.5", "--score_weight", "100", "--learning_rate", "1e-2"]
    study.main([*arguments, "--attentions", "softmax", "constant"])
    rows = study.rows_of(out)
    assert [(row["attention"], row["stage"]) for row in rows] == [
        ("softmax", "softmax"),
        ("constant", "coefficients"),
        ("constant", "transfer"),
    ]
    study.main(arguments)
    after = study.rows_of(out)
    assert after[:3] == rows
    found = {(row["attention"], row["stage"]): row for row in after}
    assert len(found) == len(after) == 7
    assert all(-1 <= float(row[name]) <= 1 for row in after for name in ("held_out", "value"))
    assert found["bounded", "transfer"]["score_bound"] == "0.5"
    assert float(found["bounded", "transfer"]["largest_score"]) < float(found["constant", "transfer"]["largest_score"])
    assert found["length", "transfer"]["denominator"] == "length"
    assert float(found["constant", "transfer"]["denominator"]) > 1
    assert found["constant", "transfer"]["training_tokens"] == found["bounded", "transfer"]["training_tokens"]
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".md").read_text() == study.table(after) + "\n"
    assert "integer bits" in out.with_name("private_ranges_bounded.txt").read_text()
    study.main(arguments)
    assert study.rows_of(out) == after


def test_held_out_sentences_are_not_trained_on(study, encoder, tmp_path):
    pairs = [(f"sentence {i}", f"another {i}", i % 3) for i in range(40)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    data = str(tmp_path / "pairs.csv")
    args = study.arguments(["--checkpoint", str(encoder), "--train", data, "--validation", data, "--held_out", "10"])
    task = study.HeldOut(args, None)
    assert len(task.held_out) == 10
    assert len(task.train) == 60
    assert not {sentence for row in task.held_out for sentence in row[:2]} & set(task.train)
    batch = next(task.batches(0))
    assert batch["input_ids"].shape[0] == 32
