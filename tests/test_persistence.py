"""Saved and loaded again, a polynomial model is what it was, or nothing loads."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from models import (
    ALL_AUTO_CLASSES,
    AUTO_CLASSES,
    batch_for,
    disturb,
    output,
    patched_tiny,
    same_bits,
    tiny,
    tiny_config,
    token_ids,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
)

import hf_polyattn
from hf_polyattn import PolyAttentionConfig, calibrate_gain, patch_model, unpatch_model
from hf_polyattn.activations import default_start
from hf_polyattn.models import PolyModelMixin, read_settings, states

RECIPES = {
    "learned": {"degree": 3},
    "all-learned": {"degree": 4, "learn_gain": True, "learn_affine": True, "normalization": "l1", "qk_norm": True},
    "fixed": {"coefficients": (0.1, 0.5, 0.0, 0.2), "normalization": 14},
    "monomial": {"activation": "monomial", "degree": 3},
    "part": {"layers": (-1,), "heads": {1: (0, 2)}},
}


def saved(folder, family="gpt2", auto=AutoModelForCausalLM, recipe="learned", **options):
    model = patched_tiny(family, auto, poly=RECIPES[recipe], double=False)
    model.save_pretrained(folder, **options)
    return model


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def without_state(folder):
    """Takes every tensor of the patch out of a checkpoint."""
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "polyattn" not in k}, path, {"format": "pt"})


def same_state(one, other):
    one, other = states(one), states(other)
    assert len(one) == len(other) > 0
    assert all(a.endswith(b) or b.endswith(a) for a, b in zip(one, other, strict=True))
    for a, b in zip(one.values(), other.values(), strict=True):
        for mine, theirs in ((a.named_parameters(), b.named_parameters()), (a.named_buffers(), b.named_buffers())):
            mine, theirs = dict(mine), dict(theirs)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


# reload


@pytest.mark.parametrize("recipe", ["learned", "monomial"])
@pytest.mark.parametrize(("family", "auto"), ALL_AUTO_CLASSES, ids=lambda x: getattr(x, "__name__", x))
def test_every_auto_class_reloads_bit_equal(tmp_path, family, auto, recipe):
    model = saved(tmp_path, family, auto, recipe)
    reloaded = auto.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert read_settings(reloaded.config) == read_settings(model.config)
    same_state(model, reloaded)
    assert same_bits(reloaded, model)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    if model.get_output_embeddings() is not None and family != "llama":
        assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_kind_of_state_reloads_bit_equal_from_shards(tmp_path, family, recipe):
    model = saved(tmp_path, family, recipe=recipe, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(model, reloaded)
    assert same_bits(reloaded, model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-cross"])
@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}]
)
def test_ways_of_loading(tmp_path, family, options, deterministic):
    model = saved(tmp_path, family, recipe="all-learned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    dtype = options.get("dtype", torch.float32)
    assert {p.dtype for p in reloaded.parameters()} == {dtype}
    same_state(copy.deepcopy(model).to(dtype), reloaded)
    # rotary tables stay float32 in both
    expected = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    expected.load_state_dict(model.state_dict())
    assert same_bits(reloaded, expected)


def test_second_generation_and_training_in_between(tmp_path):
    saved(tmp_path / "first", "bert", AutoModelForMaskedLM)
    second = AutoModelForMaskedLM.from_pretrained(tmp_path / "first")
    optimizer = torch.optim.SGD(second.parameters(), 0.1)
    second(token_ids(), labels=token_ids(seed=1)).loss.backward()
    before = copy.deepcopy(second)
    optimizer.step()
    assert all(
        not torch.equal(a.coefficients, b.coefficients)
        for a, b in zip(states(before).values(), states(second).values(), strict=True)
    )
    second.save_pretrained(tmp_path / "second")
    third = AutoModelForMaskedLM.from_pretrained(tmp_path / "second")
    same_state(second, third)
    assert same_bits(third, second.eval())
    assert json.loads((tmp_path / "second" / "config.json").read_text())["architectures"] == ["PolyBertForMaskedLM"]


def test_calibrated_numbers_survive(tmp_path):
    model = patch_model(tiny("gpt2", double=False), "monomial", gain="auto", alpha="auto")
    default = copy.deepcopy(model)
    calibrate_gain(model, [token_ids()])
    assert not torch.equal(states(default)["transformer.h.0.attn"].alpha, states(model)["transformer.h.0.attn"].alpha)
    model.save_pretrained(tmp_path)
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_from_config_builds_a_fresh_polynomial_model():
    model = patched_tiny("llama", poly={"degree": 5})
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    assert states(fresh)["model.layers.0.self_attn"].coefficients.shape == (4, 6)
    assert output(fresh).isfinite().all()
    by_class = hf_polyattn.models.PolyLlamaForCausalLM(copy.deepcopy(model.config))
    assert states(by_class).keys() == states(fresh).keys()


def test_from_pretrained_with_a_config_object(tmp_path):
    model = saved(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path, config=config), model)
    config.polyattn = {**config.polyattn, "normalization": "length"}
    other = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert read_settings(other.config).normalization == "length"


# between heads and bodies


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_inner_models_load_from_outer_checkpoints_and_back(tmp_path, family, deterministic):
    body, head = AUTO_CLASSES[family][:2]
    model = saved(tmp_path / "head", family, head)
    inner = body.from_pretrained(tmp_path / "head")
    same_state(inner, model)
    model.base_model.save_pretrained(tmp_path / "body")
    assert same_bits(body.from_pretrained(tmp_path / "body"), model.base_model)
    same_state(head.from_pretrained(tmp_path / "body"), model)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", num_labels=3)
    same_state(classifier, model)
    logits = output(classifier)
    assert logits.shape[-1] == 3
    assert logits.isfinite().all()


def test_number_of_labels_may_change(tmp_path):
    model = saved(tmp_path, "bert", AutoModelForSequenceClassification)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    same_state(other, model)
    assert output(other).shape[-1] == 5


# what is missing


@pytest.mark.parametrize("source", ["head", "body"])
@pytest.mark.parametrize(
    ("family", "auto"), [(f, auto) for f in ("gpt2", "llama", "bert", "vit") for auto in AUTO_CLASSES[f][:3]]
)
def test_missing_state_takes_the_documented_start(tmp_path, family, auto, source, deterministic):
    model = saved(tmp_path, family, AUTO_CLASSES[family][source == "head"], "all-learned")
    without_state(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert output(reloaded).isfinite().all()
    for state in states(reloaded).values():
        start = torch.tensor(default_start(4))
        assert torch.equal(state.coefficients, start.expand(4, -1))
        # with QK-norm the score spread is 1
        assert torch.allclose(state.alpha, torch.ones(4))
        assert torch.equal(state.beta, torch.zeros(4))
        assert torch.equal(state.gain, torch.ones(4))
    assert model.num_parameters() > 0


def test_one_missing_tensor_does_not_reset_the_others(tmp_path, deterministic):
    model = saved(tmp_path, recipe="all-learned")
    path = tmp_path / "model.safetensors"
    lost = "transformer.h.0.attn.polyattn.gain"
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path, {"format": "pt"})
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = {**model.state_dict(), lost: torch.ones(4)}
    assert all(torch.equal(v, expected[k]) for k, v in reloaded.state_dict().items())


def test_config_without_its_block_is_refused(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, lambda values: values.pop("polyattn"))
    with pytest.raises(ValueError, match="needs its `polyattn` block"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sharpness": 2}, "unknown polyattn fields .'sharpness'.*newer hf_polyattn"),
        ({"degree": 99}, "degree must be an integer from 1 to 16, got 99"),
        ({"activation": "cubic"}, "unknown activation 'cubic'"),
        ({"normalization": "sum"}, "weights of one sign"),
    ],
)
def test_block_that_cannot_be_honoured_is_refused(tmp_path, change, match):
    saved(tmp_path)
    edit_config(tmp_path, lambda values: values["polyattn"].update(change))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_state_of_another_shape_is_refused(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, lambda values: values["polyattn"].update(degree=5))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# other attention implementations


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention", "paged|eager"])
def test_other_implementations_are_refused(tmp_path, implementation):
    model = saved(tmp_path)
    match = f"attn_implementation='{implementation}' contradicts.*unpatch_model".replace("|", r"\|")
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation=implementation)
    for part in (model, model.transformer):
        with pytest.raises(ValueError, match=match):
            part.set_attn_implementation(implementation)
    expected = output(model)
    model.set_attn_implementation("polyattn")
    assert torch.equal(output(model), expected)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="polyattn"), model)


def test_output_attentions_in_the_config_stays_loud(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)


def test_stock_class_does_not_run_our_checkpoint_as_softmax(tmp_path):
    saved(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never patched.*through its Auto class"):
        output(model)


def test_process_without_the_plugin_refuses_and_unpickling_brings_it_in(tmp_path):
    model = saved(tmp_path, recipe="all-learned")
    expected = tmp_path / "logits.safetensors"
    save_file({"logits": output(AutoModelForCausalLM.from_pretrained(tmp_path))}, expected)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(model.config))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
import copy, pickle, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel
folder = Path({str(tmp_path)!r})
unknown, unregistered = "trust_remote_code=True", 'attn_implementation="polyattn"'
for load, words in ((AutoConfig, unknown), (AutoModel, unknown), (AutoModelForCausalLM, unknown),
                    (GPT2LMHeadModel, unregistered)):
    try:
        load.from_pretrained(folder)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"{{load}} did not refuse")
assert "hf_polyattn" not in sys.modules
model = pickle.loads((folder / "model.pickle").read_bytes())
config = pickle.loads((folder / "config.pickle").read_bytes())
assert type(AutoModelForCausalLM.from_config(copy.deepcopy(config))) is type(model)
assert "hf_polyattn" in sys.modules
assert config == model.config and config.polyattn["degree"] == 4
torch.set_num_threads(1)
reloaded = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.tensor({token_ids().tolist()})
assert torch.equal(reloaded(ids)[0], load_file({str(expected)!r})["logits"])
assert torch.allclose(model(ids)[0], reloaded(ids)[0], atol=1e-6)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# other things that travel


def test_unpatched_again_it_saves_as_stock(tmp_path):
    saved(tmp_path / "poly")
    model = unpatch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "poly"))
    assert model.config.architectures == ["GPT2LMHeadModel"]
    model.save_pretrained(tmp_path / "stock")
    values = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert not {"polyattn", "attn_implementation"} & set(values)
    assert "polyattn" not in "".join(load_file(tmp_path / "stock" / "model.safetensors"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(reloaded) is GPT2LMHeadModel
    assert same_bits(reloaded, model)


def test_config_travels_through_pickle_dict_and_json(tmp_path):
    config = patched_tiny("bert", AutoModel, poly=RECIPES["part"]).config
    for copied in (pickle.loads(pickle.dumps(config)), type(config)(**config.to_dict()), copy.deepcopy(config)):
        assert copied.to_dict() == config.to_dict()
        assert read_settings(copied) == PolyAttentionConfig(normalization="length", **RECIPES["part"])
    config.save_pretrained(tmp_path)
    assert read_settings(AutoConfig.from_pretrained(tmp_path)) == read_settings(config)
    assert AutoConfig.for_model("polyattn_bert", polyattn=config.polyattn).polyattn == config.polyattn


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_tokenizer_is_found_beside_the_model(tmp_path, family):
    """With the files of old checkpoints, which name no tokenizer class, and with those that are written today."""
    auto, expected = {"gpt2": (AutoModelForCausalLM, GPT2Tokenizer), "bert": (AutoModelForMaskedLM, BertTokenizer)}[
        family
    ]
    saved(tmp_path / "poly", family, auto)
    tiny(family, auto).save_pretrained(tmp_path / "stock")
    for folder in ("poly", "stock"):
        if family == "gpt2":
            (tmp_path / folder / "vocab.json").write_text(json.dumps({"h": 0, "i": 1, "hi": 2, "<|endoftext|>": 3}))
            (tmp_path / folder / "merges.txt").write_text("#version: 0.2\nh i\n")
        else:
            (tmp_path / folder / "vocab.txt").write_text(
                "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hi"])
            )
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("poly", "stock"))
    assert type(ours) is type(theirs) is expected
    assert ours("hi").input_ids == theirs("hi").input_ids
    ours.save_pretrained(tmp_path / "poly")
    again = AutoTokenizer.from_pretrained(tmp_path / "poly")
    assert type(again) is expected
    assert again("hi").input_ids == ours("hi").input_ids


def test_saving_and_pushing_are_those_of_transformers():
    for method in ("save_pretrained", "push_to_hub", "from_pretrained", "from_config", "_from_config"):
        assert not hasattr(PolyModelMixin, method)
    assert issubclass(hf_polyattn.models.PolyGPT2LMHeadModel, PreTrainedModel)
    with pytest.raises(AttributeError, match="PolyNothing"):
        _ = hf_polyattn.models.PolyNothing


def test_half_precision_state_follows_the_model(tmp_path):
    model = disturb(patch_model(AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)))
    assert {t.dtype for s in states(model).values() for t in s.state_dict().values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)
    assert all(x.isfinite().all() for x in (output(model), output(model.float(), **batch_for(model))))


def test_a_patched_checkpoint_knows_its_model_type_before_it_is_saved(tmp_path):
    """A configuration that was loaded carries model_type in itself, over that of its class."""
    tiny("gpt2").save_pretrained(tmp_path)
    model = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model.config.model_type == "polyattn_gpt2"
    assert unpatch_model(model).config.model_type == "gpt2"
