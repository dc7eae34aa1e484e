"""How ‖A‖_F and the Jacobian's norm grow with the length: the claims of arXiv 2410.18613, measured.

    python recipes/study_norms_theory.py --checkpoint gpt2-shakespeare --text tinyshakespeare.txt
    python recipes/study_norms_theory.py --quick

The paper: softmax has ‖A‖_F <= sqrt N and ‖dA‖_F <= 2 sqrt N for every input; for Gaussian queries and keys, s^p and
its Jacobian have norms O(N) in expectation, and O(sqrt N) scaled by 1/sqrt N. Here: mean norms over draws at several
N, for degrees 1 to 6, causal and full, for Gaussian queries and keys and for those of a trained character GPT-2.
Exponents are slopes of log(mean norm) over log N, intervals are 95 % by bootstrap over the draws. Scores of softmax
are also pushed uphill, to see how near its norms come to the bounds. Writes OUT.csv, OUT_exponents.csv,
OUT_bounds.csv, OUT.md and OUT.png; two minutes on one CPU core. --quick: short sequences, few draws, in seconds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_rows import environment, out_of, shown_command, study_parser, write_rows
from study_tables import markdown, save_figure, write_up
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_polyattn.diagnostics import RowMap
from hf_polyattn.diagnostics.probing import probing
from hf_polyattn.ops.masks import build_keep

DEGREES = range(1, 7)
HEAD_DIM = 64
SEED = 0
NORMS = ("frobenius", "jacobian")


@dataclass(frozen=True)
class Form:
    """What stands between scores and weights; degree 0: softmax."""

    degree: int
    normalization: str

    @property
    def name(self) -> str:
        if not self.degree:
            return "softmax"
        return f"s^{self.degree}" + ("/sqrt(n)" if self.normalization == "sqrt_length" else "")

    def row_map(self) -> RowMap:
        return RowMap(degree=self.degree, normalization=self.normalization) if self.degree else RowMap.softmax()

    def predicted(self, norm: str, causal: bool, length: int) -> float:
        """Root of the expected squared norm for Gaussian queries and keys, exactly; of softmax up to o(1) in n.

        s = q . k / sqrt(D) has E s^(2m) = (2m - 1)!! D (D + 2) ... (D + 2m - 2) / D^m. Softmax: scores are
        nearly normal, E e^(2s) / (E e^s)^2 = e, so a row of n keys has the energy e / n, as has its Jacobian.
        """
        rows = range(1, length + 1) if causal else [length] * length
        if not self.degree:
            return math.sqrt(sum(math.e / n for n in rows))
        # the derivative of s^p is p s^(p - 1)
        p = self.degree if norm == "frobenius" else self.degree - 1
        moment = math.prod((2 * i + 1) * (HEAD_DIM + 2 * i) / HEAD_DIM for i in range(p))
        factor = moment if norm == "frobenius" else self.degree**2 * moment
        return math.sqrt(factor * sum(1 if self.normalization == "sqrt_length" else n for n in rows))


FORMS = [Form(0, "sum"), *(Form(p, z) for z in ("sqrt_length", "none") for p in DEGREES)]


def norms(form: Form, scores: torch.Tensor, causal: bool) -> torch.Tensor:
    """‖A‖_F and the Jacobian's norm of scores [1, H, N, N]: [2, H]."""
    keep = build_keep(scores.shape[2:], scores.device, is_causal=causal)
    rows = form.row_map()(scores, keep)
    return torch.stack([rows.weights.square().sum((0, 2, 3)), rows.jacobian_squares.sum((0, 2))]).sqrt()


def gaussian_scores(lengths: list[int], draws: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(N, scores [1, 1, N, N]) of independent standard normal queries and keys."""
    generator = torch.Generator().manual_seed(SEED)
    for length in lengths:
        for _ in range(draws):
            query, key = torch.randn(2, length, HEAD_DIM, generator=generator)
            yield length, (query @ key.T / math.sqrt(HEAD_DIM))[None, None]


def trained_scores(checkpoint: str, text: str, lengths: list[int], draws: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(N, scores [1, layers * heads, N, N]) of a softmax checkpoint on random windows of the text's last tenth."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text[-len(text) // 10 :]])
    generator = torch.Generator().manual_seed(SEED)
    seen: list[torch.Tensor] = []

    def probe(module: Any, query: torch.Tensor, key: torch.Tensor, value: Any, out: Any, options: dict) -> None:
        seen.append(options["scaling"] * query @ key.transpose(-1, -2))

    for length in lengths:
        for _ in range(draws):
            start = int(torch.randint(len(ids) - length, (), generator=generator))
            seen.clear()
            with torch.no_grad(), probing(model, probe):
                model(ids[None, start : start + length])
            yield length, torch.cat(seen, 1)


Curve = dict[int, np.ndarray]
"""N -> norms of all draws, [draws, heads]."""


def measure(scores: Iterator[tuple[int, torch.Tensor]], total: int) -> dict[tuple[Form, bool, str], Curve]:
    found: dict[tuple[Form, bool, str], dict[int, list[np.ndarray]]] = {}
    for length, drawn in tqdm(scores, total=total, desc="draws", mininterval=5):
        for form in FORMS:
            for causal in (False, True):
                for norm, values in zip(NORMS, norms(form, drawn, causal).numpy(), strict=True):
                    found.setdefault((form, causal, norm), {}).setdefault(length, []).append(values)
    return {key: {n: np.stack(draws) for n, draws in curve.items()} for key, curve in found.items()}


def exponent(curve: Curve, resamples: int = 1000) -> tuple[float, float, float]:
    """Slope of log(mean norm) over log N, mean over the heads, and its 95 % interval by bootstrap over the draws."""
    generator = np.random.default_rng(SEED)
    lengths = sorted(curve)
    x = np.log(lengths)
    x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(sum(w * np.log(curve[n].mean(0)).mean() for w, n in zip(x, lengths, strict=True)))
    slopes = np.zeros(resamples)
    for weight, n in zip(x, lengths, strict=True):
        draws = curve[n]
        chosen = generator.integers(len(draws), size=(resamples, len(draws)))
        slopes += weight * np.log(draws[chosen].mean(1)).mean(1)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return slope, float(low), float(high)


def uphill(norm: str, length: int, steps: int) -> float:
    """The largest norm over sqrt(N) that gradient ascent on the scores of softmax finds, from several starts."""
    generator = torch.Generator().manual_seed(SEED)
    scores = torch.randn(1, 8, length, length, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1, maximize=True)
    for _ in range(steps):
        weights = scores.softmax(-1)
        square = weights.square()
        energy = square.sum(-1)
        # ‖diag(a) - a a'‖_F^2, differentiable; `RowMap`, which gives the number below, is not
        row = energy if norm == "frobenius" else energy - 2 * (square * weights).sum(-1) + energy.square()
        optimizer.zero_grad()
        row.sum().backward()
        optimizer.step()
    return norms(Form(0, "sum"), scores.detach(), False)[NORMS.index(norm)].max().item() / math.sqrt(length)


def draw(points: list[dict[str, Any]], exponents: list[dict[str, Any]], path: Path) -> None:
    """Above: ‖A‖_F over N. Below: fitted exponents by degree, with intervals and what is predicted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    titles = {"gaussian": "Gaussian q, k", "trained": "q, k of a trained GPT-2"}
    present = [source for source in titles if any(row["inputs"] == source for row in points)]
    columns = [(source, mask) for source in present for mask in ("full", "causal")]
    figure = Figure(figsize=(3.1 * len(columns) + 2.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False)
    colors = {p: colormaps["viridis"](0.92 * (p - 1) / (len(DEGREES) - 1)) for p in DEGREES}
    marks = {("sqrt_length", "frobenius"): "o", ("sqrt_length", "jacobian"): "s"}
    marks |= {("none", "frobenius"): "^", ("none", "jacobian"): "D"}
    hues = {"sqrt_length": "#2a6fbb", "none": "#c44e52"}
    for above, below, (source, mask) in zip(*grid, columns, strict=True):
        for form in FORMS:
            own = [
                (row["N"], row["mean"])
                for row in points
                if (row["inputs"], row["mask"], row["form"], row["norm"]) == (source, mask, form.name, "frobenius")
            ]
            color = colors[form.degree] if form.degree else "black"
            above.plot(*zip(*own, strict=True), "--" if form.normalization == "none" else "-", color=color, lw=1.4)
        lengths = sorted({row["N"] for row in points if row["inputs"] == source})
        above.plot(lengths, np.sqrt(lengths), ":", color="gray", lw=1.5)
        above.set(xscale="log", yscale="log", xlabel="N", title=f"{titles[source]}, {mask}")
        above.set_xticks(lengths[:: max(1, len(lengths) // 3)], labels=map(str, lengths[:: max(1, len(lengths) // 3)]))
        above.minorticks_off()
        for (normalization, norm), mark in marks.items():
            shift = 0.12 * (norm == "jacobian") - 0.06
            for row in exponents:
                if (row["inputs"], row["mask"], row["norm"], row["normalization"]) != (
                    source,
                    mask,
                    norm,
                    normalization,
                ):
                    continue
                error = [[row["exponent"] - row["low"]], [row["high"] - row["exponent"]]]
                filled = hues[normalization] if norm == "frobenius" else "white"
                below.errorbar(
                    row["degree"] + shift,
                    row["exponent"],
                    error,
                    fmt=mark,
                    ms=5,
                    color=hues[normalization],
                    mfc=filled,
                )
        for y in (0.5, 1):
            below.axhline(y, color="gray", ls=":", lw=1.2)
        below.set(
            xlabel="degree p", xticks=list(DEGREES), ylim=(0.3, max(1.3, 0.05 + max(row["high"] for row in exponents)))
        )
    grid[0][0].set_ylabel("mean ‖A‖_F")
    grid[1][0].set_ylabel("exponent of N (95 % interval)")
    for i in range(0, len(columns), 2):
        # one scale for both masks of the same inputs
        low, high = zip(*(axes.get_ylim() for axes in grid[0][i : i + 2]), strict=True)
        for axes in grid[0][i : i + 2]:
            axes.set_ylim(min(low), max(high))
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colors[p], label=f"degree {p}") for p in DEGREES]
    handles += [Line2D([], [], color="black", label="softmax"), Line2D([], [], color="gray", ls=":", label="√N")]
    handles += [
        Line2D([], [], color="dimgray", label="s^p / √n"),
        Line2D([], [], color="dimgray", ls="--", label="s^p"),
    ]
    words = {"sqrt_length": "s^p / √n", "none": "s^p"}
    handles += [
        Line2D([], [], color=hues[z], marker=mark, ls="", mfc=hues[z] if norm == "frobenius" else "white", label=label)
        for (z, norm), mark in marks.items()
        for label in [f"{words[z]}: " + ("‖A‖_F" if norm == "frobenius" else "Jacobian")]
    ]
    handles.append(Line2D([], [], color="gray", ls=":", label="predicted: 1/2 and 1"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def table(exponents: list[dict[str, Any]]) -> str:
    """Markdown: exponents of ‖A‖_F and of the Jacobian for Gaussian and trained inputs, causal."""
    lines = []
    rows = {(row["inputs"], row["mask"], row["form"], row["norm"]): row for row in exponents}
    for (inputs, mask, form, norm), row in rows.items():
        if norm != "frobenius" or row["degree"] not in (0, 1, 2, 3, 6):
            continue
        cells = []
        for other in NORMS:
            one = rows[inputs, mask, form, other]
            predicted = one["predicted"] if one["predicted"] == "" else f"{one['predicted']:.2f}"
            cells += [f"{one['exponent']:.3f} ({one['low']:.3f} to {one['high']:.3f})", predicted]
        lines.append([f"{inputs}, {mask}", form, *cells])
    return markdown(["inputs, mask", "form", "‖A‖_F", "predicted", "Jacobian", "predicted"], lines)


def slope_of(values: dict[int, float]) -> float:
    # rounded, so that a flat curve has the slope 0
    return round(float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0]), 9)


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("study_norms_theory", __doc__, quick="short sequences, 4 draws")
    parser.add_argument("--checkpoint", help="folder of a character GPT-2; without it, Gaussian inputs alone")
    parser.add_argument("--text", type=Path, help="the text whose sorted characters are its vocabulary")
    parser.add_argument("--draws", type=int, default=32, help="draws, or windows of the text, at each length")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) != (args.text is None):
        parser.error("--checkpoint and --text go together")
    out = out_of(args, "norms_theory.csv")
    draws = 4 if args.quick else args.draws
    lengths = [16, 32, 64, 128] if args.quick else [32, 64, 128, 256, 512, 1024]
    sources = {"gaussian": (lengths, gaussian_scores(lengths, draws))}
    if args.checkpoint:
        short = [8, 16, 32, 64]
        scores = trained_scores(args.checkpoint, args.text.read_text(encoding="utf-8"), short, draws)
        sources["trained"] = (short, scores)

    words = ["--checkpoint", args.checkpoint, "--text", str(args.text)] if args.checkpoint else []
    facts = {
        "draws": draws,
        "seed": SEED,
        **environment(torch.device("cpu")),
        "command": shown_command("study_norms_theory.py", [*words, *["--quick"] * args.quick]),
    }
    points, exponents = [], []
    for source, (at, scores) in sources.items():
        for (form, causal, norm), curve in measure(scores, draws * len(at)).items():
            key = {"inputs": source, "mask": "causal" if causal else "full", "form": form.name}
            key |= {"degree": form.degree, "normalization": form.normalization, "norm": norm}
            expected = {n: form.predicted(norm, causal, n) for n in at} if source == "gaussian" else {}
            for n, values in curve.items():
                size = math.sqrt((values**2).mean())
                over = size / expected[n] if expected else ""
                points.append({**key, "N": n, "mean": float(values.mean()), "rms_over_predicted": over})
            slope, low, high = exponent(curve)
            predicted = slope_of(expected) if expected else ""
            exponents.append({**key, "exponent": slope, "low": low, "high": high, "predicted": predicted, **facts})
    bounds = [
        {
            "norm": norm,
            "N": n,
            "largest_over_sqrt_N": uphill(norm, n, 100 if args.quick else 400),
            "bound": bound,
            **facts,
        }
        for norm, bound in (("frobenius", 1), ("jacobian", 2))
        for n in (2, 8, 32)
    ]
    for end, rows in (("", points), ("_exponents", exponents), ("_bounds", bounds)):
        write_rows(out.with_name(f"{out.stem}{end}.csv"), rounded(rows))
    write_up(out, exponents, table, partial(draw, points))
    for row in bounds:
        print(
            f"softmax, uphill, N = {row['N']}: {row['norm']} {row['largest_over_sqrt_N']:.3f} sqrt N of {row['bound']}"
        )


if __name__ == "__main__":
    main()
