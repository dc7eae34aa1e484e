"""What a patched model computes, as one frozen description: validated once, saved as it is. No torch here."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

NORMALIZATIONS = ("sqrt_length", "length", "sum", "l1", "l2", "none")
NORMALIZED = ("sum", "l1", "l2")
"""Those that divide by a sum over the row's weights: the output is not linear in the coefficients."""
COEFFICIENTS = ("learnable", "monomial")
BACKENDS = ("auto", "recurrent", "cpu", "fused", "tiled", "naive")
MAX_DEGREE = 16


@dataclass(frozen=True)
class PolyAttentionConfig:
    """Describes the attention of a patched model. See `docs/definition.md` for the formula.

    Made by hand it has the defaults below, those of "poly"; `patch_model` and the recipes start from those of the
    activation that they are given.

    weight_ij = gain_h * phi(alpha_h * s_ij + beta_h) / Z_i for the keys that row i may attend to, 0 elsewhere.
    """

    activation: str = "poly"
    """A registered name: "poly", "monomial" (the paper's form), "softmax", "relu", "sigmoid" or your own."""
    degree: int = 3
    """Degree p of the polynomial, 1 to 16. Ignored by activations that are not polynomials."""
    coefficients: str | tuple[float, ...] = "learnable"
    """"learnable": c_0..c_p for each head, trained; "monomial": phi(s) = s^p; or p + 1 fixed numbers c_0..c_p."""
    init_coefficients: tuple[float, ...] | None = None
    """Where learnable coefficients start, c_0..c_p. None: the default of `activations.default_start`."""
    normalization: str | float = ""
    """Z_i: "sqrt_length", "length", "sum", "l1", "l2", "none", or a positive constant such as 14. Empty becomes what
    `default_normalization` names; `patch_model` gives a polynomial that it calibrates "length" instead."""
    alpha: float | Literal["auto"] = "auto"
    """Factor of the score. "auto": one over the score spread where it is measured; where it is estimated from the
    weights, one over the root of it, and under "sqrt_length" over the whole."""
    beta: float = 0.0
    """Shift of the scaled score."""
    gain: float | Literal["auto"] = "auto"
    """Factor of the weight. "auto": set by calibration, or the analytic gain for unit Gaussian scores."""
    learn_gain: bool = False
    """Train one gain for each head."""
    learn_affine: bool = False
    """Train alpha and beta of each head."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, without parameters: bounds |s| by scaling * head_dim."""
    layers: tuple[int, ...] | None = None
    """Attention modules to patch, negative numbers count from the end; the others stay softmax. None: all."""
    heads: Mapping[int, tuple[int, ...]] | None = None
    """Heads to patch by layer index; the other heads of such a layer stay softmax. Layers not named: all heads."""
    backend: str = "auto"
    """Form of the operation: "auto", "recurrent", "cpu", "fused", "tiled" or "naive". With output_attentions, and for
    "tiled" in a compiled graph, it is "naive" all the same: see `ops.forms`."""

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  frozen, so set through object
        if isinstance(self.coefficients, Iterable) and not isinstance(self.coefficients, str):
            put("coefficients", _floats("coefficients", self.coefficients))
        if self.init_coefficients is not None:
            put("init_coefficients", _floats("init_coefficients", self.init_coefficients))
        if self.layers is not None:
            put("layers", tuple(sorted(_ints("layers", self.layers))))
        if self.heads is not None:
            put("heads", _heads(self.heads))
        if isinstance(self.normalization, int) and not isinstance(self.normalization, bool):
            put("normalization", float(self.normalization))
        self._validate()
        if self.normalization == "":
            # of others, `activations` knows which are polynomials
            is_poly = self.activation in ("poly", "monomial")
            put("normalization", default_normalization(self.coefficients, self.degree) if is_poly else "length")

    def _validate(self) -> None:
        if not isinstance(self.activation, str) or not self.activation:
            raise ValueError(f"activation must be the name of a registered activation, got {self.activation!r}")
        if not isinstance(self.degree, int) or isinstance(self.degree, bool) or not 1 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"degree must be an integer from 1 to {MAX_DEGREE}, got {self.degree!r}")
        if not isinstance(self.coefficients, tuple) and self.coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients must be one of {COEFFICIENTS} or numbers, got {self.coefficients!r}")
        for name in ("coefficients", "init_coefficients"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != self.degree + 1:
                    raise ValueError(f"degree {self.degree} needs {self.degree + 1} {name}, got {len(value)}: {value}")
                if not all(math.isfinite(c) for c in value):
                    raise ValueError(f"{name} must be finite, got {value}")
        if self.init_coefficients is not None and self.coefficients != "learnable":
            raise ValueError(
                'init_coefficients is where learnable coefficients start: it needs coefficients="learnable"'
            )
        if isinstance(self.normalization, str):
            if self.normalization not in ("", *NORMALIZATIONS):
                raise ValueError(
                    f"normalization must be one of {NORMALIZATIONS} or a number, got {self.normalization!r}"
                )
        elif not (isinstance(self.normalization, float) and 0 < self.normalization < math.inf):
            raise ValueError(f"a constant normalization must be a positive number, got {self.normalization!r}")
        for name in ("alpha", "gain"):
            value = getattr(self, name)
            if value != "auto" and not (_is_number(value) and math.isfinite(value) and value != 0):
                raise ValueError(f'{name} must be "auto" or a finite number other than 0, got {value!r}')
        if not (_is_number(self.beta) and math.isfinite(self.beta)):
            raise ValueError(f"beta must be a finite number, got {self.beta!r}")
        for name in ("learn_gain", "learn_affine", "qk_norm"):
            # "no" from a command line would count as True
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty: nothing would be patched; leave it None to patch all layers")

    def __hash__(self) -> int:
        # a mapping has no hash of its own
        heads = None if self.heads is None else frozenset(self.heads.items())
        values = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "heads")
        return hash((*values, heads))

    def computes_like(self, other: "PolyAttentionConfig") -> bool:
        """Whether alpha, beta, gain and coefficients of one mean the same in the other.

        What is learned, which layers and heads are patched and the form of the operation may differ.
        """
        names = ("activation", "degree", "coefficients", "init_coefficients", "normalization", "qk_norm")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` gives an equal config back."""
        out = dataclasses.asdict(self)
        if self.heads is not None:
            out["heads"] = {str(layer): list(heads) for layer, heads in self.heads.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PolyAttentionConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: for an unknown field, which a newer version of the package may have written.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown polyattn fields {unknown}: was this written by a newer hf_polyattn? Upgrade it")
        return cls(**values)


def default_normalization(coefficients: str | tuple[float, ...], degree: int) -> str:
    """What suits a polynomial where nobody says it and no data is at hand; `docs/definition.md` says why.

    "sqrt_length" is the form of the paper, s^p. "l1" trains best from scratch on the models that were tried: its
    weights stay bounded whatever the scores do. Degrees 1 and 2 take "length", which their linear-cost form needs, and
    so do fixed numbers, whose size is the caller's.
    """
    if coefficients == "monomial":
        return "sqrt_length"
    return "l1" if coefficients == "learnable" and degree >= 3 else "length"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _floats(name: str, values: Any) -> tuple[float, ...]:
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers c_0, c_1, ... c_p, such as (0, 1, 0.5), got {values!r}") from None


def _ints(name: str, values: Any) -> list[int]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of integers such as [0, 1], got {values!r}")
    values = list(values)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be integers, got {values}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name} has repeated entries: {values}")
    return values


def _heads(heads: Mapping[Any, Iterable[int]]) -> dict[int, tuple[int, ...]]:
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"heads must map layer indices to head indices, for example {{0: [1, 2]}}, got {heads!r}")
    try:
        by_layer = {int(layer): chosen for layer, chosen in heads.items()}
    except (TypeError, ValueError):
        raise ValueError(f"heads must map layer indices to head indices, got the layers {list(heads)}") from None
    out = {layer: tuple(sorted(_ints(f"heads[{layer}]", chosen))) for layer, chosen in by_layer.items()}
    if empty := [layer for layer, chosen in out.items() if not chosen]:
        raise ValueError(f"heads is empty for layers {empty}: leave such layers out with layers= instead")
    return out
