"""The seam with Transformers: one attention function and one mask function, registered together under one name.

Registered apart, they would fail in silence: without the mask function Transformers builds no mask at all, and a
padded or causal model sees what it must not.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .ops.masks import split_mask
from .state import softmax_attention

NAME = "polyattn"

# arguments that change the result and that no polynomial form honours
_REFUSED = {
    "s_aux": "attention sinks",
    "cache": "the paged cache of continuous batching",
    "block_mask": "a flex-attention block mask",
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

    Modules without a `polyattn` child (layers left out of the patch) compute softmax.

    Raises:
        ValueError: for arguments that cannot be honoured, and for a missing mask where one is needed.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"polynomial attention cannot honour {name} ({meaning}); unpatch_model(model) gives softmax back")
    queries, keys = query.shape[2], key.shape[2]
    keep, bias, causal = None, position_bias, False
    if attention_mask is not None:
        keep, extra = split_mask(attention_mask[..., :keys])
        if extra is not None:
            bias = extra if bias is None else bias + extra
        # the mask already holds the window
        sliding_window = None
    else:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        causal = bool(causal) and queries > 1
        if causal and queries != keys:
            raise ValueError(
                f"no mask came with {queries} queries against {keys} keys of causal {type(module).__name__}: the "
                "positions of the queries cannot be told. Call the model, not its layers, or pass a 4-D attention mask"
            )
    state = getattr(module, NAME, None)
    compute = state if state is not None else softmax_attention
    wanted = bool(kwargs.get("output_attentions")) or (state is not None and state.return_weights)
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
        return_weights=wanted,
    )
    return out.transpose(1, 2).contiguous(), weights


def polyattn_mask(
    *args: Any, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, **kwargs: Any
) -> torch.Tensor | None:
    """A bool mask [B, 1, T, S], or None for the one case that `is_causal` describes fully: a whole causal sequence.

    Stock masks are also None for decoding steps, static caches and full attention, where the attention function would
    have to guess.
    """
    whole_sequence = kwargs.get("q_length") is not None and kwargs.get("q_length") == kwargs.get("kv_length")
    return sdpa_mask(
        *args, allow_is_causal_skip=allow_is_causal_skip and whole_sequence, allow_is_bidirectional_skip=False, **kwargs
    )


def register() -> None:
    """Adds both functions to Transformers' registries; repeating it changes nothing."""
    AttentionInterface.register(NAME, polyattn_attention)
    AttentionMaskInterface.register(NAME, polyattn_mask)
