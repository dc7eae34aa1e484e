"""A Transformers cache whose size stops growing: sums over monomials of the keys in place of keys and values."""

from collections.abc import Iterator
from typing import Any, Literal, cast

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .architectures import get_architecture, head_dim
from .attention import NAME
from .ops.crossover import SMALL, Size
from .ops.forms import UNSUMMABLE
from .ops.monomials import Monomials
from .recurrent_layer import RecurrentLayer
from .state import PolyAttentionState


class RecurrentCache(Cache):
    """For `generate` and the forward pass of a patched model of low degree, or of small heads.

    Starts as an ordinary cache. At `switch_at` tokens each layer replaces its keys and values by the sums of
    `ops.recurrent`, in fp32, after which neither memory nor the time of a step depends on the length. Results are the
    same up to rounding. Layers left softmax keep their keys and values.

    Args:
        model: a patched causal model. Each layer must be polynomial in all its heads or in none; no sliding windows,
            no cross-attention, and a normalization whose Z_i is a sum over keys or follows from their number.
        switch_at: number of tokens from which on a layer keeps sums. "auto": where they take less memory than keys and
            values. 0: from the first call on.
    Raises:
        ValueError: for a model that does not qualify, with the remedy, and for sums that are large and larger than
            the keys and values at `switch_at`, with the numbers.

    Example:
        >>> model.generate(ids, past_key_values=RecurrentCache(model))  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, switch_at: int | Literal["auto"] = "auto") -> None:
        modules = list(_self_attention(model))
        ordinary = DynamicCache(config=cast(Any, model.config)).layers
        if len(ordinary) != len(modules):
            raise ValueError(
                f"the configuration has {len(ordinary)} layers, the model {len(modules)} attention modules"
            )
        for index, (module, layer) in enumerate(zip(modules, ordinary, strict=True)):
            if problem := _problem(module, type(layer) is DynamicLayer):
                raise ValueError(f"layer {index} cannot keep sums: {problem}; use an ordinary DynamicCache")
        states = [cast(PolyAttentionState | None, getattr(module, NAME)) for module in modules]
        sizes = [_size(m, state) for m, state in zip(modules, states, strict=True) if state is not None]
        if not sizes:
            raise ValueError("no attention of this model is polynomial: patch_model(model, degree=2) first")
        self.switch_at = _switch_at(sizes, switch_at)
        # Transformers makes one mask for all layers
        whole_masks = None in states
        super().__init__(
            [
                layer if state is None else RecurrentLayer(state.config, self.switch_at, whole_masks)
                for state, layer in zip(states, ordinary, strict=True)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and sums that are held now."""
        return sum(_bytes(layer) for layer in self.layers)


def _bytes(layer: Any) -> int:
    if isinstance(layer, RecurrentLayer):
        return layer.nbytes
    return sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)


def _self_attention(model: PreTrainedModel) -> Iterator[nn.Module]:
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError("RecurrentCache knows decoders without cross-attention: use an ordinary cache")
    for name, module in get_architecture(model.config).attention_modules(model):
        if not hasattr(module, NAME):
            raise ValueError(f"{name} was never patched: call patch_model(model, degree=2) first")
        yield module


def _problem(module: nn.Module, is_unrestricted: bool) -> str | None:
    """Why the attention of a module has no constant-size state; None where it has, or where it is softmax."""
    state: PolyAttentionState | None = getattr(module, NAME)
    if state is None:
        return None
    normalization = state.config.normalization
    if not state.activation.is_polynomial:
        return f"{state.config.activation} is not a polynomial"
    if normalization in UNSUMMABLE:
        return f'under normalization "{normalization}", {UNSUMMABLE[normalization]} (patch with "length")'
    if state.rest:
        return f"its heads {list(state.rest)} are softmax (patch all heads of a layer, or none)"
    if not is_unrestricted:
        return "it has a sliding window, and sums cannot forget"
    if not getattr(module, "is_causal", False):
        return "it is not causal"
    return None


def _size(module: nn.Module, state: PolyAttentionState) -> Size:
    dim, itemsize = head_dim(module), state.gain.dtype.itemsize
    monomials = Monomials.of_polynomial(dim, state.config.degree, state.has_all_powers)
    return Size.of(monomials, dim + (state.config.normalization == "sum"), max(4, itemsize), itemsize)


def _switch_at(sizes: list[Size], wanted: int | Literal["auto"]) -> int:
    largest = max(sizes, key=lambda size: size.break_even)
    if wanted == "auto":
        return largest.break_even
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
        raise ValueError(f'switch_at must be "auto" or a number of tokens, got {wanted!r}')
    if largest.sum_bytes > SMALL and wanted < largest.break_even:
        raise ValueError(
            f"sums over {largest} are larger than the keys and values of {wanted:,} tokens: "
            f'switch_at must be {largest.break_even:,} at least, which is "auto"'
        )
    return wanted
