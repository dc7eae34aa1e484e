"""Attention transfer and distillation: what is learned, from what, and what stays as it was."""

import copy

import pytest
import torch
from models import LAYERS, WIDTH, batch_for, output, padded_batches, tiny, token_ids
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GPT2LMHeadModel

from hf_polyattn import calibrate, patch_model, register_architecture
from hf_polyattn.conversion import normalised_error, transfer_attention
from hf_polyattn.distillation import distill
from hf_polyattn.models import states
from hf_polyattn.steps import DivergedError

FAMILIES = [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)]
PROJECTIONS = {"gpt2": "c_proj", "llama": "o_proj", "bert": "output.dense"}


def pair(family="gpt2", auto=AutoModelForCausalLM, *, factor=15.0, **options):
    """(student, teacher), in float32 as they are trained; the student's size is right and its shape is not."""
    teacher = tiny(family, auto, double=False, factor=factor)
    student = patch_model(copy.deepcopy(teacher), **options)
    if student.config.polyattn["gain"] == "auto":
        calibrate(student, [batch_for(student, 8, 16)], fit="gain")
    return student, teacher


def many(count=30, size=8, length=16):
    return [token_ids(size, length, seed) for seed in range(count)]


def transfer(student, teacher, batches=None, **options):
    options = {"progress": False, "learning_rate": 3e-3, **options}
    return transfer_attention(student, teacher, batches or many(), **options)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# what is learned


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_every_layer_comes_nearer_to_the_teacher(family, auto):
    student, teacher = pair(family, auto)
    before = weights_of(teacher)
    report = transfer(student, teacher)
    assert not changed(teacher, before)
    assert report.losses.shape == (30, LAYERS)
    assert report.names == tuple(states(student))
    assert torch.equal(report.before, report.losses[0])
    assert (report.after < 0.8 * report.before).all()
    assert report.tokens == 30 * 8 * 16
    lines = str(report).splitlines()
    assert lines[0].startswith("attention transfer: 30 steps, 3,840 tokens")
    assert f"{report.after[1]:.4f}" in lines[-1]


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_only_attention_is_trained(family, auto):
    student, teacher = pair(family, auto)
    before = weights_of(student)
    transfer(student, teacher, many(3))
    for name in changed(student, before):
        inside = any(name.startswith(f"{module}.") for module in states(student))
        assert inside or "attention.output.dense" in name, name
    # all of it is
    expected = {
        name
        for name, _ in student.named_parameters()
        if any(name.startswith(f"{module}.") for module in states(student)) or "attention.output.dense" in name
    }
    # the bias of keys moves all scores of a row alike, to which only a polynomial is not blind
    assert changed(student, before) == expected


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_queries_and_keys_alone(family, auto):
    student, teacher = pair(family, auto)
    before = weights_of(student)
    transfer(student, teacher, many(5), train="query_key")
    found = {name.split(".")[-2] for name in changed(student, before)}
    wanted = {"gpt2": {"c_attn"}, "llama": {"q_proj", "k_proj"}, "bert": {"query", "key"}}[family]
    assert found == wanted | {"polyattn"}
    if family == "gpt2":
        for layer in range(LAYERS):
            name = f"transformer.h.{layer}.attn.c_attn"
            weight, bias = student.get_submodule(name).weight, student.get_submodule(name).bias
            # values lie in the last third of the columns
            assert torch.equal(weight[:, 2 * WIDTH :], before[f"{name}.weight"][:, 2 * WIDTH :])
            assert torch.equal(bias[2 * WIDTH :], before[f"{name}.bias"][2 * WIDTH :])
            for columns in (slice(0, WIDTH), slice(WIDTH, 2 * WIDTH)):
                assert not torch.equal(weight[:, columns], before[f"{name}.weight"][:, columns])


def test_the_state_alone():
    student, teacher = pair(learn_gain=True)
    before = weights_of(student)
    transfer(student, teacher, many(5), train="state")
    assert {name.rpartition(".")[2] for name in changed(student, before)} == {"coefficients", "gain"}
    student, teacher = pair(activation="monomial")
    with pytest.raises(ValueError, match="nothing to train"):
        transfer(student, teacher, train="state")


def test_what_was_frozen_or_in_some_mode_is_so_again():
    student, teacher = pair()
    student.train()
    student.transformer.h[0].eval()
    teacher.train()
    student.transformer.h[1].attn.c_proj.weight.requires_grad_(False)
    teacher.lm_head.requires_grad_(False)
    noted = [
        (
            {name: module.training for name, module in model.named_modules()},
            {name: p.requires_grad for name, p in model.named_parameters()},
            [len(module._forward_hooks) for module in model.modules()],
        )
        for model in (student, teacher)
    ]
    twin = copy.deepcopy(student).eval()
    weight = student.transformer.h[1].attn.c_proj.weight.clone()
    report = transfer(student, teacher, many(2))
    # without dropout, and with what was frozen
    assert torch.equal(report.losses, transfer(twin, teacher, many(2)).losses)
    assert not torch.equal(student.transformer.h[1].attn.c_proj.weight, weight)
    for (modes, required, hooks), model in zip(noted, (student, teacher), strict=True):
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == required
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert all(p.grad is None for p in model.parameters())
    assert not any(p._backward_hooks for p in student.parameters())


# the loss


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_loss_is_that_of_the_projected_output_on_the_inputs_of_the_teacher(family, auto, layer):
    """Only one layer patched: then both models agree on its inputs, and hooks on both see the two outputs."""
    teacher = tiny(family, auto, double=False, factor=8.0)
    student = patch_model(copy.deepcopy(teacher), layers=[layer], normalization="length")
    batch = padded_batches(teacher)[0]
    calibrate(student, [batch])
    seen = []
    for model in (student, teacher):
        ends = [m for n, m in model.named_modules() if n.endswith(f"{PROJECTIONS[family]}") and "mlp" not in n]
        ends = [m for m in ends if m.weight.shape == (WIDTH, WIDTH)]
        handle = ends[layer].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        output(model, **batch)
        handle.remove()
    rows = batch["attention_mask"].bool()
    given, wanted = (x[rows] for x in seen)
    expected = (given - wanted).square().sum() / wanted.square().sum()
    report = transfer(student, teacher, [batch], steps=20)
    assert report.names == tuple(states(student))
    assert report.losses[0].item() == pytest.approx(expected.item(), rel=1e-4)
    # the rows of padding would change it
    assert normalised_error(*seen, None).item() != pytest.approx(expected.item(), rel=1e-3)


def test_the_teacher_may_be_eager():
    losses = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(1)
        student, teacher = pair("llama")
        teacher.set_attn_implementation(implementation)
        losses.append(transfer(student, teacher, padded_batches(teacher)).losses)
    assert torch.allclose(*losses, rtol=1e-4)


def test_batches_of_any_kind_and_number():
    student, teacher = pair()
    twice = transfer(student, teacher, many(2), steps=5)
    assert len(twice.losses) == 5
    assert len(transfer(student, teacher, (ids for ids in many(9)), steps=4).losses) == 4
    for batches, options, match in (
        ([], {}, "no batches"),
        (many(1), {"steps": 0}, "no batches"),
        ((ids for ids in many(2)), {}, "say how many steps"),
        ((ids for ids in many(2)), {"steps": 3}, "ran out after 2 of 3"),
        ([token_ids(2, 1)], {}, "single tokens only"),
    ):
        with pytest.raises(ValueError, match=match):
            transfer_attention(student, teacher, batches, progress=False, **options)


# what is refused


def test_models_that_do_not_fit_together_are_refused():
    student, teacher = pair()

    def refuses(match, student=student, teacher=teacher, **options):
        before = weights_of(student)
        with pytest.raises(ValueError, match=match):
            transfer(student, teacher, many(1), **options)
        assert not changed(student, before)

    refuses("are one model", teacher=student)
    refuses("is not patched", student=teacher, teacher=student)
    refuses("is patched itself", teacher=copy.deepcopy(student))
    refuses("differ: polyattn_gpt2, llama", teacher=tiny("llama"))
    refuses("2 attention modules, the teacher 3", teacher=tiny("gpt2", n_layer=3))
    refuses("train must be one of", train="everything")
    sharing = copy.copy(teacher)
    sharing = patch_model(copy.deepcopy(teacher))
    sharing.transformer.wte.weight = teacher.transformer.wte.weight
    refuses("share weights", student=sharing)
    teacher.config._attn_implementation = "flash_attention_2"
    refuses('load the teacher with attn_implementation="sdpa"')


def test_an_architecture_without_an_output_projection_is_refused(own_registry):
    student, teacher = pair()
    register_architecture("gpt2", ["GPT2Attention"], exist_ok=True)
    with pytest.raises(ValueError, match="does not say where the output projection is"):
        transfer(student, teacher)


def test_a_teacher_that_is_not_finite_is_named():
    student, teacher = pair()
    with torch.no_grad():
        teacher.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan
    required = {name: p.requires_grad for name, p in student.named_parameters()}
    with pytest.raises(ValueError, match=r"the teacher's output of transformer\.h\.1\.attn is not finite"):
        transfer(student, teacher)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == required
    assert not any(module._forward_hooks for module in teacher.modules())


def test_transfer_that_teaches_nothing_is_an_error():
    student, teacher = pair()
    with pytest.raises(DivergedError, match="has not lowered the loss"):
        transfer(student, teacher, many(3), learning_rate=30.0)


# distillation


def labelled(count=10):
    return [{"input_ids": ids, "labels": ids} for ids in many(count)]


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_distillation_lowers_the_divergence(family, auto):
    student, teacher = pair(family, auto)
    before = weights_of(teacher)
    options = {"steps": 20, "cross_entropy": 0.0, "learning_rate": 1e-3, "progress": False}
    report = distill(student, teacher, many(1), **options)
    assert not changed(teacher, before)
    assert report.losses[-3:].mean() < 0.7 * report.losses[0]
    assert report.tokens == 20 * 8 * 16
    if family != "llama":
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_losses_are_what_they_say():
    student, teacher = pair()
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[0, 10:] = 0
    batch = {"input_ids": token_ids(8, 16), "attention_mask": mask}
    labels = token_ids(8, 16)
    given, wanted = (output(model, **batch) for model in (student, teacher))
    logs = [torch.log_softmax(x / 2, -1)[mask.bool()] for x in (given, wanted)]
    divergence = 4 * (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    entropy = torch.nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for share in (0.0, 0.3, 1.0):
        with torch.random.fork_rng():
            fresh = copy.deepcopy(student)
            for module in fresh.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            options = {"cross_entropy": share, "temperature": 2.0, "progress": False}
            loss = distill(fresh, teacher, [{**batch, "labels": labels}], **options).losses[0]
        assert loss.item() == pytest.approx(((1 - share) * divergence + share * entropy).item(), rel=1e-4)


def test_rates_of_body_attention_and_state():
    student, teacher = pair()
    student.transformer.wpe.weight.requires_grad_(False)
    before = weights_of(student)
    options = {"learning_rate": 0.0, "attention_learning_rate": 1e-3, "polyattn_learning_rate": 1e-2}
    distill(student, teacher, many(1), cross_entropy=0.0, progress=False, **options)
    names = changed(student, before)
    assert names
    assert all(".attn." in name for name in names)
    # Adam's first step has the size of its rate
    for name, rate in (("attn.c_proj.weight", 1e-3), ("attn.polyattn.coefficients", 1e-2)):
        name = f"transformer.h.0.{name}"
        assert (student.state_dict()[name] - before[name]).abs().max().item() == pytest.approx(rate, rel=0.05)
    distill(student, teacher, many(1), cross_entropy=0.0, progress=False, learning_rate=1e-3)
    assert "transformer.wte.weight" in changed(student, before)
    assert "transformer.wpe.weight" not in changed(student, before)


def test_distillation_stops_at_a_loss_that_is_not_finite_and_keeps_the_weights_before():
    student, teacher = pair()
    with torch.no_grad():
        student.transformer.h[0].attn.polyattn.coefficients[0, 1] = torch.inf
    before = weights_of(student)
    with pytest.raises(DivergedError, match="not finite in step 1: .* the student has the weights of the step before"):
        distill(student, teacher, many(2), cross_entropy=0.0, progress=False)
    assert not changed(student, before)


def test_no_clipping_is_not_no_training():
    student, teacher = pair()
    before = weights_of(student)
    report = distill(student, teacher, many(2), cross_entropy=0.0, max_grad_norm=0, progress=False)
    assert changed(student, before)
    assert str(report).startswith("distillation: 2 steps, 256 tokens")


def test_distillation_that_cannot_be_is_refused():
    student, teacher = pair()
    student.eval()

    def refuses(match, teacher=teacher, batches=None, **options):
        with pytest.raises(ValueError, match=match):
            distill(student, teacher, batches or many(1), **{"progress": False, **options})

    refuses("share weights", teacher=student)
    refuses("needs labels in every batch")
    refuses("share of the loss", cross_entropy=1.5)
    refuses("temperature must be positive", temperature=0)
    refuses("no teacher", teacher=None)
    smaller = tiny("gpt2", vocab_size=32, double=False)
    refuses(r"logits are \(8, 16, 32\)", teacher=smaller, batches=[token_ids(8, 16) % 32], cross_entropy=0)
    with torch.no_grad():
        teacher.lm_head.weight[0] = torch.inf
    refuses("logits are not finite", cross_entropy=0)
    student.requires_grad_(False)
    refuses("nothing to train", teacher=tiny("gpt2"), cross_entropy=0)
    assert not student.training


def test_the_teacher_of_a_distillation_may_be_on_another_device(monkeypatch):
    student, teacher = pair()
    seen = []

    def bring(module, args, inputs):
        seen.append(inputs["input_ids"].device.type)
        return args, {**inputs, "input_ids": token_ids(8, 16)}

    teacher.register_forward_pre_hook(bring, with_kwargs=True)
    where = property(lambda self: torch.device("meta" if self is teacher else "cpu"))
    monkeypatch.setattr(GPT2LMHeadModel, "device", where)
    distill(student, teacher, many(1), cross_entropy=0.0, progress=False)
    assert seen == ["meta"]


def test_the_softmax_twin_is_tuned_without_a_teacher():
    twin = tiny("gpt2", double=False, factor=3.0)
    report = distill(twin, None, labelled() * 3, cross_entropy=1.0, learning_rate=1e-2, progress=False)
    assert report.losses[-1] < report.losses[0]
    assert not twin.training


def test_a_student_that_follows_already_may_stay_where_it_is():
    """Attention of nearly equal weights is a polynomial: what the steps do to an error of 1e-5 is noise."""
    student, teacher = pair(factor=1.0, normalization="length")
    calibrate(student, [batch_for(student, 8, 16)])
    report = transfer(student, teacher, many(3), learning_rate=1e-4, polyattn_learning_rate=2e-3)
    assert report.before.mean() < report.after.mean() < 1e-3
    with pytest.raises(DivergedError, match="has not lowered the loss"):
        transfer(student, teacher, many(3), learning_rate=0.5)
