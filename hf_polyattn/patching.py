"""patch_model and its relatives. Everything happens to the instance; no class and no other model is touched."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activations import get_activation, resolve_config
from .architectures import get_architecture
from .attention import NAME
from .config import PolyAttentionConfig
from .models import (
    PolyModelMixin,
    attach,
    become,
    chosen_heads,
    chosen_layers,
    poly_config,
    poly_model_class,
    read_settings,
    states,
    stock_config,
)

logger = logging.getLogger(__name__)


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
    **options: Any,
) -> PreTrainedModel:
    """Replaces softmax in the attention of `model`, in place, and returns it for convenience.

    Args:
        model: a Transformers model of a registered architecture. A patched one is patched anew with these options.
        activation: "poly", "monomial" (the paper's s^p / sqrt n), "softmax", "relu", "sigmoid" or a registered name.
        degree: of the polynomial; default 3.
        config: a whole PolyAttentionConfig instead of `activation`, `degree` and `options`.
        calibrate: batches (dictionaries of model inputs, or tensors of input ids) from which the score spread and the
            size of softmax's output are measured for each head; alpha and gain are set from them.
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
    get_activation(config.activation)
    base = unwrap(model, config)
    check_patchable(base)
    batches = None if calibrate is None else list(calibrate)
    if batches is not None and not batches:
        raise ValueError("calibrate= holds no batch: pass a list of a few batches, or leave it out")

    with _undo_on_error(base):
        if isinstance(base, PolyModelMixin):
            _to_softmax(base)
        _to_polynomial(base, config)
        if batches is not None:
            from .calibration import calibrate_gain

            logger.info("%s", calibrate_gain(base, batches))
    base.add_model_tags([NAME])
    logger.info("%s, degree %d", coverage(base), config.degree)
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the stock class, the stock config and softmax back, in place; weights other than `polyattn.*` stay.

    Raises:
        ValueError: when the model is not patched.
    """
    base = _base_model(model)
    if not isinstance(base, PolyModelMixin):
        raise ValueError(f"{type(base).__name__} is not patched: there is nothing to undo")
    _to_softmax(base)
    return model


@contextlib.contextmanager
def patched(model: PreTrainedModel, activation: str = "poly", degree: int | None = None, **kwargs: Any) -> Iterator[Any]:
    """`patch_model` for the length of a with block; the model comes out as it went in."""
    base = _base_model(model)
    if isinstance(base, PolyModelMixin):
        raise ValueError("the model is patched already: patched() could not give its learned state back; unpatch it first")
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


def unwrap(model: nn.Module, config: PolyAttentionConfig) -> PreTrainedModel:
    """The PreTrainedModel inside `model`; refuses wrappers that would not notice new tensors, with the remedy."""
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ValueError("the model is compiled: patch_model first, then torch.compile")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_fsdp(model):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: patch_model first, then wrap or prepare it")
    base = _base_model(model)
    if base is not model and (config.coefficients == "learnable" or config.learn_gain or config.learn_affine):
        raise ValueError(
            "this PEFT adapter would not save the learned attention state: patch_model first, then get_peft_model with "
            'modules_to_save=["polyattn"], or patch with nothing learned (coefficients="monomial" or fixed numbers)'
        )
    return base


def check_patchable(model: PreTrainedModel) -> None:
    """Raises where a patch would cover nothing or only a part."""
    entry = get_architecture(model.config)
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself and not through transformers' AttentionInterface: "
            "it cannot be patched"
        )
    modules = dict(entry.attention_modules(model))
    if not modules:
        raise ValueError(f"{type(model).__name__} has no module of class {', '.join(entry.attention_classes)} to patch")
    if missing := [name for name, module in modules.items() if not hasattr(module, "is_causal")]:
        raise ValueError(f"attention modules without is_causal cannot be masked safely: {missing[:3]}")
    related = lambda a, b: a == b or a.startswith(b + ".") or b.startswith(a + ".")  # noqa: E731
    if unknown := [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and not any(related(name, known) for known in modules)
    ]:
        raise ValueError(
            f"the entry of {entry.model_type!r} does not cover {unknown[:3]}: register_architecture with all attention classes"
        )


def _base_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(base).__name__}; for plain tensors use hf_polyattn.polynomial_attention"
        )
    return base


def _is_fsdp(model: nn.Module) -> bool:
    return any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(model).__mro__)


def _to_polynomial(model: PreTrainedModel, settings: PolyAttentionConfig) -> None:
    # indices are checked before anything changes
    entry = get_architecture(model.config)
    modules = [module for _, module in entry.attention_modules(model)]
    for index in chosen_layers(settings, len(modules)):
        chosen_heads(settings, index, entry.num_heads(modules[index]))
    model._polyattn_original_implementation = model.config._attn_implementation
    _swap_config(model, poly_config(model.config, settings))
    become(model, poly_model_class(type(model)))
    attach(model, settings)


def _to_softmax(model: PreTrainedModel) -> None:
    implementation = getattr(model, "_polyattn_original_implementation", None)
    if implementation is None:
        implementation = "sdpa" if model._supports_sdpa else "eager"
    for name in states(model):
        delattr(model.get_submodule(name), NAME)
    _swap_config(model, stock_config(model.config, implementation))
    for inner in model.modules():
        if isinstance(inner, PolyModelMixin):
            inner.__class__ = type(inner).stock_class
    model.model_tags = [tag for tag in (model.model_tags or []) if tag != NAME]


def _swap_config(model: PreTrainedModel, new: PreTrainedConfig) -> None:
    """Every module of this model that holds the old config gets the new one; other models that share it do not."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


@contextlib.contextmanager
def _undo_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A failed patch leaves a stock model stock."""
    was_patched = isinstance(model, PolyModelMixin)
    try:
        yield
    except Exception:
        if not was_patched and isinstance(model, PolyModelMixin):
            _to_softmax(model)
        raise
