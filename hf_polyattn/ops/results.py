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


def refuse_derivative(
    form: str, grads: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a form, tied to the tensors they were computed from: derivatives by those are refused.

    Without the tie, a derivative by the sources would not pass here, and would be 0 without a word.
    """
    return tuple(None if g is None else RefuseDerivative.apply(g, form, *sources) for g in grads)


class RefuseDerivative(torch.autograd.Function):
    """Identity in x, as a function of its sources whose derivative is an explanation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str, *sources: Tensor | None) -> Tensor:
        ctx.form = form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ONCE.format(form=ctx.form))
