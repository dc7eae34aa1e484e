"""The studies of conversions: which rows are the same, what becomes a row at all, and what commands say."""

import csv
import json
import shlex
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from recipe_runs import RECIPES, recipe

from hf_polyattn.converting.report import ConversionReport, Row
from hf_polyattn.steps import DivergedError
from hf_polyattn.training.devices import device_name

ATTENTION = {"activation": "poly", "degree": 3, "normalization": "length", "coefficients": "learnable"}


def finished(folder, *, qk_norm=False, activation="poly", plan=(), **arguments):
    """The results.json of a conversion of one stage."""
    settings = dict.fromkeys(("calibrate", "transfer", "distill", "finetune"), "{}")
    rows = tuple(Row(stage, 1.5, 0, 0.0) for stage in ("softmax", "patched", "calibrate"))
    results = {
        "stages": ConversionReport("loss", True, rows).to_dict(),
        "attention": {**ATTENTION, "qk_norm": qk_norm, "activation": activation},
        "command": shlex.join(["recipes/convert.py", "--dataset", "some/my text.txt"]),
        "arguments": {"model": "me/model", "output_dir": str(folder), "shares": [1.0], **settings, **arguments},
        "seed": 1,
        "plan": [["calibrate", {"batches": 16}], *plan],
        "versions": {"torch": "0", "transformers": "0", "hf-polyattn": "0"},
        "device": "abacus",
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


CHANGES = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "activation": {"activation": "monomial"},
    "shares": {"shares": [0.5, 1.0]},
    "rates": {"plan": [["finetune", {"steps": 500, "learning_rate": 0.01}]]},
    "batch_size": {"batch_size": 4},
    "layers": {"layers": [0]},
    "data": {"dataset": "other.txt"},
}


def test_rows_of_other_conversions_stand_side_by_side(tmp_path, capsys):
    study = recipe("study_converted")
    folders = [finished(tmp_path / name, **change) for name, change in CHANGES.items()]
    out = tmp_path / "converted.csv"
    for _ in range(2):
        study.main([*map(str, folders), "--out", str(out)])
    rows = study.rows_of(out)
    assert len(rows) == 3 * len(CHANGES)
    assert {row["attention"] for row in rows} == {
        "degree 3 / length",
        "degree 3 / length, QK-norm",
        "monomial, degree 3 / length",
    }
    assert any("finetune learning_rate 0.01" in row["settings"] for row in rows)
    assert shlex.split(rows[0]["command"]) == ["convert.py", "--dataset", "my text.txt"]
    # each with its own value: none is a mean of several
    table = capsys.readouterr().out.splitlines()
    assert all(line.endswith("| 1 |") for line in table if "| calibrate |" in line)


def test_a_stop_while_rows_are_written_leaves_the_old_ones(tmp_path, monkeypatch):
    study = recipe("study_converted")
    out = tmp_path / "converted.csv"
    study.main([str(finished(tmp_path / "one")), "--out", str(out)])
    before = out.read_text()

    class Stopped(csv.DictWriter):
        def writerows(self, rows):
            raise KeyboardInterrupt

    monkeypatch.setattr(csv, "DictWriter", Stopped)
    with pytest.raises(KeyboardInterrupt):
        study.main([str(finished(tmp_path / "two", batch_size=4)), "--out", str(out)])
    assert out.read_text() == before


def test_the_committed_table_is_that_of_its_rows():
    study = recipe("study_converted")
    rows = study.rows_of(RECIPES / "results" / "converted.csv")
    assert all(row["settings"] for row in rows)
    assert (RECIPES / "results" / "converted.md").read_text() == study.table(rows) + "\n"


@pytest.fixture
def ablation(monkeypatch):
    """The study, with a conversion that returns at once or raises `module.error`; `calls` holds its arguments."""
    module = recipe("study_ablation")
    module.calls, module.error = [], None

    def convert(argv):
        module.calls.append(argv)
        if module.error is not None:
            raise module.error
        return ConversionReport("loss", True, (Row("softmax", 1.0, 0, 0.0), Row("finetune", 2.0, 8, 1.0)))

    monkeypatch.setattr(module, "convert", SimpleNamespace(main=convert))
    return module


def start(module, folder, *extra):
    words = ["text", "--checkpoint", "me/model", "--train", str(folder / "my text.txt"), "--only", "degree 1"]
    module.main([*words, "--runs", str(folder / "my runs"), "--out", str(folder / "rows.csv"), *extra])
    return module.rows_of(folder / "rows.csv")


def test_only_divergence_is_a_row_without_a_value(ablation, tmp_path):
    ablation.error = ValueError("no such file")
    with pytest.raises(ValueError, match="no such file"):
        start(ablation, tmp_path)
    assert ablation.rows_of(tmp_path / "rows.csv") == []
    ablation.error = DivergedError("loss nan")
    (row,) = start(ablation, tmp_path)
    assert row["value"] == "nan"
    assert row["command"].endswith("# loss nan")


def test_a_row_names_its_device_and_its_command_has_paths_with_spaces(ablation, tmp_path):
    row, _ = start(ablation, tmp_path)
    assert row["device"] == device_name(PartialState().device)
    (argv,) = ablation.calls
    assert argv[argv.index("--dataset") + 1] == str(tmp_path / "my text.txt")
    words = shlex.split(row["command"])
    assert words[words.index("--dataset") + 1] == "my text.txt"


def test_sentences_are_those_of_the_data_at_hand(ablation, tmp_path, monkeypatch):
    found = []
    for sentences in (["one", "two"], ["three"], ["one", "two"]):
        monkeypatch.setattr(ablation, "Sentences", lambda *unused, train=sentences: SimpleNamespace(train=train))
        path = ablation.sentences_file(SimpleNamespace(runs=tmp_path))
        assert path.read_text().splitlines() == sentences
        found.append(path)
    assert found[0] == found[2] != found[1]


def test_settings_that_tell_conversions_apart():
    """Only those that differ, and a second stage of a kind is one of its own."""
    study = recipe("study_converted")
    short, long = (f"calibrate; distill steps {steps} warmup_steps 5; batch_size 2" for steps in (90, 180))
    assert study.own_settings(long, [short]) == "distill steps 180"
    twice = "calibrate; distill steps 90 warmup_steps 5; distill steps 90 warmup_steps 5; batch_size 2"
    assert study.own_settings(twice, [short]) == "distill #2, distill #2 steps 90, distill #2 warmup_steps 5"
    assert study.own_settings(short, []) == ""
