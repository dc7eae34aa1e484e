"""Norms of the attention and of its Jacobian while a small GPT-2 trains, by activation (arXiv 2410.18613, section 5).

    python recipes/study_norms_training.py --data tinyshakespeare.txt
    python recipes/study_norms_training.py --quick

Each run is `pretrain_causal_lm.py` with `configs/pretrain_causal_lm/shakespeare_char_0.8m.yaml`, 100 steps instead of
2,000, and what its row says; one seed. All heads are measured every 10 steps. Writes OUT.csv (step by step),
OUT_runs.csv (one line a run: loss, what measuring cost, command) and OUT.png. A run takes less than a minute on one
CPU core; finished ones are kept. --quick: a smaller model on Python's own source, 12 steps each, in seconds.
"""

import argparse
import csv
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG = HERE / "configs" / "pretrain_causal_lm" / "shakespeare_char_0.8m.yaml"
SEED = 1337
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
    "coefficients": ("learnable coefficients, degree 3", "--activation poly", "#dd8452", "-"),
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
QUICK = (
    "--dataset stdlib --stdlib_bytes 100000 --tokenizer bytes --max_steps 12 --warmup_steps 2 --block_size 32 "
    "--model_config.n_layer 3 --model_config.n_embd 32 --model_config.n_head 2"
)


def run(name: str, shared: list[str], output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One training run: its rows of OUT.csv, and its row of OUT_runs.csv."""
    import json

    # beside this file, as a script finds it
    from pretrain_causal_lm import main as pretrain

    from hf_polyattn.diagnostics import read_reports
    from hf_polyattn.training.diagnosing import LINES
    from hf_polyattn.training.nonfinite import NonFiniteError

    changes = [*VARIANTS[name][1].split(), *shared, "--seed", str(SEED)]
    note, results = "", {}
    try:
        results = pretrain([str(CONFIG), *changes, "--eval_steps", "0", "--output_dir", str(output), "--overwrite"])
    except NonFiniteError as error:
        # that a form diverges is a result too
        note = str(error).split(";")[0]
    reports = read_reports(output / LINES)
    rows = []
    for step, report in reports.items():
        modules = list(report.modules.values())
        # an early, a middle and the last one
        for layer in (0, len(modules) // 2, len(modules) - 1):
            means = {key: f"{modules[layer][key].mean().item():.5g}" for key in MEASURED}
            rows.append({"variant": name, "step": step, "layer": layer, **means})
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # not every step has a line, and the last may have none
    steps, seconds = max((line["step"], line.get("seconds", 0)) for line in lines if "seconds" in line)
    measured = [json.loads(line) for line in (output / LINES).read_text().splitlines()]
    cost = statistics.median(line["seconds"] for line in measured)
    step_seconds = (seconds - sum(line["seconds"] for line in measured if line["step"] <= steps)) / steps
    import torch
    import transformers

    import hf_polyattn

    return rows, {
        "variant": name,
        "seed": SEED,
        "steps": max(reports),
        "validation_loss": round(results["validation_loss"], 4) if results else "",
        "note": note,
        "step_ms": round(1e3 * step_seconds, 2),
        "measurement_ms": round(1e3 * cost, 2),
        f"overhead_every_{INTERVAL}": round(cost / (INTERVAL * step_seconds), 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "command": " ".join(["python recipes/pretrain_causal_lm.py", CONFIG.name, *changes]),
    }


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]], runs: list[dict[str, str]]) -> str:
    """Markdown: both norms of the last layer at the start, at most and at the end, with the loss that was reached."""
    lines = [
        "| attention | ‖A‖_F/√N, last layer: start, largest, end | Jacobian: start, largest, end | validation loss |",
        "|---|---|---|---|",
    ]
    for done in runs:
        own = [row for row in rows if row["variant"] == done["variant"]]
        last = max(int(row["layer"]) for row in own)
        own = sorted((row for row in own if int(row["layer"]) == last), key=lambda row: int(row["step"]))
        cells = []
        for key in ("frobenius", "jacobian"):
            values = [float(row[key]) for row in own]
            cells.append(", ".join(f"{value:.2g}" for value in (values[0], max(values), values[-1])))
        loss = done["validation_loss"] or done["note"]
        lines.append(f"| {VARIANTS[done['variant']][0]} | {cells[0]} | {cells[1]} | {loss} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Norms, with softmax's bounds, and dead scores over the steps: one column a layer, one line a variant."""
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
                points = sorted((int(row["step"]), float(row[key])) for row in own)
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
    # no software version or date inside: equal runs give equal files
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="the text of tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a small model, a few steps, without --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_norms_training"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="csv; default: recipes/results, with --quick the folder of the runs")
    args = parser.parse_args(argv)
    if not (args.data or args.quick):
        parser.error("give --data tinyshakespeare.txt, or --quick")
    out = args.out or (args.runs / "quick.csv" if args.quick else HERE / "results" / "norms_training.csv")
    runs_csv = out.with_name(f"{out.stem}_runs.csv")
    shared = [*QUICK.split(), "--diagnostics_steps", "4"]
    if not args.quick:
        shared = ["--dataset", args.data, "--max_steps", str(args.steps), "--diagnostics_steps", "10", *SHORT.split()]
    done = {row["variant"] for row in read(runs_csv)}
    for name in args.only:
        if name not in done:
            rows, summary = run(name, shared, args.runs / name)
            if args.data:
                summary["command"] = summary["command"].replace(args.data, Path(args.data).name)
            append(out, rows)
            append(runs_csv, [summary])
    text = table(read(out), read(runs_csv))
    draw(read(out), out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
