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
    assert "| sentiment | mine | accuracy | 0.5000 | 0.5000 | 1 |" in capsys.readouterr().out


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


def test_the_readme_shows_lines_of_those_tables():
    readme = (RECIPES.parent / "README.md").read_text()
    shown = readme[readme.index("<!-- results: begin -->") : readme.index("<!-- results: end -->")]
    written = "\n".join(
        path.read_text() for path in [*RECIPES.glob("results/*.md"), *RECIPES.glob("../benchmarks/results/*.md")]
    )
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(lines) > 8
    assert not [line for line in lines if line not in written.splitlines()]
