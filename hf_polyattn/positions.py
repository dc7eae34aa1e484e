"""How long a sequence a model can read."""

from torch import nn
from transformers import PreTrainedModel


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that a model has positions for; None where its configuration names no limit.

    RoBERTa and its like count positions from behind the index of their padding, which max_position_embeddings
    includes: 514 of them hold 512 tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return limit if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
    return limit
