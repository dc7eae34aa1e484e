"""Adapters of PEFT, put on after the patch and before it."""

import copy
import sys

import pytest
import torch
from models import LAYERS, batch_for, output, patched_tiny, same_bits, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_polyattn import coverage, patch_model, set_backend, unpatch_model
from hf_polyattn.lookups import add_peft_targets
from hf_polyattn.models import states
from hf_polyattn.state import PolyAttentionState

peft = pytest.importorskip("peft")

LORA = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **options})).eval()


@torch.no_grad()
def disturb_state(state):
    for tensor in state.state_dict().values():
        tensor.add_(0.1 * torch.randn_like(tensor))


@pytest.fixture
def saved(tmp_path):
    """Folder of a patched checkpoint in float32, and the model."""
    model = patched_tiny("gpt2", double=False)
    model.save_pretrained(tmp_path / "base")
    return tmp_path, model


def test_learned_state_trains_and_travels_with_the_adapter(saved):
    folder, base = saved
    before = output(base)
    model = lora(base, modules_to_save=["polyattn"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "polyattn" in name]
    assert len(trained) == 2
    assert all("modules_to_save" in name for name in trained)
    for state in states(model).values():
        disturb_state(state)
    expected = output(model)
    assert not torch.allclose(expected, before, atol=1e-4)
    with model.disable_adapter():
        frozen = output(model)
    model.save_pretrained(folder / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(folder / "base")
    reloaded = peft.PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    assert torch.allclose(output(reloaded), expected, atol=1e-6)
    with reloaded.disable_adapter():
        assert torch.allclose(output(reloaded), frozen, atol=1e-6)

    merged = reloaded.merge_and_unload()
    assert torch.allclose(output(merged), expected, atol=1e-5)
    assert coverage(merged).patched
    merged.save_pretrained(folder / "merged")
    assert same_bits(AutoModelForCausalLM.from_pretrained(folder / "merged"), merged)
    unpatch_model(merged)


def test_without_modules_to_save_the_state_is_frozen_and_the_forward_the_same():
    base = patched_tiny("llama")
    before = output(base)
    model = lora(base, init_lora_weights=True)
    assert torch.equal(output(model), before)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "polyattn" in name]


def test_weights_are_returned_from_under_an_adapter():
    model = lora(patched_tiny("gpt2"), modules_to_save=["polyattn"])
    assert len(model(**batch_for(model), output_attentions=True).attentions) == 2


def test_patching_an_adapted_model_works_when_nothing_is_learned(tmp_path):
    softmax, other = (lora(tiny("gpt2", double=False)) for _ in range(2))
    other.load_state_dict(softmax.state_dict())
    assert patch_model(softmax, "monomial", alpha=1.0) is softmax
    assert coverage(softmax).total == 2
    expected = output(softmax)
    assert not torch.allclose(expected, output(other), atol=1e-4)

    softmax.save_pretrained(tmp_path)
    assert not [key for key in peft.get_peft_model_state_dict(softmax) if "polyattn" in key]
    base = tiny("gpt2", double=False)
    base.load_state_dict(other.unload().state_dict())
    patch_model(base, "monomial", alpha=1.0)
    assert torch.allclose(output(peft.PeftModel.from_pretrained(base, tmp_path).eval()), expected, atol=1e-6)

    merged = softmax.merge_and_unload()
    assert torch.allclose(output(merged), expected, atol=1e-5)
    assert coverage(merged).patched


def test_patching_an_adapted_model_is_refused_when_something_would_be_lost():
    model = lora(tiny("gpt2"))
    keys = list(model.state_dict())
    for options in ({}, {"activation": "monomial", "learn_gain": True}, {"activation": "relu", "learn_affine": True}):
        with pytest.raises(ValueError, match='get_peft_model with modules_to_save=."polyattn".'):
            patch_model(model, **options)
    assert list(model.state_dict()) == keys
    inner = tiny("gpt2")
    inner.add_adapter(peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match="modules_to_save"):
        patch_model(inner)


def test_an_adapter_that_trains_the_state_is_to_be_merged_before_unpatching():
    model = lora(patched_tiny("gpt2"), modules_to_save=["polyattn"])
    for change in (unpatch_model, lambda m: patch_model(m, "monomial")):
        with pytest.raises(ValueError, match="merge or unload the adapter first"):
            change(model)
    assert len(states(model)) == 2


def test_the_backend_is_set_under_an_adapter_too(saved):
    folder, base = saved
    model = lora(base, modules_to_save=["polyattn"])
    for state in states(model).values():
        disturb_state(state)
    expected = output(model)
    with model.disable_adapter():
        frozen = output(model)
    assert set_backend(model, "naive") is model
    assert model.config.polyattn["backend"] == model.get_base_model().config.polyattn["backend"] == "naive"
    assert torch.allclose(output(model), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(output(model), frozen, atol=1e-5)
    assert {module.config.backend for module in model.modules() if isinstance(module, PolyAttentionState)} == {"naive"}
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    assert merged.config.polyattn["backend"] == "naive"
    assert torch.allclose(output(merged), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["poly", "monomial"])
def test_an_adapter_never_names_the_stock_checkpoint_as_its_base(tmp_path, activation):
    tiny("gpt2", double=False).save_pretrained(tmp_path / "stock")
    model = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), activation)
    lora(copy.deepcopy(model)).save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path is None
    assert unpatch_model(model).name_or_path == str(tmp_path / "stock")


def test_an_adapter_finds_its_polynomial_base(saved):
    folder, _ = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = lora(base, task_type="CAUSAL_LM", modules_to_save=["polyattn"])
    model.save_pretrained(folder / "adapter")
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert coverage(reloaded).patched
    assert torch.allclose(output(reloaded), output(model), atol=1e-6)


def test_an_adapter_of_an_unpatched_model_does_not_name_the_polynomial_folder(saved):
    model = unpatch_model(AutoModelForCausalLM.from_pretrained(saved[0] / "base"))
    assert model.name_or_path == ""
    lora(model).save_pretrained(saved[0] / "adapter")
    assert not peft.PeftConfig.from_pretrained(saved[0] / "adapter").base_model_name_or_path


def test_default_targets_are_those_of_the_stock_architecture():
    for family in ("gpt2", "llama", "bert"):
        names = [
            [
                name
                for name, _ in peft.get_peft_model(model, peft.LoraConfig()).named_modules()
                if name.endswith("lora_A")
            ]
            for model in (tiny(family), patch_model(tiny(family)))
        ]
        assert names[0] == names[1] != []


def test_peft_is_not_imported_for_its_tables(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft.utils.constants")
    add_peft_targets("polyattn_gpt2", "gpt2")
    assert "peft.utils.constants" not in sys.modules


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj"}),
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("bert", {"query", "key", "value", "output.dense"}),
        # registered from outside: nothing else says where its layers are
        ("mistral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_adapters_go_to_the_linear_layers_of_attention(family, layers):
    from hf_polyattn.training.lora import attention_projections

    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model = patch_model(tiny(family, auto), degree=2)
    found = attention_projections(model)
    assert {next(end for end in layers if name.endswith(end)) for name in found} == layers
    assert len(found) == LAYERS * len(layers)
    assert not any("mlp" in name or "intermediate" in name for name in found)
