"""patch_model and its relatives. Everything happens to the instance; no class and no other model is touched."""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activations import (
    change_config,
    check_activation,
    check_options,
    get_activation,
    resolve_config,
    with_own_normalization,
)
from .architectures import get_architecture
from .attention import NAME
from .calibration import Fit, Target
from .calibration import calibrate as calibrate_model
from .coefficient_fit import fit_coefficients
from .config import PolyAttentionConfig
from .forwarding import watch
from .models import (
    PolyModelMixin,
    attach,
    become,
    detach,
    poly_config,
    poly_model_class,
    read_settings,
    states,
    stock_config,
)
from .observing import as_batches
from .patchable import (
    architecture_of,
    base_model,
    check_adapters,
    check_patchable,
    unwrap,
    unwrap_outer,
)
from .state import PolyAttentionState
from .versions import check_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """Which attention of a model is polynomial.

    patched: name of each polynomial attention module -> its number of patched heads.
    softmax: names of the attention modules that are softmax.
    heads: number of heads of each attention module.
    activation, normalization: those of the polynomial modules; None for a stock model.
    """

    patched: Mapping[str, int]
    softmax: tuple[str, ...]
    heads: Mapping[str, int]
    activation: str | None = None
    normalization: str | float | None = None

    @property
    def total(self) -> int:
        return len(self.patched) + len(self.softmax)

    @property
    def counts(self) -> str:
        """Such as "patched 2 of 2 attention modules (8 of 8 heads)"."""
        share = f"{sum(self.patched.values())} of {sum(self.heads.values())} heads"
        return f"patched {len(self.patched)} of {self.total} attention modules ({share})"

    def __str__(self) -> str:
        if self.activation is None:
            return self.counts
        return f"{self.activation}: {self.counts}, normalization {self.normalization}"


def patch_model(
    model: PreTrainedModel,
    activation: str = "poly",
    degree: int | None = None,
    *,
    config: PolyAttentionConfig | Mapping[str, Any] | None = None,
    calibrate: Iterable[Any] | None = None,
    fit: Fit = "gain",
    target: Target = "output_rms",
    budget: float | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replaces softmax in the attention of `model`, in place, and returns it for convenience.

    Args:
        model: a whole Transformers model of a registered architecture (were only model.transformer patched, the model
            around it would save itself as softmax). A patched one is patched anew with these options; learned and
            measured numbers that still mean the same are kept, so that another `backend`, another choice of layers and
            heads or of what is learned loses nothing. Coefficients start anew with another activation, degree or
            init_coefficients; alpha, beta and gain, which fit one function, also with another normalization or
            qk_norm, when they are named anew or calibrated. Parameters of the same shape stay the same objects, so
            that an optimizer goes on with them. The normalization is kept too where the function is
            otherwise the same, unless fit="coefficients" cannot work in it.
        activation: "poly", "monomial" (the paper's s^p / sqrt n), "softmax", "relu", "sigmoid" or a registered name.
        degree: of the polynomial; default 3.
        config: a whole PolyAttentionConfig, or its dictionary such as other.config.polyattn, instead of `activation`,
            `degree` and `options`.
        calibrate: batches (dictionaries of model inputs, or tensors of input ids) on which each head is measured and
            fitted to softmax. For pretrained weights; new ones train best without it.
        fit: of calibration. "coefficients": the polynomial of each head whose output is nearest to softmax's; "gain":
            alpha and gain alone.
        target: of fit="gain". "output_rms", the size of softmax's output, loses least on a pretrained checkpoint and
            is the safe start of a new model; "frobenius", ‖A‖_F = sqrt N, can train better at low learning rates.
        budget: of heads="auto": the share of heads to convert, those that a polynomial fits best; see `choose_heads`.
        **options: fields of PolyAttentionConfig, such as normalization="length", qk_norm=True, layers=[0, 1],
            heads={2: [0, 3]} or "auto", coefficients="monomial". The default normalization of learnable coefficients
            of degree 3 and up is "l1" without `calibrate` and "length" with it; of degrees 1 and 2 and of fixed
            coefficients "length", of s^p "sqrt_length".
    Returns:
        the same object, now an instance of a subclass of its class with a model_type of its own.
    Raises:
        TypeError: for something that is not a Transformers model, for an option that there is not, and for an
            activation or a config that is none.
        ValueError: for an architecture that cannot be patched, a wrapped model, or options or batches that do not fit.

    Example:
        >>> model = patch_model(model, activation="poly", degree=3)
    """
    check_options(options, others=("config", "calibrate", "fit", "target", "budget"))
    if isinstance(config, Mapping):
        config = PolyAttentionConfig.from_dict(config)
    elif config is not None and not isinstance(config, PolyAttentionConfig):
        raise TypeError(f"config must be a PolyAttentionConfig or its dictionary, got {type(config).__name__}")
    batches = None if calibrate is None else as_batches(calibrate, "calibrate")
    if batches is not None and not batches:
        raise ValueError("calibrate= holds no batch: pass a list of a few batches, or leave it out")
    if batches is None and (fit, target) != ("gain", "output_rms"):
        raise ValueError("fit= and target= say how to calibrate: pass calibrate=batches too, or leave them out")
    if options.get("heads") == "auto" or budget is not None:
        if options.get("heads", "auto") != "auto" or batches is None or config is not None:
            raise ValueError('budget= goes with heads="auto" and calibrate=batches, from which it chooses the heads')
        options.pop("heads", None)
        shares = {} if budget is None else {"budget": budget}
        options |= choose_heads(model, batches, activation, degree, **shares, **options)
    if config is None:
        if degree is not None:
            options["degree"] = degree
        if batches is not None and get_activation(activation).is_polynomial:
            # asked to measure, a preset's fixed numbers give way
            options = {"alpha": "auto", "gain": "auto", **options}
        config = resolve_config(activation, calibrated=batches is not None, **options)
        config = _as_before(unwrap(model), config, options, linear=batches is not None and fit == "coefficients")
    elif options or degree is not None or activation != "poly":
        raise ValueError("give either config= or activation, degree and options, not both")
    for report in apply_patch(model, config, batches, fit, target):
        say(report)
    return model


def apply_patch(
    model: PreTrainedModel,
    config: PolyAttentionConfig,
    batches: list[Any] | None = None,
    fit: Fit = "gain",
    target: Target = "output_rms",
) -> list[object]:
    """What patch_model does once the options are a config, without a word; returns what there is to say."""
    check_activation(config)
    check_versions()
    base = unwrap(model)
    check_adapters(model, base, config)
    check_patchable(base, config)
    reports: list[object] = []
    with _undo_on_error(base):
        earlier = states(base)
        before = read_settings(base.config) if isinstance(base, PolyModelMixin) else None
        kept: set[str] = set()
        if isinstance(base, PolyModelMixin):
            _to_softmax(base)
        _to_polynomial(base, config)
        for name, state in states(base).items():
            if name in earlier:
                kept |= state.keep(earlier[name], calibrated=batches is not None)
        if batches is not None:
            reports.append(calibrate_model(base, batches, fit, **({"target": target} if fit == "gain" else {})))
    # only here, where nothing can fail any more: a patch that fails gives the earlier numbers back
    for name, state in states(base).items():
        if name in earlier:
            state.reuse_parameters(earlier[name])
    if batches is not None and fit == "coefficients":
        kept.discard("coefficients")
    return [*reports, f"{coverage(base)}{_what_became_of(before, earlier, config, states(base), kept)}"]


def _what_became_of(
    before: PolyAttentionConfig | None,
    earlier: Mapping[str, PolyAttentionState],
    config: PolyAttentionConfig,
    now: Mapping[str, PolyAttentionState],
    kept: set[str],
) -> str:
    """What a second patch did to the options and the learned or measured numbers of the first; empty for nothing."""
    if before is None:
        return ""
    names = [field.name for field in dataclasses.fields(before)]
    was = [f"{name}={old!r}" for name in names if (old := getattr(before, name)) != getattr(config, name)]
    found = list(dict.fromkeys(name for state in earlier.values() for name in state.found))
    taken = [name for name in found if name in kept]
    rest = [name for name in found if name not in kept]
    new = [name for name in rest if any(hasattr(state, name) for state in now.values())]
    gone = [name for name in rest if name not in new]
    if not was and not new:
        return ""
    lost = sum(len(set(state.heads) - set(now[name].heads if name in now else ())) for name, state in earlier.items())
    if lost and found:
        gone.append(f"all numbers of {lost} heads")
    groups = (("was ", was), ("kept: ", taken), ("new: ", new), ("gone: ", gone))
    return "".join(f"; {what}{', '.join(items)}" for what, items in groups if items)


def _check_unpatched(model: PreTrainedModel) -> None:
    """Raises where a patch for a while would lose the state of an earlier one."""
    if isinstance(base_model(model), PolyModelMixin):
        raise ValueError(
            "the model is patched already: a patch for a while could not give its learned state back; unpatch it first"
        )


def _as_before(
    base: PreTrainedModel, config: PolyAttentionConfig, named: Mapping[str, Any], *, linear: bool
) -> PolyAttentionConfig:
    """`config`, where defaults give way to what the same function of a model patched before has.

    Its normalization, which goes with its numbers; and alpha and gain that it was calibrated with, for a preset's.
    linear: as of `with_own_normalization`.
    """
    if not isinstance(base, PolyModelMixin):
        return config
    own = read_settings(base.config)
    config = with_own_normalization(config, own, named, linear=linear)
    if not config.computes_like(own):
        return config
    measured = {name: "auto" for name in ("alpha", "gain") if getattr(own, name) == "auto" and name not in named}
    return change_config(config, **measured)


def set_backend(model: PreTrainedModel, backend: str) -> PreTrainedModel:
    """Changes the form of the operation of a patched model, in place, and nothing else; returns it for convenience.

    All options and all numbers stay, also those that a PEFT adapter trains.

    Args:
        model: a patched model, or a PEFT model around one.
        backend: "auto", "recurrent", "cpu", "fused", "tiled" or "naive"; it is saved with the model.
    Raises:
        TypeError: for something that is not a Transformers model.
        ValueError: for a model that is not patched, a wrapped one, an unknown backend, or one that cannot compute the
            model's activation. A form that cannot compute a certain input says so when it is called.

    Example:
        >>> model = set_backend(model, "naive")
    """
    base = unwrap_outer(model)
    if not isinstance(base, PolyModelMixin):
        raise ValueError(f"{type(base).__name__} is not patched: call patch_model first")
    before = read_settings(base.config)
    settings = change_config(before, backend=backend)
    check_activation(settings)
    changed = copy.deepcopy(base.config)
    setattr(changed, NAME, settings.to_dict())
    _swap_config(model, base.config, changed)
    for module in base.modules():
        # not by `states`: an adapter keeps copies, and all of them compute from time to time
        if isinstance(module, PolyAttentionState):
            module.config = settings
    say(f"backend {backend} instead of {before.backend}; everything else stays")
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the stock class, the stock config and softmax back, in place; weights other than `polyattn.*` stay.

    Raises:
        ValueError: when the model is not patched.
    """
    base = unwrap(model)
    if not isinstance(base, PolyModelMixin):
        raise ValueError(f"{type(base).__name__} is not patched: there is nothing to undo")
    _to_softmax(base)
    return model


@contextlib.contextmanager
def patched(
    model: PreTrainedModel, activation: str = "poly", degree: int | None = None, **kwargs: Any
) -> Iterator[PreTrainedModel]:
    """`patch_model` for the length of a with block; the model comes out as it went in."""
    _check_unpatched(model)
    patch_model(model, activation, degree, **kwargs)
    try:
        yield model
    finally:
        unpatch_model(model)


def choose_heads(
    model: PreTrainedModel,
    batches: Iterable[Any],
    activation: str = "poly",
    degree: int | None = None,
    *,
    budget: float = 0.75,
    **options: Any,
) -> dict[str, Any]:
    """Which heads to convert: those that a fitted polynomial follows best, by R2; the hardest stay softmax.

    Args:
        model: a softmax model; it stays as it is.
        batches: as in `patch_model`.
        budget: share of the heads to convert.
        **options: fields of PolyAttentionConfig. With layers= the share is of the heads of these layers.
    Returns:
        the options `layers` and `heads` of patch_model. Layers without a chosen head are left out.
    Raises:
        ValueError: for a budget that is not a share, and as `patch_model` and `fit_coefficients` do.

    Example:
        >>> patch_model(model, degree=3, calibrate=batches, **choose_heads(model, batches, degree=3, budget=0.75))
    """
    batches = as_batches(batches)
    if degree is not None:
        options["degree"] = degree
    config = resolve_config(activation, calibrated=True, **{"alpha": "auto", "gain": "auto", **options})
    _check_unpatched(model)
    # in silence: what is patched here to be measured is not what the caller gets
    apply_patch(model, config)
    try:
        return fit_coefficients(base_model(model), batches).easiest(budget)
    finally:
        unpatch_model(model)


def coverage(model: nn.Module) -> Coverage:
    """Counts, by module and by head, what is polynomial and what is softmax. Print it."""
    base = base_model(model)
    entry = architecture_of(base)
    patched_heads, softmax, heads = {}, [], {}
    for name, module in entry.attention_modules(base):
        heads[name] = entry.num_heads(module)
        state = getattr(module, NAME, None)
        if state is None:
            softmax.append(name)
        else:
            patched_heads[name] = heads[name] if state.chosen is None else len(state.chosen)
    if not isinstance(base, PolyModelMixin):
        return Coverage(patched_heads, tuple(softmax), heads)
    settings = read_settings(base.config)
    return Coverage(patched_heads, tuple(softmax), heads, settings.activation, settings.normalization)


def _to_polynomial(model: Any, settings: PolyAttentionConfig) -> None:
    model._polyattn_before = (model.config._attn_implementation, model.name_or_path)
    # an adapter trained from here on must not name the stock checkpoint as its base: it would load there in silence
    model.name_or_path = ""
    _swap_config(model, model.config, poly_config(model.config, settings))
    become(model, poly_model_class(type(model)))
    attach(model, settings, has_weights=True)
    _set_tags(model, [*(model.model_tags or ()), NAME])


def _to_softmax(model: Any) -> None:
    # a model that was loaded polynomial leaves no stock checkpoint behind: its folder would load as polynomial
    default = ("sdpa" if model._supports_sdpa else "eager", "")
    implementation, model.name_or_path = model.__dict__.pop("_polyattn_before", default)
    detach(model)
    _swap_config(model, model.config, stock_config(model.config, implementation))
    _set_tags(model, [tag for tag in model.model_tags or () if tag != NAME])


def _set_tags(model: PreTrainedModel, tags: list[str]) -> None:
    if tags:
        model.model_tags = tags
    else:
        # back to the attribute of the class
        model.__dict__.pop("model_tags", None)


def _swap_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Every module of this model that holds the old config gets the new one; other models that share it do not."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            setattr(module, "config", new)  # noqa: B010  a plain attribute, though modules may declare others


@contextlib.contextmanager
def _undo_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A failed patch leaves the model as it was: stock, or with the state that an earlier patch has learned."""
    classes = {inner: type(inner) for inner in model.modules() if isinstance(inner, PreTrainedModel)}
    config, tags = model.config, list(model.model_tags or ())
    own: dict[str, Any] = {
        name: model.__dict__[name] for name in ("_polyattn_before", "name_or_path") if name in model.__dict__
    }
    hosts = [module for _, module in get_architecture(config).attention_modules(model)]
    earlier = {module: module._modules[NAME] for module in hosts if hasattr(module, NAME)}
    try:
        yield
    except BaseException:
        if isinstance(model, PolyModelMixin):
            _to_softmax(model)
        for inner, cls in classes.items():
            inner.__class__ = cls
        if isinstance(model, PolyModelMixin):
            watch(model)
        _swap_config(model, model.config, config)
        _set_tags(model, tags)
        model.__dict__.update(own)
        for module, state in earlier.items():
            module.add_module(NAME, state)
        raise


def say(report: object) -> None:
    """Logs what was done, and shows it to those who have not set logging up."""
    package = logging.getLogger(__package__)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    logger.info("%s", report)
