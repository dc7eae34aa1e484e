"""One attention, alone: every form of the polynomial against torch's softmax, by pass, dtype, mask and length.

    python benchmarks/attention.py
    python benchmarks/attention.py --passes forward --dtypes float32 --lengths 512 2048 --seconds 2
    python benchmarks/attention.py --passes decode --batches 1 8 --threads 1

The candidates of a cell run interleaved in one process, because timings on a shared machine drift: quote the ratio
column, the median of softmax's times over the median of the candidate's. Each candidate is compared with the
definition in float64 before it is timed. All of them get the same tensors, laid out as Transformers passes them; see
hf_polyattn/timing.py. Training passes beyond 4,096 tokens are left out. Writes a csv, a table of ratios (.md) and a
figure (.png); cells that the csv has from earlier runs stay, and those measured anew take the place of the old.
"""

import argparse
import csv
import datetime
import itertools
import os
import platform
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import hf_polyattn
from hf_polyattn.ops.cpu import build
from hf_polyattn.timing import BASELINE, MASKS, PASSES, PHIS, TOKENS, TRANSPOSED, Cell, Timing, measure

LONGEST_TRAINING = 4096
WHERE = ("pass", "dtype", "mask", "head_dim", "length", "batch", "threads", "device")
"""What a cell is known by."""


def row_of(timing: Timing) -> dict[str, object]:
    """A line of the csv."""
    cell, (low, median, high) = timing.cell, timing.seconds
    return {
        **{"pass": cell.pass_, "dtype": cell.dtype, "mask": cell.mask},
        **{"head_dim": cell.head_dim, "length": cell.length, "candidate": timing.candidate},
        "milliseconds": round(median * 1e3, 4),
        "quartiles": f"{low * 1e3:.4g} to {high * 1e3:.4g}",
        "ratio_to_sdpa": round(timing.ratio, 3),
        "relative_error": f"{timing.relative_error:.2g}",
        "rounds": timing.rounds,
        "batch": cell.sequences,
        # processes that wanted to run in the last minute, this one included
        "load": round(os.getloadavg()[0], 1),
    }


def merge(path: Path, new: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of an earlier csv and the new ones, which replace those of their cells; in the order of both."""
    old: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: int(row[name]) for name in ("head_dim", "length", "rounds", "threads")}
                # csv files from before the column: the rule of that time
                numbers["batch"] = int(row.get("batch") or max(1, TOKENS // numbers["length"]))
                old.append({**row, **numbers, "ratio_to_sdpa": float(row["ratio_to_sdpa"])})
    measured = {tuple(row[name] for name in WHERE) for row in new}
    rows = [row for row in old if tuple(row[name] for name in WHERE) not in measured] + new
    order: list[object] = [*PASSES, TRANSPOSED, "float32", "bfloat16", "float16", *MASKS]

    def place(row: dict[str, object]) -> tuple[int, ...]:
        kind = (order.index(row[name]) for name in ("pass", "dtype", "mask"))
        threads, head_dim, batch, length = (int(str(row[x])) for x in ("threads", "head_dim", "batch", "length"))
        return (*kind, -threads, head_dim, batch if is_special(row) else 0, length)

    return sorted(rows, key=place)


def is_special(row: dict[str, object]) -> bool:
    """Whether a row has another batch than the usual one."""
    return row["batch"] != max(1, TOKENS // int(str(row["length"])))


def label(row: dict[str, object], threads: object) -> str:
    """The pass, and what is unusual about the cell."""
    notes = [f"batch {row['batch']}"] if is_special(row) else []
    notes += [f"threads {row['threads']}"] if row["threads"] != threads else []
    return f"{row['pass']}{' (' + ', '.join(notes) + ')' if notes else ''}"


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: ratio to SDPA of each candidate, a line a cell."""
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != BASELINE))
    lines = [
        "| pass | dtype | mask | d | N | " + " | ".join(map(str, names)) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    cells: dict[tuple[object, ...], dict[object, object]] = {}
    usual = rows[0]["threads"]
    for row in rows:
        where = (label(row, usual), *(row[key] for key in ("dtype", "mask", "head_dim", "length")))
        cells.setdefault(where, {})[row["candidate"]] = row["ratio_to_sdpa"]
    for where, ratios in cells.items():
        shown = (f"{ratios[name]:.2f}" if name in ratios else "" for name in names)
        lines.append("| " + " | ".join(map(str, where)) + " | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, object]], path: Path, title: str) -> None:
    """Ratio against length: a panel for each pass and dtype, a line for each candidate, causal cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mask = str(rows[0]["mask"])
    head_dim = 64 if any(row["head_dim"] == 64 for row in rows) else rows[0]["head_dim"]
    usual = rows[0]["threads"]
    rows = [row for row in rows if (row["mask"], row["head_dim"]) == (mask, head_dim)]
    rows = [{**row, "panel": label(row, usual)} for row in rows if not is_special(row)]
    panels = list(dict.fromkeys((row["panel"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != BASELINE))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharey=True, layout="constrained"
    )
    for (pass_, dtype), panel in zip(panels, axes.flat, strict=False):
        panel.axhline(1, color="gray", linewidth=1, linestyle="--")
        for name in names:
            points = [row for row in rows if (row["panel"], row["dtype"], row["candidate"]) == (pass_, dtype, name)]
            panel.plot(
                [p["length"] for p in points], [p["ratio_to_sdpa"] for p in points], "o-", markersize=3, label=name
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(f"{pass_}, {dtype}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("speed, softmax SDPA = 1")
    for panel in axes[-1]:
        panel.set_xlabel("length N")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{title}; {mask}, head dimension {head_dim}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--passes", nargs="+", choices=[*PASSES, TRANSPOSED], default=list(PASSES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--batches", nargs="+", type=int, help="default: so many that 1,024 tokens come at a time")
    parser.add_argument("--phis", nargs="+", choices=PHIS, default=list(PHIS))
    parser.add_argument("--forms", nargs="+", default=["tiled", "fused"] if on_gpu else ["cpu", "tiled"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one cell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} {build().instruction_set}"
    )
    environment = {
        "device": where,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]).split(" --out")[0],
    }
    words = (args.passes, args.dtypes, args.masks, args.head_dims, args.lengths, [args.device], args.batches or [None])
    cells = [Cell(*values) for values in itertools.product(*words)]
    cells = [cell for cell in cells if cell.pass_ != "forward+backward" or cell.length <= LONGEST_TRAINING]
    rows: list[dict[str, object]] = []
    for cell in tqdm(cells, desc="cells"):
        found = measure(cell, args.phis, args.forms, args.seconds, tqdm.write)
        rows += [{**row_of(timing), **environment} for timing in found]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])
    rows = merge(args.out, rows)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    args.out.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, args.out.with_suffix(".png"), f"Attention on {where}, {rows[0]['threads']} threads")
    print(table(rows))


if __name__ == "__main__":
    main()
