"""The seam with Transformers: one attention function and one mask function, registered together under one name.

Registered apart, they would fail in silence: without the mask function Transformers builds no mask at all, and a
padded or causal model sees what it must not.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .ops.masks import split_mask
from .recurrent_layer import KeysWithPast
from .state import PolyAttentionState, softmax_attention

NAME = "polyattn"
RETURN_WEIGHTS = "_polyattn_return_weights"
"""Attribute of an attention module: the running forward pass was called with output_attentions=True."""

# arguments that change the result and that no polynomial form honours
_REFUSED = {
    "s_aux": "attention sinks",
    "cache": "the paged cache of continuous batching",
    "block_mask": "a flex-attention block mask",
    "head_mask": "switching heads off",
}


def polyattn_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hk, S, D]
    value: torch.Tensor,  # [B, Hk, S, Dv]
    attention_mask: torch.Tensor | None,  # bool or additive, broadcastable to [B, H, T, S]
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that Transformers calls; returns [B, T, H, Dv] and the weights when they are wanted.

    Modules that the patch leaves out on purpose (`polyattn` is None) compute softmax.

    Raises:
        ValueError: for a module that was never patched, for arguments that cannot be honoured, and for a missing mask
            where one is needed.
        OverflowError: when float16 cannot hold the output; names the layer.
    """
    state = _state_of(module)
    _refuse(kwargs)
    layer = None
    if isinstance(key, KeysWithPast):
        layer, key = key.layer, key.plain
        if attention_mask is not None:
            attention_mask = layer.new_part(attention_mask, query.shape[2])
    queries, keys = query.shape[2], key.shape[2]
    keep, bias, causal = None, position_bias, False
    if attention_mask is not None:
        # in most calls it is as wide as the keys, and cutting it costs as much as all else that is decided here
        keep, extra = split_mask(attention_mask if attention_mask.shape[-1] == keys else attention_mask[..., :keys])
        if extra is not None:
            bias = extra if bias is None else bias + extra
        # the mask already holds the window
        sliding_window = None
    _refuse_unmasked_packing(keep, kwargs.get("cu_seq_lens_q"))
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        causal = bool(causal) and queries > 1
        if causal and queries != keys:
            raise ValueError(
                f"no mask came with {queries} queries against {keys} keys of causal {type(module).__name__}: the "
                "positions of the queries cannot be told. Call the model, not its layers, or pass a 4-D attention mask"
            )
    compute: Any = softmax_attention if state is None else state
    if layer is not None:
        compute = functools.partial(layer.attend, state)
    try:
        out, weights = compute(
            query,
            key,
            value,
            keep=keep,
            bias=bias,
            is_causal=causal,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            softcap=softcap,
            sliding_window=sliding_window,
            # not getattr: a module takes as long as a short step to say that there is no such attribute
            return_weights=bool(kwargs.get("output_attentions")) or module.__dict__.get(RETURN_WEIGHTS, False),
        )
    except OverflowError as error:
        raise OverflowError(f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}: {error}") from None
    return out.transpose(1, 2).contiguous(), weights


def _state_of(module: nn.Module) -> PolyAttentionState | None:
    try:
        return getattr(module, NAME)
    except AttributeError:
        remedies = ["call patch_model on a stock model", "load a polynomial checkpoint through its Auto class"]
        if getattr(getattr(module, "config", None), NAME, None):
            # a polynomial checkpoint in a stock class: a patch would not bring its numbers back
            remedies.reverse()
        raise ValueError(
            f"{type(module).__name__} was asked for {NAME!r} attention but never patched: {', or '.join(remedies)}"
        ) from None


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"polynomial attention cannot honour {name} ({meaning}); unpatch_model(model) gives softmax back"
            )


def _refuse_unmasked_packing(keep: torch.Tensor | None, boundaries: torch.Tensor | None) -> None:
    """Raises when some sequence of a packed row, from boundaries[i] to boundaries[i + 1], sees the one before it."""
    if boundaries is None or torch.compiler.is_compiling():
        return
    starts = boundaries[1:-1].long()
    if len(starts) and (keep is None or keep[..., starts, starts - 1].any()):
        raise ValueError(
            "cu_seq_lens alone does not keep packed sequences apart: pass position_ids that start at 0 in each of them"
        )


def polyattn_mask(
    *args: Any, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, **kwargs: Any
) -> torch.Tensor | None:
    """A bool mask [B, 1, T, S], or None for the one case that `is_causal` describes fully: a whole causal sequence.

    Stock masks are also None for decoding steps, static caches and full attention, where the attention function would
    have to guess.
    """
    whole_sequence = kwargs.get("q_length") is not None and kwargs.get("q_length") == kwargs.get("kv_length")
    skips = {"allow_is_causal_skip": allow_is_causal_skip and whole_sequence, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **{**kwargs, **skips})


def register() -> None:
    """Adds both functions to Transformers' registries; repeating it changes nothing."""
    AttentionInterface.register(NAME, polyattn_attention)
    AttentionMaskInterface.register(NAME, polyattn_mask)
