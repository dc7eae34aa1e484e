"""Loss of a language model on a text: every token but the first is predicted once, and none from a padded row."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..evaluating import evaluating
from ..positions import positions_of
from ..training.losses import IGNORE, token_losses
from ..training.masking import masking_collator
from .scores import Evaluation, Score

MOST = 1024
"""Tokens of a block by default, where the model has positions for more."""
MASK_PROBABILITY = 0.15
"""Share of the tokens that a masked model has to fill in, as in recipes/pretrain_masked_lm.py; drawn with seed 0."""

Batch = dict[str, torch.Tensor]


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a language model predicts the next token; False for one that fills in masked tokens.

    Raises:
        ValueError: for a model that is neither.
    """
    for mapping, causal in ((MODEL_FOR_CAUSAL_LM_MAPPING, True), (MODEL_FOR_MASKED_LM_MAPPING, False)):
        classes: Any = mapping.get(type(model.config), ())
        if isinstance(model, classes):
            return causal
    raise ValueError(
        f"a {type(model).__name__} is no language model, which --text needs: for a classifier give --data FILE"
    )


def default_block_size(model: PreTrainedModel) -> int:
    """As many tokens as the model has positions for, MOST at most."""
    return min(MOST, positions_of(model) or MOST)


def measure_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 4,
    limit: int | None = None,
) -> Evaluation:
    """Loss in nats per token, perplexity and, for a causal model, bits per byte, which no tokenizer changes.

    No special tokens are added, as the recipes add none inside a text.

    Args:
        block_size: tokens that the model sees at a time.
        stride: tokens from one block to the next, block_size by default. A smaller one costs more and gives every
            token at least block_size - stride tokens of context, but for those of the first block.
        batch_size: blocks at a time; does not change the result.
        limit: measure the first blocks only.
    Raises:
        ValueError: when the text does not fill a block, when a block has more tokens than the model has positions, for
            a stride that would leave tokens out, when no token comes to be masked, and when the loss is not a number.
    """
    causal = is_causal(model)
    positions = positions_of(model)
    if positions and block_size > positions:
        raise ValueError(f"the model has {positions} positions: lower --block-size {block_size} to that")
    stride = block_size if stride is None else stride
    if not 0 < stride <= block_size:
        raise ValueError(f"--stride must be from 1 to the block size {block_size}, got {stride}")
    if not causal and stride != block_size:
        raise ValueError("--stride is for models that predict the next token, and this one fills in masked ones")
    ids = _encode(tokenizer, text)
    needed = block_size + causal
    if len(ids) < needed:
        raise ValueError(
            f"the text holds {len(ids)} tokens, and one block of {block_size} needs {needed}: give more text, or "
            f"--block-size {max(1, len(ids) - causal)}"
        )
    if causal:
        blocks = next_token_blocks(ids, block_size, stride)
    else:
        blocks = masked_blocks(ids, block_size, tokenizer)
    sums, counts = _losses(model, blocks[:limit], batch_size)
    if not counts.sum():
        raise ValueError(f"no token of the {len(sums)} blocks of {block_size} came to be masked: give more text")
    nats = Score.mean(sums, counts)
    scores = {"nats/token": nats, "perplexity": Score(math.exp(min(nats.value, 700)))}
    data = {"blocks": len(sums), "block_size": block_size, "stride": stride, "predicted_tokens": int(counts.sum())}
    if causal:
        # the first token is given, not predicted
        end = int(counts.sum()) + 1
        read = text if end == len(ids) else str(tokenizer.decode(ids[:end]))
        size = len(read.encode()) - len(str(tokenizer.decode(ids[:1])).encode())
        if size > 0:
            scores["bits/byte"] = Score(float(sums.sum()) / math.log(2) / size)
    return Evaluation(scores, data)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        # tokenizers raises bare exceptions, as for a character that its vocabulary lacks
        raise ValueError(f"the tokenizer cannot encode this text: {error}") from error


def next_token_blocks(ids: list[int], block_size: int, stride: int) -> list[Batch]:
    """Blocks of input_ids [t] and labels [t], t = block_size but for a shorter last one.

    labels[i] follows input_ids[i]. One that an earlier block has had already is IGNORE, so that every token but the
    first is a label once.
    """
    tokens = torch.tensor(ids)
    blocks, seen = [], 0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + block_size, len(ids) - 1)
        labels = tokens[start + 1 : end + 1].clone()
        labels[: seen - start] = IGNORE
        blocks.append({"input_ids": tokens[start:end], "labels": labels})
        seen = end
        if end == len(ids) - 1:
            break
    return blocks


def masked_blocks(ids: list[int], block_size: int, tokenizer: Tokenizer) -> list[Batch]:
    """Blocks of input_ids [t] with masks and labels [t]; the same masks for every model of this tokenizer."""
    if tokenizer.mask_token_id is None:
        raise ValueError("this model fills in masked tokens, and its tokenizer has no mask token")
    collate = masking_collator(tokenizer, 0, MASK_PROBABILITY)
    rows = [ids[start : start + block_size] for start in range(0, len(ids), block_size)]
    batches = [collate([(position, {"input_ids": row})]) for position, row in enumerate(rows)]
    return [{name: x[0] for name, x in batch.items()} for batch in batches]


def _batches(blocks: list[Batch], size: int) -> Iterator[Batch]:
    """[size, t] at a time; the shorter block at the end comes alone, so that nothing is padded."""
    full = [block for block in blocks if len(block["labels"]) == len(blocks[0]["labels"])]
    parts = [full[at : at + size] for at in range(0, len(full), size)] + [[block] for block in blocks[len(full) :]]
    for part in parts:
        yield {name: torch.stack([block[name] for block in part]) for name in part[0]}


@torch.no_grad()
def _losses(model: PreTrainedModel, blocks: list[Batch], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss sum in nats and number of labels of each block, both [blocks]."""
    sums: list[float] = []
    counts: list[float] = []
    with evaluating(model), tqdm(total=len(blocks), desc="blocks", disable=None) as bar:
        for batch in _batches(blocks, batch_size):
            batch = {name: x.to(model.device) for name, x in batch.items()}
            options: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
            logits = model(input_ids=batch["input_ids"], **options).logits
            losses, labels = token_losses(logits, batch["labels"])
            if not losses.isfinite().all():
                raise ValueError(
                    f"the loss becomes {losses.sum().item()} in block {len(sums)} to {len(sums) + len(losses) - 1}: "
                    "the model overflows here; a wider --dtype float32 may do"
                )
            sums += losses.double().tolist()
            counts += labels.tolist()
            bar.update(len(losses))
    return np.asarray(sums), np.asarray(counts)
