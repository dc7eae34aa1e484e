r"""What each part of a conversion is worth: one change at a time to the same recipe, on an encoder and on a GPT-2.

    python recipes/study_ablation.py sentences --checkpoint all-MiniLM-L6-v2 --train stsb-train.csv \
        --validation stsb-dev.csv
    python recipes/study_ablation.py text --checkpoint gpt2-shakespeare --train tinyshakespeare.txt

Each run is `convert.py` with what its row says and nothing else changed: 50 steps of attention transfer on 32
unlabelled sentences for an encoder, 300 of transfer and 300 of fine-tuning on 12 windows of 64 characters for the
GPT-2. The score is Spearman's correlation on pairs of sentences, or the loss on the last tenth of the text. Finished
runs are kept in the csv and not run again. A run takes a minute or two on one CPU core.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

import convert
from study_conversion import Sentences
from study_rows import Row, append, environment, finished, name_of, out_of, rows_of, shown_command, study_parser, where
from study_tables import markdown, mean_and_spread, write_up
from tqdm import tqdm
from transformers import AutoModel

from hf_polyattn.steps import DivergedError

QUARTIC = "--degree 4 --coefficients 1 1 0.375 0.0625 0.00390625 --normalization sum --calibrate.fit gain"

# name -> changes to the recipe, and the tasks that they are for
BOTH, TEXT = ("sentences", "text"), ("text",)
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "degree 3 / length, all stages": ("", BOTH),
    "not calibrated": ("--stages transfer {finetune}", BOTH),
    "calibrated only": ("--stages calibrate", BOTH),
    "calibrated only, layer by layer": ("--stages calibrate --calibrate.inputs student", BOTH),
    "calibrated only, in size": ("--stages calibrate --calibrate.fit gain", BOTH),
    "without transfer": ("--stages calibrate finetune", TEXT),
    "without fine-tuning": ("--stages calibrate transfer", TEXT),
    "distillation instead of fine-tuning": (
        "--stages calibrate transfer distill --distill.steps 300 --distill.learning_rate 1e-3 "
        "--distill.attention_learning_rate 1e-3",
        TEXT,
    ),
    "adapters of rank 8 instead of all weights": ("--finetune.lora_r 8", TEXT),
    "transfer of coefficients alone": ("--transfer.train state", BOTH),
    "transfer of queries and keys alone": ("--transfer.train query_key", BOTH),
    "degree 1": ("--degree 1", BOTH),
    "degree 2": ("--degree 2", BOTH),
    "degree 4": ("--degree 4", BOTH),
    "degree 5": ("--degree 5", BOTH),
    "degree 6": ("--degree 6", BOTH),
    "sqrt_length": ("--normalization sqrt_length", BOTH),
    "none": ("--normalization none", BOTH),
    "l1": ("--normalization l1 --calibrate.fit gain", BOTH),
    "l2": ("--normalization l2 --calibrate.fit gain", BOTH),
    "(1 + s/4)^4, sum": (QUARTIC, BOTH),
    "QK-norm": ("--qk_norm true", BOTH),
    "the bare power s^3": ("--activation monomial --normalization length --calibrate.fit gain", BOTH),
    "three quarters of the heads": ("--shares 0.75", BOTH),
    "half of the heads": ("--shares 0.5", BOTH),
    "a quarter of the heads": ("--shares 0.25", BOTH),
    "progressive: 1/4, 1/2, all": ("--shares 0.25 0.5 1", BOTH),
}


def recipe_of(task: str, args: argparse.Namespace) -> list[str]:
    """Arguments of convert.py that all rows of a task share."""
    if task == "sentences":
        text = sentences_file(args)
        words = "--block_size 128 --batch_size 32 --validation_batches 8 --transfer.steps 50"
    else:
        text = Path(args.train)
        words = (
            "--tokenizer chars --block_size 64 --batch_size 12 --shuffle random_windows "
            "--validation_batches 2000 --transfer.steps 300 --finetune.steps 300 --finetune.learning_rate 1e-3 "
            "--finetune.attention_learning_rate 1e-3 --stages calibrate transfer finetune"
        )
    # paths as words of their own: they may have spaces
    return ["--dataset", str(text), *words.split(), "--model", args.checkpoint]


def sentences_file(args: argparse.Namespace) -> Path:
    """The training sentences, one a line; named after what it holds, so that other data have another file."""
    text = "\n".join(Sentences(args, None).train)  # type: ignore[arg-type]
    path = args.runs / f"sentences-{hashlib.sha256(text.encode()).hexdigest()[:12]}.txt"
    if not path.exists():
        aside = path.with_suffix(".partial")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return path


def arguments(task: str, changes: str, args: argparse.Namespace) -> list[str]:
    """convert.py's arguments of one row: settings of stages that it leaves out go, too."""
    changed = changes.format(finetune="finetune" if task == "text" else "").split()
    words = recipe_of(task, args)
    if "--stages" in changed:
        start = changed.index("--stages") + 1
        rest = [i for i, word in enumerate(changed[start:], start) if word.startswith("--")]
        stages = changed[start : rest[0] if rest else len(changed)]
        if "--stages" in words:
            words = [*words[: words.index("--stages")], "--model", args.checkpoint]
        for stage in {"transfer", "finetune"} - set(stages):
            while mine := [i for i, word in enumerate(words) if word.startswith(f"--{stage}.")]:
                del words[mine[0] : mine[0] + 2]
    return [*words, *changed]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each change, a column for each task; means over seeds."""
    tasks = list(dict.fromkeys((row["task"], row["checkpoint"], row["metric"]) for row in rows))
    lines = []
    for name in ("softmax", *VARIANTS):
        own = [where(rows, task=task, checkpoint=checkpoint, variant=name) for task, checkpoint, _ in tasks]
        cells = [
            mean_and_spread([float(row["value"]) for row in found]) + f" ({len(found)} seeds)" * (len(found) > 1)
            for found in own
        ]
        if any(cells):
            lines.append([name, *cells])
    return markdown(["conversion", *(f"{checkpoint}, {metric}" for _, checkpoint, metric in tasks)], lines)


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("study_ablation", __doc__, only=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the order of the data")
    parser.add_argument("task", choices=("sentences", "text"))
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the softmax model")
    parser.add_argument("--train", required=True, help="sentences: csv; text: the text")
    parser.add_argument("--validation", help="sentences: csv")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    checkpoint = name_of(args.checkpoint)
    results = out_of(args, "ablation.csv")
    have = finished(results, "task", "checkpoint", "variant", "seed")
    judge = Sentences(args, None) if args.task == "sentences" else None  # type: ignore[arg-type]
    names = [name for name in args.only if args.task in VARIANTS[name][1]]

    def note(name: str, seed: int, value: float, report: object, command: str) -> None:
        row = {
            "task": args.task,
            "checkpoint": checkpoint,
            "variant": name,
            "seed": seed,
            "metric": "spearman" if judge else "loss",
            "value": round(value, 4),
            "training_tokens": getattr(report, "tokens", 0),
            "seconds": round(getattr(report, "seconds", 0)),
            **environment(),
            "command": command,
        }
        append(results, [row])
        have.add((args.task, checkpoint, name, str(seed)))

    for seed, name in tqdm([(seed, name) for seed in args.seeds for name in names], desc="conversions"):
        if (args.task, checkpoint, name, str(seed)) in have:
            continue
        out = args.runs / f"{args.task}-{list(VARIANTS).index(name):02d}-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        words = [*arguments(args.task, VARIANTS[name][0], args), "--seed", str(seed)]
        command = shown_command("convert.py", words)
        try:
            report = convert.main([*words, "--output_dir", str(out)])
        except DivergedError as error:
            # a change that trains to nothing is a result, and no reason to lose the others; a mistake is none
            tqdm.write(f"{name}, seed {seed}: {error}", file=sys.stderr)
            note(name, seed, float("nan"), None, f"{command}  # {error}")
            continue
        value = judge.score(AutoModel.from_pretrained(out).eval()) if judge else report.rows[-1].score
        note(name, seed, value, report, command)
        if (args.task, checkpoint, "softmax", "0") not in have:
            untouched = (
                judge.score(AutoModel.from_pretrained(args.checkpoint).eval()) if judge else report.rows[0].score
            )
            note("softmax", 0, untouched, None, "untouched")
        shutil.rmtree(out, ignore_errors=True)
    write_up(results, rows_of(results), table)


if __name__ == "__main__":
    main()
