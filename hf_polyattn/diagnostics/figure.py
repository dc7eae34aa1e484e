"""Statistics as figures: over training steps, and head by head; matplotlib is imported when one is drawn."""

from collections.abc import Mapping
from pathlib import Path

from .report import AttentionReport

PANELS = {
    "frobenius": "‖A‖_F / √N",
    "jacobian": "‖∂a/∂s‖_F / √N",
    "effective_keys": "effective keys",
    "score_spread": "score spread (RMS)",
    "dead_share": "dead share of scores",
    "output_rms": "output RMS",
}
LOGARITHMIC = ("frobenius", "jacobian", "score_spread", "output_rms")


def draw_statistics(reports: Mapping[int, AttentionReport], path: Path | str) -> Path:
    """One panel a statistic, one line a layer (mean over its heads), over the optimizer steps; writes a PNG.

    reports: by step, as `read_reports` gives them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not reports:
        raise ValueError("there is nothing to draw: no step was measured")
    steps = sorted(reports)
    layers = list(reports[steps[0]].modules)
    # dark to light with depth, but for the pale end of the map
    colors = [colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)) for i in range(len(layers))]
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True):
        for color, layer in zip(colors, layers, strict=True):
            values = [reports[step].modules[layer][name].mean().item() for step in steps]
            axes.plot(steps, values, "o-" if len(steps) == 1 else "-", color=color, lw=1.4)
        drawn = [y for line in axes.lines for y in line.get_ydata()]
        # within a decade a logarithmic axis has one labelled tick
        if name in LOGARITHMIC and 0 < 10 * min(drawn) < max(drawn):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[3:]:
        axes.set_xlabel("optimizer step")
    shown = sorted({0, len(layers) // 2, len(layers) - 1}) if len(layers) > 6 else range(len(layers))
    handles = [figure.axes[0].lines[i] for i in shown]
    figure.legend(handles, [f"layer {i}" for i in shown], loc="outside right center", frameon=False)
    path = Path(path)
    # no software version or date inside: equal runs give equal files
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def draw_heads(
    report: AttentionReport, path: Path | str, gains: Mapping[str, Mapping[int, float]] | None = None
) -> Path:
    """One panel a statistic, a cell for each head of each layer; writes a PNG.

    gains: attention module -> head -> its gain, for a panel of its own in the place of the output's size. Heads
        without one, which are softmax, stay blank.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = list(report.modules)
    heads = max(len(statistics["frobenius"]) for statistics in report.modules.values())
    panels = {**PANELS, **({"gain": "gain"} if gains else {})}
    if gains:
        del panels["output_rms"]
    figure = Figure(figsize=(10, 1.6 + 2 * min(4.0, 1.2 + 0.22 * len(layers))), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        cells = np.full((len(layers), heads), np.nan)
        for row, layer in enumerate(layers):
            if name == "gain":
                for head, value in (gains or {}).get(layer, {}).items():
                    cells[row, head] = value
            else:
                column = report.modules[layer][name]
                cells[row, : len(column)] = column.numpy()
        image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, fraction=0.05)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("head", fontsize=9)
        axes.set_ylabel("layer", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    path = Path(path)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
