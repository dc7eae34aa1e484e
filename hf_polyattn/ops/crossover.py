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


# (degree, head_dim): where benchmarks/recurrent_crossover.py saw the ratio pass 1 (benchmarks/results), and some more;
# float32, one thread of a CPU with AVX2, against the compiled form. What lies outside, "auto" does not choose.
CROSSOVER = {
    (1, 32): Lengths(2600, 2700, 1000, 850),
    (1, 64): Lengths(1800, 1800, 600, 500),
    (2, 32): Lengths(6500, 7500, 2600, 3300),
    (2, 64): Lengths(11500, 10500, 5600, 4800),
}
# sums of that many bytes a head are never too large to be asked for by name
SMALL = 2**21


def crossover(degree: int, head_dim: int, is_causal: bool, is_training: bool) -> float:
    """Tokens from which on "auto" takes the recurrent form; infinite where nobody measured."""
    measured = sorted(dim for of_degree, dim in CROSSOVER if of_degree == degree)
    if not measured or not measured[0] <= head_dim <= measured[-1]:
        return NEVER
    larger = next(dim for dim in measured if dim >= head_dim)
    return CROSSOVER[degree, larger][2 * (not is_causal) + is_training]


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
