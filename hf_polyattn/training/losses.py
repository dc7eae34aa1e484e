"""Losses as sums and counts, so that averages over batches of unequal size, parts and processes are exact."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..evaluating import evaluating

IGNORE = -100
"""Label of a position without a loss, as everywhere in Transformers."""

Loss = Callable[[nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(model, batch) -> loss sum [b] and number of labels [b]."""


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits [b, T, V] against labels [b, T], IGNORE left out: sum [b] in fp32 and count [b]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(labels.shape).sum(1), count_labels(labels)


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels with a loss in each row: [b, T] -> [b], or [b] -> [b] where a row has a single label."""
    return (labels != IGNORE).view(len(labels), -1).sum(1)


def labels_in_step(accelerator: Accelerator, micro_batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Positions with a loss in all parts of a step and all processes: what the step's loss is an average over.

    1 at least: a step without any label, as masking may draw one, has the loss 0 and not 0 / 0.
    """
    labels = sum(count_labels(batch["labels"]).sum() for batch in micro_batches)
    return accelerator.reduce(labels, reduction="sum").clamp(min=1)


def tokens_in_step(accelerator: Accelerator, micro_batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """Tokens the model reads in a step, over all parts and processes, without padding."""
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in micro_batches]
    return int(accelerator.reduce(sum(mask.sum() for mask in masks), reduction="sum"))


def step_loss(accelerator: Accelerator, loss_sum: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What to call `accelerator.backward` on, so that the gradient is that of the mean over the whole step.

    loss_sum: of this part, on this process. labels: from `labels_in_step`. Undoes two divisions that follow: by the
    number of parts in backward, by the number of processes in the average over gradients.
    """
    return loss_sum / labels * accelerator.gradient_accumulation_steps * accelerator.num_processes


@torch.no_grad()
def mean_loss(accelerator: Accelerator, model: nn.Module, loader: Iterable[dict[str, Any]], loss: Loss) -> float:
    """Mean loss over all labels of `loader`: every row once, whatever the number of processes."""
    total, labels = 0.0, 0
    with evaluating(model):
        for batch in loader:
            sums, counts = accelerator.gather_for_metrics(loss(model, batch))
            total += sums.double().sum().item()
            labels += int(counts.sum())
    return total / max(1, labels)
