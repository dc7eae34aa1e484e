"""The Triton kernels of the backward pass; the mathematics is in the head of `tiled.py`.

With r_i = gain / z_i (FACTORS), pull_i = delta_i / z_i, or delta_i / z_i^2 for "l2" (PULLS), and weights computed
again:

    dV_j = sum_i r_i w_ij dO_i,   dw_ij = r_i dO_i . v_j - pull_i dz/dw,   ds_ij = keep_ij phi'(s_ij) dw_ij
    dQ_i = scaling sum_j ds_ij k_j,   dK_j = scaling sum_i ds_ij q_i,   dc_k = sum_ij keep_ij s_ij^k dw_ij

Two ways. In order: a kernel over blocks of keys for dK and dV, another over blocks of queries for dQ and dc, scores
computed in both; seven products a tile, the same bits in every run. Or with atomic additions: the first kernel adds
its share of dQ to memory as well; five products a tile, sums in any order.
"""

import triton
import triton.language as tl

from .fused_tiles import (
    add_powers,
    dot,
    kept,
    key_tiles,
    listed_tiles,
    load_coefficients,
    load_rows,
    phi,
    row_tiles,
    slope,
    store_rows,
    tile_at,
    weight_gradient,
)


@triton.jit
def sweep_rows(
    dk, dv, sums, k, v, c, keys, Q, GRAD, DQ, FACTORS, PULLS, KEEP, LIST, q_row, g_row, dq_row, keep_row, keep_key,
    T, end, offset, scaling, dq_scale, steps, first, full_first, full_last,
    MASKED: tl.constexpr, DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, ATOMIC: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Adds `steps` tiles of query rows to dk [BN, DP] and dv [BN, DVP]; tiles stand transposed, [BN, BM]."""
    local = tl.arange(0, BM)
    for step in range(0, steps):
        start = tile_at(step, first, full_first, full_last, LIST, MASKED) * BM
        rows = start + local
        here = T - start
        top = tl.cast(start, tl.int64)
        q = load_rows(Q + top * q_row, local, q_row, here, D, DP, MASKED)
        grad = load_rows(GRAD + top * g_row, local, g_row, here, DV, DVP, MASKED)
        factor = tl.load(FACTORS + rows, mask=rows < T, other=0.0)[None, :]
        pull = factor
        if PULLS is not None:
            pull = tl.load(PULLS + rows, mask=rows < T, other=0.0)[None, :]
        s = scaling * dot(k, tl.trans(q), None, PRECISION)
        w = phi(s, c, DEGREE, COUNT)
        a = w * factor
        if MASKED:
            mask = kept(rows[None, :], keys[:, None], T, end, offset, KEEP, keep_row, keep_key, CAUSAL, WINDOW)
            a = tl.where(mask, a, 0.0)
        if WIDE:
            q = q.to(tl.float32)
            grad = grad.to(tl.float32)
        dv = dot(a.to(q.dtype), grad, dv, PRECISION)
        dw = weight_gradient(w, dot(v, tl.trans(grad), None, PRECISION), factor, pull, NORMALIZATION)
        if MASKED:
            dw = tl.where(mask, dw, 0.0)
        if SUMMED:
            sums = add_powers(sums, s, dw, COUNT, CP)
        ds = (slope(s, c, DEGREE, COUNT) * dw).to(q.dtype)
        dk = dot(ds, q, dk, PRECISION)
        if ATOMIC:
            dq = dot(tl.trans(ds), k.to(q.dtype), None, PRECISION) * dq_scale
            columns = tl.arange(0, DP)
            at = DQ + top * dq_row + local[:, None] * dq_row + columns[None, :]
            tl.atomic_add(at, dq, mask=(local < here)[:, None] & (columns < D)[None, :], sem="relaxed")
    return dk, dv, sums


@triton.jit(do_not_specialize=["H", "HK", "GROUPS", "T", "S", "blocks"])
def key_gradients_kernel(
    Q, K, V, GRAD, DQ, DK, DV_OUT, DC, FACTORS, PULLS, C, LENGTHS, KEEP, LISTS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dq_batch, dq_head, dq_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    keep_batch, keep_head, keep_row, keep_key, list_batch, list_head, list_row,
    H, HK, GROUPS, T, S, blocks, scaling,
    DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one key head, and all query heads that share it. DK [B, HK, S, D], DV_OUT [.., DV].

    With DQ, fp32 and zeroed, dQ is added to it by atomics, and the shares of dc go to DC [B, H, blocks, COUNT].
    """
    block = tl.program_id(0) % blocks
    batch = tl.cast(tl.program_id(0) // blocks // HK, tl.int64)
    key_head = tl.cast(tl.program_id(0) // blocks % HK, tl.int64)
    local = tl.arange(0, BN)
    keys = block * BN + local
    start = tl.cast(block * BN, tl.int64)
    left = S - block * BN
    k = load_rows(K + batch * k_batch + key_head * k_head + start * k_row, local, k_row, left, D, DP, True)
    v = load_rows(V + batch * v_batch + key_head * v_head + start * v_row, local, v_row, left, DV, DVP, True)
    if WIDE:
        v = v.to(tl.float32)
    offset = S - T
    end = S
    if LENGTHS is not None:
        end = tl.cast(tl.minimum(tl.load(LENGTHS + batch), S), tl.int32)
    ATOMIC: tl.constexpr = DQ is not None
    SUMMED: tl.constexpr = DC is not None
    # phi' comes without a monomial's degree
    scale = scaling
    if COUNT == 0:
        scale = scaling * DEGREE
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    for group in range(0, GROUPS):
        head = key_head * GROUPS + group
        c = load_coefficients(C, head, COUNT)
        LIST = None
        KEPT = KEEP
        if KEEP is not None:
            KEPT = KEEP + batch * keep_batch + head * keep_head
            LIST = LISTS + batch * list_batch + head * list_head + tl.cast(block, tl.int64) * list_row
            first, full_first, full_last, last = listed_tiles(LIST)
        else:
            first, full_first, full_last, last = row_tiles(block, T, end, offset, CAUSAL, WINDOW, BM, BN)
        full = full_last - full_first
        Q_HEAD = Q + batch * q_batch + head * q_head
        GRAD_HEAD = GRAD + batch * g_batch + head * g_head
        DQ_HEAD = None
        if ATOMIC:
            DQ_HEAD = DQ + batch * dq_batch + head * dq_head
        FACTOR_HEAD = FACTORS + (batch * H + head) * T
        PULL_HEAD = None
        if PULLS is not None:
            PULL_HEAD = PULLS + (batch * H + head) * T
        sums = tl.zeros((BN, CP), tl.float32)
        dk, dv, sums = sweep_rows(
            dk, dv, sums, k, v, c, keys, Q_HEAD, GRAD_HEAD, DQ_HEAD, FACTOR_HEAD, PULL_HEAD, KEPT, LIST,
            q_row, g_row, dq_row, keep_row, keep_key, T, end, offset, scaling, scale,
            full, first, full_first, full_last,
            False, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, CP, BM, BN, PRECISION, WIDE,
            ATOMIC, SUMMED,
        )  # fmt: skip
        dk, dv, sums = sweep_rows(
            dk, dv, sums, k, v, c, keys, Q_HEAD, GRAD_HEAD, DQ_HEAD, FACTOR_HEAD, PULL_HEAD, KEPT, LIST,
            q_row, g_row, dq_row, keep_row, keep_key, T, end, offset, scaling, scale,
            last - first - full, first, full_first, full_last,
            True, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, CP, BM, BN, PRECISION, WIDE,
            ATOMIC, SUMMED,
        )  # fmt: skip
        if SUMMED:
            column = tl.arange(0, CP)
            at = DC + ((batch * H + head) * blocks + block) * COUNT
            tl.store(at + column, tl.sum(sums, 0), mask=column < COUNT)
    DK += batch * dk_batch + key_head * dk_head + start * dk_row
    store_rows(DK, local, dk_row, left, dk * scale, D, DP)
    DV_OUT += batch * dv_batch + key_head * dv_head + start * dv_row
    store_rows(DV_OUT, local, dv_row, left, dv, DV, DVP)


@triton.jit
def sweep_keys_again(
    dq, sums, q, grad, factor, pull, c, rows, K, V, KEEP, LIST, k_row, v_row, keep_row, keep_key,
    T, end, offset, scaling, steps, first, full_first, full_last,
    MASKED: tl.constexpr, DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """Adds `steps` tiles of keys to dq [BM, DP]."""
    local = tl.arange(0, BN)
    for step in range(0, steps):
        start = tile_at(step, first, full_first, full_last, LIST, MASKED) * BN
        left = end - start
        k = load_rows(K + tl.cast(start, tl.int64) * k_row, local, k_row, left, D, DP, MASKED)
        v = load_rows(V + tl.cast(start, tl.int64) * v_row, local, v_row, left, DV, DVP, MASKED)
        s = scaling * dot(q, tl.trans(k), None, PRECISION)
        w = phi(s, c, DEGREE, COUNT)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        dw = weight_gradient(w, dot(grad, tl.trans(v), None, PRECISION), factor, pull, NORMALIZATION)
        if MASKED:
            keys = start + local
            mask = kept(
                rows[:, None], keys[None, :], T, end, offset, KEEP, keep_row, keep_key, CAUSAL, WINDOW
            )  # fmt: skip
            dw = tl.where(mask, dw, 0.0)
        if SUMMED:
            sums = add_powers(sums, s, dw, COUNT, CP)
        dq = dot((slope(s, c, DEGREE, COUNT) * dw).to(k.dtype), k, dq, PRECISION)
    return dq, sums


@triton.jit(do_not_specialize=["H", "GROUPS", "T", "S", "blocks"])
def query_gradients_kernel(
    Q, K, V, GRAD, DQ, DC, FACTORS, PULLS, C, LENGTHS, KEEP, LISTS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dq_batch, dq_head, dq_row, keep_batch, keep_head, keep_row, keep_key, list_batch, list_head, list_row,
    H, GROUPS, T, S, blocks, scaling,
    DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BM query rows of one head. DQ [B, H, T, D]; the shares of dc to DC [B, H, blocks, COUNT]."""
    # the longest causal rows first
    block = blocks - 1 - tl.program_id(0) % blocks
    batch = tl.cast(tl.program_id(0) // blocks // H, tl.int64)
    head = tl.cast(tl.program_id(0) // blocks % H, tl.int64)
    K += batch * k_batch + head // GROUPS * k_head
    V += batch * v_batch + head // GROUPS * v_head
    local = tl.arange(0, BM)
    rows = block * BM + local
    top = tl.cast(block * BM, tl.int64)
    here = T - block * BM
    q = load_rows(Q + batch * q_batch + head * q_head + top * q_row, local, q_row, here, D, DP, True)
    grad = load_rows(GRAD + batch * g_batch + head * g_head + top * g_row, local, g_row, here, DV, DVP, True)
    if WIDE:
        grad = grad.to(tl.float32)
    row = (batch * H + head) * T + top
    factor = tl.load(FACTORS + row + local, mask=rows < T, other=0.0)[:, None]
    pull = factor
    if PULLS is not None:
        pull = tl.load(PULLS + row + local, mask=rows < T, other=0.0)[:, None]
    c = load_coefficients(C, head, COUNT)
    offset = S - T
    end = S
    if LENGTHS is not None:
        end = tl.cast(tl.minimum(tl.load(LENGTHS + batch), S), tl.int32)
    LIST = None
    if KEEP is not None:
        KEEP += batch * keep_batch + head * keep_head
        LIST = LISTS + batch * list_batch + head * list_head + tl.cast(block, tl.int64) * list_row
        first, full_first, full_last, last = listed_tiles(LIST)
    else:
        first, full_first, full_last, last = key_tiles(block, T, end, offset, CAUSAL, WINDOW, BM, BN)
    full = full_last - full_first
    SUMMED: tl.constexpr = DC is not None
    dq = tl.zeros((BM, DP), tl.float32)
    sums = tl.zeros((BM, CP), tl.float32)
    dq, sums = sweep_keys_again(
        dq, sums, q, grad, factor, pull, c, rows, K, V, KEEP, LIST, k_row, v_row, keep_row, keep_key,
        T, end, offset, scaling, full, first, full_first, full_last,
        False, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, CP, BN, PRECISION, WIDE, SUMMED,
    )  # fmt: skip
    dq, sums = sweep_keys_again(
        dq, sums, q, grad, factor, pull, c, rows, K, V, KEEP, LIST, k_row, v_row, keep_row, keep_key,
        T, end, offset, scaling, last - first - full, first, full_first, full_last,
        True, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, CP, BN, PRECISION, WIDE, SUMMED,
    )  # fmt: skip
    # phi' came without a monomial's degree
    scale = scaling
    if COUNT == 0:
        scale = scaling * DEGREE
    store_rows(DQ + batch * dq_batch + head * dq_head + top * dq_row, local, dq_row, here, dq * scale, D, DP)
    if SUMMED:
        column = tl.arange(0, CP)
        at = DC + ((batch * H + head) * blocks + block) * COUNT
        tl.store(at + column, tl.sum(sums, 0), mask=column < COUNT)
