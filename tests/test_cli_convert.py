"""`hf-polyattn convert`: the recipe's stages behind a short command."""

import json

import pytest
from cli_runs import TEXT, run, save, write
from transformers import AutoModelForCausalLM

import hf_polyattn_cli
from hf_polyattn.models import PolyModelMixin

FAST = ("--", "--block_size", 16, "--batch_size", 4, "--validation_batches", 2, "--calibrate.batches", 2)
STAGES = ("calibrate", "transfer", "distill")
FAST = (*FAST, "--transfer.steps", 2, "--distill.steps", 2)


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "source", n_positions=32), write(tmp_path / "text.txt", TEXT * 60)


def test_the_report_is_a_table_and_the_next_command(source, tmp_path, capsys):
    model, text = source
    code, out, err = run(capsys, "convert", model, "--to", tmp_path / "out", "--text", text, "--degree", 2, *FAST)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["model", "teacher,", "patched", *STAGES]
    assert lines[-1].startswith(f"next:   hf-polyattn card {tmp_path / 'out'} --results ")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, PolyModelMixin)
    assert loaded.config.polyattn["degree"] == 2
    # what it says is to be done next can be done
    code, out, err = run(capsys, *lines[-1].partition("  (")[0].split()[2:], "--license", "mit")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The conversion, stage by stage (lower is better)" in card
    assert "](conversion.png)" in card


def test_json_is_all_that_standard_output_gets(source, tmp_path, capsys):
    model, text = source
    options = ("--text", text, "--shares", 0.5, 1, "--twin", "--seed", 7, "--json")
    code, out, err = run(capsys, "convert", model, "--to", tmp_path / "out", *options, *FAST)
    assert code == 0, err
    report = json.loads(out)
    stages = [row["stage"] for row in report["rows"][3:]]
    assert stages == ["transfer 50%", "distill 50%", "transfer 100%", "distill 100%"]
    assert report["tuned"]["steps"] == 4
    assert report["saved"] == str(tmp_path / "out")


def test_a_configuration_and_fields_stand_behind_two_dashes(source, tmp_path, capsys):
    model, text = source
    config = write(tmp_path / "fast.yaml", "stages: [calibrate]\nblock_size: 16\nbatch_size: 4\ndegree: 4\n")
    words = ("--", config, "--calibrate.batches", 1, "--validation_batches", 1)
    code, out, err = run(capsys, "convert", model, "--to", tmp_path / "out", "--text", text, *words)
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.polyattn["degree"] == 4


@pytest.mark.parametrize("front", [[], ["--debug"], ["--import", "json"], ["--imp", "convert", "--import=json"]])
def test_options_stand_before_the_command_and_fields_behind_two_dashes(front, monkeypatch):
    seen = []
    monkeypatch.setattr(hf_polyattn_cli, "run", seen.append)
    assert hf_polyattn_cli.main([*front, "convert", "gpt2", "--to", "out", "--", "--transfer.steps", "100"]) == 0
    assert seen[0].words == ["--transfer.steps", "100"]
    assert hf_polyattn_cli.main([*front, "train", "convert", "--", "--batch_size", "4"]) == 0
    assert seen[1].words[-2:] == ["--batch_size", "4"]


def test_ctrl_c_is_one_line_that_says_how_to_go_on(source, tmp_path, capsys, monkeypatch):
    def stop(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_polyattn.converting.job.Job.run", stop)
    model, text = source
    code, _, err = run(capsys, "convert", model, "--to", tmp_path / "out", "--text", text, *FAST)
    assert code == 130
    line = f"interrupted. What is done is kept in {tmp_path / 'out'}: the same command goes on from there"
    assert err.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--normalization", "l1", *FAST), 1, "here: --calibrate.fit gain"),
        (("--", "--block_size", "64"), 1, "block_size 64 is more than the model's 32 positions: lower it"),
        (("--text", "gone.txt", *FAST), 1, "no such file or folder: gone.txt"),
        (("--", "--transfre.steps", "4"), 2, "did you mean"),
        (("--transfer.steps", "4"), 2, "--transfer.steps 4; fields of recipes/convert.py go behind --: -- --transfer"),
        (
            ("--block_size", "16"),
            2,
            "unrecognized arguments: --block_size 16; fields of recipes/convert.py go behind --",
        ),
    ],
)
def test_a_mistake_is_one_line(words, status, message, source, tmp_path, capsys):
    model, text = source
    text_words = () if "--text" in words else ("--text", text)
    try:
        code, _, err = run(capsys, "convert", model, "--to", tmp_path / "out", *text_words, *words)
    except SystemExit as exit_:
        code, err = exit_.code, capsys.readouterr().err
    assert code == status
    assert message in " ".join(err.splitlines()[-1].split())
