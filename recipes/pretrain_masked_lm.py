"""Pretrain a masked language model (BERT) from scratch, with polynomial attention or its softmax twin.

    accelerate launch recipes/pretrain_masked_lm.py recipes/configs/pretrain_masked_lm/stdlib_bert_small.yaml
    accelerate launch recipes/pretrain_masked_lm.py CONFIG.yaml --activation softmax --output_dir runs/softmax

The default data is the source of the running Python's standard library: nothing is downloaded. debug_cpu.yaml takes
seconds (validation loss 5.5 to 5.1 in 20 steps). OUT/results.json holds the numbers, OUT/best the model.
"""

from dataclasses import dataclass

from hf_polyattn_arguments import (
    AttentionArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
    TextArguments,
    check_numbers,
)
from hf_polyattn_parsing import check_usage, parse_arguments
from hf_polyattn_scripts import run_script


@dataclass
class MaskingArguments:
    """Which tokens are predicted."""

    mask_probability: float = 0.15
    """Share of the tokens that are predicted."""

    def __post_init__(self) -> None:
        check_numbers(self, "mask_probability", above=0, below=1)


GROUPS = (ModelArguments, AttentionArguments, TextArguments, MaskingArguments, OptimizationArguments, RunArguments)
check_usage(__name__, GROUPS, __doc__)  # at once: the imports below take seconds

import math
from functools import partial

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoModelForMaskedLM

from hf_polyattn.training.data import load_texts, pack, texts_of, tokenise, training_view
from hf_polyattn.training.losses import labels_in_step, mean_loss, step_loss, token_losses, tokens_in_step
from hf_polyattn.training.masking import masking_collator
from hf_polyattn.training.models import build_model, recompute_activations, replace_attention
from hf_polyattn.training.optimization import adamw, clip_gradients, set_learning_rate
from hf_polyattn.training.order import Numbered, evaluation_loader, first_inputs, training_loader
from hf_polyattn.training.run import Run, start_accelerator
from hf_polyattn.training.tokenizers import load_tokenizer

SPECIAL_TOKENS = ("pad_token", "cls_token", "sep_token", "mask_token")


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sum and number of masked tokens of each sequence."""
    return token_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def main(argv: list[str] | None = None) -> dict:
    """Trains as `argv` says and returns what results.json holds."""
    model_args, attention, text, masking, optimization, run_args = parse_arguments(argv, GROUPS, description=__doc__)
    accelerator = start_accelerator(optimization, run_args)
    run = Run(accelerator, run_args, model_args, attention, text, masking, optimization)

    # text -> tokens -> blocks; the main process fills the cache, the others read it
    with accelerator.main_process_first():
        train_rows, validation_rows = load_texts(text)
        texts = texts_of(train_rows, validation_rows, columns=[text.text_column])
        tokenizer = load_tokenizer(text.tokenizer, texts, SPECIAL_TOKENS)
        train = training_view(train_rows, text, tokenizer, optimization.seed, overlap=0, numbered=True)
        validation = pack(tokenise(validation_rows, tokenizer, text.text_column), text.block_size, overlap=0)
    # masks are drawn by position: new ones in every epoch, and in evaluation the same ones for every run
    collate = masking_collator(tokenizer, optimization.seed, masking.mask_probability)
    collate_validation = masking_collator(tokenizer, 0, masking.mask_probability)
    total_steps = optimization.total_steps(None if text.streaming else len(train))

    # the model, with the same initial weights for every activation; on resume everything comes from the checkpoint
    model = build_model(
        AutoModelForMaskedLM, model_args, tokenizer, optimization.seed, text.block_size, checkpoint=run.checkpoint
    )
    if run.checkpoint is None:
        parts = optimization.gradient_accumulation_steps * accelerator.num_processes
        first = partial(first_inputs, train, optimization.batch_size, collate, ["input_ids"], parts=parts)
        inputs = attention.inputs(first, model_args)
        model = replace_attention(model, attention, *inputs, device=accelerator.device)
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
    validation_loader = evaluation_loader(
        Numbered(validation), run_args.eval_batch_size, collate_validation, text.num_workers
    )
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, adamw(model, optimization), train_loader, validation_loader
    )
    run.load_state()

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
        AutoModelForMaskedLM, model, tokenizer, recipe="pretrain_masked_lm", steps=total_steps, seed=optimization.seed
    )


if __name__ == "__main__":
    run_script(main)
