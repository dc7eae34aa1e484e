"""Norms of the attention and of its Jacobian while small models train, by activation (arXiv 2410.18613, section 5).

    python recipes/study_norms_training.py --data tinyshakespeare.txt
    python recipes/study_norms_training.py --data tinyshakespeare.txt --models llama --only softmax scaled --seeds 1 2
    python recipes/study_norms_training.py --quick

GPT-2 runs are `pretrain_causal_lm.py` with `configs/pretrain_causal_lm/shakespeare_char_0.8m.yaml`, 100 steps instead
of 2,000, and what their row says. LLaMA and BERT have the same recipe and the shapes of `study_parity.py`; ViT is that
of `study_vision.py` on digits, 102 steps. All heads are measured every 10 steps; an early, a middle and the last layer
are kept. Writes OUT.csv (step by step), OUT_runs.csv (one line a run: loss, what measuring cost, command) and a figure
a model, OUT.png for GPT-2 and OUT_MODEL.png for the others. A run takes less than a minute on one CPU core; finished
ones are kept. --quick: smaller models on Python's own source and on the digits, 12 steps each, in seconds.
"""

import dataclasses
import importlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study_rows import (
    SHAKESPEARE,
    Row,
    append,
    environment,
    finished,
    out_of,
    rows_of,
    shown_command,
    study_parser,
    trained,
    where,
)
from study_tables import markdown, mean_of, save_figure

MODELS = {"gpt2": "GPT-2", "llama": "LLaMA", "bert": "BERT", "vit": "ViT"}
MEASURED = ("frobenius", "jacobian", "score_spread", "dead_share", "effective_keys", "output_rms")
INTERVAL = 100
"""Steps between measurements that the overhead is stated for: the default of the callback, and the guide's advice."""

# name -> (label, changes to the recipe, color, line style)
VARIANTS: dict[str, tuple[str, str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", "black", "-"),
    "scaled": ("s³/√n, as published", "--activation monomial", "#2a6fbb", "-"),
    "unscaled": ("s³", "--activation monomial --normalization none", "#c44e52", "-"),
    "calibrated": (
        "s³/√n, calibrated to ‖A‖_F = √N",
        "--activation monomial --calibrate_batches 4 --calibration_target frobenius",
        "#55a868",
        "-",
    ),
    "poly": ("degree 3, defaults", "--activation poly", "#dd8452", "-"),
    "scaled-spread": (
        "s³/√n, scores start at spread 1",
        "--activation monomial --score_spread 1",
        "#2a6fbb",
        "--",
    ),
    "unscaled-spread": (
        "s³, scores start at spread 1",
        "--activation monomial --normalization none --score_spread 1",
        "#c44e52",
        "--",
    ),
}
SHORT = "--warmup_steps 20 --validation_fraction 0.02"
"""What a shorter run needs beside fewer steps: a warm-up in proportion, and less to evaluate on."""
QUICK = "--dataset stdlib --stdlib_bytes 100000 --tokenizer bytes --max_steps 12 --warmup_steps 2 --block_size 32"
QUICK_SHAPES = {
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 2},
    "llama": {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64},
    "bert": {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64},
}


def train_text(model: str, words: list[str], quick: bool, output: Path) -> tuple[dict[str, Any], float, str]:
    """One run of a recipe: its results, a note where it diverged; seconds a step without measuring; the command."""
    from study_parity import FAMILIES

    from hf_polyattn.training.diagnosing import LINES

    recipe = "pretrain_masked_lm" if model == "bert" else "pretrain_causal_lm"
    if model != "gpt2":
        words = ["--model_type", model, "--model_config", json.dumps(FAMILIES[model].shape), *words]
    if quick:
        words += [word for name, size in QUICK_SHAPES[model].items() for word in (f"--model_config.{name}", str(size))]
    arguments = [str(SHAKESPEARE), *words, "--eval_steps", "0", "--output_dir", str(output), "--overwrite"]
    results, note = trained(importlib.import_module(recipe).main, arguments)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # not every step has a line, and the last may have none
    steps, seconds = max((line["step"], line.get("seconds", 0)) for line in lines if "seconds" in line)
    measured = [json.loads(line) for line in (output / LINES).read_text().splitlines()]
    step_seconds = (seconds - sum(line["seconds"] for line in measured if line["step"] <= steps)) / steps
    return results | {"note": note}, step_seconds, shown_command(f"{recipe}.py", [SHAKESPEARE.name, *words])


def train_images(name: str, seed: int, quick: bool, every: int, output: Path) -> tuple[dict[str, Any], float, str]:
    """As `train_text`, for the ViT of study_vision.py."""
    import study_vision as vision

    from hf_polyattn.diagnostics import attention_statistics
    from hf_polyattn.diagnostics.report import append_report
    from hf_polyattn.training.diagnosing import LINES, first_sequences

    setup = dataclasses.replace(vision.DIGITS, epochs=6)
    if quick:
        setup = dataclasses.replace(vision.QUICK, layers=3, epochs=1, batch_size=90)
    output.mkdir(parents=True, exist_ok=True)
    (output / LINES).unlink(missing_ok=True)
    costs = []

    def watch(step: int, steps: int, model: Any, batch: dict[str, Any]) -> None:
        if step in (1, steps) or step % every == 0:
            start = time.process_time()
            report = attention_statistics(model, [first_sequences(batch)])
            costs.append(time.process_time() - start)
            append_report(output / LINES, step, report, seconds=round(costs[-1], 4))

    results = vision.train(setup, VARIANTS[name][1], vision.digits(seed, setup.image), seed, watch)
    step_seconds = (results["seconds"] - sum(costs)) / results["steps"]
    words = f"--models vit --only {name} --seeds {seed}{' --quick' * quick}"
    return results, step_seconds, shown_command("study_norms_training.py", words.split())


def run(
    model: str, name: str, seed: int, shared: list[str], quick: bool, output: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One training run: its rows of OUT.csv, and its row of OUT_runs.csv."""
    import torch

    from hf_polyattn.diagnostics import read_reports
    from hf_polyattn.training.diagnosing import LINES

    if model == "vit":
        results, step_seconds, command = train_images(name, seed, quick, 4 if quick else 10, output)
    else:
        words = [*VARIANTS[name][1].split(), *shared, "--seed", str(seed)]
        results, step_seconds, command = train_text(model, words, quick, output)
    key = {"model": model, "variant": name, "seed": seed}
    reports = read_reports(output / LINES)
    rows = []
    for step, report in reports.items():
        modules = list(report.modules.values())
        # an early, a middle and the last one
        for layer in (0, len(modules) // 2, len(modules) - 1):
            means = {key: f"{modules[layer][key].mean().item():.5g}" for key in MEASURED}
            rows.append({**key, "step": step, "layer": layer, **means})
    cost = statistics.median(json.loads(line)["seconds"] for line in (output / LINES).read_text().splitlines())
    loss = results.get("validation_loss", "")
    return rows, {
        **key,
        "steps": max(reports),
        "validation_loss": loss if loss == "" else round(loss, 4),
        "note": results["note"],
        "step_ms": round(1e3 * step_seconds, 2),
        "measurement_ms": round(1e3 * cost, 2),
        f"overhead_every_{INTERVAL}": round(cost / (INTERVAL * step_seconds), 4),
        # the ViT's loop is study_vision's own, on the processor
        **environment(torch.device("cpu") if model == "vit" else None),
        "command": command,
    }


def table(rows: list[Row], runs: list[Row]) -> str:
    """Markdown: both norms of the last layer at the start, at most and at the end, with the loss that was reached.

    Means over the seeds; a run that diverged shows where.
    """

    def lines() -> Iterator[list[object]]:
        for (model, label), (name, (title, *_)) in itertools.product(MODELS.items(), VARIANTS.items()):
            done = where(runs, model=model, variant=name)
            if not done:
                continue
            cells = []
            for key in ("frobenius", "jacobian"):
                values = [summary(rows, model, name, key, run["seed"]) for run in done]
                cells.append(", ".join(f"{statistics.mean(x):.2g}" for x in zip(*values, strict=True)))
            loss = mean_of([float(run["validation_loss"]) for run in done if run["validation_loss"]])
            notes = "; ".join(filter(None, [loss, *(run["note"] for run in done)]))
            yield [label, title, *cells, notes, len(done)]

    norms = "‖A‖_F/√N, last layer: start, largest, end", "Jacobian: start, largest, end"
    return markdown(["model", "attention", *norms, "validation loss", "seeds"], lines())


def summary(rows: list[Row], model: str, name: str, key: str, seed: str) -> tuple[float, float, float]:
    """One number of the last layer of a run: at the start, at most, at the end."""
    own = where(rows, model=model, variant=name, seed=seed)
    last = max(int(row["layer"]) for row in own)
    own = sorted((row for row in own if int(row["layer"]) == last), key=lambda row: int(row["step"]))
    values = [float(row[key]) for row in own]
    return values[0], max(values), values[-1]


def draw(rows: list[Row], path: Path) -> None:
    """Of one model: norms, softmax's bounds and dead scores over the steps: one column a layer, one line a variant.

    Lines are means over the seeds.
    """
    from matplotlib.figure import Figure

    layers = sorted({int(row["layer"]) for row in rows})
    panels = {
        "frobenius": ("‖A‖_F / √N", 1.0),
        "jacobian": ("‖∂a/∂s‖_F / √N", 2.0),
        "dead_share": ("dead share", None),
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(len(panels), len(layers), sharex=True, sharey="row", squeeze=False)
    for line_of_axes, (key, (label, bound)) in zip(grid, panels.items(), strict=True):
        for axes, layer in zip(line_of_axes, layers, strict=True):
            for name, (title, _, color, style) in VARIANTS.items():
                own = [row for row in rows if row["variant"] == name and int(row["layer"]) == layer]
                by_step: dict[int, list[float]] = {}
                for row in own:
                    by_step.setdefault(int(row["step"]), []).append(float(row[key]))
                points = [(step, statistics.mean(values)) for step, values in sorted(by_step.items())]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, lw=1.6, label=title)
            if bound is not None:
                axes.axhline(bound, color="gray", lw=1, ls=":", label="softmax's bound")
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line_of_axes[0].set_ylabel(label)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer}" + (" (last)" if layer == layers[-1] else ""), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "small models, a few steps, without --data"
    parser = study_parser("study_norms_training", __doc__, seeds=[1337], only=VARIANTS, quick=quick)
    parser.add_argument("--data", help="the text of tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args(argv)
    if not (args.data or args.quick or args.models == ["vit"]):
        parser.error("give --data tinyshakespeare.txt, or --quick, or --models vit, which has its own images")
    out = out_of(args, "norms_training.csv")
    runs_csv = out.with_name(f"{out.stem}_runs.csv")
    shared = [*QUICK.split(), "--diagnostics_steps", "4"]
    if not args.quick:
        shared = ["--dataset", str(args.data), "--max_steps", str(args.steps), "--diagnostics_steps", "10"]
        shared += SHORT.split()
    done = finished(runs_csv, "model", "variant", "seed")
    # seed by seed, so that an interrupted study compares all its variants on the same seeds
    for seed, model, name in itertools.product(args.seeds, args.models, args.only):
        if (model, name, str(seed)) not in done:
            rows, summary_row = run(model, name, seed, shared, args.quick, args.runs / f"{model}-{name}-{seed}")
            append(out, rows)
            append(runs_csv, [summary_row])
    rows, runs = rows_of(out), rows_of(runs_csv)
    for model in MODELS:
        if own := where(rows, model=model):
            draw(own, out.with_suffix(".png") if model == "gpt2" else out.with_name(f"{out.stem}_{model}.png"))
    print(table(rows, runs))


if __name__ == "__main__":
    main()
