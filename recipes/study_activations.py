"""Tiny Shakespeare, character level, 0.8M parameters: every activation under one recipe, several seeds.

    python recipes/study_activations.py --data tinyshakespeare.txt --seeds 1337 1 2 3 4 --only softmax poly
    python recipes/study_activations.py --data tinyshakespeare.txt --seeds 1337 1 2

Each run is `pretrain_causal_lm.py` with `configs/pretrain_causal_lm/shakespeare_char_0.8m.yaml` and nothing changed
but what its row says, so the softmax twins get the same tokens, steps and learning rates. Finished runs are kept in
the csv and not run again; the table and the figure are drawn from the csv. One run takes 3 to 4 minutes on
one CPU core.

Rows with alpha = 1/spread, here and in the other studies, ran when that was the default. It took the spread from the
first weights, which are within 2 % of what 19.53125 stands for, one over the spread at width 128; 39.0625 is that of
width 64.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study_rows import (
    HERE,
    SHAKESPEARE,
    Row,
    append,
    by_seed,
    environment_of,
    finished,
    out_of,
    paired,
    rows_of,
    shown_command,
    study_parser,
    where,
)
from study_tables import dots_and_mean, markdown, mean_and_spread, mean_of, save_figure, write_up
from tqdm import tqdm

# name -> (what the table says, changes to the recipe, the softmax variant with the same extras)
VARIANTS: dict[str, tuple[str, str, str]] = {
    "softmax": ("softmax", "--activation softmax", ""),
    "poly": ("degree 3, defaults", "--activation poly", "softmax"),
    "length": ("degree 3, un-normalised (length)", "--activation poly --normalization length", "softmax"),
    "length-unit": (
        "degree 3, length, alpha = 1/spread",
        "--activation poly --normalization length --alpha 19.53125",
        "softmax",
    ),
    "softmax-qk": ("softmax, QK-norm", "--activation softmax --qk_norm true", ""),
    "poly-qk": ("degree 3, QK-norm", "--activation poly --normalization length --qk_norm true", "softmax-qk"),
    "poly-qk-l1": (
        "degree 3, QK-norm, l1",
        "--activation poly --qk_norm true --normalization l1",
        "softmax-qk",
    ),
    "poly-qk-sharp": (
        "degree 3, QK-norm, scores times 2",
        "--activation poly --normalization length --qk_norm true --alpha 2",
        "softmax-qk",
    ),
    "poly-qk-l1-sharp": (
        "degree 3, QK-norm, l1, scores times 2",
        "--activation poly --qk_norm true --normalization l1 --alpha 2",
        "softmax-qk",
    ),
    "cubic-qk-l1": (
        "degree 3, starts as (1 + s/3)^3, QK-norm, l1",
        "--activation poly --init_coefficients 1 1 0.3333 0.037 --qk_norm true --normalization l1",
        "softmax-qk",
    ),
    "poly-qk-l1-affine": (
        "degree 3, QK-norm, l1, learnable alpha and beta",
        "--activation poly --qk_norm true --normalization l1 --learn_affine true",
        "softmax-qk",
    ),
    # what else was tried under QK-norm, on one seed
    "poly-qk-l2": (
        "degree 3, QK-norm, l2",
        "--activation poly --qk_norm true --normalization l2",
        "softmax-qk",
    ),
    "poly-qk-l2-affine": (
        "degree 3, QK-norm, l2, learnable alpha and beta",
        "--activation poly --qk_norm true --normalization l2 --learn_affine true",
        "softmax-qk",
    ),
    "poly-qk-rate10": (
        "degree 3, QK-norm, coefficients learn 10 times as fast",
        "--activation poly --normalization length --qk_norm true --polyattn_learning_rate_multiplier 10",
        "softmax-qk",
    ),
    "poly-qk-fixed": (
        "degree 3, QK-norm, coefficients fixed near exp",
        "--activation poly --qk_norm true --coefficients 0.5 0.5 0.5 0.1667",
        "softmax-qk",
    ),
    "poly-qk-l1-rate10": (
        "degree 3, QK-norm, l1, coefficients learn 10 times as fast",
        "--activation poly --qk_norm true --normalization l1 --polyattn_learning_rate_multiplier 10",
        "softmax-qk",
    ),
    "poly-qk-l1-rate0.2": (
        "degree 3, QK-norm, l1, coefficients learn a fifth as fast",
        "--activation poly --qk_norm true --normalization l1 --polyattn_learning_rate_multiplier 0.2",
        "softmax-qk",
    ),
    "poly-qk-l1-half": (
        "degree 3, QK-norm, l1, scores times 1/2",
        "--activation poly --qk_norm true --normalization l1 --alpha 0.5",
        "softmax-qk",
    ),
    "poly-qk-l1-affine-rate10": (
        "degree 3, QK-norm, l1, learnable alpha and beta, all 10 times as fast",
        "--activation poly --qk_norm true --normalization l1 --learn_affine true "
        "--polyattn_learning_rate_multiplier 10",
        "softmax-qk",
    ),
    "cubic-qk-l1-fixed": (
        "(1 + s/3)^3, QK-norm, l1",
        "--activation poly --qk_norm true --coefficients 1 1 0.3333 0.037 --normalization l1",
        "softmax-qk",
    ),
    "cubic-qk-l1-affine-rate10": (
        "(1 + s/3)^3, QK-norm, l1, learnable alpha and beta, 10 times as fast",
        "--activation poly --qk_norm true --coefficients 1 1 0.3333 0.037 --normalization l1 --learn_affine true "
        "--polyattn_learning_rate_multiplier 10",
        "softmax-qk",
    ),
    # scores under QK-norm stay within sqrt(d) = 5.66: cubics without a negative value there need no l1's kink
    **{
        f"bounded-qk-{root}": (
            f"(1 + s/sqrt(d)) (1 + s/{root})^2, QK-norm, l1",
            f"--activation poly --coefficients {coefficients} --qk_norm true --normalization l1",
            "softmax-qk",
        )
        for root, coefficients in {
            "1.5": "1 1.5101 0.68014 0.078567",
            "2": "1 1.1768 0.42676 0.044194",
            "2.5": "1 0.97674 0.30142 0.028284",
            "3.5": "1 0.74821 0.18265 0.014431",
            "5": "1 0.57678 0.11071 0.0070711",
        }.items()
    },
    "poly-qk-l1-fixed": (
        "degree 3, QK-norm, l1, coefficients fixed near exp",
        "--activation poly --qk_norm true --coefficients 0.5 0.5 0.5 0.1667 --normalization l1",
        "softmax-qk",
    ),
    "poly-qk-affine": (
        "degree 3, QK-norm, learnable alpha and beta",
        "--activation poly --normalization length --qk_norm true --learn_affine true",
        "softmax-qk",
    ),
    "quartic-qk-sum": (
        "(1 + s/4)^4, QK-norm, sum",
        "--activation poly --degree 4 --coefficients 1 1 0.375 0.0625 0.00390625 --qk_norm true --normalization sum",
        "softmax-qk",
    ),
    "sextic-qk-sum": (
        "(1 + s/6)^6, QK-norm, sum",
        "--activation poly --degree 6 --coefficients 1 1 0.41667 0.092593 0.011574 0.0007716 2.1433e-05 "
        "--qk_norm true --normalization sum",
        "softmax-qk",
    ),
    "softmax-spread": ("softmax, scores start at spread 1", "--activation softmax --score_spread 1", ""),
    "poly-spread": (
        "degree 3, scores start at spread 1",
        "--activation poly --normalization length --score_spread 1 --alpha 1",
        "softmax-spread",
    ),
    "poly-spread-l1": (
        "degree 3, l1, scores start at spread 1",
        "--activation poly --score_spread 1 --alpha 1",
        "softmax-spread",
    ),
    "affine": ("degree 3, defaults, learnable alpha and beta", "--activation poly --learn_affine true", "softmax"),
    **{
        f"degree-{p}-defaults": (f"degree {p}, defaults", f"--activation poly --degree {p}", "softmax")
        for p in (1, 2, 4)
    },
    "degree-1": ("degree 1, length, alpha = 1/spread", "--activation poly --degree 1 --alpha 19.53125", "softmax"),
    "degree-2": ("degree 2, length, alpha = 1/spread", "--activation poly --degree 2 --alpha 19.53125", "softmax"),
    "degree-4": (
        "degree 4, length, alpha = 1/spread",
        "--activation poly --degree 4 --normalization length --alpha 19.53125",
        "softmax",
    ),
    "sqrt-length": (
        "degree 3, sqrt_length, alpha = 1/spread",
        "--activation poly --normalization sqrt_length",
        "softmax",
    ),
    "l1": ("degree 3, l1, alpha = 1/spread", "--activation poly --normalization l1 --alpha 19.53125", "softmax"),
    "l2": ("degree 3, l2, alpha = 1/spread", "--activation poly --normalization l2 --alpha 19.53125", "softmax"),
    "fixed": (
        "degree 3, coefficients fixed at the start",
        "--activation poly --coefficients 0.5 0.5 0.5 0.1667 --alpha 19.53125",
        "softmax",
    ),
    "taylor": (
        "degree 3, starts as Taylor's exp",
        "--activation poly --init_coefficients 1 1 0.5 0.1667 --normalization length --alpha 19.53125",
        "softmax",
    ),
    "calibrated": ("degree 3, calibrated to softmax's output", "--activation poly --calibrate_batches 4", "softmax"),
    "monomial": ("s^3/sqrt(n) as published", "--activation monomial", "softmax"),
    "monomial-calibrated": (
        "s^3/sqrt(n), calibrated to ‖A‖_F = sqrt(N)",
        "--activation monomial --calibrate_batches 4 --calibration_target frobenius",
        "softmax",
    ),
    "monomial-gain": (
        "s^3/sqrt(n), the same, learnable gain",
        "--activation monomial --calibrate_batches 4 --calibration_target frobenius --learn_gain true",
        "softmax",
    ),
    "monomial-spread": (
        "s^3/sqrt(n), scores start at spread 1, learnable gain",
        "--activation monomial --score_spread 1 --gain 0.258 --learn_gain true",
        "softmax",
    ),
    "monomial-mean": (
        "s^3/sqrt(n), scores start at mean 1, learnable gain",
        "--activation monomial --score_mean 1 --gain 0.2 --learn_gain true",
        "softmax",
    ),
    "monomial-mean0.5": (
        "s^3/sqrt(n), scores start at mean 1/2, learnable gain",
        "--activation monomial --score_mean 0.5 --gain 1.4 --learn_gain true",
        "softmax",
    ),
    "monomial-mean2": (
        "s^3/sqrt(n), scores start at mean 2, learnable gain",
        "--activation monomial --score_mean 2 --gain 0.025 --learn_gain true",
        "softmax",
    ),
    "relu": ("relu / n", "--activation relu", "softmax"),
    "sigmoid": ("sigmoid(s - log n)", "--activation sigmoid", "softmax"),
}


def run(name: str, seed: int, data: str, output: Path) -> dict[str, object]:
    """One training run in a process of its own; its row of the csv."""
    changes = VARIANTS[name][1].split()
    # the last evaluation is the one that counts, and each takes as long as a hundred steps
    arguments = [str(SHAKESPEARE), "--dataset", data, "--seed", str(seed), "--eval_steps", "0", *changes]
    arguments += ["--output_dir", str(output), "--overwrite"]
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, str(HERE / "pretrain_causal_lm.py"), *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        sys.exit(f"{name}, seed {seed} failed: see {log}")
    results = json.loads((output / "results.json").read_text())
    return {
        "variant": name,
        "seed": seed,
        "validation_loss": round(results["validation_loss"], 4),
        "seconds": round(results["seconds"]),
        **environment_of(results),
        "command": shown_command("pretrain_causal_lm.py", [SHAKESPEARE.name, *changes, "--seed", str(seed)]),
    }


def losses(rows: list[Row]) -> dict[str, dict[str, float]]:
    """variant -> seed -> validation loss, in the order of VARIANTS."""
    found = {name: by_seed(where(rows, variant=name), "validation_loss") for name in VARIANTS}
    return {name: values for name, values in found.items() if values}


def table(rows: list[Row]) -> str:
    """Markdown: mean, spread and the difference to the softmax twin on the same seeds."""
    found = losses(rows)

    def lines() -> Iterator[list[object]]:
        for name, values in found.items():
            label, _, twin = VARIANTS[name]
            difference = mean_of(paired(values, found.get(twin, {})), sign="+")
            yield [label, mean_and_spread(values.values()), difference, len(values)]

    loss = "validation loss, mean ± standard deviation"
    return markdown(["attention", loss, "minus its softmax twin, same seeds", "seeds"], lines())


def draw(rows: list[Row], path: Path) -> None:
    """One row of dots a variant, a bar at its mean, softmax's mean as a line."""
    from matplotlib.figure import Figure

    found = dict(reversed(losses(rows).items()))
    figure = Figure(figsize=(9.5, 0.3 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for height, (name, values) in enumerate(found.items()):
        dots_and_mean(axes, list(values.values()), height, "tab:gray" if name.startswith("softmax") else "tab:blue")
    if softmax := found.get("softmax"):
        mean = statistics.mean(softmax.values())
        axes.axvline(mean, color="tab:gray", linestyle="--", linewidth=1, label="mean of softmax")
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(found)), [VARIANTS[name][0] for name in found])
    axes.set_xlabel("validation loss (nats per character); dots: seeds, bar: mean", fontsize=9)
    figure.suptitle("Tiny Shakespeare, GPT-2 of 0.8M parameters, 2000 steps", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("study_activations", __doc__, seeds=[1337, 1, 2], only=VARIANTS)
    parser.add_argument("--data", required=True, help="the text of tiny Shakespeare")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    out = out_of(args, "shakespeare_activations.csv")
    have = finished(out, "variant", "seed")
    # seed by seed, so that an interrupted study compares all its variants on the same seeds
    todo = [(name, seed) for seed in args.seeds for name in args.only if (name, str(seed)) not in have]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, name, seed, args.data, args.runs / f"{name}-{seed}") for name, seed in todo]
        for future in tqdm(runs, desc="runs"):
            append(out, [future.result()])
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
