"""The dispatch table: which form computes a call. "auto" takes the first that can and that suits the call."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import cpu, fused
from .crossover import SMALL, Size, crossover
from .masks import Masking
from .monomials import Monomials

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """What the choice depends on. Not frozen, which would make it slower to make, in every decoding step."""

    device: str
    dtypes: frozenset[torch.dtype]
    """Of query, key and value."""
    is_empty: bool
    """Some dimension is 0."""
    is_polynomial: bool
    extras: tuple[str, ...] = ()
    """Which of softcap, bias and dropout are in use."""
    return_weights: bool = False
    normalization: str | float = "sqrt_length"
    degree: int = 3
    has_coefficients: bool = False
    head_dim: int = 64
    value_dim: int = 64
    wants_gradient: bool = False
    is_transformed: bool = False
    """In forward mode or by torch.func; see `transforms`."""
    masking: Masking = field(default=Masking((1, 1)), repr=False)


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
    if not 1 <= call.degree <= cpu.MAX_DEGREE:
        return f"it knows degrees 1 to {cpu.MAX_DEGREE}, not {call.degree}"
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
    if (head_dim := max(call.head_dim, call.value_dim)) > fused.MAX_HEAD_DIM:
        return f"it knows a head_dim up to {fused.MAX_HEAD_DIM}, not {head_dim}"
    return fused.problem(call.device)


# what is not a sum over keys of something that factors into a query's part and a key's part
UNSUMMABLE = {"l1": "absolute values do not factor", "l2": "the squares in Z_i have twice the degree"}


def _recurrent_refusal(call: Call) -> str | None:
    if reason := _polynomials_only(call):
        return reason
    if call.normalization in UNSUMMABLE:
        reason = UNSUMMABLE[call.normalization]
        return f'it has no normalization "{call.normalization}": {reason} (patch with normalization="length")'
    if call.extras:
        return f"it has no {', '.join(call.extras)}"
    if call.is_empty:
        return "a dimension is 0"
    if torch.compiler.is_compiling():
        return "its loop over chunks would be unrolled into the compiled graph"
    if reason := state_refusal(call):
        return reason
    return call.masking.by_key if isinstance(call.masking.by_key, str) else None


def state_refusal(call: Call) -> str | None:
    """Sums that are larger than the keys and values they stand for, unless they are small."""
    size = state_size(call)
    keys = call.masking.shape[1]
    if size.sum_bytes <= SMALL or keys >= size.break_even:
        return None
    return (
        f"degree {call.degree} at head_dim {call.head_dim} means {size}, more than the keys and values of {keys:,} "
        f"tokens: it breaks even at {size.break_even:,}"
    )


def state_size(call: Call) -> Size:
    monomials = Monomials.of_polynomial(call.head_dim, call.degree, call.has_coefficients)
    itemsize = max(dtype.itemsize for dtype in call.dtypes)
    return Size.of(monomials, call.value_dim + (call.normalization == "sum"), max(4, itemsize), itemsize)


def _recurrent_pays(call: Call) -> bool:
    masking = call.masking
    measured = call.device == "cpu" and call.dtypes == {torch.float32} and call.is_polynomial
    if not measured or min(masking.shape) == 1 or torch.compiler.is_compiling():
        return False
    # a mask of rows is most likely that of a padded causal batch; it is read only past the longer of the lengths
    is_causal = masking.is_causal or masking.keep is not None
    dims = (call.head_dim, call.value_dim)
    shortest = max(crossover(call.degree, dim, is_causal, call.wants_gradient) for dim in dims)
    return min(masking.shape) >= shortest


FORMS: dict[str, Form] = {
    "recurrent": Form(_recurrent_refusal, _recurrent_pays),
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
    takes it in place of "tiled", and "auto" where the call is transformed.

    Raises:
        ValueError: for an unknown backend, or one that was asked for by name and cannot compute the call.
    """
    if backend not in ("auto", *FORMS):
        raise ValueError(f'backend must be "auto" or one of {", ".join(FORMS)}, got {backend!r}')
    if backend != "auto" and (reason := FORMS[backend].refusal(call)):
        raise ValueError(f'backend="{backend}" cannot compute this call: {reason}; use backend="auto"')
    if call.is_transformed and backend not in ("auto", "naive"):
        raise ValueError(
            f'backend="{backend}" cannot compute this call: it has no forward-mode derivative and none of the '
            'transforms of torch.func; use backend="naive"'
        )
    if call.return_weights or call.is_transformed or (backend == "tiled" and torch.compiler.is_compiling()):
        return "naive"
    if backend == "auto":
        backend = next(name for name, form in FORMS.items() if form.suits(call) and not form.refusal(call))
        if not torch.compiler.is_compiling():
            logger.debug("form %s for %s", backend, call)
    return backend
