"""Which example comes when: a pure function of (seed, position), so that resume and any number of processes agree.

Position k is the k-th example that a run sees, over all processes and epochs. A data loader walks the positions of the
whole run with `sampler=range(start, stop)`; nothing has to be saved but the step.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


class Shuffled(Dataset):
    """Position -> row: every row once an epoch, in an order of its own each epoch."""

    def __init__(self, rows: Sequence[Any], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return int(self._order[offset])

    def __getitem__(self, position: int) -> Any:
        return self.rows[self.index(position)]


class RandomWindows(Dataset):
    """Position -> a window of `length` tokens at a random offset of the stream."""

    def __init__(self, stream: np.ndarray, length: int, seed: int) -> None:
        if len(stream) < length:
            raise ValueError(f"{len(stream)} tokens are fewer than one window of {length}: lower block_size")
        self.stream, self.length, self.seed = stream, length, seed

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        offset = np.random.default_rng([self.seed, position]).integers(len(self.stream) - self.length + 1)
        return {"input_ids": self.stream[offset : offset + self.length]}


class Numbered(Dataset):
    """Position -> (position, row), for collators whose noise depends on the position alone, such as token masking."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        return position, self.rows[position]


class Stream(IterableDataset):
    """The blocks of an endless iterator from `start` on. A resumed run reads what came before again, and drops it."""

    def __init__(self, blocks: Callable[[], Any], start: int = 0, numbered: bool = False) -> None:
        self.blocks, self.start, self.numbered = blocks, start, numbered

    def __iter__(self) -> Any:
        for position, block in enumerate(self.blocks()):
            if position >= self.start:
                row = {"input_ids": block}
                yield (position, row) if self.numbered else row


def training_loader(
    view: Dataset, batch_size: int, collate: Collate, first_step: int, last_step: int, parts: int = 1, workers: int = 0
) -> DataLoader:
    """Batches of steps first_step + 1 to last_step, each in `parts` micro batches over all processes.

    view: a data set by position (Shuffled, RandomWindows, Numbered) or a Stream.
    batch_size: examples of one step over all processes and parts.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size // parts,
        "collate_fn": collate,
        "num_workers": workers,
        "drop_last": True,
        # a generator of its own: a loader otherwise draws from the global one, and dropout would differ after a resume
        "generator": torch.Generator().manual_seed(0),
    }
    if isinstance(view, Stream):
        view.start = first_step * batch_size
        return DataLoader(view, **options)
    return DataLoader(view, sampler=range(first_step * batch_size, last_step * batch_size), **options)


def first_inputs(
    view: Dataset, batch_size: int, collate: Collate, names: Sequence[str], steps: int, parts: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs `names` of a run's first `steps` steps, to calibrate on: the same on every process.

    parts: in which each step's batch comes; as many as there are accumulation steps times processes, it needs no more
        memory than training does.
    """
    loader = training_loader(view, batch_size, collate, 0, steps, parts)
    for batch in itertools.islice(loader, steps * parts):
        yield {name: batch[name] for name in names if name in batch}


def evaluation_loader(rows: Any, batch_size: int, collate: Collate, workers: int = 0) -> DataLoader:
    """All rows once, in their order."""
    return DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
