"""Whether a causal language model recalls what stands in its context: random tokens repeated, and a key in a text.

Neither needs data. Softmax can put all weight on one key; rows that do not sum to 1 have to find another way, and a
loss on ordinary text hardly shows whether they did. Two models of one vocabulary are measured on the same sequences,
so that `evaluation.difference` pairs them.
"""

import itertools
import random
import string

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..evaluating import evaluating
from ..positions import positions_of
from ..training.losses import IGNORE, token_losses
from .scores import Evaluation, Score

STATEMENT, QUESTION = "The key is {key}. ", "The key is "
FILLER = "The grass is green and the sky is blue. The sun is warm and the sea is deep. "
KEY_LETTERS = 4


def repeated_tokens(
    model: PreTrainedModel, length: int, *, samples: int = 64, batch_size: int = 16, seed: int = 0
) -> Evaluation:
    """Induction: `length` random tokens, twice; what the second copy costs beside the first.

    The first token of the second copy is left out, as nothing says that a copy begins. Units are sequences.

    Args:
        length: tokens of one copy.
    Returns:
        "first copy" and "second copy", nats a token; "accuracy" on the second copy, by the likeliest token.
    Raises:
        ValueError: for less than 2 tokens, and for more positions than the model has.
    """
    if length < 2:
        raise ValueError(f"a copy needs 2 tokens or more, got {length}")
    _check_positions(model, 2 * length)
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    plain = torch.tensor([token for token in range(model.config.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    copy = plain[torch.randint(len(plain), (samples, length), generator=generator)]
    ids = torch.cat([copy, copy], 1)
    first, second = ids.clone(), ids.clone()
    first[:, length:] = IGNORE
    second[:, : length + 1] = IGNORE
    first_loss, _ = _measure(model, ids, first, batch_size)
    second_loss, right = _measure(model, ids, second, batch_size)
    ones = np.ones(samples)
    scores = {
        "first copy": Score.mean(first_loss, ones * (length - 1)),
        "second copy": Score.mean(second_loss, ones * (length - 1)),
        "accuracy": Score.mean(right, ones * (length - 1)),
    }
    return Evaluation(scores, {"probe": "repeated tokens", "length": length, "samples": samples, "seed": seed})


def passkey(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    length: int,
    *,
    samples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> Evaluation:
    """A key of random letters in a text of fillers, asked for at the end. Units are texts.

    Args:
        length: tokens of the whole text, key, question and answer included.
    Returns:
        "key" and "unseen key", nats a token of the answer where the text states it and where it states another one:
        what recall is worth. "accuracy": share of keys of which every token is the likeliest one.
    Raises:
        ValueError: for a length that the statement and the question alone exceed, and for more positions than the
            model has.
    """
    _check_positions(model, length)
    generator = random.Random(seed)
    filler = _encode(tokenizer, FILLER)
    before, after = (_encode(tokenizer, part) for part in STATEMENT.split("{key}"))
    question = _encode(tokenizer, QUESTION)
    stated: list[list[int]] = []
    unseen: list[list[int]] = []
    labels: list[list[int]] = []
    for _ in range(samples):
        word, other = ("".join(generator.choices(string.ascii_lowercase, k=KEY_LETTERS)) for _ in range(2))
        key = _encode(tokenizer, word)
        end = [*question, *key]
        place = generator.random()
        for ids, told in ((stated, key), (unseen, _encode(tokenizer, other))):
            statement = [*before, *told, *after]
            room = length - len(statement) - len(end)
            if room < 0:
                raise ValueError(f"statement and question alone take {length - room} tokens: raise length {length}")
            around = list(itertools.islice(itertools.cycle(filler), room))
            cut = round(place * room)
            ids.append([*around[:cut], *statement, *around[cut:], *end])
        labels.append([IGNORE] * (length - len(key)) + key)
    answers = torch.tensor(labels)
    counts = (answers != IGNORE).sum(1).double().numpy()
    key_loss, right = _measure(model, torch.tensor(stated), answers, batch_size)
    unseen_loss, _ = _measure(model, torch.tensor(unseen), answers, batch_size)
    scores = {
        "key": Score.mean(key_loss, counts),
        "unseen key": Score.mean(unseen_loss, counts),
        "accuracy": Score.mean((right == counts).astype(float), np.ones(samples)),
    }
    return Evaluation(scores, {"probe": "passkey", "length": length, "samples": samples, "seed": seed})


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check_positions(model: PreTrainedModel, length: int) -> None:
    positions = positions_of(model)
    if positions and length > positions:
        raise ValueError(f"the model has {positions} positions: lower the {length} tokens of the probe to that")


@torch.no_grad()
def _measure(
    model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loss sum in nats and number of right tokens of each row; targets [b, T] are ids, IGNORE where nothing counts."""
    losses, right = [], []
    with evaluating(model):
        for inputs, wanted in zip(ids.split(batch_size), targets.split(batch_size), strict=True):
            logits = model(input_ids=inputs.to(model.device)).logits[:, :-1].cpu()
            losses.append(token_losses(logits, wanted[:, 1:])[0].double())
            right.append((logits.argmax(-1) == wanted[:, 1:]).sum(1).double())
    return torch.cat(losses).numpy(), torch.cat(right).numpy()
