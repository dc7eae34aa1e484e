"""Recall: where do rows that do not sum to 1 lose? Induction, a passkey and multi-query recall, from scratch.

    python recipes/study_recall.py --seeds 1 2 3
    python recipes/study_recall.py --checkpoint gpt2-shakespeare gpt2-cubic --text tinyshakespeare.txt
    python recipes/study_recall.py --quick

A LLaMA of 2 layers and width 64 is trained on three tasks in turn, with fresh random sequences in every step:
  induction    a pattern of random tokens again and again: predict its copies;
  passkey      one value behind a mark, anywhere in random tokens: name it at the end;
  recall       pairs of key and value, then the keys again, among blanks: name the value of each (MQAR).
A step has one task and one length, drawn at random, and for recall a number of pairs. Accuracy is measured by all
three, on sequences that training did not see. A run ends when 99.5 % of the last answers of every task are right, at
--steps at the latest; the csv has the steps of each run. Finished runs are kept. A run takes a minute on one CPU
core. --quick: a smaller model, a few steps.

--checkpoint: no training. Trained language models are probed for the same (`hf_polyattn.evaluation.probes`): random
tokens twice, and a key in a text. Name a converted model and its teacher to see what conversion cost.
"""

import argparse
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from study_rows import Row, append, environment, finished, out_of, rows_of, study_parser, where
from study_tables import markdown, mean_and_spread, save_figure, write_up

from hf_polyattn.training.losses import IGNORE, count_labels, token_losses

MARK, BLANK, FIRST = 0, 1, 2
KEYS = VALUES = 32
VOCABULARY = FIRST + KEYS + VALUES
LENGTHS, PAIRS = (16, 32, 64, 128), (4, 8, 16, 32)
SOLVED, WINDOW = 0.995, 20

# name -> (label, words of the recipes' attention and score options, color)
VARIANTS: dict[str, tuple[str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", "black"),
    # scores of these models start at spread 1, so that alpha is 1 by any rule
    "poly": ("degree 3, defaults", "--activation poly", "#55a868"),
    "length": ("degree 3, un-normalised (length)", "--activation poly --normalization length", "#2a6fbb"),
    "monomial-mean": (
        "s³/√n, scores start at mean 1/2, learnable gain",
        "--activation monomial --score_mean 0.5 --gain 1.4 --learn_gain true",
        "#dd8452",
    ),
    "sigmoid": ("sigmoid(s - log n)", "--activation sigmoid", "#8172b2"),
}
# short lengths are there because long ones alone teach a small model nothing for a long time; a matrix of width 64
# starts at its usual size, 1 / sqrt(64), with which softmax learns the tasks and with .02 does not; biases of queries
# and keys hold the start at a mean, which rotary positions make a mean of tokens with themselves
MODEL = (
    "--model_type llama --model_config.num_hidden_layers 2 --model_config.num_attention_heads 2 "
    "--model_config.num_key_value_heads 2 --model_config.attention_bias true --model_config.initializer_range 0.125"
)
TRAINING = "--learning_rate 4e-3 --warmup_steps 50 --weight_decay 0.1"
TOKENS = 512
"""Of one optimizer step, whatever the length."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens [b, T] and labels [b, T]: labels[:, t] is the answer after tokens[:, : t + 1], IGNORE where none is asked."""


def induction(generator: torch.Generator, batch: int, length: int, pairs: int) -> Batch:
    """A pattern, again and again; from its second copy on every token is asked but the first, which nothing announces.

    The pattern has a quarter to half of the length, another share in every row: with one period for all, attending
    to a distance would do, and nothing would have to be recognised.
    """
    pattern = torch.randint(FIRST, VOCABULARY, (batch, length), generator=generator)
    period = torch.randint(length // 4, length // 2 + 1, (batch, 1), generator=generator)
    places = torch.arange(length).expand(batch, -1)
    tokens = pattern.gather(1, places % period)
    labels = tokens.roll(-1, 1).masked_fill(places < period, IGNORE)
    labels[:, -1] = IGNORE
    return tokens, labels


def passkey(generator: torch.Generator, batch: int, length: int, pairs: int) -> Batch:
    """Random tokens with a mark and a value in them; a mark at the end asks for the value."""
    tokens = torch.randint(FIRST, VOCABULARY, (batch, length), generator=generator)
    value = torch.randint(FIRST + KEYS, VOCABULARY, (batch,), generator=generator)
    place = torch.randint(length - 2, (batch,), generator=generator)
    rows = torch.arange(batch)
    tokens[rows, place], tokens[rows, place + 1], tokens[:, -1] = MARK, value, MARK
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -1] = value
    return tokens, labels


def recall(generator: torch.Generator, batch: int, length: int, pairs: int) -> Batch:
    """`pairs` of key and value, then each key once more at a random place among blanks."""
    draw = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    keys = FIRST + draw
    values = torch.randint(FIRST + KEYS, VOCABULARY, (batch, pairs), generator=generator)
    tokens = torch.full((batch, length), BLANK)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    places = 2 * pairs + torch.rand(batch, length - 2 * pairs, generator=generator).argsort(1)[:, :pairs]
    labels = torch.full_like(tokens, IGNORE)
    return tokens.scatter(1, places, keys), labels.scatter(1, places, values)


TASKS: dict[str, Callable[[torch.Generator, int, int, int], Batch]] = {
    "induction": induction,
    "passkey": passkey,
    "recall": recall,
}


def settings_of(lengths: Sequence[int]) -> list[tuple[str, int, int]]:
    """(task, length, pairs): what is trained and measured; pairs and their keys again must fit into the length."""
    alone = [(task, length, 0) for task in TASKS if task != "recall" for length in lengths]
    return alone + [("recall", length, pairs) for length in lengths for pairs in PAIRS if 3 * pairs <= length]


def build(name: str, seed: int, width: int, length: int, steps: int) -> tuple[Any, Any]:
    """The model with its attention, and the recipes' optimization settings."""
    from transformers import AutoModelForCausalLM

    from hf_polyattn.training.models import build_model, replace_attention
    from hf_polyattn.training.tokenizers import char_tokenizer
    from hf_polyattn_arguments import AttentionArguments, ModelArguments, OptimizationArguments
    from hf_polyattn_parsing import parse_arguments

    words = [*MODEL.split(), *TRAINING.split(), *VARIANTS[name][1].split(), "--seed", str(seed)]
    words += ["--model_config.hidden_size", str(width), "--model_config.intermediate_size", str(2 * width)]
    words += ["--max_steps", str(steps)]
    groups = (ModelArguments, AttentionArguments, OptimizationArguments)
    model_args, attention, optimization = parse_arguments(words, groups)
    # there is no text: the tokenizer only says how many tokens there are
    tokenizer = char_tokenizer(chr(0x4E00 + token) for token in range(VOCABULARY))
    model = build_model(AutoModelForCausalLM, model_args, tokenizer, seed, length)
    return replace_attention(model, attention), optimization


def train(
    model: Any, optimization: Any, settings: Sequence[tuple[str, int, int]], tokens: int
) -> tuple[Any, int, str]:
    """The trained model, the steps that it took, and why it ended early if it diverged."""
    from accelerate import Accelerator
    from tqdm import tqdm

    from hf_polyattn.training.optimization import adamw, clip_gradients, set_learning_rate

    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(optimization.seed)
    model, optimizer = accelerator.prepare(model.train(), adamw(model, optimization))
    by_task = {task: [setting for setting in settings if setting[0] == task] for task in TASKS}
    recent: dict[str, deque[float]] = {task: deque(maxlen=WINDOW) for task in TASKS}
    steps = optimization.max_steps
    bar = tqdm(range(1, steps + 1), desc="steps", mininterval=10)
    for step in bar:
        set_learning_rate(optimizer, optimization, step, steps)
        task = list(TASKS)[step % len(TASKS)]
        _, length, pairs = by_task[task][int(torch.randint(len(by_task[task]), (), generator=generator))]
        inputs, labels = TASKS[task](generator, tokens // length, length, pairs)
        logits = model(input_ids=inputs).logits
        sums, counts = token_losses(logits, labels)
        loss = sums.sum() / counts.sum()
        accelerator.backward(loss)
        norm = clip_gradients(accelerator, model, optimization.max_grad_norm)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            return model, step, f"diverged at step {step}"
        optimizer.step()
        optimizer.zero_grad()
        recent[task].append(int((logits.argmax(-1) == labels).sum()) / int(counts.sum()))
        bar.set_postfix(
            {name: f"{statistics.mean(rights):.2f}" for name, rights in recent.items() if rights}, refresh=False
        )
        if all(len(rights) == WINDOW and statistics.mean(rights) >= SOLVED for rights in recent.values()):
            return model, step, ""
    return model, steps, ""


def evaluate(model: Any, task: str, length: int, pairs: int, samples: int) -> dict[str, str]:
    """Accuracy and loss on sequences of a seed of their own, the same for every model."""
    generator = torch.Generator().manual_seed(10**6 + 1000 * length + pairs)
    inputs, labels = TASKS[task](generator, samples, length, pairs)
    model.eval()
    right, total, loss = 0, 0, 0.0
    with torch.no_grad():
        for ids, wanted in zip(inputs.split(64), labels.split(64), strict=True):
            logits = model(input_ids=ids).logits
            loss += token_losses(logits, wanted)[0].double().sum().item()
            right += int((logits.argmax(-1) == wanted).sum())
            total += int(count_labels(wanted).sum())
    return {"accuracy": f"{right / total:.4f}", "loss": f"{loss / total:.4f}", "answers": str(total)}


def run(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model: a row for each task, length and number of pairs."""
    settings = settings_of(args.lengths)
    model, optimization = build(name, seed, args.width, max(args.lengths), args.steps)
    model, steps, note = train(model, optimization, settings, args.tokens)
    facts = {
        "steps": steps,
        "most_steps": args.steps,
        "note": note,
        "width": args.width,
        **environment(model.device),
        "command": f"python recipes/study_recall.py --only {name} --seeds {seed} --steps {args.steps} "
        f"--width {args.width} --tokens {args.tokens} --samples {args.samples} --lengths "
        + " ".join(map(str, args.lengths)),
    }
    empty = {"accuracy": "", "loss": "", "answers": ""}
    return [
        {"task": task, "attention": name, "seed": seed, "length": length, "pairs": pairs}
        | (empty if note else evaluate(model, task, length, pairs, args.samples))
        | facts
        for task, length, pairs in settings
    ]


def label_of(length: str, pairs: str) -> str:
    return f"{length}, {pairs} pairs" if pairs != "0" else length


def lines_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(attention, steps at most): a line each in tables and figures, the shortest training first."""
    found = {(row["attention"], row["most_steps"]) for row in rows}
    return sorted(found, key=lambda line: (list(VARIANTS).index(line[0]), int(line[1])))


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table a task, accuracy by length and pairs, mean over seeds, and the steps that training took."""
    tables = []
    for task in TASKS:
        own = where(rows, task=task)
        columns = list(dict.fromkeys((row["length"], row["pairs"]) for row in own))
        lines = []
        for name, most in lines_of(own):
            mine = where(own, attention=name, most_steps=most)
            cells = []
            for column in columns:
                found = where(mine, length=column[0], pairs=column[1])
                values = [float(row["accuracy"]) for row in found if row["accuracy"]]
                notes = dict.fromkeys(row["note"] for row in found if row["note"])
                cells.append("; ".join([mean_and_spread(values, 3), *notes] if values else notes))
            steps = list({row["seed"]: row["steps"] for row in mine}.values())
            lines.append([VARIANTS[name][0], *cells, ", ".join(steps), len(steps)])
        heads = ["attention", *(label_of(*column) for column in columns), "steps", "seeds"]
        tables.append(f"**{task}**, accuracy by length:\n\n" + markdown(heads, lines))
    return "\n\n".join(tables)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a task: accuracy by length; recall by pairs at the greatest length. None where all runs diverged."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["accuracy"]]
    if not rows:
        return
    figure = Figure(figsize=(3.7 * len(TASKS) + 0.5, 4.4), layout="constrained")
    grid = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    shortest = min(int(row["most_steps"]) for row in rows)
    for axes, task in zip(grid, TASKS, strict=True):
        own = [row for row in rows if row["task"] == task]
        longest = max(int(row["length"]) for row in own)
        by = "pairs" if task == "recall" else "length"
        own = [row for row in own if by == "length" or int(row["length"]) == longest]
        ticks = sorted({int(row[by]) for row in own})
        for name, most in lines_of(own):
            label, _, color = VARIANTS[name]
            mine = where(own, attention=name, most_steps=most)
            points = [(int(row[by]), float(row["accuracy"])) for row in mine]
            means = {tick: statistics.mean(y for x, y in points if x == tick) for tick in ticks}
            longer = int(most) > shortest
            label += f", {int(most):,} steps" if longer else ""
            axes.plot(means.keys(), means.values(), "--" if longer else "-", color=color, lw=1.6, label=label)
            axes.plot(*zip(*points, strict=True), "o", color=color, ms=4, alpha=0.6)
        axes.set(xscale="log", xlabel=f"pairs, length {longest}" if by == "pairs" else "length", ylim=(-0.03, 1.03))
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel(f"accuracy after {shortest:,} steps at most")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def probe(checkpoint: str, text: Path | None, lengths: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Rows of both probes of a trained language model, a row a length; lengths beyond its positions are left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_polyattn.evaluation import probes
    from hf_polyattn.training.tokenizers import char_tokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = (
        char_tokenizer([text.read_text(encoding="utf-8")]) if text else AutoTokenizer.from_pretrained(checkpoint)
    )
    most = getattr(model.config, "max_position_embeddings", None) or max(lengths)
    rows = []
    for length in (length for length in lengths if length <= most):
        measured = (
            probes.repeated_tokens(model, length // 2, samples=samples),
            probes.passkey(model, tokenizer, length, samples=samples),
        )
        for found in measured:
            told = "second copy" if "second copy" in found.scores else "key"
            untold = "first copy" if "first copy" in found.scores else "unseen key"
            rows.append(
                {
                    "checkpoint": Path(checkpoint).resolve().name,
                    "probe": found.data["probe"],
                    "length": length,
                    **{
                        f"loss_{name}": f"{found.scores[key].value:.4f}"
                        for name, key in (("new", untold), ("told", told))
                    },
                    "told_standard_error": f"{found.scores[told].standard_error:.4f}",
                    "accuracy": f"{found.scores['accuracy'].value:.4f}",
                    "samples": samples,
                    **environment(model.device),
                    "command": f"python recipes/study_recall.py --checkpoint {Path(checkpoint).resolve().name}"
                    + (f" --text {text.name}" if text else "")
                    + f" --lengths {length} --samples {samples}",
                }
            )
    if not rows:
        raise ValueError(f"{checkpoint} has {most} positions: name --lengths of at most that")
    return rows


def probe_table(rows: Sequence[Row]) -> str:
    """Markdown: losses on what the context does not hold and on what it does, and how often the latter is named."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["probe"], int(row["length"]))):
        cells = [row[name] for name in ("checkpoint", "loss_new", "loss_told", "accuracy")]
        cells[2] += f" ± {row['told_standard_error']}"
        lines.append([f"{row['probe']}, {row['length']}", *cells])
    heads = ["probe, length", "checkpoint", "loss, new", "loss, told before", "accuracy, told before"]
    return markdown(heads, lines)


def main(argv: list[str] | None = None) -> None:
    quick = "a small model, 3 steps"
    parser = study_parser("study_recall", __doc__, seeds=[1], only=VARIANTS, quick=quick)
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps at most")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of one step")
    parser.add_argument("--samples", type=int, default=256, help="sequences to measure each accuracy on")
    parser.add_argument("--checkpoint", nargs="+", help="probe these folders instead of training")
    parser.add_argument("--text", type=Path, help="with --checkpoint: its sorted characters are the vocabulary")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.lengths, args.width, args.tokens, args.samples = 3, [32], 16, 128, 8
    if args.checkpoint:
        out = out_of(args, "recall_checkpoints.csv")
        for checkpoint in args.checkpoint:
            done = finished(out, "checkpoint", "length")
            lengths = [n for n in args.lengths if (Path(checkpoint).resolve().name, str(n)) not in done]
            if lengths:
                append(out, probe(checkpoint, args.text, lengths, args.samples))
        write_up(out, rows_of(out), probe_table)
        return
    out = out_of(args, "recall.csv")
    done = finished(out, "attention", "seed", "most_steps")
    for seed in args.seeds:
        for name in args.only:
            if (name, str(seed), str(args.steps)) not in done:
                append(out, run(name, seed, args))
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
