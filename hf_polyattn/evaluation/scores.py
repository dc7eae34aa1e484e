"""Numbers with their standard errors, and the difference of two that were measured on the same units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """A number, and how far it may be from what more of the same data would give.

    standard_error: of the value, over the units (windows of a text, rows) that it is a mean of; None where unknown.
    deviations: [units], what each unit adds to the value's own error; None where the value is no mean over units.
    """

    value: float
    standard_error: float | None = None
    deviations: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def mean(cls, sums: np.ndarray, counts: np.ndarray) -> "Score":
        """sums [units] over counts [units], as one mean over all that was counted.

        The standard error treats units as independent and what is within one as not: the linearised variance of a
        ratio (Cochran 1977, section 6.4).
        """
        value = float(sums.sum() / counts.sum())
        return cls._of_deviations(value, (sums - value * counts) / counts.sum())

    @classmethod
    def _of_deviations(cls, value: float, deviations: np.ndarray) -> "Score":
        units = len(deviations)
        spread = math.sqrt(units / (units - 1) * float((deviations**2).sum())) if units > 1 else None
        return cls(value, spread, deviations)


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and what they were measured on; two of equal `data` are of the same units and can be paired."""

    scores: Mapping[str, Score]
    data: Mapping[str, Any]


def difference(first: Evaluation, second: Evaluation) -> dict[str, Score]:
    """Scores of the first minus those of the second, where both have them.

    The standard error is that of the paired difference: what is hard for both models cancels. None without units.
    """
    out = {}
    for name in first.scores.keys() & second.scores.keys():
        a, b = first.scores[name], second.scores[name]
        value = a.value - b.value
        if a.deviations is None or b.deviations is None or first.data != second.data:
            out[name] = Score(value)
        else:
            out[name] = Score._of_deviations(value, a.deviations - b.deviations)
    return out
