"""Plain text tables for reports: columns as wide as their widest cell."""

from collections.abc import Iterable, Mapping, Sequence

import torch


def format_span(x: torch.Tensor) -> str:
    """Mean, smallest and largest of [heads] as text; one number where all are equal.

    >>> format_span(torch.tensor([1.0, 2.0])), format_span(torch.tensor([0.5, 0.5]))
    ('1.5 (1 to 2)', '0.5')
    """
    if torch.equal(x, x[:1].expand_as(x)):
        return f"{x[0].item():.3g}"
    return f"{x.mean().item():.3g} ({x.min().item():.3g} to {x.max().item():.3g})"


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells; the first column is aligned left, the others right.

    >>> print(format_table(["model", "loss"], [["softmax", "1.89"], ["cubic", "1.88"]]))
    model    loss
    softmax  1.89
    cubic    1.88
    """
    cells = [list(header), *(list(row) for row in rows)]
    if any(len(row) != len(header) for row in cells):
        raise ValueError(f"every row needs {len(header)} cells, got rows of {sorted({len(row) for row in cells})}")
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def format_states(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """Module -> the tensors of its `polyattn` child, as a table of mean, smallest and largest over heads."""
    rows: list[list[str]] = []
    header = ["module"]
    for name, state in tensors.items():
        columns = {key: state[key] for key in ("alpha", "beta", "gain")}
        if "coefficients" in state:
            columns |= {f"c_{power}": column for power, column in enumerate(state["coefficients"].unbind(1))}
        header = ["module", *columns]
        rows.append([name, *(format_span(column.float()) for column in columns.values())])
    return format_table(header, rows)
