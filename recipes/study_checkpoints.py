"""Small real checkpoints, patched and fine-tuned beside their softmax twins: equal data, steps and learning rates.

    python recipes/study_checkpoints.py sort --checkpoint gpt-nano-sort
    python recipes/study_checkpoints.py stories --checkpoint stories260k
    python recipes/study_checkpoints.py sentiment --checkpoint all-MiniLM-L6-v2 --data rt-polarity.csv

sort: a trained minGPT that sorts six letters out of three; all 729 inputs are tried. stories: a LLaMA of 260k
parameters, fine-tuned on stories that the untouched model wrote itself; loss on held-out ones. sentiment: MiniLM
(BERT) on movie reviews. Rows go to results/checkpoints.csv; those of a checkpoint that are there are not run again.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import finetune_causal_lm
import finetune_classifier
import torch
from study_rows import Row, append, environment_of, finished, name_of, out_of, rows_of, shown, study_parser, where
from study_tables import markdown, mean_and_spread, write_up
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

CUBIC = ["--activation", "poly", "--degree", "3", "--calibration_fit", "coefficients"]
# cubic sees as many steps as softmax; transferred has unlabelled steps of attention transfer before them
TWINS = {
    "softmax": ["--activation", "softmax"],
    "cubic": CUBIC,
    "transferred": [*CUBIC, "--transfer_steps", "80"],
}
LETTERS, LENGTH = "012", 6


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


def table(rows: list[Row]) -> str:
    """Markdown: mean and spread of each task and checkpoint, cubic beside softmax."""

    def lines() -> Iterator[list[object]]:
        for task, checkpoint, metric in dict.fromkeys((row["task"], row["checkpoint"], row["metric"]) for row in rows):
            own = where(rows, task=task, checkpoint=checkpoint)
            values = [[float(row["value"]) for row in where(own, attention=name)] for name in TWINS]
            digits = 0 if metric == "sorted_of_729" else 4
            seeds = min(len(x) for x in values if x)
            yield [task, checkpoint, metric, *(mean_and_spread(x, digits) for x in values), seeds]

    twins = "softmax", "cubic", "cubic after attention transfer"
    return markdown(["task", "checkpoint", "metric", *twins, "seeds"], lines())


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("study_checkpoints", __doc__, seeds=[1, 2, 3], only=TWINS)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the softmax model")
    parser.add_argument("--data", help="sentiment: csv with the columns text and label")
    args = parser.parse_args(argv)
    recipe, prepare, score, metric = TASKS[args.task]
    if args.task == "sentiment" and not args.data:
        parser.error("sentiment needs --data, a csv with the columns text and label")
    args.runs.mkdir(parents=True, exist_ok=True)
    settings = prepare(args.runs, args.data or args.checkpoint)
    checkpoint = name_of(args.checkpoint)
    out = out_of(args, "checkpoints.csv")
    have = finished(out, "task", "checkpoint", "attention", "seed")
    for seed, name in itertools.product(args.seeds, args.only):
        if (args.task, checkpoint, name, str(seed)) in have:
            continue
        output = args.runs / f"{args.task}-{checkpoint}-{name}-{seed}"
        changes = [*settings, *TWINS[name], "--seed", str(seed)]
        results = recipe(["--model", args.checkpoint, *changes, "--output_dir", str(output), "--overwrite"])
        if score is not None:
            results |= score(output / "last")
        row = {
            "task": args.task,
            "checkpoint": checkpoint,
            "attention": name,
            "seed": seed,
            "metric": metric,
            "value": round(results[metric], 4),
            "seconds": round(results["seconds"]),
            **environment_of(results),
            "command": f"--model {checkpoint} {shown(changes)}",
        }
        append(out, [row])
    write_up(out, rows_of(out), table)


if __name__ == "__main__":
    main()
