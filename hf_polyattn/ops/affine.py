"""The affine score alpha s + beta, taken into the coefficients, so that no fast form needs a case for it."""

import torch


def shift_and_scale(coefficients: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Coefficients of s -> sum_k c_k (alpha s + beta)^k; differentiable.

    coefficients [H, p + 1], alpha and beta [H]. By synthetic division: p (p + 1) / 2 fused operations on [H], a
    fraction of what binomial sums would take in every layer of a decoding step.
    """
    columns = list(coefficients.unbind(1))
    degree = len(columns) - 1
    for i in range(degree):
        for j in range(degree - 1, i - 1, -1):
            columns[j] = torch.addcmul(columns[j], columns[j + 1], beta)
    power = alpha
    for j in range(1, degree + 1):
        columns[j] = columns[j] * power
        power = power * alpha if j < degree else power
    return torch.stack(columns, dim=1)
