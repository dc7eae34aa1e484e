"""Polynomial models inside the rest of Transformers: attention maps, compile, checkpointing, pipelines, Trainer."""

import copy
import json
import logging

import pytest
import torch
from accelerate import dispatch_model
from models import (
    HEADS,
    IMAGE,
    LAYERS,
    VOCAB,
    WIDTH,
    batch_for,
    disturb,
    output,
    patched_tiny,
    scale_attention,
    tiny,
    tiny_config,
    token_ids,
)
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from hf_polyattn import patch_model, unpatch_model
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.models import states
from hf_polyattn.training.optimization import adamw
from hf_polyattn_arguments import OptimizationArguments

FAMILIES = [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)]
CROSS = [("gpt2-cross", AutoModelForCausalLM), ("bert-cross", AutoModelForCausalLM)]


# attention maps


@pytest.mark.parametrize(("family", "auto"), [*FAMILIES, *CROSS, ("vit", AutoModelForImageClassification)])
@pytest.mark.parametrize("poly", [{}, {"layers": (0,)}, {"heads": {0: (1,)}}, {"activation": "relu"}], ids=str)
def test_attention_maps_are_the_weights_that_made_the_output(family, auto, poly):
    model = patched_tiny(family, auto, poly=poly)
    inputs = batch_for(model)
    seen = []

    def record(module, query, key, value, mask, **kwargs):
        out, weights = polyattn_attention(module, query, key, value, mask, **kwargs)
        seen.append((out, weights, value))
        return out, weights

    registry = AttentionInterface._global_mapping
    plain = model(**inputs)
    registry["polyattn"] = record
    try:
        out = model(**inputs, output_attentions=True)
    finally:
        registry["polyattn"] = polyattn_attention
    assert torch.allclose(out[0], plain[0], rtol=1e-9, atol=1e-10)
    assert plain.attentions is None
    maps = list(out.attentions)
    assert len(maps) == LAYERS
    length = 10 if family == "vit" else 9
    assert all(m.shape == (2, HEADS, length, length) for m in maps)
    if "cross" in family:
        assert [tuple(m.shape) for m in out.cross_attentions] == [(2, HEADS, 9, 5)] * LAYERS
        maps = [m for pair in zip(maps, out.cross_attentions, strict=True) for m in pair]
    assert len(maps) == len(seen)
    for shown, (made, weights, value) in zip(maps, seen, strict=True):
        assert shown is weights
        value = value.repeat_interleave(HEADS // value.shape[1], 1)
        assert torch.allclose((shown @ value).transpose(1, 2), made, rtol=1e-9, atol=1e-10)
        if shown.shape[-1] == 9 and family not in ("bert", "vit"):
            assert (shown.triu(1) == 0).all()
    assert model(**inputs).attentions is None


def test_attention_maps_while_generating():
    model = patched_tiny("gpt2")
    out = model.generate(
        token_ids(1, 4), max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape[-1] for step in out.attentions] == [4, 5, 6]


def test_attention_maps_of_an_inner_model_called_by_itself():
    model = patched_tiny("gpt2")
    ids = token_ids()
    for asked in (True, False, True):
        for part in (model, model.transformer):
            attentions = part(ids, output_attentions=asked).attentions
            assert (len(attentions) == LAYERS) if asked else attentions is None


# training


@pytest.mark.parametrize(("family", "auto"), [*FAMILIES, ("gpt2-cross", AutoModelForCausalLM)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("output_attentions", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, auto, reentrant, output_attentions):
    model = patched_tiny(family, auto, poly={"learn_gain": True, "learn_affine": True})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    inputs, gradients = batch_for(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(**inputs, use_cache=False, output_attentions=output_attentions)[0].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("polyattn" in name for name in gradients[0]) == 4 * len(states(model))
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("poly", [{}, {"backend": "naive"}, {"heads": {0: (1,)}}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0, "embd_pdrop": 0}),
        ("llama", {"attention_dropout": 0.5}),
        ("bert-decoder", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0}),
    ],
    ids=["gpt2", "llama", "bert"],
)
def test_attention_dropout_acts_in_training_only(family, options, poly):
    model = patched_tiny(family, poly=poly, **options)
    quiet = output(model)
    assert torch.equal(output(model), quiet)
    model.train()
    assert not torch.allclose(output(model), output(model))


def test_dropout_drops_half_of_the_weights_and_doubles_the_others():
    module = patched_tiny("gpt2", poly={"heads": {0: (1,)}}).transformer.h[0].attn
    q, k, v = torch.randn(3, 50, HEADS, 9, 8, dtype=torch.float64)
    values = torch.eye(9, dtype=torch.float64).expand(50, HEADS, 9, 9)
    for wanted in (False, True):
        # with these values the output is the weights
        kept, dropped = (
            polyattn_attention(module, q, k, values, None, dropout=p, output_attentions=wanted)[0].transpose(1, 2)
            for p in (0.0, 0.5)
        )
        zero = (dropped == 0)[..., torch.ones(9, 9, dtype=torch.bool).tril()]
        assert zero.float().mean((0, 2)).sub(0.5).abs().max() < 0.05
        assert torch.allclose(dropped[dropped != 0], 2 * kept[dropped != 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_hooks_of_accelerate_take_no_attention_maps_away(family):
    """They replace the forward of the instance, as device_map and accelerator.prepare do."""
    model = dispatch_model(tiny(family, AutoModel), {"": "cpu"}, force_hooks=True)
    for activation in ("softmax", "poly"):
        patch_model(model, activation)
        maps = model(token_ids(), output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in maps] == [(2, HEADS, 9, 9)] * 2
    assert not model(token_ids()).attentions
    copied = copy.deepcopy(model)
    unpatch_model(model)
    assert not model.base_model._forward_pre_hooks
    assert copied(token_ids(), output_attentions=True).attentions[0].shape == (2, HEADS, 9, 9)
    unpatch_model(copied)
    assert not copied.base_model._forward_pre_hooks


def test_losses_are_those_of_the_stock_class():
    for family, auto in FAMILIES:
        model = patch_model(tiny(family, auto), "softmax")
        stock = tiny(family, auto)
        stock.load_state_dict(model.state_dict(), strict=False)
        ids = token_ids()
        one, other = (m(ids, labels=ids).loss for m in (model, stock))
        assert torch.allclose(one, other)


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_bfloat16_error_of_a_model_stays_within_four_times_that_of_softmax(tmp_path, family, auto):
    """Signed weights do not average rounding out as softmax does: up to 3.2 times its error was measured."""
    errors = {}
    for activation in ("softmax", "poly"):
        model = scale_attention(auto.from_config(tiny_config(family)), 8).eval()
        patch_model(model, activation, calibrate=None if activation == "softmax" else [token_ids()])
        model.save_pretrained(tmp_path / activation)
        exact = output(model.double(), input_ids=token_ids(4, 12))
        half = auto.from_pretrained(tmp_path / activation, dtype=torch.bfloat16).eval()
        logits = output(half, input_ids=token_ids(4, 12))
        assert logits.dtype == torch.bfloat16
        errors[activation] = ((logits.double() - exact).norm() / exact.norm()).item()
    assert errors["poly"] <= 4 * errors["softmax"] < 0.1


def test_float16_overflow_names_the_layer():
    model = patch_model(tiny("gpt2", double=False, factor=1.0), "monomial", gain=60000.0).half()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.fill_(1.0)
        model.transformer.h[1].attn.c_attn.bias.fill_(5.0)
    with pytest.raises(OverflowError, match="GPT2Attention of layer 1: .*float16"):
        output(model)


def test_powers_of_alpha_do_not_overflow_float16():
    """alpha^5 leaves float16's range at alpha = 9.2, while alpha itself and the weights are small."""
    model = patch_model(tiny("gpt2", double=False), "monomial", degree=5, alpha=20.0, gain=0.001)
    module = model.transformer.h[0].attn
    q, k, v = 0.3 * torch.randn(3, 1, HEADS, 6, 8)
    expected, _ = polyattn_attention(module, q, k, v, None)
    out, _ = polyattn_attention(module.half(), q.half(), k.half(), v.half(), None)
    assert torch.allclose(out.float(), expected, rtol=0.05, atol=0.01)


# what cannot be honoured


@pytest.mark.parametrize("argument", ["s_aux", "cache", "block_mask", "head_mask"])
def test_arguments_that_change_the_result_are_refused(argument):
    module = patched_tiny("llama").model.layers[0].self_attn
    q, k = torch.randn(1, HEADS, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"cannot honour {argument} .*unpatch_model"):
        polyattn_attention(module, q, k, k, None, **{argument: torch.ones(HEADS)})
    polyattn_attention(module, q, k, k, None, **{argument: None})


def test_head_mask_of_a_model_call_is_refused():
    model = patched_tiny("llama")
    with pytest.raises(ValueError, match="cannot honour head_mask"):
        model(token_ids(), head_mask=torch.ones(LAYERS, HEADS))


def test_queries_at_unknown_positions_are_refused():
    module = patched_tiny("llama").model.layers[0].self_attn
    q, k = torch.randn(1, HEADS, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="3 queries against 5 keys"):
        polyattn_attention(module, q, k, k, None)
    # one query at the end may see all of them
    polyattn_attention(module, q[:, :, :1], k, k, None)


@pytest.mark.parametrize("softmax", [False, True])
def test_position_bias_softcap_and_window_are_honoured(softmax):
    model = patched_tiny("gpt2", poly={"layers": (0,)})
    module = model.transformer.h[int(softmax)].attn
    q, k, v = torch.randn(3, 2, HEADS, 6, 8, dtype=torch.float64)
    bias = torch.randn(1, HEADS, 6, 6, dtype=torch.float64)
    options = {"position_bias": bias, "softcap": 0.7, "sliding_window": 3, "scaling": 0.5}
    out, _ = polyattn_attention(module, q, k, v, None, **options)
    scores = 0.7 * torch.tanh(0.5 * q @ k.transpose(-1, -2) / 0.7) + bias
    rows, columns = torch.arange(6)[:, None], torch.arange(6)
    keep = (columns <= rows) & (rows - columns < 3)
    if softmax:
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    else:
        state = module.polyattn
        scores = state.alpha.view(-1, 1, 1) * scores + state.beta.view(-1, 1, 1)
        powers = torch.stack([scores**n for n in range(4)], -1)
        weights = torch.einsum("bhijn,hn->bhij", powers, state.coefficients) * state.gain.view(-1, 1, 1)
        weights = (weights / keep.sum(-1, keepdim=True)).masked_fill(~keep, 0)
    assert torch.allclose(out.transpose(1, 2), weights @ v, rtol=1e-9, atol=1e-10)
    # the same with the mask spelt out, in which the window is contained
    masked, _ = polyattn_attention(module, q, k, v, keep[None, None], **{**options, "sliding_window": 1})
    assert torch.allclose(masked, out, rtol=1e-9, atol=1e-10)


def test_continuous_batching_is_refused():
    model = patched_tiny("llama", double=False)
    assert not model._supports_flash_attn
    with pytest.raises(ValueError, match="polyattn is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    assert model.config._attn_implementation == "polyattn"


# pipelines and Trainer


@pytest.fixture
def quiet_transformers(caplog):
    """Fails when Transformers has complained: pipelines only log that they do not know a model."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def gpt2_tokenizer(folder):
    letters = [chr(97 + i) for i in range(26)] + ["Ġ", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: i + 2 for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return GPT2Tokenizer.from_pretrained(folder)


def bert_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]))
    return BertTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("task", "family", "auto", "text"),
    [
        ("text-generation", "gpt2", AutoModelForCausalLM, "abc"),
        ("fill-mask", "bert", AutoModelForMaskedLM, "one [MASK] three"),
        ("text-classification", "bert", AutoModelForSequenceClassification, "one two"),
        ("text-classification", "gpt2", AutoModelForSequenceClassification, "abc"),
        ("text-generation", "llama", AutoModelForCausalLM, "abc"),
        ("token-classification", "bert", AutoModelForTokenClassification, "one two"),
        ("feature-extraction", "bert", AutoModel, "one"),
    ],
)
def test_pipelines_run_on_a_saved_folder(tmp_path, quiet_transformers, task, family, auto, text):
    tokenizer = (bert_tokenizer if family == "bert" else gpt2_tokenizer)(tmp_path)
    model = disturb(patch_model(tiny(family, auto, double=False, vocab_size=len(tokenizer) + 2)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    run = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(run.model) is type(model)
    (result, *_) = run(text, **options)
    if task == "text-generation":
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert result["generated_text"] == tokenizer.decode(expected[0])
    elif task == "token-classification":
        logits = output(model, **tokenizer(text, return_tensors="pt"))
        assert result["score"] == pytest.approx(logits.softmax(-1)[0, 1].max().item(), rel=1e-4)
    elif task == "text-classification":
        logits = output(model, **tokenizer(text, return_tensors="pt"))
        assert result["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)


def test_pipeline_of_images_runs_on_a_saved_folder(tmp_path, quiet_transformers):
    image = pytest.importorskip("PIL.Image").new("RGB", (9, 7), "orange")
    model = disturb(patch_model(tiny("vit", AutoModelForImageClassification, double=False, num_channels=3)))
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    processor.save_pretrained(tmp_path)
    run = pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert type(run.model) is type(model)
    logits = output(model, **processor(image, return_tensors="pt"))
    assert run(image)[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)


def trainer(folder, model, optimizer=None, **options):
    data = [{"input_ids": row, "labels": row} for row in token_ids(16, 8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(tmp_path):
    def start():
        torch.manual_seed(0)
        return patch_model(tiny("gpt2", double=False), learn_gain=True)

    straight = trainer(tmp_path / "straight", start())
    before = {k: v.clone() for k, v in straight.model.state_dict().items() if "polyattn" in k}
    straight.train()
    moved = [k for k, v in straight.model.state_dict().items() if "polyattn" in k and not torch.equal(v, before[k])]
    assert len(moved) == 2 * LAYERS
    resumed = trainer(tmp_path / "resumed", start())
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for name, tensor in straight.model.state_dict().items():
        assert torch.allclose(tensor, resumed.model.state_dict()[name], atol=1e-6), name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "checkpoint-4")
    assert torch.allclose(output(reloaded), output(straight.model.eval()), atol=1e-6)


def test_trainer_with_the_optimizer_of_the_recipes_does_not_decay_the_learned_state(tmp_path):
    model = patch_model(tiny("gpt2", double=False), learn_gain=True)
    for parameter in model.parameters():
        # no gradient: what moves is decayed
        parameter.register_hook(torch.zeros_like)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = OptimizationArguments(learning_rate=1e-3, weight_decay=0.5, polyattn_learning_rate_multiplier=3.0)
    optimizer = adamw(model, settings)
    trainer(tmp_path, model, optimizer).train()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and ".polyattn." not in name
        assert torch.equal(parameter, before[name]) != is_matrix, name
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"decay": 1e-3, "plain": 1e-3, "polyattn": 3e-3})


def test_trainer_shifts_labels_for_label_smoothing(tmp_path):
    """Trainer looks the class name up among the causal models; an unknown one would learn to copy its input."""
    first = []
    for activation in ("softmax", None):
        torch.manual_seed(0)
        model = tiny("gpt2", double=False)
        if activation:
            patch_model(model, activation)
        run = trainer(tmp_path / str(activation), model, label_smoothing_factor=0.1)
        run.train()
        first.append(losses(run)[0])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_embeddings_may_be_resized():
    model = patched_tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items() if "polyattn" in k}
    model.resize_token_embeddings(VOCAB + 3)
    assert output(model).shape[-1] == VOCAB + 3
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_autocast_computes_powers_in_float32():
    model = patched_tiny("gpt2", double=False)
    exact = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = output(model)
    assert torch.allclose(out.float(), exact, atol=0.1)
    embeddings = torch.randn(1, 4, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs_embeds=embeddings).logits.square().mean()
    loss.backward()
    assert embeddings.grad.isfinite().all()
