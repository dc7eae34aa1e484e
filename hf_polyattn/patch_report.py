"""What to say of a patch of a checkpoint: it depends on what the source was."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .activations import get_activation
from .config import PolyAttentionConfig
from .models import PolyModelMixin, read_settings, states

TRAIN = "train it before you judge it"
Numbers = Mapping[tuple[str, str, int], torch.Tensor]
"""(attention module, name of a tensor, head) -> its row."""


@dataclass(frozen=True)
class Source:
    """What a model is before a patch: its settings, None for a stock model, and a copy of its attention's numbers."""

    settings: PolyAttentionConfig | None
    numbers: Numbers

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Source":
        return cls(read_settings(model.config) if isinstance(model, PolyModelMixin) else None, _numbers(model))


def describe(settings: PolyAttentionConfig) -> str:
    """Such as "poly of degree 3"; activations that are no polynomials have no degree."""
    is_polynomial = get_activation(settings.activation).is_polynomial
    return settings.activation + (f" of degree {settings.degree}" if is_polynomial else "")


def advice(source: Source, model: PreTrainedModel) -> str:
    """What the patch of `source` to `model` has changed, and whether the model is now to be trained."""
    old, new = source.settings, read_settings(model.config)
    if old is None and new.activation == "softmax":
        return f"its weights were trained without QK-norm: {TRAIN}" if new.qk_norm else "it computes softmax as before"
    if old is None:
        return f"its weights were trained for softmax: {TRAIN}"
    names = [field.name for field in dataclasses.fields(new)]
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    now = _numbers(model)
    anew = {key[1] for key, row in now.items() if key not in source.numbers or not row.equal(source.numbers[key])}
    kept = " but for the normalization" if new.computes_like(old) else ""
    lines = [f"its source was patched already, {describe(old)}: options not named are at their defaults{kept}"]
    if changed:
        lines += ["changed: " + ", ".join(f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in changed)]
    if anew:
        lines += [f"set anew, not taken from the source: {', '.join(sorted(anew))}"]
    lines += [TRAIN if anew or not new.computes_like(old) else "all its numbers are the source's"]
    return "\n".join(lines)


def _numbers(model: PreTrainedModel) -> Numbers:
    return {
        (module, name, head): row.clone()
        for module, state in states(model).items()
        for name, tensor in state.state_dict().items()
        for head, row in zip(state.heads, tensor, strict=True)
    }
