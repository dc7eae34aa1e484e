"""From a pretrained softmax model to a polynomial one: attention transfer. What may follow it is in `distillation`.

Attention transfer (layer-wise distillation; LoLCATs, arXiv 2410.10254) trains the attention of all layers at once to
give softmax's output on the teacher's own inputs, each layer for itself. The teacher's forward pass drives it: behind
each of its attention modules the student's one is run on the same arguments, its loss is taken and sent backward at
once, so that no more than one layer's activations of one batch are ever held.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import get_architecture
from .evaluating import evaluating
from .models import PolyModelMixin, states
from .observing import real_tokens, run
from .private.penalty import ScoreRangePenalty
from .steps import DivergedError, StepCheckpoint, Steps, rounds, without_cache
from .tables import format_table

NEGLIGIBLE = 1e-3
"""Normalised error below which a student follows its teacher: it may rise again, as a noise of the steps."""
Train = Literal["all", "query_key", "state"]


@dataclass(frozen=True)
class TransferReport:
    """Normalised errors, |student - teacher|^2 / |teacher|^2, of each attention block's output. Prints as a table."""

    names: tuple[str, ...]
    """Attention modules of the student."""
    losses: torch.Tensor
    """[steps, modules], each before its step."""
    before: torch.Tensor
    """[modules], on the first batch before training."""
    after: torch.Tensor
    """[modules], on the first batch after training."""
    tokens: int
    """Tokens seen, without padding."""
    seconds: float

    def __str__(self) -> str:
        what = f"attention transfer: {len(self.losses)} steps, {self.tokens:,} tokens, {self.seconds:.0f} s"
        last = self.losses[-max(1, len(self.losses) // 10) :].mean(0)
        rows = [
            [name, *(f"{x:.4f}" for x in (self.before[i].item(), self.after[i].item(), last[i].item()))]
            for i, name in enumerate(self.names)
        ]
        header = ["normalised error", "first batch before", "and after", "last tenth of the steps"]
        return f"{what}\n{format_table(header, rows)}"


def transfer_attention(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    train: Train = "all",
    learning_rate: float = 1e-3,
    final_learning_rate: float = 1e-5,
    polyattn_learning_rate: float = 1e-2,
    penalty: ScoreRangePenalty | None = None,
    penalty_weight: float = 0.1,
    checkpoint: StepCheckpoint | None = None,
    progress: bool = True,
) -> TransferReport:
    """Trains the attention of `student` to give what `teacher`'s gives on the same inputs, layer by layer at once.

    Only unlabelled inputs are needed. Calibrate first: fit_coefficients is the closed form of the same problem, with
    everything but the coefficients fixed.

    Args:
        student: a patched model, best calibrated.
        teacher: the softmax model it was made from, with weights of its own: take copy.deepcopy(model) and patch that.
        batches: dictionaries of model inputs, or tensors of input ids; a list or loader is gone through again until
            `steps` are done.
        steps: optimizer steps; default: one for each batch.
        train: "all": queries, keys, values, output projection and what the patch learns; "query_key": without values
            and outputs; "state": only what the patch learns (coefficients, gain, ...).
        learning_rate: of weights, along a cosine to final_learning_rate.
        polyattn_learning_rate: of the few numbers that the patch learns, along the same cosine.
        penalty: `private.score_range_penalty(student, bound)`, to keep scores within a bound: each layer's is
            added to its loss, times penalty_weight, and not to what is reported.
        checkpoint: where to keep the steps, and to go on from after a stop: with the same `batches`, losses are those
            of a run that was not stopped.
        progress: show a bar.
    Returns:
        the losses; print it.
    Raises:
        ValueError: for models that do not fit together or share weights, too little data, nothing to train, or a
            teacher whose output is not finite (names the module).
        DivergedError: when training has not lowered the loss on the first batch and it is not negligible; the student
            keeps its trained weights.
    """
    if train not in get_args(Train):
        raise ValueError(f"train must be one of {get_args(Train)}, got {train!r}")
    if penalty is not None and penalty.model is not student:
        raise ValueError("the penalty is of another model: make it with score_range_penalty(student, bound)")
    pairs = _pairs(student, teacher)
    total, taken = rounds(batches, steps)
    weights = list(_weights(student, pairs, train))
    learned = [p for state in states(student).values() for p in state.parameters()]
    last_polyattn = polyattn_learning_rate * final_learning_rate / learning_rate
    groups = [
        {"params": weights, "first": learning_rate, "last": final_learning_rate},
        {"params": learned, "first": polyattn_learning_rate, "last": last_polyattn},
    ]
    if not any(group["params"] for group in groups):
        raise ValueError(f'train="{train}" leaves nothing to train: this patch learns nothing by itself')
    extra = None if penalty is None else lambda: penalty_weight * penalty.take()
    stepping = Steps(groups, total, "attention transfer", checkpoint=checkpoint, progress=progress)
    with (
        contextlib.nullcontext() if penalty is None else penalty,
        _training_only(student, [*weights, *learned]),
        _gradients_of_chosen_columns(student, pairs, train),
        evaluating(student),
        evaluating(teacher),
    ):
        for inputs in stepping.over(taken):
            stepping.take(torch.stack(_layer_losses(teacher, pairs, inputs, backward=True, extra=extra)))
        after, trained = _layer_losses(teacher, pairs, stepping.first_inputs, backward=False, extra=extra)
    # [steps, 2, modules]: what is reported, and what was trained
    losses = stepping.losses
    reported, first = losses[:, 0], losses[0, 1].mean().item()
    names = tuple(pair.name for pair in pairs)
    report = TransferReport(names, reported, reported[0], after, stepping.tokens, stepping.seconds)
    if not trained.mean().item() < max(first, NEGLIGIBLE):
        raise DivergedError(
            f"attention transfer has not lowered the loss: {first:.3g} on the first batch before, "
            f"{trained.mean():.3g} after {total} steps. Lower the learning rates, or give it more steps"
        )
    return report


@dataclass(frozen=True)
class _Pair:
    """An attention module of the student, its twin in the teacher, and the output projections of both."""

    name: str
    student: nn.Module
    teacher: nn.Module
    student_projection: nn.Module
    teacher_projection: nn.Module

    @property
    def is_projected(self) -> bool:
        """Whether the module's own output is that of the projection."""
        return any(module is self.student_projection for module in self.student.modules())


def _pairs(student: PreTrainedModel, teacher: PreTrainedModel) -> list[_Pair]:
    if student is teacher:
        raise ValueError("student and teacher are one model: patch a copy.deepcopy(model) as the student")
    if not isinstance(student, PolyModelMixin):
        raise ValueError(f"the student, {type(student).__name__}, is not patched: call patch_model first")
    if isinstance(teacher, PolyModelMixin):
        raise ValueError(f"the teacher must be the softmax model, this {type(teacher).__name__} is patched itself")
    entry = get_architecture(student.config)
    if get_architecture(teacher.config) is not entry:
        raise ValueError(f"student and teacher differ: {student.config.model_type}, {teacher.config.model_type}")
    if entry.output_projection is None:
        raise ValueError(
            f"the entry of {entry.model_type!r} does not say where the output projection is: register_architecture("
            "..., output_projection=)"
        )
    if teacher.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f'load the teacher with attn_implementation="sdpa" or "eager": the masks of '
            f"{teacher.config._attn_implementation!r} do not suit the student"
        )
    mine, theirs = list(entry.attention_modules(student)), list(entry.attention_modules(teacher))
    if len(mine) != len(theirs):
        raise ValueError(f"the student has {len(mine)} attention modules, the teacher {len(theirs)}")
    refuse_shared(student, teacher)
    patched = states(student)
    pairs = []
    for (name, one), (other_name, other) in zip(mine, theirs, strict=True):
        ends = entry.projection(student, name), entry.projection(teacher, other_name)
        assert ends[0] is not None
        assert ends[1] is not None
        if name in patched:
            pairs.append(_Pair(name, one, other, ends[0], ends[1]))
    return pairs


def refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError when training one model would change the other."""
    addresses = {p.data_ptr() for p in teacher.parameters() if p.numel()}
    if shared := [name for name, p in student.named_parameters() if p.data_ptr() in addresses]:
        raise ValueError(f"student and teacher share weights ({shared[0]}, ...): patch a copy.deepcopy(model)")


def _layer_losses(
    teacher: PreTrainedModel,
    pairs: Sequence[_Pair],
    inputs: dict[str, Any],
    *,
    backward: bool,
    extra: Callable[[], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised error of each student module on the teacher's own inputs, and what is trained; sends it backward.

    Both are [modules]. extra: what is trained besides the error of the module that has just run.
    """
    losses, trained = torch.zeros(2, len(pairs))
    rows = real_tokens(inputs)

    def compare(index: int, pair: _Pair) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            wanted = output[0] if isinstance(output, tuple) else output
            if not pair.is_projected:
                wanted = pair.teacher_projection(wanted)
            if not torch.isfinite(wanted).all():
                raise ValueError(
                    f"the teacher's output of {pair.name} is not finite: check its weights and the batches"
                )
            like = next(pair.student.parameters())
            # a cache has taken the keys in already; the student reads the whole sequence
            own = {k: None if "past_key_value" in k else _to(v, like) for k, v in kwargs.items()}
            with torch.set_grad_enabled(backward):
                given = pair.student(*_to(args, like), **own)
                given = given[0] if isinstance(given, tuple) else given
                if not pair.is_projected:
                    given = pair.student_projection(given)
                loss = normalised_error(given, _to(wanted, like), rows)
                total = loss if extra is None else loss + extra()
                if backward:
                    total.backward()
            losses[index], trained[index] = loss.item(), total.item()

        return hook

    handles = [pair.teacher.register_forward_hook(compare(i, pair), with_kwargs=True) for i, pair in enumerate(pairs)]
    try:
        with torch.no_grad():
            run(teacher, [without_cache(teacher, inputs)])
    finally:
        for handle in handles:
            handle.remove()
    return losses, trained


def normalised_error(given: torch.Tensor, wanted: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """|given - wanted|^2 / |wanted|^2 of outputs [B, T, W], over the rows [B, T] that are no padding."""
    if rows is not None and rows.shape == given.shape[:2]:
        rows = rows.to(given.device)
        given, wanted = given[rows], wanted[rows]
    return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)


def _weights(student: PreTrainedModel, pairs: Sequence[_Pair], train: Train) -> Iterator[nn.Parameter]:
    """The weights of the attention blocks that `train` names, without the state of the patch."""
    own = {id(p) for state in states(student).values() for p in state.parameters()}
    seen: set[int] = set()
    for pair in pairs:
        if train == "all":
            candidates = [*pair.student.parameters(), *pair.student_projection.parameters()]
        else:
            candidates = [parameter for parameter, _ in _query_key(student, pair)] if train == "query_key" else []
        for parameter in candidates:
            if id(parameter) not in own | seen:
                seen.add(id(parameter))
                yield parameter


def _query_key(student: PreTrainedModel, pair: _Pair) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Parameters that hold queries and keys, each with a mask of those elements: GPT-2 keeps values beside them."""
    entry = get_architecture(student.config)
    if entry.query_key is None:
        raise ValueError(f"the entry of {entry.model_type!r} has no query_key: use another train=")
    weights, biases = entry.query_key(pair.student)
    masks: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for view in [*weights, *biases]:
        for parameter in pair.student.parameters():
            if parameter.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                _, mask = masks.setdefault(id(parameter), (parameter, torch.zeros_like(parameter)))
                offset = view.storage_offset() - parameter.storage_offset()
                mask.detach().as_strided(view.shape, view.stride(), offset).fill_(1)
    return list(masks.values())


@contextlib.contextmanager
def _gradients_of_chosen_columns(student: PreTrainedModel, pairs: Sequence[_Pair], train: Train) -> Iterator[None]:
    """Under "query_key", no gradient for the values that share a matrix with them: Adam leaves those alone then."""
    masked = [entry for pair in pairs for entry in _query_key(student, pair)] if train == "query_key" else []
    handles = [parameter.register_hook(partial(torch.mul, mask.detach())) for parameter, mask in masked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _training_only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freezes all of `model` but the chosen parameters; afterwards requires_grad is what it was."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(parameter) for parameter in chosen}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def _to(value: Any, like: torch.Tensor) -> Any:
    """Tensors in value moved to the device of `like`, floating point ones to its dtype as well."""
    if isinstance(value, torch.Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, like) for item in value)
    return value
