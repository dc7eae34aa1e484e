"""patch_model and its relatives. Everything happens to the instance; no class and no other model is touched."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activations import check_activation, get_activation, resolve_config
from .architectures import get_architecture
from .attention import NAME
from .calibration import Target, calibrate_gain
from .config import PolyAttentionConfig
from .models import (
    PolyModelMixin,
    attach,
    become,
    chosen_heads,
    chosen_layers,
    detach,
    poly_config,
    poly_model_class,
    read_settings,
    stock_config,
)
from .state import PolyAttentionState

logger = logging.getLogger(__name__)

TESTED_TRANSFORMERS = ("5.23", "6")
"""From this version of transformers on, and below that one."""


@dataclass(frozen=True)
class Coverage:
    """Which attention of a model is polynomial.

    patched: name of each polynomial attention module -> its number of patched heads.
    softmax: names of the attention modules that are softmax.
    heads: number of heads of each attention module.
    """

    patched: Mapping[str, int]
    softmax: tuple[str, ...]
    heads: Mapping[str, int]
    activation: str | None = None

    @property
    def total(self) -> int:
        return len(self.patched) + len(self.softmax)

    def __str__(self) -> str:
        heads = sum(self.patched.values())
        share = f"{heads} of {sum(self.heads.values())} heads"
        what = f"{self.activation}: " if self.activation else ""
        return f"{what}patched {len(self.patched)} of {self.total} attention modules ({share})"


def patch_model(
    model: PreTrainedModel,
    activation: str = "poly",
    degree: int | None = None,
    *,
    config: PolyAttentionConfig | None = None,
    calibrate: Iterable[Any] | None = None,
    target: Target = "output_rms",
    **options: Any,
) -> PreTrainedModel:
    """Replaces softmax in the attention of `model`, in place, and returns it for convenience.

    Args:
        model: a whole Transformers model of a registered architecture (were only model.transformer patched, the model
            around it would save itself as softmax). A patched one is patched anew with these options.
        activation: "poly", "monomial" (the paper's s^p / sqrt n), "softmax", "relu", "sigmoid" or a registered name.
        degree: of the polynomial; default 3.
        config: a whole PolyAttentionConfig instead of `activation`, `degree` and `options`.
        calibrate: batches (dictionaries of model inputs, or tensors of input ids) from which the score spread and the
            size of softmax's output are measured for each head; alpha and gain are set from them.
        target: of calibration. "output_rms", the size of softmax's output, loses least on a pretrained checkpoint;
            "frobenius", ‖A‖_F = sqrt N, trains better from scratch.
        **options: fields of PolyAttentionConfig, such as normalization="length", qk_norm=True, layers=[0, 1],
            heads={2: [0, 3]}, coefficients="monomial".
    Returns:
        the same object, now an instance of a subclass of its class with a model_type of its own.
    Raises:
        TypeError: for something that is not a Transformers model.
        ValueError: for an architecture that cannot be patched, a wrapped model, or options that do not fit.

    Example:
        >>> model = patch_model(model, activation="poly", degree=3)
    """
    if config is None:
        if degree is not None:
            options["degree"] = degree
        if calibrate is not None and get_activation(activation).is_polynomial:
            # asked to measure, a preset's fixed numbers give way
            options = {"alpha": "auto", "gain": "auto", **options}
        config = resolve_config(activation, **options)
    elif options or degree is not None or activation != "poly":
        raise ValueError("give either config= or activation, degree and options, not both")
    check_activation(config)
    check_transformers(transformers.__version__)
    base = unwrap(model)
    check_adapters(model, base, config)
    check_patchable(base, config)
    batches = None if calibrate is None else list(calibrate)
    if batches is not None and not batches:
        raise ValueError("calibrate= holds no batch: pass a list of a few batches, or leave it out")

    with _undo_on_error(base):
        if isinstance(base, PolyModelMixin):
            _to_softmax(base)
        _to_polynomial(base, config)
        if batches is not None:
            _say(calibrate_gain(base, batches, target=target))
    _say(coverage(base))
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
) -> Iterator[Any]:
    """`patch_model` for the length of a with block; the model comes out as it went in."""
    base = _base_model(model)
    if isinstance(base, PolyModelMixin):
        raise ValueError(
            "the model is patched already: patched() could not give its learned state back; unpatch it first"
        )
    patch_model(model, activation, degree, **kwargs)
    try:
        yield model
    finally:
        unpatch_model(model)


def coverage(model: nn.Module) -> Coverage:
    """Counts, by module and by head, what is polynomial and what is softmax. Print it."""
    base = _base_model(model)
    entry = get_architecture(base.config)
    patched_heads, softmax, heads = {}, [], {}
    for name, module in entry.attention_modules(base):
        heads[name] = entry.num_heads(module)
        state = getattr(module, NAME, None)
        if state is None:
            softmax.append(name)
        else:
            patched_heads[name] = heads[name] if state.chosen is None else len(state.chosen)
    activation = read_settings(base.config).activation if isinstance(base, PolyModelMixin) else None
    return Coverage(patched_heads, tuple(softmax), heads, activation)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The PreTrainedModel inside `model`; refuses wrappers that would not notice the change, with the remedy."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("the model is compiled: patch or unpatch it first, then torch.compile")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_fsdp(model):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: patch or unpatch it first, then wrap or prepare it"
        )
    base = _base_model(model)
    if any(not isinstance(module, PolyAttentionState) for module in _children(base)):
        raise ValueError(
            "a PEFT adapter trains the attention state of this model: merge or unload the adapter first, for example "
            "model = model.merge_and_unload()"
        )
    return base


def check_adapters(model: nn.Module, base: PreTrainedModel, config: PolyAttentionConfig) -> None:
    """Raises when an adapter is there already that would not save the state that `config` learns."""
    adapted = base is not model or getattr(base, "_hf_peft_config_loaded", False)
    if adapted and (config.coefficients == "learnable" or config.learn_gain or config.learn_affine):
        raise ValueError(
            "this PEFT adapter would not save the learned attention state: patch_model first, then get_peft_model "
            'with modules_to_save=["polyattn"], or patch with nothing learned: coefficients="monomial", or numbers'
        )


def check_patchable(model: PreTrainedModel, config: PolyAttentionConfig) -> None:
    """Raises where a patch would cover nothing, or another part of the model than asked for."""
    entry = get_architecture(model.config)
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself and not through transformers' AttentionInterface"
            ": it cannot be patched"
        )
    modules = dict(entry.attention_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no module of class {', '.join(entry.attention_classes)} to patch"
        )
    if missing := [name for name, module in modules.items() if not hasattr(module, "is_causal")]:
        raise ValueError(f"attention modules without is_causal cannot be masked safely: {missing[:3]}")
    if unknown := [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and not any(_related(name, known) for known in modules)
    ]:
        raise ValueError(
            f"the entry of {entry.model_type!r} does not cover {unknown[:3]}: call register_architecture "
            "with all attention classes, exist_ok=True"
        )
    hosts = list(modules.values())
    for index in chosen_layers(config, len(hosts)):
        chosen_heads(config, index, entry.num_heads(hosts[index]))


def check_transformers(version: str) -> None:
    """Raises ImportError for a version of transformers that this package was not tested with."""
    oldest, below = TESTED_TRANSFORMERS
    if not Version(oldest) <= Version(Version(version).base_version) < Version(below):
        raise ImportError(
            f"transformers {version} is outside the range that this version of hf_polyattn was tested with: "
            f'pip install "transformers>={oldest},<{below}", or upgrade hf_polyattn'
        )


def _related(name: str, known: str) -> bool:
    """Whether one of two modules is the other, or lies inside it."""
    return f"{name}.".startswith(f"{known}.") or f"{known}.".startswith(f"{name}.")


def _base_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(base).__name__}; for plain tensors there is "
            "hf_polyattn.polynomial_attention"
        )
    return base


def _is_fsdp(model: nn.Module) -> bool:
    return any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(model).__mro__)


def _children(model: nn.Module) -> list[nn.Module]:
    """The `polyattn` child of each attention module, as it is: a state, or what PEFT has wrapped around it."""
    return [module._modules[NAME] for module in model.modules() if module._modules.get(NAME) is not None]


def _to_polynomial(model: PreTrainedModel, settings: PolyAttentionConfig) -> None:
    model._polyattn_before = (model.config._attn_implementation, model.name_or_path)
    # an adapter trained from here on must not name the stock checkpoint as its base: it would load there in silence
    model.name_or_path = ""
    _swap_config(model, poly_config(model.config, settings))
    become(model, poly_model_class(type(model)))
    attach(model, settings)
    _set_tags(model, [*(model.model_tags or ()), NAME])


def _to_softmax(model: PreTrainedModel) -> None:
    default = ("sdpa" if model._supports_sdpa else "eager", model.name_or_path)
    implementation, model.name_or_path = model.__dict__.pop("_polyattn_before", default)
    detach(model)
    _swap_config(model, stock_config(model.config, implementation))
    _set_tags(model, [tag for tag in model.model_tags or () if tag != NAME])


def _set_tags(model: PreTrainedModel, tags: list[str]) -> None:
    if tags:
        model.model_tags = tags
    else:
        # back to the attribute of the class
        model.__dict__.pop("model_tags", None)


def _swap_config(model: PreTrainedModel, new: PreTrainedConfig) -> None:
    """Every module of this model that holds the old config gets the new one; other models that share it do not."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


@contextlib.contextmanager
def _undo_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A failed patch leaves the model as it was: stock, or with the state that an earlier patch has learned."""
    classes = {module: type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    config, tags = model.config, list(model.model_tags or ())
    own = {name: model.__dict__[name] for name in ("_polyattn_before", "name_or_path") if name in model.__dict__}
    hosts = [module for _, module in get_architecture(config).attention_modules(model)]
    earlier = {module: module._modules[NAME] for module in hosts if hasattr(module, NAME)}
    try:
        yield
    except BaseException:
        if isinstance(model, PolyModelMixin):
            _to_softmax(model)
        for module, cls in classes.items():
            module.__class__ = cls
        _swap_config(model, config)
        _set_tags(model, tags)
        model.__dict__.update(own)
        for module, state in earlier.items():
            module.add_module(NAME, state)
        raise


def _say(report: object) -> None:
    """Logs what was done, and shows it to those who have not set logging up."""
    package = logging.getLogger(__package__)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    logger.info("%s", report)
