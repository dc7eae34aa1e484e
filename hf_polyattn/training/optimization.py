"""Optimizer and learning rate. The rate is a function of the step, so there is no scheduler to save."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_polyattn_arguments import OptimizationArguments


def parameter_groups(model: nn.Module, args: OptimizationArguments) -> list[dict[str, Any]]:
    """Matrices and embeddings with decay; biases and norms without; the attention's own learned state without.

    Weight decay would pull the coefficients of a polynomial towards attention that is 0.
    """
    decay, plain, polyattn = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".polyattn." in f".{name}":
            polyattn.append(parameter)
        elif parameter.ndim >= 2:
            decay.append(parameter)
        else:
            plain.append(parameter)
    rate = args.learning_rate
    groups = [
        {"name": "decay", "params": decay, "weight_decay": args.weight_decay, "base_rate": rate},
        {"name": "plain", "params": plain, "weight_decay": 0.0, "base_rate": rate},
        {
            "name": "polyattn",
            "params": polyattn,
            "weight_decay": 0.0,
            "base_rate": rate * args.polyattn_learning_rate_multiplier,
        },
    ]
    # lr: for the schedulers of others, which multiply what they find there
    return [{**group, "lr": group["base_rate"]} for group in groups if group["params"]]


def adamw(model: nn.Module, args: OptimizationArguments) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, args),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=torch.cuda.is_available(),
    )


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clips to max_norm, 0: not at all; returns the norm before clipping, the same on every process."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if hasattr(norm, "full_tensor"):
        # FSDP2 keeps even the norm in shards
        norm = norm.full_tensor()
    # DeepSpeed clips by its own configuration and may not tell
    return torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device)


def check_deepspeed_clipping(plugin: Any, max_norm: float) -> None:
    """Raises ValueError when DeepSpeed, which clips by itself, would clip to another norm than max_norm.

    plugin: accelerate's DeepSpeedPlugin, None without DeepSpeed.
    """
    if plugin is None:
        return
    clipping = plugin.deepspeed_config.get("gradient_clipping", 0.0)
    if clipping != max_norm:
        raise ValueError(
            f"DeepSpeed's gradient_clipping is {clipping} and max_grad_norm {max_norm}: DeepSpeed clips by its own "
            "number, so set both alike"
        )


def rate_factor(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Share of the highest learning rate in `step`, counted from 1: linear warm-up, then a cosine down to min_ratio.

    >>> [round(rate_factor(step, 10, 2, 0.1), 3) for step in (1, 2, 3, 10)]
    [0.5, 1.0, 0.966, 0.1]
    """
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: Any, args: OptimizationArguments, step: int, total_steps: int) -> float:
    """Sets the rate of every group for `step` and returns that of the plain weights."""
    factor = rate_factor(step, total_steps, args.warmup_steps, args.min_learning_rate_ratio)
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor
    return args.learning_rate * factor
