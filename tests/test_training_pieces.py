"""Parameter groups, learning rate, exact averages, twins with equal weights, adapters, metrics."""

import contextlib
import importlib.util
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator, DeepSpeedPlugin
from peft import PeftModel
from torch import nn
from training_models import batch, loss_of, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from hf_polyattn import coverage
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.diagnostics import weight_norms
from hf_polyattn.models import states
from hf_polyattn.training import lora
from hf_polyattn.training.lora import add_lora, base_of, check_adapter, learned_state, load_trained
from hf_polyattn.training.losses import IGNORE, labels_in_step, mean_loss, step_loss, token_losses
from hf_polyattn.training.models import build_model, replace_attention
from hf_polyattn.training.nonfinite import NonFiniteError
from hf_polyattn.training.optimization import (
    adamw,
    check_deepspeed_clipping,
    clip_gradients,
    parameter_groups,
    rate_factor,
    set_learning_rate,
)
from hf_polyattn.training.run import Run, start_accelerator
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_arguments import (
    AttentionArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
)

# optimizer


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_decay_is_for_matrices_only(model_type):
    model = tiny(model_type, activation="poly", learn_gain=True)
    args = OptimizationArguments(weight_decay=0.3, polyattn_learning_rate_multiplier=5.0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: ({names[id(p)] for p in g["params"]}, g) for g in parameter_groups(model, args)}
    decay, plain, polyattn = (groups[name][0] for name in ("decay", "plain", "polyattn"))
    assert decay | plain | polyattn == set(names.values())
    # coefficients are [heads, degree + 1]: two-dimensional, and still not a matrix to shrink
    assert {name.rsplit(".", 1)[1] for name in polyattn} == {"coefficients", "gain"}
    assert all("norm" in name or "ln_" in name or name.endswith("bias") for name in plain)
    assert all(name.endswith("weight") and "norm" not in name and "ln_" not in name for name in decay)
    assert [groups[n][1]["weight_decay"] for n in ("decay", "plain", "polyattn")] == [0.3, 0, 0]


def test_learning_rate_warms_up_and_falls_to_the_ratio():
    assert [rate_factor(step, 100, 10, 0.1) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert rate_factor(55, 100, 10, 0.1) == pytest.approx(0.55)
    assert rate_factor(100, 100, 10, 0.1) == pytest.approx(0.1)
    falling = [rate_factor(step, 100, 10, 0.1) for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)
    assert rate_factor(1, 1, 0, 0.1) == pytest.approx(0.1)


def test_learned_state_has_a_rate_of_its_own():
    args = OptimizationArguments(learning_rate=0.01, polyattn_learning_rate_multiplier=3.0, warmup_steps=0)
    optimizer = adamw(tiny(activation="poly"), args)
    assert set_learning_rate(optimizer, args, 1, 10**9) == pytest.approx(0.01)
    assert {g["name"]: pytest.approx(g["lr"]) for g in optimizer.param_groups} == {
        "decay": 0.01,
        "plain": 0.01,
        "polyattn": 0.03,
    }


# losses


def test_token_losses_are_those_of_cross_entropy():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :4] = IGNORE
    sums, counts = token_losses(logits, labels)
    assert counts.tolist() == [1, 5, 5]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert (sums.sum() / counts.sum()).item() == pytest.approx(expected.item())


def test_mean_loss_does_not_depend_on_batches_and_keeps_the_mode():
    accelerator, model = Accelerator(cpu=True), tiny()
    model.train()
    rows = batch(7)
    rows["labels"][0, :9] = IGNORE
    cut = lambda size: [{k: v[i : i + size] for k, v in rows.items()} for i in range(0, 7, size)]  # noqa: E731
    whole = mean_loss(accelerator, model, cut(7), loss_of)
    assert mean_loss(accelerator, model, cut(2), loss_of) == pytest.approx(whole, rel=1e-6)
    assert model.training


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_every_module_in_its_mode(fails):
    model = tiny().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    seen = []

    def loss(model, batch):
        seen.append(any(module.training for module in model.modules()))
        if fails:
            raise KeyError
        return loss_of(model, batch)

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        mean_loss(Accelerator(cpu=True), model, [batch()], loss)
    assert seen == [False]
    weight_norms(model, batch())
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_step_without_labels_has_no_loss_and_no_gradient():
    accelerator, model, rows = Accelerator(cpu=True), tiny(), batch(2)
    rows["labels"].fill_(IGNORE)
    labels = labels_in_step(accelerator, [rows, rows])
    loss = step_loss(accelerator, loss_of(model, rows)[0].sum(), labels)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_score_that_is_no_number_is_never_the_best(higher_is_better):
    run = Run.__new__(Run)
    run.sign, run.best = -1 if higher_is_better else 1, None
    assert not any(run.is_best(score) for score in (None, math.nan, math.inf, -math.inf))
    assert run.is_best(0.5)
    run.best = 0.5
    assert not run.is_best(math.nan)
    assert run.is_best(0.6) == higher_is_better
    assert run.is_best(0.4) != higher_is_better


# models


@pytest.mark.parametrize("activation", ["poly", "monomial", "relu", "sigmoid"])
def test_twins_start_from_the_same_weights_and_random_state(activation):
    softmax = tiny(seed=3)
    state = torch.get_rng_state()
    twin = tiny(seed=3, activation=activation, batches=[{"input_ids": batch()["input_ids"]}])
    assert (torch.get_rng_state() == state).all()
    weights = {k: v for k, v in twin.state_dict().items() if ".polyattn." not in k}
    assert weights.keys() == softmax.state_dict().keys()
    assert all((weights[k] == v).all() for k, v in softmax.state_dict().items())
    assert coverage(twin).activation == activation


def test_softmax_is_the_stock_model_unless_it_has_extras(capsys):
    """A configuration written for a polynomial gives the twin with one word changed."""
    written = {"degree": 3, "coefficients": ["learnable"], "normalization": "length", "learn_gain": True}
    for options in ({}, written, {"qk_norm": False}):
        model = tiny(**options)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert model.config._attn_implementation == "sdpa"
    assert "softmax has no coefficients, degree, learn_gain, normalization: left out" in capsys.readouterr().out
    extra = tiny(qk_norm=True, **written)
    assert coverage(extra).activation == "softmax"
    assert extra.config.polyattn["normalization"] == "sum"
    relu = tiny(activation="relu", **written)
    assert relu.config.polyattn["normalization"] == "length"
    assert coverage(relu).activation == "relu"


def test_the_qk_norm_twin_is_softmax_of_normalised_queries_and_keys():
    model = tiny(activation="softmax", qk_norm=True).double()
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    out, _ = polyattn_attention(model.transformer.h[0].attn, q, k, v, None)
    normal = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    expected = torch.nn.functional.scaled_dot_product_attention(*normal, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_calibration_uses_the_batches():
    batches = [{"input_ids": batch()["input_ids"]}]
    gains = [tiny(activation="poly", batches=b).transformer.h[0].attn.polyattn.gain for b in ((), batches)]
    assert not torch.allclose(*gains)
    fitted = tiny(activation="poly", calibration_fit="coefficients", batches=batches).transformer.h[0].attn.polyattn
    assert (fitted.gain == 1).all()
    assert not torch.allclose(fitted.coefficients[0], fitted.coefficients[1])


def test_transfer_brings_the_attention_closer_to_the_checkpoints_own(tmp_path, capsys):
    sharp = tiny(activation="softmax")
    with torch.no_grad():
        for block in sharp.transformer.h:
            block.attn.c_attn.weight.mul_(
                20
            )  # scores of a trained model's size: flat attention leaves nothing to learn
    sharp.save_pretrained(tmp_path)
    build = lambda: build_model(AutoModelForCausalLM, ModelArguments(model=str(tmp_path)), byte_tokenizer(), 0)  # noqa: E731
    inputs = [{"input_ids": batch()["input_ids"]}]

    def distance(steps):
        args = AttentionArguments(activation="poly", calibration_fit="coefficients", transfer_steps=steps)
        model = replace_attention(build(), args, inputs, inputs * steps)
        with torch.no_grad():
            return (model(**inputs[0]).logits - build()(**inputs[0]).logits).square().mean().item()

    assert distance(60) < 0.5 * distance(0)
    assert "attention transfer: 60 steps" in capsys.readouterr().out
    # the twin has nothing to learn, and says so; a model without a softmax checkpoint behind it has no teacher
    replace_attention(build(), AttentionArguments(activation="softmax", transfer_steps=2), (), inputs * 2)
    assert "transfer_steps left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a new model has none"):
        tiny(activation="poly", transfer_steps=2)
    replace_attention(build(), AttentionArguments(activation="poly")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="polynomial already"):
        replace_attention(build(), AttentionArguments(transfer_steps=2), (), inputs * 2)


def test_a_polynomial_checkpoint_stays_what_it_is(tmp_path):
    model = tiny(activation="poly", degree=2, normalization="length")
    model.save_pretrained(tmp_path)
    load = lambda: build_model(AutoModelForCausalLM, ModelArguments(model=str(tmp_path)), byte_tokenizer(), 0)  # noqa: E731
    again = replace_attention(load(), AttentionArguments())
    assert again.config.polyattn == model.config.polyattn
    assert type(replace_attention(load(), AttentionArguments(activation="softmax"))).__name__ == "GPT2LMHeadModel"
    assert replace_attention(load(), AttentionArguments(activation="poly", degree=5)).config.polyattn["degree"] == 5


def learned(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".polyattn." in key}


def test_a_named_option_changes_a_polynomial_checkpoint_and_discards_nothing_else():
    inputs = [{"input_ids": batch()["input_ids"]}]
    for activation in ("poly", "monomial"):
        model = tiny(activation=activation, degree=2, normalization="length", batches=inputs)
        with torch.no_grad():
            for state in states(model).values():
                for tensor in state.state_dict().values():
                    tensor.add_(0.01)
        before = learned(model)
        for args in ({"backend": "naive"}, {"activation": activation, "degree": 2, "normalization": "length"}):
            model = replace_attention(model, AttentionArguments(**args), inputs)
            assert {k: model.config.polyattn[k] for k in ("degree", "normalization")} == {
                "degree": 2,
                "normalization": "length",
            }
            assert all(torch.equal(before[key], tensor) for key, tensor in learned(model).items())
        model = replace_attention(model, AttentionArguments(normalization="l2"), inputs)
        assert model.config.polyattn["degree"] == 2
        after = learned(model)
        key = "transformer.h.0.attn.polyattn."
        assert not torch.equal(after[key + "gain"], before[key + "gain"])
        if activation == "poly":
            assert torch.equal(after[key + "coefficients"], before[key + "coefficients"])


def test_calibration_that_is_asked_for_is_done_on_a_polynomial_checkpoint():
    inputs = [{"input_ids": batch()["input_ids"]}]
    model = tiny(activation="poly")
    before = learned(model)
    again = learned(replace_attention(model, AttentionArguments(calibrate_batches=1), inputs))
    assert any(not torch.equal(before[key], again[key]) for key in before)


def test_deepspeed_clips_as_the_recipe_says():
    """DeepSpeed itself needs GPUs; the number is the one of the configuration that users launch with."""
    written = yaml.safe_load((Path(__file__).parents[1] / "recipes/accelerate/zero2.yaml").read_text())
    plugin = DeepSpeedPlugin(hf_ds_config={**written["deepspeed_config"], "zero_optimization": {"stage": 2}})
    check_deepspeed_clipping(None, 3.0)
    check_deepspeed_clipping(plugin, OptimizationArguments().max_grad_norm)
    with pytest.raises(ValueError, match=r"gradient_clipping is 1.0 and max_grad_norm 0.5"):
        check_deepspeed_clipping(plugin, 0.5)


def test_a_misspelt_entry_of_the_configuration_is_refused():
    args = ModelArguments(model_type="gpt2", model_config="{n_layers: 2}")
    with pytest.raises(ValueError, match="no 'n_layers'; did you mean 'n_layer'"):
        build_model(AutoModelForCausalLM, args, byte_tokenizer(), 0)
    with pytest.raises(ValueError, match="must be a mapping"):
        ModelArguments(model_type="gpt2", model_config="{n_layer: ")


def test_model_and_data_that_do_not_fit_are_refused(tmp_path):
    GPT2Config(vocab_size=100, n_layer=1, n_embd=4, n_head=1).save_pretrained(tmp_path)
    args = ModelArguments(model_type="gpt2", model_config="{n_layer: 1, n_head: 1, n_embd: 4, n_positions: 8}")
    with pytest.raises(ValueError, match="block_size 16 is more than the model's 8 positions"):
        build_model(AutoModelForCausalLM, args, byte_tokenizer(), 0, block_size=16)
    args.model_config = "{n_layer: 1, n_head: 1, n_embd: 4, vocab_size: 100}"
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, the model 100"):
        build_model(AutoModelForCausalLM, args, byte_tokenizer(), 0)


# adapters


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)],
)
def test_adapters_train_and_save_the_learned_state(tmp_path, model_type, auto):
    accelerator = Accelerator(cpu=True)
    model = tiny(model_type, activation="poly", auto=auto)
    expected = len(learned_state(model))
    adapted = add_lora(accelerator, model, LoraArguments(lora_r=2), tmp_path / "base")
    assert len(learned_state(adapted)) == expected == 2
    trainable = {
        name.split(".")[-1] if ".polyattn." in name else "other"
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    assert trainable == {"coefficients", "other"}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", adapted)
    ids = batch()["input_ids"]
    merged = load_trained(auto, tmp_path / "adapter")
    assert not isinstance(merged, PeftModel)
    assert coverage(merged).activation == "poly"
    logits, expected = merged.eval()(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_and_their_base_stay_together_when_both_are_copied(tmp_path):
    """The base at the old place may be another by then."""
    out, copied = tmp_path / "out", tmp_path / "copied"
    adapted = add_lora(Accelerator(cpu=True), tiny(activation="poly"), LoraArguments(lora_r=2), out / "base")
    adapted.save_pretrained(out / "last")
    shutil.copytree(out, copied)
    assert base_of(out / "last") == str(out / "base")
    assert base_of(copied / "last") == str(copied / "base")


def test_adapter_without_the_learned_state_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted = add_lora(Accelerator(cpu=True), tiny(activation="poly"), LoraArguments(lora_r=2), tmp_path / "base")
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "h.1.attn.polyattn" not in k}, file)
    with pytest.raises(RuntimeError, match=r"lacks learned attention tensors: .*h\.1"):
        check_adapter(tmp_path, adapted)


# metrics


def test_metrics_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    from hf_polyattn.training.metrics import Classification, Regression

    random = np.random.default_rng(0)
    for classes in (2, 4):
        guess, truth = random.integers(0, classes, 60), random.integers(0, classes, 60)
        scores = Classification(keep_in_memory=True).compute(predictions=guess, references=truth)
        average = "binary" if classes == 2 else "macro"
        assert scores["f1"] == pytest.approx(sklearn.f1_score(truth, guess, average=average))
        assert scores["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, guess))
    guess, truth = random.integers(0, 9, 60).astype(np.float32), random.normal(size=60).astype(np.float32)
    scores = Regression(keep_in_memory=True).compute(predictions=guess, references=truth)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(guess, truth).statistic)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(guess, truth).statistic)
    assert scores["mean_squared_error"] == pytest.approx(((guess - truth) ** 2).mean(), rel=1e-6)
    constant = Regression(keep_in_memory=True).compute(predictions=np.ones(3), references=np.arange(3.0))
    assert constant["pearson"] == 0


def test_metrics_of_a_single_class():
    from hf_polyattn.training.metrics import Classification

    scores = Classification(keep_in_memory=True).compute(predictions=[0, 0], references=[0, 0])
    assert scores == {"accuracy": 1.0, "f1": 0.0}


def test_learned_state_that_peft_would_leave_out_is_an_error(tmp_path, monkeypatch):
    config = lora.LoraConfig
    monkeypatch.setattr(lora, "LoraConfig", lambda **options: config(**{**options, "modules_to_save": None}))
    with pytest.raises(RuntimeError, match="2 of 2 learned attention tensors would not be trained"):
        add_lora(Accelerator(), tiny(activation="poly"), LoraArguments(lora_r=2), tmp_path / "base")


# gradients and runs


def test_clipping_scales_the_gradient_to_the_norm():
    model = nn.Linear(3, 2)
    for most, left in ((0.5, 0.5), (0, 4.0)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0**0.5)
        assert clip_gradients(Accelerator(), model, most).item() == pytest.approx(4.0)
        after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert after.item() == pytest.approx(left, rel=1e-4)


def test_overflow_of_float16_names_step_and_checkpoint(tmp_path):
    run = Run.__new__(Run)
    run.out, run._step = tmp_path, 7

    def loss_of(model, batch):
        raise OverflowError("GPT2Attention of layer 1: output of 1e+05 exceeds float16's range")

    with pytest.raises(NonFiniteError, match=r"step 7: GPT2Attention of layer 1: .*learning_rate.*No checkpoint"):
        run.loss(loss_of, tiny(), batch())
    (tmp_path / "last").mkdir()
    with pytest.raises(NonFiniteError, match="The last good checkpoint is .*last"):
        run.loss(loss_of, tiny(), batch())


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    optimization = OptimizationArguments(max_steps=1)
    args = RunArguments(output_dir=str(tmp_path / "run"), report_to="wandb")
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises((ValueError, ImportError), match="wandb"):
        Run(start_accelerator(optimization, args), args, optimization)
