"""The operation on plain tensors. Nothing here knows of Transformers.

`polynomial_attention` is for people; `attend` is the same for any phi and is what the seam calls. Both check shapes,
let `forms` choose how to compute it, and apply what all forms share: QK-norm, gain, the range check of fp16.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..activations import Phi, horner, power
from .affine import shift_and_scale
from .checks import check_degree, check_options, check_shapes
from .cpu import cpu_attention
from .forms import FORMS as FORMS
from .forms import Call, choose_form
from .fused import fused_attention
from .masks import Masking, build_keep
from .naive import naive_attention
from .normalization import NORMALIZED as NORMALIZED
from .one_row import attend_row
from .precision import compute_dtype, no_autocast, to_dtype
from .recurrent import Past, recurrent_attention
from .tiled import tiled_attention
from .transforms import is_transformed


def polynomial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    degree: int | None = None,
    coefficients: torch.Tensor | Sequence[float] | None = None,
    normalization: str | float = "sqrt_length",
    gain: torch.Tensor | float = 1.0,
    alpha: torch.Tensor | float = 1.0,
    beta: torch.Tensor | float = 0.0,
    keep: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    qk_norm: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with a polynomial in place of softmax (arXiv 2410.18613).

    a_ij = keep_ij * gain_h * phi(alpha_h * s_ij + beta_h) / Z_i with s_ij = scaling * q_i . k_j; o_i = sum_j a_ij v_j.

    Args:
        query: [B, H, T, D].
        key: [B, Hk, S, D], H a multiple of Hk (grouped queries).
        value: [B, Hk, S, Dv].
        degree: phi(s) = s^degree. Give this or `coefficients`.
        coefficients: c_0..c_p, phi(s) = sum_k c_k s^k; [p + 1] for all heads or [H, p + 1].
        normalization: Z_i: "sqrt_length", "length", "sum", "l1", "l2", "none" or a positive constant, where the row
            length n_i is the number of keys that row i keeps.
        gain, alpha, beta: a number or [H].
        keep: bool, broadcastable to [B, H, T, S], True = may attend. Rows that keep nothing give 0.
        is_causal: row i sees keys up to S - T + i.
        key_lengths: [B]; keys from that index on are padding.
        sliding_window: number of positions within reach, the row's own included.
        qk_norm: RMS-normalise queries and keys over D.
        dropout: probability of dropping a weight.
        scaling: default D ** -0.5.
        softcap: s becomes softcap * tanh(s / softcap).
        bias: added to the scores, broadcastable to [B, H, T, S].
        return_weights: also return the weights [B, H, T, S] (O(T S) memory, the naive form).
        backend: "auto", "recurrent" (cost linear in the length), "cpu" (compiled on first use), "fused" (Triton, on
            GPUs), "tiled" or "naive", which alone has forward-mode and second derivatives and knows torch.func; "auto"
            takes it in forward mode and inside of torch.func's transforms.
    Returns:
        [B, H, T, Dv] in the query's dtype, and the weights when asked for.
    Raises:
        ValueError: for shapes or options that do not fit, and for "sum" with a polynomial that falls below 0 (outside
            torch.compile).
        TypeError: for query, key or value of integers, bools or complex numbers.
        OverflowError: when a float16 output leaves float16's range (outside torch.compile).
        RuntimeError: when a gradient of any form but "naive" is differentiated again.
    """
    # a power alone, one row: below a hundred keys these checks take longer than the step, whose own are in C++
    bare = coefficients is bias is key_lengths is softcap is None and not (qk_norm or dropout or return_weights)
    unscaled = type(gain) is type(alpha) is type(beta) is float and (gain, alpha, beta) == (1, 1, 0)
    if bare and unscaled and type(degree) is int and normalization != "sum" and backend in ("auto", "cpu"):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options: dict[str, Any] = {"keep": keep, "sliding_window": sliding_window}
        row = attend_row(query, key, value, degree=degree, normalization=normalization, scaling=scale, **options)
        if row is not None:
            return row
    check_shapes(query, key, value, keep, key_lengths, bias)
    heads = query.shape[1]
    if coefficients is not None:
        coefficients = torch.as_tensor(coefficients, dtype=compute_dtype(query), device=query.device)
        coefficients = coefficients.expand(heads, -1) if coefficients.ndim == 1 else coefficients
    check_degree(degree, coefficients, normalization, heads)
    return attend(
        query,
        key,
        value,
        degree=degree,
        coefficients=coefficients,
        normalization=normalization,
        gain=None if isinstance(gain, (int, float)) and gain == 1 else _per_head(gain, heads, query),
        affine=None
        if isinstance(alpha, (int, float)) and isinstance(beta, (int, float)) and (alpha, beta) == (1, 0)
        else (_per_head(alpha, heads, query), _per_head(beta, heads, query)),
        keep=keep,
        is_causal=is_causal,
        key_lengths=key_lengths,
        sliding_window=sliding_window,
        qk_norm=qk_norm,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
        bias=bias,
        return_weights=return_weights,
        backend=backend,
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    degree: int | None = None,
    coefficients: torch.Tensor | None = None,
    phi: Phi | None = None,
    exponential: bool = False,
    normalization: str | float = "sqrt_length",
    gain: torch.Tensor | None = None,
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    keep: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    qk_norm: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
    past: Past | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `polynomial_attention`, for `degree` (monomial), `coefficients` [H, p + 1] or any `phi`; gain, affine [H].

    past: keys before these, summed up; takes these in. Always computed by the recurrent form.
    """
    # what makes the compiled form the choice of any one row, and no word on how it is computed
    special = qk_norm or dropout or return_weights or key_lengths is not None or bias is not None
    if not special and phi is past is softcap is None and backend in ("auto", "cpu"):
        alpha, beta = (None, None) if affine is None else affine
        row = attend_row(
            query,
            key,
            value,
            degree=degree or 0,
            coefficients=coefficients,
            alpha=alpha,
            beta=beta,
            gain=gain,
            normalization=normalization,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            keep=keep,
            sliding_window=sliding_window,
        )
        if row is not None:
            return row
    check_shapes(query, key, value, keep, key_lengths, bias)
    check_options(normalization, dropout, softcap, sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    degree = degree or 0  # not read where coefficients or phi are given
    masking: dict[str, Any] = {
        "keep": keep,
        "is_causal": is_causal,
        "key_lengths": key_lengths,
        "sliding_window": sliding_window,
    }
    extras: dict[str, Any] = {"normalization": normalization, "scaling": scaling, "softcap": softcap}
    extras |= {"bias": bias, "dropout": dropout}
    if coefficients is not None:
        coefficients = coefficients.to(compute_dtype(query))
    alpha, beta = (None, None) if affine is None else (x.to(compute_dtype(query)) for x in affine)

    in_use = {"softcap": softcap is not None, "bias": bias is not None, "dropout": bool(dropout)}
    call = Call(
        device=query.device.type,
        dtypes=frozenset((query.dtype, key.dtype, value.dtype)),
        is_empty=0 in (*query.shape, *key.shape, *value.shape),
        is_polynomial=phi is None,
        extras=tuple(name for name, used in in_use.items() if used),
        return_weights=return_weights,
        normalization=normalization,
        degree=degree if coefficients is None else coefficients.shape[1] - 1,
        has_coefficients=coefficients is not None or affine is not None,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        wants_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
        # the sums of a past are computed by plain torch
        is_transformed=past is None and is_transformed(query, key, value, coefficients, alpha, beta, gain, bias),
        masking=Masking((query.shape[2], key.shape[2]), **masking),
    )
    if past is not None and return_weights:
        raise ValueError("keys that are summed up have no weights: output_attentions needs an ordinary cache")
    form = choose_form(backend if past is None else "recurrent", call)
    weights = None
    with no_autocast(query.device.type):
        if qk_norm:
            query, key = rms_normalize(query), rms_normalize(key)
        if form == "naive":
            out, weights = naive_attention(
                query,
                key,
                value,
                phi if phi is not None else polynomial_phi(degree, coefficients),
                keep=build_keep((query.shape[2], key.shape[2]), query.device, **masking),
                gain=gain,
                alpha=alpha,
                beta=beta,
                exponential=exponential,
                **extras,
            )
        else:
            if alpha is not None and beta is not None:
                if coefficients is None:
                    coefficients = monomial_coefficients(degree, query)
                coefficients = shift_and_scale(coefficients, alpha, beta)
            options: dict[str, Any] = {"degree": degree, "coefficients": coefficients}
            if form == "recurrent":
                options |= {"normalization": normalization, "scaling": scaling, "past": past}
                by_key = call.masking.by_key
                assert not isinstance(by_key, str), "refused when the form was chosen"
                out = recurrent_attention(query, key, value, is_causal=by_key[0], key_keep=by_key[1], **options)
            elif form in ("cpu", "fused"):
                compute = cpu_attention if form == "cpu" else fused_attention
                inside = None if gain is None or gain.requires_grad else gain
                options |= {**masking, "normalization": normalization, "scaling": scaling, "gain": inside}
                out = compute(query, key, value, **options)
                gain = gain if inside is None else None
            else:
                out = tiled_attention(query, key, value, **options, **masking, **extras)
            if gain is not None:
                # wide, for the gradient of a learned gain sums over the whole output
                out = out.to(compute_dtype(query)) * gain.to(compute_dtype(query)).view(-1, 1, 1)
        out = to_dtype(out, query.dtype, (query, key, value))
        if weights is not None and return_weights:
            return out, to_dtype(weights, query.dtype, (query, key), "weight")
    return out


def polynomial_phi(degree: int, coefficients: torch.Tensor | None) -> Phi:
    if coefficients is None:
        return lambda scores, lengths: power(scores, degree)
    return lambda scores, lengths: horner(scores, coefficients)


def monomial_coefficients(degree: int, like: torch.Tensor) -> torch.Tensor:
    row = torch.zeros(degree + 1, dtype=compute_dtype(like), device=like.device)
    row[degree] = 1
    return row.expand(like.shape[1], -1)


def rms_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / RMS(x) over the last dimension, in fp32 at least: then |q . k| <= D."""
    wide = x.to(compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _per_head(x: torch.Tensor | float, heads: int, like: torch.Tensor) -> torch.Tensor:
    x = torch.as_tensor(x, dtype=compute_dtype(like), device=like.device)
    if x.ndim == 0:
        return x.expand(heads)
    if x.shape != (heads,):
        raise ValueError(f"gain, alpha and beta must be numbers or [{heads}], got {tuple(x.shape)}")
    return x
