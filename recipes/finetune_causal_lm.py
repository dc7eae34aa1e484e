r"""Fine-tune a causal language model: a polynomial checkpoint as it is, a stock one patched first.

    accelerate launch recipes/finetune_causal_lm.py CONFIG.yaml --model openai-community/gpt2 --dataset my_text.txt
    accelerate launch recipes/finetune_causal_lm.py CONFIG.yaml --dataset pairs.json --prompt_column question \
        --completion_column answer

Plain text is packed into blocks. With a prompt and a completion column each row is one sequence, and only the
completion carries a loss. --lora_r 8 trains adapters and the attention's learned state instead of all weights; the
model they belong to is saved once, in OUT/base; the README beside them says how to take both elsewhere.
debug_cpu.yaml goes on from pretrain_causal_lm's for 10 steps: seconds. metrics.jsonl starts with the loss before them.
"""

from dataclasses import dataclass

from hf_polyattn_arguments import (
    AttentionArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
    TextArguments,
)
from hf_polyattn_parsing import check_usage, parse_arguments
from hf_polyattn_scripts import run_script


@dataclass
class FinetuneTextArguments(TextArguments):
    """Text or prompt and completion pairs, and how they become tokens."""

    tokenizer: str = ""
    """Empty: the checkpoint's own. bytes, chars, a folder or a Hub name otherwise."""
    prompt_column: str | None = None
    """Column of prompts, which carry no loss. Empty: plain text in text_column."""
    completion_column: str = "completion"
    """Column of completions, where prompt_column is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_column:
            if self.streaming or self.shuffle != "epoch":
                raise ValueError("prompts and completions are not packed: set streaming false and shuffle epoch")
            # the column by which rows are counted and checked
            self.text_column = self.prompt_column


GROUPS = (
    ModelArguments,
    AttentionArguments,
    LoraArguments,
    FinetuneTextArguments,
    OptimizationArguments,
    RunArguments,
)
check_usage(__name__, GROUPS, __doc__)  # at once: the imports below take seconds

import math
from functools import partial

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hf_polyattn.training.data import load_texts, next_token_batch, pack, texts_of, tokenise, training_view
from hf_polyattn.training.lora import BASE, add_lora, resume_lora
from hf_polyattn.training.losses import IGNORE, labels_in_step, mean_loss, step_loss, token_losses, tokens_in_step
from hf_polyattn.training.models import build_model, print_once, recompute_activations, replace_attention
from hf_polyattn.training.optimization import adamw, clip_gradients, set_learning_rate
from hf_polyattn.training.order import Shuffled, evaluation_loader, first_inputs, training_loader
from hf_polyattn.training.run import Run, start_accelerator
from hf_polyattn.training.tokenizers import load_tokenizer, opening


def encode_pairs(rows: Dataset, args: FinetuneTextArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of input_ids and labels, labels[t] following input_ids[t], IGNORE where the next token is the prompt's."""
    if missing := {args.prompt_column, args.completion_column} - set(rows.column_names):
        raise ValueError(
            f"no column {sorted(missing)} among {rows.column_names}: set prompt_column, completion_column"
        )

    start = opening(tokenizer)

    def encode(row: dict) -> dict:
        prompt = tokenizer(row[args.prompt_column], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row[args.completion_column], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = (start + prompt + completion + end)[: args.block_size + 1]
        labels = ([IGNORE] * len(start + prompt) + completion + end)[: args.block_size + 1]
        return {"input_ids": ids[:-1], "labels": labels[1:]}

    encoded = rows.map(encode, remove_columns=rows.column_names)
    kept = encoded.filter(lambda row: any(label != IGNORE for label in row["labels"]))
    if len(kept) == 0:
        raise ValueError(f"no row has room for its completion in {args.block_size} tokens: raise block_size")
    if len(kept) < len(encoded):
        print_once(
            f"left out {len(encoded) - len(kept):,} of {len(encoded):,} rows: no room for a completion in "
            f"{args.block_size} tokens"
        )
    return kept


def pad_pairs(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of unequal length -> input_ids, labels and attention_mask [b, T], padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id, "labels": IGNORE}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sum and number of predicted tokens of each sequence."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return token_losses(model(**inputs).logits, batch["labels"])


def main(argv: list[str] | None = None) -> dict:
    """Trains as `argv` says and returns what results.json holds."""
    model_args, attention, lora, text, optimization, run_args = parse_arguments(argv, GROUPS, description=__doc__)
    accelerator = start_accelerator(optimization, run_args)
    run = Run(accelerator, run_args, model_args, attention, lora, text, optimization)

    # text -> packed blocks, or pairs -> one sequence a row; the main process fills the cache, the others read it
    with accelerator.main_process_first():
        train_rows, validation_rows = load_texts(text)
        columns = [text.prompt_column, text.completion_column] if text.prompt_column else [text.text_column]
        texts = texts_of(train_rows, validation_rows, columns=columns)
        tokenizer = load_tokenizer(text.tokenizer or model_args.model, texts, special_tokens=())
        if text.prompt_column:
            train = Shuffled(encode_pairs(train_rows, text, tokenizer), optimization.seed)
            validation = encode_pairs(validation_rows, text, tokenizer)
            # padded positions carry no loss and are not attended to, so that any token will do
            collate = partial(pad_pairs, pad_token_id=tokenizer.pad_token_id or 0)
        else:
            train = training_view(train_rows, text, tokenizer, optimization.seed)
            validation = pack(tokenise(validation_rows, tokenizer, text.text_column), text.block_size)
            collate = next_token_batch
    total_steps = optimization.total_steps(None if text.streaming else len(train))

    # a new run: checkpoint -> polynomial attention -> adapters; a resumed one: all three from its last checkpoint
    base = run.out / BASE
    model = build_model(
        AutoModelForCausalLM,
        model_args,
        tokenizer,
        optimization.seed,
        text.block_size,
        checkpoint=base if run.checkpoint and lora.lora_r else run.checkpoint,
    )
    if run.checkpoint is None:
        parts = optimization.gradient_accumulation_steps * accelerator.num_processes
        first = partial(
            first_inputs, train, optimization.batch_size, collate, ["input_ids", "attention_mask"], parts=parts
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
        workers=text.num_workers,
    )
    validation_loader = evaluation_loader(validation, run_args.eval_batch_size, collate, text.num_workers)
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, adamw(model, optimization), train_loader, validation_loader
    )
    run.load_state()
    if run.first_step == 0:
        # where the change of attention, or the stock model, starts from
        before = mean_loss(accelerator, model, validation_loader, loss_of)
        run.log_evaluation(0, validation_loss=before, perplexity=math.exp(min(before, 700)))

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
        # a stream has no length
        epoch = {} if text.streaming else {"epoch": step * optimization.batch_size / len(train)}
        run.log(step, tokens, **epoch, loss=loss, learning_rate=learning_rate, gradient_norm=norm)

        score = None
        if run.is_due(run_args.eval_steps, step, total_steps):
            score = mean_loss(accelerator, model, validation_loader, loss_of)
            run.log_evaluation(step, validation_loss=score, perplexity=math.exp(min(score, 700)))
        if run.is_due(run_args.save_steps, step, total_steps) or run.is_best(score):
            run.save(step, model, tokenizer, score)

    return run.finish(
        AutoModelForCausalLM, model, tokenizer, recipe="finetune_causal_lm", steps=total_steps, seed=optimization.seed
    )


if __name__ == "__main__":
    run_script(main)
