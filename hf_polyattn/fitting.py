"""Coefficients in closed form: ridge least squares of a head's output on the terms of its polynomial.

o_i = sum_k c_k t_ik with t_ik = sum_j (x_ij^k / Z_i) v_j and x = alpha s + beta is linear in c wherever Z does not
depend on c. So the best coefficients of a head follow from two small sums over all rows i and value dimensions,
G = sum t t' and b = sum t o, which are all that is kept of the data.
"""

import numpy as np
import torch

RIDGE = 1e-6
"""Default ridge, as a share of the mean of the diagonal of G after equilibration."""
GRID = 64
"""Points of the range at which a monotone fit constrains the slope."""


class NormalEquations:
    """Sums of least squares problems, one for each head, in float64.

    gram: [H, K, K], sum of t t'. moment: [H, K], sum of t o. energy: [H], sum of o^2.
    """

    def __init__(self, heads: int, terms: int) -> None:
        self.gram = torch.zeros(heads, terms, terms, dtype=torch.float64)
        self.moment = torch.zeros(heads, terms, dtype=torch.float64)
        self.energy = torch.zeros(heads, dtype=torch.float64)

    def add(self, terms: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds one batch: terms [K, B, H, T, D], target [B, H, T, D], rows [B, H, T] bool, which rows count."""
        used = rows[..., None].to(torch.float64)
        t = (terms.double() * used).permute(2, 0, 1, 3, 4).flatten(2)  # [H, K, B * T * D]
        o = (target.double() * used).transpose(0, 1).flatten(1)  # [H, B * T * D]
        self.gram += (t @ t.transpose(1, 2)).cpu()
        self.moment += (t @ o[..., None])[..., 0].cpu()
        self.energy += o.square().sum(1).cpu()

    def solve(self, ridge: float = RIDGE) -> torch.Tensor:
        """[H, K], the minimum of |o - sum_k c_k t_k|^2 plus the ridge."""
        gram, moment, scale = self._equilibrated(ridge)
        return torch.linalg.solve(gram, moment[..., None])[..., 0] / scale

    def solve_monotone(self, low: torch.Tensor, high: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
        """As `solve`, but for polynomials that do not fall anywhere from low [H] to high [H]."""
        gram, moment, scale = self._equilibrated(ridge)
        return torch.stack(
            [
                torch.from_numpy(_monotone(g.numpy(), b.numpy(), d.numpy(), float(left), float(right)))
                for g, b, d, left, right in zip(gram, moment, scale, low, high, strict=True)
            ]
        )

    def r2(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[H], 1 - |o - sum_k c_k t_k|^2 / |o|^2 of coefficients [H, K]; 1 where o is 0 throughout."""
        c = coefficients.double()
        explained = 2 * (self.moment * c).sum(1) - torch.einsum("hk,hkl,hl->h", c, self.gram, c)
        return torch.where(self.energy > 0, explained / self.energy.clamp(min=1e-300), torch.ones_like(explained))

    def _equilibrated(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """G with a diagonal of ones plus the ridge, b to match, and the scale [H, K] that c is to be divided by.

        Powers of a score differ by orders of magnitude; after this the solution does not depend on alpha's size.
        """
        diagonal = torch.diagonal(self.gram, dim1=1, dim2=2)
        # a head without values has no terms: its coefficients come out as 0
        scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
        gram = self.gram / scale[:, :, None] / scale[:, None, :]
        return gram + ridge * torch.eye(scale.shape[1], dtype=torch.float64), self.moment / scale, scale


def _monotone(gram: np.ndarray, moment: np.ndarray, scale: np.ndarray, low: float, high: float) -> np.ndarray:
    """min c'Gc - 2b'c such that the slope of sum_k (c_k / scale_k) x^k is not negative on a grid of [low, high].

    With G = R'R it is the least distance problem min |z|, A z >= h, for z = R c - R'^-1 b; that one is solved by
    non-negative least squares (Lawson and Hanson, Solving Least Squares Problems, chapter 23).
    """
    powers = np.arange(1, len(moment))
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.linspace(0, np.pi, GRID))
    slopes = np.zeros((GRID, len(moment)))
    slopes[:, 1:] = powers * x[:, None] ** (powers - 1)
    slopes /= scale
    slopes /= np.linalg.norm(slopes, axis=1, keepdims=True)
    upper = np.linalg.cholesky(gram).T
    free = np.linalg.solve(upper.T, moment)
    constraint = np.linalg.solve(upper.T, slopes.T).T  # A = slopes R^-1
    bound = -constraint @ free  # h
    distance = np.zeros_like(free)
    if (bound > 0).any():
        stacked = np.vstack([constraint.T, bound])
        target = np.append(np.zeros(len(free)), 1.0)
        residual = stacked @ nonnegative_least_squares(stacked, target) - target
        distance = -residual[:-1] / residual[-1]
    coefficients = np.linalg.solve(upper, free + distance) / scale
    # between the points of the grid the slope may fall below 0 by very little: raise it there
    coefficients[1] += max(0.0, -lowest_slope(coefficients, low, high))
    return coefficients


def lowest_slope(coefficients: np.ndarray, low: float, high: float) -> float:
    """The smallest derivative of sum_k c_k x^k for x from low to high.

    >>> lowest_slope(np.array([0.0, 0.0, 1.0]), -1.0, 2.0)
    -2.0
    """
    slope = np.polynomial.Polynomial(coefficients).deriv()
    # real parts: a double root comes out as a pair off the real axis
    extrema = np.real(slope.deriv().roots())
    inside = extrema[(low < extrema) & (extrema < high)]
    return float(min(slope(x) for x in [low, high, *inside]))


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """u >= 0 that minimises |a u - b|: the active set method of Lawson and Hanson, chapter 23.

    >>> nonnegative_least_squares(np.eye(2), np.array([3.0, -1.0]))
    array([3., 0.])
    """
    u, used = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-13 * np.abs(a).sum()
    for _ in range(3 * len(u)):
        gain = np.where(used, -np.inf, a.T @ (b - a @ u))
        if gain.max() <= tolerance:
            break
        used[gain.argmax()] = True
        while used.any():
            trial = np.zeros_like(u)
            trial[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
            if trial[used].min() > 0:
                break
            # as far towards the trial as all stay non-negative; what reaches 0 leaves the set
            falling = used & (trial <= 0)
            step = np.min(u[falling] / (u[falling] - trial[falling]))
            u = np.where(used, u + step * (trial - u), 0)
            used &= u > 1e-14 * u.max()
        u = np.where(used, trial, 0)
    return u
