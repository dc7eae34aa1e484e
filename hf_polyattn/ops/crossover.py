"""Where the linear-cost form pays: in time, by measurement, and in memory, by arithmetic."""

import math
from typing import NamedTuple

from .monomials import Monomials

NEVER = math.inf


class Lengths(NamedTuple):
    """From how many tokens on the recurrent form is faster than the best quadratic one."""

    causal_forward: float
    causal_training: float
    full_forward: float
    full_training: float


# (degree, largest head_dim): measured with float32 on one thread of a CPU with AVX2, against the compiled form;
# benchmarks/recurrent_crossover.py, results beside it. What is not in the table, "auto" does not choose.
CROSSOVER = {
    (1, 32): Lengths(NEVER, NEVER, NEVER, NEVER),
    (1, 64): Lengths(NEVER, NEVER, NEVER, NEVER),
    (2, 32): Lengths(NEVER, NEVER, NEVER, NEVER),
    (2, 64): Lengths(NEVER, NEVER, NEVER, NEVER),
}
# sums of that many bytes a head are never too large to be asked for by name
SMALL = 2**21


def crossover(degree: int, head_dim: int, is_causal: bool, is_training: bool) -> float:
    """Tokens from which on "auto" takes the recurrent form; infinite where nobody measured."""
    for (measured_degree, largest), lengths in CROSSOVER.items():
        if degree == measured_degree and head_dim <= largest:
            return lengths[2 * (not is_causal) + is_training]
    return NEVER


class Size(NamedTuple):
    """Of the sums of one key head, against its keys and values."""

    features: int
    sum_bytes: int
    token_bytes: int

    @classmethod
    def of(cls, monomials: Monomials, value_dim: int, sum_itemsize: int, key_itemsize: int) -> "Size":
        """value_dim: of the sums, so with the column of ones."""
        token = (monomials.dim + value_dim) * key_itemsize
        return cls(monomials.count, monomials.count * value_dim * sum_itemsize, token)

    @property
    def break_even(self) -> int:
        """Tokens whose keys and values take as much memory as the sums."""
        return -(-self.sum_bytes // self.token_bytes)

    def __str__(self) -> str:
        return f"{self.features:,} features of {self.sum_bytes / 2**20:.1f} MiB a head"
