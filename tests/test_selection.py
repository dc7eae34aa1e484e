"""Layers and heads that are left out of a patch stay softmax."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import (
    HEADS,
    LAYERS,
    output,
    patched_tiny,
    tiny,
)

import hf_polyattn
from hf_polyattn import patch_model
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.models import states


def attention_of(model, layer):
    return model.transformer.h[layer].attn


def test_layers_that_are_left_out_compute_softmax():
    stock = tiny("gpt2")
    model = patch_model(copy.deepcopy(stock), layers=[0])
    seen = {}
    for layer in range(LAYERS):
        hook = lambda m, args, out, layer=layer: seen.update({layer: (args[0], out[0])})  # noqa: E731
        attention_of(model, layer).register_forward_hook(hook)
    output(model)
    length = seen[0][0].shape[1]
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for layer, softmax in ((0, False), (1, True)):
        hidden, out = seen[layer]
        expected = attention_of(stock, layer)(hidden, attention_mask=causal)[0]
        assert torch.allclose(out, expected, atol=1e-10) == softmax


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_are_left_out_compute_softmax(family, masked):
    model = patched_tiny(family, poly={"heads": {0: [1, 3], 1: [0]}})
    for name, state in states(model).items():
        module, chosen = model.get_submodule(name), list(state.chosen)
        kv_heads = 2 if family == "llama" else HEADS
        q = torch.randn(2, HEADS, 6, 8, dtype=torch.float64)
        k, v = torch.randn(2, 2, kv_heads, 6, 8, dtype=torch.float64)
        keep = torch.rand(2, 1, 6, 6) < 0.7
        keep |= torch.eye(6, dtype=torch.bool)
        out, weights = polyattn_attention(
            module, q, k, v, keep if masked else None, scaling=0.3, output_attentions=True
        )
        if not masked:
            keep = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
        k, v = (x.repeat_interleave(HEADS // kv_heads, 1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)
        expected[:, chosen] = hf_polyattn.polynomial_attention(
            q[:, chosen],
            k[:, chosen],
            v[:, chosen],
            coefficients=state.coefficients,
            alpha=state.alpha,
            beta=state.beta,
            gain=state.gain,
            normalization=state.config.normalization,
            keep=keep,
            scaling=0.3,
        )
        # the softmax of the definition divides by 1e-6 more than the sum
        assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)
        rest = [head for head in range(HEADS) if head not in chosen]
        assert torch.allclose(weights[:, rest].sum(-1), torch.ones(()).double(), atol=1e-5)
        fast, none = polyattn_attention(
            module, q, k[:, :: HEADS // kv_heads], v[:, :: HEADS // kv_heads], keep, scaling=0.3
        )
        assert none is None
        assert torch.allclose(fast.transpose(1, 2), expected, atol=1e-12)


def test_state_of_a_part_holds_the_chosen_heads_only():
    model = patch_model(tiny("llama"), learn_gain=True, heads={0: [1, 3]}, layers=[0])
    (state,) = states(model).values()
    assert state.coefficients.shape == (2, 4)
    assert state.gain.shape == (2,)


def test_naming_all_heads_is_naming_none():
    model = patch_model(tiny("gpt2"), heads={0: range(HEADS)})
    assert all(state.chosen is None for state in states(model).values())
