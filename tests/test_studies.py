"""The studies: which rows count as done, and for what."""

import csv
import sys

import pytest
from recipe_runs import RECIPES, recipe


@pytest.fixture
def study(monkeypatch):
    """The study of checkpoints, with a recipe that returns at once; `calls` holds the arguments of its runs."""
    # it imports the recipes beside it
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    module = recipe("study_checkpoints")
    calls = []
    versions = {"torch": "0", "transformers": "0", "hf-polyattn": "0"}

    def run(argv):
        calls.append(argv)
        return {"accuracy": 0.5, "seconds": 1.0, "versions": versions}

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
    assert start("some/model") == 2
    assert start("some/model") == 0
    assert start(str(tmp_path / "mine")) == 2
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == ["some--model"] * 2 + ["mine"] * 2
    folders = [call[call.index("--output_dir") + 1] for call in study.calls]
    assert len(set(folders)) == 4
    assert "sentiment of mine, cubic: accuracy 0.5000 over 1 seeds" in capsys.readouterr().out


def test_sampled_stories_are_those_of_the_checkpoint(study, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"stories-{name}.jsonl").touch()
    words = [study.stories_data(tmp_path, name) for name in ("one", "two")]
    assert words[0] != words[1]


def test_the_committed_rows_name_their_checkpoint(study):
    rows = study.rows_of(RECIPES / "results" / "checkpoints.csv")
    assert rows
    assert all(f"--model {row['checkpoint']} " in row["command"] for row in rows)
