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

import argparse
import csv
import gzip
import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

import hf_polyattn
from hf_polyattn import start_scores
from hf_polyattn.evaluating import evaluating
from hf_polyattn.training.models import replace_attention
from hf_polyattn.training.optimization import adamw, set_learning_rate
from hf_polyattn_arguments import AttentionArguments, ModelArguments, OptimizationArguments
from hf_polyattn_parsing import parse_arguments

HERE = Path(__file__).parent

# name -> (what the table says, changes to the recipe)
VARIANTS: dict[str, tuple[str, str]] = {
    "softmax": ("softmax", "--activation softmax"),
    "poly": ("degree 3, defaults", "--activation poly"),
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


def facts(command: str) -> dict[str, Any]:
    """What a row says about how it came about."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "command": command,
    }


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def by_seed(rows: list[dict[str, str]], variant: str, key: str) -> dict[str, float]:
    """seed -> number, of the runs that came to their end."""
    return {row["seed"]: float(row[key]) for row in rows if row["variant"] == variant and row[key]}


def cell(values: dict[str, float], twin: dict[str, float] | None, scale: float, digits: int) -> str:
    """Mean ± standard deviation, and in brackets the mean difference to the twin on the same seeds."""
    if not values:
        return "diverged"
    spread = f" ± {scale * statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    paired = [value - twin[seed] for seed, value in values.items() if seed in twin] if twin else []
    # + 0.0: no minus before a zero
    difference = f" ({round(scale * statistics.mean(paired), digits) + 0.0:+.{digits}f})" if paired else ""
    return f"{scale * statistics.mean(values.values()):.{digits}f}{spread}{difference}"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, a block for each data set: mean, spread and in brackets the paired difference to softmax."""
    lines = [
        "| data | attention | test accuracy, % | test loss | training loss | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        for name, (label, _) in VARIANTS.items():
            own = [row for row in rows if row["data"] == data]
            count = sum(row["variant"] == name for row in own)
            if not count:
                continue
            cells = []
            for key, scale, places in (("test_accuracy", 100, 2), ("test_loss", 1, 3), ("train_loss", 1, 3)):
                twin = by_seed(own, "softmax", key) if name != "softmax" else None
                cells.append(cell(by_seed(own, name, key), twin, scale, places))
            lines.append(f"| {data} | {label} | {' | '.join(cells)} | {count} |")
    if not any(row["data"] == FASHION.data for row in rows):
        lines += ["", "Fashion-MNIST: not measured; `--data FOLDER` runs it."]
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Test accuracy and test loss: a dot a seed, a bar at the mean, softmax's mean as a line."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["data"] == rows[0]["data"]]
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)][::-1]
    figure = Figure(figsize=(10, 0.4 * len(names) + 1.5), layout="constrained")
    panels = {"test_accuracy": ("test accuracy, %", 100), "test_loss": ("test loss, nats", 1)}
    for axes, (key, (label, scale)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for height, name in enumerate(names):
            values = [scale * x for x in by_seed(rows, name, key).values()]
            color = "tab:gray" if name == "softmax" else "tab:blue"
            if values:
                axes.plot(values, [height] * len(values), "o", color=color, alpha=0.6, markersize=5)
                axes.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2)
        softmax = list(by_seed(rows, "softmax", key).values())
        if softmax:
            axes.axvline(scale * statistics.mean(softmax), color="tab:gray", linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_yticks(range(len(names)), [VARIANTS[name][0] for name in names])
    title = f"ViT on {rows[0]['data']}, {rows[0]['N']} patches, {rows[0]['steps']} steps"
    figure.suptitle(f"{title}; dots: seeds, bar: mean, dashed: mean of softmax", fontsize=10)
    # no software version or date inside: equal runs give equal files
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the idx files of Fashion-MNIST; without it, the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="digits, a smaller model, 4 epochs")
    parser.add_argument("--out", type=Path, help="csv; default: recipes/results, with --quick runs/study_vision")
    args = parser.parse_args(argv)
    if args.quick and args.data:
        parser.error("--quick is for the digits: leave out --data")
    out = args.out or (Path("runs/study_vision/quick.csv") if args.quick else HERE / "results" / "vision.csv")
    setup = QUICK if args.quick else FASHION if args.data else DIGITS
    have = {(row["data"], row["variant"], row["seed"]) for row in read(out)}
    # seed by seed, so that an interrupted study compares all its variants on the same seeds
    todo = [(seed, name) for seed in args.seeds for name in args.only if (setup.data, name, str(seed)) not in have]
    for seed, name in tqdm(todo, desc="runs"):
        splits = idx_folder(args.data, seed) if args.data else digits(seed, setup.image)
        row = {"data": setup.data, "variant": name, "seed": seed, "N": setup.patches}
        words = f"--only {name} --seeds {seed}{' --data FOLDER' if args.data else ''}{' --quick' * args.quick}"
        row |= train(setup, VARIANTS[name][1], splits, seed)
        append(out, row | {"changes": VARIANTS[name][1]} | facts(f"python recipes/study_vision.py {words}"))
    rows = read(out)
    text = table(rows)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(rows, out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
