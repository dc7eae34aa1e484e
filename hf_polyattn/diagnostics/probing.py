"""A probe between a model and its attention function: for the length of a with block, in patched and stock models.

The observers of `observing` replace the polynomial by softmax and see patched heads only, which is what calibration
needs. A probe leaves every head as it is, so that a model and its softmax twin are measured alike: it is an attention
implementation of its own, registered beside `polyattn`, that models are switched to and back from.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from ..attention import NAME, polyattn_attention, polyattn_mask
from ..state import softmax_attention

PROBE = "polyattn_probe"

Probe = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], None]
"""(module, query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv], out [B, H, T, Dv], options) -> None."""

_current: contextvars.ContextVar[Probe | None] = contextvars.ContextVar(PROBE, default=None)


class _Probed:
    """Stands for an attention module in `polyattn_attention`, which reads masks and arguments for both."""

    def __init__(self, module: nn.Module, probe: Probe) -> None:
        self.is_causal = getattr(module, "is_causal", False)
        self.layer_idx = getattr(module, "layer_idx", "?")
        self.module, self.probe = module, probe
        # as the seam expects it: what computes the attention lies under this name
        setattr(self, NAME, self.compute)

    def compute(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = getattr(self.module, NAME, None)
        if torch.is_grad_enabled():
            # frozen layers have no gradient; queries, keys and values get one all the same
            for x in (query, key, value):
                if not x.requires_grad:
                    x.requires_grad_()
        attention: Any = softmax_attention if state is None else state
        out, weights = attention(query, key, value, **options)
        self.probe(self.module, query, key, value, out, options)
        return out, weights


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    probe = _current.get()
    if probe is None:
        raise RuntimeError(f"attn_implementation {PROBE!r} works inside hf_polyattn.diagnostics only")
    stand_in: Any = _Probed(module, probe)
    return polyattn_attention(stand_in, query, key, value, attention_mask, **kwargs)


@contextlib.contextmanager
def probing(model: nn.Module, probe: Probe) -> Iterator[None]:
    """Calls `probe` after each call of an attention function inside `model`; outputs and gradients stay what they are.

    Not for two threads that use one model at a time: they share its configuration.
    """
    configs = _configs_of(model)
    before = [config._attn_implementation for config in configs]
    token = _current.set(probe)
    try:
        for config in configs:
            config._attn_implementation = PROBE
        yield
    finally:
        _current.reset(token)
        # a configuration hands what it is set to on to those inside it, which stand behind it in this list
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """All configurations that the modules of a model read, each once, outer ones first."""
    found: dict[int, PretrainedConfig] = {}

    def take(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                take(getattr(config, name, None))

    for module in model.modules():
        take(getattr(module, "config", None))
    return list(found.values())


AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, polyattn_mask)
