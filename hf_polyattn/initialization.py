"""How scores start in a model that is trained from scratch.

Hugging Face initialises every matrix alike, so that scores start with a spread of about .05 in a small model and 1.6
in a wide one. A power of a tiny score has no gradient to speak of. Two rules give s^p scores to work on, whatever the
width: a spread of one, which is what the theory of the scaled polynomial assumes (arXiv 2410.18613), or a mean of one,
which makes s^p behave as 1 + p (s - 1) + ... around the start.
"""

import math

import torch
from transformers import PreTrainedModel

from .architectures import get_architecture, head_dim, unit_spread
from .attention import NAME

_SPREAD = "_polyattn_started_spread"
"""On an attention module: the spread that it was given."""


@torch.no_grad()
def start_scores(model: PreTrainedModel, *, spread: float | None = None, mean: float | None = None) -> None:
    """Sets spread and mean of the scores of a freshly initialised model, patched or not, in place.

    A second call sets them anew: it starts from what the first has left.

    In a patched model an alpha that the config leaves "auto" follows a change of the spread, as
    `PolyAttentionState.analytic_alpha` does: calibrate afterwards, not before.

    Args:
        spread: root mean square of the scores around their mean; query and key weights are scaled by its root.
        mean: of every score; query and key biases are set to one constant c with scaling * head_dim * c^2 = mean.
    Raises:
        ValueError: for an architecture whose entry does not say where queries and keys come from, a negative number,
            or a mean where there are no biases.
    """
    entry = get_architecture(model.config)
    if entry.query_key is None:
        raise ValueError(f"the entry of {entry.model_type!r} has no query_key: register_architecture(..., query_key=)")
    for name, value in (("spread", spread), ("mean", mean)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
    found = [(name, module, *entry.query_key(module)) for name, module in entry.attention_modules(model)]
    for name, _, _, biases in found:
        # before anything changes
        if mean is not None and not biases:
            raise ValueError(f"{name} has no query and key biases to give scores a mean: use beta=, or spread=")
    for _, module, weights, biases in found:
        if spread is not None:
            # a call before this one has scaled the weights already
            factor = math.sqrt(spread / module.__dict__.get(_SPREAD, entry.initial_spread(module)))
            module.__dict__[_SPREAD] = spread
            for weight in weights:
                weight.mul_(factor)
            state = getattr(module, NAME, None)
            # under QK-norm the size of the weights does not reach the scores
            if state is not None and state.config.alpha == "auto" and not state.config.qk_norm:
                before = state.analytic_alpha()
                state.spread *= factor**2
                state.alpha.mul_(state.analytic_alpha() / before)
        if mean is not None:
            constant = math.sqrt(mean / (unit_spread(module) * head_dim(module) ** 0.5))
            for bias in biases:
                bias.fill_(constant)
