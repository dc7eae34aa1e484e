"""What was measured, by attention module and head: as a table, as numbers for trackers, as lines of JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tables import format_span, format_table

_SHOWN = ("frobenius", "jacobian", "row_sum", "effective_keys", "score_spread", "dead_share", "output_rms")


@dataclass(frozen=True)
class AttentionReport:
    """Statistics by name of the attention module, in the order of the forward pass. Print it for a table."""

    modules: dict[str, dict[str, torch.Tensor]]
    """Module -> name of a statistic -> [heads]."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """One statistic of all modules, [layers, heads].

        Raises:
            KeyError: for a statistic that was not measured.
            ValueError: where modules differ in their number of heads; `modules` has them one by one.
        """
        first = next(iter(self.modules.values()))
        if name not in first:
            raise KeyError(f"{name!r} was not measured; there are {', '.join(first)}")
        columns = [statistics[name] for statistics in self.modules.values()]
        if len({len(column) for column in columns}) > 1:
            raise ValueError("modules differ in their number of heads: read report.modules[NAME]")
        return torch.stack(columns)

    def scalars(self) -> dict[str, float]:
        """Means over the heads for a tracker: {"attention_frobenius/layer_00": ...}."""
        return {
            f"attention_{name}/layer_{layer:02d}": column.mean().item()
            for layer, statistics in enumerate(self.modules.values())
            for name, column in statistics.items()
        }

    def to_json(self) -> dict[str, dict[str, list[float]]]:
        return {
            module: {name: [_short(x) for x in column.tolist()] for name, column in statistics.items()}
            for module, statistics in self.modules.items()
        }

    @classmethod
    def from_json(cls, values: dict[str, dict[str, list[float]]]) -> "AttentionReport":
        return cls(
            {
                module: {name: torch.tensor(column) for name, column in statistics.items()}
                for module, statistics in values.items()
            }
        )

    def __str__(self) -> str:
        rows = [
            [module, *(format_span(statistics[name]) for name in _SHOWN)]
            for module, statistics in self.modules.items()
        ]
        what = f"{len(rows)} attention modules: mean (min to max) of the heads"
        return f"{what}\n{format_table(['module', *(name.replace('_', ' ') for name in _SHOWN)], rows)}"


def append_report(path: Path, step: int, report: AttentionReport, **more: Any) -> None:
    """One line of a .jsonl file: {"step": ..., "modules": {module: {statistic: [heads]}}}."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **more, "modules": report.to_json()}) + "\n")


def read_reports(path: Path | str) -> dict[int, AttentionReport]:
    """step -> report, from such a file."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {line["step"]: AttentionReport.from_json(line["modules"]) for line in lines}


def _short(x: float) -> float:
    # fp32 has no more digits than these
    return float(f"{x:.7g}")
