"""Which normalization a model gets where nobody names one: by polynomial, by calibration, by what it had before."""

import copy
import logging

import pytest
import torch
from models import batch_for, output, patched_tiny, tiny

from hf_polyattn import (
    PolyAttentionConfig,
    activations,
    calibrate,
    choose_heads,
    coverage,
    patch_model,
    register_activation,
)
from hf_polyattn.activations import resolve_config
from hf_polyattn.coefficient_fit import fit_coefficients
from hf_polyattn.models import read_settings, states
from hf_polyattn.training.models import replace_attention
from hf_polyattn_arguments import AttentionArguments

MONOMIAL = {"coefficients": "monomial"}
FIXED = {"coefficients": (1.0, 1.0, 0.5, 0.2)}


def normalization_of(model):
    return read_settings(model.config).normalization


# of a stock model


@pytest.mark.parametrize(
    ("options", "new", "calibrated"),
    [
        ({}, "l1", "length"),
        ({"degree": 5}, "l1", "length"),
        ({"degree": 2}, "length", "length"),
        (FIXED, "length", "length"),
        (MONOMIAL, "sqrt_length", "sqrt_length"),
        ({"activation": "monomial"}, "sqrt_length", "sqrt_length"),
        ({"normalization": "l2"}, "l2", "l2"),
    ],
    ids=str,
)
def test_of_a_patch_with_and_without_batches(options, new, calibrated):
    stock = tiny("gpt2")
    assert normalization_of(patch_model(copy.deepcopy(stock), **options)) == new
    assert normalization_of(patch_model(copy.deepcopy(stock), **options, calibrate=[batch_for(stock)])) == calibrated


def test_of_a_patch_that_fits_coefficients():
    model = tiny("gpt2")
    patch_model(model, calibrate=[batch_for(model)], fit="coefficients")
    assert normalization_of(model) == "length"


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softmax"])
def test_of_what_is_no_polynomial(activation):
    expected = {"relu": "length", "sigmoid": "none", "softmax": "sum"}[activation]
    assert normalization_of(patch_model(tiny("gpt2"), activation)) == expected


def test_of_chosen_heads():
    """Heads are chosen and then fitted in one normalization, that of fitted coefficients."""
    stock = tiny("gpt2")
    batch = batch_for(stock)
    chosen = choose_heads(stock, [batch], budget=0.5)
    assert chosen == choose_heads(stock, [batch], budget=0.5, normalization="length")
    model = patch_model(stock, heads="auto", budget=0.5, calibrate=[batch])
    assert normalization_of(model) == "length"
    with pytest.raises(ValueError, match="not linear in the coefficients"):
        choose_heads(tiny("gpt2"), [batch], budget=0.5, normalization="l1")


def test_of_a_recipe():
    stock = tiny("gpt2")
    named = AttentionArguments(activation="poly")
    assert normalization_of(replace_attention(copy.deepcopy(stock), named)) == "l1"
    assert normalization_of(replace_attention(copy.deepcopy(stock), named, [batch_for(stock)])) == "length"


# of a patched model


@pytest.mark.parametrize("own", ["length", "l1", "l2", 14.0])
@pytest.mark.parametrize("change", [{}, {"layers": [1]}, {"backend": "naive"}, {"learn_gain": True}], ids=str)
def test_a_second_patch_keeps_that_of_the_same_function(own, change):
    model = patched_tiny("gpt2", poly={"normalization": own})
    before = {name: state.coefficients.clone() for name, state in states(model).items()}
    patch_model(model, **change)
    assert normalization_of(model) == own
    for name, state in states(model).items():
        assert torch.equal(state.coefficients, before[name])


def test_a_second_patch_keeps_that_of_a_fitted_model():
    model = tiny("gpt2")
    batch = batch_for(model)
    patch_model(model, calibrate=[batch], fit="coefficients")
    before = output(model)
    patch_model(model)
    assert normalization_of(model) == "length"
    assert torch.equal(output(model), before)
    patch_model(model, normalization="l1")
    assert normalization_of(model) == "l1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"degree": 5}, "l1"), ({"degree": 2}, "length"), ({"qk_norm": True}, "l1"), (MONOMIAL, "sqrt_length")],
    ids=str,
)
def test_a_second_patch_to_another_function_takes_the_default(change, expected):
    model = patched_tiny("gpt2", poly={"normalization": "none"})
    patch_model(model, **change)
    assert normalization_of(model) == expected


def test_a_recipe_keeps_that_of_the_same_function():
    for own in ("l1", "length"):
        model = patched_tiny("gpt2", poly={"normalization": own})
        model = replace_attention(model, AttentionArguments(activation="poly", backend="naive"))
        assert normalization_of(model) == own


# where coefficients are fitted to softmax after all


@pytest.mark.parametrize("fit", [calibrate, fit_coefficients])
def test_coefficients_of_a_model_patched_without_batches_are_not_fitted(fit):
    model = patch_model(tiny("gpt2"))
    before = output(model)
    with pytest.raises(ValueError, match="not linear in the coefficients.*") as error:
        fit(model, [batch_for(model)])
    assert 'patch with normalization="length"' in str(error.value)
    assert torch.equal(output(model), before)
    # the remedy that it names
    fit(patch_model(model, normalization="length"), [batch_for(model)])


def test_a_second_patch_that_fits_coefficients_leaves_what_it_cannot_be_fitted_in(caplog):
    model = patch_model(tiny("gpt2"))
    batch = batch_for(model)
    once = patch_model(tiny("gpt2"))
    once.load_state_dict(model.state_dict())
    patch_model(once, normalization="length", calibrate=[batch], fit="coefficients")
    with caplog.at_level(logging.INFO, "hf_polyattn"):
        patch_model(model, calibrate=[batch], fit="coefficients")
    said = "; was normalization='l1'; new: coefficients, alpha, gain"
    assert caplog.messages[-1] == f"{coverage(model)}{said}"
    assert torch.equal(output(model), output(once))
    # the size alone can be fitted in it
    patch_model(again := patch_model(tiny("gpt2")), calibrate=[batch])
    assert normalization_of(again) == "l1"


def test_a_recipe_that_fits_coefficients_leaves_what_it_cannot_be_fitted_in():
    model = patch_model(tiny("gpt2"))
    named = AttentionArguments(activation="poly", calibrate_batches=1, calibration_fit="coefficients")
    assert normalization_of(replace_attention(model, named, [batch_for(model)])) == "length"


def test_a_recipe_fits_a_polynomial_checkpoint_anew_only_where_batches_are_named():
    """calibration_fit alone, as a configuration for softmax checkpoints has it, leaves a trained function alone."""
    words = {"calibration_fit": "coefficients"}
    for activation in ("poly", None):
        model = patched_tiny("gpt2", poly={"normalization": "l1"})
        batch, before = batch_for(model), output(model)
        kept = replace_attention(model, AttentionArguments(activation=activation, **words), [batch])
        assert torch.equal(output(kept), before)
        fitted = replace_attention(
            model, AttentionArguments(activation=activation, calibrate_batches=1, **words), [batch]
        )
        assert normalization_of(fitted) == "length"


# of a config


def test_an_empty_word_names_none():
    assert resolve_config("relu", normalization="").normalization == "length"
    assert resolve_config("poly", normalization="", calibrated=True).normalization == "length"
    model = patched_tiny("gpt2", poly={"normalization": "length"})
    assert normalization_of(patch_model(model, normalization="")) == "length"


def test_of_a_config_made_by_hand():
    assert PolyAttentionConfig().normalization == "l1"
    assert PolyAttentionConfig(degree=2).normalization == "length"
    assert PolyAttentionConfig(activation="monomial", coefficients="monomial").normalization == "sqrt_length"
    assert PolyAttentionConfig(activation="relu").normalization == "length"


def test_of_a_registered_polynomial(monkeypatch):
    monkeypatch.setattr(activations, "_REGISTRY", dict(activations._REGISTRY))
    register_activation("my cubic", defaults={"degree": 3})
    assert normalization_of(patch_model(tiny("gpt2"), "my cubic")) == "l1"
