"""Training that keeps scores within a bound: beyond it a polynomial leaves exp, and fixed-point numbers overflow."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models import states
from ..observing import keep_mask, scores_of
from ..ops.precision import no_autocast
from ..state import PolyAttentionState

Loss = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]
ROWS = 256
"""Rows of scores that are held at a time."""


class ScoreRangePenalty:
    """The mean of max(0, abs(s) - bound)^2 over the scores of all forward passes since the last `take`.

    A context manager: within the block the patched modules compute what they always do, and note their penalty.
    Scores are s_ij before alpha and beta. They are computed once more for it, `ROWS` rows at a time, and again in
    backward, so that no square of the length is kept.
    """

    def __init__(self, model: nn.Module, bound: float, *, masked: bool = False) -> None:
        self.found = states(model)
        if not self.found:
            raise ValueError(f"{type(model).__name__} is not patched: call patch_model first")
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.model, self.bound, self.masked = model, float(bound), masked
        self._sums: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._peaks: list[torch.Tensor] = []

    @property
    def largest(self) -> float:
        """The largest absolute score since the last `take`; 0 for none."""
        return max((peak.item() for peak in self._peaks), default=0.0)

    def take(self) -> torch.Tensor:
        """The penalty, a number with a gradient; what was noted is forgotten.

        Raises:
            RuntimeError: when no patched module has run, so that a term of a loss would be missing in silence.
        """
        if not self._sums:
            raise RuntimeError("no attention has run since the last take(): call the model inside the with block")
        device = self._sums[-1].device
        total = torch.stack([x.to(device) for x in self._sums]).sum()
        count = torch.stack([x.to(device) for x in self._counts]).sum()
        self.reset()
        return total / count.clamp(min=1)

    def reset(self) -> None:
        """Forgets what was noted, as after a forward pass that is not trained on."""
        self._sums, self._counts, self._peaks = [], [], []

    def added_to(self, loss: Loss, weight: float) -> Loss:
        """`loss` of the recipes' loops, (model, batch) -> sums and counts [b], with weight * penalty in its mean."""

        def penalised(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            self.reset()
            sums, counts = loss(model, batch)
            return sums + weight * self.take() * counts, counts

        return penalised

    def __enter__(self) -> "ScoreRangePenalty":
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "gradient checkpointing runs the attention again in backward, and would count its scores twice: "
                "switch it off; the penalty by itself holds no square of the length"
            )
        if any(state.observer is not None for state in self.found.values()):
            raise ValueError("this model is being observed: leave the other with block first")
        for state in self.found.values():
            state.observer = _Watching(self, state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for state in self.found.values():
            state.observer = None
        self.reset()

    def note(self, state: PolyAttentionState, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> None:
        """Adds the scores of one call of one module: query [B, H, T, D], key [B, Hk, S, D]."""
        keep = torch.ones((), dtype=torch.bool, device=query.device) if self.masked else keep_mask(query, key, options)
        keep = keep.expand(*torch.broadcast_shapes(keep.shape, (1, 1, query.shape[2], key.shape[2])))
        bias = options.get("bias")
        for start in range(0, query.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            part = {"scaling": options["scaling"], "softcap": options.get("softcap"), "bias": bias}
            if bias is not None and bias.shape[-2] > 1:
                part["bias"] = bias[..., rows, :]
            given = (state, query[:, :, rows], key, keep[..., rows, :], part)
            with no_autocast(query.device.type):
                excess, count, peak = checkpoint(self._excess, *given, use_reentrant=False)
            self._sums.append(excess)
            self._counts.append(count)
            self._peaks.append(peak)

    def _excess(
        self,
        state: PolyAttentionState,
        query: torch.Tensor,
        key: torch.Tensor,
        keep: torch.Tensor,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = scores_of(state, query, key, options).abs()
        used = keep.expand_as(scores)
        scores = scores.masked_fill(~used, 0)
        return (scores - self.bound).relu().square().sum(), used.sum(), scores.detach().amax()


class _Watching:
    """As `state.observer`: notes the scores, and computes what the state computes."""

    def __init__(self, penalty: ScoreRangePenalty, state: PolyAttentionState) -> None:
        self.penalty, self.state = penalty, state

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.penalty.note(self.state, query, key, options)
        return self.state._attend(query, key, value, **options)


def score_range_penalty(model: nn.Module, bound: float, *, masked: bool = False) -> ScoreRangePenalty:
    """A term for a loss that pulls attention scores back into [-bound, bound].

    Args:
        model: a patched model.
        bound: of the absolute scores s_ij, before alpha and beta.
        masked: count the keys that a mask leaves out as well, since an encrypted evaluation computes their scores too;
            without, only those that a row may attend to.
    Returns:
        a context manager; `take()` is the mean of max(0, abs(s) - bound)^2 over what has run since the last one.
    Raises:
        ValueError: for a model that is not patched, or a bound that is not positive.

    Example:
        >>> with score_range_penalty(model, bound=8.0) as penalty:
        ...     for batch in batches:
        ...         loss = model(**batch).loss + 0.1 * penalty.take()
        ...         loss.backward()
    """
    return ScoreRangePenalty(model, bound, masked=masked)
