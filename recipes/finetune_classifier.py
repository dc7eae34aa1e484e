"""Fine-tune a classifier of texts or pairs (BERT and others): a polynomial checkpoint as it is, a stock one patched.

    accelerate launch recipes/finetune_classifier.py CONFIG.yaml --model DIR --dataset train.tsv
    accelerate launch recipes/finetune_classifier.py CONFIG.yaml --dataset stsb.csv --pair_column second --regression

Data sets: CSV, TSV, JSON or parquet files, Hub names, or stdlib_lines: lines of the running Python's standard
library, label 1 for the text of a comment (its # removed), 0 for code. debug_cpu.yaml does that in seconds. With
--lora_r the adapters need OUT/base; the README beside them says how to take both elsewhere.
"""

from dataclasses import dataclass

from hf_polyattn_arguments import (
    AttentionArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
    check_numbers,
)
from hf_polyattn_parsing import check_usage, parse_arguments
from hf_polyattn_scripts import run_script


@dataclass
class LabelledTextArguments:
    """Texts with labels, and how they become tokens."""

    dataset: str = "stdlib_lines"
    """stdlib_lines, a CSV, TSV, JSON or parquet file or a folder of them, or a Hub name."""
    dataset_config: str | None = None
    """Configuration of a Hub data set, such as sst2 of glue."""
    train_split: str = "train"
    """Split to train on."""
    validation_dataset: str | None = None
    """Separate file, folder or Hub name to validate on. Empty: validation_split, or a part of the training data."""
    validation_split: str | None = None
    """Split of the data set to validate on. Empty: validation_fraction."""
    validation_fraction: float = 0.1
    """Share of the rows kept for validation, after shuffling them with seed 0."""
    column_names: list[str] | None = None
    """Columns of CSV and TSV files that have no header line."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text. Empty: single texts."""
    label_column: str = "label"
    """Column of the label: a class (number or word), or a value for regression."""
    regression: bool = False
    """Predict a value instead of a class."""
    max_train_samples: int | None = None
    """Use this many training rows. Empty: all."""
    max_validation_samples: int | None = None
    """Use this many validation rows. Empty: all."""
    tokenizer: str = ""
    """Empty: the checkpoint's own. bytes, chars, a folder or a Hub name otherwise."""
    max_length: int = 128
    """Texts are cut to this many tokens."""
    num_workers: int = 0
    """Worker processes that load data, for each training process."""

    def __post_init__(self) -> None:
        check_numbers(self, "validation_fraction", above=0, below=1)
        check_numbers(self, "max_train_samples", "max_validation_samples", "max_length", at_least=1)
        check_numbers(self, "num_workers", at_least=0)


GROUPS = (
    ModelArguments,
    AttentionArguments,
    LoraArguments,
    LabelledTextArguments,
    OptimizationArguments,
    RunArguments,
)
check_usage(__name__, GROUPS, __doc__)  # at once: the imports below take seconds

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_polyattn.evaluating import evaluating
from hf_polyattn.training.data import load_rows, split_from_end, stdlib_files, texts_of
from hf_polyattn.training.lora import BASE, add_lora, resume_lora
from hf_polyattn.training.losses import labels_in_step, step_loss, tokens_in_step
from hf_polyattn.training.metrics import Classification, Regression
from hf_polyattn.training.models import build_model, recompute_activations, replace_attention
from hf_polyattn.training.optimization import adamw, clip_gradients, set_learning_rate
from hf_polyattn.training.order import Shuffled, evaluation_loader, first_inputs, training_loader
from hf_polyattn.training.run import Run, start_accelerator
from hf_polyattn.training.tokenizers import load_tokenizer

SPECIAL_TOKENS = ("pad_token", "unk_token", "cls_token", "sep_token")


def load_labelled(args: LabelledTextArguments) -> tuple[Dataset, Dataset]:
    """Training and validation rows, at most as many as asked for."""
    if args.dataset == "stdlib_lines":
        train, validation = split_from_end(stdlib_lines().shuffle(seed=0), args.validation_fraction)
    else:
        load = partial(load_rows, column_names=args.column_names)
        train = load(args.dataset, args.train_split, args.dataset_config)
        if args.validation_dataset:
            validation = load(args.validation_dataset, args.validation_split or args.train_split)
        elif args.validation_split:
            validation = load(args.dataset, args.validation_split, args.dataset_config)
        else:
            train, validation = split_from_end(train.shuffle(seed=0), args.validation_fraction)
    wanted = [column for column in (args.text_column, args.pair_column, args.label_column) if column]
    for rows in (train, validation):
        if missing := [column for column in wanted if column not in rows.column_names]:
            raise ValueError(
                f"no column {missing} among {rows.column_names}: set text_column, pair_column, label_column"
            )
    return _first(train, args.max_train_samples), _first(validation, args.max_validation_samples)


def stdlib_lines(max_bytes: int = 2_000_000) -> Dataset:
    """As many lines of comments as of code, each once."""
    comments, code = {}, {}
    for _, source in stdlib_files(max_bytes):
        for line in map(str.strip, source.splitlines()):
            text = line.lstrip("# ")
            if len(text) > 10:
                (comments if line.startswith("#") else code)[text] = None
    count = min(len(comments), len(code))
    texts = [*itertools.islice(comments, count), *itertools.islice(code, count)]
    return Dataset.from_dict({"text": texts, "label": [1] * count + [0] * count})


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))


def encode(rows: Dataset, args: LabelledTextArguments, tokenizer: PreTrainedTokenizerBase, classes: list) -> Dataset:
    """Rows of model inputs and `labels`: the index of the class, or the value itself for regression."""
    number = {name: i for i, name in enumerate(classes)}

    def encode_batch(batch: dict) -> dict:
        pairs = [batch[args.pair_column]] if args.pair_column else []
        labels = batch[args.label_column]
        encoded = tokenizer(batch[args.text_column], *pairs, truncation=True, max_length=args.max_length)
        values = [float(x) for x in labels] if args.regression else [number[x] for x in labels]
        return {**encoded, "labels": values}

    unknown = set() if args.regression else set(rows.unique(args.label_column)) - set(classes)
    if unknown:
        raise ValueError(f"validation has labels {sorted(unknown)} that training has not: {classes}")
    return rows.map(encode_batch, batched=True, remove_columns=rows.column_names)


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [b, classes], or squared error of logits [b, 1]: one loss for each row, [b] in fp32."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits.float(), labels, reduction="none")


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and number of labels, which is 1, of each row."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    losses = label_losses(model(**inputs).logits, batch["labels"])
    return losses, torch.ones_like(losses)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean loss and the task's metrics over all rows of `loader`, each once."""
    losses, predictions, references = [], [], []
    with evaluating(model):
        for batch in loader:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            regression = batch["labels"].is_floating_point()
            guess = logits.float().squeeze(-1) if regression else logits.argmax(-1)
            gathered = accelerator.gather_for_metrics((label_losses(logits, batch["labels"]), guess, batch["labels"]))
            for values, parts in zip((losses, predictions, references), gathered, strict=True):
                values += parts.tolist()
    metric = (Regression if regression else Classification)(keep_in_memory=True)
    scores = metric.compute(predictions=predictions, references=references)
    return {"validation_loss": sum(losses) / len(losses), **scores}


def main(argv: list[str] | None = None) -> dict:
    """Trains as `argv` says and returns what results.json holds."""
    model_args, attention, lora, data, optimization, run_args = parse_arguments(argv, GROUPS, description=__doc__)
    accelerator = start_accelerator(optimization, run_args)
    run = Run(accelerator, run_args, model_args, attention, lora, data, optimization, higher_is_better=True)

    # texts -> tokens; the main process fills the cache, the others read it
    with accelerator.main_process_first():
        train_rows, validation_rows = load_labelled(data)
        columns = [column for column in (data.text_column, data.pair_column) if column]
        texts = texts_of(train_rows, validation_rows, columns=columns)
        tokenizer = load_tokenizer(
            data.tokenizer or model_args.model, texts, SPECIAL_TOKENS if model_args.model_type else ("pad_token",)
        )
        classes = [] if data.regression else sorted(train_rows.unique(data.label_column))
        train = Shuffled(encode(train_rows, data, tokenizer, classes), optimization.seed)
        validation = encode(validation_rows, data, tokenizer, classes)
    total_steps = optimization.total_steps(len(train))
    collate = DataCollatorWithPadding(tokenizer)

    # a new run: checkpoint -> polynomial attention -> adapters; a resumed one: all three from its last checkpoint
    base = run.out / BASE
    heads = (
        {"num_labels": 1}
        if data.regression
        else {
            "num_labels": len(classes),
            "id2label": {i: str(name) for i, name in enumerate(classes)},
            "label2id": {str(name): i for i, name in enumerate(classes)},
        }
    )
    model = build_model(
        AutoModelForSequenceClassification,
        model_args,
        tokenizer,
        optimization.seed,
        data.max_length,
        checkpoint=base if run.checkpoint and lora.lora_r else run.checkpoint,
        **heads,
    )
    if model.config.pad_token_id is None:
        # GPT-2 and LLaMA look for the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    if run.checkpoint is None:
        parts = optimization.gradient_accumulation_steps * accelerator.num_processes
        first = partial(
            first_inputs,
            train,
            optimization.batch_size,
            collate,
            ["input_ids", "attention_mask", "token_type_ids"],
            parts=parts,
        )
        inputs = attention.inputs(first, model_args)
        model = replace_attention(model, attention, *inputs, device=accelerator.device)
    if lora.lora_r:
        model = resume_lora(model, run.checkpoint) if run.checkpoint else add_lora(accelerator, model, lora, base)
    if optimization.gradient_checkpointing:
        recompute_activations(model)
    model.train()
    # other dropout on every process
    set_seed(optimization.seed, device_specific=True)

    train_loader = training_loader(
        train,
        optimization.batch_size,
        collate,
        run.first_step,
        total_steps,
        parts=optimization.gradient_accumulation_steps,
        workers=data.num_workers,
    )
    validation_loader = evaluation_loader(validation, run_args.eval_batch_size, collate, data.num_workers)
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, adamw(model, optimization), train_loader, validation_loader
    )
    run.load_state()
    main_score = "spearman" if data.regression else "accuracy"

    for step, micro_batches in run.steps(train_loader, total_steps):
        learning_rate = set_learning_rate(optimizer, optimization, step, total_steps)
        labels = labels_in_step(accelerator, micro_batches)
        step_sum = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            with accelerator.accumulate(model):
                loss_sum = run.loss(loss_of, model, batch)[0].sum()
                accelerator.backward(step_loss(accelerator, loss_sum, labels))
                step_sum += loss_sum.detach()
                if accelerator.sync_gradients:
                    loss = accelerator.reduce(step_sum, reduction="sum") / labels
                    norm = clip_gradients(accelerator, model, optimization.max_grad_norm)
                    run.check_finite(step, loss, norm, model, micro_batches, loss_of)
                    run.diagnose(step, model, micro_batches, loss_of)
                optimizer.step()
                optimizer.zero_grad()
        tokens = tokens_in_step(accelerator, micro_batches)
        epoch = step * optimization.batch_size / len(train)
        run.log(step, tokens, epoch=epoch, loss=loss, learning_rate=learning_rate, gradient_norm=norm)

        score = None
        if run.is_due(run_args.eval_steps, step, total_steps):
            scores = evaluate(accelerator, model, validation_loader)
            run.log_evaluation(step, **scores)
            score = scores[main_score]
        if run.is_due(run_args.save_steps, step, total_steps) or run.is_best(score):
            run.save(step, model, tokenizer, score)

    return run.finish(
        AutoModelForSequenceClassification,
        model,
        tokenizer,
        recipe="finetune_classifier",
        steps=total_steps,
        seed=optimization.seed,
        best_metric=main_score,
    )


if __name__ == "__main__":
    run_script(main)
