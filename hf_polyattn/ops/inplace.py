"""Polynomials of a score tile: `activations.power` and `activations.horner` into memory that is there already."""

import torch


def power_into(out: torch.Tensor, base: torch.Tensor, degree: int) -> torch.Tensor:
    """out = base^degree, degree >= 1, by squaring: torch's pow is fast for exponents 2 and 3 only."""
    if degree == 1:
        return out.copy_(base)
    if degree <= 3:
        return torch.pow(base, degree, out=out)
    if degree % 2 == 0:
        return power_into(out, base, degree // 2).square_()
    return power_into(out, base, degree - 1).mul_(base)


def horner_into(out: torch.Tensor, scores: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """out = sum_k c_k scores^k for scores and out [B, H, T, S], coefficients [H, p + 1]."""
    c = coefficients.view(1, coefficients.shape[0], 1, 1, -1)
    degree = c.shape[-1] - 1
    if degree == 0:
        return out.copy_(c[..., 0].expand_as(out))
    torch.mul(scores, c[..., degree], out=out).add_(c[..., degree - 1])
    for k in range(degree - 2, -1, -1):
        torch.addcmul(c[..., k], out, scores, out=out)
    return out


def slope_coefficients(coefficients: torch.Tensor) -> torch.Tensor:
    """[H, p + 1] -> [H, p], the coefficients of the derivative; one zero for degree 0."""
    if coefficients.shape[1] == 1:
        return torch.zeros_like(coefficients)
    return coefficients[:, 1:] * torch.arange(1, coefficients.shape[1], device=coefficients.device)


def keep_only(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x.masked_fill_(~keep, 0), by the bits: many times faster on a CPU, and inf and NaN become 0 too."""
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    x.view(bits).bitwise_and_(keep.to(bits).neg_())
    return x
