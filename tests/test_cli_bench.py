"""`hf-polyattn bench`: it times what it checked, says what this machine cannot do, and refuses what makes no sense."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from cli_runs import run

from hf_polyattn import timing
from hf_polyattn.commands import bench
from hf_polyattn.ops import forms
from hf_polyattn.timing import MASKS, PASSES, Cell, Timing, WrongResultError, measure, relative_error, step_of, tensors

SMALL = ["--lengths", 8, "--seconds", 0, "--head-dim", 4, "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def few_heads(monkeypatch):
    for module in (timing, bench):
        monkeypatch.setattr(module, "TOKENS", 16)
        monkeypatch.setattr(module, "HEADS", 2)


def test_table_has_every_pass_and_candidate(capsys):
    code, said, error = run(capsys, "bench", *SMALL, "--forms", "tiled", "naive")
    assert code == 0, error
    lines = said.splitlines()
    names = ["softmax eager", "coefficients tiled", "coefficients naive", "s^3 tiled", "s^3 naive"]
    assert lines[0].split("  ")[0] == "pass"
    assert all(name in lines[0] for name in names)
    assert [line.split()[0] for line in lines[1:4]] == list(PASSES)
    assert all(len(line.split()) == 3 + 2 + len(names) for line in lines[1:4])
    assert "2 heads of 4, 16 tokens a batch or more; medians of 5 rounds or more" in said
    assert f"torch {torch.__version__}" in said


def test_json_holds_what_the_table_rounds(capsys):
    code, said, _ = run(capsys, "bench", *SMALL, "--forms", "tiled", "--passes", "decode", "--phis", "s^2", "--json")
    assert code == 0
    report = json.loads(said)
    softmax, eager, square = report["timings"]
    assert [entry["candidate"] for entry in report["timings"]] == ["softmax sdpa", "softmax eager", "s^2 tiled"]
    assert softmax["speed_over_softmax"] == 1
    ratio = softmax["milliseconds"]["median"] / square["milliseconds"]["median"]
    assert square["speed_over_softmax"] == pytest.approx(ratio)
    low, high = square["milliseconds"]["quartiles"]
    assert 0 < low <= square["milliseconds"]["median"] <= high
    assert (square["pass"], square["length"], square["rounds"] >= 5) == ("decode", 8, True)
    assert max(entry["relative_error"] for entry in report["timings"]) < 1e-5
    assert report["absent"] == []


def test_unsteady_times_are_not_to_be_quoted(monkeypatch, capsys):
    cell, spread = Cell("forward", "float32", "causal", 4, 8, "cpu"), [0.9, 1.1]
    monkeypatch.setattr(
        bench, "measure", lambda *_: [Timing(cell, "softmax sdpa", (spread[0], 1, spread[1]), 1, 0, 5)]
    )
    assert "unsteady" not in run(capsys, "bench", "--quick", "--passes", "forward")[1]
    spread[1] = 1.4
    said = run(capsys, "bench", "--quick", "--passes", "forward")[1]
    assert "1 of 1 times are unsteady, quartiles up to 50% of the median apart: do not quote these" in said


def test_quick_is_a_smaller_plan_and_named_options_win(monkeypatch, capsys):
    cells = []

    def note(cell, phis, forms, seconds, say, rounds):
        cells.append((cell.dtype, cell.length, seconds))
        return measure(Cell("decode", "float32", "full", 4, 8, "cpu"), phis, ["tiled"], 0, say)

    monkeypatch.setattr(bench, "measure", note)
    assert run(capsys, "bench", "--quick", "--passes", "forward")[0] == 0
    assert cells == [("float32", 256, 0.1)]
    cells.clear()
    assert run(capsys, "bench", "--quick", "--passes", "forward", "--lengths", 8, 16, "--seconds", 2)[0] == 0
    assert cells == [("float32", 8, 2), ("float32", 16, 2)]
    cells.clear()
    assert run(capsys, "bench", "--passes", "forward")[0] == 0
    assert cells == [(dtype, length, 1.0) for dtype in ("float32", "bfloat16") for length in (512, 2048)]


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    right = timing.polynomial

    def wrong(cell, keep, phi, form):
        attention = right(cell, keep, phi, form)
        return attention if form == "naive" else lambda q, k, v: attention(q, k, v) * 1.01

    monkeypatch.setattr(timing, "polynomial", wrong)
    code, said, error = run(capsys, "bench", *SMALL, "--forms", "tiled", "--passes", "forward")
    assert (code, said) == (1, "")
    assert "coefficients tiled is wrong by 0.01: nothing is timed" in error


def test_what_a_machine_lacks_is_said(capsys):
    if forms.fused.problem("cpu") is None:
        pytest.skip("Triton interprets the fused form here")
    code, said, _ = run(capsys, "bench", *SMALL, "--forms", "fused", "tiled", "--passes", "forward")
    assert code == 0
    assert "no coefficients fused: " in said
    assert "coefficients fused" not in said.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "0"], "--lengths must be 1 or more, got 0"),
        (["--head-dim", "-1"], "--head-dim must be 1 or more, got -1"),
        (["--threads", "0"], "--threads must be 1 or more, got 0"),
        (["--seconds", "nan"], "--seconds must be 0 or more, got nan"),
        (["--forms", "magic"], "--forms: there is no form 'magic': choose of "),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
    ],
)
def test_errors_name_the_remedy(words, message, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, said, error = run(capsys, "bench", *words)
    assert (code, said) == (1, "")
    assert message in error


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pass_", PASSES)
def test_candidates_agree_with_the_definition_on_every_mask(pass_, mask):
    cell = Cell(pass_, "float32", mask, 4, 12, "cpu")
    found = {entry.candidate: entry for entry in measure(cell, ["s^2", "s^3"], ["tiled"], 0, pytest.fail, rounds=2)}
    assert set(found) == {"softmax sdpa", "softmax eager", "s^2 tiled", "s^3 tiled"}
    assert all(entry.relative_error < 1e-5 for entry in found.values())


def test_the_check_sees_a_forgotten_mask():
    cell = Cell("forward", "float32", "causal", 4, 12, "cpu")
    qkv, keep = tensors(cell)
    blind = timing.polynomial(Cell("forward", "float32", "full", 4, 12, "cpu"), keep, "s^3", "tiled")
    out = step_of(cell, blind, qkv)()
    assert relative_error(cell, "s^3 tiled", out, qkv, keep) > 0.1


def test_a_timed_training_pass_has_gradients():
    cell = Cell("forward+backward", "float32", "causal", 4, 12, "cpu")
    qkv, _ = tensors(cell)
    with pytest.raises(RuntimeError, match="does not require grad"):
        step_of(cell, lambda q, k, v: v.detach(), qkv)()


def test_the_benchmark_writes_rows_of_the_same_timings(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = ["--passes", "decode", "--dtypes", "float32", "--masks", "causal", "--lengths", "8", "--seconds", "0"]
    words += ["--forms", "tiled", "--phis", "s^3", "--head_dims", "4", "--device", "cpu"]
    out = tmp_path / "attention.csv"
    monkeypatch.setattr("sys.argv", ["benchmarks/attention.py", *words, "--out", str(out)])
    module.main()
    header, *rows = out.read_text().splitlines()
    assert header.startswith("pass,dtype,mask,head_dim,length,candidate,milliseconds,quartiles,ratio_to_sdpa,")
    assert [row.split(",")[5] for row in rows] == ["softmax sdpa", "softmax eager", "s^3 tiled"]
    assert "| decode | float32 | causal | 4 | 8 |" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
    assert issubclass(WrongResultError, RuntimeError)


def test_a_second_run_keeps_the_cells_that_it_does_not_measure(tmp_path, monkeypatch):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "attention.csv"
    words = ["--passes", "decode", "--dtypes", "float32", "--masks", "full", "--seconds", "0", "--phis", "s^3"]
    words += ["--forms", "tiled", "--head_dims", "4", "--device", "cpu", "--threads", "1"]
    for more in (["--lengths", "8", "16"], ["--lengths", "16", "--batches", "1", "3"], ["--lengths", "8"]):
        monkeypatch.setattr("sys.argv", ["benchmarks/attention.py", *words, *more, "--out", str(out)])
        module.main()
    header, *rows = (line.split(",") for line in out.read_text().splitlines())
    cells = [(row[header.index("length")], row[header.index("batch")]) for row in rows]
    # of 16 tokens there is one sequence by default
    assert cells == [(n, b) for n, b in (("8", "2"), ("16", "1"), ("16", "3")) for _ in range(3)]
    last = header.index("command")
    assert [row[last].split("--lengths ")[1] for row in rows[::3]] == ["8", "16 --batches 1 3", "16 --batches 1 3"]
    table = out.with_suffix(".md").read_text()
    assert "| decode | float32 | full | 4 | 8 |" in table
    assert "| decode (batch 3) | float32 | full | 4 | 16 |" in table


def test_steps_are_timed_against_a_cache_as_transformers_holds_it():
    cell = Cell("decode", "float32", "full", 4, 12, "cpu", 3)
    (q, k, v), _ = tensors(cell)
    assert (q.shape, k.shape) == ((3, 2, 1, 4), (3, 2, 12, 4))
    assert k.is_contiguous()
    assert v.is_contiguous()
    (_, k, _), _ = tensors(Cell(timing.TRANSPOSED, "float32", "full", 4, 12, "cpu", 3))
    assert k.shape == (3, 2, 12, 4)
    assert k.transpose(1, 2).is_contiguous()
