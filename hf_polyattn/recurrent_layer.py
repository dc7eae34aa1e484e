"""A cache layer whose size does not depend on the length, and how the attention function learns of it.

An attention module hands its new keys and values to the cache, and what the cache returns to the attention function;
nothing else passes between the two, and the mask of padded keys reaches only the second. So the layer returns its keys
as `KeysWithPast`, a tensor that knows its layer and refuses every operation: what does not expect it, such as softmax,
fails with an explanation instead of attending to the newest keys alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from .config import PolyAttentionConfig
from .ops.masks import Masking, split_mask
from .ops.recurrent import Past

if TYPE_CHECKING:
    from .state import PolyAttentionState

# what may be asked of keys without reading them
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.__repr__),
}


class KeysWithPast(torch.Tensor):
    """Keys [B, Hk, S, D] of a `RecurrentLayer`, to be read by `polyattn_attention` only."""

    plain: Tensor
    """The keys themselves: all there are, or the new ones alone once the layer has summed up the others."""
    layer: "RecurrentLayer"

    @classmethod
    def of(cls, keys: Tensor, layer: "RecurrentLayer") -> "KeysWithPast":
        out = keys.as_subclass(cls)
        out.plain, out.layer = keys, layer
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        # no TypeError: Python would replace its message in k + 1
        raise RuntimeError(
            "the keys of a RecurrentCache were read by something other than polynomial attention "
            f"({getattr(func, '__name__', func)}): give such a model or layer an ordinary DynamicCache"
        )


class RecurrentLayer(LinearAttentionAndFullAttentionLayer):
    """Keys and values up to a length; from there on their sums (`ops.recurrent.Past`) as the recurrent states.

    State 0 holds S [B, Hk, F, Dv], state 1 the number of kept keys [B], which is where row lengths come from.

    Args:
        config: of the attention that the sums are for.
        switch_at: number of tokens from which on the layer keeps sums.
        whole_masks: masks of the model cover all keys so far, because other layers of the cache still hold them.
    """

    is_croppable = False

    def __init__(self, config: PolyAttentionConfig, switch_at: int, whole_masks: bool = False) -> None:
        super().__init__(number_of_states=2)
        self.config, self.switch_at, self.whole_masks = config, switch_at, whole_masks
        self.cumulative_length = 0

    @property
    def is_summed(self) -> bool:
        """Whether the keys have given way to their sums."""
        return self.has_previous_state[0]

    @property
    def past(self) -> Past | None:
        sums, lengths = self.recurrent_states[0], self.recurrent_states[1]
        return None if sums is None or lengths is None else Past(sums, lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds now."""
        held = self.recurrent_states.values() if self.is_summed else (self.keys, self.values)
        return sum(x.nbytes for x in held if x is not None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_summed:
            keys, values = key_states, value_states
        else:
            keys, values = DynamicLayer.update(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return KeysWithPast.of(keys, self), values

    def attend(
        self, state: "PolyAttentionState | None", query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of `state` to what `update` returned, and to the past.

        Raises:
            ValueError: when the module was patched again since the cache was made, for masks that hide single keys
                from single rows, and for weights of keys that are no longer there.
        """
        if state is None or state.config != self.config:
            raise ValueError("the model was patched anew since its RecurrentCache was made: make a new one")
        if (past := self.past) is not None:
            return state(query, key, value, past=past, **options)
        out = state(query, key, value, **options)
        if self.cumulative_length >= self.switch_at:
            by_key = Masking((query.shape[2], key.shape[2]), options["keep"], options["is_causal"]).by_key
            if isinstance(by_key, str):
                raise ValueError(f"the keys cannot be summed up: {by_key}; use an ordinary DynamicCache")
            self._sum_up(state.past_of(key, value, by_key[1]))
        return out

    def new_part(self, mask: Tensor, queries: int) -> Tensor:
        """The columns of the new keys in a mask [B, H, T, S] whose S may count the keys that are sums by now."""
        past, before = self.past, self.cumulative_length - queries
        if past is None or mask.shape[-1] == queries:
            return mask
        if mask.shape[-1] < self.cumulative_length:
            raise ValueError(f"the mask has {mask.shape[-1]} columns, not {queries} or {self.cumulative_length}")
        kept, _ = split_mask(mask[..., :before])
        if not (kept.sum(-1) == past.lengths.view(-1, 1, 1)).all():
            raise ValueError(
                "the mask hides keys that earlier rows attended to, and sums cannot take them out: use a DynamicCache"
            )
        return mask[..., before : self.cumulative_length]

    def _sum_up(self, past: Past) -> None:
        for index, tensor in enumerate((past.sums, past.lengths)):
            self.update_recurrent_state(tensor, state_idx=index)
            self.has_previous_state[index] = True
        self.keys = self.values = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, position of the first): the new keys alone, where the others are sums."""
        if self.is_summed and not self.whole_masks:
            return query_length, self.cumulative_length
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        # given up, because the next sequences may be another number
        self.recurrent_states = dict.fromkeys(self.recurrent_states)
        self.is_recurrent_states_initialized = dict.fromkeys(self.is_recurrent_states_initialized, False)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (past := self.past) is None:
            return super().batch_repeat_interleave(repeats)
        rows = torch.arange(len(past.lengths), device=past.lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if (past := self.past) is None:
            return super().batch_select_indices(indices)
        self.recurrent_states = {i: x[indices.to(x.device)] for i, x in enumerate((past.sums, past.lengths))}

    def activate_past_recording(self) -> None:
        raise RuntimeError(
            "this kind of decoding takes tokens back, as assisted decoding and prompt lookup do, and a sum cannot "
            "forget: use an ordinary DynamicCache"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("a sum over keys cannot forget some of them: use an ordinary DynamicCache, or reset()")
