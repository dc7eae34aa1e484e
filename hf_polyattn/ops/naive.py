"""The definition. Every other form is tested against this one, outputs and gradients.

score    s_ij = scaling * q_i . k_j, optionally cap * tanh(s / cap), plus bias_ij
length   n_i  = max(1, sum_j keep_ij)
weight   a_ij = keep_ij * gain_h * phi(alpha_h * s_ij + beta_h, n_i) / Z_i, with Z_i of `normalization.row_scale`
output   o_i  = sum_j a_ij v_j
"""

import torch

from ..activations import Phi
from .normalization import row_scale


def naive_attention(
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hk, S, D]
    value: torch.Tensor,  # [B, Hk, S, Dv]
    phi: Phi,
    *,
    keep: torch.Tensor,  # bool, broadcastable to [B, H, T, S], of S keys
    normalization: str | float,
    scaling: float,
    gain: torch.Tensor | None = None,  # [H]
    alpha: torch.Tensor | None = None,  # [H]
    beta: torch.Tensor | None = None,  # [H]
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    exponential: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [B, H, T, Dv] and the weights [B, H, T, S], both in fp32 (fp64 for fp64 inputs)."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.to(compute), key.to(compute), value.to(compute)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    scores = scaling * (query @ key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(compute)
    if alpha is not None and beta is not None:
        scores = scores * alpha.to(compute).view(-1, 1, 1) + beta.to(compute).view(-1, 1, 1)
    # before phi: (-inf)^2 is +inf, and where(inf) has a NaN gradient
    scores = scores.masked_fill(~keep, -1e30 if exponential else 0)
    if exponential and scores.shape[-1]:
        scores = scores - scores.amax(-1, keepdim=True).detach()
    lengths = keep.sum(-1, keepdim=True).clamp(min=1)
    values = phi(scores, lengths).masked_fill(~keep, 0)
    weights = values / row_scale(values, lengths, normalization)
    if gain is not None:
        weights = weights * gain.to(compute).view(-1, 1, 1)
    weights = torch.dropout(weights, dropout, train=True)
    return weights @ value, weights
