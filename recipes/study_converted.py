"""The stages of finished conversions, from the results.json that convert.py leaves: a csv, and a table of means.

    python recipes/study_converted.py runs/gpt2-cubic-1 runs/gpt2-cubic-2 --out recipes/results/converted.csv

One row a stage and seed; rows that the csv holds already stay. The table has mean and standard deviation over seeds of
each model and metric, the fine-tuned softmax model beside it, and the difference of the two on the same seeds.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from study_rows import RESULTS, Row, by_seed, name_of, paired, rows_of, shown, where, write_rows
from study_tables import markdown, mean_and_spread, mean_of, write_up

from hf_polyattn.converting.report import SOFTMAX, TEACHER, TUNED
from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_parsing import mapping
from hf_polyattn_stages import STAGES, ConversionArguments, ConversionTextArguments

KEY = ("checkpoint", "attention", "settings", "stage", "seed", "steps")
# shown elsewhere in a row, or without effect on what it says
ELSEWHERE = {"model", "output_dir", "seed", "stages", *STAGES, "twin", "keep_stages", "save_steps", "num_workers"}
ELSEWHERE |= {"activation", "degree", "normalization", "coefficients", "qk_norm", "backend"}


def attention_of(attention: dict[str, Any]) -> str:
    """The attention of a converted model, from its configuration."""
    words = f"degree {attention['degree']} / {attention['normalization']}"
    if attention["activation"] != "poly":
        words = f"{attention['activation']}, {words}"
    if attention["activation"] == "poly" and attention["coefficients"] != "learnable":
        words += f", coefficients {attention['coefficients']}"
    return words + (", QK-norm" if attention["qk_norm"] else "")


def settings_of(results: dict[str, Any]) -> str:
    """What a conversion was told besides what `attention_of` shows: its stages, and all that is not as by default."""
    arguments = results["arguments"]
    kinds = [row["stage"].split()[0] for row in results["stages"]["rows"][2:]]
    named = {kind: mapping(kind, arguments[kind]) for kind in STAGES}
    # of default stages an older version has written no plan
    plan = results["plan"] or [[kind, named[kind]] for kind in dict.fromkeys(kinds)]
    parts = [" ".join([kind, *_changed(settings, STAGES[kind])]) for kind, settings in plan]
    for group in (ConversionArguments, AttentionArguments, ConversionTextArguments):
        parts += _changed({n: v for n, v in arguments.items() if n not in ELSEWHERE}, group)
    return "; ".join(parts)


def _changed(values: dict[str, Any], group: type) -> list[str]:
    """`name value` of each field of a dataclass that is not what it is by default."""
    found = []
    for field in dataclasses.fields(group):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in values and values[field.name] != default:
            value = values[field.name]
            found.append(f"{field.name} {Path(value).name if isinstance(value, str) else value}")
    return found


def rows_of_folder(folder: Path) -> list[Row]:
    """One row for each stage of a finished conversion."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stages = results["stages"]
    common = {
        "checkpoint": name_of(results["arguments"]["model"]),
        "attention": attention_of(results["attention"]),
        "settings": settings_of(results),
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
            "command": shown(shlex.split(results["command"])),
        }
        for row in [*stages["rows"], *tuned]
    ]


def own_settings(settings: str, others: Sequence[str]) -> str:
    """Those of the settings that some of the others has not, or not so."""
    pairs = [_pairs(other) for other in others]
    mine = {name: value for name, value in _pairs(settings).items() if any(o.get(name) != value for o in pairs)}
    return ", ".join(" ".join(filter(None, (*name, value))) for name, value in mine.items())


def _pairs(settings: str) -> dict[tuple[str, str], str]:
    """(stage or "", name) -> value, of what `settings_of` made; a stage itself is there without a name."""
    found = {}
    seen: Counter[str] = Counter()
    for kind, *words in (part.split() for part in settings.split("; ")):
        if kind not in STAGES:
            found["", kind] = " ".join(words)
            continue
        # as the report labels the second of its kind
        seen[kind] += 1
        kind += f" #{seen[kind]}" if seen[kind] > 1 else ""
        found[kind, ""] = ""
        found |= {(kind, name): value for name, value in zip(words[::2], words[1::2], strict=True)}
    return found


def table(rows: list[Row]) -> str:
    """Markdown: one line a stage."""
    groups = dict.fromkeys((r["checkpoint"], r["metric"], r["attention"], r["settings"], r["stage"]) for r in rows)
    conversions = {(checkpoint, attention, settings) for checkpoint, _, attention, settings, _ in groups}

    def lines() -> Iterator[list[object]]:
        for checkpoint, metric, attention, settings, stage in groups:
            one = where(rows, checkpoint=checkpoint, attention=attention, settings=settings)
            mine = by_seed(where(one, stage=stage), "value")
            # before the last stage it has seen fewer tokens than the twin
            last = [row["stage"] for row in one if row["stage"] != TUNED][-1]
            tuned = by_seed(where(one, stage=TUNED), "value") if stage == last else {}
            difference = mean_of(paired(mine, tuned), sign="+")
            others = [s for c, a, s in conversions if (c, a) == (checkpoint, attention) and s != settings]
            own = own_settings(settings, others)
            label = f"{attention} ({own})" if own else attention
            name = TEACHER if stage == SOFTMAX else stage
            # of perplexities: the mean of exp(difference), a difference of losses being that of their logarithms
            lost = paired(mine, by_seed(where(one, stage=SOFTMAX), "value")) if metric == "loss" else []
            ratio = f"{statistics.fmean(map(math.exp, lost)):.3f}" if lost and stage != SOFTMAX else ""
            of = f"{checkpoint}, {metric}"
            yield [of, label, name, mean_and_spread(mine.values()), ratio, difference, len(mine)]

    header = ["checkpoint, metric", "attention", "stage", "value", "perplexity, times the teacher's"]
    return markdown([*header, "minus fine-tuned softmax, same seeds", "seeds"], lines())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of finished conversions")
    parser.add_argument("--out", type=Path, default=RESULTS / "converted.csv")
    args = parser.parse_args(argv)
    have = {tuple(row[name] for name in KEY): row for row in rows_of(args.out)}
    for row in (row for folder in args.folders for row in rows_of_folder(folder)):
        have.setdefault(tuple(row[name] for name in KEY), row)
    rows = list(have.values())
    write_rows(args.out, rows)
    write_up(args.out, rows, table)


if __name__ == "__main__":
    main()
