"""Figures of runs; matplotlib is imported when one is drawn."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path


def draw_losses(runs: Mapping[str, Path], path: Path) -> Path:
    """Training and validation loss over the steps, from the metrics.jsonl of each run by its label; writes a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (label, file) in zip(("#2a6fbb", "#c44e52", "#55a868", "#8172b2"), runs.items(), strict=False):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for key, name, style in (("loss", "training", "-"), ("validation_loss", "validation", "o")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, lw=1.2, label=f"{label}, {name}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    # no software version or date inside: equal runs give equal files
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def copy_beside(figure: Path, folder: Path) -> str:
    """Copies an image into `folder`, where it is not there already; returns its name there."""
    target = folder / figure.name
    if not target.exists() or not target.samefile(figure):
        shutil.copyfile(figure, target)
    return target.name
