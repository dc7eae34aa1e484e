"""What a conversion found, stage by stage: a table, Markdown and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tables import format_table

SOFTMAX, TUNED = "softmax", "softmax, fine-tuned on as many tokens"
TEACHER = "teacher, untouched"
"""What people read for SOFTMAX, which files hold: the fine-tuned twin is softmax too."""


@dataclass(frozen=True)
class Row:
    """The model after one stage."""

    stage: str
    score: float
    tokens: int
    """Training tokens of this stage."""
    seconds: float
    """Of this stage, without its evaluation."""
    steps: int = 0


@dataclass(frozen=True)
class ConversionReport:
    """Scores after each stage, the first row being the untouched softmax model. Print it for a table."""

    metric: str
    lower_is_better: bool
    rows: tuple[Row, ...]
    tuned: Row | None = None
    """The softmax model fine-tuned on as many tokens."""

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(row.tokens for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def steps(self) -> int:
        return sum(row.steps for row in self.rows)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""
        header = ["model", self.metric, "minus teacher", "training tokens", "seconds"]
        first, *stages = self.rows
        shown = [first, *([self.tuned] if self.tuned else []), *stages]
        body = [
            [
                TEACHER if row is first else row.stage,
                f"{row.score:.4f}",
                "" if row is first else f"{row.score - first.score:+.4f}",
                f"{row.tokens:,}",
                f"{row.seconds:.0f}",
            ]
            for row in shown
        ]
        return header, body

    def __str__(self) -> str:
        header, body = self.cells()
        return format_table(header, body)

    def markdown(self) -> str:
        header, body = self.cells()
        lines = ["| " + " | ".join(cells) + " |" for cells in [header, *body]]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ConversionReport":
        """Inverse of `to_dict`."""
        tuned = Row(**values["tuned"]) if values.get("tuned") else None
        return cls(values["metric"], values["lower_is_better"], tuple(Row(**r) for r in values["rows"]), tuned)

    def figure(self, path: str | Path, losses: Mapping[str, Sequence[float]]) -> None:
        """Scores after each stage, and the losses of each training stage over its steps; writes a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, *others = figure.subplots(1, 1 + len(losses), width_ratios=[2, *[1.2] * len(losses)], squeeze=False)[0]
        names = [row.stage for row in self.rows[1:]]
        left.plot(range(len(names)), [row.score for row in self.rows[1:]], "o-", color="#2a6fbb", label="polynomial")
        left.axhline(self.rows[0].score, color="#777777", ls="--", lw=1, label=TEACHER)
        if self.tuned is not None:
            left.axhline(self.tuned.score, color="#c44e52", ls=":", lw=1.2, label="softmax, fine-tuned")
        left.set_ylabel(self.metric.replace("_", " ") + (", lower is better" if self.lower_is_better else ""))
        left.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor", fontsize=9)
        left.grid(alpha=0.3)
        left.legend(frameon=False, fontsize=8)
        for axis, (name, values) in zip(others, losses.items(), strict=True):
            axis.plot(range(1, len(values) + 1), values, color="#2a6fbb", lw=0.8)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        if others:
            others[0].set_ylabel("training loss")
        figure.savefig(path, dpi=150, metadata={"Software": None})
