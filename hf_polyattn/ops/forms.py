"""The dispatch table: which form computes a call. "auto" takes the first that can and that suits the call."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import cpu, fused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """What the choice depends on."""

    device: str
    dtypes: frozenset[torch.dtype]
    """Of query, key and value."""
    is_empty: bool
    """Some dimension is 0."""
    is_polynomial: bool
    degree: int = 1
    """Of the polynomial."""
    head_dim: int = 1
    """The larger one of D and Dv."""
    extras: tuple[str, ...] = ()
    """Which of softcap, bias and dropout are in use."""
    return_weights: bool = False


@dataclass(frozen=True)
class Form:
    refusal: Callable[[Call], str | None]
    """Why this form cannot compute the call; None where it can."""
    suits: Callable[[Call], bool] = lambda call: True
    """Whether "auto" should choose it where it can."""


def _polynomials_only(call: Call) -> str | None:
    return None if call.is_polynomial else "it knows polynomials only"


def _cpu_refusal(call: Call) -> str | None:
    if reason := _polynomials_only(call):
        return reason
    if call.device != "cpu":
        return f"it runs on CPUs, not on {call.device}"
    if len(call.dtypes) > 1 or not call.dtypes <= set(cpu.DTYPES):
        return f"it knows {' and '.join(map(str, cpu.DTYPES))}, not {', '.join(sorted(map(str, call.dtypes)))}"
    if call.extras:
        return f"it has no {', '.join(call.extras)}"
    if call.is_empty:
        return "a dimension is 0"
    if torch.compiler.is_compiling():
        return None if cpu.is_loaded() else "it was not loaded before this graph was compiled"
    return cpu.build().problem


def _fused_refusal(call: Call) -> str | None:
    if reason := _polynomials_only(call):
        return reason
    if len(call.dtypes) > 1 or not call.dtypes <= set(fused.DTYPES):
        return f"it knows {', '.join(map(str, fused.DTYPES))}, not {', '.join(sorted(map(str, call.dtypes)))}"
    if call.extras:
        return f"it has no {', '.join(call.extras)}"
    if call.is_empty:
        return "a dimension is 0"
    if call.degree > fused.MAX_DEGREE:
        return f"it knows degrees up to {fused.MAX_DEGREE}, not {call.degree}"
    if call.head_dim > fused.MAX_HEAD_DIM:
        return f"it knows a head_dim up to {fused.MAX_HEAD_DIM}, not {call.head_dim}"
    return fused.problem(call.device)


FORMS: dict[str, Form] = {
    "cpu": Form(_cpu_refusal),
    # on a CPU it runs in an interpreter, for tests
    "fused": Form(_fused_refusal, lambda call: call.device != "cpu"),
    # compiled graphs take the definition instead: it fuses, and a loop over tiles would be unrolled into the graph
    "tiled": Form(_polynomials_only, lambda call: not torch.compiler.is_compiling()),
    "naive": Form(lambda call: None),
}


def choose_form(backend: str, call: Call) -> str:
    """The name of the form.

    Only the definition has weights to return, so `return_weights` takes it whatever the backend; a compiled graph
    takes it in place of "tiled".

    Raises:
        ValueError: for an unknown backend, or one that was asked for by name and cannot compute the call.
    """
    if backend not in ("auto", *FORMS):
        raise ValueError(f'backend must be "auto" or one of {", ".join(FORMS)}, got {backend!r}')
    if backend != "auto" and (reason := FORMS[backend].refusal(call)):
        raise ValueError(f'backend="{backend}" cannot compute this call: {reason}; use backend="auto"')
    if call.return_weights or (backend == "tiled" and torch.compiler.is_compiling()):
        return "naive"
    if backend == "auto":
        backend = next(name for name, form in FORMS.items() if form.suits(call) and not form.refusal(call))
        if not torch.compiler.is_compiling():
            logger.debug("form %s for %s", backend, call)
    return backend
