"""torch.compile of polynomial models: one graph, equal values, equal gradients."""

import pytest
import torch
from models import batch_for, patched_tiny
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_polyattn.models import states

ONE_LAYER = {"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}, "bert": {"num_hidden_layers": 1}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def build(family, auto, **poly):
    return patched_tiny(family, auto, poly=poly, **ONE_LAYER[family.split("-")[0]])


@pytest.mark.parametrize(
    ("family", "auto", "poly"),
    [
        ("gpt2", AutoModelForCausalLM, {}),
        ("llama", AutoModelForCausalLM, {"qk_norm": True, "learn_affine": True}),
        ("bert", AutoModelForMaskedLM, {"normalization": "l1"}),
        ("gpt2-cross", AutoModel, {"activation": "monomial", "heads": {0: (1,)}, "learn_gain": True}),
    ],
)
def test_compiled_models_have_no_graph_breaks_and_equal_values(family, auto, poly):
    model = build(family, auto, **poly)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {**batch_for(model), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][0, 7:] = 0
    expected, out = (m(**inputs, use_cache=False)[0] for m in (model, compiled))
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-10)
    learned = [p for state in states(model).values() for p in state.parameters()]
    gradients = [torch.autograd.grad(x.square().mean(), learned) for x in (expected, out)]
    assert len(learned) > 0
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "auto"),
    [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)],
)
def test_compiled_models_in_single_precision(family, auto):
    """The compiled CPU form, where this machine has it, is one operator in the graph."""
    model = patched_tiny(family, auto, double=False, **ONE_LAYER[family])
    inputs = {**batch_for(model), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][0, 7:] = 0
    with torch.no_grad():
        expected = model(**inputs, use_cache=False)[0]
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_compiled_model_gives_attention_maps_when_asked():
    model = build("gpt2", AutoModel)
    # Transformers puts its recording hooks on under a lock, which cannot be compiled
    expected = model(**batch_for(model), output_attentions=True).attentions
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for asked in (False, True):
        attentions = compiled(**batch_for(model), use_cache=False, output_attentions=asked).attentions
        assert torch.allclose(attentions[0], expected[0]) if asked else attentions is None


@pytest.mark.slow
def test_inductor_gives_equal_values():
    model = build("gpt2", AutoModelForCausalLM)
    compiled = torch.compile(model, fullgraph=True)
    inputs = batch_for(model)
    with torch.no_grad():
        out, expected = (m(**inputs, use_cache=False)[0] for m in (compiled, model))
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-10)


def test_a_compiled_decoding_step_has_no_graph_breaks_and_equal_values():
    model = patched_tiny("gpt2", AutoModelForCausalLM, double=False, **ONE_LAYER["gpt2"])
    ids = batch_for(model)["input_ids"]
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for _ in range(2)]
        expected = model(ids[:, :1], past_key_values=caches[0]).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(ids[:, :1], past_key_values=caches[1]).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
