"""The feature map of a polynomial: monomials of a vector, each once.

    (q . k)^p = sum over monomials m of degree p of  multiplicity_m  m(q)  m(k)

with C(d + p - 1, p) monomials of d variables, in the order of their sorted indices, and multiplicity p! / prod a_i!
for x^a (the multinomial theorem). In that order, monomials of degree p are x_0 times all those of degree p - 1, then
x_1 times those without x_0, ...: x_i times a suffix. Features lie before positions in memory, [n, F, C], so that each
of these products, and each matrix product over features, reads rows of positions.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# below so many positions, two gathers beat a loop over the variables
FEW = 16


@dataclass(frozen=True)
class Monomials:
    """All monomials of the given degrees of `dim` variables: of degree p for s^p, of 0 ... p for sum_k c_k s^k."""

    dim: int
    degrees: tuple[int, ...]

    @classmethod
    def of_polynomial(cls, dim: int, degree: int, has_coefficients: bool) -> "Monomials":
        return cls(dim, tuple(range(degree + 1)) if has_coefficients else (degree,))

    @property
    def count(self) -> int:
        return sum(math.comb(self.dim + k - 1, k) for k in self.degrees)

    def block(self, degree: int) -> slice:
        """Where the features of one degree stand."""
        start = sum(math.comb(self.dim + k - 1, k) for k in self.degrees if k < degree)
        return slice(start, start + math.comb(self.dim + degree - 1, degree))

    def of(self, x: Tensor) -> Tensor:
        """x [n, dim, C] -> features [n, F, C]."""
        n, _, positions = x.shape
        out = x.new_empty(n, self.count, positions)
        if 0 in self.degrees:
            out[:, self.block(0)] = 1
        below = x
        for degree in range(1, max(self.degrees) + 1):
            target = out[:, self.block(degree)] if degree in self.degrees else None
            below = self._raise(x, below, degree, target)
        return out

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of x [n, dim, C] from that of the features [n, F, C], which is overwritten."""
        out = torch.zeros_like(x)
        levels = [x]
        for degree in range(2, max(self.degrees)):
            levels.append(self._raise(x, levels[-1], degree, None))
        upper = grad[:, self.block(max(self.degrees))]
        for degree in range(max(self.degrees), 1, -1):
            level = levels[degree - 2]
            lower = grad[:, self.block(degree - 1)] if degree - 1 in self.degrees else torch.zeros_like(level)
            for i, span in enumerate(_spans(self.dim, degree)):
                part, suffix = upper[:, span], slice(level.shape[1] - (span.stop - span.start), None)
                out[:, i] += (part * level[:, suffix]).sum(1)
                lower[:, suffix].addcmul_(x[:, i : i + 1], part)
            upper = lower
        return out.add_(upper) if max(self.degrees) else out

    def _raise(self, x: Tensor, below: Tensor, degree: int, out: Tensor | None) -> Tensor:
        """Monomials of `degree` from those of degree - 1."""
        if degree == 1:
            return x if out is None else out.copy_(x)
        n, _, positions = x.shape
        if out is None:
            out = x.new_empty(n, math.comb(self.dim + degree - 1, degree), positions)
        if positions < FEW:
            first, rest = _indices(self.dim, degree, x.device)
            return torch.mul(x.index_select(1, first), below.index_select(1, rest), out=out)
        for i, span in enumerate(_spans(self.dim, degree)):
            torch.mul(x[:, i : i + 1], below[:, below.shape[1] - (span.stop - span.start) :], out=out[:, span])
        return out

    def multiplicities(self, like: Tensor) -> Tensor:
        """[F], in dtype and on device of `like`."""
        return _multiplicities(self.dim, self.degrees, like.dtype, like.device)

    def weights(self, coefficients: Tensor | None, like: Tensor) -> Tensor:
        """What the features of queries are multiplied by: [F, 1] for a power, [F, H] for coefficients [H, p + 1]."""
        multiplicities = self.multiplicities(like)[:, None]
        if coefficients is None:
            return multiplicities
        return multiplicities * self.spread(coefficients)

    def spread(self, coefficients: Tensor) -> Tensor:
        """[H, p + 1] -> [F, H], the coefficient of each feature's degree."""
        sizes = torch.tensor([math.comb(self.dim + k - 1, k) for k in self.degrees], device=coefficients.device)
        return coefficients.t().repeat_interleave(sizes, dim=0, output_size=self.count)

    def by_degree(self, x: Tensor) -> Tensor:
        """Sums over the features of each degree, times their multiplicities: [F, H] -> [H, degrees]."""
        weighted = x * self.multiplicities(x)[:, None]
        return torch.stack([weighted[self.block(k)].sum(0) for k in self.degrees], dim=1)


@functools.cache
def _spans(dim: int, degree: int) -> tuple[slice, ...]:
    """Monomials of a degree whose first variable is x_i, for each i."""
    counts = [math.comb(dim - i + degree - 2, degree - 1) for i in range(dim)]
    stops = [sum(counts[: i + 1]) for i in range(dim)]
    return tuple(slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True))


@functools.cache
def _indices(dim: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each monomial: its first variable, and the index of the rest among the monomials of degree - 1."""
    counts = torch.tensor([span.stop - span.start for span in _spans(dim, degree)])
    first = torch.arange(dim).repeat_interleave(counts)
    below = math.comb(dim + degree - 2, degree - 1)
    rest = torch.cat([torch.arange(below - count, below) for count in counts.tolist()])
    return first.to(device), rest.to(device)


@functools.cache
def _multiplicities(dim: int, degrees: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """p! / prod a_i!, by p / (how often the first variable occurs) from degree p - 1."""
    parts = [torch.ones(1, dtype=torch.float64)] if 0 in degrees else []
    leads, runs, current = torch.arange(dim), torch.ones(dim), torch.ones(dim, dtype=torch.float64)
    for degree in range(1, max(degrees) + 1):
        if degree > 1:
            first, rest = _indices(dim, degree, torch.device("cpu"))
            runs = torch.where(leads[rest] == first, runs[rest] + 1, 1.0)
            leads, current = first, current[rest] * degree / runs
        if degree in degrees:
            parts.append(current)
    return torch.cat(parts).to(device, dtype)
