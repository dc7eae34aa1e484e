"""Gains from measurement: a few batches tell how large each head's scores are and how large softmax's output was.

A raw s^p is dead in a small model and far too hot in a wide one, because the score spread at initialisation goes with
the width. So alpha is set to one over the measured spread of each head, and gain to the ratio of softmax's output to
the polynomial's.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import get_activation
from .evaluating import evaluating
from .models import read_settings, states
from .ops import attend, rms_normalize
from .ops.masks import build_keep
from .state import PolyAttentionState
from .tables import format_span, format_table

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


class _Observer:
    """Stands in for one state during measurement: computes softmax, so that later layers see a teacher's inputs."""

    def __init__(self, state: PolyAttentionState) -> None:
        self.state = state
        heads = state.alpha.shape[0]
        self.squares, self.count, self.peak = torch.zeros(heads), torch.zeros(heads), torch.zeros(heads)
        self.softmax_squares, self.poly_squares, self.energy = (
            torch.zeros(heads),
            torch.zeros(heads),
            torch.zeros(heads),
        )
        self.rows = 0.0
        self.measure_output = False

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.state.config
        entry = get_activation("softmax")
        out = attend(
            query, key, value, phi=entry.phi, exponential=True, normalization="sum", backend="naive", **options
        )
        out = out[0] if isinstance(out, tuple) else out
        keep = build_keep(
            (query.shape[2], key.shape[2]),
            query.device,
            **{name: options.get(name) for name in ("keep", "sliding_window")},
            is_causal=options["is_causal"],
        )
        if self.measure_output:
            options |= {"dropout": 0.0, "return_weights": True}
            poly, weights = self.state._attend(query, key, value, **options)
            assert weights is not None
            rows = keep.any(-1).expand(query.shape[0], query.shape[1], query.shape[2])
            self.rows += rows[:, 0].sum().item()
            self.softmax_squares += _sum_heads(out.float().square().mean(-1) * rows)
            self.poly_squares += _sum_heads(poly.float().square().mean(-1) * rows)
            self.energy += _sum_heads(weights.float().square().sum(-1) * rows)
        else:
            q, k = (rms_normalize(query), rms_normalize(key)) if config.qk_norm else (query, key)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = options["scaling"] * (q.float() @ k.float().transpose(-1, -2))
            if options.get("softcap") is not None:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            if options.get("bias") is not None:
                scores = scores + options["bias"].float()
            kept = keep.expand_as(scores)
            scores = scores.masked_fill(~kept, 0)
            self.squares += _sum_heads(scores.square().sum(-1))
            self.count += _sum_heads(kept.sum(-1).float())
            self.peak = torch.maximum(self.peak, scores.abs().amax(dim=(0, 2, 3)).cpu())
        return out, None

    @property
    def spread(self) -> torch.Tensor:
        return (self.squares / self.count.clamp(min=1)).sqrt()

    def gain_factor(self, target: Target) -> torch.Tensor:
        """[heads], what the gain is to be multiplied by."""
        if target == "frobenius":
            return (self.rows / self.energy).sqrt()
        return (self.softmax_squares / self.poly_squares).sqrt()

    def measures(self, factor: torch.Tensor) -> HeadMeasures:
        return HeadMeasures(
            spread=self.spread,
            peak=self.peak,
            softmax_rms=(self.softmax_squares / self.rows).sqrt(),
            poly_rms=(self.poly_squares / self.rows).sqrt() * factor,
            gain=self.state.gain.detach().float().cpu(),
        )


def calibrate_gain(
    model: PreTrainedModel, batches: Iterable[Any], *, target: Target = "output_rms"
) -> CalibrationReport:
    """Sets alpha and gain of every patched head, where the config leaves them "auto", from measured scores.

    Args:
        model: a patched model.
        batches: dictionaries of model inputs, or tensors of input ids; a few are enough.
        target: "output_rms": the polynomial's output starts at the size of softmax's; "frobenius": the weights start
            at ‖A‖_F = sqrt N.
    Returns:
        what was measured; print it.
    Raises:
        ValueError: for a model that is not patched, no batches, non-finite scores, or nothing left "auto".
    """
    found = states(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model first")
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {get_args(Target)}, got {target!r}")
    config = read_settings(model.config)
    if config.alpha != "auto" and config.gain != "auto":
        raise ValueError('alpha and gain are fixed numbers in this config: nothing to calibrate; pass gain="auto"')
    batches = list(batches)
    if not batches:
        raise ValueError("no batches to calibrate on: pass a few")
    observers = {name: _Observer(state) for name, state in found.items()}
    with torch.no_grad(), _observing(model, observers):
        _run(model, batches)
        for name, observer in observers.items():
            _check_scores(name, observer)
        for name, observer in observers.items():
            if config.alpha == "auto":
                _store(name, observer.state.alpha, 1 / observer.spread)
            observer.measure_output = True
        _run(model, batches)
        factors = {name: observer.gain_factor(target) for name, observer in observers.items()}
        for name, observer in observers.items():
            if config.gain == "auto":
                _store(name, observer.state.gain, observer.state.gain.float().cpu() * factors[name])
            else:
                factors[name] = torch.ones_like(factors[name])
    modules = {name: observer.measures(factors[name]) for name, observer in observers.items()}
    return CalibrationReport(modules, len(batches))


def _store(name: str, tensor: torch.Tensor, values: torch.Tensor) -> None:
    stored = values.to(tensor)
    if not (torch.isfinite(stored) & (stored != 0)).all():
        raise ValueError(
            f"{name} would need values of {format_span(values)}, which {tensor.dtype} cannot hold: "
            "calibrate in float32 or on batches of real inputs"
        )
    tensor.copy_(stored)


def _check_scores(name: str, observer: _Observer) -> None:
    if not torch.isfinite(observer.squares).all():
        raise ValueError(f"scores of {name} are not finite: the model or the batches hold NaN or inf")
    if dead := (observer.squares == 0).nonzero().flatten().tolist():
        raise ValueError(f"heads {dead} of {name} have only zero scores: pass batches of real, unpadded inputs")


@contextlib.contextmanager
def _observing(model: nn.Module, observers: Mapping[str, _Observer]) -> Iterator[None]:
    """Puts the observers in place of the states' own computation, and the model into eval mode.

    After an error alpha and gain are what they were.
    """
    before = {name: (o.state.alpha.clone(), o.state.gain.clone()) for name, o in observers.items()}
    for observer in observers.values():
        observer.state.observer = observer
    try:
        with evaluating(model):
            yield
    except BaseException:
        for name, (alpha, gain) in before.items():
            observers[name].state.alpha.copy_(alpha)
            observers[name].state.gain.copy_(gain)
        raise
    finally:
        for observer in observers.values():
            observer.state.observer = None


def _run(model: PreTrainedModel, batches: list[Any]) -> None:
    """The attention of `model` on each batch; its head, and with it the logits, is left out where it can be."""
    for batch in batches:
        inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        # models of multiple choice flatten their inputs [B, choices, T] before they pass them on
        ids = inputs.get("input_ids")
        body = model.base_model if ids is None or ids.ndim == 2 else model
        unwanted = {"labels", *_parameters(model) - _parameters(body)}
        body(
            **{
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
                if name not in unwanted
            }
        )


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _sum_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T] -> [H] on the CPU."""
    return x.sum(dim=(0, 2)).float().cpu()


def _mean(x: torch.Tensor) -> str:
    return f"{x.mean().item():.3g}"
