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
from hf_polyattn.architectures import get_architecture, spread_of_weights
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("patch", [False, True])
def test_a_second_call_sets_the_scores_anew(name, patch):
    """The same call again changes nothing, and another one gives what it gives to a new model."""
    once, twice = built(name), built(name)
    if patch:
        patch_model(once)
        patch_model(twice)
    start_scores(once, spread=1.0)
    before = {name: tensor.clone() for name, tensor in once.state_dict().items()}
    start_scores(once, spread=1.0)
    for key, tensor in once.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    start_scores(once, spread=2.0)
    start_scores(twice, spread=2.0)
    for key, tensor in once.state_dict().items():
        torch.testing.assert_close(tensor, twice.state_dict()[key], msg=key)


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


def built(name):
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIGS[name])


def alphas(model):
    return torch.stack([state.alpha for state in states(model).values()])


POWERS = [
    ({}, -0.5),
    ({"degree": 2}, -0.5),
    ({"normalization": "length"}, -0.5),
    ({"normalization": "sqrt_length"}, -1),
]
"""Options, and the power of the spread that the default alpha is."""


@pytest.mark.parametrize(("options", "power"), POWERS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_default_alpha_follows_the_weights(name, options, power):
    fresh = alphas(patch_model(built(name), **options))
    entry = get_architecture(CONFIGS[name])
    spreads = torch.tensor([entry.initial_spread(module) for _, module in entry.attention_modules(built(name))])
    torch.testing.assert_close(fresh.mean(1), spreads**power, rtol=0.05, atol=0)
    scaled = built(name)
    start_scores(scaled, spread=1.0)
    torch.testing.assert_close(alphas(patch_model(scaled, **options)), fresh / spreads[:, None] ** power)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_a_started_model_have_unit_spread_after_alpha(name):
    model = built(name)
    start_scores(model, spread=1.0)
    model = patch_model(model)
    default = alphas(model)
    measured_alpha = 1 / measured(model)
    torch.testing.assert_close(default.mean(1), measured_alpha, rtol=0.35, atol=0)


@pytest.mark.parametrize(("options", "power"), [*POWERS, ({"alpha": 2.0}, 0), ({"qk_norm": True}, 0)], ids=str)
def test_alpha_follows_a_change_of_the_spread_only_where_it_means_the_spread(options, power):
    model = patch_model(built("llama"), **options)
    before = alphas(model)
    start_scores(model, spread=1.0)
    entry = get_architecture(model.config)
    spreads = torch.tensor([entry.initial_spread(module) for _, module in entry.attention_modules(model)])
    torch.testing.assert_close(alphas(model), before / spreads[:, None] ** power)


def test_weights_that_cannot_be_read_leave_the_formula_of_the_configuration():
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIGS["llama"])
    entry = get_architecture(model.config)
    (_, module), *_ = entry.attention_modules(model)
    assert spread_of_weights(entry, module) is None
    patch_model(model)
    assert next(iter(states(model).values())).spread == entry.initial_spread(module)


def test_a_mean_without_biases_leaves_the_weights_alone():
    model = AutoModel.from_config(CONFIGS["llama"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="layers.0.self_attn has no query and key biases"):
        start_scores(model, spread=1.0, mean=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_scaling_of_none_is_that_of_the_head_size():
    biases = []
    for scaling in (0.25, None):
        model = AutoModel.from_config(CONFIGS["bert"])
        for _, module in get_architecture(model.config).attention_modules(model):
            module.scaling = scaling
        start_scores(model, mean=0.5)
        biases.append(model.encoder.layer[0].attention.self.query.bias)
    assert torch.equal(*biases)


def test_refusals(own_registry):
    model = AutoModel.from_config(CONFIGS["llama"])
    with pytest.raises(ValueError, match="no query and key biases"):
        start_scores(model, mean=1.0)
    with pytest.raises(ValueError, match="spread must be a positive number, got -1"):
        start_scores(model, spread=-1)
    entry = get_architecture(model.config)
    register_architecture("llama", entry.attention_classes, exist_ok=True)
    with pytest.raises(ValueError, match="has no query_key"):
        start_scores(model, spread=1.0)
