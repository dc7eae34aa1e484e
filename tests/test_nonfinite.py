"""A step that is not finite: where it began, by name, and what is left alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from training_models import batch, loss_of, tiny

from hf_polyattn.training.nonfinite import NonFiniteError, find_nonfinite
from hf_polyattn.training.run import Run


class Poison(torch.autograd.Function):
    """Identity with a gradient that is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_finite_model_has_no_culprit():
    assert find_nonfinite(tiny(activation="poly"), [batch()], loss_of) is None


def test_first_bad_output_is_named_by_its_innermost_module():
    model = tiny(activation="poly")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(3e38)
    assert find_nonfinite(model, [batch()], loss_of) == "the output of transformer.h.1.mlp.c_fc (Conv1D)"


def test_bad_weight_is_named():
    model = tiny()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[2, 2] = math.nan
    assert find_nonfinite(model, [batch()], loss_of) == "the tensor transformer.h.0.attn.c_attn.weight itself"


def test_bad_gradient_is_named_and_the_model_left_alone():
    model = tiny(activation="poly")
    block = model.transformer.h[0].mlp
    forward = block.forward
    block.forward = lambda x: Poison.apply(forward(x))
    place = find_nonfinite(model, [batch()], loss_of)
    assert place.startswith("the gradient that reaches the output of transformer.h.0.mlp")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.transformer.h.modules())


def test_only_the_last_batch_is_bad():
    model = tiny()
    good, bad = batch(), batch()
    bad["labels"] = bad["labels"].clone()
    calls = []

    def loss(model, batch):
        sums, counts = loss_of(model, batch)
        calls.append(1)
        return sums * (math.nan if batch is bad else 1.0), counts

    assert find_nonfinite(model, [good, bad], loss) == "the loss itself, from finite logits"
    assert len(calls) == 2


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_sharded_step_is_not_repeated(tmp_path, kind):
    run = Run.__new__(Run)
    run.accelerator, run.out, run._skipped = SimpleNamespace(distributed_type=kind, scaler=None), tmp_path, 0
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    repeated = lambda *_: pytest.fail("the step was repeated")  # noqa: E731
    with pytest.raises(NonFiniteError, match=f"loss is nan; first seen in some module .under {kind.value} the step"):
        run.check_finite(3, nan, one, tiny(), [batch()], repeated)
