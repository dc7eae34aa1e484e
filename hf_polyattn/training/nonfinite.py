"""What to say when a loss or a gradient is no longer a number: where it began, and what helps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_polyattn_scripts import TrainingStoppedError

from .losses import Loss

REMEDY = (
    "What helps, in this order: a lower learning_rate or longer warmup_steps; max_grad_norm 1.0; calibrated gains "
    "(calibrate_batches 4); qk_norm true, which bounds the scores; bf16 instead of fp16; a lower degree"
)

NOT_REPEATABLE = "no single module (a repetition gave finite values: it depends on dropout, or on the range of fp16)"

SHARDED = "some module (under {} the step is not repeated to find which: no process holds the whole model)"


class NonFiniteError(TrainingStoppedError):
    """Training met NaN or infinity; the message names step, module and remedy."""


def find_nonfinite(model: nn.Module, batches: Iterable[dict[str, Any]], loss: Loss) -> str | None:
    """Where NaN or infinity first shows: in a weight, in the output of a module, or in the gradient of one.

    None when a repetition gives finite values. Runs each batch once more, forward and backward, with a hook on every
    module; gradients stored in the model stay.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if _bad(tensor):
            return f"the tensor {name} itself"
    for batch in batches:
        if place := _first_in(model, batch, loss):
            return place
    return None


def _first_in(model: nn.Module, batch: dict[str, Any], loss: Loss) -> str | None:
    in_output: list[str] = []
    in_gradient: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                # children report before their parents: the first entry is the innermost module
                if _bad(tensor):
                    in_output.append(f"the output of {name} ({type(module).__name__})")
                elif tensor.requires_grad:
                    tensor.register_hook(lambda grad: in_gradient.append(label) if _bad(grad) else None)

        label = f"the gradient that reaches the output of {name} ({type(module).__name__})"
        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with torch.enable_grad():
            total = loss(model, batch)[0].sum()
            if in_output:
                return in_output[0]
            if _bad(total):
                return "the loss itself, from finite logits"
            # autograd.grad instead of backward: it leaves .grad and the hooks of distributed wrappers alone
            gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if in_gradient:
        return in_gradient[0]
    return next((f"the gradient of {name}" for name, g in zip(trainable, gradients, strict=True) if _bad(g)), None)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _bad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
