"""The definition of `naive.py` in plain torch and O(T) memory, tile by tile, with its own backward.

Forward, with d_ij the dropout factor (1 without dropout) and z_i the row statistic, which is saved for the backward:

    s_ij = score            w_ij = keep_ij phi(s_ij)          o_i = 1/z_i sum_j d_ij w_ij v_j
    z_i  = sqrt(n_i) | n_i | eps + sum_j w_ij | eps + sum_j |w_ij| | sqrt(eps + sum_j w_ij^2) | constant

No row needs its maximum first, so a row block is one sweep over the keys, divided by z_i at its end. Backward, with
g_i = dO_i / z_i and delta_i = dO_i . o_i; scores and weights are computed again:

    dV_j  = sum_i d_ij w_ij g_i
    dw_ij = d_ij g_i . v_j - (0 | delta_i / z_i | sign(w_ij) delta_i / z_i | w_ij delta_i / z_i^2)
            for (lengths and constants | "sum" | "l1" | "l2")
    ds_ij = keep_ij phi'(s_ij) dw_ij,   dc_k = sum_ij keep_ij s_ij^k dw_ij
    dQ_i  = scaling sum_j ds_ij k_j,    dK_j = scaling sum_i ds_ij q_i,    dbias = ds

where a softcap, s = cap tanh(x / cap) + bias, multiplies the ds of dQ and dK by 1 - tanh(x / cap)^2. Scores, powers
and sums are fp32 for 16-bit inputs. Query heads that share a key head stand below one another in a tile: keys and
values are never repeated.
"""

from typing import Any

import torch
from torch import Tensor

from .inplace import keep_only, slope_coefficients
from .normalization import NORMALIZED, scale_of_total, subtract_scale_gradient, tile_total
from .precision import compute_dtype
from .results import like_query, refuse_derivative
from .sweep import Options, Sweep, stack
from .tiles import cut


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    coefficients: Tensor | None,
    normalization: str | float,
    scaling: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """As `naive_attention` for phi(s) = s^degree, or sum_k c_k s^k with coefficients [H, p + 1]; no gain, no weights.

    query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv] with any strides: what is copied to be contiguous is a
    block of rows, and the keys and values of the few heads at work.

    Returns:
        [B, H, T, Dv] in fp32 (fp64 for fp64 inputs), laid out in memory as the query is.
    Raises:
        RuntimeError: in the backward pass of the backward pass.
    """
    if coefficients is not None:
        coefficients = coefficients.to(compute_dtype(query))
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    # drawn from the global generator, so that torch.manual_seed and checkpointing's saved state decide
    seed = int(torch.randint(2**62, ())) if dropout else 0
    options = Options(degree, normalization, scaling, softcap, is_causal, sliding_window, dropout, seed)
    return TiledAttention.apply(query, key, value, coefficients, bias, keep, key_lengths, options)


class TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coefficients: Tensor | None,
        bias: Tensor | None,
        keep: Tensor | None,
        key_lengths: Tensor | None,
        options: Options,
    ) -> Tensor:
        sweep = Sweep(query, key, coefficients, bias, keep, key_lengths, options)
        out = like_query(query, value.shape[-1], sweep.dtype)
        scale = torch.empty((*query.shape[:3], 1), dtype=sweep.dtype, device=query.device)
        for batches, key_heads, heads in sweep.tiling.spans():
            k, v = sweep.group(key, batches, key_heads), sweep.group(value, batches, key_heads)
            for rows in sweep.tiling.row_blocks():
                here = (batches, heads, rows)
                q = sweep.pack(query, here).mul_(options.scaling)
                o = q.new_zeros(*q.shape[:2], v.shape[-1])
                total = torch.zeros_like(scale[here])
                for columns, kept in sweep.masks.tiles(*here):
                    tile = (*here, columns)
                    scores, spare = sweep.buffers(2, tile)
                    sweep.scores(scores, q, k[:, columns], tile, kept)
                    weights = sweep.phi(scores, spare, heads, kept)
                    free = scores if weights is spare else spare
                    total += tile_total(weights, free, kept, options.normalization)
                    if options.dropout:
                        weights.mul_(sweep.survivors(free, tile))
                    o.baddbmm_(stack(weights, q), v[:, columns])
                scale[here] = scale_of_total(total, options.normalization)
                torch.div(o.view(*total.shape[:3], -1), scale[here] * sweep.survival, out=out[here])
        saved_out = out if options.normalization in NORMALIZED else None
        ctx.save_for_backward(query, key, value, coefficients, bias, keep, key_lengths, scale, saved_out)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.no_grad():
            grads = _backward(grad, ctx.options, ctx.needs_input_grad, *ctx.saved_tensors)
        if torch.is_grad_enabled():
            query, key, value, coefficients, bias, *_ = ctx.saved_tensors
            grads = refuse_derivative("tiled", grads, (grad, query, key, value, coefficients, bias))
        return (*grads, None, None, None)


def _backward(
    grad: Tensor,
    options: Options,
    needs: tuple[bool, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    key_lengths: Tensor | None,
    scale: Tensor,
    out: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, coefficients and bias; names as in the head of this file."""
    sweep = Sweep(query, key, coefficients, bias, keep, key_lengths, options)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    dc = torch.zeros_like(coefficients) if coefficients is not None and needs[3] else None
    dbias = torch.zeros_like(bias, dtype=sweep.dtype) if bias is not None and needs[4] else None
    slope_of = None if coefficients is None else slope_coefficients(coefficients)
    # phi' of a monomial is degree * s^(degree - 1): its factor rides on the rows, not on the tiles
    factor = options.degree if coefficients is None else 1
    for batches, key_heads, heads in sweep.tiling.spans():
        k, v = sweep.group(key, batches, key_heads), sweep.group(value, batches, key_heads)
        dk_group, dv_group = torch.zeros_like(k), torch.zeros_like(v)
        for rows in sweep.tiling.row_blocks():
            here = (batches, heads, rows)
            q, g, z = sweep.pack(query, here).mul_(options.scaling), sweep.pack(grad, here), scale[here]
            g_rows = g.view(*z.shape[:3], -1)
            pull = None if out is None else factor * (g_rows * out[here]).sum(-1, keepdim=True) / z
            g_rows.div_(z * sweep.survival)
            g_slope = g * factor
            dq_rows = torch.zeros_like(q)
            for columns, kept in sweep.masks.tiles(*here):
                tile = (*here, columns)
                scores, ds, dw, spare = sweep.buffers(4, tile)
                softcap_slope = sweep.scores(scores, q, k[:, columns], tile, kept)
                weights = sweep.phi_and_slope(scores, ds, spare, slope_of, heads, kept)

                torch.bmm(g_slope, v[:, columns].transpose(1, 2), out=stack(dw, q))
                used = weights
                if options.dropout:
                    survivors = sweep.survivors(torch.empty_like(dw), tile)
                    dw.mul_(survivors)
                    used = survivors.mul_(weights)
                dv_group[:, columns].baddbmm_(stack(used, q).transpose(1, 2), g)
                if pull is not None:
                    subtract_scale_gradient(dw, weights, pull, z, options.normalization)
                # a monomial of degree > 1 has slope 0 at the masked scores, which are 0
                if kept is not None and (coefficients is not None or options.degree == 1):
                    keep_only(dw, kept)

                ds.mul_(dw)
                if dbias is not None:
                    target = cut(dbias, *tile)
                    target += ds.sum_to_size(target.shape)
                if softcap_slope is not None:
                    ds.mul_(softcap_slope)
                dq_rows.baddbmm_(stack(ds, q), k[:, columns])
                dk_group[:, columns].baddbmm_(stack(ds, q).transpose(1, 2), q)
                if dc is not None:
                    for power in range(dc.shape[1]):
                        dc[heads, power] += (dw.mul_(scores) if power else dw).sum((0, 2, 3))
            dq[here] = dq_rows.mul_(options.scaling).view(*z.shape[:3], -1)
        dk[batches, key_heads] = dk_group.view_as(dk[batches, key_heads])
        dv[batches, key_heads] = dv_group.view_as(dv[batches, key_heads])
    return dq, dk, dv, dc, None if bias is None or dbias is None else dbias.to(bias.dtype)
