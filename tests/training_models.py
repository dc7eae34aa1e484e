"""Tiny models, a batch and a loss for tests of what training is made of."""

import torch
from transformers import AutoModelForCausalLM

from hf_polyattn.training.losses import token_losses
from hf_polyattn.training.models import build_model, replace_attention
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_arguments import (
    AttentionArguments,
    ModelArguments,
)

TINY = {
    "gpt2": "{n_layer: 2, n_head: 2, n_embd: 16}",
    "llama": "{num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, hidden_size: 16,"
    " intermediate_size: 24}",
    "bert": "{num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 16, intermediate_size: 24}",
}


def tiny(model_type="gpt2", seed=0, activation="softmax", auto=AutoModelForCausalLM, batches=(), **options):
    model = build_model(
        auto,
        ModelArguments(model_type=model_type, model_config=TINY[model_type]),
        byte_tokenizer(),
        seed,
        block_size=16,
    )
    return replace_attention(model, AttentionArguments(activation=activation, **options), batches)


def batch(rows=4, length=12):
    ids = torch.randint(0, 256, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone()}


def loss_of(model, batch):
    return token_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])
