"""The linear-cost form: a polynomial of q . k is a dot product of features, so keys and values can be summed up once.

With psi the monomials of `monomials.py` and w_f their weights (multiplicity, coefficient; on the side of the queries,
so that any sign works and the sums do not depend on coefficients):

    phi(q_i . k_j) = sum_f w_f psi_f(q_i) psi_f(k_j)
    sum_j phi(q_i . k_j) v_j = sum_f w_f psi_f(q_i) S_f        S_f = sum_j psi_f(k_j) v_j^T       [F, Dv]

A causal row needs the S of the keys up to its own: chunks of rows take what lies before them from S and their own part
from the score matrix of the chunk, [C, C], as usual. Z_i factors out of the sum; "sum" adds a column of ones to the
values, so that S carries sum_j psi(k_j) too. Backward, with g_i the gradient of the sum; all is computed again:

    R_f   = sum_i w_f psi_f(q_i) g_i^T                          over the rows that see the key
    dV_j  = sum_f psi_f(k_j) R_f        dpsi_f(k_j) = R_f . v_j
    dpsi_f(q_i) = w_f S_f . g_i         dc_k = sum over f of degree k of multiplicity_f psi_f(q_i) S_f . g_i

Features exist for one chunk of a few heads at a time. Features and sums are fp32 for 16-bit inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inplace import horner_into, power_into, slope_coefficients
from .monomials import Monomials
from .normalization import EPS, scale_of_total
from .precision import compute_dtype
from .results import like_query, refuse_derivative

# rows and keys of a chunk: the more features, the more of its own score matrix a chunk can afford
CHUNK, LONG_CHUNK, MANY = 128, 256, 256
# features of the chunks at work, in elements: on a CPU they should stay in the last cache
FEATURES = {"cpu": 2**21}
LARGE_FEATURES = 2**27

Here = tuple[int, slice, slice]
"""Batch row, key heads and query heads of a group."""


@dataclass
class Past:
    """What attention needs to know of the keys so far, at a size that does not depend on their number."""

    sums: Tensor
    """S: [B, Hk, F, Dv], or [B, Hk, F, Dv + 1] under normalization "sum"; updated in place."""
    lengths: Tensor
    """Kept keys: [B], integers; updated in place."""


def new_past(key: Tensor, value: Tensor, *, degree: int, has_coefficients: bool, normalization: str | float) -> Past:
    """An empty past for key [B, Hk, S, D] and value [B, Hk, S, Dv]."""
    features = Monomials.of_polynomial(key.shape[-1], degree, has_coefficients).count
    shape = (*key.shape[:2], features, value.shape[-1] + (normalization == "sum"))
    sums = torch.zeros(shape, dtype=compute_dtype(key), device=key.device)
    return Past(sums, torch.zeros(key.shape[0], dtype=torch.int64, device=key.device))


def recurrent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    coefficients: Tensor | None,
    normalization: str | float,
    scaling: float,
    is_causal: bool = False,
    key_keep: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """As `naive_attention` for phi(s) = s^degree, or sum_k c_k s^k with coefficients [H, p + 1]; no gain, no weights.

    Args:
        query: [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv], any strides.
        normalization: "sqrt_length", "length", "sum", "none" or a constant.
        key_keep: bool [B or 1, S], True = rows may attend to that key.
        past: keys before these, which every row attends to; takes these in. Without gradients, and for S = T.
    Returns:
        [B, H, T, Dv] in fp32 (fp64 for fp64 inputs), laid out in memory as the query is.
    Raises:
        RuntimeError: in the backward pass of the backward pass, and for a past where gradients are wanted.
    """
    if coefficients is not None:
        coefficients = coefficients.to(compute_dtype(query))
    key_keep = None if key_keep is None else key_keep.to(query.device)
    wants_sum = normalization == "sum"
    lengths = None if wants_sum else row_lengths(query, key, is_causal, key_keep)
    options = Options(degree, scaling, is_causal, wants_sum)
    if past is None:
        out = RecurrentAttention.apply(query, key, value, coefficients, key_keep, options)
    else:
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, coefficients)
        ):
            raise RuntimeError("a past has no gradients: decode under torch.no_grad(), train without a cache")
        scan = Scan(query, key, value, coefficients, key_keep, options)
        out = (_step if query.shape[2] == 1 else _forward)(scan, past)
        lengths = None if lengths is None else lengths + past.lengths.view(-1, 1, 1, 1)
        past.lengths += key.shape[2] if key_keep is None else key_keep.sum(-1)
    if lengths is None:
        return out[..., :-1] / (EPS + out[..., -1:])
    scale = scale_of_total(lengths.to(out.dtype), normalization)
    return out if isinstance(scale, float) and scale == 1 else out / scale


def row_lengths(query: Tensor, key: Tensor, is_causal: bool, key_keep: Tensor | None) -> Tensor:
    """Kept keys of each row among `key`: [B or 1, 1, T or 1, 1]."""
    (queries, keys), device = (query.shape[2], key.shape[2]), query.device
    if key_keep is None:
        seen = torch.arange(1, queries + 1, device=device) + (keys - queries) if is_causal else [keys]
        return torch.as_tensor(seen, device=device).clamp(min=0).view(1, 1, -1, 1)
    if not is_causal:
        return key_keep.sum(-1).view(-1, 1, 1, 1)
    total = torch.nn.functional.pad(key_keep.cumsum(-1), (max(0, queries - keys), 0))
    return total[:, None, total.shape[1] - queries :, None]


@torch.no_grad()
def absorb(
    past: Past, key: Tensor, value: Tensor, *, degree: int, has_coefficients: bool, key_keep: Tensor | None = None
) -> None:
    """Takes keys [B, Hk, S, D] and values into a past, without any query."""
    monomials = Monomials.of_polynomial(key.shape[-1], degree, has_coefficients)
    has_ones = past.sums.shape[-1] > value.shape[-1]
    scan = Scan(key[:, :, :0], key, value, None, key_keep, Options(degree, 1.0, False, has_ones), monomials)
    for batch, key_heads, _ in scan.groups():
        for columns in scan.chunks(0, key.shape[2]):
            k, v = scan.keys(batch, key_heads, columns)
            past.sums[batch, key_heads].baddbmm_(scan.features(k), v)
    past.lengths += key.shape[2] if key_keep is None else key_keep.sum(-1)


@dataclass(frozen=True)
class Options:
    """The arguments that are not tensors. degree: not read with coefficients. has_ones: of the values, one column."""

    degree: int
    scaling: float
    is_causal: bool
    has_ones: bool


class Scan:
    """One call's features, and how its rows and keys are cut; see `recurrent_attention` for the shapes."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coefficients: Tensor | None,
        key_keep: Tensor | None,
        options: Options,
        monomials: Monomials | None = None,
    ) -> None:
        self.query, self.key, self.value, self.key_keep = query, key, value, key_keep
        self.coefficients, self.options = coefficients, options
        self.dtype = compute_dtype(query)
        self.group = query.shape[1] // key.shape[1]
        degree = options.degree if coefficients is None else coefficients.shape[1] - 1
        self.monomials = monomials or Monomials.of_polynomial(key.shape[-1], degree, coefficients is not None)
        self.width = value.shape[-1] + options.has_ones
        self.chunk = LONG_CHUNK if self.monomials.count > MANY else CHUNK
        queries, keys = query.shape[2], key.shape[2]
        # rows from `skip` on stand at the keys from `shared` on; all rows see the keys before
        self.skip = max(0, queries - keys) if options.is_causal else 0
        self.shared = max(0, keys - queries) if options.is_causal else keys

    def groups(self) -> Iterator[Here]:
        batch, key_heads = self.key.shape[:2]
        most = FEATURES.get(self.key.device.type, LARGE_FEATURES)
        together = max(1, most // (self.monomials.count * self.group * self.chunk))
        for b in range(batch):
            for h in range(0, key_heads, together):
                top = min(h + together, key_heads)
                yield b, slice(h, top), slice(h * self.group, top * self.group)

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        for i in range(start, stop, self.chunk):
            yield slice(i, min(i + self.chunk, stop))

    def row_chunks(self) -> list[tuple[slice, slice | None]]:
        """(rows, the keys that stand at these rows), None where rows see all keys."""
        rows = list(self.chunks(self.skip, self.query.shape[2]))
        shift = self.shared - self.skip
        return [(r, slice(r.start + shift, r.stop + shift) if self.options.is_causal else None) for r in rows]

    def rows(self, x: Tensor, batch: int, heads: slice, rows: slice) -> Tensor:
        """Rows of [B, H, T, .] as [key heads, group * C, .], a copy in the compute dtype."""
        part = x[batch, heads, rows]
        out = torch.empty(part.shape, dtype=self.dtype, device=part.device).copy_(part)
        return out.view(-1, self.group * part.shape[1], part.shape[2])

    def queries(self, batch: int, heads: slice, rows: slice) -> Tensor:
        return self.rows(self.query, batch, heads, rows).mul_(self.options.scaling)

    def keys(self, batch: int, key_heads: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """[key heads, C, D] and [key heads, C, width], zero where masked."""
        k, part = self.key[batch, key_heads, columns].to(self.dtype), self.value[batch, key_heads, columns]
        v = torch.ones(*part.shape[:2], self.width, dtype=self.dtype, device=part.device)
        v[..., : part.shape[-1]] = part
        if self.key_keep is None:
            return k, v
        masked = ~self.kept(batch, columns)
        return k.masked_fill(masked, 0), v.masked_fill_(masked, 0)

    def kept(self, batch: int, columns: slice) -> Tensor:
        """[C, 1]"""
        assert self.key_keep is not None
        return self.key_keep[batch if self.key_keep.shape[0] > 1 else 0, columns, None]

    def new_sums(self, key_heads: slice) -> Tensor:
        size = (key_heads.stop - key_heads.start, self.monomials.count, self.width)
        return torch.zeros(size, dtype=self.dtype, device=self.key.device)

    def features(self, x: Tensor) -> Tensor:
        """[n, C, D] -> [n, F, C]"""
        return self.monomials.of(x.transpose(1, 2).contiguous())

    def weights(self, heads: slice) -> Tensor:
        """What the features of queries are multiplied by: [key heads or 1, F, group or 1, 1]."""
        mine = None if self.coefficients is None else self.coefficients[heads]
        return self._per_head(self.monomials.weights(mine, self.key.new_empty(0, dtype=self.dtype)))

    def _per_head(self, x: Tensor) -> Tensor:
        """[F, H] -> [key heads, F, group, 1]"""
        return x.unflatten(1, (-1, self.group if x.shape[1] > 1 else 1)).transpose(0, 1)[..., None]

    def weigh(self, features: Tensor, weights: Tensor) -> Tensor:
        """Features of queries [n, F, group * C], in place."""
        features.view(*features.shape[:2], self.group, -1).mul_(weights)
        return features

    def phi(self, scores: Tensor, heads: slice) -> Tensor:
        """phi of a chunk's own scores, as [1, query heads, C, C], 0 above the diagonal."""
        tile = square(scores)
        out = torch.empty_like(tile)
        if self.coefficients is None:
            power_into(out, tile, self.options.degree)
        else:
            horner_into(out, tile, self.coefficients[heads])
        return out.tril_()

    def slope(self, scores: Tensor, heads: slice) -> Tensor:
        """phi' of the same."""
        tile = square(scores)
        out = torch.empty_like(tile)
        if self.coefficients is not None:
            return horner_into(out, tile, slope_coefficients(self.coefficients)[heads])
        degree = self.options.degree
        return out.fill_(1) if degree == 1 else power_into(out, tile, degree - 1).mul_(degree)


def square(scores: Tensor) -> Tensor:
    """[key heads, group * C, C] seen as [1, query heads, C, C]."""
    return scores.view(1, -1, scores.shape[-1], scores.shape[-1])


class RecurrentAttention(torch.autograd.Function):
    """sum_j phi(s_ij) v_j [B, H, T, Dv], and sum_j phi(s_ij) in one more column where values get a column of ones."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coefficients: Tensor | None,
        key_keep: Tensor | None,
        options: Options,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, coefficients, key_keep)
        ctx.options = options
        return _forward(Scan(query, key, value, coefficients, key_keep, options))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.no_grad():
            query, key, value, coefficients, key_keep = ctx.saved_tensors
            scan = Scan(query, key, value, coefficients, key_keep, ctx.options)
            grads = _backward(grad, ctx.needs_input_grad, scan)
        if torch.is_grad_enabled():
            grads = refuse_derivative("recurrent", grads, (grad, query, key, value, coefficients))
        return (*grads, None, None)


def _forward(scan: Scan, past: Past | None = None) -> Tensor:
    out = like_query(scan.query, scan.width, scan.dtype)
    out[:, :, : scan.skip] = 0
    chunks = scan.row_chunks()
    for here in scan.groups():
        batch, key_heads, heads = here
        sums = scan.new_sums(key_heads) if past is None else past.sums[batch, key_heads]
        for columns in scan.chunks(0, scan.shared):
            k, v = scan.keys(batch, key_heads, columns)
            sums.baddbmm_(scan.features(k), v)
        weights = scan.weights(heads)
        for index, (rows, own) in enumerate(chunks):
            q = scan.queries(batch, heads, rows)
            if index or scan.shared or past is not None:
                o = scan.weigh(scan.features(q), weights).transpose(1, 2) @ sums
            else:
                o = q.new_zeros(*q.shape[:2], scan.width)
            if own is not None:
                k, v = scan.keys(batch, key_heads, own)
                o.baddbmm_(scan.phi(q @ k.transpose(1, 2), heads).view(*q.shape[:2], -1), v)
                if index + 1 < len(chunks) or past is not None:
                    sums.baddbmm_(scan.features(k), v)
            out[batch, heads, rows] = o.view(-1, rows.stop - rows.start, scan.width)
    return out


def _step(scan: Scan, past: Past) -> Tensor:
    """`_forward` for one new row that attends to its own key: all heads of all batch rows at once."""
    batch, heads, _, dim = scan.query.shape
    key_heads, kept = scan.key.shape[1], None if scan.key_keep is None else scan.key_keep[:, None, :, None]
    k = scan.key.to(scan.dtype)
    v = torch.ones(batch, key_heads, 1, scan.width, dtype=scan.dtype, device=k.device)
    v[..., : scan.value.shape[-1]] = scan.value
    if kept is not None:
        k, v = k.masked_fill(~kept, 0), v.masked_fill_(~kept, 0)
    q = (scan.query.to(scan.dtype) * scan.options.scaling).view(batch, key_heads, scan.group, dim)
    features = scan.monomials.of(torch.cat([q, k], dim=2).flatten(0, 1).transpose(1, 2).contiguous())
    sums = past.sums.flatten(0, 1)
    torch.addcmul(sums, features[..., -1:], v.flatten(0, 1), out=sums)
    of_query = features[..., :-1].unflatten(0, (batch, key_heads)) * scan.weights(slice(0, heads))[..., 0]
    out = of_query.flatten(0, 1).transpose(1, 2) @ sums
    return out.view(batch, heads, 1, scan.width)


def _backward(grad: Tensor, needs: tuple[bool, ...], scan: Scan) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and coefficients; names as in the head of this file."""
    query, key, value, coefficients = scan.query, scan.key, scan.value, scan.coefficients
    dq, dk, dv = (
        torch.zeros_like(query) if scan.skip else torch.empty_like(query),
        *map(torch.empty_like, (key, value)),
    )
    dc = torch.zeros_like(coefficients) if coefficients is not None and needs[3] else None
    for here in scan.groups():
        batch, key_heads, _ = here
        keys = (key_heads.stop - key_heads.start, key.shape[2])
        dk_group = torch.zeros(*keys, key.shape[3], dtype=scan.dtype, device=key.device)
        dv_group = torch.zeros(*keys, scan.width, dtype=scan.dtype, device=key.device)
        _of_rows(scan, here, grad, dq, dk_group, dv_group, dc)
        if needs[1] or needs[2]:
            _of_keys(scan, here, grad, dk_group, dv_group)
        if scan.key_keep is not None:
            dv_group.masked_fill_(~scan.kept(batch, slice(0, keys[1])), 0)
        dk[batch, key_heads], dv[batch, key_heads] = dk_group, dv_group[..., : value.shape[-1]]
    return dq, dk, dv, dc


def _of_rows(scan: Scan, here: Here, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dc: Tensor | None) -> None:
    """Gradients of one group that need S: dq, dc, and what chunks do to their own keys."""
    batch, key_heads, heads = here
    sums, weights = scan.new_sums(key_heads), scan.weights(heads)
    for columns in scan.chunks(0, scan.shared):
        k, v = scan.keys(batch, key_heads, columns)
        sums.baddbmm_(scan.features(k), v)
    for index, (rows, own) in enumerate(scan.row_chunks()):
        q, g = scan.queries(batch, heads, rows), scan.rows(grad, batch, heads, rows)
        dq_rows = torch.zeros_like(q)
        if index or scan.shared:
            q_turned, dfeatures = q.transpose(1, 2).contiguous(), sums @ g.transpose(1, 2)
            if dc is not None:
                products = scan.monomials.of(q_turned).mul_(dfeatures).unflatten(2, (scan.group, -1)).sum(-1)
                dc[heads] += scan.monomials.by_degree(products.transpose(0, 1).flatten(1))
            dq_rows += scan.monomials.gradient(q_turned, scan.weigh(dfeatures, weights)).transpose(1, 2)
        if own is not None:
            k, v = scan.keys(batch, key_heads, own)
            scores = q @ k.transpose(1, 2)
            dv[:, own].baddbmm_(scan.phi(scores, heads).view_as(scores).transpose(1, 2), g)
            dw = square(g @ v.transpose(1, 2)).tril_()
            ds = scan.slope(scores, heads).mul_(dw).view_as(scores)
            dq_rows.baddbmm_(ds, k)
            dk[:, own].baddbmm_(ds.transpose(1, 2), q)
            if dc is not None:
                for power in range(dc.shape[1]):
                    dc[heads, power] += (dw.mul_(square(scores)) if power else dw).sum((0, 2, 3))
            sums.baddbmm_(scan.features(k), v)
        dq[batch, heads, rows] = dq_rows.mul_(scan.options.scaling).view(-1, rows.stop - rows.start, q.shape[2])


def _of_keys(scan: Scan, here: Here, grad: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Adds what later rows do to the keys of one group, through R."""
    batch, key_heads, heads = here
    received, weights = scan.new_sums(key_heads), scan.weights(heads)

    def of_columns(columns: slice) -> None:
        k, v = scan.keys(batch, key_heads, columns)
        k_turned = k.transpose(1, 2).contiguous()
        dv[:, columns].baddbmm_(scan.monomials.of(k_turned).transpose(1, 2), received)
        dk[:, columns] += scan.monomials.gradient(k_turned, received @ v.transpose(1, 2)).transpose(1, 2)

    for rows, own in reversed(scan.row_chunks()):
        if own is not None:
            of_columns(own)
        features = scan.weigh(scan.features(scan.queries(batch, heads, rows)), weights)
        received.baddbmm_(features, scan.rows(grad, batch, heads, rows))
    for columns in scan.chunks(0, scan.shared):
        of_columns(columns)
