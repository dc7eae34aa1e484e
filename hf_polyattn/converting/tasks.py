"""What a conversion reads and how it is judged, by the kind of model: causal, masked, or one without a vocabulary.

The model itself decides: one that predicts tokens is judged by its loss on held-out text, one with other logits by how
often it decides as the softmax model does, one without logits by whether its embeddings rank texts alike.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto as auto

from hf_polyattn_arguments import TextArguments

from ..evaluating import evaluating
from ..positions import positions_of
from ..steps import without_cache
from ..training.data import load_texts, pack, tokenise, training_view
from ..training.masking import masking_collator
from ..training.metrics import Regression
from ..training.order import Numbered, Shuffled

PAIRS = 2000
"""Pairs of held-out texts whose cosines are ranked."""


class Task:
    """Batches of a text for one model, and its score on the held-out part. Made by `task_for`."""

    metric = ""
    lower_is_better = True
    has_labels = True
    has_logits = True

    def __init__(
        self, view: Any, held_out: list[dict[str, Any]], collate: Callable[..., dict[str, Any]], workers: int = 0
    ) -> None:
        self.view, self.held_out, self.collate, self.workers = view, held_out, collate, workers

    def batches(self, position: int, steps: int, size: int) -> DataLoader:
        """`steps` batches of `size` sequences from a position of the run on: the same ones each time."""
        stop = position + steps * size
        generator = torch.Generator().manual_seed(0)  # a loader otherwise draws from the global one
        return DataLoader(
            self.view,
            sampler=range(position, stop),
            batch_size=size,
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=generator,
        )

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> float:
        """On the held-out text."""
        with evaluating(model):
            return self._score(model)

    def _score(self, model: PreTrainedModel) -> float:
        raise NotImplementedError

    def outputs(self, model: PreTrainedModel, *, labels: bool = False) -> Iterator[tuple[dict[str, Any], Any]]:
        """(batch, what the model gives) for each held-out batch."""
        for batch in self.held_out:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if labels or name != "labels"}
            yield batch, model(**without_cache(model, inputs))


class TokenLoss(Task):
    """A language model: nats a token."""

    metric = "loss"

    def _score(self, model: PreTrainedModel) -> float:
        total, count = 0.0, 0
        for batch, out in self.outputs(model, labels=True):
            here = (
                int((batch["labels"][:, 1:] != -100).sum())
                if _is_causal(model)
                else int((batch["labels"] != -100).sum())
            )
            if here:
                # without a label the loss is 0 / 0
                total, count = total + out.loss.item() * here, count + here
        if not count:
            raise ValueError("no token of the held-out text is to be predicted: give more text or larger blocks")
        return total / count


class Agreement(Task):
    """A model with other logits: the share of texts on which it decides as the softmax model does."""

    metric, lower_is_better, has_labels = "agreement", False, False

    def __init__(self, *args: Any, teacher: PreTrainedModel) -> None:
        super().__init__(*args)
        with torch.no_grad(), evaluating(teacher):
            self.wanted = [_decisions(batch, out.logits) for batch, out in self.outputs(teacher)]

    def _score(self, model: PreTrainedModel) -> float:
        equal = [
            (_decisions(batch, out.logits) == wanted).float()
            for (batch, out), wanted in zip(self.outputs(model), self.wanted, strict=True)
        ]
        return torch.cat(equal).mean().item()


class RankAgreement(Task):
    """A model without logits: Spearman's correlation of cosines between embeddings with those of the softmax model.

    An embedding is the mean of the last hidden states over the tokens that are no padding.
    """

    metric, lower_is_better, has_labels, has_logits = "rank_agreement", False, False, False

    def __init__(self, *args: Any, teacher: PreTrainedModel) -> None:
        super().__init__(*args)
        with torch.no_grad(), evaluating(teacher):
            self.wanted = self._cosines(teacher)

    def _score(self, model: PreTrainedModel) -> float:
        return Regression().compute(predictions=self._cosines(model), references=self.wanted)["spearman"]

    def _cosines(self, model: PreTrainedModel) -> list[float]:
        rows = []
        for batch, out in self.outputs(model):
            mask = batch["attention_mask"][..., None].to(out.last_hidden_state)
            rows.append((out.last_hidden_state * mask).sum(1) / mask.sum(1))
        embeddings = torch.nn.functional.normalize(torch.cat(rows), dim=-1).cpu()
        one, other = np.random.default_rng(0).integers(len(embeddings), size=(2, PAIRS))
        different = one != other
        return (embeddings[one[different]] * embeddings[other[different]]).sum(-1).tolist()


def task_for(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextArguments,
    *,
    batch_size: int,
    validation_batches: int,
    seed: int,
) -> Task:
    """The task of a model on a text.

    Raises:
        ValueError: for a tokenizer that is not the model's, blocks longer than its positions, or too little text.
    """
    rows: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: use the model's own tokenizer")
    positions = positions_of(teacher)
    if positions and text.block_size > positions:
        raise ValueError(f"block_size {text.block_size} is more than the model's {positions} positions: lower it")
    train, held_out = load_texts(text)
    if _is_causal(teacher):
        view: Any = training_view(train, text, tokenizer, seed, overlap=0)
        blocks = pack(tokenise(held_out, tokenizer, text.text_column), text.block_size, overlap=0)
        return TokenLoss(
            view, _all(blocks, _causal_batch, batch_size, validation_batches), _causal_batch, text.num_workers
        )
    if type(teacher).__name__ in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        if tokenizer.mask_token_id is None:
            raise ValueError("a masked language model needs a tokenizer with a mask token: use the model's own")
        view = training_view(train, text, tokenizer, seed, overlap=0, numbered=True)
        blocks = pack(tokenise(held_out, tokenizer, text.text_column), text.block_size, overlap=0)
        # other masks than in training, the same in each look
        collate = masking_collator(tokenizer, seed + 1)
        masked = _all(Numbered(blocks), collate, batch_size, validation_batches)
        return TokenLoss(view, masked, masking_collator(tokenizer, seed), text.num_workers)
    kind = _kind_without_vocabulary(teacher)
    lines = partial(_encode_lines, tokenizer=tokenizer, column=text.text_column, length=text.block_size)
    pad = DataCollatorWithPadding(tokenizer)
    encoded = [rows.map(lines, batched=True, remove_columns=rows.column_names) for rows in (train, held_out)]
    if min(map(len, encoded)) < 2:
        raise ValueError("the text has too few lines: a model without a vocabulary reads it line by line")
    view = Shuffled(encoded[0], seed)
    some = _all(encoded[1], pad, batch_size, validation_batches)
    return kind(view, some, pad, text.num_workers, teacher=teacher)


def _kind_without_vocabulary(teacher: PreTrainedModel) -> type[RankAgreement] | type[Agreement]:
    """How a model is judged that predicts no tokens; ValueError for heads that neither way fits."""
    name = type(teacher).__name__
    names = [n for group in auto.MODEL_MAPPING_NAMES.values() for n in ([group] if isinstance(group, str) else group)]
    if name in names:
        return RankAgreement
    heads = (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    if any(name in head.values() for head in heads) and (teacher.config.num_labels or 0) > 1:
        return Agreement
    raise ValueError(
        f"a conversion knows language models, classifiers of two classes or more and encoders without a head; {name} "
        "is none of them: convert the model that it was made from and fine-tune it, or use transfer_attention"
    )


def _decisions(batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """The class of each text [B], or of each token that is no padding [tokens]."""
    chosen = logits.argmax(-1).cpu()
    return chosen[batch["attention_mask"].bool()] if chosen.ndim == 2 else chosen


def _is_causal(model: PreTrainedModel) -> bool:
    stock = getattr(type(model), "stock_class", type(model))
    return stock.__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _causal_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks -> input_ids [b, T], and the same as labels: Transformers shifts them."""
    ids = torch.as_tensor(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
    return {"input_ids": ids, "labels": ids}


def _encode_lines(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, column: str, length: int
) -> dict[str, list[list[int]]]:
    lines = [line.strip() for text in batch[column] for line in text.splitlines() if len(line.strip()) > 1]
    return dict(tokenizer(lines, truncation=True, max_length=length)) if lines else {"input_ids": []}


def _all(
    rows: Dataset | Numbered, collate: Callable[..., dict[str, Any]], size: int, most: int
) -> list[dict[str, Any]]:
    """The first batches of `rows` in their order, at most so many."""
    loader = DataLoader(rows, batch_size=size, collate_fn=collate, generator=torch.Generator().manual_seed(0))
    return [dict(batch) for batch in islice(loader, most)]
