"""What the operation accepts. Each error says what was expected and what came."""

import math

import torch

from ..activations import never_negative
from ..config import NORMALIZATIONS


def check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        raise ValueError(
            f"expected query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv]; got {_shapes(q, k, v)}"
        )
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        raise ValueError(f"batch, key length, key heads and head_dim must agree; got {_shapes(q, k, v)}")
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(f"the number of query heads must be a multiple of the key heads; got {_shapes(q, k, v)}")
    # dtypes may differ: autocast mixes them
    if not (query.is_floating_point() and key.is_floating_point() and value.is_floating_point()):
        raise TypeError(
            f"query, key and value must be floating point, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "convert them first, as in query.float()"
        )
    full = (*q[:3], k[2])
    for name, mask in (("keep", keep), ("bias", bias)):
        if mask is not None and not _broadcasts(mask.shape, full):
            raise ValueError(f"{name} {tuple(mask.shape)} does not broadcast to [B, H, T, S] = {full}")
    if keep is not None and keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool (True = may attend), got {keep.dtype}; see ops.masks.split_mask")
    if key_lengths is not None and key_lengths.shape != q[:1]:
        raise ValueError(f"key_lengths must be [B] = [{q[0]}], got {tuple(key_lengths.shape)}")


def check_options(
    normalization: str | float, dropout: float, softcap: float | None, sliding_window: int | None
) -> None:
    if isinstance(normalization, str):
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS} or a number, got {normalization!r}")
    elif not 0 < normalization < math.inf:
        raise ValueError(f"a constant normalization must be a positive number, got {normalization!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability below 1, got {dropout}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window counts the row's own position, so it is 1 at least, got {sliding_window}")


def check_degree(
    degree: int | None, coefficients: torch.Tensor | None, normalization: str | float, heads: int
) -> None:
    if (degree is None) == (coefficients is None):
        raise ValueError(
            f"give exactly one of degree and coefficients, got degree={degree}, coefficients={coefficients}"
        )
    if coefficients is not None:
        if coefficients.ndim != 2 or coefficients.shape[0] != heads or coefficients.shape[1] == 0:
            raise ValueError(f"coefficients must be [p + 1] or [{heads}, p + 1], got {tuple(coefficients.shape)}")
        degree = coefficients.shape[1] - 1
    elif not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise ValueError(f"degree must be an integer >= 1, got {degree!r}")
    if normalization == "sum" and degree % 2:
        raise ValueError(f'normalization "sum" needs an even degree, got {degree}: rows could sum to zero; use "l1"')
    if normalization == "sum" and coefficients is not None and not torch.compiler.is_compiling():
        # their values now: a graph that is being compiled has none
        for row in sorted(set(map(tuple, coefficients.detach().tolist()))):
            if not never_negative(row):
                raise ValueError(
                    f'normalization "sum" needs weights of one sign, and the polynomial {row} falls below 0, or is 0 '
                    'throughout: rows could sum to zero; use "l1" or "l2", or coefficients of a polynomial that is '
                    "nowhere negative, such as (0, 0, 1)"
                )


def _shapes(query: torch.Size, key: torch.Size, value: torch.Size) -> str:
    return f"query {tuple(query)}, key {tuple(key)}, value {tuple(value)}"


def _broadcasts(shape: torch.Size, full: tuple[int, ...]) -> bool:
    return len(shape) <= 4 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False))
