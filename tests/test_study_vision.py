"""The studies of images: what they read and estimate, and that their short forms run."""

import csv
import dataclasses
import gzip
import math
import struct
import sys

import pytest
import torch
from recipe_runs import RECIPES, recipe

pytest.importorskip("sklearn")
RESULTS = RECIPES / "results"


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def vision():
    return recipe("study_vision")


@pytest.fixture
def scale():
    return recipe("study_scale")


def test_splits_are_disjoint_balanced_and_of_the_seed(vision):
    first, again, other = vision.digits(1), vision.digits(1), vision.digits(2)
    assert sum(len(part.labels) for part in first.values()) == 1797
    rows = [tuple(row.flatten().tolist()) for part in first.values() for row in part.pixels]
    # scikit-learn's images are all different
    assert len(set(rows)) == 1797
    assert all(torch.equal(first[name].pixels, again[name].pixels) for name in first)
    assert not torch.equal(first["test"].labels, other["test"].labels)
    counts = torch.bincount(first["test"].labels)
    assert counts.max() - counts.min() <= 3
    assert first["train"].pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert vision.digits(1, (16, 16))["train"].pixels.shape[1:] == (1, 16, 16)


def test_without_scikit_learn_the_error_says_what_to_install(vision, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        vision.digits(1)


def write_idx(path, array):
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + bytes(array.flatten())
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_a_folder_of_idx_files(vision, tmp_path):
    with pytest.raises(FileNotFoundError, match="the four idx files"):
        vision.idx_folder(tmp_path, 1)
    for part, count in (("train", 48), ("t10k", 5)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8).numpy()
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", images[:, 0, 0] % 10)
    parts = vision.idx_folder(tmp_path, 1)
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 44, "validation": 4, "test": 5}
    # an image keeps its label, and pixels their order
    raw = vision.read_idx(tmp_path / "t10k-images-idx3-ubyte.gz")
    assert torch.equal(parts["test"].labels, raw[:, 0, 0].long() % 10)
    assert torch.equal(parts["test"].pixels.flatten().argsort(), raw.float().flatten().argsort())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"no idx")
    with pytest.raises(ValueError, match="not an idx file"):
        vision.idx_folder(tmp_path, 1)


def test_vision_in_short_learns_and_is_not_repeated(vision, tmp_path, capsys, monkeypatch):
    out = tmp_path / "vision.csv"
    words = ["--quick", "--seeds", "1", "--only", "softmax", "poly", "--out", str(out)]
    vision.main(words)
    rows = rows_in(out)
    assert [row["variant"] for row in rows] == ["softmax", "poly"]
    # chance is a tenth, and softmax is at .23 after as many steps
    assert float(rows[1]["test_accuracy"]) > 0.2
    assert {row["steps"] for row in rows} == {"68"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| digits | degree 3, defaults |" in capsys.readouterr().out
    monkeypatch.setattr(vision, "train", lambda *args: pytest.fail("a finished run was repeated"))
    vision.main(words)
    assert rows_in(out) == rows


def test_a_run_that_diverges_is_a_row_without_numbers(vision):
    setup = dataclasses.replace(vision.QUICK, epochs=1)
    splits = vision.digits(1)
    numbers = vision.train(setup, "--activation monomial --gain 1e30 --score_spread 100", splits, 1)
    assert numbers["note"].startswith("step 1: loss")
    assert (numbers["test_loss"], numbers["validation_accuracy"], numbers["steps"]) == ("", "", 1)
    row = {"data": "digits", "variant": "unscaled", "seed": "1", **{k: str(v) for k, v in numbers.items()}}
    assert "| digits | s^3, not scaled | diverged | diverged | diverged | 1 |" in vision.table([row])


def scale_rows(best, noise=0.0):
    """Rows whose losses are parabolas in log c, lowest at best(N)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (8, 16, 64, 256):
        for seed in ("1", "2", "3"):
            shift = noise * torch.randn((), generator=generator).item()
            for octave in range(-4, 9, 2):
                constant = math.sqrt(length) * 2**octave
                loss = (math.log(constant / best(length)) - shift) ** 2
                rows.append(
                    {
                        "N": str(length),
                        "seed": seed,
                        "constant": f"{constant:.6g}",
                        "validation_loss": f"{loss:.6f}",
                        "test_accuracy": f"{0.9 - loss / 100:.5f}",
                    }
                )
    return rows


@pytest.mark.parametrize("power", [0.5, 0.35])
def test_the_exponent_that_was_put_in_is_found(scale, power):
    line = scale.fit(scale_rows(lambda n: 3 * (n + 1) ** power, noise=0.1))
    assert line.low < power < line.high
    assert line.high - line.low < 0.3
    assert (line.points, line.without) == (12, 0)


def test_a_curve_without_a_valley_is_said_to_have_none(scale):
    rows = scale_rows(lambda n: 1e-6)
    assert scale.fit(rows).without == 12
    assert "12 of 12 curves have no valley in the grid" in scale.table(rows)
    # runs that diverged leave no parabola, or one that falls to an end
    assert scale.best({1.0: math.inf, 2.0: 1.0, 4.0: 3.0}) == (2.0, True)
    assert scale.best({1.0: math.inf, 2.0: 5.0, 4.0: 2.0, 8.0: 0.0}) == (8.0, True)
    # a ridge is no valley
    assert scale.best({1.0: 1.0, 2.0: 3.0, 4.0: 0.0}) == (4.0, True)
    assert scale.best({1.0: math.inf, 2.0: 3.0, 4.0: 1.0, 8.0: 3.0}) == (pytest.approx(4.0), False)


def test_scale_in_short(scale, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.csv"
    scale.main(["--quick", "--seeds", "1", "--out", str(out)])
    rows = rows_in(out)
    assert [(row["N"], row["octave"]) for row in rows] == [(n, k) for n in ("8", "16") for k in ("-2", "0", "2")]
    # 1/c is the gain
    assert f"--gain {1 / float(rows[0]['constant']):.6g} " in rows[0]["changes"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "1/√N would be n^0.50" in shown
    # two points have an interval without an end
    assert "cannot tell how the best constant goes" in shown
    monkeypatch.setattr(scale, "train", lambda *args: pytest.fail("a finished run was repeated"))
    scale.main(["--quick", "--seeds", "1", "--out", str(out)])


def test_tables_in_the_repository_are_those_of_their_rows(vision, scale):
    for name, study in (("vision", vision), ("vision_scale", scale)):
        rows = rows_in(RESULTS / f"{name}.csv")
        assert (RESULTS / f"{name}.md").read_text() == study.table(rows) + "\n"
        assert all(row["command"].startswith("python recipes/") and row["device"] for row in rows)
