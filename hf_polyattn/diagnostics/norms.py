"""‖A‖_F / sqrt(N) of every head, from the attention weights that a model returns."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..attention import NAME
from ..evaluating import evaluating
from ..observing import real_tokens


@torch.no_grad()
def weight_norms(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """‖A‖_F / sqrt(N) of every head: [layers, heads], in fp32 on the CPU.

    A holds the attention weights of one sequence and N counts its rows. Softmax cannot exceed 1; a polynomial that
    stays near 1 meets the condition under which arXiv 2410.18613 finds training stable.

    Args:
        model: any Transformers model that returns its attention weights; stock ones are switched to their eager form
            for the length of the call.
        batch: model inputs. Rows that attention_mask [B, T] calls padding do not count; several sequences are averaged
            by their squares.
    Raises:
        ValueError: when the model returns no attention weights.
    """
    implementation = model.config._attn_implementation
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with evaluating(model):
        try:
            if implementation not in (NAME, "eager"):
                model.set_attn_implementation("eager")
            attentions = model(**inputs, output_attentions=True).attentions
        finally:
            if implementation not in (NAME, "eager"):
                model.set_attn_implementation(implementation)
    if not attentions or any(weights is None for weights in attentions):
        raise ValueError(f"{type(model).__name__} returned no attention weights")
    return torch.stack([_norms(weights, real_tokens(inputs)) for weights in attentions])


def _norms(weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """[B, H, T, S] -> [H]."""
    energy = weights.float().square().sum(-1)  # [B, H, T]
    rows = energy.new_ones(energy.shape[0], energy.shape[2])
    if real is not None:
        rows = real[:, -energy.shape[2] :].to(energy.dtype)
    return ((energy * rows[:, None]).sum((0, 2)) / rows.sum()).sqrt().cpu()
