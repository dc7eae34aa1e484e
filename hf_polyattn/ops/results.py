"""What the forms return: an output laid out as the query is, and gradients that are not differentiated again."""

from typing import Any

import torch
from torch import Tensor

ONCE = (
    "the {form} form of polynomial attention has no second derivative: "
    'use backend="naive" where gradients of gradients are needed'
)


def like_query(query: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Empty [B, H, T, width], heads and rows in the memory order of the query's: its consumer wants it that way."""
    batch, heads, queries, _ = query.shape
    if query.stride(1) < query.stride(2):
        return torch.empty(batch, queries, heads, width, dtype=dtype, device=query.device).transpose(1, 2)
    return torch.empty(batch, heads, queries, width, dtype=dtype, device=query.device)


class RefuseDerivative(torch.autograd.Function):
    """Identity with an explanation in place of a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str) -> Tensor:
        ctx.form = form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(ONCE.format(form=ctx.form))
