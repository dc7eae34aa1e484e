"""The commands of docs/publishing.md run, on models and results of the shapes that recipes write."""

import json
import re
import shlex
from pathlib import Path

import pytest
from card_results import RESULTS, TWIN
from huggingface_hub import ModelCard
from models import patched_tiny

from hf_polyattn.commands import push as push_command
from hf_polyattn_cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: run -->\n```(\w+)\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, results in (("cubic", RESULTS), ("softmax", TWIN)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "diagnostics.png").write_bytes(name.encode())
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0, "validation_loss": 3.9}\n')
    patched_tiny("gpt2", double=False).save_pretrained(tmp_path / "runs" / "cubic" / "best")
    return tmp_path / "runs"


def test_commands_of_the_guide_run(runs, monkeypatch, capsys):
    pushed = []

    def push(path, name, **options):
        pushed.append((path, name, options))
        return type("Done", (), {"commit_url": "https://hub/commit", "pr_url": None, "oid": "abc"})()

    monkeypatch.setattr(push_command, "push", push)
    assert [language for language, _ in BLOCKS] == ["bash", "bash", "python"]
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "guide", "exec"), {})
        else:
            program, *words = shlex.split(text)
            assert program == "hf-polyattn"
            assert main(words) == 0, capsys.readouterr().err
    folder = runs / "cubic" / "best"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert "| validation loss (nats per token) | 1.9 | 1.8 |" in card.text
    assert "![Losses over the steps](losses.png)" in card.text
    assert "![Norms of the attention over the steps, by layer](diagnostics.png)" in card.text
    assert (folder / "diagnostics.png").read_bytes() == b"cubic"
    assert json.loads((folder / "results_softmax.json").read_text())["best"] == 1.8
    assert "secret" not in (folder / "results.json").read_text()
    nothing = {"private": None, "revision": None, "message": None, "create_pr": False}
    assert pushed == [("runs/cubic/best", "me/cubic", nothing)]
    assert "pushed: https://hub/commit" in capsys.readouterr().out


def test_a_figure_of_ones_own_is_laid_beside_the_card(runs, tmp_path, capsys):
    (tmp_path / "norms.png").write_bytes(b"picture")
    folder = runs / "cubic" / "best"
    words = ["card", str(folder), "--license", "mit", "--figure", str(tmp_path / "norms.png")]
    for _ in range(2):
        assert main(words) == 0
    assert (folder / "norms.png").read_bytes() == b"picture"
    assert "](norms.png)" in (folder / "README.md").read_text()
    assert main(["card", str(folder), "--license", "mit", "--out", str(tmp_path / "card.md")]) == 0
    assert "![" not in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["card", "runs/cubic/best"], "the licence cannot be told"),
        (["card", "runs/cubic/best", "--license", "mit", "--results", "runs/nowhere.json"], "No such file"),
        (
            ["card", "runs/cubic/best", "--license", "mit", "--results", "runs/cubic/best/config.json"],
            "no results.json",
        ),
        (["push", "runs/cubic/best", "--to", "me/cubic"], "has no model card"),
        (["push", "runs/nowhere", "--to", "me/cubic"], "holds no config.json"),
    ],
)
def test_errors_are_one_line(runs, capsys, words, message):
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (runs / "cubic" / "best" / "README.md").exists()


def test_a_missing_licence_is_told_before_anything_is_written(runs):
    folder = runs / "cubic" / "best"
    before = sorted(folder.iterdir())
    assert main(["card", str(folder), "--results", "runs/cubic/results.json"]) == 1
    assert sorted(folder.iterdir()) == before


def test_flags_of_the_guide_are_there():
    actions = build_parser()._subparsers._group_actions[0].choices
    for command in ("card", "push"):
        known = {flag for action in actions[command]._actions for flag in action.option_strings}
        said = set(re.findall(r"--[a-z-]+", " ".join(re.findall(rf"hf-polyattn {command} [^\n]*", GUIDE))))
        assert said <= known
    assert not {"--token", "--hf-token"} & {f for a in actions["push"]._actions for f in a.option_strings}
