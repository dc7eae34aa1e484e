"""Text from anywhere, tokenised and packed into blocks with `datasets`, so that the work is cached."""

import csv
import hashlib
import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from hf_polyattn_arguments import TextArguments

from .order import Numbered, RandomWindows, Shuffled, Stream

LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffix of a local file -> builder of `datasets`."""


def load_texts(args: TextArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Training and validation rows, with the text in the column args.text_column; validation is never streamed."""
    if args.dataset == "stdlib":
        return stdlib_texts(args.stdlib_bytes, args.validation_fraction)
    train = load_rows(args.dataset, args.train_split, args.dataset_config, args.streaming)
    if args.validation_dataset:
        validation = load_rows(args.validation_dataset, args.validation_split or args.train_split)
    elif args.validation_split:
        validation = load_rows(args.dataset, args.validation_split, args.dataset_config)
    elif isinstance(train, IterableDataset):
        validation = Dataset.from_list(list(train.take(args.validation_rows)))
        train = train.skip(args.validation_rows)
    else:
        train, validation = split_from_end(train, args.validation_fraction, args.text_column)
    for rows in (train, validation):
        if rows.column_names is not None and args.text_column not in rows.column_names:
            raise ValueError(
                f"{args.dataset!r} has no column {args.text_column!r}: set text_column to one of {rows.column_names}"
            )
    return train, validation


def load_rows(
    source: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    column_names: list[str] | None = None,
) -> Dataset | IterableDataset:
    """Rows of a local file, of a folder of files of one kind, or of a data set on the Hub.

    column_names: of CSV and TSV files without a header line.
    Raises:
        ValueError: for a split of local files, which have none, or files of several kinds.
    """
    path = Path(source).expanduser()
    if path.exists() and split != "train":
        raise ValueError(
            f"{source} is local and has no split {split!r}: name its file or folder, with dataset for training and "
            "with validation_dataset for validation, and leave train_split and validation_split out"
        )
    if not path.exists():
        if path.suffix in LOADERS or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"no such file or folder: {source}")
        return load_dataset(source, config, split=split, streaming=streaming)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in LOADERS)
    kinds = {LOADERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = sorted({file.suffix for file in files})
        raise ValueError(f"{source} must hold files of one kind out of {sorted(LOADERS)}, found {found or 'none'}")
    kind = kinds.pop()
    options: dict[str, Any] = {}
    if kind == "text":
        # one row a file: packing must see the line breaks
        options["sample_by"] = "document"
    if kind == "csv" and column_names:
        options["column_names"] = column_names
    if files[0].suffix == ".tsv":
        # quotation marks in TSV files are text, as a rule
        options.update(delimiter="\t", quoting=csv.QUOTE_NONE)
    return load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=streaming, **options)


def texts_of(*data_sets: Dataset | IterableDataset, columns: Sequence[str] = ("text",)) -> Iterator[str]:
    """The texts of all rows, read only when asked for."""
    for rows in data_sets:
        for row in rows:
            for column in columns:
                yield row[column]


def split_from_end(rows: Dataset, fraction: float, text_column: str = "") -> tuple[Dataset, Dataset]:
    """The last `fraction` of the rows, or of the characters where there is a single text."""
    if len(rows) == 1 and text_column in rows.column_names:
        text = rows[0][text_column]
        cut = int(len(text) * (1 - fraction))
        parts = [_from_texts([part], text_column) for part in (text[:cut], text[cut:])]
    else:
        cut = len(rows) - max(1, round(len(rows) * fraction))
        parts = [rows.select(range(cut)), rows.select(range(cut, len(rows)))]
    if any(len(part) == 0 for part in parts):
        raise ValueError(f"{len(rows)} rows are too few to keep a fraction {fraction} of them for validation")
    return parts[0], parts[1]


def stdlib_files(max_bytes: int) -> list[tuple[str, str]]:
    """(path in the library, source) of the running Python's standard library, up to max_bytes.

    The order is that of the paths' hashes: the same on every machine, and a cap takes a sample of the library instead
    of its letters a to c.
    """
    out, total = [], 0
    root = Path(sysconfig.get_path("stdlib"))
    for path in _stdlib_paths(root):
        size = (root / path).stat().st_size
        if 0 < size <= max_bytes - total:
            out.append((path, (root / path).read_text(encoding="utf-8", errors="ignore")))
            total += size
    if not out:
        raise FileNotFoundError(f"no source of the standard library below {root}: name a dataset instead of stdlib")
    return out


@cache
def _stdlib_paths(root: Path) -> list[str]:
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    paths = [p.relative_to(root) for p in root.rglob("*.py")]
    return sorted((p.as_posix() for p in paths if not skip & set(p.parts)), key=_hash)


def stdlib_texts(max_bytes: int, validation_fraction: float) -> tuple[Dataset, Dataset]:
    """Training and validation files of the standard library; the hash of a file's name decides where it goes."""
    parts: tuple[list[str], list[str]] = ([], [])
    for path, source in stdlib_files(max_bytes):
        parts[_hash("split " + path) < validation_fraction * 2**64].append(source)
    if not all(parts):
        raise ValueError(f"{max_bytes} bytes of standard library are too few to split: raise stdlib_bytes")
    return _from_texts(parts[0]), _from_texts(parts[1])


def _from_texts(texts: list[str], column: str = "text") -> Dataset:
    # by way of a generator, because `datasets` caches what is mapped from files and not what is mapped from memory
    return Dataset.from_generator(_rows, gen_kwargs={"texts": tuple(texts), "column": column})


def _rows(texts: tuple[str, ...], column: str) -> Iterator[dict[str, str]]:
    for text in texts:
        yield {column: text}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def tokenise(rows: Dataset, tokenizer: PreTrainedTokenizerBase, text_column: str = "text") -> Dataset:
    """Rows of token ids, one for each text, closed by the tokenizer's end token where it has one."""
    return rows.map(
        _tokenise_batch,
        batched=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "text_column": text_column},
        desc="tokenise",
    )


def pack(tokens: Dataset, block_size: int, overlap: int = 1) -> Dataset:
    """Blocks of block_size + overlap tokens, block k from k * block_size on; what is left of 1000 rows is dropped.

    overlap=1 is for next-token prediction: each token is predicted exactly once. overlap=0 is for masked models.
    Raises ValueError when there is not even one block.
    """
    blocks = tokens.map(
        _pack_batch,
        batched=True,
        remove_columns=tokens.column_names,
        fn_kwargs={"block_size": block_size, "overlap": overlap},
        desc=f"pack into blocks of {block_size}",
    )
    if len(blocks) == 0:
        raise ValueError(
            f"the text is shorter than one block of {block_size} tokens: lower block_size or give more text"
        )
    return blocks


def token_stream(tokens: Dataset) -> np.ndarray:
    """All tokens one after another, [tokens] int32, in memory."""
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in tokens.with_format("numpy")["input_ids"]])


def packed_stream(
    rows: IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str, overlap: int = 1
) -> Iterator[list[int]]:
    """Endless blocks of a stream; a stream that was given `.shuffle(seed)` is shuffled anew in every pass."""
    for epoch in itertools.count():
        rows.set_epoch(epoch)
        buffer: list[int] = []
        blocks = 0
        for batch in rows.iter(batch_size=100):
            for ids in _tokenise_batch(batch, tokenizer, text_column)["input_ids"]:
                buffer += ids
            cut = 0
            while len(buffer) - cut >= block_size + overlap:
                yield buffer[cut : cut + block_size + overlap]
                cut += block_size
                blocks += 1
            buffer = buffer[cut:]
        if blocks == 0:
            raise ValueError(f"the stream is shorter than one block of {block_size} tokens")


def training_view(
    rows: Dataset | IterableDataset,
    args: TextArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    overlap: int = 1,
    numbered: bool = False,
) -> Shuffled | RandomWindows | Numbered | Stream:
    """The training data by position, in the order that args.shuffle and the seed say; see `order`.

    overlap: as in `pack`. numbered: give (position, row) instead of rows.
    """
    if isinstance(rows, IterableDataset):
        if args.streaming_shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=args.streaming_shuffle_buffer)
        blocks = partial(packed_stream, rows, tokenizer, args.block_size, args.text_column, overlap)
        return Stream(blocks, numbered=numbered)
    tokens = tokenise(rows, tokenizer, args.text_column)
    view: Shuffled | RandomWindows
    if args.shuffle == "random_windows":
        view = RandomWindows(token_stream(tokens), args.block_size + overlap, seed)
    else:
        view = Shuffled(pack(tokens, args.block_size, overlap), seed)
    return Numbered(view) if numbered else view


def _tokenise_batch(batch: dict, tokenizer: PreTrainedTokenizerBase, text_column: str) -> dict[str, list[list[int]]]:
    ids = tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]
    closing = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    end = [] if closing is None else [closing]
    return {"input_ids": [row + end for row in ids]}


def _pack_batch(batch: dict, block_size: int, overlap: int) -> dict[str, list[list[int]]]:
    ids = list(itertools.chain.from_iterable(batch["input_ids"]))
    starts = range(0, len(ids) - block_size - overlap + 1, block_size)
    return {"input_ids": [ids[start : start + block_size + overlap] for start in starts]}


def next_token_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks of T + 1 tokens -> input_ids [b, T] and labels [b, T]; labels[:, t] follows input_ids[:, t]."""
    ids = torch.as_tensor(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
