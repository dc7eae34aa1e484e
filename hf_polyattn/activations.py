"""The registry of activations: what stands between scores and weights, and how each one starts.

An activation is an element-wise function phi(scores, lengths). Masking, gain and normalization are the
operation's business (`ops.naive`), so that every activation obeys the same rules.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from .config import NORMALIZED, PolyAttentionConfig, default_normalization

Phi = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [B, H, T, S], row lengths [B or 1, H or 1, T, 1]) -> values of the scores' shape."""


@dataclass(frozen=True)
class Activation:
    """One entry of the registry.

    phi: element-wise function, None for polynomials (their coefficients live on the model).
    defaults: fields of PolyAttentionConfig that this activation starts from; what the caller names wins.
    exponential: subtract the row's maximum before phi, as softmax needs.
    """

    name: str
    phi: Phi | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    exponential: bool = False

    @property
    def is_polynomial(self) -> bool:
        return self.phi is None


_REGISTRY: dict[str, Activation] = {}


def register_activation(
    name: str,
    phi: Phi | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    exponential: bool = False,
    exist_ok: bool = False,
) -> Activation:
    """Make `patch_model(model, activation=name)` work.

    Args:
        name: the word users write; it is saved in checkpoints, so it must be registered again before they are loaded.
        phi: element-wise function of (scores, row lengths), differentiable by autograd. None: a polynomial preset.
        defaults: config fields that differ from PolyAttentionConfig's own defaults, for example
            `{"normalization": "length"}`.
        exponential: subtract each row's maximum score first (only correct under normalization "sum").
    Raises:
        TypeError: when phi is no function.
        ValueError: when the name is taken and `exist_ok` is False.

    Example:
        >>> entry = register_activation("silu", lambda s, n: torch.nn.functional.silu(s),
        ...                             defaults={"normalization": "length"}, exist_ok=True)
    """
    if name in _REGISTRY and not exist_ok:
        raise ValueError(f"activation {name!r} is already registered; pass exist_ok=True to replace it")
    if phi is not None and not callable(phi):
        raise TypeError(f"phi must be a function of (scores, row lengths), or None for a polynomial, got {phi!r}")
    entry = Activation(name, phi, dict(defaults or {}), exponential)
    resolve_config(entry)  # a bad default must fail here, not in the first model that is patched
    _REGISTRY[name] = entry
    return entry


def get_activation(name: str) -> Activation:
    """Raises ValueError, with the names there are, when `name` is unknown, and TypeError for what is no name."""
    if not isinstance(name, str):
        raise TypeError(f'activation must be a name such as "poly", got {name!r}; of a polynomial, pass degree=3')
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown activation {name!r}; registered: {', '.join(sorted(_REGISTRY))}. "
            "Call hf_polyattn.register_activation before patching or loading"
        )
    return _REGISTRY[name]


def resolve_config(entry: Activation | str, *, calibrated: bool = False, **options: Any) -> PolyAttentionConfig:
    """The config of an activation: its defaults, overridden by `options`.

    calibrated: it will be fitted to softmax on data. The default normalization of "poly" is "length" then: there the
    output is linear in the coefficients, without which they cannot be fitted.

    Raises:
        TypeError: for the name of an option that there is not, with the nearest one.
    """
    check_options({*options, *(entry.defaults if isinstance(entry, Activation) else ())})
    if not isinstance(entry, Activation):
        entry = get_activation(entry)
    values = {"activation": entry.name, **entry.defaults, **options}
    if not entry.is_polynomial:
        if set(options) & {"coefficients", "init_coefficients"}:
            raise ValueError(f'activation {entry.name!r} has no coefficients; use activation="poly"')
        if "degree" in options:
            raise ValueError(f'activation {entry.name!r} has no degree: leave degree out, or use activation="poly"')
        values.setdefault("coefficients", "monomial")
    elif isinstance(values.get("coefficients"), (tuple, list)) and "degree" not in options:
        values["degree"] = len(values["coefficients"]) - 1
    is_named = values.get("normalization", "") != ""
    config = PolyAttentionConfig(**values)
    if not is_named and entry.is_polynomial:
        default = default_normalization(config.coefficients, config.degree)
        linear = "length" if calibrated and config.coefficients != "monomial" else default
        config = dataclasses.replace(config, normalization=linear)
    _check_fit(entry, config)
    return config


def check_options(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raises TypeError for a name that is neither a field of PolyAttentionConfig nor one of `others`."""
    known = [*(field.name for field in dataclasses.fields(PolyAttentionConfig)), *others]
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TypeError(f"no option {name!r}; {hint}The options are {', '.join(sorted(known))}")


def change_config(config: PolyAttentionConfig, **options: Any) -> PolyAttentionConfig:
    """`config` with `options` instead of its own; a start of coefficients that are no longer its own gives way."""
    values = config.to_dict()
    if {"degree", "coefficients"} & set(options):
        values["init_coefficients"] = None
    if isinstance(options.get("coefficients"), (tuple, list)):
        values["degree"] = len(options["coefficients"]) - 1
    return PolyAttentionConfig.from_dict({**values, **options})


def with_own_normalization(
    config: PolyAttentionConfig, own: PolyAttentionConfig, named: Mapping[str, Any], *, linear: bool = False
) -> PolyAttentionConfig:
    """`config` with the normalization that the same function has in `own` already, where nobody named another.

    linear: coefficients will be fitted, which leaves no number that goes with the old normalization: one in which the
    output is not linear in them is not kept.
    """
    if named.get("normalization") or (linear and own.normalization in NORMALIZED):
        return config
    kept = change_config(config, normalization=own.normalization)
    return kept if kept.computes_like(own) else config


def check_activation(config: PolyAttentionConfig) -> Activation:
    """The entry that a config names; ValueError when it is unknown or the config does not fit it."""
    entry = get_activation(config.activation)
    _check_fit(entry, config)
    return entry


def _check_fit(entry: Activation, config: PolyAttentionConfig) -> None:
    if config.normalization == "sum" and entry.is_polynomial and (why := _mixed_sign(config)):
        raise ValueError(
            f'normalization "sum" needs weights of one sign, and {why}: rows could sum to zero. '
            'Use "l1" or "l2", or fixed coefficients of a polynomial that is nowhere negative, such as (0, 0, 1)'
        )
    if entry.exponential and config.normalization != "sum":
        raise ValueError(
            f'activation {entry.name!r} is computed relative to each row\'s maximum, which only normalization "sum" '
            f"cancels; got {config.normalization!r}"
        )
    if not entry.is_polynomial and config.backend not in ("auto", "naive"):
        raise ValueError(
            f'the {config.backend} form knows polynomials only: use backend="auto" for activation {entry.name!r}'
        )


def _mixed_sign(config: PolyAttentionConfig) -> str:
    """Why the polynomial of a config may take both signs; empty where it cannot."""
    if config.coefficients == "learnable":
        return "learnable coefficients may take any sign"
    if config.coefficients == "monomial":
        return f"degree {config.degree} is odd" if config.degree % 2 else ""
    numbers = cast(tuple[float, ...], config.coefficients)
    return "" if never_negative(numbers) else f"the polynomial {numbers} falls below 0, or is 0 throughout"


def never_negative(coefficients: Sequence[float]) -> bool:
    """Whether sum_k c_k x^k >= 0 for every real x: even degree, positive top, and no minimum below 0.

    What float32 cannot tell from 0 counts as 0, so that (1 + x / 3)^4, expanded, is accepted.

    >>> never_negative((1, 1, 0.375, 0.0625, 0.00390625)), never_negative((0, 1, 0.29))
    (True, False)
    """
    trimmed = np.trim_zeros(np.asarray(coefficients, dtype=np.float64), "b")
    # the degree is even where the number of coefficients is odd
    if len(trimmed) % 2 == 0 or trimmed[-1] < 0:
        return False
    polynomial = np.polynomial.Polynomial(trimmed)
    # a multiple root comes out as a cluster off the real axis: its real parts are as near to the minimum
    extrema = np.append(polynomial.deriv().roots().real, 0.0)
    terms = np.polynomial.Polynomial(np.abs(polynomial.coef))(np.abs(extrema))
    return bool(np.all(polynomial(extrema) >= -1e-6 * terms))


def horner(scores: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """sum_k c_k s^k for each head: scores [B, H, T, S], coefficients [H, p + 1]."""
    c = coefficients.to(scores.dtype).view(1, coefficients.shape[0], 1, 1, -1)
    out = c[..., -1].expand_as(scores)
    for k in range(coefficients.shape[1] - 2, -1, -1):
        out = out * scores + c[..., k]
    return out


def power(scores: torch.Tensor, degree: int) -> torch.Tensor:
    """s^p by multiplication: torch's pow is fast for exponents 2 and 3 only."""
    out = scores
    for bit in bin(degree)[3:]:
        out = out * out
        if bit == "1":
            out = out * scores
    return out


def frobenius_gain(degree: int) -> float:
    """Gain of s^p that makes E||A||_F^2 = N under "sqrt_length" for scores ~ N(0, 1): E s^(2p) = (2p - 1)!!."""
    return 1 / math.sqrt(math.prod(range(1, 2 * degree, 2)))


def default_start(degree: int) -> tuple[float, ...]:
    """Where learnable coefficients of the unit-spread score start: as the polynomial nearest to exp(s - 1/2).

    Nearest in the mean square over s ~ N(0, 1): sum_(k <= p) He_k(s) / k! with Hermite's polynomials, in powers of s.
    Its mean over such scores is 1, so that rows sum to about 1 under "length", as softmax's do. Degree 3 is
    (2 + (1 + s)^3) / 6, which rises everywhere; degree 2 is (1 + s)^2 / 2.
    """
    return tuple(
        sum((-0.5) ** m / math.factorial(m) for m in range((degree - j) // 2 + 1)) / math.factorial(j)
        for j in range(degree + 1)
    )


def start_gain(degree: int) -> float:
    """`frobenius_gain` for the polynomial of `default_start`: its mean square is sum_(k <= p) 1 / k!."""
    return 1 / math.sqrt(sum(1 / math.factorial(k) for k in range(degree + 1)))


def row_softmax(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return scores.exp()


def relu(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return scores.clamp(min=0)


def sigmoid(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """sigmoid(s - log n): the bias that gives a row the mass of softmax (arXiv 2409.04431)."""
    return torch.sigmoid(scores - lengths.to(scores.dtype).log())


_PLAIN = {"alpha": 1.0, "gain": 1.0}
register_activation("poly")
register_activation("monomial", defaults={"coefficients": "monomial", "normalization": "sqrt_length", **_PLAIN})
register_activation("softmax", row_softmax, defaults={"normalization": "sum", **_PLAIN}, exponential=True)
register_activation("relu", relu, defaults={"normalization": "length", **_PLAIN})
register_activation("sigmoid", sigmoid, defaults={"normalization": "none", **_PLAIN})
