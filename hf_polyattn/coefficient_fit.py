"""The best polynomial of every head, in closed form, from a few batches of a softmax model's own queries and keys.

See `fitting` for the least squares. Three runs over the batches measure the scores (spread and range), the normal
equations, and what is left of softmax's output behind the output projection.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import get_activation
from .architectures import get_architecture
from .config import PolyAttentionConfig
from .fit_report import CoefficientReport, HeadFit
from .fitting import RIDGE, NormalEquations
from .models import read_settings, states
from .observing import (
    Observer,
    ScoreObserver,
    Seen,
    as_batches,
    check_scores,
    keep_mask,
    observing,
    run,
    scores_of,
    store,
    sum_heads,
)
from .ops import NORMALIZED
from .ops.normalization import row_scale
from .state import PolyAttentionState

Inputs = Literal["teacher", "student"]
BINS = 60
"""Bins of the calibrated range in which softmax's weights are averaged, for figures."""


class FitObserver(ScoreObserver):
    """Measures one module; what is measured depends on `stage`."""

    def __init__(self, state: PolyAttentionState, layer: int, projection: nn.Module | None) -> None:
        super().__init__(state)
        self.layer, self.projection = layer, projection
        self.stage: Literal["", "scores", "terms", "projected"] = ""
        heads = state.alpha.shape[0]
        self.low, self.high = torch.full((heads,), torch.inf), torch.full((heads,), -torch.inf)
        self.equations = NormalEquations(heads, state.config.degree + 1)
        self.seen, self.mass = torch.zeros(heads, BINS), torch.zeros(heads, BINS)
        self.lost = self.total = 0.0

    def observe(self, seen: Seen) -> None:
        if self.stage == "projected":
            self._compare_projected(seen)
        elif self.stage:
            scores = scores_of(self.state, seen.query, seen.key, seen.options)
            used = seen.keep & seen.rows[..., None]
            if self.stage == "scores":
                self._measure_scores(scores, used)
            else:
                terms, scale = self._terms(scores, seen.value, seen.keep)
                self.equations.add(terms, seen.out, seen.rows)
                self._measure_weights(scores, seen.weights * scale, used)

    def _measure_scores(self, scores: torch.Tensor, used: torch.Tensor) -> None:
        self.add_scores(scores, used)
        for name, sign in (("low", -1.0), ("high", 1.0)):
            extreme = (sign * scores).masked_fill(~used, -torch.inf).amax(dim=(0, 2, 3)).float().cpu()
            setattr(self, name, sign * torch.maximum(sign * getattr(self, name), extreme))

    def _terms(
        self, scores: torch.Tensor, value: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """gain * (x^k / Z) V for k = 0 ... p: [p + 1, B, H, T, Dv], and Z."""
        state = self.state
        alpha, beta, gain = (t.to(scores.dtype).view(-1, 1, 1) for t in (state.alpha, state.beta, state.gain))
        value = value.to(scores.dtype).repeat_interleave(scores.shape[1] // value.shape[1], 1)
        x = (alpha * scores + beta).masked_fill(~keep, 0)
        lengths = keep.sum(-1, keepdim=True).clamp(min=1)
        scale = row_scale(x, lengths, state.config.normalization)
        power = (gain / scale * keep).expand_as(x)
        terms = []
        for _ in range(state.config.degree + 1):
            terms.append(power @ value)
            power = power * x
        return torch.stack(terms), scale

    def _measure_weights(self, scores: torch.Tensor, scaled: torch.Tensor, used: torch.Tensor) -> None:
        """Adds softmax's weights times Z to the bins of their scores: what the polynomial stands in for."""
        low, high = (t.to(scores).view(-1, 1, 1) for t in (self.low, self.high))
        bins = ((scores - low) / (high - low).clamp(min=1e-30) * BINS).long().clamp(0, BINS - 1)
        bins = bins + BINS * torch.arange(bins.shape[1], device=bins.device).view(-1, 1, 1)
        for name, what in (("seen", used.expand_as(scaled).to(scaled)), ("mass", scaled * used)):
            sums = torch.bincount(bins.flatten(), what.flatten(), minlength=BINS * scores.shape[1])
            getattr(self, name).add_(sums.view(-1, BINS).float().cpu())

    def _compare_projected(self, seen: Seen) -> None:
        options = seen.options | {"dropout": 0.0, "return_weights": False}
        poly, _ = self.state._attend(seen.query, seen.key, seen.value, **options)
        self.lost += self._projected_energy((seen.out - poly) * seen.rows[..., None])
        self.total += self._projected_energy(seen.out * seen.rows[..., None])

    def _projected_energy(self, heads_out: torch.Tensor) -> float:
        """|W x|^2 of outputs [B, h, T, Dv] of the patched heads; heads outside the patch count as 0."""
        assert self.projection is not None
        batch, _, length, size = heads_out.shape
        full = heads_out.new_zeros(batch, length, self.state.num_heads, size)
        full[:, :, list(self.state.heads)] = heads_out.transpose(1, 2)
        flat = full.flatten(2)
        # the difference leaves the bias out, which no attention has to produce
        return (self.projection(flat) - self.projection(torch.zeros_like(flat))).double().square().sum().item()


def fit_coefficients(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    inputs: Inputs = "teacher",
    monotone: bool = False,
    ridge: float = RIDGE,
) -> CoefficientReport:
    """Sets the coefficients of every patched head to those whose output is nearest to softmax's, by least squares.

    alpha, where the config leaves it "auto", becomes one over the score spread and gain, where "auto", 1: the
    coefficients carry the size.

    Args:
        model: a patched model with learnable coefficients, under "length", "sqrt_length", "none" or a number.
        batches: dictionaries of model inputs, or tensors of input ids; a few are enough. Rows that attention_mask
            calls padding do not count.
        inputs: "teacher": all layers at once, each on what it sees in the softmax model; "student": layer by layer,
            each on what the polynomial layers before it make of the batches.
        monotone: keep each polynomial from falling anywhere in the range of scores seen, at some cost in R2.
        ridge: of the least squares, relative to the terms' size.
    Returns:
        R2, range and coefficients by module and head; print it.
    Raises:
        ValueError: for a model that is not patched, coefficients that are not learnable, a normalization in which the
            output is not linear in the coefficients, no batches, or scores that are not finite or all 0.
    """
    found = states(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model first")
    if inputs not in get_args(Inputs):
        raise ValueError(f"inputs must be one of {get_args(Inputs)}, got {inputs!r}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    config = read_settings(model.config)
    check_linear(config)
    batches = as_batches(batches)
    if not batches:
        raise ValueError("no batches to calibrate on: pass a few")
    entry = get_architecture(model.config)
    layers = {name: layer for layer, (name, _) in enumerate(entry.attention_modules(model))}
    observers = {
        name: FitObserver(state, layers[name], entry.projection(model, name)) for name, state in found.items()
    }
    names = list(observers)
    steps = [names] if inputs == "teacher" else [[name] for name in names]
    fits: dict[str, HeadFit] = {}
    with torch.no_grad(), observing(model, observers):
        for step in steps:
            chosen = {name: observers[name] for name in step}
            fits |= _fit(model, batches, chosen, list(observers.values()), monotone, ridge)
            for observer in chosen.values():
                # layers behind see the polynomial from here on
                observer.state.observer = None
    return CoefficientReport(fits, len(batches), config.degree, config.normalization)


def _fit(
    model: PreTrainedModel,
    batches: list[Any],
    chosen: Mapping[str, FitObserver],
    everyone: list[FitObserver],
    monotone: bool,
    ridge: float,
) -> dict[str, HeadFit]:
    config = read_settings(model.config)

    def measure(stage: Literal["scores", "terms", "projected"]) -> None:
        for observer in chosen.values():
            observer.stage = stage
        run(model, batches, everyone)
        for observer in chosen.values():
            observer.stage = ""

    measure("scores")
    for name, observer in chosen.items():
        check_scores(name, observer.squares)
        if config.alpha == "auto":
            store(name, observer.state.alpha, 1 / observer.spread)
        if config.gain == "auto":
            observer.state.gain.fill_(1)
    measure("terms")
    for name, observer in chosen.items():
        state = observer.state
        alpha, beta = state.alpha.double().cpu(), state.beta.double().cpu()
        ends = torch.stack([alpha * observer.low.double() + beta, alpha * observer.high.double() + beta])
        if monotone:
            solution = observer.equations.solve_monotone(ends.amin(0), ends.amax(0), ridge)
        else:
            solution = observer.equations.solve(ridge)
        store(name, state.coefficients, solution, allow_zero=True)
    if all(observer.projection is not None for observer in chosen.values()):
        measure("projected")
    return {name: _head_fit(observer) for name, observer in chosen.items()}


def _head_fit(observer: FitObserver) -> HeadFit:
    state = observer.state
    # copies: the report stays what it is when the model is fitted again or trained
    alpha, beta, gain, coefficients = (
        t.detach().cpu().double().clone() for t in (state.alpha, state.beta, state.gain, state.coefficients)
    )
    return HeadFit(
        layer=observer.layer,
        heads=state.heads,
        coefficients=coefficients,
        alpha=alpha,
        beta=beta,
        r2=observer.equations.r2(coefficients),
        projected_r2=1 - observer.lost / observer.total if observer.total else None,
        spread=observer.spread,
        low=observer.low,
        high=observer.high,
        seen=observer.seen,
        weights=observer.mass / observer.seen.clamp(min=1),
        gain=gain,
    )


def check_linear(config: PolyAttentionConfig) -> None:
    """Raises ValueError, with the remedy, where the output is no linear function of learnable coefficients."""
    if not get_activation(config.activation).is_polynomial:
        raise ValueError(f'activation {config.activation!r} has no coefficients to fit: use activation="poly"')
    if config.coefficients != "learnable":
        raise ValueError(
            f"coefficients are {config.coefficients!r}, with nothing to fit: use "
            'coefficients="learnable", or fit="gain"'
        )
    if config.normalization in NORMALIZED:
        raise ValueError(
            f"normalization {config.normalization!r} divides by a sum over the weights, so that the output is not "
            'linear in the coefficients: patch with normalization="length", "sqrt_length", "none" or a number, as '
            'patch_model(model, calibrate=batches, fit="coefficients") does, or use fit="gain"'
        )


class _RangeObserver(Observer):
    """Counts scores outside the calibrated range while the polynomial computes as usual."""

    def __init__(self, state: PolyAttentionState, fit: HeadFit) -> None:
        super().__init__(state)
        self.fit = fit
        self.outside = self.count = torch.zeros(state.alpha.shape[0])

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        keep = keep_mask(query, key, options)
        used = keep & self.rows(keep, query)[..., None]
        scores = scores_of(self.state, query, key, options)
        low, high = (t.to(scores).view(-1, 1, 1) for t in (self.fit.low, self.fit.high))
        # the ends themselves were seen; float32 finds them again to within rounding
        margin = 1e-5 * (high - low)
        beyond = (scores < low - margin) | (scores > high + margin)
        self.outside = self.outside + sum_heads((beyond & used).sum(-1).float())
        self.count = self.count + sum_heads(used.expand_as(scores).sum(-1).float())
        return self.state._attend(query, key, value, **options)


@torch.no_grad()
def scores_beyond(
    model: PreTrainedModel, batches: Iterable[Any], report: CoefficientReport
) -> dict[str, torch.Tensor]:
    """Share of scores outside the range that the coefficients were fitted on, where a polynomial leaves exp quickly.

    Args:
        model: the polynomial model; it computes as it is, so that drifting inputs count as they are.
        batches: as in `fit_coefficients`, but other ones.
        report: of the calibration.
    Returns:
        [heads] by the name of the attention module.
    Raises:
        ValueError: when the report is of other modules or heads than the model has.
    """
    found = states(model)
    if {name: state.heads for name, state in found.items()} != {
        name: fit.heads for name, fit in report.modules.items()
    }:
        raise ValueError("the report is of other modules or heads: calibrate this model first")
    observers = {name: _RangeObserver(state, report.modules[name]) for name, state in found.items()}
    with observing(model, observers):
        run(model, batches, observers.values())
    return {name: observer.outside / observer.count.clamp(min=1) for name, observer in observers.items()}
