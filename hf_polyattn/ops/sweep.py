"""What the forward and the backward sweep over the tiles share: packed rows, buffers, scores and phi of one tile."""

import math
from dataclasses import dataclass

import torch

from .inplace import horner_into, keep_only, power_into
from .precision import compute_dtype
from .tiles import TileMasks, Tiling, cut


@dataclass(frozen=True)
class Options:
    """The arguments that are not tensors. degree: not read with coefficients. seed: of this call's dropout."""

    degree: int
    normalization: str | float
    scaling: float
    softcap: float | None
    is_causal: bool
    sliding_window: int | None
    dropout: float
    seed: int


class Sweep:
    """One call's tiling, masks and buffers; see `tiled_attention` for the shapes."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        coefficients: torch.Tensor | None,
        bias: torch.Tensor | None,
        keep: torch.Tensor | None,
        key_lengths: torch.Tensor | None,
        options: Options,
    ) -> None:
        self.coefficients, self.bias, self.options = coefficients, bias, options
        self.dtype, self.device = compute_dtype(query), query.device
        self.tiling = Tiling.plan(query, key)
        self.masks = TileMasks(
            self.tiling,
            query.device,
            keep=keep,
            is_causal=options.is_causal,
            key_lengths=key_lengths,
            sliding_window=options.sliding_window,
        )
        # dropout draws 16 bits for each weight, so its probability is a multiple of 2^-16
        self.dropped = round(options.dropout * 2**16)
        self.survival = 1 - self.dropped / 2**16
        self.memory: list[torch.Tensor] = []

    def pack(self, x: torch.Tensor, here: tuple[slice, slice, slice]) -> torch.Tensor:
        """Rows of [B, H, T, D] as [batch rows * key heads, groups * rows, D], a copy in the compute dtype."""
        part = x[here]
        out = torch.empty(part.shape, dtype=self.dtype, device=self.device).copy_(part)
        return out.view(-1, self.tiling.groups * part.shape[2], part.shape[3])

    def group(self, x: torch.Tensor, batches: slice, key_heads: slice) -> torch.Tensor:
        """Keys or values of a group as [batch rows * key heads, S, D]; contiguous, as every row block reads them."""
        return x[batches, key_heads].to(self.dtype).contiguous().flatten(0, 1)

    def buffers(self, count: int, tile: tuple[slice, ...]) -> list[torch.Tensor]:
        """Tiles [batch rows, query heads, rows, columns] in memory that is used again and again."""
        shape = [span.stop - span.start for span in tile]
        size = math.prod(shape)
        if len(self.memory) < count:
            most = self.tiling.elements
            self.memory = [torch.empty(most, dtype=self.dtype, device=self.device) for _ in range(count)]
        return [flat[:size].view(shape) for flat in self.memory[:count]]

    def scores(
        self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tile: tuple[slice, ...], keep: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Fills `out`, with 0 at the masked. Returns d(softcap), if there is one."""
        torch.bmm(q, k.transpose(1, 2), out=stack(out, q))
        steepness = None
        if (cap := self.options.softcap) is not None:
            out.div_(cap).tanh_()
            steepness = 1 - out.square()
            out.mul_(cap)
        if self.bias is not None:
            out.add_(cut(self.bias, *tile))
        if keep is not None:
            keep_only(out, keep)
            if steepness is not None:
                # what a masked key holds may be no number
                keep_only(steepness, keep)
        return steepness

    def phi(self, scores: torch.Tensor, spare: torch.Tensor, heads: slice, keep: torch.Tensor | None) -> torch.Tensor:
        """phi(scores), in one of the two buffers."""
        if self.coefficients is None:
            if self.options.degree <= 3:
                return scores.pow_(self.options.degree)
            return power_into(spare, scores, self.options.degree)
        horner_into(spare, scores, self.coefficients[heads])
        return spare if keep is None else keep_only(spare, keep)

    def phi_and_slope(
        self,
        scores: torch.Tensor,
        slope: torch.Tensor,
        spare: torch.Tensor,
        slope_coefficients: torch.Tensor | None,
        heads: slice,
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        """phi(scores), in the buffer of the scores or the spare one; phi' in `slope`, a monomial's over its degree."""
        if slope_coefficients is not None:
            horner_into(slope, scores, slope_coefficients[heads])
            return self.phi(scores, spare, heads, keep)
        if self.options.degree == 1:
            slope.fill_(1)
            return scores
        power_into(slope, scores, self.options.degree - 1)
        return scores.mul_(slope)

    def survivors(self, out: torch.Tensor, tile: tuple[slice, ...]) -> torch.Tensor:
        """1 where dropout lets a weight live, 0 elsewhere: a function of the seed and the tile's corner."""
        batches, heads, rows, columns = (span.start for span in tile)
        queries, keys = self.tiling.shape[2:]
        corner = ((batches * self.tiling.shape[1] * self.tiling.groups + heads) * queries + rows) * keys + columns
        generator = torch.Generator(self.device)
        generator.manual_seed((self.options.seed + corner) % 2**63)
        # four draws from 64 random bits: bernoulli_ takes four times as long
        bits = torch.empty(-(-out.numel() // 4), dtype=torch.int64, device=self.device)
        bits = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: out.numel()]
        return torch.ge(bits.view(out.shape), self.dropped - 2**15, out=out)


def stack(tile: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[batch rows, query heads, rows, keys] seen as [batch rows * key heads, groups * rows, keys]."""
    return tile.view(q.shape[0], q.shape[1], -1)
