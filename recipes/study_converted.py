"""The stages of finished conversions, from the results.json that convert.py leaves: a csv, and a table of means.

    python recipes/study_converted.py runs/gpt2-cubic-1 runs/gpt2-cubic-2 --out recipes/results/converted.csv

One row a stage and seed; rows that the csv holds already stay. The table has mean and standard deviation over seeds of
each model and metric, the fine-tuned softmax model beside it, and the difference of the two on the same seeds.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

from study_checkpoints import name_of, rows_of

from hf_polyattn.converting.report import TUNED

HERE = Path(__file__).parent
KEY = ("checkpoint", "attention", "stage", "seed", "steps")


def rows_of_folder(folder: Path) -> list[dict[str, str]]:
    """One row for each stage of a finished conversion."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stages, attention = results["stages"], results["attention"]
    shown = [word if "/" not in word else Path(word).name for word in results["command"].split()]
    common = {
        "checkpoint": name_of(results["arguments"]["model"]),
        "attention": f"degree {attention['degree']} / {attention['normalization']}",
        "metric": stages["metric"],
        "seed": results["seed"],
    }
    environment = {name: results["versions"][name] for name in ("torch", "transformers", "hf-polyattn")}
    tuned = [stages["tuned"]] if stages["tuned"] else []
    return [
        {
            **{name: str(value) for name, value in common.items()},
            "stage": row["stage"],
            "value": f"{row['score']:.4f}",
            "steps": str(row["steps"]),
            "training_tokens": str(row["tokens"]),
            "seconds": f"{row['seconds']:.0f}",
            **environment,
            "device": results["device"],
            "command": " ".join(shown),
        }
        for row in [*stages["rows"], *tuned]
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: one line a stage."""
    lines = ["| checkpoint, metric | attention | stage | value | minus fine-tuned softmax, same seeds | seeds |"]
    lines.append("|---|---|---|---|---|---|")
    groups = dict.fromkeys((r["checkpoint"], r["metric"], r["attention"], r["stage"]) for r in rows)
    for checkpoint, metric, attention, stage in groups:
        mine = {r["seed"]: float(r["value"]) for r in rows if _is(r, checkpoint, attention, stage)}
        tuned = {r["seed"]: float(r["value"]) for r in rows if _is(r, checkpoint, attention, TUNED)}
        # before the last stage it has seen fewer tokens than the twin
        last = [s for c, _, a, s in groups if (c, a) == (checkpoint, attention) and s != TUNED][-1]
        paired = [value - tuned[seed] for seed, value in mine.items() if seed in tuned and stage == last]
        spread = f" ± {statistics.stdev(mine.values()):.4f}" if len(mine) > 1 else ""
        difference = f"{statistics.mean(paired):+.4f}" if paired else ""
        value = f"{statistics.mean(mine.values()):.4f}{spread}"
        lines.append(f"| {checkpoint}, {metric} | {attention} | {stage} | {value} | {difference} | {len(mine)} |")
    return "\n".join(lines)


def _is(row: dict[str, str], checkpoint: str, attention: str, stage: str) -> bool:
    return (row["checkpoint"], row["attention"], row["stage"]) == (checkpoint, attention, stage)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of finished conversions")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "converted.csv")
    args = parser.parse_args(argv)
    rows = rows_of(args.out)
    have = {tuple(row[name] for name in KEY) for row in rows}
    new = [row for folder in args.folders for row in rows_of_folder(folder)]
    rows += [row for row in new if tuple(row[name] for name in KEY) not in have]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
