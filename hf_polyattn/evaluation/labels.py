"""Metrics of a classifier, or of a model that gives a value, on labelled rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, DataCollatorWithPadding, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..evaluating import evaluating
from ..positions import positions_of
from ..training.metrics import Classification, Regression
from .scores import Evaluation, Score

CLASSES = ("accuracy", "f1", "loss")
VALUES = ("pearson", "spearman", "mean_squared_error")
METRICS = (*CLASSES, *VALUES)


def gives_a_value(model: PreTrainedModel) -> bool:
    """Whether a model of sequences has a single output, a value, instead of classes.

    Raises:
        ValueError: for a model that classifies no sequences.
    """
    classes: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), ())
    if not isinstance(model, classes):
        raise ValueError(
            f"a {type(model).__name__} gives no label for a text, which --data needs: for a language model give "
            "--text FILE or --tasks NAME"
        )
    return model.config.num_labels == 1


def choose_metrics(model: PreTrainedModel, wanted: list[str] | None) -> tuple[str, ...]:
    """The metrics of this kind of model, or those of them that are wanted.

    Raises:
        ValueError: for one that this kind of model has not.
    """
    there = VALUES if gives_a_value(model) else CLASSES
    if wrong := [name for name in wanted or () if name not in there]:
        kind = "gives a value" if there is VALUES else "classifies"
        raise ValueError(f"--metric {wrong[0]} is not for a model that {kind}: choose of {', '.join(there)}")
    return tuple(wanted or there)


def measure_labels(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Dataset,
    *,
    metrics: list[str] | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str = "label",
    max_length: int | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Accuracy, F1 and loss in nats, or correlations and squared error, over all rows.

    Args:
        rows: texts, perhaps in pairs, with their labels: names of the model's classes, or their indices; or values.
        metrics: some of METRICS; all that the model has by default.
        max_length: texts are cut to this many tokens; the model's positions by default.
    Raises:
        ValueError: for a column that is not there, a label that the model does not have, a metric of another kind of
            model, or no rows.
    """
    chosen = choose_metrics(model, metrics)
    regression = gives_a_value(model)
    wanted = [column for column in (text_column, pair_column, label_column) if column]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(
            f"no column {missing[0]!r} among {rows.column_names}: name yours with --text-column, --pair-column and "
            "--label-column"
        )
    if len(rows) == 0:
        raise ValueError("the data hold no rows")
    labels = rows[label_column]
    if regression:
        labels = [_number(label) for label in labels]
    else:
        names = rows.features[label_column]
        labels = class_indices(model, [names.int2str(x) for x in labels] if _has_names(names) else list(labels))
    limit = max_length or positions_of(model)
    inputs: Any = _encode(rows, tokenizer, text_column, pair_column, limit)
    loader: DataLoader = DataLoader(inputs, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
    logits = _logits(model, loader, tokenizer.pad_token_id)
    references = torch.tensor(labels)
    if regression:
        guesses = logits.squeeze(-1)
        found = Regression(keep_in_memory=True).compute(predictions=guesses, references=references)
        errors = (guesses.double() - references.double()).square()
        scores = {name: Score(found[name]) for name in VALUES} | {"mean_squared_error": _mean(errors)}
    else:
        guesses = logits.argmax(-1)
        found = Classification(keep_in_memory=True).compute(predictions=guesses, references=references)
        losses = F.cross_entropy(logits, references, reduction="none")
        scores = {"accuracy": _mean(guesses == references), "f1": Score(found["f1"]), "loss": _mean(losses)}
    return Evaluation({name: scores[name] for name in chosen}, {"rows": len(rows)})


def class_indices(model: PreTrainedModel, labels: list[Any]) -> list[int]:
    """Index of the class of each label: by its name in the model's configuration, or as it stands.

    Raises:
        ValueError: for a label that is neither.
    """
    numbers = {str(name): int(index) for index, name in dict(model.config.id2label or {}).items()}
    out: list[int] = []
    for row, label in enumerate(labels):
        if str(label) in numbers:
            out.append(numbers[str(label)])
        elif isinstance(label, int) and 0 <= label < len(numbers) and not _are_numbers(numbers):
            out.append(label)
        else:
            raise ValueError(f"row {row} has the label {label!r}, and the model's classes are {list(numbers)}")
    return out


def _are_numbers(names: Mapping[str, int]) -> bool:
    # the classes 1, 2, 3 have the indices 0, 1, 2: a label that is not among them must not be taken for an index
    return all(name.lstrip("-").isdigit() for name in names)


def _has_names(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) and not all(name.isdigit() for name in feature.names)


def _number(label: Any) -> float:
    try:
        return float(label)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model gives a value, and the data have the label {label!r}") from error


def _encode(
    rows: Dataset, tokenizer: Tokenizer, text: str, pair: str | None, limit: int | None
) -> list[dict[str, Any]]:
    cut: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
    texts = [list(rows[column]) for column in (text, pair) if column]
    encoded = tokenizer(*texts, **cut, verbose=False)
    return [{name: column[row] for name, column in encoded.items()} for row in range(len(rows))]


@torch.no_grad()
def _logits(model: PreTrainedModel, loader: DataLoader, pad_token_id: int | None) -> torch.Tensor:
    """[rows, classes] in fp32, on the CPU. pad_token_id: where the model names none."""
    out = []
    own = model.config.pad_token_id
    # GPT-2 and LLaMA look for the last token that is not padding
    model.config.pad_token_id = pad_token_id if own is None else own
    try:
        with evaluating(model):
            for batch in tqdm(loader, desc="batches", disable=None):
                out.append(model(**{name: x.to(model.device) for name, x in batch.items()}).logits.float().cpu())
    finally:
        model.config.pad_token_id = own
    logits = torch.cat(out)
    if not logits.isfinite().all():
        row = int((~logits.isfinite().all(-1)).nonzero()[0])
        raise ValueError(f"the logits of row {row} are not finite: the model overflows; a wider --dtype may do")
    return logits


def _mean(values: torch.Tensor) -> Score:
    numbers = values.double().numpy()
    return Score.mean(numbers, np.ones_like(numbers))
