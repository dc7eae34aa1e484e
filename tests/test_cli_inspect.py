"""`hf-polyattn inspect` with a text: what it makes of the heads, as a table, as JSON and as a figure."""

import json

import pytest
from cli_runs import TEXT, run, save, write
from models import HEADS, LAYERS
from transformers import AutoModel

from hf_polyattn.commands import inspect
from hf_polyattn.diagnostics import STATISTICS


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "model", poly={"degree": 2, "heads": {0: [1, 2]}}), write(tmp_path / "text.txt", TEXT * 20)


def test_a_text_is_measured_and_drawn_head_by_head(checkpoint, tmp_path, capsys):
    path, text = checkpoint
    code, out, err = run(capsys, "inspect", path, "--text", text, "--figure", tmp_path / "heads.png")
    assert code == 0, err
    assert f"{LAYERS} attention modules: mean (min to max) of the heads" in out
    assert "dead share" in out
    assert out.splitlines()[-1] == f"figure: {tmp_path / 'heads.png'}"
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_every_statistic_of_every_head(checkpoint, capsys):
    path, text = checkpoint
    code, out, err = run(capsys, "inspect", path, "--text", text, "--json")
    assert code == 0, err
    statistics = json.loads(out)["statistics"]
    assert len(statistics) == LAYERS
    for columns in statistics.values():
        assert set(columns) == set(STATISTICS)
        assert all(len(column) == HEADS for column in columns.values())
    assert json.loads(run(capsys, "inspect", path, "--json")[1])["statistics"] is None


def test_a_stock_encoder_is_measured_too(tmp_path, capsys):
    path = save(tmp_path / "bert", "bert", AutoModel)
    text = write(tmp_path / "text.txt", TEXT * 20)
    code, out, err = run(capsys, "inspect", path, "--text", text, "--figure", tmp_path / "heads.png")
    assert code == 0, err
    assert "effective keys" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--figure", "heads.png"), "--figure shows what a text makes of the heads: give --text FILE too"),
        (("--text", "gone.txt"), "no such text: gone.txt"),
        (("--text", "SHORT"), "and at least 128 are needed"),
    ],
)
def test_mistakes_are_one_line(words, message, checkpoint, tmp_path, monkeypatch, capsys):
    if "SHORT" not in words:
        monkeypatch.setattr(inspect, "load_checkpoint", lambda path: pytest.fail("a model was loaded"))
    short = write(tmp_path / "short.txt", "a few words")
    code, _, err = run(capsys, "inspect", checkpoint[0], *(short if word == "SHORT" else word for word in words))
    assert code == 1
    assert message in err
