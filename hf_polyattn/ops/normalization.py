"""Z_i, the divisor of row i: as defined, and as tile-wise forms build it, from a statistic of each tile.

| normalization | Z_i                    | statistic of a tile |
|---------------|------------------------|---------------------|
| sqrt_length   | sqrt(n_i)              | kept keys           |
| length        | n_i                    | kept keys           |
| sum           | eps + sum phi          | sum phi             |
| l1            | eps + sum abs(phi)     | sum abs(phi)        |
| l2            | sqrt(eps + sum phi^2)  | sum phi^2           |
| none          | 1                      |                     |
| a number      | that number            |                     |
"""

import torch

# those whose Z depends on the weights: their backward has a second term
from ..config import NORMALIZED as NORMALIZED

EPS = 1e-6  # keeps Z away from zero


def row_scale(values: torch.Tensor, lengths: torch.Tensor, normalization: str | float) -> torch.Tensor | float:
    """Z of values [B, H, T, S], 0 at the masked, and row lengths >= 1: [B, H, T, 1] or broadcastable to it."""
    total = lengths.to(values.dtype)
    if normalization in NORMALIZED:
        powers = {"sum": lambda x: x, "l1": torch.abs, "l2": torch.square}
        total = powers[normalization](values).sum(-1, keepdim=True)
    return scale_of_total(total, normalization)


def scale_of_total(total: torch.Tensor, normalization: str | float) -> torch.Tensor | float:
    """Z from the statistic of a whole row."""
    match normalization:
        case "sqrt_length":
            return total.clamp(min=1).sqrt()
        case "length":
            return total.clamp(min=1)
        case "sum" | "l1":
            return EPS + total
        case "l2":
            return (EPS + total).sqrt()
        case "none":
            return 1.0
    return float(normalization)


def tile_total(
    weights: torch.Tensor, spare: torch.Tensor, keep: torch.Tensor | None, normalization: str | float
) -> torch.Tensor | int:
    """A tile's part of the statistic, broadcastable to [B, H, T, 1]; may write into `spare`. keep None: all kept."""
    match normalization:
        case "sqrt_length" | "length":
            return weights.shape[-1] if keep is None else keep.sum(-1, keepdim=True)
        case "sum":
            return weights.sum(-1, keepdim=True)
        case "l1":
            return torch.abs(weights, out=spare).sum(-1, keepdim=True)
        case "l2":
            return torch.linalg.vector_norm(weights, dim=-1, keepdim=True).square_()
    return 0


def subtract_scale_gradient(
    grad: torch.Tensor, weights: torch.Tensor, pull: torch.Tensor, scale: torch.Tensor, normalization: str | float
) -> None:
    """grad -= pull * dZ/dw in place, for pull = (dO . o) / Z and scale = Z, both [B, H, T, 1]."""
    match normalization:
        case "sum":
            grad.sub_(pull)
        case "l1":
            grad.addcmul_(weights.sign(), pull, value=-1)
        case "l2":
            grad.addcmul_(weights, pull / scale, value=-1)
