"""Longer than trained: a LLaMA-shaped character model of 0.8M sees 256 characters, then is measured up to 4,096.

    python recipes/study_length.py --data tinyshakespeare.txt --seeds 1 2
    python recipes/study_length.py --quick

Each run is `pretrain_causal_lm.py` on windows of 256 characters; rows differ in the attention alone. Afterwards every
length predicts the same characters, the last 128 of windows that end in the same places: a window of 4,096 only has
more before them. So a difference is what the longer context did, helped or harmed. Normalizations differ in what they
do with n: softmax's rows sum to 1 whatever n is, those of "none" grow with it. Rotary positions extend to any length,
but nothing trains them there, for softmax no more than for the others. Rows go to OUT.csv, one a length;
finished ones are kept. A run takes 3 minutes on one CPU core. --quick: Python's own source, seconds.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_rows import (
    Row,
    append,
    environment,
    finished,
    out_of,
    quick_text,
    rows_of,
    shown_command,
    study_parser,
    trained,
    where,
)
from study_tables import markdown, mean_and_spread, mean_of, save_figure, write_up

TAIL = 128
"""Characters at the end of each window whose loss counts."""
SPACING = 4096
"""Characters between the ends of two windows."""

# name -> (label, changes to the recipe, color)
VARIANTS: dict[str, tuple[str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", "black"),
    "poly": ("degree 3, defaults", "--activation poly", "#937860"),
    **{
        name: (
            f"degree 3, {name}, alpha = 1/spread",
            f"--activation poly --normalization {name} --alpha 19.53125",
            color,
        )
        for name, color in {
            "length": "#2a6fbb",
            "sqrt_length": "#55a868",
            "l1": "#dd8452",
            "l2": "#8172b2",
            "none": "#c44e52",
        }.items()
    },
}
MODEL = (
    "--model_type llama --model_config.num_hidden_layers 4 --model_config.num_attention_heads 4 "
    "--model_config.num_key_value_heads 4 --model_config.hidden_size 128 --model_config.intermediate_size 344 "
    "--model_config.max_position_embeddings 4096 --tokenizer chars --shuffle random_windows"
)
FULL = "--block_size 256 --batch_size 4 --max_steps 400 --warmup_steps 50 --learning_rate 2e-3 --eval_batch_size 64"
QUICK = (
    "--block_size 256 --batch_size 2 --max_steps 3 --warmup_steps 1 --model_config.num_hidden_layers 1 "
    "--model_config.hidden_size 32 --model_config.intermediate_size 32 --validation_fraction 0.3"
)
RUN = "--eval_steps 0 --save_steps 0 --logging_steps 50 --overwrite"
FULL_LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096), (256, 512)


def ends_of_windows(characters: int, longest: int) -> list[int]:
    """Where windows end, so that the longest fits before the first of them.

    >>> ends_of_windows(9000, 4096)
    [4096, 8192]
    """
    ends = list(range(longest, characters + 1, SPACING))
    if not ends:
        raise ValueError(f"{characters} characters to validate on hold no window of {longest}: take a longer text")
    return ends


def tail_losses(model: Any, ids: Any, length: int, ends: Sequence[int]) -> Any:
    """Loss sum of the last TAIL tokens of each window, [windows] in fp32; ids [T], windows end before `ends`."""
    import torch
    from tqdm import tqdm

    from hf_polyattn.training.losses import token_losses

    found = []
    with torch.no_grad():
        for end in tqdm(ends, desc=f"windows of {length}", mininterval=10, leave=False):
            window = ids[end - length : end][None]
            logits = model(input_ids=window).logits[:, -TAIL - 1 : -1]
            found.append(token_losses(logits, window[:, -TAIL:])[0])
    return torch.cat(found)


def measure(checkpoint: Path, text: str, fraction: float, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Loss by length, its paired difference to the first length, and standard errors over windows."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_polyattn.evaluation import Evaluation, Score, difference

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    held_out = text[int(len(text) * (1 - fraction)) :]
    ids = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(held_out)["input_ids"])
    ends = ends_of_windows(len(ids), max(lengths))
    rows, first = [], None
    for length in lengths:
        sums = tail_losses(model, ids, length, ends).double().numpy()
        score = Score.mean(sums, np.full(len(ends), TAIL))
        # no difference of numbers that are not finite
        evaluation = Evaluation({"loss": score}, {"windows": ends})
        first = first or evaluation
        paired = difference(evaluation, first)["loss"]
        rows.append(
            {
                "length": length,
                "loss": f"{score.value:.4f}",
                "standard_error": f"{score.standard_error or 0:.4f}",
                "minus_trained_length": f"{paired.value:.4f}",
                "its_standard_error": f"{paired.standard_error or 0:.4f}",
                "windows": len(ends),
            }
        )
    return rows


def run(name: str, seed: int, data: Path, shared: list[str], output: Path, lengths: Sequence[int]) -> list[dict]:
    """One training run, measured at every length: its rows."""
    from pretrain_causal_lm import main as pretrain

    changes = [*MODEL.split(), *shared, *VARIANTS[name][1].split(), "--seed", str(seed)]
    empty = dict.fromkeys(("loss", "standard_error", "minus_trained_length", "its_standard_error", "windows"), "")
    fraction = (
        float(changes[changes.index("--validation_fraction") + 1]) if "--validation_fraction" in changes else 0.1
    )
    results, note = trained(pretrain, [*RUN.split(), *changes, "--dataset", str(data), "--output_dir", str(output)])
    measured = [{"length": length, **empty} for length in lengths]
    if results:
        measured = measure(output / "last", data.read_text(encoding="utf-8"), fraction, lengths)
    facts = {
        "validation_loss": round(results["validation_loss"], 4) if results else "",
        "note": note,
        "seconds": round(results["seconds"]) if results else "",
        **environment(),
        "command": shown_command("pretrain_causal_lm.py", [*changes, "--dataset", data.name]),
    }
    return [{"attention": name, "seed": seed, **row, **facts} for row in measured]


def values_at(rows: Sequence[Row], name: str, length: int, column: str = "loss") -> list[float]:
    return [float(row[column]) for row in where(rows, attention=name, length=str(length)) if row[column]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: loss by length, mean over seeds, and what the longest context adds to the loss."""
    lengths = sorted({int(row["length"]) for row in rows})
    lines = []
    for name, (label, _, _) in VARIANTS.items():
        seeds = {row["seed"] for row in rows if row["attention"] == name}
        if not seeds:
            continue
        cells = [mean_and_spread(values_at(rows, name, n)) or "diverged" for n in lengths]
        difference = mean_of(values_at(rows, name, lengths[-1], "minus_trained_length"), sign="+")
        lines.append([label, *cells, difference, len(seeds)])
    heads = ["attention", *(f"{n:,}" for n in lengths), f"{lengths[-1]:,} minus {lengths[0]}", "seeds"]
    return markdown(heads, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Loss of the same characters by the length of the window: a line a variant, a dot a seed."""
    from matplotlib.figure import Figure

    lengths = sorted({int(row["length"]) for row in rows})
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (label, _, color) in VARIANTS.items():
        points = [(n, value) for n in lengths for value in values_at(rows, name, n)]
        if points:
            means = {n: statistics.mean(value for m, value in points if m == n) for n in dict(points)}
            axes.plot(means.keys(), means.values(), "-", color=color, lw=1.6, label=label)
            axes.plot(*zip(*points, strict=True), "o", color=color, ms=4, alpha=0.6)
    axes.axvline(lengths[0], color="gray", ls=":", lw=1.2)
    axes.set(xscale="log", xlabel=f"characters in the window; trained on {lengths[0]}")
    axes.set_xticks(lengths, labels=[f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylabel(f"loss of its last {TAIL} characters (nats)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "a small model, a few steps, without --data"
    parser = study_parser("study_length", __doc__, seeds=[1], only=VARIANTS, quick=quick)
    parser.add_argument("--data", type=Path, help="the text of tiny Shakespeare")
    args = parser.parse_args(argv)
    if not (args.data or args.quick):
        parser.error("give --data tinyshakespeare.txt, or --quick")
    out = out_of(args, "length.csv")
    shared, lengths = (QUICK.split(), QUICK_LENGTHS) if args.quick else (FULL.split(), FULL_LENGTHS)
    data = args.data or quick_text(args.runs)
    done = finished(out, "attention", "seed")
    for seed in args.seeds:
        for name in args.only:
            if (name, str(seed)) not in done:
                append(out, run(name, seed, data, shared, args.runs / f"{name}-{seed}", lengths))
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
