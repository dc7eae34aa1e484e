"""Statistics of every attention head of a model, in one pass over a few batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention import NAME
from ..evaluating import evaluating
from ..observing import as_batches, as_inputs, real_tokens, run
from ..ops.precision import no_autocast
from .probing import probing
from .report import AttentionReport
from .row_map import RowMap
from .statistics import GRADIENTS, HeadSums

MeanLoss = Callable[[nn.Module, dict[str, Any]], torch.Tensor]
"""(model, batch) -> the loss to differentiate, one number."""


def attention_statistics(
    model: PreTrainedModel, batches: Iterable[Any], loss: MeanLoss | None = None
) -> AttentionReport:
    """The STATISTICS of every head; with a loss, the norms of its gradients by queries, keys and values as well.

    Patched and stock models are measured alike, as they are: in eval mode, weights and their `.grad` untouched. No
    more than a block of rows of the attention weights is held at a time.

    Args:
        model: any model whose attention goes through Transformers' AttentionInterface.
        batches: dictionaries of model inputs, or tensors of input ids. Rows that attention_mask calls padding do not
            count.
        loss: what is differentiated. None: the model's own where a batch has labels, and no gradients elsewhere.
    Raises:
        ValueError: for what is no list of batches, and for a model in which no attention was seen.

    Example:
        >>> report = attention_statistics(model, [batch])
        >>> report["frobenius"]  # [layers, heads]
    """
    batches = [_on(model, as_inputs(batch)) for batch in as_batches(batches)]
    if not batches:
        raise ValueError("there is nothing to measure: give at least one batch")
    recorder = _Recorder(model)
    with evaluating(model), probing(model, recorder):
        for batch in batches:
            recorder.tokens = real_tokens(batch)
            if loss is None and "labels" not in batch:
                with torch.no_grad():
                    run(model, [batch])
                continue
            with torch.enable_grad():
                recorder.inputs.clear()
                value = loss(model, batch) if loss is not None else model(**batch).loss
                recorder.add_gradients(value)
    if not recorder.sums:
        raise ValueError(
            f"no attention was seen in {type(model).__name__}: it must go through Transformers' AttentionInterface"
        )
    return AttentionReport(recorder.result())


class _Recorder:
    """The probe: sums by name of the attention module, in the order of their first call."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.sums: dict[str, HeadSums] = {}
        self.tokens: torch.Tensor | None = None
        # of the batch at hand: what is differentiated by
        self.inputs: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.squares: dict[str, torch.Tensor] = {}
        self.differentiated = 0

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        name = self.names[module]
        if name not in self.sums:
            self.sums[name] = HeadSums(_parts(module, query.shape[1]))
        with no_autocast(query.device.type):
            self.sums[name].add(query.detach(), key.detach(), out.detach(), options, self.tokens)
        if torch.is_grad_enabled():
            self.inputs.append((name, query, key, value))

    def add_gradients(self, loss: torch.Tensor) -> None:
        tensors = [x for _, *qkv in self.inputs for x in qkv]
        # no gradients of weights are computed this way, and none is stored
        gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
        self.differentiated += 1
        for name, query, *_ in self.inputs:
            norms = [_squares(next(gradients), query.shape[1]) for _ in GRADIENTS]
            self.squares[name] = self.squares.get(name, 0) + torch.stack(norms).cpu().double()
        self.inputs.clear()

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        out = {name: sums.result() for name, sums in self.sums.items()}
        for name, squares in self.squares.items():
            norms = (squares / self.differentiated).sqrt().float()
            out[name] |= dict(zip(GRADIENTS, norms, strict=True))
        return out


def _squares(gradient: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Squared norm by query head, [heads]; 0 where the loss does not depend on it."""
    if gradient is None:
        return torch.zeros(heads)
    squares = gradient.float().square().sum(dim=(0, 2, 3))
    return squares.repeat_interleave(heads // len(squares)).cpu()


def _parts(module: nn.Module, heads: int) -> list[tuple[tuple[int, ...], RowMap]]:
    """The heads of a module by the row map that they have."""
    state: Any = getattr(module, NAME, None)
    if state is None:
        return [(tuple(range(heads)), RowMap.softmax())]
    parts = [(state.heads, RowMap.of_state(state))]
    return parts + ([(state.rest, RowMap.softmax())] if state.rest else [])


def _on(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
