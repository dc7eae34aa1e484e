"""Random token masking for masked language models, drawn from (seed, position) so that it can be repeated exactly."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .losses import IGNORE


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, seed: int, probability: float = 0.15
) -> Callable[[list[tuple[int, Any]]], dict[str, torch.Tensor]]:
    """Collator of (position, {"input_ids"}) -> input_ids [b, T] and labels [b, T].

    Each token that is not special is chosen with `probability`; of the chosen, 8 in 10 become the mask token, 1 in 10
    a random token, 1 in 10 stay (Devlin et al. 2019, section 3.1). Labels are IGNORE elsewhere.
    """
    special = np.array(sorted(set(tokenizer.all_special_ids)))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)

    def collate(examples: list[tuple[int, Any]]) -> dict[str, torch.Tensor]:
        rows, labels = [], []
        for position, example in examples:
            random = np.random.default_rng([seed, position])
            ids = np.array(example["input_ids"], dtype=np.int64)
            chosen = (random.random(ids.shape) < probability) & ~np.isin(ids, special)
            fate = random.random(ids.shape)
            labels.append(np.where(chosen, ids, IGNORE))
            replaced = np.where(fate < 0.8, tokenizer.mask_token_id, random.choice(ordinary, ids.shape))
            rows.append(np.where(chosen & (fate < 0.9), replaced, ids))
        return {"input_ids": torch.from_numpy(np.stack(rows)), "labels": torch.from_numpy(np.stack(labels))}

    return collate
