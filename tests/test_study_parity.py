"""The study of parity and the page of evidence: paired differences, verdicts from rows, a page from csv files."""

import csv
import math

import pytest
from recipe_runs import RECIPES, recipe, write_text

RESULTS = RECIPES / "results"


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def parity():
    return recipe("study_parity")


@pytest.fixture
def evidence():
    pytest.importorskip("scipy")
    return recipe("study_evidence")


@pytest.mark.slow
def test_parity_in_short(parity, tmp_path, capsys, monkeypatch):
    data = write_text(tmp_path, 20_000)
    out = tmp_path / "parity.csv"
    words = ["--quick", "--seeds", "1", "--out", str(out), "--runs", str(tmp_path / "runs")]
    parity.main([*words, "--data", str(data), "--only", "softmax", "monomial-mean0.5"])
    rows = rows_in(out)
    assert [(row["model"], row["variant"]) for row in rows] == [
        (model, name) for model in ("llama", "bert") for name in ("softmax", "monomial-mean0.5")
    ]
    # a learnable gain for each of four heads in two layers
    sizes = [int(row["parameters"]) for row in rows]
    assert (sizes[1] - sizes[0], sizes[3] - sizes[2]) == (8, 8)
    assert all(0 < float(row["validation_loss"]) < 6 for row in rows)
    assert str(tmp_path) not in out.read_text()
    assert not list((tmp_path / "runs").iterdir())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "| LLaMA | softmax |" in shown
    assert "BERT, masked characters: degree 3, defaults" in shown
    monkeypatch.setattr(parity, "run", lambda *args: pytest.fail("a finished run was repeated"))
    parity.main([*words, "--models", "bert", "--only", "softmax"])
    assert rows_in(out) == rows


def test_a_run_that_diverges_has_no_loss(parity, tmp_path, monkeypatch):
    from dataclasses import replace

    from hf_polyattn.training.nonfinite import NonFiniteError

    def diverge(argv):
        (tmp_path / "run").mkdir()
        raise NonFiniteError("step 7: the loss is nan; first seen in somewhere")

    monkeypatch.setitem(parity.FAMILIES, "llama", replace(parity.FAMILIES["llama"], recipe=diverge))
    row = parity.run("llama", "monomial", 1, [], tmp_path / "run")
    assert (row["validation_loss"], row["note"]) == ("", "step 7: the loss is nan")


def losses(folder, level, seeds=3):
    """csv files of all four models, in which every form is `level` times softmax's loss."""
    forms = ("softmax", "poly", "monomial", "monomial-mean0.5", "sigmoid")
    keys = [(name, str(seed)) for name in forms for seed in range(seeds)]
    # seeds differ more than forms: only paired differences show
    value = {(name, seed): (2 + int(seed)) * (1 if name == "softmax" else level) for name, seed in keys}
    gpt2 = [{"variant": name, "seed": seed, "validation_loss": value[name, seed]} for name, seed in keys]
    write_rows(folder / "shakespeare_activations.csv", gpt2)
    write_rows(folder / "parity.csv", [{"model": model, **row} for model in ("llama", "bert") for row in gpt2])
    images = [
        {"data": "digits", "variant": name, "seed": seed, "test_loss": value[name, seed], "test_accuracy": accuracy}
        for name, seed in keys
        for accuracy in [0.9 - 0.01 * int(seed) - (0 if name == "softmax" else level - 1)]
    ]
    write_rows(folder / "vision.csv", images)


def test_differences_are_paired(parity, tmp_path):
    losses(tmp_path, 1.1)
    results = parity.collect(tmp_path / "parity.csv")
    assert list(results) == ["gpt2", "llama", "bert", "vit", "vit-accuracy"]
    assert results["llama"].paired("monomial") == pytest.approx([0.2, 0.3, 0.4])
    line = "| LLaMA | s^3/sqrt(n) as published | validation loss, nats per character | 3.3000 ± 1.1000 "
    assert line + "| +0.3000 ± 0.1000 | 3 |" in parity.table(results)


@pytest.mark.parametrize(("level", "verdict"), [(1.005, "holds"), (0.9, "holds"), (1.1, "does not hold")])
def test_verdict_of_parity(evidence, tmp_path, level, verdict):
    losses(tmp_path, level)
    judged = evidence.parity("monomial")(tmp_path)
    assert judged.verdict == verdict
    # a model that is missing, or has one seed, lets nothing hold altogether
    (tmp_path / "parity.csv").unlink()
    judged = evidence.parity("monomial")(tmp_path)
    assert judged.verdict == ("holds in part" if verdict == "holds" else verdict)
    assert "LLaMA, BERT" in judged.seen[-1]
    losses(tmp_path, level, seeds=1)
    assert evidence.parity("monomial")(tmp_path).verdict == "not measured"


def test_verdict_of_bounds(evidence, tmp_path):
    rows = [
        {"norm": norm, "N": "8", "largest_over_sqrt_N": bound, "bound": bound}
        for norm, bound in (("frobenius", 1), ("jacobian", 2))
    ]
    write_rows(tmp_path / "norms_theory_bounds.csv", rows)
    assert evidence.softmax_bounds(tmp_path).verdict == "holds"
    write_rows(tmp_path / "norms_theory_bounds.csv", [rows[0], {**rows[1], "largest_over_sqrt_N": 2.01}])
    assert evidence.softmax_bounds(tmp_path).verdict == "holds in part"


@pytest.mark.parametrize(("exponent", "verdict"), [(0.5, "holds"), (0.62, "holds in part"), (1.2, "does not hold")])
def test_verdict_of_exponents(evidence, tmp_path, exponent, verdict):
    facts = {"inputs": "gaussian", "mask": "full", "norm": "frobenius", "degree": "3", "low": "0", "high": "2"}
    rows = [
        {**facts, "norm": norm, "normalization": name, "exponent": exponent}
        for name in ("none", "sqrt_length")
        for norm in ("frobenius", "jacobian")
    ]
    write_rows(tmp_path / "norms_theory_exponents.csv", rows)
    assert evidence.exponents("gaussian")(tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("power", "lengths", "verdict"),
    [
        (0.5, (8, 16, 64, 256), "holds"),
        (None, (8, 16, 64, 256), "undecided"),
        # above 0, but not 1/2
        (0.3, (8, 16, 64, 256), "holds in part"),
        (-0.3, (8, 16, 64, 256), "does not hold"),
        (0.5, (8, 16), "not measured"),
    ],
)
def test_verdict_of_the_scale_law(evidence, tmp_path, power, lengths, verdict):
    rows = [
        # c at which the parabola is lowest differs a little between the seeds
        {"N": n, "seed": seed, "constant": 2.0**k, "validation_loss": (k - place - 0.03 * seed) ** 2}
        for n in lengths
        for seed in (1, 2, 3)
        # None: seeds that agree on nothing
        for place in [4 * (seed - 2) if power is None else power * math.log2(n + 1)]
        for k in range(-6, 8)
    ]
    write_rows(tmp_path / "vision_scale.csv", rows)
    assert evidence.scale_law(tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    # the second is two standard errors above 0: of three seeds that is little
    [((0.1, 0.11, 0.12), "holds"), ((0.1, 0.02, 0.2), "undecided"), ((-0.1, -0.11), "does not hold")],
)
def test_verdict_of_scaled_against_unscaled(evidence, tmp_path, differences, verdict):
    rows = [
        {"data": "digits", "variant": name, "seed": seed, "N": 16, "test_loss": 1 + shift, "note": ""}
        for seed, difference in enumerate(differences)
        for name, shift in (("monomial", 0), ("unscaled", difference))
    ]
    write_rows(tmp_path / "vision.csv", rows)
    assert evidence.scaled_against_unscaled(tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("scaled", "unscaled", "verdict"), [(0.3, 3, "holds"), (3, 30, "holds in part"), (3, 4, "does not hold")]
)
def test_verdict_of_norms_in_training(evidence, tmp_path, scaled, unscaled, verdict):
    sizes = {"softmax": 0.25, "scaled": scaled, "unscaled": unscaled}
    key = {"model": "bert", "seed": "1"}
    rows = [{**key, "variant": name, "layer": 3, "step": 1, "frobenius": size} for name, size in sizes.items()]
    write_rows(tmp_path / "norms_training.csv", rows)
    write_rows(tmp_path / "norms_training_runs.csv", [{**key, "variant": name} for name in sizes])
    assert evidence.norms_in_training("scaled", "unscaled")(tmp_path).verdict == verdict


@pytest.mark.parametrize(("broken", "verdict"), [((True, False), "holds"), ((True, True), "does not hold")])
def test_verdict_of_stability(evidence, tmp_path, broken, verdict):
    cell = {"learning_rate": "0.1", "layers": "4", "clip": "1", "precision": "no"}
    rows = [
        {**cell, "attention": name, "seed": seed, "diverged_at": 7 if is_broken else ""}
        for name, seeds in (("softmax", (True, False)), ("monomial", broken))
        for seed, is_broken in enumerate(seeds)
    ]
    # what only one of them was trained in does not count
    rows.append({**rows[-1], "seed": 9, "diverged_at": 3})
    write_rows(tmp_path / "stability.csv", rows)
    assert evidence.stability(tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("points", "verdict"), [((0, 0), "holds"), ((0, -5), "holds in part"), ((-5, -5), "does not hold")]
)
def test_verdict_of_accuracies(evidence, tmp_path, points, verdict):
    rows = [
        {"task": task, "attention": name, "seed": seed, "length": length, "accuracy": 0.8 - 0.1 * seed + shift / 100}
        for task, behind in zip(("induction", "recall"), points, strict=True)
        for name, shift in (("softmax", 0), ("poly", behind))
        for seed in (1, 2)
        for length in (16, 32)
    ]
    write_rows(tmp_path / "recall.csv", rows)
    assert evidence.accuracies("recall.csv", "poly")(tmp_path).verdict == verdict
    # a study of one task names none
    write_rows(
        tmp_path / "listops.csv",
        [{k: x for k, x in row.items() if k != "task"} for row in rows if row["length"] == 16],
    )
    assert evidence.accuracies("listops.csv", "nothing")(tmp_path).verdict == "not measured"


@pytest.mark.parametrize(("rise", "verdict"), [(0.1, "holds"), (0.9, "does not hold")])
def test_verdict_of_longer_than_trained(evidence, tmp_path, rise, verdict):
    rows = [
        {"attention": name, "seed": "1", "length": length, "minus_trained_length": value * (length > 256)}
        for name, value in (("softmax", 0.5), ("poly", rise), ("none", 9))
        for length in (256, 1024)
    ]
    write_rows(tmp_path / "length.csv", rows)
    assert evidence.longer_than_trained(tmp_path).verdict == verdict


def test_a_claim_without_rows_is_not_measured_and_says_what_measures_it(evidence, tmp_path):
    page = evidence.page(tmp_path)
    for claim in evidence.CLAIMS:
        assert f"| {claim.name} | not measured |" in page
        assert f"`{claim.command}` writes it" in page
    assert "../recipes/results/" not in page


def test_the_committed_page_is_what_the_rows_say(evidence, tmp_path, capsys):
    evidence.main(["--out", str(tmp_path / "evidence.md")])
    committed = evidence.PAGE.read_text(encoding="utf-8")
    written = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert committed == written, "run python recipes/study_evidence.py"


def test_the_committed_table_is_that_of_its_rows(parity):
    table = parity.table(parity.collect(RESULTS / "parity.csv"))
    assert (RESULTS / "parity.md").read_text(encoding="utf-8") == table + "\n"
    assert all(row["command"].startswith("python recipes/") for row in parity.rows_of(RESULTS / "parity.csv"))
