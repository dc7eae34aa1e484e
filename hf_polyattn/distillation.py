"""Distillation of the logits: all weights of a converted model learn from the softmax model and from labels."""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .architectures import get_architecture
from .conversion import refuse_shared
from .evaluating import evaluating, training
from .models import states
from .observing import real_tokens
from .steps import DivergedError, EarlyStop, StepCheckpoint, Steps, rounds, without_cache


@dataclass(frozen=True)
class DistillReport:
    """What a distillation went through."""

    losses: torch.Tensor
    """[steps], each before its step."""
    tokens: int
    """Tokens seen, without padding."""
    seconds: float
    name: str = "distillation"
    """fine-tuning where there were labels alone."""

    def __str__(self) -> str:
        tenth = max(1, len(self.losses) // 10)
        first, last = self.losses[:tenth].mean().item(), self.losses[-tenth:].mean().item()
        return (
            f"{self.name}: {len(self.losses)} steps, {self.tokens:,} tokens, {self.seconds:.0f} s; mean loss "
            f"{first:.4f} in the first tenth of the steps, {last:.4f} in the last"
        )


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    cross_entropy: float = 0.1,
    temperature: float = 1.0,
    learning_rate: float = 1e-5,
    attention_learning_rate: float = 1e-4,
    polyattn_learning_rate: float = 1e-2,
    final_ratio: float = 0.01,
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
    checkpoint: StepCheckpoint | None = None,
    early_stop: EarlyStop | None = None,
    progress: bool = True,
) -> DistillReport:
    """Trains all weights of `student` on the teacher's logits, and on labels: (1 - c) T^2 KL + c cross-entropy.

    Weights that require no gradient stay. Embeddings that are tied to the output stay tied: they are one parameter.

    Args:
        student: a model with a head, of a registered architecture; patched or not, such as the softmax twin on equal
            tokens.
        teacher: a model whose logits have the same shape; None where cross_entropy is 1.
        batches: dictionaries of model inputs, with labels [B, T] where cross_entropy > 0 (for a causal model the
            input ids themselves: Transformers shifts them).
        steps: optimizer steps; default: one for each batch.
        cross_entropy: c.
        temperature: T, which divides both models' logits.
        learning_rate: of the body; attention_learning_rate of the attention modules; polyattn_learning_rate of what
            the patch learns. Each falls along a cosine to final_ratio of itself.
        warmup_steps: over which the rates rise from zero.
        max_grad_norm: to which gradients are clipped; 0: not at all.
        checkpoint: where to keep the steps, and to go on from after a stop, dropout included.
        early_stop: a score to watch; the steps end when it falls no more, and the best weights come back.
        progress: show a bar.
    Returns:
        the losses; print it.
    Raises:
        ValueError: for the same model twice, shared weights, no data, no labels, an architecture without an entry, a
            teacher's logits that are not finite or of another shape.
        DivergedError: for a loss or gradient that is not finite.
    """
    if not 0 <= cross_entropy <= 1:
        raise ValueError(f"cross_entropy is a share of the loss, from 0 to 1, got {cross_entropy}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if teacher is None and cross_entropy < 1:
        raise ValueError("no teacher: pass one, or cross_entropy=1 to train on labels alone")
    if teacher is not None:
        refuse_shared(student, teacher)
    total, taken = rounds(batches, steps)
    groups = _distillation_groups(student, learning_rate, attention_learning_rate, polyattn_learning_rate)
    groups = [{**group, "last": final_ratio * group["first"]} for group in groups]
    stepping = Steps(
        groups,
        total,
        "distillation" if cross_entropy < 1 else "fine-tuning",
        warmup_steps=warmup_steps,
        checkpoint=checkpoint,
        early_stop=early_stop,
        progress=progress,
    )
    watching = contextlib.nullcontext() if teacher is None else evaluating(teacher)
    with training(student), watching:
        for inputs in stepping.over(taken):
            inputs = {k: v.to(student.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            loss = _distillation_loss(student, teacher, inputs, cross_entropy, temperature)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(stepping.parameters, max_grad_norm or math.inf)
            if not torch.isfinite(loss + norm):
                raise DivergedError(
                    f"{stepping.name}: not finite in step {stepping.done + 1}: loss {loss.item()}, gradient norm "
                    f"{norm.item()}; the student has the weights of the step before. Calibrate it first, or lower the "
                    "learning rates"
                )
            stepping.take(loss)
    return DistillReport(stepping.losses, stepping.tokens, stepping.seconds, stepping.name)


def _distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    inputs: dict[str, Any],
    cross_entropy: float,
    temperature: float,
) -> torch.Tensor:
    if cross_entropy and "labels" not in inputs:
        raise ValueError("cross_entropy > 0 needs labels in every batch")
    out = student(**without_cache(student, {k: v for k, v in inputs.items() if cross_entropy or k != "labels"}))
    loss = cross_entropy * out.loss if cross_entropy else out.logits.new_zeros(())
    if teacher is None or cross_entropy == 1:
        return loss
    asked = {k: v.to(teacher.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        wanted = teacher(**without_cache(teacher, asked)).logits.to(out.logits.device)
    if wanted.shape != out.logits.shape:
        raise ValueError(f"the teacher's logits are {tuple(wanted.shape)}, the student's {tuple(out.logits.shape)}")
    if not torch.isfinite(wanted).all():
        raise ValueError("the teacher's logits are not finite: check its weights and the batches")
    given = F.log_softmax(out.logits.float() / temperature, -1)
    wanted = F.log_softmax(wanted.float() / temperature, -1)
    rows = real_tokens(inputs)
    # a classifier's logits [B, C] have no tokens
    if rows is not None and given.ndim == 3 and rows.shape == given.shape[:2]:
        given, wanted = given[rows], wanted[rows]
    divergence = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
    return loss + (1 - cross_entropy) * temperature**2 * divergence


def _distillation_groups(student: PreTrainedModel, body: float, attention: float, polyattn: float) -> list[dict]:
    """Parameters in three groups; a tied one is listed once."""
    own = {id(p) for state in states(student).values() for p in state.parameters()}
    hosts = [module for _, module in get_architecture(student.config).attention_modules(student)]
    inside = {id(p) for module in hosts for p in module.parameters()} - own
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in student.parameters():
        if parameter.requires_grad:
            rate = polyattn if id(parameter) in own else attention if id(parameter) in inside else body
            groups.setdefault(rate, []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the student requires a gradient: nothing to train")
    return [{"params": parameters, "first": rate} for rate, parameters in groups.items()]
