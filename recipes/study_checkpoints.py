"""Small real checkpoints, patched and fine-tuned beside their softmax twins: equal data, steps and learning rates.

    python recipes/study_checkpoints.py sort --checkpoint gpt-nano-sort
    python recipes/study_checkpoints.py stories --checkpoint stories260k
    python recipes/study_checkpoints.py sentiment --checkpoint all-MiniLM-L6-v2 --data rt-polarity.csv

sort: a trained minGPT that sorts six letters out of three; all 729 inputs are tried. stories: a LLaMA of 260k
parameters, fine-tuned on stories that the untouched model wrote itself; loss on held-out ones. sentiment: MiniLM
(BERT) on movie reviews. Rows go to results/checkpoints.csv; those of a checkpoint that are there are not run again.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import finetune_causal_lm
import finetune_classifier
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
CUBIC = ["--activation", "poly", "--degree", "3", "--calibration_fit", "coefficients"]
# cubic sees as many steps as softmax; transferred has unlabelled steps of attention transfer before them
TWINS = {
    "softmax": ["--activation", "softmax"],
    "cubic": CUBIC,
    "transferred": [*CUBIC, "--transfer_steps", "80"],
}
LETTERS, LENGTH = "012", 6


def name_of(checkpoint: str) -> str:
    """The checkpoint as it stands in rows and file names: a folder's own name, or the Hub's without its slash."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint.replace("/", "--")


def sort_data(folder: Path, checkpoint: str) -> list[str]:
    """Prompts of six letters and their sorted order; every input appears, as it did in minGPT's own training."""
    path = folder / "sort.jsonl"
    with path.open("w") as file:
        for letters in itertools.product(LETTERS, repeat=LENGTH):
            row = {"prompt": "".join(letters), "completion": "".join(sorted(letters))}
            file.write(json.dumps(row) + "\n")
    return [
        *(
            "--dataset",
            str(path),
            "--validation_dataset",
            str(path),
            "--prompt_column",
            "prompt",
            "--tokenizer",
            "chars",
        ),
        *("--block_size", str(2 * LENGTH - 1), "--batch_size", "64", "--max_steps", "1500", "--learning_rate", "5e-4"),
        *("--warmup_steps", "50", "--eval_steps", "500", "--eval_batch_size", "256"),
    ]


def sort_score(checkpoint: Path) -> dict[str, float]:
    """How many of the 729 inputs the model sorts, by greedy decoding."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompts = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
    tokens = prompts
    with torch.no_grad():
        for _ in range(LENGTH):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    return {"sorted_of_729": int((tokens[:, LENGTH:] == prompts.sort(dim=1).values).all(dim=1).sum())}


def stories_data(folder: Path, checkpoint: str) -> list[str]:
    """Stories sampled from the untouched model at temperature 1, one a row."""
    path = folder / f"stories-{name_of(checkpoint)}.jsonl"
    if not path.exists():
        torch.manual_seed(0)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
            AutoTokenizer.from_pretrained(checkpoint),
        )
        with path.open("w") as file:
            for _ in tqdm(range(16), desc="sampling stories"):
                start = torch.full((96, 1), tokenizer.bos_token_id)
                sampled = model.generate(
                    start, do_sample=True, temperature=1.0, top_k=0, max_length=257, pad_token_id=0
                )
                for text in tokenizer.batch_decode(sampled, skip_special_tokens=True):
                    file.write(json.dumps({"text": text}) + "\n")
    return [
        *("--dataset", str(path), "--validation_fraction", "0.1", "--block_size", "256", "--batch_size", "16"),
        *("--max_steps", "200", "--learning_rate", "1e-3", "--warmup_steps", "20", "--eval_steps", "200"),
    ]


def sentiment_data(folder: Path, data: str) -> list[str]:
    return [
        *("--dataset", data, "--text_column", "text", "--label_column", "label", "--validation_fraction", "0.1"),
        *("--max_train_samples", "3200", "--batch_size", "32", "--epochs", "1"),
        *("--learning_rate", "1e-4", "--warmup_steps", "20"),
    ]


# task -> (recipe, data and settings, score of the checkpoint beside the recipe's own numbers, the number to compare)
TASKS: dict[str, tuple[Callable[..., dict], Callable[..., list[str]], Callable[[Path], dict] | None, str]] = {
    "sort": (finetune_causal_lm.main, sort_data, sort_score, "sorted_of_729"),
    "stories": (finetune_causal_lm.main, stories_data, None, "validation_loss"),
    "sentiment": (finetune_classifier.main, sentiment_data, None, "accuracy"),
}


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole csv, written aside and renamed: a stop leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)


def shown(words: Iterable[str]) -> str:
    """The words of a command as they stand in a row: of a path its last part, quoted where there are spaces."""
    return shlex.join(Path(word).name if "/" in word else word for word in words)


@contextlib.contextmanager
def appended(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes rows as they come, so that an interrupted study keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:

        def write(row: dict[str, Any]) -> None:
            writer = csv.DictWriter(file, list(row))
            # a study that was stopped before its first row has left an empty file
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()

        yield write


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: mean and spread of each task and checkpoint, cubic beside softmax."""
    lines = [
        "| task | checkpoint | metric | softmax | cubic | cubic after attention transfer | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, checkpoint, metric in dict.fromkeys((row["task"], row["checkpoint"], row["metric"]) for row in rows):
        cells, counts = [], []
        for name in TWINS:
            here = [
                row for row in rows if (row["task"], row["checkpoint"], row["attention"]) == (task, checkpoint, name)
            ]
            values = [float(row["value"]) for row in here]
            digits = 0 if metric == "sorted_of_729" else 4
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
            counts += [len(values)] if values else []
        lines.append(f"| {task} | {checkpoint} | {metric} | {' | '.join(cells)} | {min(counts)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the softmax model")
    parser.add_argument("--data", help="sentiment: csv with the columns text and label")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=TWINS, default=list(TWINS))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/study_checkpoints"), help="folder of checkpoints and data"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "checkpoints.csv")
    args = parser.parse_args(argv)
    recipe, prepare, score, metric = TASKS[args.task]
    if args.task == "sentiment" and not args.data:
        parser.error("sentiment needs --data, a csv with the columns text and label")
    args.runs.mkdir(parents=True, exist_ok=True)
    settings = prepare(args.runs, args.data or args.checkpoint)
    checkpoint = name_of(args.checkpoint)
    have = {(row["task"], row["checkpoint"], row["attention"], row["seed"]) for row in rows_of(args.out)}
    with appended(args.out) as write:
        for seed, name in itertools.product(args.seeds, args.only):
            if (args.task, checkpoint, name, str(seed)) in have:
                continue
            output = args.runs / f"{args.task}-{checkpoint}-{name}-{seed}"
            changes = [*settings, *TWINS[name], "--seed", str(seed)]
            results = recipe(["--model", args.checkpoint, *changes, "--output_dir", str(output), "--overwrite"])
            if score is not None:
                results |= score(output / "last")
            write(
                {
                    "task": args.task,
                    "checkpoint": checkpoint,
                    "attention": name,
                    "seed": seed,
                    "metric": metric,
                    "value": round(results[metric], 4),
                    "seconds": round(results["seconds"]),
                    "torch": results["versions"]["torch"],
                    "transformers": results["versions"]["transformers"],
                    "hf_polyattn": results["versions"]["hf-polyattn"],
                    "device": results["device"],
                    "command": f"--model {checkpoint} {shown(changes)}",
                }
            )
    text = table(rows_of(args.out))
    args.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
