"""What the Triton kernels share: products, phi and its slope, the keep mask, and which tiles have work to do.

A tile is a block of query rows against a block of keys. Three kinds: empty (skipped), mixed (masked element by
element) and full (no mask is looked at). Without a keep mask the kinds follow from the indices alone; with one, the
host hands over a list of tiles for each block, the full ones first (`fused_masks`).
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# codes of the normalizations, those of `cpu.NORMALIZATIONS` and `cpu.CONSTANT`; up to LENGTH they count keys
SQRT_LENGTH = tl.constexpr(0)
LENGTH = tl.constexpr(1)
SUM = tl.constexpr(2)
L1 = tl.constexpr(3)
L2 = tl.constexpr(4)
EPS = tl.constexpr(1e-6)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc with fp32 sums. PRECISION: how fp32 operands are multiplied; 16-bit ones are multiplied exactly."""
    if INTERPRETED:
        # the interpreter would multiply the raw bits of bf16, so the product of a GPU is not what it tests there
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(X, rows, stride, limit, SIZE: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of X [., SIZE] as [rows, PADDED], zeros beyond SIZE and, if BOUNDED, from row `limit` on."""
    columns = tl.arange(0, PADDED)
    at = X + rows[:, None] * stride + columns[None, :]
    if BOUNDED:
        return tl.load(at, mask=(rows < limit)[:, None] & (columns < SIZE)[None, :], other=0.0)
    elif SIZE < PADDED:
        return tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(X, rows, stride, limit, x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = (rows < limit)[:, None] & (columns < SIZE)[None, :]
    tl.store(X + rows[:, None] * stride + columns[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def power(s, N: tl.constexpr):
    """s^N by squaring."""
    out = s
    square = s
    for bit in tl.static_range(8):
        if (N >> bit) & 1:
            if N & ((1 << bit) - 1):
                out = out * square
            else:
                out = square
        if N >> (bit + 1):
            square = square * square
    if N == 0:
        out = tl.full(s.shape, 1.0, tl.float32)
    return out


@triton.jit
def load_coefficients(C, head, COUNT: tl.constexpr):
    """(c_0, ..., c_p) of a head, or of a head for each row; () for a monomial."""
    c = ()
    for k in tl.static_range(COUNT):
        c = c + (tl.load(C + head * COUNT + k),)  # type: ignore[assignment]  # noqa: RUF005  Triton unpacks no star
    return c


@triton.jit
def phi(s, c, DEGREE: tl.constexpr, COUNT: tl.constexpr):
    if COUNT == 0:
        return power(s, DEGREE)
    else:
        w = tl.zeros_like(s) + c[COUNT - 1]
        for k in tl.static_range(1, COUNT):
            w = w * s + c[COUNT - 1 - k]
        return w


@triton.jit
def slope(s, c, DEGREE: tl.constexpr, COUNT: tl.constexpr):
    """phi'(s), that of a monomial over its degree: that factor rides on the sums.

    Apart from `phi`, although they share terms: both at once need more registers than there are.
    """
    if COUNT == 0:
        return power(s, DEGREE - 1)
    elif COUNT == 1:
        return tl.zeros_like(s)
    else:
        out = tl.zeros_like(s) + (COUNT - 1) * c[COUNT - 1]
        for k in tl.static_range(2, COUNT):
            out = out * s + (COUNT - k) * c[COUNT - k]
        return out


@triton.jit
def weight_gradient(w, grad, factor, pull, NORMALIZATION: tl.constexpr):
    """dw = factor * (dO . v) - pull * dZ/dw, both [rows] made to broadcast; see `tiled.py`."""
    dw = grad * factor
    if NORMALIZATION == SUM:
        dw -= pull
    elif NORMALIZATION == L1:
        dw -= tl.where(w > 0, pull, tl.where(w < 0, -pull, 0.0))
    elif NORMALIZATION == L2:
        dw -= w * pull
    return dw


@triton.jit
def add_powers(sums, s, dw, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """sums[:, k] += sum over the second axis of s^k dw: the gradient of c_k."""
    column = tl.arange(0, PADDED)[None, :]
    for k in tl.static_range(COUNT):
        sums += tl.where(column == k, tl.sum(dw, 1)[:, None], 0.0)
        dw = dw * s
    return sums


@triton.jit
def kept(rows, keys, T, end, offset, KEEP, row_stride, key_stride, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The keep mask of a tile; rows and keys are indices that broadcast to its shape, False outside of it.

    end: number of keys of this batch row. offset: S - T, what lies before the first query.
    """
    out = (rows < T) & (keys < end)
    if KEEP is not None:
        at = KEEP + rows.to(tl.int64) * row_stride + keys.to(tl.int64) * key_stride
        out = out & (tl.load(at, mask=out, other=0) != 0)
    if CAUSAL:
        out = out & (keys <= rows + offset)
    if WINDOW > 0:
        out = out & (keys > rows + offset - WINDOW) & (keys < rows + offset + WINDOW)
    return out


@triton.jit
def row_lengths(rows, end, offset, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The number of keys that each row keeps where there is no keep mask."""
    first = rows * 0
    last = first + end
    if WINDOW > 0:
        first = tl.maximum(first, rows + offset - WINDOW + 1)
        last = tl.minimum(last, rows + offset + WINDOW)
    if CAUSAL:
        last = tl.minimum(last, rows + offset + 1)
    return tl.maximum(last - first, 0).to(tl.float32)


@triton.jit
def divisor(total, constant, NORMALIZATION: tl.constexpr):
    """Z from the statistic of a whole row; see `normalization.py`."""
    if NORMALIZATION == SQRT_LENGTH:
        return tl.sqrt(tl.maximum(total, 1.0))
    elif NORMALIZATION == LENGTH:
        return tl.maximum(total, 1.0)
    elif NORMALIZATION == L2:
        return tl.sqrt(total + EPS)
    elif NORMALIZATION < L2:
        return total + EPS
    else:
        return total * 0.0 + constant


@triton.jit
def key_tiles(block, T, end, offset, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(first, full from, full to, last) tiles of keys for a block of query rows, ends exclusive."""
    top = block * BM + offset
    bottom = tl.minimum(block * BM + BM, T) - 1 + offset
    low = 0
    high = end
    full_low = 0
    full_high = end
    if CAUSAL:
        high = tl.minimum(high, bottom + 1)
        full_high = tl.minimum(full_high, top + 1)
    if WINDOW > 0:
        low = tl.maximum(low, top - WINDOW + 1)
        high = tl.minimum(high, bottom + WINDOW)
        full_low = tl.maximum(full_low, bottom - WINDOW + 1)
        full_high = tl.minimum(full_high, top + WINDOW)
    return _in_tiles(low, high, full_low, full_high, BN)


@triton.jit
def row_tiles(block, T, end, offset, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(first, full from, full to, last) tiles of query rows for a block of keys, ends exclusive."""
    left = block * BN - offset
    right = tl.minimum(block * BN + BN, end) - 1 - offset
    low = 0
    high = T
    full_low = 0
    full_high = T
    if CAUSAL:
        low = tl.maximum(low, left)
        full_low = tl.maximum(full_low, right)
    if WINDOW > 0:
        low = tl.maximum(low, left - WINDOW + 1)
        high = tl.minimum(high, right + WINDOW)
        full_low = tl.maximum(full_low, right - WINDOW + 1)
        full_high = tl.minimum(full_high, left + WINDOW)
    if block * BN + BN > end:
        full_high = 0
    if block * BN >= end:
        high = 0
    return _in_tiles(low, high, full_low, full_high, BM)


@triton.jit
def _in_tiles(low, high, full_low, full_high, SIZE: tl.constexpr):
    high = tl.maximum(high, 0)
    low = tl.minimum(low, high)
    first = low // SIZE
    last = tl.cdiv(high, SIZE)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_low, SIZE), first), last)
    full_last = tl.minimum(tl.maximum(tl.maximum(full_high, 0) // SIZE, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def listed_tiles(LIST):
    """What `key_tiles` says, from a list [full tiles, mixed tiles, their indices]."""
    full = tl.load(LIST)
    return 0, 0, full, full + tl.load(LIST + 1)


@triton.jit
def tile_at(step, first, full_first, full_last, LIST, MASKED: tl.constexpr):
    """Index of the step-th full tile, or, if MASKED, of the step-th mixed one."""
    if LIST is not None:
        if MASKED:
            return tl.load(LIST + 2 + full_last + step)
        else:
            return tl.load(LIST + 2 + step)
    elif MASKED:
        # the mixed ones lie on both sides of the full ones
        return first + step + tl.where(step < full_first - first, 0, full_last - full_first)
    else:
        return full_first + step
