"""Calibration: a few batches tell how large each head's scores are and what softmax made of them.

`calibrate` fits either the whole polynomial of a head (`coefficient_fit`) or, here, its size alone.

A raw s^p is dead in a small model and far too hot in a wide one, because the score spread at initialisation goes with
the width. So alpha is set to one over the measured spread of each head, and gain to the ratio of softmax's output to
the polynomial's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from .coefficient_fit import CoefficientReport, fit_coefficients
from .models import read_settings, states
from .observing import ScoreObserver, Seen, as_batches, check_scores, observing, run, scores_of, store, sum_heads
from .state import PolyAttentionState
from .tables import format_span, format_table

Fit = Literal["gain", "coefficients"]
Target = Literal["output_rms", "frobenius"]


@dataclass(frozen=True)
class HeadMeasures:
    """What was measured on one attention module; every tensor is [heads]."""

    spread: torch.Tensor
    """Root mean square of the scores."""
    peak: torch.Tensor
    """Largest absolute score."""
    softmax_rms: torch.Tensor
    """Root mean square of the output of softmax."""
    poly_rms: torch.Tensor
    """Root mean square of the polynomial's output, after calibration."""
    gain: torch.Tensor


@dataclass(frozen=True)
class CalibrationReport:
    """Measures by name of the attention module. Print it for a table."""

    modules: dict[str, HeadMeasures]
    batches: int

    def __str__(self) -> str:
        header = ["module", "score spread", "peak", "softmax rms", "poly rms", "gain"]
        rows = [
            [
                name,
                format_span(m.spread),
                _mean(m.peak.max()),
                _mean(m.softmax_rms),
                _mean(m.poly_rms),
                format_span(m.gain),
            ]
            for name, m in self.modules.items()
        ]
        what = f"calibrated {len(rows)} attention modules on {self.batches} batches: mean (min to max) of the heads"
        return f"{what}\n{format_table(header, rows)}"


class GainObserver(ScoreObserver):
    """Measures scores, and in the second run, with alpha set, the size of both outputs."""

    def __init__(self, state: PolyAttentionState) -> None:
        super().__init__(state)
        heads = state.alpha.shape[0]
        self.peak = torch.zeros(heads)
        self.softmax_squares, self.poly_squares, self.energy = (
            torch.zeros(heads),
            torch.zeros(heads),
            torch.zeros(heads),
        )
        self.total_rows = 0.0
        self.measure_output = False

    def observe(self, seen: Seen) -> None:
        rows = seen.rows
        if self.measure_output:
            options = seen.options | {"dropout": 0.0, "return_weights": True}
            poly, signed = self.state._attend(seen.query, seen.key, seen.value, **options)
            assert signed is not None
            self.total_rows += rows[:, 0].sum().item()
            self.softmax_squares += sum_heads(seen.out.float().square().mean(-1) * rows)
            self.poly_squares += sum_heads(poly.float().square().mean(-1) * rows)
            self.energy += sum_heads(signed.float().square().sum(-1) * rows)
        else:
            scores = scores_of(self.state, seen.query, seen.key, seen.options)
            used = seen.keep & rows[..., None]
            self.add_scores(scores, used)
            self.peak = torch.maximum(self.peak, scores.masked_fill(~used, 0).abs().amax(dim=(0, 2, 3)).float().cpu())

    def gain_factor(self, target: Target) -> torch.Tensor:
        """[heads], what the gain is to be multiplied by."""
        if target == "frobenius":
            return (self.total_rows / self.energy).sqrt()
        return (self.softmax_squares / self.poly_squares).sqrt()

    def measures(self, factor: torch.Tensor) -> HeadMeasures:
        return HeadMeasures(
            spread=self.spread,
            peak=self.peak,
            softmax_rms=(self.softmax_squares / self.total_rows).sqrt(),
            poly_rms=(self.poly_squares / self.total_rows).sqrt() * factor,
            gain=self.state.gain.detach().float().cpu(),
        )


def calibrate(
    model: PreTrainedModel, batches: Iterable[Any], fit: Fit = "coefficients", **options: Any
) -> CalibrationReport | CoefficientReport:
    """Fits the numbers of every patched head to softmax on a few batches, without training.

    Args:
        model: a patched model; for "coefficients", under a normalization such as "length", in which the output is
            linear in them: not "l1", the default of a patch without data. `patch_model(model, calibrate=batches,
            fit=...)` does both in one call and takes "length".
        batches: dictionaries of model inputs, or tensors of input ids; a few are enough.
        fit: "coefficients": the best polynomial of each head, see `fit_coefficients`; "gain": the size of its output
            alone, see `calibrate_gain`.
        **options: of the function that `fit` names, such as inputs="student", monotone=True or target="frobenius".
    Returns:
        what was measured; print it.
    Raises:
        ValueError: where there is nothing to fit, or nothing to fit it to.

    Example:
        >>> model = patch_model(model, degree=3, normalization="length")
        >>> report = calibrate(model, batches, fit="coefficients")
    """
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {get_args(Fit)}, got {fit!r}")
    if fit == "gain":
        return calibrate_gain(model, batches, **options)
    return fit_coefficients(model, batches, **options)


def calibrate_gain(
    model: PreTrainedModel, batches: Iterable[Any], *, target: Target = "output_rms"
) -> CalibrationReport:
    """Sets alpha and gain of every patched head, where the config leaves them "auto", from measured scores.

    Args:
        model: a patched model.
        batches: dictionaries of model inputs, or tensors of input ids; a few are enough. Rows that attention_mask
            calls padding do not count.
        target: "output_rms": the polynomial's output starts at the size of softmax's; "frobenius": the weights start
            at ‖A‖_F = sqrt N.
    Returns:
        what was measured; print it.
    Raises:
        ValueError: for a model that is not patched, no or unfit batches, non-finite scores, or nothing left "auto".
    """
    found = states(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model first")
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {get_args(Target)}, got {target!r}")
    config = read_settings(model.config)
    if config.alpha != "auto" and config.gain != "auto":
        raise ValueError('alpha and gain are fixed numbers in this config: nothing to calibrate; pass gain="auto"')
    batches = as_batches(batches)
    if not batches:
        raise ValueError("no batches to calibrate on: pass a few")
    observers = {name: GainObserver(state) for name, state in found.items()}
    with torch.no_grad(), observing(model, observers):
        run(model, batches, observers.values())
        for name, observer in observers.items():
            check_scores(name, observer.squares)
        for name, observer in observers.items():
            if config.alpha == "auto":
                store(name, observer.state.alpha, 1 / observer.spread)
            observer.measure_output = True
        run(model, batches, observers.values())
        factors = {name: observer.gain_factor(target) for name, observer in observers.items()}
        for name, observer in observers.items():
            if config.gain == "auto":
                store(name, observer.state.gain, observer.state.gain.float().cpu() * factors[name])
            else:
                factors[name] = torch.ones_like(factors[name])
    modules = {name: observer.measures(factors[name]) for name, observer in observers.items()}
    return CalibrationReport(modules, len(batches))


def _mean(x: torch.Tensor) -> str:
    return f"{x.mean().item():.3g}"
