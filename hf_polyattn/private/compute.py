"""The private graph in the place of a model's attention, and exported."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram, export
from transformers import PreTrainedModel

from ..evaluating import evaluating
from ..models import states
from ..observing import as_inputs, run
from ..ops.masks import Masking
from ..ops.precision import compute_dtype
from ..patchable import unwrap
from ..state import PolyAttentionState
from .fold import check_private, denominator, fold
from .graph import check_graph
from .operation import PrivateAttention, Scheme

Inputs = tuple[torch.Tensor, ...]
"""Query, key and value of a `PrivateAttention`, and the mask where one came."""


class PrivateForm:
    """Stands in for the computation of one patched module, as `state.observer`.

    watch: called with the module's name, the operation and its inputs, before it runs.
    """

    def __init__(
        self,
        name: str,
        state: PolyAttentionState,
        scheme: Scheme = "horner",
        watch: Callable[[str, PrivateAttention, Inputs], None] | None = None,
    ) -> None:
        self.name, self.state, self.scheme, self.watch = name, state, scheme, watch
        self.operation: PrivateAttention | None = None
        self.scaling: float | None = None

    def __call__(
        self,
        query: torch.Tensor,  # [B, H, T, D]
        key: torch.Tensor,  # [B, Hk, S, D]
        value: torch.Tensor,  # [B, Hk, S, Dv]
        *,
        scaling: float,
        return_weights: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if return_weights:
            raise ValueError("the private graph returns no weights: call the model without output_attentions")
        mask = self._mask(query, key, options)
        wide = compute_dtype(query)
        if self.operation is None or self.scaling != scaling:
            coefficients = fold(self.state, scaling).to(query.device, wide)
            self.operation = PrivateAttention(coefficients, denominator(self.state.config), self.scheme)
            self.scaling = scaling
        # a cast to the same dtype would be an operation of an exported graph
        given = (query, key, value) if mask is None else (query, key, value, mask)
        inputs = tuple(x if x.dtype == wide else x.to(wide) for x in given)
        if self.watch is not None:
            self.watch(self.name, self.operation, inputs)
        out = self.operation(*inputs)
        return out if query.dtype == wide else out.to(query.dtype), None

    def _mask(self, query: torch.Tensor, key: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor | None:
        """[B, S] bool, of the keys, None for all; ValueError for what the graph does not have."""
        in_use = {"dropout": bool(options.get("dropout"))}
        in_use |= {what: options.get(what) is not None for what in ("bias", "softcap", "sliding_window")}
        if used := [what for what, is_used in in_use.items() if is_used]:
            raise ValueError(f"the attention of {self.name} has {', '.join(used)}, and its private graph has not")
        masking = Masking((query.shape[2], key.shape[2]), options.get("keep"), bool(options.get("is_causal")))
        by_key = masking.by_key
        if isinstance(by_key, str) or (by_key[0] and query.shape[2] > 1):
            why = by_key if isinstance(by_key, str) else "it is causal"
            raise ValueError(f"the mask of {self.name} is not one of keys alone: {why}")
        return None if by_key[1] is None else by_key[1].expand(query.shape[0], -1)


@contextlib.contextmanager
def computing_privately(
    model: PreTrainedModel,
    scheme: Scheme = "horner",
    watch: Callable[[str, PrivateAttention, Inputs], None] | None = None,
) -> Iterator[PreTrainedModel]:
    """Within the block, the attention of `model` is what `export_attention` exports, and the model in eval mode.

    The rest of the model stays as it is, so its outputs are those of an encrypted evaluation without rounding. For
    evaluation: the numbers of a module are read when it first runs, and get no gradient.

    Raises:
        ValueError: as `check_private`; and in the forward pass, for a mask that is not one of keys alone, weights that
            are asked for, a bias, a softcap, or a window.

    Example:
        >>> with computing_privately(model):
        ...     logits = model(**batch).logits
    """
    base = unwrap(model)
    check_private(base)
    found = states(base)
    if any(state.observer is not None for state in found.values()):
        raise ValueError("this model is being observed: leave the other with block first")
    for name, state in found.items():
        state.observer = PrivateForm(name, state, scheme, watch)
    try:
        with evaluating(base):
            yield model
    finally:
        for state in found.values():
            state.observer = None


@torch.no_grad()
def export_attention(
    model: PreTrainedModel, batch: Mapping[str, Any] | torch.Tensor, *, scheme: Scheme = "horner"
) -> dict[str, ExportedProgram]:
    """The attention of every module as a graph of torch.export, additions and multiplications only.

    The inputs of a graph are query, key and value [B, heads, length, head_dim] of one module, behind its projections,
    and with attention_mask in `batch` also mask [B, length]: numbers in the clear, 1, or 0 for padding. Coefficients,
    1 / Z and the model's scaling are numbers of the graph.

    Args:
        model: with a constant denominator: see `make_private`.
        batch: an example of the inputs; its batch size and length are those of the graphs. Without attention_mask
            there is no mask in the graphs, and all inputs must be of full length.
        scheme: "horner", "even_odd" or "monic", see `private.operation`.
    Returns:
        the programs by the name of the attention module; torch.export.save writes one.
    Raises:
        ValueError: as `check_private` and `check_graph`.
    """
    programs: dict[str, ExportedProgram] = {}
    inputs = as_inputs(batch)
    masked = inputs.get("attention_mask") is not None

    def note(name: str, operation: PrivateAttention, given: Inputs) -> None:
        query, key, value = (x.detach().clone() for x in given[:3])
        # only its shape counts
        example = (query, key, value, query.new_ones(key.shape[0], key.shape[2]))[: 4 if masked else 3]
        programs[name] = export(operation, example, strict=False)
        check_graph(programs[name])

    with computing_privately(model, scheme, note):
        run(unwrap(model), [inputs])
    return programs
