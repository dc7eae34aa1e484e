"""patch_model and its relatives: what they change, and what they leave alone."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from models import (
    ALL_AUTO_CLASSES,
    LAYERS,
    batch_for,
    disturb,
    output,
    patched_tiny,
    same_bits,
    tiny,
    tiny_config,
)
from patch_traces import refuses, traces
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2LMHeadModel,
)

import hf_polyattn
from hf_polyattn import (
    PolyAttentionConfig,
    coverage,
    ops,
    patch_model,
    patched,
    set_backend,
    unpatch_model,
)
from hf_polyattn.models import states
from hf_polyattn.state import PolyAttentionState

# what a patch does


@pytest.mark.parametrize(("family", "auto"), ALL_AUTO_CLASSES, ids=lambda x: getattr(x, "__name__", x))
def test_every_auto_class_is_patched_trains_and_comes_back(family, auto):
    model = tiny(family, auto)
    stock, before, inputs = type(model), traces(model), batch_for(model)
    softmax = output(model)
    assert patch_model(model) is model
    assert isinstance(model, stock)
    assert type(model).__name__ == f"Poly{stock.__name__}"
    assert model.config.model_type == f"polyattn_{family.split('-')[0]}"
    polynomial = model(**inputs)[0]
    assert not torch.allclose(polynomial, softmax, atol=1e-3)
    polynomial.square().mean().backward()
    # without encoder states cross-attention would not run: batch_for gives them
    for state in states(model).values():
        assert state.coefficients.grad.isfinite().all()
        assert (state.coefficients.grad != 0).any()
    unpatch_model(model)
    assert traces(model) == before
    assert torch.equal(output(model), softmax)


def test_unpatching_after_output_attentions_leaves_nothing():
    model = tiny("gpt2-cross", AutoModel)
    # Transformers puts its recording hooks on at the first call of this kind
    model(**batch_for(model), output_attentions=True)
    before = traces(model)
    patch_model(model)
    model(**batch_for(model), output_attentions=True)
    unpatch_model(model)
    assert traces(model) == before


def test_coverage_counts_modules_and_heads_and_prints():
    model = tiny("gpt2")
    assert str(coverage(model)) == "patched 0 of 2 attention modules (0 of 8 heads)"
    patch_model(model, heads={1: [0, 3]})
    report = coverage(model)
    assert report.patched == {"transformer.h.0.attn": 4, "transformer.h.1.attn": 2}
    assert report.softmax == ()
    assert report.total == LAYERS
    assert str(report) == "poly: patched 2 of 2 attention modules (6 of 8 heads), normalization l1"
    patch_model(model, "relu", layers=[-1])
    assert coverage(model).softmax == ("transformer.h.0.attn",)
    assert str(coverage(model)) == "relu: patched 1 of 2 attention modules (4 of 8 heads), normalization length"
    assert coverage(tiny("bert-cross")).total == 2 * LAYERS


def test_patching_says_what_it_did(caplog):
    model = tiny("llama")
    with caplog.at_level(logging.INFO, "hf_polyattn"):
        patch_model(model, calibrate=[batch_for(model)])
    assert "poly: patched 2 of 2 attention modules (8 of 8 heads), normalization length" in caplog.text
    assert "calibrated 2 attention modules on 1 batches" in caplog.text


def test_patching_is_audible_without_any_logging_set_up(capsys, monkeypatch):
    logger = logging.getLogger("hf_polyattn")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    patch_model(patch_model(tiny("gpt2")), degree=2)
    assert capsys.readouterr().err.count("patched 2 of 2 attention modules") == 2


def test_patching_anew_replaces_the_options():
    model = tiny("gpt2")
    patch_model(model, "poly", 5, learn_gain=True)
    disturb(model)
    patch_model(model, "monomial", degree=2, layers=[1])
    assert coverage(model).softmax == ("transformer.h.0.attn",)
    assert model.config.polyattn["degree"] == 2
    assert not [name for name, _ in model.named_parameters() if "polyattn" in name]
    once = tiny("gpt2")
    once.load_state_dict({k: v for k, v in model.state_dict().items() if "polyattn" not in k})
    patch_model(once, "monomial", degree=2, layers=[1])
    assert torch.equal(output(model), output(once))
    unpatch_model(model)
    assert type(model) is GPT2LMHeadModel


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".polyattn." in key}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-decoder"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"degree": 2, "learn_gain": True},
        {"init_coefficients": (0, 1, 0, 1), "normalization": "l2", "learn_affine": True},
        {"activation": "monomial"},
        {"heads": {0: [1, 3]}, "qk_norm": True},
    ],
    ids=str,
)
def test_another_backend_keeps_what_was_learned_and_measured(family, options, tmp_path):
    model = patched_tiny(family, poly=options)
    before, expected = state_of(model), output(model)
    model.save_pretrained(tmp_path)
    for source in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        patch_model(source, **options, backend="naive")
        assert source.config.polyattn["backend"] == "naive"
        assert all(torch.equal(before[key], tensor) for key, tensor in state_of(source).items())
        torch.testing.assert_close(output(source), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-decoder"])
@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"normalization": "l1", "learn_gain": True},
        {"degree": 2, "learn_affine": True},
        {"heads": {0: [1, 3]}},
        {"layers": [1]},
        {"activation": "monomial"},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_setting_the_backend_changes_nothing_else(family, options, tmp_path):
    model = patched_tiny(family, poly=options)
    before, expected, settings = state_of(model), output(model), dict(model.config.polyattn)
    shared = type(model)(model.config)
    assert set_backend(model, "naive") is model
    assert model.config.polyattn == {**settings, "backend": "naive"}
    assert shared.config.polyattn == settings
    for _, module in model.named_modules():
        if hasattr(module, "config") and not isinstance(module, PolyAttentionState):
            assert module.config is model.config
    assert all(state.config.backend == "naive" for state in states(model).values())
    assert state_of(model).keys() == before.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in state_of(model).items())
    torch.testing.assert_close(output(model), expected)
    model.save_pretrained(tmp_path)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    set_backend(model, "auto")
    assert torch.equal(output(model), expected)
    assert type(unpatch_model(model)).__name__ == type(tiny(family)).__name__


def test_the_backend_that_was_set_is_the_one_that_computes(monkeypatch):
    model = patched_tiny("gpt2", poly={"degree": 2})
    seen = set()
    choose = ops.choose_form
    monkeypatch.setattr(ops, "choose_form", lambda backend, call: seen.add(backend) or choose(backend, call))
    for backend in ("naive", "tiled", "recurrent", "auto"):
        seen.clear()
        output(set_backend(model, backend))
        assert seen == {backend}


def test_backends_that_cannot_be_set_are_refused():
    with pytest.raises(ValueError, match="is not patched: call patch_model first"):
        set_backend(tiny("gpt2"), "naive")
    with pytest.raises(TypeError, match="load one first"):
        set_backend("gpt2", "naive")
    model = patched_tiny("gpt2", poly={"activation": "relu"})
    before = model.config.to_dict()
    for backend, match in (("quick", "backend must be one of"), ("tiled", "the tiled form knows polynomials only")):
        with pytest.raises(ValueError, match=match):
            set_backend(model, backend)
    with pytest.raises(ValueError, match="the model is compiled"):
        set_backend(torch.compile(model), "naive")
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"degree": 5}, ()),
        ({"init_coefficients": (0, 1, 0, 1)}, ()),
        ({"activation": "monomial"}, ()),
        ({"coefficients": (0, 1, 0, 1)}, ()),
        ({"normalization": "l1"}, ("coefficients",)),
        ({"qk_norm": True}, ("coefficients",)),
        ({"alpha": 2.0}, ("coefficients", "beta", "gain")),
        ({"gain": 2.0}, ("coefficients", "beta", "alpha")),
        ({"learn_gain": True}, ("coefficients", "alpha", "beta", "gain")),
    ],
    ids=str,
)
def test_what_no_longer_means_the_same_starts_anew(change, kept):
    model = patched_tiny("gpt2")
    before = state_of(model)
    patch_model(model, **change)
    fresh = tiny("gpt2")
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".polyattn." not in k}, strict=False)
    fresh = state_of(patch_model(fresh, **change))
    for key, tensor in state_of(model).items():
        expected = before if key.rsplit(".", 1)[1] in kept else fresh
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"degree": 5}, "; was degree=3, normalization='length'; new: coefficients, alpha, gain"),
        ({"degree": 2}, "; was degree=3; new: coefficients, alpha, gain"),
        ({"normalization": "l1"}, "; was normalization='length'; kept: coefficients; new: alpha, gain"),
        ({"gain": 2.0}, "; was gain='auto'; kept: coefficients, alpha; new: gain"),
        ({"backend": "naive"}, "; was backend='auto'; kept: coefficients, alpha, gain"),
        ({"layers": [0]}, "; was layers=None; kept: coefficients, alpha, gain; gone: all numbers of 4 heads"),
        (
            {"coefficients": "monomial", "normalization": "length"},
            "; was coefficients='learnable'; new: alpha, gain; gone: coefficients",
        ),
        ({}, ""),
    ],
    ids=str,
)
def test_a_second_patch_says_what_became_of_the_numbers(options, said, caplog):
    model = patched_tiny("gpt2")
    with caplog.at_level(logging.INFO, "hf_polyattn"):
        caplog.clear()
        patch_model(model, **options)
    assert caplog.messages == [f"{coverage(model)}{said}"]


def test_a_second_patch_says_what_was_measured_anew(caplog):
    model = patched_tiny("gpt2")
    said_of = {"gain": "; kept: coefficients; new: alpha, gain", "coefficients": "; new: coefficients, alpha, gain"}
    for fit, said in said_of.items():
        with caplog.at_level(logging.INFO, "hf_polyattn"):
            patch_model(model, calibrate=[batch_for(model)], fit=fit)
        assert caplog.messages[-1] == f"{coverage(model)}{said}"


def test_calibration_of_a_patched_model_keeps_its_coefficients():
    model = patched_tiny("gpt2")
    before = state_of(model)
    patch_model(model, calibrate=[batch_for(model, seed=5)])
    for key, tensor in state_of(model).items():
        assert torch.equal(tensor, before[key]) == key.endswith(("coefficients", "beta")), key


def test_heads_that_stay_patched_keep_their_numbers():
    model = patched_tiny("gpt2", poly={"heads": {0: [1, 3]}})
    before = state_of(model)["transformer.h.0.attn.polyattn.coefficients"]
    patch_model(model, heads={0: [0, 3]})
    after = state_of(model)["transformer.h.0.attn.polyattn.coefficients"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    patch_model(model)
    assert torch.equal(state_of(model)["transformer.h.0.attn.polyattn.coefficients"][[0, 3]], after)


@pytest.mark.parametrize("options", [{"backend": "naive"}, {"calibrate": True, "fit": "coefficients"}], ids=str)
def test_an_optimizer_made_before_a_second_patch_trains_on(options):
    model = patch_model(tiny("gpt2"), learn_gain=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learned = [p for name, p in model.named_parameters() if ".polyattn." in name]
    learned[0].requires_grad_(False)
    if "calibrate" in options:
        options = {**options, "calibrate": [batch_for(model)]}
    patch_model(model, learn_gain=True, **options)
    now = [p for name, p in model.named_parameters() if ".polyattn." in name]
    assert all(one is other for one, other in zip(learned, now, strict=True))
    assert [p.requires_grad for p in now] == [False, True, True, True]
    before = state_of(model)
    model(**batch_for(model))[0].square().mean().backward()
    optimizer.step()
    moved = {key for key, tensor in state_of(model).items() if not torch.equal(tensor, before[key])}
    assert len(moved) == 3
    # of another shape it is another one
    patch_model(model, degree=2)
    assert next(iter(states(model).values())).coefficients.shape == (4, 3)


def test_a_second_patch_that_fails_leaves_the_parameters_and_their_numbers():
    model = patch_model(tiny("gpt2"))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    nan = {"inputs_embeds": torch.full((1, 4, 32), torch.nan, dtype=torch.float64)}
    refuses("not finite", model, calibrate=[batch_for(model), nan], fit="coefficients")
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_options_may_come_as_a_config():
    config = PolyAttentionConfig(degree=2, normalization="l1")
    model = patch_model(tiny("gpt2"), config=config)
    assert PolyAttentionConfig.from_dict(model.config.polyattn) == config
    assert patch_model(tiny("gpt2"), config=model.config.polyattn).config.polyattn == model.config.polyattn
    for extra in ({"degree": 3}, {"activation": "relu"}, {"normalization": "l2"}):
        refuses("not both", tiny("gpt2"), config=config, **extra)


def test_patched_context_gives_the_model_back_also_after_an_error():
    model = tiny("bert", AutoModelForMaskedLM)
    before, softmax = traces(model), output(model)
    with patched(model, "poly", degree=2) as inner:
        assert inner is model
        assert coverage(model).patched
    assert traces(model) == before
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert traces(model) == before
    assert torch.equal(output(model), softmax)
    patch_model(model)
    with pytest.raises(ValueError, match="patched already"), patched(model):
        pass


def test_original_implementation_comes_back():
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"), attn_implementation="eager")
    unpatch_model(patch_model(patch_model(model), degree=2))
    assert model.config._attn_implementation == "eager"


# what a patch leaves alone


def test_two_models_of_one_config_object_do_not_touch_each_other():
    config = tiny_config("gpt2")
    teacher, student = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    assert teacher.config is student.config
    student.load_state_dict(teacher.state_dict())
    before, softmax = traces(teacher), output(teacher.eval())
    patch_model(student.eval())
    assert traces(teacher) == before
    assert torch.equal(output(teacher), softmax)
    assert teacher.transformer.h[0].attn.config._attn_implementation == "sdpa"
    other = patch_model(GPT2LMHeadModel(config), "monomial", 2)
    assert student.config.polyattn["degree"] == 3
    assert other.config.polyattn["degree"] == 2
    unpatch_model(student)
    assert torch.equal(output(student), softmax)
    assert isinstance(other, hf_polyattn.models.PolyModelMixin)


def test_importing_adds_registry_entries_and_changes_nothing_else():
    code = """
import transformers, importlib
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
names = ["gpt2", "llama", "bert"]
modules = [importlib.import_module(f"transformers.models.{n}.modeling_{n}") for n in names]
modules += [transformers.modeling_utils, transformers.masking_utils, transformers.generation.utils]
def state():
    out = {}
    for module in modules:
        for name, value in vars(module).items():
            out[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                out.update({(module.__name__, name, k): id(v) for k, v in vars(value).items()})
    return out, dict(functions._global_mapping), dict(masks._global_mapping)
before = state()
import hf_polyattn
after = state()
assert before[0] == after[0]
for old, new in zip(before[1:], after[1:]):
    assert set(new) - set(old) == {"polyattn"}
    assert all(new[k] is old[k] for k in old)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_deep_copies_are_independent():
    model = patched_tiny("llama")
    model(**batch_for(model), output_attentions=True)
    copied = copy.deepcopy(model)
    expected = output(model)
    assert torch.equal(output(copied), expected)
    disturb(copied)
    assert not torch.allclose(output(copied), expected)
    assert torch.equal(output(model), expected)
    unpatch_model(copied)
    assert torch.equal(output(model), expected)


def test_failed_patch_leaves_a_stock_model_stock():
    model = tiny("gpt2")
    model.add_model_tags(["mine"])
    before, softmax = traces(model), output(model)
    refuses("no batch", model, calibrate=[])
    refuses("input_ids or inputs_embeds", model, calibrate=[{"nonsense": 1}])
    nan = {"inputs_embeds": torch.full((1, 4, 32), torch.nan, dtype=torch.float64)}
    refuses("not finite", model, calibrate=[nan])
    refuses("layers names", model, layers=[5])
    assert traces(model) == before
    assert torch.equal(output(model), softmax)


def test_failed_second_patch_keeps_the_first():
    model = patched_tiny("gpt2", poly={"degree": 5})
    before, expected, state = traces(model), output(model), copy.deepcopy(model.state_dict())
    nan = {"inputs_embeds": torch.full((1, 4, 32), torch.nan, dtype=torch.float64)}
    refuses("not finite", model, degree=2, calibrate=[nan])
    refuses("heads names layers", model, heads={7: [0]})
    assert traces(model) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(output(model), expected)
