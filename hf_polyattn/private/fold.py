"""Everything public in one polynomial, and everything that is not a polynomial refused."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..activations import get_activation
from ..architectures import get_architecture
from ..attention import NAME
from ..config import PolyAttentionConfig
from ..models import read_settings, states
from ..ops import monomial_coefficients
from ..ops.affine import shift_and_scale
from ..state import PolyAttentionState


def fold(state: PolyAttentionState, scaling: float = 1.0) -> torch.Tensor:
    """[heads, p + 1] in float64: c of gain * phi(alpha * scaling * x + beta) = sum_k c_k x^k.

    With the model's own `scaling` these are the coefficients of the bare products q . k.
    """
    alpha, beta, gain = (t.detach().double() for t in (state.alpha, state.beta, state.gain))
    if state.is_plain_power:
        # which reads no shift
        beta = torch.zeros_like(beta)
    if state.has_coefficients:
        coefficients = state.coefficients.detach().double()
    else:
        heads = alpha.new_empty(1, len(alpha), 1, 1)
        coefficients = monomial_coefficients(state.config.degree, heads)
    return shift_and_scale(gain[:, None] * coefficients, alpha * scaling, beta)


def check_polynomial(model: PreTrainedModel) -> PolyAttentionConfig:
    """The settings of a model whose attention is polynomial throughout, but for the denominator.

    Raises:
        ValueError: with the remedy, for a model that is not patched, heads that stayed softmax, an activation that is
            no polynomial, QK-norm, or attention that is causal.
    """
    found = states(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model first, for example with degree=2")
    settings = read_settings(model.config)
    if not get_activation(settings.activation).is_polynomial:
        raise ValueError(f'activation {settings.activation!r} is no polynomial: patch_model(model, "poly", degree=2)')
    if settings.qk_norm:
        raise ValueError("qk_norm divides by a root of the data: patch with qk_norm=False")
    modules = dict(get_architecture(model.config).attention_modules(model))
    softmax = [name for name in modules if getattr(modules[name], NAME, None) is None]
    softmax += [f"heads {list(state.rest)} of {name}" for name, state in found.items() if state.rest]
    if softmax:
        raise ValueError(f"still softmax: {', '.join(softmax)}. Patch all layers and heads: patch_model(model, ...)")
    if causal := [name for name, module in modules.items() if is_causal(module)]:
        raise ValueError(f"{causal[0]} is causal: the private mode is for encoders, in which every row sees every key")
    return settings


def check_private(model: PreTrainedModel) -> PolyAttentionConfig:
    """As `check_polynomial`, and the denominator is a constant.

    Raises:
        ValueError: with the remedy.
    """
    settings = check_polynomial(model)
    denominator(settings)
    return settings


def denominator(settings: PolyAttentionConfig) -> float:
    """The constant Z.

    Raises:
        ValueError: for a normalization that depends on the data.
    """
    if settings.normalization == "none":
        return 1.0
    if isinstance(settings.normalization, str):
        raise ValueError(
            f"normalization {settings.normalization!r} divides by what the data decides: call "
            "hf_polyattn.private.make_private(model, batches), or patch with a number, normalization=64"
        )
    return settings.normalization


def is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))
