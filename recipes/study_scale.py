"""Which constant c suits s^3/c at which length: figure 1 of arXiv 2410.18613 with a small ViT on digits.

    python recipes/study_scale.py
    python recipes/study_scale.py --quick

The paper scales s^p by 1/sqrt(N) and finds that the best scale falls so with N. Here: the digits of study_vision.py as
256, 64, 16 and 8 patches (16x16 pixels in patches of 1, 8x8 in patches of 1, 2 and 2x4), a constant gain 1/c and
`normalization none`, c from sqrt(N)/16 to 256 sqrt(N) in powers of 4, several seeds; scores start at spread 1, as
the paper's theory has them. The best c of a length and seed is the lowest point of the parabola that fits the
validation losses over log c: single runs differ too much to take the lowest of them. Its logarithm is fitted to that
of the number of keys, which is N and the class token; 1/sqrt(N) means the slope 1/2. Test images only show what the
choice is worth. Finished runs are kept. All 84 runs take 15 minutes of one CPU core, those of 256 patches nearly all
of it. --quick: two short lengths, in seconds.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from study_rows import Row, append, by_seed, finished, out_of, rows_of, study_parser, where
from study_tables import markdown, save_figure, write_up
from study_vision import Setup, digits, facts, of_scikit_learn, train
from tqdm import tqdm

SMALL = Setup("digits", (8, 8), (1, 1), width=32, layers=2, heads=2, epochs=6, batch_size=32, learning_rate=3e-3)
# patches -> image and patch
LENGTHS: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {
    8: ((8, 8), (2, 4)),
    16: ((8, 8), (2, 2)),
    64: ((8, 8), (1, 1)),
    256: ((16, 16), (1, 1)),
}
OCTAVES = range(-4, 9, 2)
"""c is sqrt(N) times 2 to these."""
START = "--score_spread 1"


def setup_of(length: int, quick: bool) -> Setup:
    image, patch = LENGTHS[length]
    changes = {"width": 16, "layers": 1, "epochs": 2} if quick else {}
    return dataclasses.replace(SMALL, image=image, patch=patch, **changes)


def attention_of(constant: float) -> str:
    return f"--activation monomial --normalization none --gain {1 / constant:.6g} {START}"


Curve = dict[float, float]
"""c -> validation loss, infinity where the run diverged."""


def curves(rows: Iterable[Row]) -> dict[int, dict[str, Curve]]:
    """N -> seed -> curve."""
    found: dict[int, dict[str, Curve]] = {}
    for row in rows:
        loss = float(row["validation_loss"]) if row["validation_loss"] else math.inf
        found.setdefault(int(row["N"]), {}).setdefault(row["seed"], {})[float(row["constant"])] = loss
    return dict(sorted(found.items()))


def best(curve: Curve) -> tuple[float, bool]:
    """Where a parabola over log c is lowest; or the best c of the grid, and True, where it has no valley there."""
    finite = {c: loss for c, loss in curve.items() if math.isfinite(loss)}
    if len(finite) >= 3:
        second, first, _ = np.polyfit(np.log(list(finite)), list(finite.values()), 2)
        if second > 0 and min(curve) < (place := math.exp(-first / (2 * second))) < max(curve):
            return place, False
    return min(finite or curve, key=lambda c: curve[c]), True


@dataclass(frozen=True)
class Fit:
    """Slope of log(best c) over log(keys) with its 95 % interval, and how many of the points have no valley."""

    slope: float
    low: float
    high: float
    points: int
    without: int

    def __str__(self) -> str:
        ends = f"; {self.without} of {self.points} curves have no valley in the grid" if self.without else ""
        return f"c goes like n^{self.slope:.2f} (95 % interval {self.low:.2f} to {self.high:.2f}){ends}"


def fit(rows: Iterable[Row]) -> Fit:
    """Least squares through all lengths and seeds, each seed a point; the interval is Student's."""
    stats = of_scikit_learn("scipy.stats")
    points = [(length + 1, *best(curve)) for length, seeds in curves(rows).items() for curve in seeds.values()]
    line = stats.linregress(np.log([n for n, _, _ in points]), np.log([c for _, c, _ in points]))
    half = stats.t.ppf(0.975, len(points) - 2) * line.stderr if len(points) > 2 else math.inf
    return Fit(line.slope, line.slope - half, line.slope + half, len(points), sum(end for *_, end in points))


def table(rows: list[Row]) -> str:
    """Markdown: the best constant by length, and what missing it by a factor of 4 costs."""

    def lines() -> Iterator[list[object]]:
        for length, seeds in curves(rows).items():
            found = [best(curve) for curve in seeds.values()]
            constants = ", ".join(f"{c:.3g}{' (no valley)' if end else ''}" for c, end in found)
            ratio = statistics.geometric_mean(c for c, _ in found) / math.sqrt(length)
            cells = []
            for octaves in (0, -2, 2):
                chosen = {seed: min(curve, key=lambda c: curve[c]) * 2**octaves for seed, curve in seeds.items()}
                here = [
                    row
                    for row in where(rows, N=str(length))
                    if math.isclose(float(row["constant"]), chosen[row["seed"]], rel_tol=1e-3)
                ]
                accuracies = [100 * x for x in by_seed(here, "test_accuracy").values()]
                cells.append(f"{statistics.mean(accuracies):.1f} ({len(accuracies)})" if accuracies else "")
            yield [length, f"{math.sqrt(length):.3g}", constants, f"{ratio:.2f}", *cells]

    accuracy = "test accuracy at the best c of the grid, %"
    text = markdown(["N", "√N", "best c, each seed", "c/√N, mean", accuracy, "at c/4", "at 4c"], lines())
    line = fit(rows)
    text += f"\n\nIn brackets: seeds. {len(rows)} runs. The best {line}; 1/√N would be n^0.50."
    if line.low <= 0 and line.high >= 0.5:
        text += (
            "\nThe interval has 0 and 1/2 in it: these runs cannot tell how the best constant goes with the length."
        )
    return text


def draw(rows: list[Row], path: Path) -> None:
    """Test accuracy and validation loss over c, a line a length; best c over the number of keys with the fit."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    by_length = curves(rows)
    colors = {n: colormaps["viridis"](0.9 * i / max(1, len(by_length) - 1)) for i, n in enumerate(by_length)}
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = (left, "test_accuracy", "test accuracy, %", 100), (middle, "validation_loss", "validation loss, nats", 1)
    for axes, key, label, scale in panels:
        for length, color in colors.items():
            own = [row for row in rows if int(row["N"]) == length and row[key]]
            grid = sorted({float(row["constant"]) for row in own})
            values = [[scale * float(row[key]) for row in own if float(row["constant"]) == c] for c in grid]
            axes.plot(grid, [statistics.mean(x) for x in values], "-", color=color, lw=1.6, label=f"N = {length}")
            for c, x in zip(grid, values, strict=True):
                axes.plot([c] * len(x), x, "o", color=color, ms=3.5, alpha=0.6)
            axes.axvline(math.sqrt(length), color=color, ls=":", lw=1.2)
        axes.set(xscale="log", xlabel="c in s³/c; dots: seeds, dotted: √N", ylabel=label)
        axes.set_xscale("log", base=2)
    left.legend(frameon=False, fontsize=9)
    keys = np.array([length + 1 for length in by_length])
    for length, seeds in by_length.items():
        for curve in seeds.values():
            c, end = best(curve)
            right.plot(length + 1, c, "o", color=colors[length], mfc="white" if end else colors[length], ms=6)
    line = fit(rows)
    logs = [math.log(best(curve)[0]) for seeds in by_length.values() for curve in seeds.values()]
    xs = [math.log(length + 1) for length, seeds in by_length.items() for _ in seeds]
    level = statistics.mean(logs) - line.slope * statistics.mean(xs)
    right.plot(keys, np.exp(level) * keys**line.slope, "k-", lw=1.4, label=f"fit: n^{line.slope:.2f}")
    right.plot(keys, np.sqrt(keys), ":", color="gray", label="√n")
    right.set(xscale="log", yscale="log", xlabel="keys n = N + 1; hollow: no valley", ylabel="best c")
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_title(f"95 % interval of the exponent: {line.low:.2f} to {line.high:.2f}", fontsize=9)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("s³/c in a ViT on digits, by length: which constant trains best", fontsize=10)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "8 and 16 patches, three constants, a smaller model"
    parser = study_parser("study_scale", __doc__, seeds=[1, 2, 3], quick=quick)
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--octaves", type=int, nargs="+", default=list(OCTAVES), help="c is sqrt(N) times 2 to these")
    args = parser.parse_args(argv)
    out = out_of(args, "vision_scale.csv")
    if args.quick:
        args.lengths, args.octaves, args.seeds = [8, 16], [-2, 0, 2], args.seeds[:2]
    have = {tuple(map(int, key)) for key in finished(out, "N", "seed", "octave")}
    # seed by seed, so that an interrupted study has all its lengths
    wanted = [(n, seed, k) for seed in args.seeds for n in args.lengths for k in args.octaves]
    for length, seed, octave in tqdm([run for run in wanted if run not in have], desc="runs"):
        setup, constant = setup_of(length, args.quick), math.sqrt(length) * 2**octave
        row = {"N": length, "octave": octave, "constant": f"{constant:.6g}", "seed": seed}
        row |= train(setup, attention_of(constant), digits(seed, setup.image), seed)
        words = f"--lengths {length} --octaves {octave} --seeds {seed}{' --quick' * args.quick}"
        append(out, [row | {"changes": attention_of(constant)} | facts("study_scale.py", words)])
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
