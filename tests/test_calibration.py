"""Calibration: what is measured, what is set from it, and what is left alone."""

import copy
import math

import pytest
import torch
from models import AUTO_CLASSES, HEADS, LAYERS, WIDTH, batch_for, output, padded_batches, patched_tiny, tiny, token_ids
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    BatchEncoding,
)

from hf_polyattn import calibrate, calibrate_gain, choose_heads, patch_model
from hf_polyattn.activations import frobenius_gain
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.calibration import GainObserver
from hf_polyattn.models import states
from hf_polyattn.observing import store

FAMILIES = [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)]
CROSS = [("gpt2-cross", AutoModel), ("bert-cross", AutoModel)]
DEGREE_4 = {"degree": 4, "normalization": "length"}


# what is measured


@pytest.mark.parametrize(("family", "auto"), [*FAMILIES, *CROSS])
def test_spread_is_the_root_mean_square_of_the_scores_that_count(family, auto, record):
    stock = tiny(family, auto)
    model = patch_model(copy.deepcopy(stock))
    batches = padded_batches(stock)
    report = calibrate_gain(model, batches)
    assert report.batches == 2
    assert list(report.modules) == list(states(model))
    # [B, 1, T, 1] of each batch: rows of padding do not count
    real = [batch.get("attention_mask", torch.ones(2, 9))[:, None, :, None].bool() for batch in batches]
    for measures, recorded in zip(report.modules.values(), record(stock, batches), strict=True):
        seen = [(scores, keep & rows, out * rows) for (scores, keep, out), rows in zip(recorded, real, strict=True)]
        squares = sum((scores.square() * keep).sum((0, 2, 3)) for scores, keep, _ in seen)
        count = sum(keep.sum((0, 2, 3)) for _, keep, _ in seen)
        assert torch.allclose(measures.spread, (squares / count).sqrt().float(), rtol=1e-4)
        peaks = torch.stack([(scores.abs() * keep).amax((0, 2, 3)) for scores, keep, _ in seen])
        assert torch.allclose(measures.peak, peaks.amax(0).float(), rtol=1e-4)
        rows = sum(keep.any(-1)[:, 0].sum() for _, keep, _ in seen)
        energy = sum(out.square().mean(-1).sum((0, 2)) for _, _, out in seen)
        assert torch.allclose(measures.softmax_rms, (energy / rows).sqrt().float(), rtol=1e-3)
    for state, measures in zip(states(model).values(), report.modules.values(), strict=True):
        assert torch.allclose(state.alpha, (1 / measures.spread).double(), rtol=1e-5)


@pytest.mark.parametrize("target", ["output_rms", "frobenius"])
@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_padding_changes_no_gain(family, auto, target):
    model = patch_model(tiny(family, auto))
    padded = copy.deepcopy(model)
    ids = token_ids(2, 6)
    calibrate_gain(model, [ids], target=target)
    mask = torch.ones_like(ids)
    longer = {
        "input_ids": torch.cat([ids, token_ids(2, 5, seed=1)], 1),
        "attention_mask": torch.cat([mask, 0 * mask[:, 1:]], 1),
    }
    calibrate_gain(padded, [longer], target=target)
    for expected, state in zip(states(model).values(), states(padded).values(), strict=True):
        assert torch.allclose(state.alpha, expected.alpha, rtol=1e-6)
        assert torch.allclose(state.gain, expected.gain, rtol=1e-6)


def test_qk_norm_is_part_of_the_score(record):
    stock = tiny("llama")
    model = patch_model(copy.deepcopy(stock), qk_norm=True)
    report = calibrate_gain(model, [batch_for(model)])
    for measures in report.modules.values():
        assert (measures.peak <= 8**0.5 + 1e-4).all()
        assert torch.allclose(measures.spread, torch.ones(HEADS), atol=0.3)


def head_outputs(model, batch):
    """[modules] of [B, T, H, Dv], what the attention function returned."""
    outputs = []

    def keep_output(module, *args, **kwargs):
        out, weights = polyattn_attention(module, *args, **kwargs)
        outputs.append((out, weights))
        return out, weights

    registry = AttentionInterface._global_mapping
    registry["polyattn"] = keep_output
    try:
        with torch.no_grad():
            model(**batch, output_attentions=True)
    finally:
        registry["polyattn"] = polyattn_attention
    return outputs


@pytest.mark.parametrize("poly", [{}, {"activation": "monomial"}, {"normalization": "l1"}, DEGREE_4], ids=str)
@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_output_starts_at_the_size_of_softmax(family, auto, poly, record):
    """On the queries, keys and values of the softmax model, in every layer."""
    stock = tiny(family, auto)
    batch = batch_for(stock, 4, 16)
    calibrated = patch_model(copy.deepcopy(stock), **poly, calibrate=[batch])
    raw = patch_model(copy.deepcopy(stock), **{"gain": 1.0, "alpha": 1.0, **poly})
    seen = record(stock, [batch])
    for model, near in ((calibrated, True), (raw, False)):
        for name, layer, (q, k, v, mask, scaling) in zip(states(model), seen, record.inputs, strict=True):
            softmax = layer[0][2].square().mean((0, 2, 3)).sqrt()
            out, _ = polyattn_attention(model.get_submodule(name), q, k, v, mask, scaling=scaling)
            ratio = out.square().mean((0, 1, 3)).sqrt() / softmax
            assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3 if near else 0.05) == near


def test_frobenius_target_sets_the_norm_of_the_weights():
    stock = tiny("gpt2")
    batch = batch_for(stock, 4, 16)
    model = patch_model(copy.deepcopy(stock), "monomial", alpha="auto", gain="auto")
    calibrate_gain(model, [batch], target="frobenius")
    weights = head_outputs(model, batch)[0][1]
    # ||A||_F^2 = N for the N rows of all sequences
    assert torch.allclose(weights.square().sum((0, 2, 3)), torch.tensor(64.0).double(), rtol=1e-4)
    at_once = patch_model(copy.deepcopy(stock), "monomial", calibrate=[batch], target="frobenius")
    assert torch.equal(output(at_once), output(model))
    with pytest.raises(ValueError, match="target must be one of"):
        calibrate_gain(model, [batch], target="rms")


def test_heads_outside_the_patch_are_not_measured(record):
    stock = tiny("gpt2")
    model = patch_model(copy.deepcopy(stock), heads={0: [1, 3]}, layers=[0])
    report = calibrate_gain(model, [batch_for(model)])
    everything = calibrate_gain(patch_model(copy.deepcopy(stock)), [batch_for(model)])
    (measures,) = report.modules.values()
    first = next(iter(everything.modules.values()))
    assert torch.allclose(measures.spread, first.spread[[1, 3]], rtol=1e-5)
    assert torch.allclose(measures.gain, first.gain[[1, 3]], rtol=1e-5)
    assert states(model)["transformer.h.0.attn"].gain.shape == (2,)


def test_measurement_sees_a_softmax_teacher_in_every_layer():
    """The spread of the last layer must not depend on what the polynomials of the layers before compute."""
    spreads = []
    for gain in (1.0, 50.0):
        torch.manual_seed(3)
        model = patch_model(tiny("gpt2"), gain=gain)
        spreads.append(calibrate_gain(model, [batch_for(model)]).modules["transformer.h.1.attn"].spread)
    assert torch.equal(*spreads)


@pytest.mark.parametrize(("family", "auto"), [*FAMILIES, *CROSS])
def test_no_logits_are_computed_and_the_numbers_are_those_of_the_whole_model(family, auto, monkeypatch):
    model = patch_model(tiny(family, auto))
    whole = copy.deepcopy(model)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in padded_batches(model)]
    if model.base_model is not model:
        batches[0]["logits_to_keep"] = 1
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    calibrate_gain(model, batches)
    monkeypatch.setattr(type(whole), "base_model", property(lambda self: self))
    calibrate_gain(whole, batches)
    for state, expected in zip(states(model).values(), states(whole).values(), strict=True):
        assert torch.equal(state.alpha, expected.alpha)
        assert torch.equal(state.gain, expected.gain)


def test_multiple_choice_is_measured_on_all_choices():
    model = patch_model(tiny("bert", AutoModelForMultipleChoice))
    flat = patch_model(copy.deepcopy(model))
    ids = token_ids(6)
    calibrate_gain(model, [ids.view(2, 3, -1)])
    calibrate_gain(flat, [ids])
    assert torch.equal(
        states(model)["bert.encoder.layer.1.attention.self"].gain, next(reversed(states(flat).values())).gain
    )


# the default without batches


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "gpt2-cross"])
def test_analytic_spread_is_near_the_measured_one_at_initialisation(family):
    wide = {"n_embd": 128} if family.startswith("gpt2") else {"hidden_size": 128, "intermediate_size": 128}
    if family == "llama":
        wide["num_key_value_heads"] = 4
    model = patch_model(tiny(family, AUTO_CLASSES[family][1], factor=1.0, **wide))
    inputs = batch_for(model, 4, 32)
    if "cross" in family:
        inputs["encoder_hidden_states"] = torch.randn(4, 32, 128, dtype=torch.float64)
    predicted = {name: state.alpha.clone() ** -2 for name, state in states(model).items()}
    report = calibrate_gain(model, [inputs])
    for name, measures in report.modules.items():
        ratio = measures.spread.square().mean().sqrt() / predicted[name].mean()
        assert 0.75 < ratio < 1.25, name


def test_initializer_range_and_width_enter_the_analytic_spread():
    # sigma = width * range^2 at scaling 1 / sqrt(head_dim); drawn weights have that range within a few percent
    for width, spread in ((32, 0.0128), (64, 0.0256)):
        model = patch_model(tiny("gpt2", n_embd=width, factor=1.0))
        assert states(model)["transformer.h.0.attn"].alpha[0].item() == pytest.approx(spread**-0.5, rel=0.1)
    model = patch_model(tiny("gpt2", scale_attn_by_inverse_layer_idx=True))
    first, second = (state.alpha[0].item() for state in states(model).values())
    assert second == pytest.approx(math.sqrt(2) * first, rel=0.1)
    model = patch_model(tiny("gpt2"), "monomial", alpha="auto", gain="auto", degree=4)
    assert states(model)["transformer.h.0.attn"].gain[0].item() == pytest.approx(frobenius_gain(4))


# what is set


def test_fixed_numbers_stay():
    for fixed, free in (("alpha", "gain"), ("gain", "alpha")):
        model = patch_model(tiny("gpt2"), **{fixed: 3.0})
        before = {name: getattr(state, free).clone() for name, state in states(model).items()}
        calibrate_gain(model, [batch_for(model)])
        for name, state in states(model).items():
            assert (getattr(state, fixed) == 3.0).all()
            assert not torch.equal(getattr(state, free), before[name])


def test_patching_with_batches_is_patching_and_calibrating():
    stock = tiny("llama")
    batch = batch_for(stock)
    for activation in ("poly", "monomial"):
        model = patch_model(copy.deepcopy(stock), activation, calibrate=[batch["input_ids"]])
        named = {"normalization": model.config.polyattn["normalization"], "alpha": "auto", "gain": "auto"}
        other = patch_model(copy.deepcopy(stock), activation, **named)
        calibrate_gain(other, iter([{**batch, "labels": batch["input_ids"]}]))
        assert torch.equal(output(model), output(other))


def test_calibrating_again_changes_nothing():
    model = patched_tiny("gpt2")
    calibrate_gain(model, [batch_for(model)])
    before = output(model)
    calibrate_gain(model, [batch_for(model)])
    assert torch.allclose(output(model), before, rtol=1e-5, atol=1e-7)


def test_model_random_state_and_modes_are_left_alone():
    model = patch_model(tiny("gpt2")).train()
    model.transformer.h[0].ln_1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate_gain(model, [batch_for(model)])
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    changed = {k.rpartition(".")[2] for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {"alpha", "gain"}
    assert all(p.grad is None for p in model.parameters())
    assert all(s.observer is None for s in states(model).values())


def test_report_prints_what_was_measured():
    report = calibrate_gain(patch_model(tiny("gpt2")), [batch_for(tiny("gpt2"))])
    lines = str(report).splitlines()
    assert lines[0].startswith("calibrated 2 attention modules on 1 batches")
    assert len(lines) == 2 + LAYERS
    assert "score spread" in lines[1]
    assert lines[2].startswith("transformer.h.0.attn ")
    assert f"{report.modules['transformer.h.0.attn'].softmax_rms.mean():.3g}" in lines[2]
    assert len({len(line) for line in lines[1:]}) == 1


# what is refused


def test_calibration_that_could_do_nothing_is_refused():
    model = tiny("gpt2")
    batch = batch_for(model)
    with pytest.raises(ValueError, match="is not patched"):
        calibrate_gain(model, [batch])
    patch_model(model)
    with pytest.raises(ValueError, match="no batches"):
        calibrate_gain(model, [])
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate_gain(patch_model(model, "monomial"), [batch])
    with pytest.raises(ValueError, match="nothing to calibrate"):
        patch_model(model, "relu", calibrate=[batch])
    for said in ({"fit": "coefficients"}, {"target": "frobenius"}):
        with pytest.raises(ValueError, match="pass calibrate=batches too"):
            patch_model(model, **said)


IDS = token_ids()


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ({"input_ids": IDS}, r"takes a list of batches: {name}=\[batch\]"),
        (BatchEncoding({"input_ids": IDS}), r"takes a list of batches: {name}=\[batch\]"),
        (IDS, r"takes a list of batches: {name}=\[batch\]"),
        ("some text", "texts must be tokenised first"),
        (["some text"], "texts must be tokenised first"),
        ([["a text", "another"]], "texts must be tokenised first"),
        ([{"text": ["a text", "another"]}], "texts must be tokenised first"),
        ([{"input_ids": [[1, 2, 3]]}], 'return_tensors="pt"'),
        ([[1, 2, 3]], "a batch is a dictionary of model inputs or a tensor of input ids, got list"),
        ([IDS[0]], r"input_ids must be \[batch, length\], got the shape \[9\]"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_list_of_batches_is_refused_with_the_remedy(batches, match):
    stock = tiny("gpt2")
    with pytest.raises(ValueError, match=match.format(name="calibrate")):
        patch_model(stock, calibrate=batches)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    for function in (calibrate, calibrate_gain):
        with pytest.raises(ValueError, match=match.format(name="batches")):
            function(patch_model(copy.deepcopy(stock), normalization="length"), batches)
    with pytest.raises(ValueError, match=match.format(name="batches")):
        choose_heads(stock, batches)


@pytest.mark.parametrize(
    ("value", "match"), [(torch.nan, "are not finite"), (torch.inf, "are not finite"), (0.0, "have only zero scores")]
)
def test_useless_batches_are_refused_and_change_nothing(value, match):
    model = patch_model(tiny("llama"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    useless = {"inputs_embeds": torch.full((1, 4, WIDTH), value, dtype=torch.float64)}
    with pytest.raises(ValueError, match=match):
        calibrate_gain(model, [batch_for(model), useless] if value != 0 else [useless])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(state.observer is None for state in states(model).values())


def test_numbers_that_the_dtype_cannot_hold_are_refused():
    model = patch_model(tiny("gpt2", double=False, factor=0.01)).half()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn would need .* torch.float16 cannot hold"):
        calibrate_gain(model, [batch_for(model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("heads", [1, 2])
def test_refused_coefficients_of_equal_heads_are_told(heads):
    with pytest.raises(ValueError, match=r"attn would need values of 5e\+04 \(1 to 1e\+05\), which torch\.float16"):
        store("attn", torch.zeros(heads, 2).half(), torch.tensor([[1.0, 1e5]]).expand(heads, 2))


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model = patch_model(tiny("gpt2")).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(GainObserver, "gain_factor", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate_gain(model, [batch_for(model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
