"""ListOps: nested lists of digits under MIN, MAX, MED and SM, read as a flat sequence, the value to be predicted.

    python recipes/study_listops.py --seeds 1 2 3
    python recipes/study_listops.py --lengths 500 2000 --steps 5000      the published lengths: for a GPU
    python recipes/study_listops.py --quick

    [MAX 4 [MIN 7 2 ] [SM 8 9 ] ]  ->  7

The distribution is that of the Long Range Arena's generator (arXiv 2011.04006), written anew: operators MIN, MAX,
MED (the median, rounded down) and SM (the sum modulo 10), depth 10 at most, 2 to 10 arguments, a node is an operator
with probability 1/4, each expression once. The published task accepts 500 to 2,000 tokens; by default this one takes
8 to 24, which a CPU can learn from, so its accuracies are no Long Range Arena numbers. Each run is
`finetune_classifier.py` with a BERT of 0.5M parameters from scratch; rows differ in the attention and the seed, the
expressions are the same. The last row of the table is what knowing the outermost operator alone gives. Finished rows
are kept. A run takes two minutes on one CPU core. --quick: a small model, a few steps, seconds.
"""

import csv
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from study_rows import (
    Row,
    append,
    by_seed,
    environment,
    finished,
    out_of,
    paired,
    rows_of,
    shown_command,
    study_parser,
    trained,
    where,
)
from study_tables import markdown, mean_and_spread, mean_of, save_figure, write_up

MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_PROBABILITY = 10, 10, 0.25
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),  # of an even number, the mean of the middle two
    "[SM": lambda values: sum(values) % 10,
}
CLOSE = "]"
# one character a token, so that the recipe's character tokenizer reads them
CHARACTERS = {"[MIN": "m", "[MAX": "M", "[MED": "d", "[SM": "s", CLOSE: CLOSE, **{str(i): str(i) for i in range(10)}}

# name -> (label, changes to the recipe, color)
VARIANTS: dict[str, tuple[str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", "black"),
    "poly": ("degree 3, defaults", "--activation poly", "#2a6fbb"),
    "length-unit": (
        "degree 3, length, alpha = 1/spread",
        "--activation poly --normalization length --alpha 26.0416667",
        "#937860",
    ),
    "l1-unit": (
        "degree 3, l1, alpha = 1/spread",
        "--activation poly --normalization l1 --alpha 26.0416667",
        "#55a868",
    ),
    "poly-spread": (
        "degree 3, length, scores start at spread 1, alpha 1",
        "--activation poly --normalization length --score_spread 1 --alpha 1",
        "#8172b2",
    ),
    "monomial": ("s³/√n, as published", "--activation monomial", "#c44e52"),
    "monomial-mean": (
        "s³/√n, scores start at mean 1/2, learnable gain",
        "--activation monomial --score_mean 0.5 --gain 1.4 --learn_gain true",
        "#dd8452",
    ),
}
MODEL = (
    "--model_type bert --model_config.num_hidden_layers 4 --model_config.num_attention_heads 4 "
    "--model_config.hidden_size 96 --model_config.intermediate_size 384 "
    "--model_config.hidden_dropout_prob 0.0 --model_config.attention_probs_dropout_prob 0.0 "
    "--tokenizer chars --label_column value"
)
FULL = "--batch_size 32 --warmup_steps 100 --eval_batch_size 100 --logging_steps 20"
QUICK = (
    "--batch_size 8 --warmup_steps 1 --eval_batch_size 50 --model_config.num_hidden_layers 1 "
    "--model_config.num_attention_heads 2 --model_config.hidden_size 16 --model_config.intermediate_size 16"
)
RUN = "--eval_steps 0 --save_steps 0 --overwrite"


def expression(generator: random.Random, longest: int, tokens: list[str], depth: int = 1) -> int | None:
    """Appends one random expression, a digit or an operator with its arguments, to `tokens`; returns its value.

    None as soon as there are more than `longest` tokens: such an expression would be refused when it is complete, and
    most of its time would go into the rest of it.
    """
    if depth >= MAX_DEPTH or generator.random() > OPERATOR_PROBABILITY:
        digit = generator.randrange(10)
        tokens.append(str(digit))
        return digit
    operator = generator.choice(list(OPERATORS))
    tokens.append(operator)
    values = []
    for _ in range(generator.randint(2, MAX_ARGUMENTS)):
        value = expression(generator, longest, tokens, depth + 1)
        if value is None or len(tokens) >= longest:
            return None
        values.append(value)
    tokens.append(CLOSE)
    return OPERATORS[operator](values)


def expressions(seed: int, shortest: int, longest: int) -> Iterator[tuple[list[str], int]]:
    """Endless random expressions of `shortest` to `longest` tokens, each once."""
    if not 4 <= shortest <= longest:
        raise ValueError(f"lengths must be from 4 on and in order, got {shortest} {longest}")
    generator = random.Random(seed)
    seen = set()
    while True:
        tokens: list[str] = []
        value = expression(generator, longest, tokens)
        text = " ".join(tokens)
        if value is not None and len(tokens) >= shortest and text not in seen:
            seen.add(text)
            yield tokens, value


def write_data(folder: Path, seed: int, lengths: Sequence[int], counts: Sequence[int]) -> list[Path]:
    """A csv for training and one for validation, with the columns text and value; none stands in both."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    drawn = expressions(seed, *lengths)
    paths = []
    for part, count in zip(("train", "validation"), counts, strict=True):
        paths.append(folder / f"listops-{part}-{lengths[0]}-{lengths[1]}-{count}-{seed}.csv")
        rows = [next(drawn) for _ in tqdm(range(count), desc=f"expressions, {part}", mininterval=5)]
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "value"])
            writer.writerows(["".join(CHARACTERS[token] for token in tokens), value] for tokens, value in rows)
    return paths


def outermost_accuracy(train: Path, validation: Path) -> float:
    """Accuracy of the commonest value of each outermost operator: what no reading of the arguments gives."""
    counts: dict[str, Counter[str]] = {}
    for row in rows_of(train):
        counts.setdefault(row["text"][0], Counter())[row["value"]] += 1
    guess = {operator: values.most_common(1)[0][0] for operator, values in counts.items()}
    rows = rows_of(validation)
    return sum(guess.get(row["text"][0]) == row["value"] for row in rows) / len(rows)


def accuracy_by_length(checkpoint: Path, validation: Path, parts: int = 3) -> list[float]:
    """Accuracy on the shorter, middle and longer third of the validation rows."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = sorted(rows_of(validation), key=lambda row: len(row["text"]))
    right = []
    with torch.no_grad():
        for start in range(0, len(rows), 100):
            batch = rows[start : start + 100]
            inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
            guesses = model(**inputs).logits.argmax(-1).tolist()
            names = [model.config.id2label[guess] for guess in guesses]
            right += [name == row["value"] for name, row in zip(names, batch, strict=True)]
    cuts = [round(len(right) * part / parts) for part in range(parts + 1)]
    return [statistics.mean(right[low:high]) for low, high in itertools.pairwise(cuts)]


def run(name: str, seed: int, data: Sequence[Path], shared: list[str], output: Path) -> dict[str, Any]:
    """One row of the csv."""
    from finetune_classifier import main as finetune

    train, validation = data
    words = [*MODEL.split(), *shared, *VARIANTS[name][1].split(), "--seed", str(seed)]
    words += ["--dataset", str(train), "--validation_dataset", str(validation)]
    row = dict.fromkeys(("accuracy", "accuracy_shorter", "accuracy_middle", "accuracy_longer", "parameters"), "")
    results, note = trained(finetune, [*words, *RUN.split(), "--output_dir", str(output)])
    row |= {"seconds": "", "note": note}
    if results:
        thirds = accuracy_by_length(output / "last", validation)
        row["accuracy"] = f"{results['accuracy']:.4f}"
        for third, value in zip(("shorter", "middle", "longer"), thirds, strict=True):
            row[f"accuracy_{third}"] = f"{value:.4f}"
        row |= {"parameters": str(results["parameters"]), "seconds": str(round(results["seconds"]))}
    command = shown_command("finetune_classifier.py", words)
    return {**row, "outermost": f"{outermost_accuracy(train, validation):.4f}", **environment(), "command": command}


KEY = ("attention", "seed", "shortest", "longest", "steps", "learning_rate")


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy of each attention, by thirds of the length, and its difference to softmax on equal seeds."""
    tables = []
    for setting in dict.fromkeys(tuple(row[key] for key in KEY[2:]) for row in rows):
        here = [row for row in rows if tuple(row[key] for key in KEY[2:]) == setting]
        shortest, longest, steps, rate = setting
        lines = []
        own = {name: where(here, attention=name) for name in VARIANTS}
        softmax = by_seed(own["softmax"], "accuracy")
        for name, (label, _, _) in VARIANTS.items():
            found, notes = by_seed(own[name], "accuracy"), [row["note"] for row in own[name] if row["note"]]
            if not found and not notes:
                continue
            difference = mean_of(paired(found, softmax) if name != "softmax" else [], sign="+")
            columns = [f"accuracy{part}" for part in ("", "_shorter", "_middle", "_longer")]
            cells = [mean_and_spread(by_seed(own[name], column).values()) for column in columns]
            cells[0] = "; ".join([cell for cell in (cells[0], *notes) if cell])
            lines.append([label, cells[0], difference, *cells[1:], len(found)])
        lines.append(["the outermost operator alone", f"{float(here[0]['outermost']):.4f}", *[""] * 5])
        heads = ["accuracy", "minus softmax, same seeds", "shorter third", "middle", "longer", "seeds"]
        title = f"{shortest} to {longest} tokens, {int(steps):,} steps, learning rate {rate}:"
        tables.append(f"{title}\n\n" + markdown(["attention", *heads], lines))
    return "\n\n".join(tables)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy by thirds of the length: dots are seeds, bars their mean, the dashed line the outermost operator."""
    from matplotlib.figure import Figure

    setting = tuple(rows[-1][key] for key in KEY[2:])
    rows = [row for row in rows if tuple(row[key] for key in KEY[2:]) == setting and row["accuracy"]]
    names = [name for name in VARIANTS if any(row["attention"] == name for row in rows)]
    columns = {"": "all", "_shorter": "shorter third", "_middle": "middle third", "_longer": "longer third"}
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        label, _, color = VARIANTS[name]
        for place, column in enumerate(columns):
            values = [float(row[f"accuracy{column}"]) for row in rows if row["attention"] == name]
            x = place + (number - (len(names) - 1) / 2) * width
            axes.bar(x, statistics.mean(values), 0.9 * width, color=color, alpha=0.5, label=None if place else label)
            axes.plot([x] * len(values), values, "o", color=color, ms=4)
    if rows:
        line = float(rows[0]["outermost"])
        axes.axhline(line, color="gray", ls="--", lw=1.2, label="the outermost operator alone")
    axes.set_xticks(range(len(columns)), list(columns.values()))
    axes.set_ylabel("accuracy")
    title = f"ListOps of {setting[0]} to {setting[1]} tokens, {int(setting[2]):,} steps, learning rate {setting[3]}"
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "a small model, 4 steps"
    parser = study_parser("study_listops", __doc__, seeds=[1], only=VARIANTS, quick=quick)
    parser.set_defaults(only=["softmax", "poly"])
    parser.add_argument("--lengths", type=int, nargs=2, default=[8, 24], help="shortest and longest, in tokens")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of 32 expressions, each seen once")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--validation", type=int, default=1000, help="expressions to validate on")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.validation, args.lengths = 4, 100, [20, 40]
    out = out_of(args, "listops.csv")
    shared = (QUICK if args.quick else FULL).split()
    batch_size = int(shared[shared.index("--batch_size") + 1])
    # two more positions for the marks at both ends
    shared += ["--max_steps", str(args.steps), "--max_length", str(args.lengths[1] + 2)]
    shared += ["--learning_rate", f"{args.learning_rate:g}"]
    done = finished(out, *KEY)
    data: list[Path] = []
    for seed in args.seeds:
        for name in args.only:
            key = {"attention": name, "seed": seed, "shortest": args.lengths[0], "longest": args.lengths[1]}
            key |= {"steps": args.steps, "learning_rate": f"{args.learning_rate:g}"}
            if tuple(map(str, key.values())) in done:
                continue
            data = data or write_data(args.runs, 0, args.lengths, (args.steps * batch_size, args.validation))
            append(out, [{**key, **run(name, seed, data, shared, args.runs / f"{name}-{seed}")}])
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
