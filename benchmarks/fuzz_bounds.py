"""How far rounding can take a form of the operation from the definition, element by element.

The definition is evaluated once more in float64, with errors beside the values: every product and sum carries the
error of what goes into it and adds its own. With unit roundoff u, a sum of n terms x_i in any order is off by at most
gamma(n) sum |x_i|, where gamma(n) = min(n, 6 sqrt(n)) u: the second is the bound of Higham and Mary (A new approach to
probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019) for roundings that are as good as random, at a
constant that an element exceeds with probability 2 exp(-18). Nothing is fitted to what the forms return.

Three things differ between forms (`Rounding`): the precision of the sums, that of intermediate results (the compiled
and the fused form keep weights and their gradients in the inputs' dtype), and whether scores exist (the linear-cost
form sums products of monomials, whose rounding is relative to phi of sum |q| |k| and not to phi of the score).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_polyattn.ops.affine import shift_and_scale
from hf_polyattn.ops.normalization import EPS

TINY = 1e-30  # below what any dtype here distinguishes from 0, beside float16 and its floor


@dataclass(frozen=True)
class Rounding:
    """sums: unit roundoff of sums; kept: of intermediate results that are stored; result: of what is returned.

    floor: what counts as zero. largest: finite number of the dtype of results.
    """

    sums: float
    kept: float
    result: float
    floor: float
    largest: float
    has_scores: bool

    @classmethod
    def of(cls, form: str, dtype: torch.dtype) -> "Rounding":
        sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
        result = torch.finfo(dtype).eps / 2
        kept = result if form in ("cpu", "fused") else sums
        floor = torch.finfo(dtype).smallest_normal * result + TINY
        return cls(sums, kept, result, floor, torch.finfo(dtype).max, form != "recurrent")

    def gamma(self, terms: float) -> float:
        return min(terms, 6 * math.sqrt(terms)) * self.sums

    def returned(self, error: Tensor, exact: Tensor) -> Tensor:
        """The error after two roundings to the dtype of the result."""
        return error + 2 * self.result * (exact.abs() + error) + self.floor


@dataclass
class Problem:
    """One call, in float64 and with everything broadcast.

    query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv] as the caller passes them, keep [B, H, T, S],
    coefficients [H, p + 1], alpha, beta and gain [H], bias [B, H, T, S], probe [B, H, T, Dv]: the output's gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    coefficients: Tensor
    alpha: Tensor
    beta: Tensor
    gain: Tensor
    bias: Tensor
    probe: Tensor
    normalization: str | float
    scaling: float
    softcap: float | None
    qk_norm: bool


def polynomial(coefficients: Tensor, x: Tensor, derivative: int = 0) -> Tensor:
    """Of x [B, H, T, S] for coefficients [H, p + 1]."""
    out = torch.zeros_like(x)
    for k in range(coefficients.shape[1] - 1, derivative - 1, -1):
        out = out * x + coefficients[:, k, None, None] * math.perm(k, derivative)
    return out


def bounds(problem: Problem, rounding: Rounding) -> dict[str, Tensor]:
    """Largest admissible error of each element of the output and of the gradients; infinite where Z is lost in it."""
    gamma, u, kept = rounding.gamma, rounding.sums, rounding.kept
    groups = problem.query.shape[1] // problem.key.shape[1]
    q, q_error, q_norm = normalized(problem.query, problem.qk_norm, rounding)
    k, k_error, k_norm = normalized(problem.key, problem.qk_norm, rounding)
    heads_of = lambda x: x.repeat_interleave(groups, dim=1)  # noqa: E731
    of_group = lambda x: x.unflatten(1, (-1, groups)).sum(2)  # noqa: E731
    k, k_error, v = heads_of(k), heads_of(k_error), heads_of(problem.value)
    keep = problem.keep.to(q.dtype)
    dim, keys, rows = q.shape[3], k.shape[2], q.shape[2] * groups

    # scores, and S = scaling sum |q| |k|, which their errors are relative to
    scores = problem.scaling * q @ k.mT
    largest = abs(problem.scaling) * q.abs() @ k.abs().mT
    error = gamma(dim + 4) * largest
    error = error + abs(problem.scaling) * (q_error @ k.abs().mT + q.abs() @ k_error.mT)
    steepness, steepness_error = torch.ones_like(scores), torch.zeros_like(scores)
    if problem.softcap is not None:
        tanh = torch.tanh(scores / problem.softcap)
        steepness, steepness_error = 1 - tanh.square(), 8 * u + 2 * error / problem.softcap
        scores = problem.softcap * tanh
        error = error + 8 * u * scores.abs()
    scores = (scores + problem.bias) * keep
    error = (error + 2 * u * (scores.abs() + problem.bias.abs())) * keep

    # phi and phi', as coefficients of the score
    composed = shift_and_scale(problem.coefficients, problem.alpha, problem.beta)
    absolute = shift_and_scale(problem.coefficients.abs(), problem.alpha.abs(), problem.beta.abs())
    degree = composed.shape[1] - 1
    # what roundings of the evaluation are relative to, and how many there are
    size, steps = scores.abs() + error, 4.0 * degree + 4
    if not rounding.has_scores:
        features = math.comb(dim + degree, degree)
        size, steps = torch.maximum(size, largest * keep), steps + features + keys + rows
    size = size * keep
    phi, slope = polynomial(composed, scores) * keep, polynomial(composed, scores, 1) * keep
    phi_size, slope_size = polynomial(absolute, size) * keep, polynomial(absolute, size, 1) * keep
    phi_error = slope_size * error + gamma(steps) * phi_size
    slope_error = polynomial(absolute, size, 2) * error * keep + gamma(steps) * slope_size
    phi_most, slope_most = phi.abs() + phi_error, slope.abs() + slope_error

    # Z, and its relative error
    scale, scale_error = divisor(problem.normalization, phi, phi_error, keep, gamma(keys) + kept, u)

    gain = problem.gain.abs()[:, None, None]
    raw = phi @ v / scale
    raw_most = phi_most @ v.abs() / scale
    raw_error = (phi_error @ v.abs() / scale) + raw_most * (scale_error + kept + gamma(keys) + 4 * u)
    if not rounding.has_scores:
        raw_error = raw_error + gamma(steps) * (phi_size @ v.abs()) / scale
    out = {"out": rounding.returned(gain * raw_error, gain * raw)}

    # g = gain dO / Z, dv and dw = g . v - pull dZ/dphi
    g = gain * problem.probe / scale
    g_error = scale_error + 2 * kept + 4 * u
    dv = of_group(phi_most.mT @ g.abs())
    dv_error = of_group(phi_error.mT @ g.abs() + phi_most.mT @ (g.abs() * (g_error + kept))) + gamma(rows + 2) * dv
    dw = g @ v.mT
    dw_error = (g.abs() @ v.abs().mT) * (gamma(v.shape[3]) + g_error)
    pull = (g * raw).sum(-1, keepdim=True)
    pull_most = (g * raw).abs().sum(-1, keepdim=True)
    pull_error = (g.abs() * (raw_error + 2 * kept * raw.abs())).sum(-1, keepdim=True)
    pull_error = pull_error + pull_most * (g_error + scale_error + gamma(v.shape[3]) + 2 * u)
    match problem.normalization:
        case "sum":
            dw, dw_error = dw - pull, dw_error + pull_error
        case "l1":
            unsure = (phi.abs() <= phi_error) * 2 * (pull_most + pull_error)
            dw, dw_error = dw - pull * phi.sign(), dw_error + pull_error + unsure
        case "l2":
            dw = dw - pull * phi / scale
            dw_error = dw_error + pull_error * phi_most / scale
            dw_error = dw_error + pull_most * (phi_error + phi_most * (scale_error + 2 * u)) / scale
    dw, dw_error = dw * keep, dw_error * keep
    dw_most = dw.abs() + dw_error

    # ds, dq and dk
    ds = slope * dw
    ds_error = slope_error * dw_most + slope_most * dw_error + (kept + 2 * u) * slope_most * dw_most
    if not rounding.has_scores:
        ds_error = ds_error + gamma(steps) * slope_size * dw_most
    dbias_error = ds_error
    ds_error = ds_error * steepness + (ds.abs() + ds_error) * steepness_error
    ds_most = (ds * steepness).abs() + ds_error
    scaling = abs(problem.scaling)
    dq_most, dk_most = scaling * ds_most @ k.abs(), scaling * ds_most.mT @ q.abs()
    dq_error = scaling * (ds_error @ k.abs() + ds_most @ k_error) + gamma(keys + 4) * dq_most
    dk_error = of_group(scaling * (ds_error.mT @ q.abs() + ds_most.mT @ q_error) + gamma(rows + 4) * dk_most)
    dk_most = of_group(dk_most)
    out["value"] = rounding.returned(dv_error, dv)
    out["query"] = through_norm(problem.query, q_norm, dq_most, dq_error, rounding)
    out["key"] = through_norm(problem.key, k_norm, dk_most, dk_error, rounding)
    out["bias"] = rounding.returned(dbias_error + gamma(ds.numel()) * ds_most, ds_most)

    # sums over everything: gain, coefficients and the affine score
    count = problem.probe.numel() + phi.numel()
    along = (problem.probe * raw).abs()
    of_gain = problem.probe.abs() * (raw_error + 2 * kept * raw.abs()) + gamma(count) * along
    out["gain"] = of_gain.sum((0, 2, 3)) + TINY
    dc, dc_error = [], []
    for power in range(degree + 1):
        lower = power * size ** max(0, power - 1) * error
        dc.append((size**power * dw_most).sum((0, 2, 3)))
        dc_error.append((size**power * dw_error + lower * dw_most).sum((0, 2, 3)) + gamma(count + steps) * dc[-1])
    leaves = [x.abs().requires_grad_() for x in (problem.coefficients, problem.alpha, problem.beta)]
    with torch.enable_grad():
        composed = shift_and_scale(*leaves)
        probe = torch.stack(dc_error, 1) + 8 * (degree + 1) * u * torch.stack(dc, 1)
        grads = torch.autograd.grad(composed, leaves, probe, allow_unused=True, materialize_grads=True)
    out |= {name: x + TINY for name, x in zip(("coefficients", "alpha", "beta"), grads, strict=True)}
    # what is computed here is rounded too, and second orders are not complete: a quarter more
    return {name: (1.25 * x).nan_to_num(nan=math.inf, posinf=math.inf) for name, x in out.items()}


def normalized(x: Tensor, wanted: bool, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """x after QK-norm, its error, and 1 / RMS; x as it is where that is not wanted."""
    if not wanted:
        return x, torch.zeros_like(x), None
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    y = x * inverse
    return y, y.abs() * (rounding.gamma(x.shape[-1]) + 6 * rounding.sums + rounding.result), inverse


def through_norm(x: Tensor, inverse: Tensor | None, most: Tensor, error: Tensor, rounding: Rounding) -> Tensor:
    """The bound of a gradient after the way back through QK-norm: dx = (dy - y (y . dy) / D) / RMS."""
    if inverse is None:
        return rounding.returned(error, most)
    y = (x * inverse).abs()
    # the gradient of y is stored in the dtype too, and may leave its range where that of x does not
    lost = (most + error > rounding.largest).any(-1, keepdim=True)
    error = rounding.returned(error, most).masked_fill(lost, math.inf)
    own = 2 * rounding.gamma(x.shape[-1] + 10)
    mean = lambda z: y * (y * z).mean(-1, keepdim=True)  # noqa: E731
    return rounding.returned(
        inverse * (error + mean(error) + own * (most + mean(most))), inverse * (most + mean(most))
    )


def divisor(
    normalization: str | float, phi: Tensor, phi_error: Tensor, keep: Tensor, own: float, u: float
) -> tuple[Tensor, Tensor]:
    """Z [B, H, T, 1] and its relative error, infinite from one half on; `own` is that of the sum itself."""
    lengths = keep.sum(-1, keepdim=True).clamp(min=1)
    of = lambda x: x.sum(-1, keepdim=True)  # noqa: E731
    exact, error = torch.ones_like(lengths), torch.full_like(lengths, 2 * u)
    match normalization:
        case "sqrt_length":
            exact = lengths.sqrt()
        case "length":
            exact = lengths
        case "sum" | "l1":
            exact = EPS + of(phi if normalization == "sum" else phi.abs())
            error = error + (of(phi_error) + own * of(phi.abs() + phi_error)) / exact.abs()
        case "l2":
            square = EPS + of(phi.square())
            exact = square.sqrt()
            most = phi.abs() + phi_error
            error = error + (of((phi.abs() + most) * phi_error) + 2 * own * of(most.square())) / (2 * square)
        case float() | int():
            exact = torch.full_like(lengths, float(normalization))
    return exact, torch.where(error < 0.5, error / (1 - error), math.inf)
