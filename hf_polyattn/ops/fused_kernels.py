"""The Triton kernels of the forward pass: one for many queries, two for a few against a long cache, one for masks.

    s_ij = scaling q_i . k_j,  w_ij = keep_ij phi(s_ij),  o_i = gain / z_i sum_j w_ij v_j

Nothing needs a row's maximum, so partial sums of different keys simply add: a block of rows is one sweep, and the
decoding step shares a cache out to many programs without any rescaling. Scores, powers and sums are fp32. The
weights are rounded for their product with the values: to bf16 for bf16 inputs; for fp16 inputs, whose range s^p
leaves early, that product runs on fp32 operands in tf32, which has fp16's mantissa and fp32's range.
"""

import triton
import triton.language as tl

from .fused_tiles import (
    L1,
    L2,
    LENGTH,
    SUM,
    divisor,
    dot,
    kept,
    key_tiles,
    listed_tiles,
    load_coefficients,
    load_rows,
    phi,
    row_lengths,
    store_rows,
    tile_at,
)


@triton.jit
def add_statistic(total, w, mask, NORMALIZATION: tl.constexpr, COUNTED: tl.constexpr):
    """total += this tile's part of the row statistic."""
    if NORMALIZATION == SUM:
        total += tl.sum(w, 1)
    elif NORMALIZATION == L1:
        total += tl.sum(tl.abs(w), 1)
    elif NORMALIZATION == L2:
        total += tl.sum(w * w, 1)
    elif COUNTED and NORMALIZATION <= LENGTH:
        total += tl.sum(mask.to(tl.float32), 1)
    return total


@triton.jit
def sweep_keys(
    acc, total, q, c, rows, K, V, KEEP, LIST, key_stride, value_stride, keep_row, keep_key, T, end, offset, scaling,
    steps, first, full_first, full_last,
    MASKED: tl.constexpr, DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds `steps` tiles of keys to acc [BM, DVP] and to the row statistic total [BM]."""
    local = tl.arange(0, BN)
    for step in range(0, steps):
        start = tile_at(step, first, full_first, full_last, LIST, MASKED) * BN
        left = end - start
        k = load_rows(K + tl.cast(start, tl.int64) * key_stride, local, key_stride, left, D, DP, MASKED)
        v = load_rows(V + tl.cast(start, tl.int64) * value_stride, local, value_stride, left, DV, DVP, MASKED)
        s = scaling * dot(q, tl.trans(k), None, PRECISION)
        w = phi(s, c, DEGREE, COUNT)
        mask = tl.full((BM, BN), True, tl.int1)
        if MASKED:
            keys = start + local
            mask = kept(
                rows[:, None], keys[None, :], T, end, offset, KEEP, keep_row, keep_key, CAUSAL, WINDOW
            )  # fmt: skip
            w = tl.where(mask, w, 0.0)
        total = add_statistic(total, w, mask, NORMALIZATION, KEEP is not None)
        if WIDE:
            v = v.to(tl.float32)
        acc = dot(w.to(v.dtype), v, acc, PRECISION)
    return acc, total


@triton.jit(do_not_specialize=["H", "GROUPS", "T", "S", "blocks"])
def forward_kernel(
    Q, K, V, OUT, DIVISORS, C, GAIN, LENGTHS, KEEP, LISTS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    keep_batch, keep_head, keep_row, keep_key, list_batch, list_head, list_row,
    H, GROUPS, T, S, blocks, scaling, constant,
    DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BM query rows of one head. OUT [B, H, T, DV]; DIVISORS [B, H, T], the z_i."""
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
    acc = tl.zeros((BM, DVP), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc, total = sweep_keys(
        acc, total, q, c, rows, K, V, KEEP, LIST, k_row, v_row, keep_row, keep_key, T, end, offset, scaling,
        full, first, full_first, full_last,
        False, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, BM, BN, PRECISION, WIDE,
    )  # fmt: skip
    acc, total = sweep_keys(
        acc, total, q, c, rows, K, V, KEEP, LIST, k_row, v_row, keep_row, keep_key, T, end, offset, scaling,
        last - first - full, first, full_first, full_last,
        True, DEGREE, COUNT, NORMALIZATION, CAUSAL, WINDOW, D, DV, DP, DVP, BM, BN, PRECISION, WIDE,
    )  # fmt: skip
    if KEEP is None and NORMALIZATION <= LENGTH:
        total = row_lengths(rows, end, offset, CAUSAL, WINDOW)
    z = divisor(total, constant, NORMALIZATION)
    factor = 1.0 / z
    if GAIN is not None:
        factor *= tl.load(GAIN + head)
    row = (batch * H + head) * T + top
    tl.store(DIVISORS + row + local, z, mask=rows < T)
    OUT += batch * o_batch + head * o_head + top * o_row
    store_rows(OUT, local, o_row, here, acc * factor[:, None], DV, DVP)


@triton.jit(do_not_specialize=["HK", "GROUPS", "T", "S", "row_blocks", "splits", "tiles"])
def decode_kernel(
    Q, K, V, PARTS, TOTALS, C, LENGTHS, KEEP,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    keep_batch, keep_head, keep_row, keep_key,
    HK, GROUPS, T, S, row_blocks, splits, tiles, scaling,
    DEGREE: tl.constexpr, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a share of `tiles` tiles of keys for BM rows of a group of query heads, heads below one another.

    PARTS [splits, B, H, T, DV] and TOTALS [splits, B, H, T], fp32: sums over the keys of the share.
    """
    split = tl.program_id(0) % splits
    row_block = tl.program_id(0) // splits % row_blocks
    batch = tl.cast(tl.program_id(0) // splits // row_blocks // HK, tl.int64)
    key_head = tl.cast(tl.program_id(0) // splits // row_blocks % HK, tl.int64)
    K += batch * k_batch + key_head * k_head
    V += batch * v_batch + key_head * v_head
    packed = row_block * BM + tl.arange(0, BM)
    there = packed < GROUPS * T
    # an index beyond the last row would be masked below all the same; T makes it read as outside
    rows = tl.where(there, packed % T, T)
    heads = tl.where(there, key_head * GROUPS + packed // T, 0)
    columns = tl.arange(0, DP)
    at = Q + batch * q_batch + (heads * q_head + rows.to(tl.int64) * q_row)[:, None] + columns[None, :]
    q = tl.load(at, mask=there[:, None] & (columns < D)[None, :], other=0.0)
    c = load_coefficients(C, heads[:, None], COUNT)
    offset = S - T
    end = S
    if LENGTHS is not None:
        end = tl.cast(tl.minimum(tl.load(LENGTHS + batch), S), tl.int32)
    if KEEP is not None:
        KEEP += batch * keep_batch + (heads * keep_head)[:, None]

    low = 0
    if WINDOW > 0:
        low = tl.maximum(offset - WINDOW + 1, 0) // BN
    first = tl.maximum(split * tiles, low)
    last = tl.minimum(split * tiles + tiles, tl.cdiv(end, BN))
    local = tl.arange(0, BN)
    acc = tl.zeros((BM, DVP), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for tile in range(first, last):
        start = tile * BN
        keys = start + local
        mask = kept(rows[:, None], keys[None, :], T, end, offset, KEEP, keep_row, keep_key, CAUSAL, WINDOW)
        # keys that no row keeps are not read: most of a static cache
        wanted = tl.max(mask.to(tl.int32), 0) > 0
        k_at = K + tl.cast(start, tl.int64) * k_row + local[:, None] * k_row + columns[None, :]
        k = tl.load(k_at, mask=wanted[:, None] & (columns < D)[None, :], other=0.0)
        value_columns = tl.arange(0, DVP)
        v_at = V + tl.cast(start, tl.int64) * v_row + local[:, None] * v_row + value_columns[None, :]
        v = tl.load(v_at, mask=wanted[:, None] & (value_columns < DV)[None, :], other=0.0)
        s = scaling * dot(q, tl.trans(k), None, PRECISION)
        w = tl.where(mask, phi(s, c, DEGREE, COUNT), 0.0)
        total = add_statistic(total, w, mask, NORMALIZATION, True)
        if WIDE:
            v = v.to(tl.float32)
        acc = dot(w.to(v.dtype), v, acc, PRECISION)
    batches = tl.num_programs(0) // splits // row_blocks // HK
    row = ((split * batches + batch) * HK * GROUPS + heads) * T + rows
    tl.store(TOTALS + row, total, mask=there)
    value_columns = tl.arange(0, DVP)
    inside = there[:, None] & (value_columns < DV)[None, :]
    tl.store(PARTS + row[:, None] * DV + value_columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["H", "T", "splits", "all_rows"])
def reduce_kernel(
    PARTS, TOTALS, OUT, DIVISORS, GAIN, o_batch, o_head, o_row, H, T, splits, all_rows, constant,
    NORMALIZATION: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One program: one row of the output, from its parts in fixed order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DVP)
    acc = tl.zeros((DVP,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for split in range(0, splits):
        at = row + tl.cast(split, tl.int64) * all_rows
        total += tl.load(TOTALS + at)
        acc += tl.load(PARTS + at * DV + columns, mask=columns < DV, other=0.0)
    z = divisor(total, constant, NORMALIZATION)
    factor = 1.0 / z
    head = row // T % H
    if GAIN is not None:
        factor *= tl.load(GAIN + head)
    tl.store(DIVISORS + row, z)
    OUT += row // T // H * o_batch + head * o_head + row % T * o_row
    tl.store(OUT + columns, (acc * factor).to(OUT.dtype.element_ty), mask=columns < DV)


@triton.jit(do_not_specialize=["HEADS", "T", "S", "row_blocks", "key_blocks"])
def kinds_kernel(
    KEEP, LENGTHS, KINDS, keep_batch, keep_head, keep_row, keep_key, HEADS, T, S, row_blocks, key_blocks,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: the kind of one tile of the keep mask, 0 empty, 1 mixed, 2 full; KINDS [., HEADS, rows, keys]."""
    tile = tl.program_id(0)
    key_block = tile % key_blocks
    row_block = tile // key_blocks % row_blocks
    head = tl.cast(tile // key_blocks // row_blocks % HEADS, tl.int64)
    batch = tl.cast(tile // key_blocks // row_blocks // HEADS, tl.int64)
    end = S
    if LENGTHS is not None:
        end = tl.cast(tl.minimum(tl.load(LENGTHS + batch), S), tl.int32)
    rows = (row_block * BM + tl.arange(0, BM))[:, None]
    keys = (key_block * BN + tl.arange(0, BN))[None, :]
    KEEP += batch * keep_batch + head * keep_head
    mask = kept(rows, keys, T, end, S - T, KEEP, keep_row, keep_key, CAUSAL, WINDOW)
    count = tl.sum(tl.sum(mask.to(tl.int32), 1), 0)
    tl.store(KINDS + tile, ((count > 0).to(tl.int32) + (count == BM * BN).to(tl.int32)).to(tl.int8))
