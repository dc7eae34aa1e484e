"""The steps of transfer and distillation: a stop and a resume change nothing, and a watched score ends them."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from models import batch_for, tiny, token_ids
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.utils.data import DataLoader

from hf_polyattn import calibrate, patch_model
from hf_polyattn.conversion import transfer_attention
from hf_polyattn.distillation import distill
from hf_polyattn.steps import (
    EarlyStop,
    StepCheckpoint,
    Steps,
    device_random_state,
    set_device_random_state,
    without_cache,
)

STEPS = 8


def pair():
    # dropout, which a resumed run has to draw alike
    teacher = tiny("gpt2", double=False, resid_pdrop=0.2)
    student = patch_model(copy.deepcopy(teacher), degree=3)
    calibrate(student, [batch_for(student, 8, 16)], fit="gain")
    return student, teacher


def batches(labels=False):
    ids = [token_ids(4, 16, seed) for seed in range(STEPS)]
    return [{"input_ids": i, "labels": i} if labels else {"input_ids": i} for i in ids]


def transfer(student, teacher, data, **options):
    return transfer_attention(student, teacher, data, progress=False, learning_rate=3e-3, **options)


def tune(student, teacher, data, **options):
    return distill(student, teacher, data, progress=False, warmup_steps=2, cross_entropy=0.5, **options)


class Stopped(Exception):
    pass


def until(data, stop):
    """The batches over and over, and the end of the world in front of batch `stop`."""
    for index, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(data))):
        if index == stop:
            raise Stopped
        yield batch


def loader(labels=False):
    """Half as many batches as steps; its iteration draws from the global random state each time that it starts."""
    return DataLoader(batches(labels)[: STEPS // 2], batch_size=None)


@pytest.mark.parametrize(
    ("train", "labels", "data", "every"),
    [(transfer, False, batches, 3), (tune, True, batches, 3), (tune, True, loader, 3), (tune, True, loader, 4)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(train, labels, data, every, tmp_path):
    torch.manual_seed(0)
    straight, teacher = pair()
    student = copy.deepcopy(straight)
    torch.manual_seed(1)
    whole = train(straight, teacher, data(labels), steps=STEPS)
    keep = StepCheckpoint(tmp_path / "stage" / "steps.safetensors", every=every)
    fresh = copy.deepcopy(student)
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        train(student, teacher, until(data(labels), 5), steps=STEPS, checkpoint=keep)
    with safe_open(keep.file, framework="pt") as file:
        assert len(file.get_tensor("losses")) == every
    torch.manual_seed(7)  # the resumed process has another random state
    again = train(fresh, teacher, data(labels), steps=STEPS, checkpoint=keep)
    assert torch.equal(again.losses, whole.losses)
    assert again.tokens == whole.tokens
    for (name, one), other in zip(straight.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_what_a_stop_leaves_is_whole(tmp_path):
    """The file is replaced in one step: no partial one lies beside it."""
    student, teacher = pair()
    keep = StepCheckpoint(tmp_path / "steps.safetensors", every=1)
    transfer(student, teacher, batches(), checkpoint=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["steps.safetensors"]


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_random_state_of_every_accelerator_is_kept(kind, monkeypatch):
    """MPS's functions take no device, the others' do."""
    device = torch.device(kind) if kind == "mps" else torch.device(kind, 1)
    states = {}

    def get(*where):
        return states[where]

    def put(state, *where):
        states[where] = state

    monkeypatch.setattr(torch, "get_device_module", lambda of: SimpleNamespace(get_rng_state=get, set_rng_state=put))
    set_device_random_state(device, torch.arange(3))
    assert list(states) == [() if kind == "mps" else (device,)]
    assert device_random_state(device) is states.popitem()[1]
    assert device_random_state(torch.device("cpu")) is None


def test_no_cache_is_filled_inside_a_peft_model():
    model = tiny("gpt2", double=False)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["c_attn"]))
    assert without_cache(adapted, {}) == without_cache(model, {}) == {"use_cache": False}


def test_losses_are_copied_to_one_tensor():
    """What a forward pass has allocated is not kept: between its large blocks it would waste their place."""
    weight = torch.nn.Parameter(torch.ones(2))
    stepping = Steps([{"params": [weight], "first": 0.5, "last": 0.5}], 2, "test", progress=False)
    places = set()
    for _ in stepping.over([{"input_ids": torch.ones(1, 2, dtype=torch.long)}] * 2):
        loss = weight.sum()
        loss.backward()
        stepping.take(loss)
        places.add(stepping.losses.data_ptr())
    assert len(places) == 1
    # the first step of AdamW is as long as its rate
    torch.testing.assert_close(stepping.losses, torch.tensor([2.0, 1.0]))


def test_the_steps_of_something_else_are_refused(tmp_path):
    student, teacher = pair()
    keep = StepCheckpoint(tmp_path / "steps.safetensors", every=2)
    transfer(student, teacher, batches(), checkpoint=keep)
    with pytest.raises(ValueError, match="another attention transfer: remove it"):
        transfer_attention(student, teacher, batches(), learning_rate=1e-4, checkpoint=keep, progress=False)


def test_a_score_that_falls_no_more_ends_the_steps():
    student, teacher = pair()
    seen = []

    def score():
        seen.append(student.transformer.wte.weight.detach().clone())
        return [3.0, 1.0, 2.0, 1.5][len(seen) - 1]

    report = tune(student, teacher, batches(True), early_stop=EarlyStop(score, every=1, patience=2))
    assert len(report.losses) == len(seen) == 4
    assert torch.equal(student.transformer.wte.weight, seen[1])


def test_the_best_weights_survive_a_stop(tmp_path):
    student, teacher = pair()
    fresh = copy.deepcopy(student)
    keep = StepCheckpoint(tmp_path / "steps.safetensors", every=2)
    scores = iter([1.0, 5.0, 6.0])
    with pytest.raises(Stopped):
        tune(
            student,
            teacher,
            until(batches(True), 3),
            steps=STEPS,
            checkpoint=keep,
            early_stop=EarlyStop(lambda: next(scores), every=1, patience=3),
        )
    with safe_open(keep.file, framework="pt") as file:
        best = {name: file.get_tensor(name) for name in file.keys() if name.endswith(".best")}  # noqa: SIM118
        assert json.loads(file.metadata()["numbers"])["waited"] == 1
    report = tune(
        fresh, teacher, batches(True), checkpoint=keep, early_stop=EarlyStop(lambda: 9.0, every=1, patience=3)
    )
    assert len(report.losses) == 4
    assert any(torch.equal(fresh.transformer.wte.weight, value) for value in best.values())
