"""Does a polynomial train as well as softmax? GPT-2, LLaMA, BERT and ViT from scratch, one recipe each, paired seeds.

    python recipes/study_parity.py --data tinyshakespeare.txt
    python recipes/study_parity.py --data tinyshakespeare.txt --models llama --only softmax poly --seeds 1337
    python recipes/study_parity.py --quick

Language models have 0.7 to 0.8M parameters and read tiny Shakespeare, character by character, by
`configs/pretrain_causal_lm/shakespeare_char_0.8m.yaml`: 2,000 steps of 768 characters. LLaMA and BERT differ from
it in their shape alone; BERT predicts 15 % of the characters, masked. Rows of GPT-2 are those of
`study_activations.py` (shakespeare_activations.csv), which is the same recipe; rows of ViT those of `study_vision.py`
(vision.csv): both are read beside OUT.csv and not run. Finished runs are kept there; the table and the figure come
from all three. A run takes 2 to 3 minutes on one CPU core. --quick: smaller models on Python's own source, 12 steps,
in seconds.
"""

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pretrain_causal_lm
import pretrain_masked_lm
from study_rows import (
    SHAKESPEARE,
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
from study_tables import dots_and_mean, markdown, mean_and_spread, save_figure, write_up
from tqdm import tqdm

# name -> (what the table says, changes to the recipe)
VARIANTS: dict[str, tuple[str, str]] = {
    "softmax": ("softmax", "--activation softmax"),
    "poly": ("degree 3, defaults", "--activation poly"),
    "length": ("degree 3, un-normalised (length)", "--activation poly --normalization length"),
    "monomial": ("s^3/sqrt(n) as published", "--activation monomial"),
    "monomial-mean0.5": (
        "s^3/sqrt(n), scores start at mean 1/2, learnable gain",
        "--activation monomial --gain 1.4 --learn_gain true",
    ),
    "sigmoid": ("sigmoid(s - log n)", "--activation sigmoid"),
}


@dataclass(frozen=True)
class Family:
    """How a language model is trained: its recipe, its shape, and what puts its scores at 1/2."""

    label: str
    recipe: Callable[[list[str]], dict]
    shape: dict[str, object]
    mean: str

    def words(self, model_type: str, variant: str) -> list[str]:
        mean = self.mean.split() if variant == "monomial-mean0.5" else []
        return [
            "--model_type",
            model_type,
            "--model_config",
            json.dumps(self.shape),
            *VARIANTS[variant][1].split(),
            *mean,
        ]


FAMILIES = {
    "llama": Family(
        "LLaMA",
        pretrain_causal_lm.main,
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 128,
            "intermediate_size": 344,
            "tie_word_embeddings": True,
        },
        # no biases that could do it, and rotary positions would turn them
        "--beta 0.5",
    ),
    "bert": Family(
        "BERT, masked characters",
        pretrain_masked_lm.main,
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "--score_mean 0.5",
    ),
}
QUICK = (
    "--dataset stdlib --stdlib_bytes 100000 --tokenizer bytes --max_steps 12 --warmup_steps 2 --block_size 32 "
    "--model_config.hidden_size 32 --model_config.num_hidden_layers 2 --model_config.intermediate_size 64"
)


def run(model: str, variant: str, seed: int, data: list[str], output: Path) -> dict[str, object]:
    """One training run; its row of the csv."""
    family = FAMILIES[model]
    changes = [*family.words(model, variant), *data, "--seed", str(seed)]
    start = time.process_time()
    # the last evaluation is the one that counts
    arguments = [str(SHAKESPEARE), *changes, "--eval_steps", "0", "--output_dir", str(output), "--overwrite"]
    results, note = trained(family.recipe, arguments)
    # the study keeps numbers, not weights
    shutil.rmtree(output)
    script = "pretrain_masked_lm.py" if model == "bert" else "pretrain_causal_lm.py"
    return {
        "model": model,
        "variant": variant,
        "seed": seed,
        "validation_loss": "" if note else round(results["validation_loss"], 4),
        "note": note,
        "parameters": results.get("parameters", ""),
        "seconds": round(time.process_time() - start),
        **environment(),
        "command": shown_command(script, [SHAKESPEARE.name, *changes]),
    }


@dataclass(frozen=True)
class Results:
    """Of one model and metric: variant -> seed -> number."""

    label: str
    metric: str
    values: dict[str, dict[str, float]]
    scale: float = 1
    digits: int = 4

    def paired(self, variant: str) -> list[float]:
        """Minus softmax, seed by seed."""
        return paired(self.values.get(variant, {}), self.values.get("softmax", {}))

    def shown(self, values: Collection[float], sign: str = "") -> str:
        return mean_and_spread(values, self.digits, self.scale, sign)


def collect(own: Path) -> dict[str, Results]:
    """All results that there are, by model, from the csv of this study and those beside it."""

    def values(rows: list[Row], key: str) -> dict[str, dict[str, float]]:
        found = {name: by_seed(where(rows, variant=name), key) for name in VARIANTS}
        return {name: numbers for name, numbers in found.items() if numbers}

    images = where(rows_of(own.with_name("vision.csv")), data="digits")
    loss = "validation loss, nats per character"
    gpt2 = rows_of(own.with_name("shakespeare_activations.csv"))
    out = {"gpt2": Results("GPT-2", loss, values(gpt2, "validation_loss"))}
    for name, family in FAMILIES.items():
        mine = where(rows_of(own), model=name)
        what = "validation loss, nats per masked character" if name == "bert" else loss
        out[name] = Results(family.label, what, values(mine, "validation_loss"))
    out["vit"] = Results("ViT, digits", "test loss, nats per image", values(images, "test_loss"))
    accuracy = values(images, "test_accuracy")
    out["vit-accuracy"] = Results("ViT, digits", "test accuracy, %", accuracy, scale=100, digits=2)
    return {name: results for name, results in out.items() if results.values}


def table(results: dict[str, Results]) -> str:
    """Markdown: mean ± standard deviation over the seeds, of the numbers and of their differences to softmax."""

    def lines() -> Iterator[list[object]]:
        for found in results.values():
            for name in (name for name in VARIANTS if name in found.values):
                numbers = found.values[name].values()
                difference = "" if name == "softmax" else found.shown(found.paired(name), "+")
                label = VARIANTS[name][0]
                yield [found.label, label, found.metric, found.shown(numbers), difference, len(numbers)]

    text = markdown(["model", "attention", "metric", "value", "minus softmax, same seeds", "seeds"], lines())
    missing = [family.label for name, family in FAMILIES.items() if name not in results]
    missing += [
        f"{found.label}: {VARIANTS[name][0]}"
        for found in results.values()
        for name in VARIANTS
        if name not in found.values
    ]
    return text + (f"\n\nNot measured: {'; '.join(missing)}." if missing else "")


def draw(results: dict[str, Results], path: Path) -> None:
    """A panel a model: losses minus softmax's of the same seed, a dot a seed, a bar at the mean."""
    from matplotlib.figure import Figure

    panels = {name: found for name, found in results.items() if name != "vit-accuracy"}
    names = [name for name in VARIANTS if name != "softmax"][::-1]
    figure = Figure(figsize=(3.2 * len(panels) + 3, 3.2), layout="constrained")
    for axes, found in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.values(), strict=True
    ):
        for height, name in enumerate(names):
            values = found.paired(name)
            dots_and_mean(axes, values, height, "tab:blue")
            if not values:
                axes.annotate("not measured", (0, height), fontsize=8, color="gray", va="center")
        axes.axvline(0, color="tab:gray", ls="--", lw=1)
        axes.set_title(found.label, fontsize=10)
        axes.set_xlabel(f"{found.metric.split(',')[0]} minus softmax's", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(names)), [VARIANTS[name][0] for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle("From scratch, same seed and recipe: left of the dashed line is better than softmax", fontsize=10)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "small models, a few steps, without --data"
    parser = study_parser("study_parity", __doc__, seeds=[1337, 1, 2], only=VARIANTS, quick=quick)
    parser.add_argument("--data", help="the text of tiny Shakespeare")
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args(argv)
    if not (args.data or args.quick):
        parser.error("give --data tinyshakespeare.txt, or --quick")
    out = out_of(args, "parity.csv")
    words = QUICK.split() if args.quick else ["--dataset", args.data]
    have = finished(out, "model", "variant", "seed")
    # seed by seed, so that an interrupted study compares all its variants on the same seeds
    wanted = [(model, name, seed) for seed in args.seeds for model in args.models for name in args.only]
    for model, name, seed in tqdm([x for x in wanted if (x[0], x[1], str(x[2])) not in have], desc="runs"):
        append(out, [run(model, name, seed, words, args.runs / f"{model}-{name}-{seed}")])
    write_up(out, collect(out), table, draw)


if __name__ == "__main__":
    main()
