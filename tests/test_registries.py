"""Activations and architectures: those that come with the package, and those of others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import (
    HEADS,
    output,
    patched_tiny,
    same_bits,
    tiny,
    tiny_config,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
)

import hf_polyattn
from hf_polyattn import PolyAttentionConfig, coverage, patch_model
from hf_polyattn.activations import _REGISTRY as ACTIVATIONS
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.models import poly_config, states


@pytest.fixture
def silu():
    hf_polyattn.register_activation("silu", lambda s, n: F.silu(s), defaults={"normalization": "length"})
    yield
    ACTIVATIONS.pop("silu")


def test_registered_activation_works_end_to_end(silu, tmp_path):
    model = patch_model(tiny("gpt2"), "silu", alpha=2.0)
    assert model.config.polyattn["normalization"] == "length"
    module = model.transformer.h[0].attn
    q, k, v = torch.randn(3, 1, HEADS, 5, 8, dtype=torch.float64)
    out, _ = polyattn_attention(module, q, k, v, None, scaling=0.3)
    scores = (0.6 * q @ k.transpose(-1, -2)).tril()
    weights = F.silu(scores) / torch.arange(1, 6)[:, None]
    assert torch.allclose(out.transpose(1, 2), weights @ v, atol=1e-12)
    model.save_pretrained(tmp_path)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="already registered"):
        hf_polyattn.register_activation("silu")
    entry = ACTIVATIONS.pop("silu")
    try:
        with pytest.raises(ValueError, match="unknown activation 'silu'.*register_activation"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        ACTIVATIONS["silu"] = entry


def test_bad_defaults_fail_at_registration():
    with pytest.raises(ValueError, match="normalization"):
        hf_polyattn.register_activation("bad", lambda s, n: s, defaults={"normalization": "L1"})
    with pytest.raises(TypeError, match=r"phi must be a function of \(scores, row lengths\).* got 3"):
        hf_polyattn.register_activation("bad", 3)
    assert "bad" not in ACTIVATIONS


def test_registered_architecture_works_end_to_end(tmp_path):
    model = patched_tiny("mistral")
    assert str(coverage(model)) == "poly: patched 2 of 2 attention modules (8 of 8 heads), normalization length"
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "PolyMistralForCausalLM"
    assert same_bits(reloaded, model)
    with pytest.raises(ValueError, match="already registered"):
        hf_polyattn.register_architecture("mistral", ["MistralAttention"])
    with pytest.raises(ValueError, match="has no architecture 'mistrall'"):
        hf_polyattn.register_architecture("mistrall", ["MistralAttention"])


def test_numbers_stand_for_functions_of_the_module(own_registry):
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32
    )
    model = AutoModelForCausalLM.from_config(config)
    hf_polyattn.register_architecture("opt", ["OPTAttention"])
    with pytest.raises(ValueError, match="no field 'initializer_range'.* give register_architecture initial_spread="):
        patch_model(model)
    entry = hf_polyattn.register_architecture("opt", ["OPTAttention"], num_heads=4, initial_spread=0.25, exist_ok=True)
    # the code beside the weights reads the configuration alone
    assert not entry.is_plain
    patch_model(model)
    assert str(coverage(model)).startswith("poly: patched 1 of 1 attention modules (4 of 4 heads)")
    assert states(model).popitem()[1].alpha[0].item() == pytest.approx(2)
    for number, error in ((0, ValueError), ("0.3", TypeError), (True, TypeError), (float("nan"), ValueError)):
        with pytest.raises(error, match="initial_spread must be"):
            hf_polyattn.register_architecture("opt", ["OPTAttention"], initial_spread=number, exist_ok=True)


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
def test_baselines_are_what_the_literature_says(activation):
    stock = tiny("llama")
    model = patch_model(copy.deepcopy(stock), activation)
    module = model.model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, HEADS, 5, 8, dtype=torch.float64)
    out, _ = polyattn_attention(module, q, k[:, ::2], v[:, ::2], None, scaling=0.3)
    k, v = (x[:, ::2].repeat_interleave(2, 1) for x in (k, v))
    scores, lengths = 0.3 * q @ k.transpose(-1, -2), torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = {
        "softmax": scores.masked_fill(~causal, -torch.inf).softmax(-1),
        "relu": scores.clamp(min=0).masked_fill(~causal, 0) / lengths,
        "sigmoid": (scores - lengths.log()).sigmoid().masked_fill(~causal, 0),
    }[activation]
    assert torch.allclose(out.transpose(1, 2), weights @ v, atol=1e-12)
    if activation == "softmax":
        assert torch.allclose(output(model), output(stock), atol=1e-10)


def test_softmax_with_a_gain_is_not_plain_softmax():
    plain, doubled = (patch_model(tiny("gpt2"), "softmax", **o) for o in ({}, {"gain": 2.0}))
    q, k, v = torch.randn(3, 1, HEADS, 5, 8, dtype=torch.float64)
    one, two = (polyattn_attention(m.transformer.h[0].attn, q, k, v, None)[0] for m in (plain, doubled))
    assert torch.allclose(2 * one, two, atol=1e-5)


def test_initializer_range_of_the_host_gives_the_default_alpha():
    """Before there are weights: the loader builds a model from its configuration."""

    def built(initializer_range):
        config = LlamaConfig(**tiny_config("llama").to_dict() | {"initializer_range": initializer_range})
        model = AutoModelForCausalLM.from_config(poly_config(config, PolyAttentionConfig()))
        return next(iter(states(model).values())).alpha[0].item()

    assert built(0.02) / built(0.2) == pytest.approx(10, rel=1e-4)
