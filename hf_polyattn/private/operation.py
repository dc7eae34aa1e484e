"""Attention as an encrypted evaluator computes it: additions and multiplications, and numbers that are public.

    o_i = sum_j P(q_i . k_j) w_j v_j        P(x) = c_0 + c_1 x + ... + c_p x^p, one for each head

P holds everything that is public: scaling, alpha, beta, gain and coefficients. w_j is the constant 1 / Z times the
mask of key j (1, or 0 for padding), and is multiplied into the values: beside the scores, where it costs no depth.
Keys that are padding get scores and values of P, which w_j = 0 then leaves out exactly.

Schemes of P of degree p, by products of ciphertexts on the longest path:

| scheme   | products of ciphertexts | written as                                                                  |
|----------|-------------------------|-----------------------------------------------------------------------------|
| horner   | p - 1                   | (c_p x + c_(p-1)) x + ...                                                   |
| monic    | p - 1                   | the same, with c_p in the values instead: one product with a number less    |
| even_odd | near log2 p             | E(x^2) + x O(x^2), E and O again in this way                                |
"""

from collections.abc import Generator, Iterator
from typing import Literal, get_args

import torch
from torch import nn

Scheme = Literal["horner", "even_odd", "monic"]
Step = tuple[str, torch.Tensor]
"""What a step computes, as a formula, and its values."""


class PrivateAttention(nn.Module):
    """The attention of one module on encrypted queries, keys and values, as a graph that can be exported.

    Args:
        coefficients: [H, p + 1], of the bare products q . k: see `private.fold`.
        denominator: Z, the constant.
        scheme: how the polynomial is evaluated, see above.
    Raises:
        ValueError: for an unknown scheme, or "monic" where a leading coefficient is 0.
    """

    coefficients: torch.Tensor
    """[p + 1, H, 1, 1]: of the scheme, so that each one is ready to multiply scores."""
    value_scale: torch.Tensor
    """[H, 1, 1]: 1 / Z, times c_p where the scheme takes it out."""

    def __init__(self, coefficients: torch.Tensor, denominator: float, scheme: Scheme = "horner") -> None:
        super().__init__()
        if scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {get_args(Scheme)}, got {scheme!r}")
        self.scheme = scheme
        scale = torch.full_like(coefficients[:, 0], 1 / denominator)
        if scheme == "monic":
            leading = coefficients[:, -1]
            if zero := (leading == 0).nonzero().flatten().tolist():
                raise ValueError(f'the leading coefficients of heads {zero} are 0: use scheme="horner"')
            coefficients, scale = coefficients / leading[:, None], scale * leading
        self.register_buffer("coefficients", coefficients.t().contiguous()[..., None, None])
        self.register_buffer("value_scale", scale[:, None, None])

    def forward(
        self,
        query: torch.Tensor,  # [B, H, T, D]
        key: torch.Tensor,  # [B, Hk, S, D]
        value: torch.Tensor,  # [B, Hk, S, Dv]
        mask: torch.Tensor | None = None,  # [B, S], public: 1, or 0 for padding
    ) -> torch.Tensor:
        """Returns the output [B, H, T, Dv]."""
        *_, (_, out) = self.steps(query, key, value, mask)
        return out

    def steps(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Iterator[Step]:
        """Every intermediate with its name, in the order of computation; the last one is the output."""
        groups = query.shape[1] // key.shape[1]
        scores = query @ _repeat(key, groups).transpose(-1, -2)
        yield "q . k", scores
        values = scores
        for name, values in self._polynomial(scores):
            yield name, values
        # numbers in the clear first: one product with the values
        weights = self.value_scale if mask is None else self.value_scale * mask[:, None, :, None]
        scaled = _repeat(value, groups) * weights
        yield "w v", scaled
        yield "sum_j P w v", values @ scaled

    def _polynomial(self, x: torch.Tensor) -> Iterator[Step]:
        c = list(self.coefficients.unbind())
        if self.scheme == "even_odd":
            yield from _even_odd(x, c)
            return
        out = x
        if self.scheme == "horner":
            out = x * c[-1]
            yield f"c_{len(c) - 1} x", out
        for k in range(len(c) - 2, 0, -1):
            out = (out + c[k]) * x
            yield f"(... + c_{k}) x", out
        yield "P(x)", out + c[0]


def _even_odd(x: torch.Tensor, c: list[torch.Tensor], power: int = 1) -> Generator[Step, None, torch.Tensor]:
    """sum_k c_k x^k as E(x^2) + x O(x^2), and E and O in the same way; x is the power of the scores that is named."""
    if len(c) == 1:
        return c[0]
    if len(c) == 2:
        out = x * c[1] + c[0]
    else:
        square = x * x
        yield f"x^{2 * power}", square
        even = yield from _even_odd(square, c[0::2], 2 * power)
        odd = yield from _even_odd(square, c[1::2], 2 * power)
        out = even + x * odd
    yield "P(x)" if power == 1 else f"P(x^{power}) of {len(c)} terms", out
    return out


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Key or value heads [B, Hk, S, D], each for `groups` query heads."""
    if groups == 1:
        return x
    return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
