"""The second door: one self-contained modeling_polyattn.py beside the weights, for people without this package.

It is a template (templates/modeling_polyattn.py.jinja) filled with what one configuration needs: its formula, its
classes, nothing else. config.json points to it by `auto_map`, so that `trust_remote_code=True` finds it. Where this
package is imported, Transformers prefers the registered classes and never reads the file.
"""

import hashlib
import json
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from ._version import __version__
from .activations import get_activation, relu, row_softmax, sigmoid
from .architectures import get_architecture
from .config import PolyAttentionConfig
from .ops.normalization import EPS
from .rendering import render
from .state import PolyAttentionState

logger = logging.getLogger(__name__)

FILE = "modeling_polyattn.py"
_MODULE = FILE.removesuffix(".py")
_TEMPLATE = FILE + ".jinja"

_PHI: dict[Any, tuple[str, str]] = {
    relu: ("max(0, x)", "x.clamp(min=0)"),
    sigmoid: ("1 / (1 + exp(log n_i - x))", "torch.sigmoid(x - n.log())"),
    row_softmax: ("exp(x - max_j x)", "(x - x.amax(-1, keepdim=True).detach()).exp()"),
}
"""phi -> (as a formula, as code of x and n)."""
_DIVISORS: dict[str | float, tuple[str, str]] = {
    "sqrt_length": ("sqrt(n_i)", "n.sqrt()"),
    "length": ("n_i", "n"),
    "sum": (f"{EPS} + sum_j phi", f"({EPS} + phi.sum(-1, keepdim=True))"),
    "l1": (f"{EPS} + sum_j abs(phi)", f"({EPS} + phi.abs().sum(-1, keepdim=True))"),
    "l2": (f"sqrt({EPS} + sum_j phi^2)", f"({EPS} + phi.square().sum(-1, keepdim=True)).sqrt()"),
    "none": ("1", "1.0"),
}
"""normalization -> (as a formula, as code of n and phi)."""


def write_remote_code(
    config: PretrainedConfig, settings: PolyAttentionConfig, autos: Mapping[str, str], folder: Path
) -> dict[str, str]:
    """Writes FOLDER/modeling_polyattn.py and returns the `auto_map` that points to it.

    Args:
        config: a polynomial configuration; its class names the stock one.
        settings: what its attention computes.
        autos: Auto class -> stock model class, for example {"AutoModelForCausalLM": "GPT2LMHeadModel"}.
    Returns:
        an empty dictionary, after a warning, when the model cannot do without the package: then no file is left there.
    """
    path = folder / FILE
    if reason := why_not(config, settings):
        logger.warning(
            "no %s was written: %s. The model loads where hf_polyattn is imported, not with trust_remote_code",
            FILE,
            reason,
        )
        path.unlink(missing_ok=True)
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(remote_code(config, settings, autos), encoding="utf-8")
    return auto_map_of(config, autos)


def auto_map_of(config: PretrainedConfig, autos: Mapping[str, str]) -> dict[str, str]:
    """Auto class -> "modeling_polyattn.PolyXxx"."""
    names = {"AutoConfig": type(config).__name__, **{auto: f"Poly{stock}" for auto, stock in autos.items()}}
    return {auto: f"{_MODULE}.{name}" for auto, name in names.items()}


def without_ours(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an `auto_map` that point elsewhere, such as to somebody's tokenizer."""
    return {auto: name for auto, name in (auto_map or {}).items() if f"{_MODULE}." not in str(name)}


def why_not(config: Any, settings: PolyAttentionConfig) -> str:
    """Why no file can stand in for the package; empty when one can."""
    entry = get_activation(settings.activation)
    if not entry.is_polynomial and entry.phi not in _PHI:
        return f"activation {settings.activation!r} is a function of yours, which cannot be copied"
    architecture = get_architecture(config)
    if not architecture.is_plain:
        return f"architecture {architecture.model_type!r} was registered with functions of its own"
    if not hasattr(transformers, stock := config.stock_class.__name__):
        return f"{stock} is not a class of transformers"
    return ""


def remote_code(config: Any, settings: PolyAttentionConfig, autos: Mapping[str, str]) -> str:
    """The text of modeling_polyattn.py; arguments as of `write_remote_code`."""
    entry = get_activation(settings.activation)
    state = PolyAttentionState(settings, 1)
    models = sorted(set(autos.values()))
    formula, divisor = formulas(settings)
    learned = [("alpha", settings.learn_affine), ("beta", settings.learn_affine), ("gain", settings.learn_gain)]
    if state.has_coefficients:
        learned.append(("coefficients", settings.coefficients == "learnable"))
    values: dict[str, Any] = {
        "version": __version__,
        "model_type": config.model_type,
        "stock_type": config.stock_class.model_type,
        "auto_class": documented_auto_class([n.removeprefix("Poly") for n in config.architectures or []], autos),
        "stock_config": config.stock_class.__name__,
        "stock_text": _wrapped(sorted([config.stock_class.__name__, *models])),
        "model_classes": models,
        "config_class": type(config).__name__,
        "auto_map": auto_map_of(config, autos),
        "attention_text": _literal(get_architecture(config).attention_classes),
        "settings": settings,
        # as it will be read back: lists and text keys
        "settings_text": _dictionary(json.loads(json.dumps(config.polyattn))),
        "formula": formula,
        "phi": _PHI[entry.phi][1] if entry.phi in _PHI else "",
        "divisor": divisor,
        "divisor_code": _DIVISORS.get(settings.normalization, ("", f"{settings.normalization}"))[1],
        "is_polynomial": entry.is_polynomial,
        "has_coefficients": state.has_coefficients,
        "is_shifted": not state.is_plain_power,
        "masked": "-1e30" if entry.exponential else "0",
        "tensors_text": _literal(dict(learned)),
        "start_alpha": _start_alpha(settings),
        "gain": state.analytic_gain() if settings.gain == "auto" else settings.gain,
        "start_text": textwrap.fill(f"START = {list(state.start)}", 110) if state.has_coefficients else "",
        "has_softmax": settings.layers is not None or settings.heads is not None,
        "layers": None if settings.layers is None else list(settings.layers),
        "heads": {layer: list(heads) for layer, heads in (settings.heads or {}).items()},
    }
    digest = hashlib.sha256(render(_TEMPLATE, digest="", **values).encode()).hexdigest()[:8]
    return render(_TEMPLATE, digest=digest, **values)


def _start_alpha(settings: PolyAttentionConfig) -> str:
    """Python for what `PolyAttentionState.analytic_alpha` is, or for the number that the caller named."""
    if settings.alpha != "auto":
        return str(settings.alpha)
    return "1 / self.spread" if settings.normalization == "sqrt_length" else "self.spread**-0.5"


def formulas(settings: PolyAttentionConfig) -> tuple[str, str]:
    """phi(x) and Z_i as text, for people."""
    entry = get_activation(settings.activation)
    divisor = _DIVISORS.get(settings.normalization, (f"{settings.normalization}",))[0]
    if entry.phi is not None:
        return _PHI.get(entry.phi, (f"{settings.activation}(x)",))[0], divisor
    if settings.coefficients == "monomial":
        return f"x^{settings.degree}", divisor
    terms = " + ".join(["c_0", "c_1 x", *(f"c_{k} x^{k}" for k in range(2, settings.degree + 1))])
    return f"{terms}, {'learned' if settings.coefficients == 'learnable' else 'fixed'} for each head", divisor


def _dictionary(values: Mapping[str, Any]) -> str:
    return "\n".join(["{", *(f"    {_literal(key)}: {_literal(value)}," for key, value in values.items()), "}"])


def _wrapped(names: Sequence[str]) -> str:
    return textwrap.fill(", ".join(names) + ",", 110, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _literal(value: Any) -> str:
    return repr(value).replace("'", '"')


def documented_auto_class(stock: Sequence[str], autos: Mapping[str, str]) -> str:
    """The Auto class that loads models of the classes `stock`; AutoModel where there are none."""
    fitting = [auto for auto, name in autos.items() if name in stock]
    # stands for a whole family of tasks, and says least
    return min(fitting, key=lambda auto: auto == "AutoModelForPreTraining", default="AutoModel")
