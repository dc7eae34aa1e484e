"""benchmarks/fuzz.py: 200 random calls, what it says of forms that are wrong, and its recorded results."""

import csv
import dataclasses
import importlib
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from hf_polyattn import ops
from hf_polyattn.ops import cpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FORMS = ["tiled", "recurrent", *(["cpu"] if cpu.build().problem is None else [])]


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("fuzz")


def test_random_calls(fuzz, capsys):
    found = fuzz.run(FORMS, seed=20261125, first=0, count=200, progress=False)
    said = capsys.readouterr().out
    assert sum(counts["failed"] for counts in found.values()) == 0, said
    assert sum(counts["computed"] for counts in found.values()) > 180
    assert {form for form, _ in found} == set(FORMS)


def simple(fuzz, **changes):
    case = fuzz.draw("tiled", random.Random(0))
    plain = {"dtype": torch.float32, "shape": (1, 2, 1, 33, 33, 8, 8), "degree": 3, "normalization": "length"}
    plain |= {"has_coefficients": True, "is_affine": False, "has_gain": False, "qk_norm": False, "softcap": None}
    plain |= {"has_bias": False, "masks": ("causal",), "layout": "plain", "probe_layout": "plain", "poison": None}
    plain |= {"is_learned": True, "pieces": False, "scaling": None}
    return dataclasses.replace(case, **{**plain, **changes})


class Wrong(torch.autograd.Function):
    """Identity whose backward is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def element_off(out, *, by):
    out = out.clone()
    out[0, 1, 20, 3] += by
    return out


FAULTS = {
    "one element": lambda attention: lambda *x, **o: element_off(attention(*x, **o), by=1e-4),
    "not a number": lambda attention: lambda *x, **o: element_off(attention(*x, **o), by=math.nan),
    "the newest key": lambda attention: lambda *x, **o: attention(*x, **{**o, "key_lengths": torch.tensor([32])}),
    "gradient": lambda attention: lambda q, *x, **o: attention(Wrong.apply(q, 1.001), *x, **o),
    "coefficients": lambda attention: (
        lambda *x, **o: attention(*x, **{**o, "coefficients": Wrong.apply(o["coefficients"], 1.01)})
    ),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_found(fuzz, fault, monkeypatch):
    if fault is None:
        assert fuzz.check(simple(fuzz), 3)[0] == "computed"
        return
    monkeypatch.setattr(ops, "tiled_attention", FAULTS[fault](ops.tiled_attention))
    with pytest.raises(fuzz.Failure, match=r"the definition says|is nan"):
        fuzz.check(simple(fuzz), 3)


def test_a_failure_is_printed_with_the_command_that_repeats_it(fuzz, monkeypatch, capsys):
    monkeypatch.setattr(ops, "tiled_attention", FAULTS["the newest key"](ops.tiled_attention))
    case = simple(fuzz)
    monkeypatch.setattr(fuzz, "draw", lambda form, rng: case)
    found = fuzz.run(["tiled"], seed=3, first=7, count=1, progress=False)
    assert found["tiled", "float32"]["failed"] == 1
    assert "python benchmarks/fuzz.py --cases 1 --seed 3 --first 7 --forms tiled" in capsys.readouterr().out


def test_a_refusal_without_need_and_a_missing_one_are_failures(fuzz, monkeypatch):
    wrong = simple(fuzz, form="recurrent", normalization="l1", degree=2)
    assert fuzz.check(wrong, 3)[0] == "refused"
    monkeypatch.setattr(fuzz, "refusal", lambda case: None)
    with pytest.raises(fuzz.Failure, match='refused: .* it has no normalization "l1"'):
        fuzz.check(wrong, 3)
    monkeypatch.setattr(fuzz, "refusal", lambda case: "it has no dropout")
    with pytest.raises(fuzz.Failure, match="computed what it must refuse: it has no dropout"):
        fuzz.check(simple(fuzz), 3)


def test_one_case_by_itself_is_the_same(fuzz):
    whole = dict(fuzz.cases(["tiled", "recurrent"], 5, 0, 9))
    alone = dict(fuzz.cases(["tiled"], 5, 6, 1))
    assert str(whole[6]) == str(alone[6])
    assert str(whole[6]) != str(whole[8])


def test_results_of_a_stopped_run_stay(fuzz, monkeypatch, tmp_path):
    """Written every 100 cases; the rows of a command give way to its new ones, those of others stay."""
    out, seen = tmp_path / "fuzz.csv", []

    def check(case, seed):
        seen.append(case)
        if len(seen) == 250:
            raise KeyboardInterrupt
        return "computed", 0.25, 1e-3

    def main(seed: str):
        words = ["benchmarks/fuzz.py", "--cases", "300", "--seed", seed, "--forms", "tiled", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        fuzz.main()

    def counts() -> dict[str, int]:
        rows = csv.DictReader(out.read_text().splitlines())
        totals = {}
        for row in rows:
            totals[row["command"]] = totals.get(row["command"], 0) + int(row["computed"])
        return totals

    monkeypatch.setattr(fuzz, "check", check)
    monkeypatch.delenv("HF_POLYATTN_CPU", raising=False)
    command = "python benchmarks/fuzz.py --cases 300 --seed {} --forms tiled"
    with pytest.raises(KeyboardInterrupt):
        main("1")
    assert counts() == {command.format(1): 200}
    main("2")
    main("1")
    assert counts() == {command.format(1): 300, command.format(2): 300}


def test_recorded_results():
    """At least 10,000 cases of the three forms, with what is needed to repeat them.

    Each case that failed has been run again by itself since what it found was mended, and did not fail. Four did, all
    of a bias without rows or keys, whose bound was 0: a fault of the comparison, not of a form.
    """
    rows = list(csv.DictReader((BENCHMARKS / "results" / "fuzz.csv").read_text().splitlines()))
    assert {row["form"] for row in rows} >= {"cpu", "tiled", "recurrent"}
    assert sum(int(row["computed"]) + int(row["refused"]) for row in rows) >= 10_000
    again = [row for row in rows if "--cases 1 " in row["command"]]
    assert sum(int(row["failed"]) for row in rows) == sum(int(row["computed"]) for row in again) == len(again)
    for row in rows:
        assert float(row["worst"]) <= 1
        assert "python benchmarks/fuzz.py --cases" in row["command"]
        assert all(row[name] for name in ("seed", "torch", "hf_polyattn", "device", "date"))
