"""A small ViT on 8x8 digits, from scratch: every activation under one recipe, several seeds (arXiv 2410.18613, ViT).

    python recipes/study_vision.py
    python recipes/study_vision.py --data fashion-mnist            a folder with the four idx files
    python recipes/study_vision.py --quick

The digits are those of scikit-learn (1,797 images): a seed draws the split into training, validation and test images,
the initial weights and the order, so the activations of one seed differ in nothing else. Test images are looked at
once, after the last step; nothing is chosen by them. Finished runs are kept in the csv and not run again; the table
and the figure are drawn from it. A run takes 20 seconds of one CPU core (`seconds` counts processor time). --quick:
a smaller model, 4 epochs, in seconds. Fashion-MNIST is for those who have it: 28x28 images in patches of 4, 3 epochs.
"""

import gzip
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
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
    where,
)
from study_tables import dots_and_mean, markdown, mean_and_spread, mean_of, save_figure, write_up
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_polyattn import start_scores
from hf_polyattn.evaluating import evaluating
from hf_polyattn.training.models import replace_attention
from hf_polyattn.training.optimization import adamw, set_learning_rate
from hf_polyattn_arguments import AttentionArguments, ModelArguments, OptimizationArguments
from hf_polyattn_parsing import parse_arguments

# name -> (what the table says, changes to the recipe)
VARIANTS: dict[str, tuple[str, str]] = {
    "softmax": ("softmax", "--activation softmax"),
    "poly": ("degree 3, defaults", "--activation poly"),
    "length": ("degree 3, un-normalised (length)", "--activation poly --normalization length"),
    "length-unit": ("degree 3, length, alpha = 1/spread", "--activation poly --normalization length --alpha 39.0625"),
    "monomial": ("s^3/sqrt(n) as published", "--activation monomial"),
    "monomial-mean0.5": (
        "s^3/sqrt(n), scores start at mean 1/2, learnable gain",
        "--activation monomial --score_mean 0.5 --gain 1.4 --learn_gain true",
    ),
    "unscaled": ("s^3, not scaled", "--activation monomial --normalization none"),
    "relu": ("relu / n", "--activation relu"),
    "sigmoid": ("sigmoid(s - log n)", "--activation sigmoid"),
}


@dataclass(frozen=True)
class Images:
    """pixels [n, 1, height, width], of mean 0 and deviation 1 over the training images; labels [n]."""

    pixels: torch.Tensor
    labels: torch.Tensor


Splits = dict[str, Images]
"""train, validation and test."""


@dataclass(frozen=True)
class Setup:
    """Data, model and training that all activations share."""

    data: str
    image: tuple[int, int]
    patch: tuple[int, int]
    width: int = 64
    layers: int = 4
    heads: int = 4
    epochs: int = 25
    batch_size: int = 64
    learning_rate: float = 2e-3

    @property
    def patches(self) -> int:
        """N; the class token is one key more."""
        return self.image[0] // self.patch[0] * (self.image[1] // self.patch[1])

    def model_words(self) -> list[str]:
        sizes = {
            "image_size": list(self.image),
            "patch_size": list(self.patch),
            "num_channels": 1,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_labels": 10,
        }
        return ["--model_type", "vit", "--model_config", json.dumps(sizes)]


DIGITS = Setup("digits", (8, 8), (2, 2))
FASHION = Setup("fashion-mnist", (28, 28), (4, 4), epochs=3, batch_size=128)
QUICK = Setup("digits", (8, 8), (2, 2), width=16, layers=2, heads=2, epochs=4)


def of_scikit_learn(module: str) -> Any:
    """A module of scikit-learn or of SciPy, which comes with it: only studies need them, so the package does not ask.

    Raises:
        ImportError: with the remedy.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this study needs {module}: pip install scikit-learn") from error


def digits(seed: int, image: tuple[int, int] = (8, 8)) -> Splits:
    """scikit-learn's digits, 60/15/25 per cent of each class, resized where `image` asks for another size."""
    train_test_split = of_scikit_learn("sklearn.model_selection").train_test_split
    pixels, labels = of_scikit_learn("sklearn.datasets").load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.2, stratify=labels[rest], random_state=seed)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    if image != (8, 8):
        x = nn.functional.interpolate(x, image, mode="bilinear")
    y = torch.tensor(labels)
    parts = {"train": train, "validation": validation, "test": test}
    return normalised({name: Images(x[rows], y[rows]) for name, rows in parts.items()})


def read_idx(path: Path) -> torch.Tensor:
    """An idx file of unsigned bytes, as MNIST's and Fashion-MNIST's are, plain or gzipped."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # two zeros, 8 for unsigned bytes, the number of dimensions; then each dimension in four bytes
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    dimensions = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions))


def idx_folder(folder: Path, seed: int) -> Splits:
    """The folder's own test images; a twelfth of the training images, drawn by the seed, to validate on."""

    def load(name: str) -> torch.Tensor:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        if not found:
            raise FileNotFoundError(f"{folder} has no {name} or {name}.gz: give the folder of the four idx files")
        return read_idx(found[0])

    images, labels = load("train-images-idx3-ubyte").float()[:, None], load("train-labels-idx1-ubyte").long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    validation, train = order[: len(order) // 12], order[len(order) // 12 :]
    test = Images(load("t10k-images-idx3-ubyte").float()[:, None], load("t10k-labels-idx1-ubyte").long())
    parts = {
        "train": Images(images[train], labels[train]),
        "validation": Images(images[validation], labels[validation]),
    }
    return normalised({**parts, "test": test})


def normalised(splits: Splits) -> Splits:
    mean, deviation = splits["train"].pixels.mean(), splits["train"].pixels.std()
    return {name: Images((part.pixels - mean) / deviation, part.labels) for name, part in splits.items()}


def build(setup: Setup, attention: str, seed: int, images: Images) -> PreTrainedModel:
    """A ViT whose initial weights are a function of the seed alone, with its attention; images to calibrate it on."""
    words = [*setup.model_words(), *attention.split()]
    model_args, attention_args = parse_arguments(words, (ModelArguments, AttentionArguments))
    set_seed(seed)
    config = AutoConfig.for_model("vit", **model_args.config_overrides())
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    if model_args.score_spread is not None or model_args.score_mean is not None:
        start_scores(model, spread=model_args.score_spread, mean=model_args.score_mean)
    count = attention_args.calibration_batches(model_args)
    batches = [{"pixel_values": part} for part in images.pixels.split(setup.batch_size)[:count]]
    return replace_attention(model, attention_args, batches)


@torch.no_grad()
def score(model: PreTrainedModel, images: Images) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    with evaluating(model):
        logits = torch.cat([model(pixel_values=part).logits for part in images.pixels.split(128)])
    loss = nn.functional.cross_entropy(logits, images.labels).item()
    return (logits.argmax(-1) == images.labels).double().mean().item(), loss


Watch = Callable[[int, int, PreTrainedModel, dict[str, torch.Tensor]], None]
"""(step, steps, model, batch), before the update of each step."""


def train(setup: Setup, attention: str, splits: Splits, seed: int, watch: Watch | None = None) -> dict[str, Any]:
    """One run, to its last step or to the first loss that is not finite; its numbers by name."""
    model = build(setup, attention, seed, splits["train"])
    count = len(splits["train"].labels)
    per_epoch = math.ceil(count / setup.batch_size)
    total = setup.epochs * per_epoch
    args = OptimizationArguments(
        batch_size=setup.batch_size, learning_rate=setup.learning_rate, warmup_steps=total // 10, seed=seed
    )
    optimizer = adamw(model, args)
    generator = torch.Generator().manual_seed(seed)
    start, recent, note = time.process_time(), [], ""
    model.train()
    for step in tqdm(range(1, total + 1), desc="steps", mininterval=5, leave=False):
        if step % per_epoch == 1 or per_epoch == 1:
            order = iter(torch.randperm(count, generator=generator).split(setup.batch_size))
            recent = []
        rows = next(order)
        batch = {"pixel_values": splits["train"].pixels[rows], "labels": splits["train"].labels[rows]}
        if watch is not None:
            watch(step, total, model, batch)
        set_learning_rate(optimizer, args, step, total)
        loss = model(**batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            # that a form diverges is a result too
            note = f"step {step}: loss {loss.item():.3g}, gradient norm {norm.item():.3g}"
            break
        recent.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    numbers: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "steps": step}
    numbers["train_loss"] = "" if note else round(statistics.mean(recent), 5)
    for name in ("validation", "test"):
        accuracy, loss_value = ("", "") if note else (round(x, 5) for x in score(model, splits[name]))
        numbers |= {f"{name}_accuracy": accuracy, f"{name}_loss": loss_value}
    return numbers | {"note": note, "seconds": round(seconds, 1)}


def facts(script: str, words: str) -> Row:
    """What a row says about how it came about; `train` computes on the processor."""
    return {**environment(torch.device("cpu")), "command": shown_command(script, words.split())}


def table(rows: list[Row]) -> str:
    """Markdown, a block for each data set: mean, spread and in brackets the paired difference to softmax."""

    def cell(own: list[Row], name: str, key: str, scale: float, digits: int) -> str:
        values = by_seed(where(own, variant=name), key)
        twin = by_seed(where(own, variant="softmax"), key) if name != "softmax" else {}
        difference = mean_of(paired(values, twin), digits, scale, "+")
        return (mean_and_spread(values.values(), digits, scale) or "diverged") + f" ({difference})" * bool(difference)

    def lines() -> Iterator[list[object]]:
        for data in dict.fromkeys(row["data"] for row in rows):
            own = where(rows, data=data)
            for name, (label, _) in VARIANTS.items():
                if count := len(where(own, variant=name)):
                    metrics = ("test_accuracy", 100, 2), ("test_loss", 1, 3), ("train_loss", 1, 3)
                    yield [data, label, *(cell(own, name, *metric) for metric in metrics), count]

    text = markdown(["data", "attention", "test accuracy, %", "test loss", "training loss", "seeds"], lines())
    if not where(rows, data=FASHION.data):
        text += "\n\nFashion-MNIST: not measured; `--data FOLDER` runs it."
    return text


def draw(rows: list[Row], path: Path) -> None:
    """Test accuracy and test loss: a dot a seed, a bar at the mean, softmax's mean as a line."""
    from matplotlib.figure import Figure

    rows = where(rows, data=rows[0]["data"])
    names = [name for name in VARIANTS if where(rows, variant=name)][::-1]
    figure = Figure(figsize=(10, 0.4 * len(names) + 1.5), layout="constrained")
    panels = {"test_accuracy": ("test accuracy, %", 100), "test_loss": ("test loss, nats", 1)}
    for axes, (key, (label, scale)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for height, name in enumerate(names):
            values = [scale * x for x in by_seed(where(rows, variant=name), key).values()]
            dots_and_mean(axes, values, height, "tab:gray" if name == "softmax" else "tab:blue")
        if softmax := by_seed(where(rows, variant="softmax"), key):
            axes.axvline(scale * statistics.mean(softmax.values()), color="tab:gray", linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_yticks(range(len(names)), [VARIANTS[name][0] for name in names])
    title = f"ViT on {rows[0]['data']}, {rows[0]['N']} patches, {rows[0]['steps']} steps"
    figure.suptitle(f"{title}; dots: seeds, bar: mean, dashed: mean of softmax", fontsize=10)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    quick = "digits, a smaller model, 4 epochs"
    parser = study_parser("study_vision", __doc__, seeds=[1, 2, 3], only=VARIANTS, quick=quick)
    parser.add_argument("--data", type=Path, help="folder of the idx files of Fashion-MNIST; without it, the digits")
    args = parser.parse_args(argv)
    if args.quick and args.data:
        parser.error("--quick is for the digits: leave out --data")
    out = out_of(args, "vision.csv")
    setup = QUICK if args.quick else FASHION if args.data else DIGITS
    have = finished(out, "data", "variant", "seed")
    # seed by seed, so that an interrupted study compares all its variants on the same seeds
    todo = [(seed, name) for seed in args.seeds for name in args.only if (setup.data, name, str(seed)) not in have]
    for seed, name in tqdm(todo, desc="runs"):
        splits = idx_folder(args.data, seed) if args.data else digits(seed, setup.image)
        row = {"data": setup.data, "variant": name, "seed": seed, "N": setup.patches}
        words = f"--only {name} --seeds {seed}{' --data FOLDER' if args.data else ''}{' --quick' * args.quick}"
        row |= train(setup, VARIANTS[name][1], splits, seed)
        append(out, [row | {"changes": VARIANTS[name][1]} | facts("study_vision.py", words)])
    write_up(out, rows_of(out), table, draw)


if __name__ == "__main__":
    main()
