"""The decoding step: one row against all keys, without gradients, straight to the compiled form.

The general way (`attend`) looks at many things that are the same in every step, and takes longer for that than the
kernel takes for some hundred keys. What is left here are the questions whose answer can be no; all else is checked in
C++.
"""

import logging

import torch
from torch import Tensor

from . import cpu
from .transforms import is_transformed

# the logger of all choices of a form
logger = logging.getLogger(f"{__package__}.forms")


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    coefficients: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    normalization: str | float,
    scaling: float,
    keep: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor | None:
    """sum_j a_j v_j with a_j = keep_j gain_h phi(alpha_h s_j + beta_h) / Z, as `attend` computes it; see there.

    Args:
        query: [B, H, 1, D], or anything else, which is declined.
        key: [B, Hk, S, D].
        value: [B, Hk, S, Dv].
        degree: not read with coefficients [H, p + 1].
        keep: bool, broadcastable to [B, H, 1, S].
    Returns:
        [B, H, 1, Dv]; None where the general way has to be taken: more rows than one, gradients, torch.func, another
        device or dtype, no compiled form, options out of range, or a graph that is being compiled.
    Raises:
        ValueError: for shapes that do not fit.
    """
    dtype = query.dtype
    if query.shape[2:3] != (1,) or dtype not in cpu.DTYPES or key.dtype != dtype or value.dtype != dtype:
        return None
    if not (query.is_cpu and key.is_cpu and value.is_cpu) or torch.compiler.is_compiling():
        return None
    code, constant = cpu.NORMALIZATIONS.get(normalization, cpu.CONSTANT), 1.0
    if code == cpu.CONSTANT and normalization != "none":
        if isinstance(normalization, str) or not 0 < normalization < float("inf"):
            return None
        constant = normalization
    if coefficients is not None:
        degree = coefficients.shape[-1] - 1
    if not 1 <= degree <= cpu.MAX_DEGREE or (sliding_window is not None and sliding_window < 1):
        return None
    given = (query, key, value, coefficients, alpha, beta, gain)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return None
    if is_transformed(*given):
        return None
    if (step := cpu.step()) is None:
        return None
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("form %s for %s", "cpu", f"one row of {tuple(query.shape)} against {tuple(key.shape)}")
    window = sliding_window or 0
    return step(query, key, value, coefficients, alpha, beta, gain, degree, code, constant, scaling, window, keep)
