"""Watching attention modules at work: observers stand in for the computation of patched modules on a few batches.

An observer computes softmax, so that the layers behind see what they saw before the patch, and measures on the way.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import get_activation
from .evaluating import evaluating
from .ops import attend, rms_normalize
from .ops.masks import build_keep
from .ops.precision import compute_dtype
from .state import PolyAttentionState
from .tables import format_span

_TOKENISE = (
    'texts must be tokenised first: batch = tokenizer(texts, return_tensors="pt", padding=True), and then [batch]'
)


@dataclass(frozen=True)
class Seen:
    """One call of an attention module, and softmax's answer to it."""

    query: torch.Tensor
    """[B, H, T, D]"""
    key: torch.Tensor
    """[B, Hk, S, D]"""
    value: torch.Tensor
    """[B, Hk, S, Dv]"""
    out: torch.Tensor
    """[B, H, T, Dv], softmax's"""
    weights: torch.Tensor
    """[B, H, T, S], softmax's"""
    options: dict[str, Any]
    """The rest of the arguments of `attend`."""
    keep: torch.Tensor
    """Which scores count, broadcastable to [B, H, T, S]."""
    rows: torch.Tensor
    """[B, H, T] bool: rows that keep a key and do not belong to padding."""


class Observer:
    """Base class: what `state.observer` is set to. Subclasses measure in `observe`."""

    def __init__(self, state: PolyAttentionState) -> None:
        self.state = state
        # [B, T] of the batch at hand: which tokens are no padding
        self.tokens: torch.Tensor | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = softmax_output(query, key, value, **options)
        keep = keep_mask(query, key, options)
        self.observe(Seen(query, key, value, out, weights, options, keep, self.rows(keep, query)))
        return out, None

    def observe(self, seen: Seen) -> None:
        raise NotImplementedError

    def rows(self, keep: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """[B, H, T] bool: rows that keep a key and do not belong to padding."""
        rows = keep.any(-1).expand(query.shape[:3])
        if self.tokens is not None and self.tokens.shape == (query.shape[0], query.shape[2]):
            rows = rows & self.tokens.to(rows.device)[:, None]
        return rows


class ScoreObserver(Observer):
    """Base class of those that measure how far the scores of each head spread."""

    def __init__(self, state: PolyAttentionState) -> None:
        super().__init__(state)
        heads = state.alpha.shape[0]
        self.squares, self.count = torch.zeros(heads), torch.zeros(heads)

    def add_scores(self, scores: torch.Tensor, used: torch.Tensor) -> None:
        """Adds scores [B, H, T, S], those that `used` [B, H, T, S] names."""
        self.squares += sum_heads(scores.masked_fill(~used, 0).square().sum(-1))
        self.count += sum_heads(used.sum(-1).float())

    @property
    def spread(self) -> torch.Tensor:
        """[heads], root mean square of the scores."""
        return (self.squares / self.count.clamp(min=1)).sqrt()


def softmax_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weights of softmax, whatever the patch says; without dropout."""
    options |= {"dropout": 0.0, "return_weights": True}
    phi = get_activation("softmax").phi
    out = attend(query, key, value, phi=phi, exponential=True, normalization="sum", backend="naive", **options)
    assert isinstance(out, tuple)
    return out


def keep_mask(query: torch.Tensor, key: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Which scores count, broadcastable to [B, H, T, S]."""
    return build_keep(
        (query.shape[2], key.shape[2]),
        query.device,
        keep=options.get("keep"),
        sliding_window=options.get("sliding_window"),
        is_causal=options["is_causal"],
    )


def scores_of(
    state: PolyAttentionState, query: torch.Tensor, key: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """The scores [B, H, T, S] that the polynomial of `state` takes, before alpha and beta; masked ones too."""
    if state.config.qk_norm:
        query, key = rms_normalize(query), rms_normalize(key)
    wide = compute_dtype(query)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = options["scaling"] * (query.to(wide) @ key.to(wide).transpose(-1, -2))
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options.get("bias") is not None:
        scores = scores + options["bias"].to(wide)
    return scores


@contextlib.contextmanager
def observing(model: nn.Module, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Puts the observers in place of the states' own computation, and the model into eval mode.

    After an error every number of the states is what it was.
    """
    before = {
        name: {key: tensor.clone() for key, tensor in observer.state.state_dict().items()}
        for name, observer in observers.items()
    }
    for observer in observers.values():
        observer.state.observer = observer
    try:
        with evaluating(model):
            yield
    except BaseException:
        with torch.no_grad():
            for name, tensors in before.items():
                for key, tensor in observers[name].state.state_dict().items():
                    tensor.copy_(tensors[key])
        raise
    finally:
        for observer in observers.values():
            observer.state.observer = None


def run(model: PreTrainedModel, batches: Iterable[Any], observers: Iterable[Observer] = ()) -> None:
    """The attention of `model` on each batch; its head, and with it the logits, is left out where it can be."""
    observers = list(observers)
    for batch in batches:
        inputs = as_inputs(batch)
        # models of multiple choice flatten their inputs [B, choices, T] before they pass them on
        ids = inputs.get("input_ids")
        body = model.base_model if ids is None or ids.ndim == 2 else model
        unwanted = {"labels", *_parameters(model) - _parameters(body)}
        tokens = real_tokens(inputs)
        for observer in observers:
            observer.tokens = tokens
        body(
            **{
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
                if name not in unwanted
            }
        )


def as_batches(batches: Iterable[Any], name: str = "batches") -> list[Any]:
    """`batches` as a list, each of them looked at; `name` is what the caller's argument is called.

    Raises:
        ValueError: for one batch without the brackets of a list, and for what is no batch of tensors.
    """
    if isinstance(batches, (Mapping, torch.Tensor)):
        raise ValueError(f"{name} takes a list of batches: {name}=[batch]")
    if isinstance(batches, str):
        raise ValueError(f"{name} takes a list of batches, and {_TOKENISE}")
    if not isinstance(batches, Iterable):
        raise ValueError(f"{name} takes a list of batches of model inputs: {name}=[batch], got {batches!r}")
    batches = list(batches)
    for batch in batches:
        as_inputs(batch)
    return batches


def as_inputs(batch: Any) -> dict[str, Any]:
    """A batch as a dictionary of model inputs; a tensor holds input ids.

    Raises:
        ValueError: for anything else, such as texts or lists of numbers.
    """
    inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    if _holds_text(inputs) or (isinstance(inputs, Mapping) and any(map(_holds_text, inputs.values()))):
        raise ValueError(_TOKENISE)
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"a batch is a dictionary of model inputs or a tensor of input ids, got {type(batch).__name__}"
        )
    if isinstance(ids := inputs.get("input_ids"), (list, tuple)):
        raise ValueError('input_ids must be a tensor [batch, length], got a list: tokenise with return_tensors="pt"')
    if isinstance(ids, torch.Tensor) and ids.ndim < 2:
        raise ValueError(f"input_ids must be [batch, length], got the shape {list(ids.shape)}")
    return dict(inputs)


def _holds_text(value: Any) -> bool:
    """Whether it is a text, or texts in lists."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, str)


def real_tokens(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """[B, T] bool, False where attention_mask calls a token padding; None without such a mask."""
    mask = inputs.get("attention_mask")
    # a mask of four dimensions says who sees whom, not which rows are padding
    return mask.flatten(0, -2).bool() if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3) else None


def store(name: str, tensor: torch.Tensor, values: torch.Tensor, *, allow_zero: bool = False) -> None:
    """Copies measured values into a tensor of a state; ValueError where its dtype cannot hold them."""
    remedy = "calibrate in float32 or on batches of real inputs"
    tensor.copy_(as_stored(name, tensor, values, remedy, allow_zero=allow_zero))


def as_stored(
    name: str, like: torch.Tensor, values: torch.Tensor, remedy: str, *, allow_zero: bool = False
) -> torch.Tensor:
    """`values` in dtype and on the device of `like`; ValueError, with the remedy, where the dtype cannot hold them."""
    stored = values.to(like)
    if not (torch.isfinite(stored) & ((stored != 0) | allow_zero)).all():
        span = format_span(values.flatten())
        raise ValueError(f"{name} would need values of {span}, which {like.dtype} cannot hold: {remedy}")
    return stored


def check_scores(name: str, squares: torch.Tensor) -> None:
    """Raises ValueError when the sums of squared scores [heads] are of no use."""
    if not torch.isfinite(squares).all():
        raise ValueError(f"scores of {name} are not finite: the model or the batches hold NaN or inf")
    if dead := (squares == 0).nonzero().flatten().tolist():
        raise ValueError(f"heads {dead} of {name} have only zero scores: pass batches of real, unpadded inputs")


def sum_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T] -> [H] on the CPU."""
    return x.sum(dim=(0, 2)).float().cpu()


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)
