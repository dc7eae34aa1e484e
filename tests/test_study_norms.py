"""The studies of norms: what they estimate, against cases with a known answer, and that their short forms run."""

import csv
import importlib
import sys

import numpy as np
import pytest
import torch
from recipe_runs import RECIPES, recipe, write_text

RESULTS = RECIPES / "results"


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def theory():
    return recipe("study_norms_theory")


@pytest.fixture
def training():
    importlib.import_module("pretrain_causal_lm")
    return recipe("study_norms_training")


def test_exponent_of_a_power_law_with_noise(theory):
    """The slope that was put in lies in the interval, which shrinks with the number of draws."""
    generator = np.random.default_rng(1)
    widths = []
    for draws in (10, 1000):
        curve = {n: 3 * n**0.7 * generator.lognormal(0, 0.3, size=(draws, 2)) for n in (16, 64, 256)}
        slope, low, high = theory.exponent(curve)
        assert low < slope < high
        assert low < 0.7 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", ["sqrt_length", "none"])
def test_predicted_sizes_are_those_of_gaussian_scores(theory, degree, causal, normalization):
    form = theory.Form(degree, normalization)
    drawn = [theory.norms(form, scores, causal) for _, scores in theory.gaussian_scores([64], 100)]
    size = torch.stack(drawn).square().mean((0, 2)).sqrt()
    for norm, measured in zip(theory.NORMS, size.tolist(), strict=True):
        assert measured == pytest.approx(form.predicted(norm, causal, 64), rel=0.05 * degree)


def test_ascent_finds_the_bounds_of_softmax(theory):
    assert theory.uphill("frobenius", 4, 300) == pytest.approx(1, abs=0.01)
    # two keys that tie: a quarter of the paper's bound
    assert theory.uphill("jacobian", 2, 300) == pytest.approx(0.5, abs=0.01)


def test_scores_of_a_checkpoint_are_those_of_its_attention(theory, shared_data):
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()
    folder = str(shared_data / "models" / "gpt2-shakespeare-0.8m")
    drawn = list(theory.trained_scores(folder, text, [8, 16], 2))
    assert [(n, tuple(scores.shape)) for n, scores in drawn] == [(n, (1, 16, n, n)) for n in (8, 16) for _ in range(2)]
    # a trained head looks at some keys more than at others
    assert all(scores.std((2, 3)).min() > 0.1 for _, scores in drawn)


def test_theory_in_short(theory, tmp_path, capsys):
    out = tmp_path / "quick.csv"
    theory.main(["--quick", "--out", str(out)])
    exponents = {(row["form"], row["mask"], row["norm"]): row for row in rows_in(tmp_path / "quick_exponents.csv")}
    assert len(exponents) == 13 * 2 * 2
    for mask in ("full", "causal"):
        for form, expected in (("s^1/sqrt(n)", 0.5), ("s^1", 1.0)):
            row = exponents[form, mask, "frobenius"]
            assert float(row["exponent"]) == pytest.approx(expected, abs=0.08)
            assert float(row["predicted"]) == pytest.approx(expected, abs=0.02)
    assert all(
        0.4 < float(row["largest_over_sqrt_N"]) < float(row["bound"]) for row in rows_in(tmp_path / "quick_bounds.csv")
    )
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| gaussian, causal | s^3/sqrt(n) |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        theory.main(["--checkpoint", "folder"])


@pytest.mark.slow
def test_norms_over_training_in_short(training, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    data = write_text(tmp_path, 20_000)
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "norms.csv"), "--quick", "--data", str(data)]
    training.main([*words, "--models", "gpt2", "vit", "--only", "softmax", "unscaled-spread"])
    training.main([*words, "--models", "llama", "bert", "--only", "scaled", "--seeds", "1"])
    rows = rows_in(tmp_path / "norms.csv")
    first = [row for row in rows if row["layer"] == "0"]
    assert [(row["model"], int(row["step"])) for row in first] == [
        (model, step) for model in ("gpt2", "gpt2", "vit", "vit", "llama", "bert") for step in (1, 4, 8, 12)
    ]
    assert {row["layer"] for row in rows} == {"0", "1", "2"}
    for model in ("gpt2", "vit"):
        own = [row for row in first if (row["model"], row["step"]) == (model, "1")]
        size = {row["variant"]: float(row["frobenius"]) for row in own}
        assert size["softmax"] < 1 < size["unscaled-spread"]
    runs = rows_in(tmp_path / "norms_runs.csv")
    assert [(row["model"], row["variant"], row["seed"]) for row in runs] == [
        *((model, name, "1337") for model in ("gpt2", "vit") for name in ("softmax", "unscaled-spread")),
        *((model, "scaled", "1") for model in ("llama", "bert")),
    ]
    assert all(float(row["validation_loss"]) > 0 and row["steps"] == "12" for row in runs)
    assert all(float(row["step_ms"]) > 0 < float(row["overhead_every_100"]) for row in runs)
    assert str(tmp_path) not in (tmp_path / "norms_runs.csv").read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["norms.png", "norms_bert.png", "norms_llama.png", "norms_vit.png"]
    # what is done is not done again
    monkeypatch.setattr(training, "run", lambda *args: pytest.fail("a finished run was repeated"))
    training.main([*words, "--models", "gpt2", "--only", "softmax"])
    assert "| LLaMA | s³/√n, as published |" in capsys.readouterr().out


def test_a_run_that_diverges_is_a_row_too(training, tmp_path, monkeypatch):
    from hf_polyattn.diagnostics.report import AttentionReport, append_report
    from hf_polyattn.training.nonfinite import NonFiniteError

    out = tmp_path / "run"

    def diverge(argv):
        out.mkdir()
        numbers = {name: torch.ones(2) for name in training.MEASURED}
        append_report(out / "diagnostics.jsonl", 1, AttentionReport({"attn": numbers}), seconds=0.1)
        (out / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "seconds": 0.5}\n')
        raise NonFiniteError("step 2: the loss is nan; first seen in somewhere")

    monkeypatch.setattr(sys.modules["pretrain_causal_lm"], "main", diverge)
    rows, summary = training.run("gpt2", "unscaled", 1, [], False, out)
    assert [(row["step"], row["layer"]) for row in rows] == [(1, 0)] * 3
    assert (summary["validation_loss"], summary["note"]) == ("", "step 2: the loss is nan")
    assert summary["step_ms"] == 400


def test_the_table_of_norms_means_over_the_seeds(training):
    rows = [
        {"model": "vit", "variant": "softmax", "seed": seed, "layer": layer, "step": step, **numbers}
        for seed, factor in (("1", 1), ("2", 3))
        for layer in ("0", "3")
        for step, size in (("1", 1), ("10", 4), ("20", 2))
        for numbers in [{"frobenius": str(factor * size * (layer == "3")), "jacobian": str(factor * size)}]
    ]
    runs = [
        {"model": "vit", "variant": "softmax", "seed": "1", "validation_loss": "0.5", "note": ""},
        {"model": "vit", "variant": "softmax", "seed": "2", "validation_loss": "", "note": "step 20: gone"},
    ]
    assert "| ViT | softmax | 2, 8, 4 | 2, 8, 4 | 0.5000; step 20: gone | 2 |" in training.table(rows, runs)


def test_what_the_repository_holds_was_measured_and_is_what_the_guide_shows(theory, training):
    guide = (RECIPES.parent / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    exponents = rows_in(RESULTS / "norms_theory_exponents.csv")
    assert {row["inputs"] for row in exponents} == {"gaussian", "trained"}
    rows, runs = rows_in(RESULTS / "norms_training.csv"), rows_in(RESULTS / "norms_training_runs.csv")
    variants = {row["variant"] for row in runs if row["model"] == "gpt2"}
    assert variants >= {"softmax", "scaled", "unscaled", "calibrated", "poly"}
    assert training.table(rows, runs) in guide
    # every line that the guide shows of the other table stands in it
    shown = [line for line in guide.splitlines() if line.startswith(("| gaussian", "| trained"))]
    written = (RESULTS / "norms_theory.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 4
    assert set(shown) <= set(written)
    # the promise of the guide: less than 5 % of a run's time
    assert all(float(row["overhead_every_100"]) < 0.05 for row in runs)
    assert all(row["command"].startswith("python recipes/") for row in (*runs, *exponents))
