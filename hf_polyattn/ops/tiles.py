"""How the score matrix [T, S] is cut into tiles, and which tiles have work to do.

A tile covers a few heads of a few batch rows, a block of queries and a run of keys. Masks are read where they lie:
of a whole keep mask only two flags per block of queries and cell of `CELL` keys are kept (does anybody attend? does
everybody?), neighbouring cells of one kind are joined into tiles, and only the mixed ones carry a mask.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .masks import unexpand

CELL = 64
# (query rows, elements) of a tile at most: on a CPU it must stay in cache, elsewhere it must fill the device
TILE = {"cpu": (128, 2**18)}
LARGE_TILE = (1024, 2**25)

Span = tuple[slice, slice, slice]
"""Batch rows, key heads and query heads of a group."""


def cut(x: torch.Tensor, *spans: slice) -> torch.Tensor:
    """x[spans], where dimensions of size 1 stay as they are: broadcasting takes care of them."""
    return x[tuple(span if size > 1 else slice(None) for span, size in zip(spans, x.shape, strict=True))]


@dataclass(frozen=True)
class Tiling:
    """Sizes of a tile: batch rows, key heads, query rows of each head, keys; and the whole they tile."""

    batches: int
    heads: int
    rows: int
    columns: int
    shape: tuple[int, int, int, int]
    groups: int

    @classmethod
    def plan(cls, query: torch.Tensor, key: torch.Tensor) -> "Tiling":
        (batch, heads, queries), (key_heads, keys) = query.shape[:3], key.shape[1:3]
        groups = heads // key_heads
        most_rows, elements = TILE.get(query.device.type, LARGE_TILE)
        rows = max(1, min(queries, max(32, most_rows // groups)))
        columns = max(1, min(keys, max(4 * CELL, elements // (groups * rows))))
        fit = max(1, elements // (groups * rows * columns))
        # equal shares: 12 heads by 5 would leave a tile of 2
        share = math.ceil(key_heads / math.ceil(key_heads / fit))
        together = max(1, fit // key_heads) if share == key_heads else 1
        return cls(min(batch, together) or 1, share, rows, columns, (batch, key_heads, queries, keys), groups)

    @property
    def elements(self) -> int:
        """Of the largest tile."""
        cells = -(-self.columns // CELL)
        return self.batches * self.heads * self.groups * self.rows * min(cells * CELL, self.shape[3])

    def spans(self) -> Iterator[Span]:
        batch, key_heads, _, _ = self.shape
        for b in range(0, batch, self.batches):
            for h in range(0, key_heads, self.heads):
                top = min(h + self.heads, key_heads)
                yield slice(b, min(b + self.batches, batch)), slice(h, top), slice(h * self.groups, top * self.groups)

    def row_blocks(self) -> Iterator[slice]:
        queries = self.shape[2]
        for i in range(0, queries, self.rows):
            yield slice(i, min(i + self.rows, queries))


class TileMasks:
    """All restrictions of `build_keep`, tile by tile.

    Args:
        keep: bool [B or 1, H or 1, T or 1, S or 1], any strides, or None.
        key_lengths: [B] or None.
    """

    def __init__(
        self,
        tiling: Tiling,
        device: torch.device,
        *,
        keep: torch.Tensor | None,
        is_causal: bool,
        key_lengths: torch.Tensor | None,
        sliding_window: int | None,
    ) -> None:
        _, _, queries, keys = tiling.shape
        self.tiling, self.device, self.keys, self.offset = tiling, device, keys, keys - queries
        self.is_causal, self.window = is_causal, sliding_window
        self.key_lengths = None if key_lengths is None else key_lengths.to(device)
        self.lengths = None if key_lengths is None else key_lengths.tolist()
        self.keep = None if keep is None or 0 in tiling.shape else unexpand(keep).expand(-1, -1, -1, keys)
        self.occupancy = None if self.keep is None else self._read(self.keep)
        self.bands: dict[tuple[int, ...], torch.Tensor] = {}

    def tiles(self, batches: slice, heads: slice, rows: slice) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Yields (keys, keep mask or None for a full tile), the empty ones left out.

        The mask is broadcastable to [batches, query heads, rows, keys].
        """
        cells = list(zip(*self._classify(batches, heads, rows), strict=True))
        first, stop, most = 0, 0, -(-self.tiling.columns // CELL)
        while first < len(cells):
            while stop < min(first + most, len(cells)) and cells[stop] == cells[first]:
                stop += 1
            anybody, everybody = cells[first]
            if anybody:
                columns = slice(first * CELL, min(stop * CELL, self.keys))
                yield columns, None if everybody else self._mask(batches, heads, rows, columns)
            first = stop

    def _classify(self, batches: slice, heads: slice, rows: slice) -> tuple[list[bool], list[bool]]:
        """For each cell of keys: does any row of the block attend to any key of it, and all rows to all keys?"""
        if not self.is_causal and self.window is self.lengths is self.occupancy is None:
            return (cells := [True] * -(-self.keys // CELL)), cells
        starts = torch.arange(0, self.keys, CELL)
        lasts = (starts + CELL).clamp(max=self.keys) - 1
        anybody, everybody = torch.ones_like(starts, dtype=torch.bool), torch.ones_like(starts, dtype=torch.bool)
        first_row, last_row = rows.start + self.offset, rows.stop - 1 + self.offset
        if self.is_causal:
            anybody &= starts <= last_row
            everybody &= lasts <= first_row
        if self.window is not None:
            anybody &= (lasts > first_row - self.window) & (starts < last_row + self.window)
            everybody &= (last_row - starts < self.window) & (lasts - first_row < self.window)
        if self.lengths is not None:
            anybody &= starts < max(self.lengths[batches])
            everybody &= lasts < min(self.lengths[batches])
        if self.occupancy is not None:
            block = rows.start // self.tiling.rows if self.occupancy[0].shape[2] > 1 else 0
            some, every = (cut(x, batches, heads, slice(None), slice(None))[:, :, block] for x in self.occupancy)
            anybody &= some.flatten(0, 1).any(0)
            everybody &= every.flatten(0, 1).all(0)
        return anybody.tolist(), everybody.tolist()

    def _mask(self, batches: slice, heads: slice, rows: slice, columns: slice) -> torch.Tensor:
        parts = []
        if (band := self._band(rows, columns)) is not None:
            parts.append(band)
        if self.key_lengths is not None:
            index = torch.arange(columns.start, columns.stop, device=self.device)
            parts.append(index < self.key_lengths[batches].view(-1, 1, 1, 1))
        if self.keep is not None:
            parts.append(cut(self.keep, batches, heads, rows, columns))
        out = parts[0]
        for part in parts[1:]:
            out = out & part
        return out

    def _band(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """Causal and window part, None where it forbids nothing; built once, as it repeats along the diagonal."""
        shift = rows.start + self.offset - columns.start
        height, width = rows.stop - rows.start, columns.stop - columns.start
        causal = self.is_causal and width - 1 > shift
        if not causal and (self.window is None or max(shift + height - 1, width - 1 - shift) < self.window):
            return None
        key = (shift, height, width)
        if key not in self.bands:
            distance = torch.arange(height, device=self.device)[:, None] + shift
            distance = distance - torch.arange(width, device=self.device)
            band = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                band &= distance.abs() < self.window
            self.bands[key] = band[None, None]
        return self.bands[key]

    def _read(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(any, all) of the keep mask by block of rows and cell of keys, on the CPU."""
        cells = -(-self.keys // CELL)
        some: list[torch.Tensor] = []
        every: list[torch.Tensor] = []
        for rows in self.tiling.row_blocks() if keep.shape[2] > 1 else [slice(None)]:
            # bytes have fast reductions, bools do not
            block = keep[:, :, rows].view(torch.uint8)
            for out, by_key, pad in ((some, block.amax(2), 0), (every, block.amin(2), 1)):
                padded = torch.nn.functional.pad(by_key, (0, cells * CELL - self.keys), value=pad)
                padded = padded.unflatten(-1, (cells, CELL))
                out.append(padded.amax(-1) if pad == 0 else padded.amin(-1))
        return torch.stack(some, 2).bool().cpu(), torch.stack(every, 2).bool().cpu()
