"""What is measured of each head, and how it is summed up over blocks of rows.

Rows that keep no key, and rows of padding, do not count. N is the number of rows that do, over all sequences.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..ops import rms_normalize
from ..ops.masks import build_keep
from ..ops.precision import compute_dtype
from .row_map import RowMap

DEAD_SLOPE = 0.1
"""A score is dead where |n_i da_ij/ds_ij| stays below this. n_i da_ij/ds_ij is 1 for softmax over equal keys (up to
1/n), and gain * alpha * phi'(x) under "length": moved by 1, a dead score moves its weight by less than a tenth of an
even share."""
FP16_MAX = torch.finfo(torch.float16).max
BLOCK = 2**21
"""Scores that are held at a time, over all sequences and heads."""

STATISTICS = {
    "frobenius": "‖A‖_F / sqrt(N)",
    "jacobian": "‖da/ds‖_F / sqrt(N), from the scores of a row to its weights",
    "row_sum": "mean of sum_j a_ij over the rows",
    "row_sum_std": "standard deviation of sum_j a_ij over the rows",
    "effective_keys": "mean of (sum_j |a_ij|)^2 / sum_j a_ij^2: as many keys of equal weight spread as much",
    "score_mean": "mean of the scores that are kept",
    "score_spread": "root mean square of the scores that are kept",
    "score_min": "smallest score",
    "score_max": "largest score",
    "dead_share": f"share of kept scores with |n_i da_ij/ds_ij| < {DEAD_SLOPE}",
    "output_rms": "root mean square of the output of the head",
    "fp16_octaves": "log2(65504 / largest absolute score, weight or output): doublings left before float16 overflows",
}
GRADIENTS = {
    "query_gradient": "‖d loss/d q‖_F, root mean square over the batches",
    "key_gradient": "‖d loss/d k‖_F; where heads share keys, each of them has its group's",
    "value_gradient": "‖d loss/d v‖_F, the same way",
}

# a sum per head and row block; the order is that of `_sums`
_SUMS = ("rows", "energy", "jacobian", "row_sum", "row_square", "effective", "score", "score_square", "kept", "dead")


class HeadSums:
    """Running sums of one attention module.

    parts: the row map of each group of heads; the groups together are all heads of the module.
    """

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], RowMap]]) -> None:
        self.parts = [(torch.tensor(heads), row_map) for heads, row_map in parts]
        self.heads = sum(len(heads) for heads, _ in parts)
        self._sums = torch.zeros(len(_SUMS), self.heads, dtype=torch.float64)
        self._output = torch.zeros(2, self.heads, dtype=torch.float64)
        self._low = torch.full((self.heads,), math.inf)
        self._high = torch.full((self.heads,), -math.inf)
        self._peak = torch.zeros(self.heads)

    @torch.no_grad()
    def add(
        self,
        query: torch.Tensor,  # [B, H, T, D]
        key: torch.Tensor,  # [B, Hk, S, D]
        out: torch.Tensor,  # [B, H, T, Dv]
        options: dict[str, Any],  # of `PolyAttentionState.forward`
        tokens: torch.Tensor | None = None,  # [B, T], False at padding
    ) -> None:
        """Takes in one call of the attention; no more than BLOCK scores are held at a time."""
        shared = torch.arange(self.heads, device=query.device) // (self.heads // key.shape[1])
        for heads, row_map in self.parts:
            index = heads.to(query.device)
            self._add_part(
                heads, row_map, query[:, index], key[:, shared[index]], out[:, index], _pick(options, index), tokens
            )

    def _add_part(
        self,
        heads: torch.Tensor,
        row_map: RowMap,
        query: torch.Tensor,
        key: torch.Tensor,
        out: torch.Tensor,
        options: dict[str, Any],
        tokens: torch.Tensor | None,
    ) -> None:
        wide = compute_dtype(query)
        if row_map.qk_norm:
            query, key = rms_normalize(query), rms_normalize(key)
        query, key = query.to(wide), key.to(wide)
        size = max(1, BLOCK // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
        for block, keep in row_blocks(query.shape[2], key.shape[2], size, query.device, options):
            scores = block_scores(query[:, :, block], key[:, :, : keep.shape[-1]], block, options)
            rows = keep.any(-1).expand(scores.shape[:3])
            if tokens is not None and tokens.shape == (query.shape[0], query.shape[2]):
                rows = rows & tokens[:, block].to(rows.device)[:, None]
            self._add_rows(heads, row_map, scores, keep, rows, out[:, :, block].to(wide))

    def _add_rows(
        self,
        heads: torch.Tensor,
        row_map: RowMap,
        scores: torch.Tensor,  # [B, H, t, S]
        keep: torch.Tensor,  # broadcastable to it
        rows: torch.Tensor,  # [B, H, t]
        out: torch.Tensor,  # [B, H, t, Dv]
    ) -> None:
        result = row_map(scores, keep)
        used = keep & rows[..., None]
        weights = result.weights.masked_fill(~rows[..., None], 0)
        energy, row_sum = weights.square().sum(-1), weights.sum(-1)
        spread_over = weights.abs().sum(-1).square() / energy.clamp(min=torch.finfo(energy.dtype).tiny)
        dead = (result.slopes * result.lengths).abs() < DEAD_SLOPE
        kept = scores.masked_fill(~used, 0)
        sums = {
            "rows": rows,
            "energy": energy,
            "jacobian": result.jacobian_squares * rows,
            "row_sum": row_sum,
            "row_square": row_sum.square(),
            "effective": spread_over,
            "score": kept.sum(-1),
            "score_square": kept.square().sum(-1),
            "kept": used.sum(-1),
            "dead": (dead & used).sum(-1),
        }
        outputs = out * rows[..., None]
        squares = outputs.square().mean(-1)
        # one transfer a block for the sums, one for the extremes
        block_sums = torch.stack([sums[name].to(squares.dtype) for name in _SUMS] + [squares])
        total = block_sums.sum(dim=(1, 3)).cpu().double()
        self._sums[:, heads] += total[:-1]
        self._output[:, heads] += torch.stack([total[-1], total[0]])
        if scores.numel():
            extremes = [
                scores.masked_fill(~used, math.inf).amin((0, 2, 3)),
                scores.masked_fill(~used, -math.inf).amax((0, 2, 3)),
                torch.maximum(weights.abs().amax((0, 2, 3)), outputs.abs().amax((0, 2, 3))),
            ]
            low, high, peak = torch.stack(extremes).cpu().float()
            self._low[heads] = torch.minimum(self._low[heads], low)
            self._high[heads] = torch.maximum(self._high[heads], high)
            self._peak[heads] = torch.maximum(self._peak[heads], peak)

    def result(self) -> dict[str, torch.Tensor]:
        """Name of STATISTICS -> [heads], in fp32 on the CPU; NaN for heads without a row."""
        sums = dict(zip(_SUMS, self._sums, strict=True))
        rows, kept = sums["rows"], sums["kept"]
        row_sum = sums["row_sum"] / rows
        largest = torch.maximum(self._peak, torch.maximum(self._high.abs(), self._low.abs())).double()
        values = {
            "frobenius": (sums["energy"] / rows).sqrt(),
            "jacobian": (sums["jacobian"] / rows).sqrt(),
            "row_sum": row_sum,
            "row_sum_std": (sums["row_square"] / rows - row_sum.square()).clamp(min=0).sqrt(),
            "effective_keys": sums["effective"] / rows,
            "score_mean": sums["score"] / kept,
            "score_spread": (sums["score_square"] / kept).sqrt(),
            "score_min": self._low,
            "score_max": self._high,
            "dead_share": sums["dead"] / kept,
            "output_rms": (self._output[0] / self._output[1]).sqrt(),
            "fp16_octaves": (FP16_MAX / largest).log2(),
        }
        return {name: values[name].float() for name in STATISTICS}


def row_blocks(
    queries: int, keys: int, size: int, device: torch.device, options: dict[str, Any]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their keep mask [., ., t or 1, S']) for blocks of `size` rows; S' leaves out keys no causal row sees."""
    keep, window, causal = options.get("keep"), options.get("sliding_window"), options["is_causal"]
    for start in range(0, queries, size):
        block = slice(start, min(start + size, queries))
        part = keep
        if keep is not None:
            part = keep[(None,) * (4 - keep.ndim)]
            part = part[:, :, block] if part.shape[2] > 1 else part
        if causal:
            # the last row of the block sees the last of these keys, which is what is_causal means for them
            seen = keys - queries + block.stop
            part = part[..., :seen] if part is not None and part.shape[-1] > 1 else part
            shape = (block.stop - start, seen)
            yield block, build_keep(shape, device, keep=part, is_causal=True, sliding_window=window)
        elif window is not None:
            reach = build_keep((queries, keys), device, sliding_window=window)[..., block, :]
            yield block, reach if part is None else reach & part
        else:
            yield block, build_keep((block.stop - start, keys), device, keep=part)


def block_scores(query: torch.Tensor, key: torch.Tensor, block: slice, options: dict[str, Any]) -> torch.Tensor:
    """Scores [B, H, t, S'] of a block of rows, before alpha and beta; masked ones too."""
    scores = options["scaling"] * (query @ key.transpose(-1, -2))
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if (bias := options.get("bias")) is not None:
        bias = bias[(None,) * (4 - bias.ndim)].to(scores.dtype)
        bias = bias[:, :, block] if bias.shape[2] > 1 else bias
        scores = scores + (bias[..., : scores.shape[-1]] if bias.shape[-1] > 1 else bias)
    return scores


def _pick(options: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
    """The options with the rows of keep and bias that belong to some heads; those shared by all heads stay."""
    out = dict(options)
    for name in ("keep", "bias"):
        mask = options.get(name)
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            out[name] = mask[:, index]
    return out
