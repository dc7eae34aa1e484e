"""Where training breaks: learning rate, depth and precision, softmax beside polynomials, on a small GPT-2.

    python recipes/study_stability.py --data tinyshakespeare.txt --sweeps rate unclipped depth precision
    python recipes/study_stability.py --quick

Each run is `pretrain_causal_lm.py` with `configs/pretrain_causal_lm/shakespeare_char_0.8m.yaml`, width 64 instead of
128 and 100 steps instead of 2,000. rate: the learning rate, gradients clipped to norm 1; unclipped: the same without
clipping; depth: 4 to 24 layers; precision: bf16, and what fp16 can hold. A run whose loss or gradient becomes NaN or
infinite is stopped by the recipe: its row says at which step, and has no loss. Such a row is a result and not
repeated. Finished rows are kept. A run of 4 layers takes 5 seconds on one CPU core. --quick: the ends of each sweep, 4
steps.

On a CPU, bf16 is autocast, as on a GPU. fp16 is not: accelerate leaves it out there and trains in fp32, which the
recipe refuses, so no row says that it trained in fp16. What a CPU can measure is the trained model with weights and
activations cast: the rows "bf16 weights" and "fp16 weights" are evaluations of the run in fp32.
"""

import itertools
import math
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from study_rows import SHAKESPEARE, Row, append, environment, out_of, quick_text, rows_of, shown_command, study_parser
from study_tables import markdown, mean_and_spread, save_figure, write_up

# name -> (label, changes to the recipe, color)
VARIANTS: dict[str, tuple[str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", "black"),
    "poly": ("degree 3, defaults", "--activation poly", "#2a6fbb"),
    "length": ("degree 3, un-normalised (length)", "--activation poly --normalization length", "#8172b2"),
    "length-unit": (
        "degree 3, length, alpha = 1/spread",
        "--activation poly --normalization length --alpha 39.0625",
        "#937860",
    ),
    "poly-spread": (
        "degree 3, length, scores start at spread 1, alpha 1",
        "--activation poly --normalization length --score_spread 1 --alpha 1",
        "#55a868",
    ),
    "monomial": ("s³/√n, as published", "--activation monomial", "#c44e52"),
    "monomial-mean": (
        "s³/√n, scores start at mean 1/2, learnable gain",
        "--activation monomial --score_mean 0.5 --gain 1.4 --learn_gain true",
        "#dd8452",
    ),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
DEPTHS = (4, 8, 16, 24)
CAST = {"bf16 weights": "bfloat16", "fp16 weights": "float16"}
"""Evaluations of a model that was trained in fp32."""


@dataclass(frozen=True)
class Cell:
    """One run but for its attention and seed; precision as the recipe names it, or one of CAST."""

    learning_rate: float = 3e-3
    layers: int = 4
    clip: float = 1.0
    precision: str = "no"

    def words(self) -> list[str]:
        """Changes to the recipe."""
        return [
            *("--learning_rate", f"{self.learning_rate:g}", "--model_config.n_layer", str(self.layers)),
            *("--max_grad_norm", f"{self.clip:g}", "--mixed_precision", self.precision),
        ]


SWEEPS: dict[str, tuple[Cell, ...]] = {
    "rate": tuple(Cell(rate) for rate in RATES),
    "unclipped": tuple(Cell(rate, clip=0) for rate in RATES),
    "depth": tuple(Cell(layers=layers) for layers in DEPTHS),
    "precision": tuple(
        Cell(rate, precision=precision) for rate in (3e-3, 3e-2) for precision in ("no", "bf16", *CAST)
    ),
}
HELD_OUT = 0.02
"""Share of the text to validate on: a tenth of it would take as long as the training."""
FULL = "--max_steps 100 --warmup_steps 10"
QUICK = "--max_steps 4 --warmup_steps 1 --block_size 16 --model_config.n_embd 16 --model_config.n_head 2"
SMALL = "--model_config.n_embd 64 --model_config.n_head 2"
SHARED = "--eval_steps 0 --save_steps 0 --overwrite"


def train(words: list[str], output: Path) -> dict[str, Any]:
    """One run of the recipe: loss, diverged_at and note; what stopped it is written down, not raised."""
    from pretrain_causal_lm import main as pretrain

    from hf_polyattn.training.nonfinite import NonFiniteError

    outcome: dict[str, Any] = {"validation_loss": "", "diverged_at": "", "note": ""}
    try:
        loss = pretrain([str(SHAKESPEARE), *words, *SHARED.split(), "--output_dir", str(output)])["validation_loss"]
    except NonFiniteError as error:
        # "step 12: the loss is nan; first seen in ..."
        step, _, rest = str(error).partition(": ")
        return outcome | {"diverged_at": int(step.removeprefix("step ")), "note": rest.split(". ")[0]}
    if not math.isfinite(loss):
        return outcome | {"diverged_at": "end", "note": f"the validation loss is {loss}"}
    return outcome | {"validation_loss": f"{loss:.4f}"}


def evaluate_cast(checkpoint: Path, dtype: str, text: str) -> dict[str, Any]:
    """Loss of a trained checkpoint on `text`, weights and activations in `dtype`; an overflow is written down."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_polyattn.evaluation.text import default_block_size, measure_text

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    outcome: dict[str, Any] = {"validation_loss": "", "diverged_at": "", "note": ""}
    try:
        found = measure_text(model, tokenizer, text, block_size=default_block_size(model), batch_size=64)
    except (OverflowError, ValueError) as error:
        # both say so of numbers beyond the range; any other error is none of ours
        if not re.search("overflow|range", str(error)):
            raise
        return outcome | {"note": f"overflow: {str(error).splitlines()[0]}"}
    return outcome | {"validation_loss": f"{found.scores['nats/token'].value:.4f}"}


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a run is: two sweeps that ask for the same run share its row."""
    names = ("attention", "seed", "learning_rate", "layers", "clip", "precision")
    return tuple(f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in names)


def plan(
    sweeps: Sequence[str], names: Sequence[str], seeds: Sequence[int], quick: bool = False
) -> Iterator[tuple[str, int, Cell]]:
    """(attention, seed, cell), cells of one sweep together; the first and the last of each for the short form."""
    for sweep in sweeps:
        cells = SWEEPS[sweep][:: len(SWEEPS[sweep]) - 1] if quick else SWEEPS[sweep]
        for seed, cell, name in itertools.product(seeds, cells, names):
            yield name, seed, cell


def run(name: str, seed: int, cell: Cell, shared: list[str], data: Path, runs: Path) -> dict[str, Any]:
    """One row. A cast model is trained first where its checkpoint is not there."""
    in_training = replace(cell, precision="no") if cell.precision in CAST else cell
    words = [*shared, *VARIANTS[name][1].split(), *in_training.words(), "--seed", str(seed), "--dataset", str(data)]
    words += ["--validation_fraction", str(HELD_OUT)]
    output = runs / "-".join(key_of({"attention": name, "seed": seed, **asdict(in_training)}))
    command = shown_command("pretrain_causal_lm.py", [SHAKESPEARE.name, *words])
    if cell.precision in CAST:
        outcome = train(words, output) if not (output / "last").exists() else {"diverged_at": ""}
        if outcome["diverged_at"] == "":
            text = data.read_text(encoding="utf-8")
            held_out = text[int(len(text) * (1 - HELD_OUT)) :]
            outcome = evaluate_cast(output / "last", CAST[cell.precision], held_out)
        command += f"; evaluated with dtype {CAST[cell.precision]}"
    else:
        outcome = train(words, output)
        if cell.layers != Cell.layers or cell.precision != "no" or cell.clip != Cell.clip:
            # the others may be evaluated with their weights cast
            shutil.rmtree(output, ignore_errors=True)
    cells = {"learning_rate": f"{cell.learning_rate:g}", "layers": cell.layers, "clip": f"{cell.clip:g}"}
    return {
        **{"attention": name, "seed": seed, **cells, "precision": cell.precision},
        **outcome,
        **environment(),
        "command": command,
    }


def shown(rows: Sequence[Row]) -> str:
    """Mean loss of the seeds of a cell; the step at which a run broke, and how many did."""
    losses = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    broken = [row["diverged_at"] for row in rows if row["diverged_at"]]
    notes = [row["note"].split(":")[0] for row in rows if not row["validation_loss"] and not row["diverged_at"]]
    parts = [mean_and_spread(losses, 3)] if losses else []
    parts += [f"diverged at step {', '.join(broken)}"] if broken else []
    return "; ".join([*parts, *dict.fromkeys(notes)])


def select(rows: Sequence[Row], name: str, cell: Cell) -> list[Row]:
    """Rows of a cell, one a seed."""
    return [row for row in rows if key_of(row) == key_of({"attention": name, "seed": row["seed"], **asdict(cell)})]


def column_label(sweep: str, cell: Cell) -> str:
    if sweep in ("rate", "unclipped"):
        return f"{cell.learning_rate:g}"
    if sweep == "depth":
        return f"{cell.layers} layers"
    return f"{'fp32' if cell.precision == 'no' else cell.precision}, {cell.learning_rate:g}"


TITLES = {
    "rate": "Learning rate, gradients clipped to norm 1",
    "unclipped": "Learning rate, gradients not clipped",
    "depth": f"Depth, learning rate {Cell.learning_rate:g}",
    "precision": "Precision, with the learning rate",
}


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table a sweep, validation loss, divergence in words."""
    tables = []
    for sweep, cells in SWEEPS.items():
        there = [cell for cell in cells if any(select(rows, name, cell) for name in VARIANTS)]
        if not there:
            continue
        lines = [
            [label, *(shown(select(rows, name, cell)) for cell in there)] for name, (label, _, _) in VARIANTS.items()
        ]
        heads = ["attention", *(column_label(sweep, cell) for cell in there)]
        tables.append(f"**{TITLES[sweep]}**\n\n" + markdown(heads, [line for line in lines if any(line[1:])]))
    return "\n\n".join(tables)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Loss against rate, clipped and not, and against depth; a cross on the upper edge is a run that diverged."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [
        (sweep, SWEEPS[sweep])
        for sweep in ("rate", "unclipped", "depth")
        if any(select(rows, name, cell) for name in VARIANTS for cell in SWEEPS[sweep])
    ]
    losses = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    top = max(losses, default=1) * 1.03
    figure = Figure(figsize=(3.6 * len(panels) + 0.4, 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (sweep, cells) in zip(grid, panels, strict=True):
        for number, (name, (_, _, color)) in enumerate(VARIANTS.items()):
            means = {}
            for cell in cells:
                own = select(rows, name, cell)
                x = cell.layers if sweep == "depth" else cell.learning_rate
                found = [float(row["validation_loss"]) for row in own if row["validation_loss"]]
                axes.plot([x] * len(found), found, "o", color=color, ms=4, alpha=0.6)
                if found:
                    means[x] = statistics.mean(found)
                broken = sum(bool(row["diverged_at"]) for row in own)
                # side by side, so that crosses of several variants are all seen
                axes.plot([x * 1.08**number] * bool(broken), [top] * bool(broken), "x", color=color, ms=7, mew=2)
            axes.plot(means.keys(), means.values(), "-", color=color, lw=1.6)
        axes.set_title(TITLES[sweep], fontsize=10)
        axes.set(xscale="log", xlabel="layers" if sweep == "depth" else "learning rate")
        if sweep == "depth":
            axes.set_xticks(DEPTHS, labels=map(str, DEPTHS))
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("validation loss (nats per character)")
    handles = [Line2D([], [], color=color, label=label) for label, _, color in VARIANTS.values()]
    handles.append(Line2D([], [], color="gray", marker="x", ls="", mew=2, label="diverged"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "a tiny model, 4 steps, without --data"
    parser = study_parser("study_stability", __doc__, seeds=[1], only=VARIANTS, quick=quick)
    parser.add_argument("--data", type=Path, help="the text of tiny Shakespeare")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    args = parser.parse_args(argv)
    if not (args.data or args.quick):
        parser.error("give --data tinyshakespeare.txt, or --quick")
    out = out_of(args, "stability.csv")
    shared = QUICK.split() if args.quick else [*SMALL.split(), *FULL.split()]
    data = args.data or quick_text(args.runs)
    done = {key_of(row) for row in rows_of(out)}
    for name, seed, cell in plan(args.sweeps, args.only, args.seeds, args.quick):
        key = key_of({"attention": name, "seed": seed, **asdict(cell)})
        if key not in done:
            append(out, [run(name, seed, cell, shared, data, args.runs)])
            done.add(key)
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
