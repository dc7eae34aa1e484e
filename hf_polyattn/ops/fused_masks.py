"""The masks of a call as the Triton kernels take them: bytes, strides, and lists of the tiles that have work."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .fused_launch import Tile, run


@dataclass(frozen=True)
class Masks:
    """queries, keys, batch: sizes of the call. keep: bool [B or 1, H or 1, T or 1, S or 1], any strides, or None."""

    batch: int
    queries: int
    keys: int
    is_causal: bool
    sliding_window: int
    key_lengths: Tensor | None
    keep: Tensor | None

    @property
    def seen(self) -> Tensor | None:
        """The keep mask as bytes."""
        return None if self.keep is None else self.keep.view(torch.uint8)

    @property
    def strides(self) -> list[int]:
        return [0, 0, 0, 0] if self.keep is None else _strides(self.keep)

    @property
    def constants(self) -> dict[str, int]:
        return {"CAUSAL": self.is_causal, "WINDOW": self.sliding_window}

    def lists(self, tile: Tile, *, by_key: bool = False) -> tuple[Tensor | None, list[int]]:
        """Which tiles have work, and strides. None without a keep mask: then the kernels know by themselves.

        int32 [B or 1, H or 1, blocks, 2 + tiles of a block]: how many tiles of the block are full, how many mixed, and
        the indices of all in that order. The blocks are those of query rows, or of keys.
        """
        from .fused_kernels import kinds_kernel

        if self.keep is None:
            return None, [0, 0, 0]
        rows, columns = -(-self.queries // tile.rows), -(-self.keys // tile.keys)
        batches = self.keep.shape[0] if self.key_lengths is None else self.batch
        heads = self.keep.shape[1]
        kinds = torch.empty(batches, heads, rows, columns, dtype=torch.int8, device=self.keep.device)
        sizes = (heads, self.queries, self.keys, rows, columns)
        constants = {**self.constants, "BM": tile.rows, "BN": tile.keys}
        run(kinds_kernel, kinds.numel(), None, self.seen, self.key_lengths, kinds, *self.strides, *sizes, **constants)
        if by_key:
            kinds = kinds.transpose(-1, -2)
        order = kinds.argsort(dim=-1, descending=True, stable=True)
        tally = torch.stack([(kinds == kind).sum(-1) for kind in (2, 1)], -1)
        lists = torch.cat([tally, order], -1).int()
        return lists, _strides(lists)[:3]


def _strides(x: Tensor) -> list[int]:
    """0 for what is broadcast."""
    return [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
