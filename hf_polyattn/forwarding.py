"""What happens before each forward pass of a patched model: what its attention modules would not be told otherwise.

A hook and not a forward of our own, for accelerate and others replace the forward of an instance.
"""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from .architectures import Architecture, get_architecture
from .attention import RETURN_WEIGHTS

_HANDLE = "_polyattn_handle"


def watch(model: PreTrainedModel) -> None:
    """Puts the hook on the base model inside `model`; repeating it changes nothing."""
    base = model.base_model
    if _HANDLE not in base.__dict__:
        hook = BeforeForward(tuple(inspect.signature(type(base).forward).parameters)[1:])
        base.__dict__[_HANDLE] = base.register_forward_pre_hook(hook, with_kwargs=True)


def unwatch(model: PreTrainedModel) -> None:
    """Undoes `watch` in all models inside `model`."""
    for module in model.modules():
        module.__dict__.pop(RETURN_WEIGHTS, None)
        if _HANDLE in module.__dict__:
            module.__dict__.pop(_HANDLE).remove()


class BeforeForward:
    """The hook. names: of the parameters of the model's forward, in their order."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        entry = get_architecture(model.config)
        note_output_attentions(entry, model, bool(given.get("output_attentions")))
        return (args, {**kwargs, "use_cache": False}) if must_not_cache(entry, model, given) else None


def note_output_attentions(entry: Architecture, model: PreTrainedModel, wanted: bool) -> None:
    """Tells the attention modules when a call asks for weights: GPT-2's do not pass the argument on.

    So two threads that use one GPT-2 at a time must agree on output_attentions.
    """
    # the note stays until the next call, because gradient checkpointing runs the layers again in backward
    if getattr(model, RETURN_WEIGHTS, False) != wanted:
        for _, module in entry.attention_modules(model):
            setattr(module, RETURN_WEIGHTS, wanted)
        setattr(model, RETURN_WEIGHTS, wanted)


def must_not_cache(entry: Architecture, model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether packed sequences come without a mask: Transformers keeps them apart only where there is no cache.

    Raises:
        ValueError: where the packed sequences would see one another whatever we do (not seen inside torch.compile).
    """
    positions = given.get("position_ids")
    if positions is None or positions.ndim != 2 or (given.get("use_cache") is False and entry.reads_packing):
        return False
    if given.get("attention_mask") is not None or given.get("past_key_values") is not None:
        return False
    if torch.compiler.is_compiling():
        return entry.reads_packing and given.get("use_cache") is None
    if not bool((positions.diff(dim=1) <= 0).any()):
        return False
    if not entry.reads_packing:
        raise ValueError(
            f"position_ids start anew within a row, but {type(model).__name__} does not keep packed sequences apart "
            "by them: pass a 4-D attention mask [B, 1, T, T], or padded sequences"
        )
    if given.get("use_cache"):
        raise ValueError(
            "position_ids start anew within a row: packed sequences are kept apart only without a cache. "
            "Leave use_cache out or pass use_cache=False"
        )
    return True
