"""What patch_model and its relatives refuse, each time with the reason."""

import pytest
import torch
from models import (
    batch_for,
    output,
    patched_tiny,
    tiny,
    tiny_config,
)
from patch_traces import refuses, traces
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    GPT2Model,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import hf_polyattn
from hf_polyattn import (
    PolyAttentionConfig,
    architectures,
    coverage,
    patch_model,
    unpatch_model,
    versions,
)

T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
QWEN2_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
QWEN2_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def registry(monkeypatch):
    """The entries of architectures; those that a test adds go with it."""
    entries = dict(architectures._REGISTRY)
    monkeypatch.setattr(architectures, "_REGISTRY", entries)
    return entries


def test_architectures_that_no_entry_would_help_are_refused_with_the_reason(registry):
    bloom = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=16))
    mamba = MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=16))
    t5 = T5ForConditionalGeneration(T5Config(**T5_SIZES))
    for model, match in (
        (bloom, "BloomForCausalLM computes its attention by itself"),
        (mamba, "MambaForCausalLM has no module .* nothing to patch"),
        (t5, "T5Attention of T5ForConditionalGeneration reads a copy of the model's configuration"),
    ):
        for function in (patch_model, coverage):
            with pytest.raises(ValueError, match=match) as caught:
                function(model)
            assert "register_architecture" not in str(caught.value)
    hf_polyattn.register_architecture("bloom", ["BloomAttention"])
    refuses("computes its attention by itself", bloom)
    # were it patched, its encoder and decoder would go on with softmax
    hf_polyattn.register_architecture("t5", ["T5Attention"], initial_spread=lambda module: 1.0)
    refuses("reads a copy of the model's configuration", t5)


def test_architectures_without_an_entry_are_refused_with_the_classes_of_the_model(registry):
    qwen = Qwen2Model(Qwen2Config(**QWEN2_SIZES))
    refuses(r"no entry for architecture 'qwen2'; .*register_architecture\('qwen2', \['Qwen2Attention'\]\)", qwen)
    # the layers around the attention are called so too
    refuses(r"register_architecture\('t5', \['T5Attention'\]\)", T5EncoderModel(T5Config(**T5_SIZES)))
    hf_polyattn.register_architecture("qwen2", ["Qwen2Attention"])
    assert coverage(patch_model(qwen)).total == 1


def test_a_field_that_the_configuration_lacks_is_named(registry, monkeypatch):
    model = T5EncoderModel(T5Config(**T5_SIZES))
    hf_polyattn.register_architecture("t5", ["T5Attention"])
    before = traces(model)
    refuses("T5Config has no field 'initializer_range'.* give register_architecture initial_spread=", model)
    assert traces(model) == before
    monkeypatch.setattr(T5Config, "attribute_map", {"hidden_size": "d_model", "head_dim": "d_kv"})
    refuses("T5Config has no field 'num_attention_heads'.* give register_architecture num_heads=", model)


def test_an_entry_that_misses_attention_classes_is_refused(monkeypatch):
    monkeypatch.setitem(architectures._REGISTRY, "bert", architectures.Architecture("bert", ("BertSelfAttention",)))
    refuses("does not cover .*crossattention", tiny("bert-cross"))
    monkeypatch.setitem(architectures._REGISTRY, "bert", architectures.Architecture("bert", ("Nothing",)))
    refuses("has no module of class Nothing", tiny("bert", AutoModel))


def test_things_that_are_no_transformers_model_are_refused():
    refuses("polynomial_attention", nn.Linear(2, 2), error=TypeError)
    with pytest.raises(TypeError):
        coverage(nn.Linear(2, 2))
    for thing in ("gpt2", tiny_config("gpt2"), GPT2LMHeadModel):
        for function in (patch_model, unpatch_model, coverage):
            with pytest.raises(TypeError, match="load one first, for example .*from_pretrained"):
                function(thing)
    refuses("got NoneType", None, error=TypeError)


def test_wrapped_and_compiled_models_are_refused(tmp_path):
    model = tiny("gpt2")
    refuses("compiled: patch or unpatch it first", torch.compile(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        refuses("DistributedDataParallel: patch or unpatch it first", wrapped)
        sharded = tiny("gpt2")
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(sharded.transformer.h[0], mesh=mesh)
        refuses("wrapped in FSDPGPT2Block: patch or unpatch it first", sharded)
    finally:
        torch.distributed.destroy_process_group()
    patch_model(model)
    for method in (unpatch_model, lambda m: patch_model(m, degree=2)):
        with pytest.raises(ValueError, match="compiled"):
            method(torch.compile(model))
    model.compile()
    refuses("compiled", model)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("layers is empty", {"layers": []}),
        ("layers names .2., but the model has 2", {"layers": [0, 2]}),
        ("layers names .-3.", {"layers": [-3]}),
        (r"heads\[1\] names .4., but that layer has 4 heads", {"heads": {1: [0, 4]}}),
        ("heads names layers .2.", {"heads": {2: [0]}}),
        ("heads names layers .0. that layers= leaves out", {"layers": [1], "heads": {0: [1]}}),
        ("unknown activation 'cubic'", {"activation": "cubic"}),
        ("degree must be an integer", {"degree": 0}),
        ("coefficients must be one of .*got None", {"coefficients": None}),
        ("coefficients must be numbers c_0", {"coefficients": ["a", 1]}),
        ("init_coefficients must be numbers c_0.*got 'taylor'", {"init_coefficients": "taylor"}),
        ("layers must be a list of integers .*got 0", {"layers": 0}),
        (r"heads\[0\] must be a list of integers .*got 0", {"heads": {0: 0}}),
        (r"heads must map layer indices .*got the layers \['all'\]", {"heads": {"all": [0]}}),
        (r"calibrate takes a list of batches .*calibrate=\[batch\], got 3", {"calibrate": 3}),
        ("unknown polyattn fields .'degre'", {"config": {"degre": 2}}),
        ("activation 'relu' has no degree", {"activation": "relu", "degree": 3}),
        ("activation 'softmax' has no degree", {"activation": "softmax", "degree": 2, "qk_norm": True}),
        ('"sum" needs weights of one sign', {"normalization": "sum"}),
        ('"sum" needs weights of one sign', {"config": PolyAttentionConfig(normalization="sum")}),
        ("relative to each row's maximum", {"activation": "softmax", "normalization": "length"}),
        ("the tiled form knows polynomials only", {"activation": "relu", "backend": "tiled"}),
    ],
)
def test_options_that_do_not_fit_are_refused(match, options):
    model = tiny("gpt2")
    before = traces(model)
    refuses(match, model, **options)
    assert traces(model) == before


def test_what_is_no_activation_or_no_config_is_refused_with_what_to_pass():
    for activation in (3, None, ["poly"]):
        refuses('activation must be a name such as "poly".* pass degree=3', tiny("gpt2"), activation, error=TypeError)
    refuses("config must be a PolyAttentionConfig or its dictionary, got int", tiny("gpt2"), config=2, error=TypeError)


def test_a_whole_config_without_a_degree_of_its_own_fits_any_activation():
    config = PolyAttentionConfig(activation="relu", coefficients="monomial", normalization="length")
    assert coverage(patch_model(tiny("gpt2"), config=config)).activation == "relu"


def test_a_misspelt_option_is_refused_with_the_nearest_one():
    model = tiny("gpt2")
    for name, near in (("degre", "degree"), ("normalisation", "normalization"), ("calibrat", "calibrate")):
        refuses(
            f"no option '{name}'; did you mean '{near}'.*The options are .*alpha, .*budget",
            model,
            error=TypeError,
            **{name: 3},
        )
    refuses("no option 'xyz'; The options are", model, xyz=1, error=TypeError)
    with pytest.raises(TypeError, match="did you mean 'layers'"):
        hf_polyattn.choose_heads(model, [batch_for(model)], layer=[0])
    assert type(model) is GPT2LMHeadModel


def test_unpatching_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="nothing to undo"):
        unpatch_model(tiny("gpt2"))


def test_versions_are_checked_before_anything_is_changed(monkeypatch):
    model = tiny("gpt2")
    monkeypatch.setitem(versions.SUPPORTED, "torch", versions.Range("99", "100", tested="99"))
    refuses('pip install "torch>=99,<100"', model, error=ImportError)


def test_asking_a_stock_model_for_polyattn_is_refused():
    model = tiny("gpt2")
    model.set_attn_implementation("polyattn")
    with pytest.raises(ValueError, match="never patched: call patch_model on a stock model, or load"):
        output(model)


def test_a_polynomial_checkpoint_in_a_stock_class_is_refused_with_the_class_that_loads_it(tmp_path):
    patched_tiny("gpt2").save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    before = traces(model)
    refuses("is polynomial, and GPT2LMHeadModel is not .* load it with AutoModelForCausalLM.from_pretrained", model)
    refuses("load it with AutoModel.from_pretrained", GPT2Model.from_pretrained(tmp_path), degree=2)
    with pytest.raises(
        ValueError, match="never patched: load a polynomial checkpoint through its Auto class, or call"
    ):
        output(model)
    assert traces(model) == before
    # what was unpatched, or never was polynomial, has no block
    patch_model(unpatch_model(AutoModelForCausalLM.from_pretrained(tmp_path)))
