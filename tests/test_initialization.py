"""Scores start with the spread and the mean that were asked for, in each architecture that can do it."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from hf_polyattn import calibrate_gain, patch_model, register_architecture, start_scores
from hf_polyattn.architectures import get_architecture
from hf_polyattn.models import states

IDS = torch.arange(48).view(2, 24)
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4),
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "bert": BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
}


def measured(model):
    """Root mean square of all scores, one number an attention module."""
    patch_model(model)
    report = calibrate_gain(model, [IDS])
    return torch.stack([m.spread.square().mean().sqrt() for m in report.modules.values()])


@pytest.mark.parametrize("name", CONFIGS)
def test_spread(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name])
    start_scores(model, spread=1.0)
    # two layers of four heads, 48 tokens: the sample is small
    torch.testing.assert_close(measured(model), torch.ones(2), rtol=0.35, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_mean(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name])
    start_scores(model, mean=2.0)
    # the spread at this width is .03: what is measured is the mean
    torch.testing.assert_close(measured(model), torch.full((2,), 2.0), rtol=0.05, atol=0)


def test_cross_attention_keeps_values():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4, add_cross_attention=True)
    model = AutoModelForCausalLM.from_config(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start_scores(model, spread=1.0, mean=1.0)
    after = dict(model.named_parameters())
    inner = "transformer.h.0."
    for name, keys in (("attn.c_attn", 128), ("crossattention.c_attn", 64)):
        weight, old = after[f"{inner}{name}.weight"], before[f"{inner}{name}.weight"]
        assert not torch.equal(weight[:, :keys], old[:, :keys])
        assert torch.equal(weight[:, keys:], old[:, keys:])
        assert after[f"{inner}{name}.bias"][keys:].eq(0).all()
    assert after[f"{inner}crossattention.q_attn.bias"].gt(0).all()


def test_same_attention_after_patching():
    """Patched before or after, the weights come out the same."""
    models = []
    for first in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
        if first:
            patch_model(model)
        start_scores(model, spread=1.0)
        if not first:
            patch_model(model)
        models.append(model)
    assert len(states(models[0])) == 2
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_refusals():
    model = AutoModel.from_config(CONFIGS["llama"])
    with pytest.raises(ValueError, match="no query and key biases"):
        start_scores(model, mean=1.0)
    with pytest.raises(ValueError, match="spread must be a positive number, got -1"):
        start_scores(model, spread=-1)
    entry = get_architecture(model.config)
    register_architecture("llama", entry.attention_classes, exist_ok=True)
    try:
        with pytest.raises(ValueError, match="has no query_key"):
            start_scores(model, spread=1.0)
    finally:
        register_architecture("llama", entry.attention_classes, query_key=entry.query_key, exist_ok=True)
