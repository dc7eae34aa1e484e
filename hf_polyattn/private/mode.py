"""A patched model whose attention adds and multiplies only: a constant denominator, and plain numbers."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..activations import change_config
from ..models import states
from ..observing import Observer, Seen, as_batches, as_stored, observing, run
from ..patchable import unwrap
from ..patching import apply_patch, say
from ..state import PolyAttentionState
from .fold import check_polynomial, fold


class DenominatorObserver(Observer):
    """Collects Z of the rows that are no padding, while softmax is computed."""

    def __init__(self, state: PolyAttentionState) -> None:
        super().__init__(state)
        self.inverse, self.count, self.low, self.high = 0.0, 0, torch.inf, 0.0

    def observe(self, seen: Seen) -> None:
        lengths = seen.keep.sum(-1).expand(seen.query.shape[:3])[seen.rows].double()
        scale = lengths.sqrt() if self.state.config.normalization == "sqrt_length" else lengths
        self.inverse += (1 / scale).sum().item()
        self.count += scale.numel()
        if scale.numel():
            self.low, self.high = min(self.low, scale.min().item()), max(self.high, scale.max().item())


def make_private(
    model: PreTrainedModel, batches: Iterable[Any] | None = None, *, length: int | None = None
) -> PreTrainedModel:
    """Gives a patched encoder a constant denominator and folds all its numbers into coefficients, in place.

    Afterwards the attention is o_i = sum_j P_h(s_ij) v_j / Z with one polynomial for each head and one number Z; alpha
    and gain are 1, beta is 0. It is an ordinary patched model with normalization=Z: it saves, reloads and computes as
    any other. A model that has a number for its normalization already keeps it, and computes what it did.

    Under "length" or "sqrt_length" Z_i was the row's own. Where all sequences are as long as those that Z comes from
    nothing changes; where they differ the output of long and short rows does, so train under the number itself:
    patch_model(model, degree=2, normalization=64), calibrate, transfer, and make_private last.

    Args:
        model: patched in all layers and heads, with a polynomial, without QK-norm, not causal.
        batches: for "length" and "sqrt_length": 1 / Z becomes the mean of 1 / Z_i over the rows that are no padding.
        length: instead of batches, the one length that all inputs have.
    Returns:
        the same object.
    Raises:
        ValueError: for a model that cannot be private, with the remedy, where Z cannot be told, and for coefficients
            that the model's dtype cannot hold; the model is what it was then.
    """
    base = unwrap(model)
    settings = check_polynomial(base)
    if settings.normalization in ("sum", "l1", "l2"):
        raise ValueError(
            f"normalization {settings.normalization!r} divides by a sum over the weights, for which no constant "
            'stands in: patch with normalization="length" or a number, and calibrate'
        )
    constant, span = settings.normalization, ""
    if constant in ("length", "sqrt_length"):
        constant, span = _constant(base, batches, length)
    elif batches is not None or length is not None:
        raise ValueError(f"the denominator is {constant!r} already: leave batches and length out")
    remedy = "call model.float() first"
    # before anything changes
    coefficients = {
        name: as_stored(name, state.alpha, fold(state), remedy, allow_zero=True)
        for name, state in states(base).items()
    }
    plain = {"alpha": 1.0, "beta": 0.0, "gain": 1.0, "learn_gain": False, "learn_affine": False}
    changes = {**plain, "activation": "poly", "coefficients": "learnable", "normalization": constant}
    apply_patch(base, change_config(settings, **changes))
    with torch.no_grad():
        for name, state in states(base).items():
            # the patch has kept what it took for the same function's
            state.reset_parameters()
            state.coefficients.copy_(coefficients[name])
    shown = constant if isinstance(constant, str) else f"{constant:.6g}"
    say(f"private: degree {settings.degree}, denominator {shown}{span}; alpha, beta and gain are in the coefficients")
    return model


def _constant(model: PreTrainedModel, batches: Iterable[Any] | None, length: int | None) -> tuple[float, str]:
    """Z, and how far the rows were from it."""
    found = states(model)
    kind = next(iter(found.values())).config.normalization
    if (batches is None) == (length is None):
        raise ValueError(f"normalization {kind!r} becomes one number: give either batches or the length of all inputs")
    if length is not None:
        if length < 1:
            raise ValueError(f"length must be a number of tokens, got {length}")
        return (float(length) if kind == "length" else length**0.5), ""
    observers = {name: DenominatorObserver(state) for name, state in found.items()}
    with torch.no_grad(), observing(model, observers):
        run(model, as_batches(batches or []), observers.values())
    count = sum(observer.count for observer in observers.values())
    if not count:
        raise ValueError("no batches to measure the denominator on: pass a few, or length=")
    low = min(observer.low for observer in observers.values())
    high = max(observer.high for observer in observers.values())
    if low == high:
        return low, ""
    mean = count / sum(observer.inverse for observer in observers.values())
    return mean, f" (rows had {low:.4g} to {high:.4g}: their outputs change by as much)"
