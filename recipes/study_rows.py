"""What several studies share: rows that are kept and not measured again, where they were measured, their tables."""

import csv
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHOWS = "<!-- what it shows -->"
"""Line of a study's markdown above its reading, which is written by hand and kept when tables are written anew."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """The finished rows of a csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows of one run together, so that a run is whole in the csv or not there."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def environment() -> dict[str, str]:
    """Versions and device, for the end of a row."""
    import torch
    import transformers

    import hf_polyattn

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
    }


def shown_command(script: str, words: Iterable[str]) -> str:
    """A command line for a row: files by their names alone, without the folders of one machine."""
    names = (Path(word).name if "/" in word else word for word in words)
    return " ".join([f"python recipes/{script}", *names])


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """ "1.8963 ± 0.0102"; without the standard deviation for a single value, and empty for none.

    >>> mean_and_spread([0.5, 0.7], 2), mean_and_spread([0.5], 2), mean_and_spread([])
    ('0.60 ± 0.14', '0.50', '')
    """
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def write_tables(path: Path, tables: str) -> None:
    """Markdown of a study: its tables, and below them the reading that stood there before."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = before.partition(SHOWS)
    path.write_text(tables + "\n" + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")


def quick_text(folder: Path) -> Path:
    """A file of Python's own source, ASCII alone, for the short forms."""
    from hf_polyattn.training.data import stdlib_files

    path = folder / "stdlib.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(source for _, source in stdlib_files(60_000))
    path.write_text(text.encode("ascii", "ignore").decode(), encoding="utf-8")
    return path
