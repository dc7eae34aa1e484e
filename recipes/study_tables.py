"""How studies show their rows: means with their spread, tables, figures that equal runs write equally."""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWS = "<!-- what it shows -->"
"""Line of a study's markdown above its reading, which is written by hand and kept when tables are written anew."""

Found = TypeVar("Found")


def mean_of(values: Collection[float], digits: int = 4, scale: float = 1, sign: str = "") -> str:
    """The mean times `scale`, empty for no values; sign "+" for a difference, which has no minus before a zero.

    >>> mean_of([0.5, 0.7], 2), mean_of([-0.001], 2, sign="+"), mean_of([])
    ('0.60', '+0.00', '')
    """
    return f"{round(scale * statistics.mean(values), digits) + 0.0:{sign}.{digits}f}" if values else ""


def mean_and_spread(values: Collection[float], digits: int = 4, scale: float = 1, sign: str = "") -> str:
    """ "1.8963 ± 0.0102"; no standard deviation of a single value, nor where one is not finite; empty for none.

    >>> mean_and_spread([0.5, 0.7], 2), mean_and_spread([0.5], 2), mean_and_spread([])
    ('0.60 ± 0.14', '0.50', '')
    """
    has_spread = len(values) > 1 and all(map(math.isfinite, values))
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if has_spread else ""
    return mean_of(values, digits, scale, sign) + spread


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table.

    >>> print(markdown(["a", "b"], [["x", 1]]))
    | a | b |
    |---|---|
    | x | 1 |
    """
    lines = [header, *(list(map(str, row)) for row in rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(header) + "|", *body])


def write_tables(path: Path, tables: str) -> None:
    """Markdown of a study: its tables, and below them the reading that stood there before."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = before.partition(SHOWS)
    path.write_text(tables + "\n" + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")


def write_up(
    out: Path, found: Found, table: Callable[[Found], str], draw: Callable[[Found, Path], None] | None = None
) -> None:
    """What a study ends with: OUT.md and OUT.png from what was found, and the tables on the screen."""
    text = table(found)
    write_tables(out.with_suffix(".md"), text)
    if draw:
        draw(found, out.with_suffix(".png"))
    print(text)


def save_figure(figure: "Figure", path: Path) -> None:
    # no software version or date inside: equal runs give equal files
    figure.savefig(path, dpi=150, metadata={"Software": None})


def dots_and_mean(axes: "Axes", values: Sequence[float], height: float, color: str) -> None:
    """A dot a seed, a bar at the mean; nothing of no values."""
    if values:
        axes.plot(values, [height] * len(values), "o", color=color, alpha=0.6, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2)
