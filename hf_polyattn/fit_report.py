"""What a fit of coefficients found: tables, figures, and which heads to convert."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .activations import horner
from .tables import format_span, format_table

WIDEST = 16
"""Heads of a layer that a table shows one by one."""


@dataclass(frozen=True)
class HeadFit:
    """The fit of one attention module; tensors are [heads] unless they say otherwise."""

    layer: int
    """Index of the module among the model's attention modules."""
    heads: tuple[int, ...]
    """Indices of the patched heads."""
    coefficients: torch.Tensor
    """[heads, p + 1], of x = alpha s + beta."""
    alpha: torch.Tensor
    beta: torch.Tensor
    gain: torch.Tensor
    r2: torch.Tensor
    """1 - |softmax's output - the polynomial's|^2 / |softmax's output|^2."""
    projected_r2: float | None
    """The same for the sum of these heads behind the output projection; None where nobody has said where that is."""
    spread: torch.Tensor
    """Root mean square of the scores."""
    low: torch.Tensor
    """Smallest score seen."""
    high: torch.Tensor
    """Largest score seen: the calibrated range ends here."""
    seen: torch.Tensor
    """[heads, bins], how many scores fell into each of equal parts of the range."""
    weights: torch.Tensor
    """[heads, bins], the mean of softmax's weight times Z there: what the polynomial stands in for."""


@dataclass(frozen=True)
class CoefficientReport:
    """Fits by name of the attention module. Print it for a table."""

    modules: dict[str, HeadFit]
    batches: int
    degree: int
    normalization: str | float

    def __str__(self) -> str:
        what = (
            f"fitted degree {self.degree} / {self.normalization} to softmax in {len(self.modules)} attention modules "
            f"on {self.batches} batches: R2 by head, and of the layer behind its output projection"
        )
        widest = max(len(fit.heads) for fit in self.modules.values())
        names = [f"h{i}" for i in range(widest)] if widest <= WIDEST else ["R2"]
        partial = any(fit.heads != tuple(range(len(fit.heads))) for fit in self.modules.values())
        rows = []
        for name, fit in self.modules.items():
            cells = [f"{r2:.3f}" for r2 in fit.r2.tolist()] if widest <= WIDEST else [format_span(fit.r2)]
            if partial and widest <= WIDEST:
                cells = [f"{head}: {cell}" for head, cell in zip(fit.heads, cells, strict=True)]
            cells += [""] * (len(names) - len(cells))
            layer = "" if fit.projected_r2 is None else f"{fit.projected_r2:.3f}"
            extent = f"{fit.low.min().item():.3g} to {fit.high.max().item():.3g}"
            rows.append([name, *cells, layer, format_span(fit.spread), extent])
        return f"{what}\n{format_table(['module', *names, 'layer', 'score spread', 'range'], rows)}"

    def easiest(self, budget: float) -> dict[str, Any]:
        """`layers` and `heads` of patch_model for the share `budget` of all heads that the polynomial fits best.

        Raises:
            ValueError: for a budget that is not a share, or under which no head is left.
        """
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be a share of the heads, above 0 and at most 1, got {budget}")
        ranked = sorted(
            (-r2, fit.layer, head)
            for fit in self.modules.values()
            for head, r2 in zip(fit.heads, fit.r2.tolist(), strict=True)
        )
        count = round(budget * len(ranked))
        if not count:
            raise ValueError(f"a budget of {budget} leaves none of {len(ranked)} heads to convert: raise it")
        chosen: dict[int, list[int]] = {}
        for _, layer, head in ranked[:count]:
            chosen.setdefault(layer, []).append(head)
        return {"layers": sorted(chosen), "heads": {layer: sorted(chosen[layer]) for layer in sorted(chosen)}}

    def figure(self, path: str | Path, heads: Sequence[tuple[str, int]] | None = None) -> None:
        """Draws fitted polynomials over softmax's own weights, both times Z, against the score.

        Args:
            path: of the image to write.
            heads: (module, index of the head); default: the best, the median and the worst fit.
        Raises:
            ValueError: for a head that was not fitted.
        """
        from matplotlib.figure import Figure

        chosen = self._extremes() if heads is None else list(heads)
        figure = Figure(figsize=(4 * len(chosen), 3), layout="constrained")
        axes = figure.subplots(1, len(chosen), squeeze=False)
        for axis, (name, head) in zip(axes[0], chosen, strict=True):
            if name not in self.modules or head not in self.modules[name].heads:
                raise ValueError(f"head {head} of {name!r} was not fitted; modules: {', '.join(self.modules)}")
            _draw(axis, self.modules[name], head)
            axis.set_title(f"{name}, head {head}", fontsize=8)
        axes[0][0].set_ylabel("weight times Z")
        axes[0][0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)

    def _extremes(self) -> list[tuple[str, int]]:
        ranked = sorted(
            (r2, name, head)
            for name, fit in self.modules.items()
            for head, r2 in zip(fit.heads, fit.r2.tolist(), strict=True)
        )
        indices = sorted({len(ranked) - 1, len(ranked) // 2, 0}, reverse=True)
        return [(ranked[i][1], ranked[i][2]) for i in indices]


def _draw(axis: Any, fit: HeadFit, head: int) -> None:
    row = fit.heads.index(head)
    bins = fit.seen.shape[1]
    low, high = fit.low[row].item(), fit.high[row].item()
    centres = low + (high - low) * (torch.arange(bins) + 0.5) / bins
    x = (fit.alpha[row] * centres + fit.beta[row]).view(1, 1, 1, -1)
    polynomial = fit.gain[row] * horner(x, fit.coefficients[row : row + 1]).flatten()
    filled = fit.seen[row] > 0
    crowd = fit.seen[row] / fit.seen[row].max()
    axis.plot(centres[filled], fit.weights[row][filled], ".", color="tab:gray", label="softmax, mean weight")
    axis.plot(centres, polynomial, color="tab:blue", label=f"polynomial, R2 {fit.r2[row].item():.2f}")
    options = {"color": "tab:gray", "alpha": 0.15, "step": "mid", "label": "scores"}
    axis.fill_between(centres, 0, crowd, transform=axis.get_xaxis_transform(), **options)
    axis.set_xlabel("score")
    axis.spines[["top", "right"]].set_visible(False)
