"""What several studies share: their arguments, rows that are kept and not measured again, where they were measured."""

import argparse
import csv
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHAKESPEARE = HERE / "configs" / "pretrain_causal_lm" / "shakespeare_char_0.8m.yaml"

Row = dict[str, str]


def study_parser(
    study: str,
    doc: str | None,
    *,
    seeds: Sequence[int] = (),
    only: Iterable[str] = (),
    quick: str = "",
    runs: bool = True,
) -> argparse.ArgumentParser:
    """Arguments that studies have in common; quick: what --quick means, where there is a short form."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if only:
        parser.add_argument("--only", nargs="+", choices=list(only), default=list(only))
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    if runs:
        parser.add_argument("--runs", type=Path, default=Path("runs") / study, help="folder of what is no result")
    default = "recipes/results" + (", with --quick the folder of the runs" if quick else "")
    parser.add_argument("--out", type=Path, help=f"csv; default: {default}")
    return parser


def out_of(args: argparse.Namespace, name: str) -> Path:
    """The csv of --out, or by default the one of this name in the results; a short form never touches those."""
    if args.out:
        return args.out
    return args.runs / f"quick_{name}" if getattr(args, "quick", False) else RESULTS / name


def rows_of(path: Path) -> list[Row]:
    """The finished rows of a csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finished(path: Path, *names: str) -> set[tuple[str, ...]]:
    """These columns of every finished row: what a run is told apart by."""
    return {tuple(row[name] for name in names) for row in rows_of(path)}


def _header(path: Path) -> tuple[list[str], str]:
    """Columns and line end of a csv, so that what is added looks like what is there; no columns of no file."""
    if not path.exists():
        return [], "\n"
    with path.open(newline="", encoding="utf-8") as file:
        line = file.readline()
    return next(csv.reader([line]), []), "\r\n" if line.endswith("\r\n") else "\n"


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows of one run together, so that a run is whole in the csv or not there.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns, end = _header(path)
    if columns and set(columns) != set(rows[0]):
        other = ", ".join(sorted(set(columns) ^ set(rows[0])))
        raise ValueError(f"{path} has other columns than the new rows ({other}): move it aside, or give another --out")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator=end)
        # a study that was stopped before its first row may have left an empty file
        if not columns:
            writer.writeheader()
        writer.writerows(rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The whole csv, written aside and renamed: a stop leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=_header(path)[1])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def by_seed(rows: Iterable[Row], column: str) -> dict[str, float]:
    """seed -> number, of the runs that have one: those that came to their end."""
    return {row["seed"]: float(row[column]) for row in rows if row[column]}


def paired(values: dict[str, float], twin: dict[str, float]) -> list[float]:
    """Differences to the twin on the same seeds."""
    return [value - twin[seed] for seed, value in values.items() if seed in twin]


def environment(device: "torch.device | None" = None) -> Row:
    """Versions and device, for the end of a row; without `device` the one that recipes run on."""
    import torch
    import transformers
    from accelerate import PartialState

    import hf_polyattn
    from hf_polyattn.training.devices import device_name

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "device": device_name(device or PartialState().device),
    }


def environment_of(results: dict[str, Any]) -> Row:
    """The same as a recipe wrote it down."""
    versions = {name: results["versions"][name] for name in ("torch", "transformers")}
    return {**versions, "hf_polyattn": results["versions"]["hf-polyattn"], "device": results["device"]}


def trained(recipe: Callable[[list[str]], dict], arguments: list[str]) -> tuple[dict[str, Any], str]:
    """Results of a run, and ""; of one that diverged none, and where: that is a result too."""
    from hf_polyattn.training.nonfinite import NonFiniteError

    try:
        return recipe(arguments), ""
    except NonFiniteError as error:
        return {}, str(error).split(";")[0]


def name_of(checkpoint: str) -> str:
    """The checkpoint as it stands in rows and file names: a folder's own name, or the Hub's without its slash."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint.replace("/", "--")


def shown(words: Iterable[str]) -> str:
    """Words of a command as they stand in a row: of a path its last part, quoted where a shell needs it."""
    return shlex.join(Path(word).name if "/" in word else word for word in words)


def shown_command(script: str, words: Iterable[str]) -> str:
    """A command line for a row, without the folders of one machine."""
    return f"python recipes/{script} {shown(words)}"


def quick_text(folder: Path) -> Path:
    """A file of Python's own source, ASCII alone, for the short forms."""
    from hf_polyattn.training.data import stdlib_files

    path = folder / "stdlib.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(source for _, source in stdlib_files(60_000))
    path.write_text(text.encode("ascii", "ignore").decode(), encoding="utf-8")
    return path
