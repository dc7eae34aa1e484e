"""Persistence by a distinct model_type: generated subclasses of stock configurations and models.

`save_pretrained` drops the attention implementation, so a patched checkpoint of a stock class would reload, in
silence, as softmax. A polynomial model is therefore an instance of a generated subclass (PolyGPT2LMHeadModel, model_type
polyattn_gpt2) that Auto classes find when this package is imported, and that nobody can load without it.
"""

import copy
import functools
import sys
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from .architectures import STOCK_PREFIX, get_architecture
from .attention import NAME
from .config import PolyAttentionConfig
from .state import PolyAttentionState

_MODULE = sys.modules[__name__]


class PolyConfigMixin:
    """A stock configuration plus `polyattn`, the dictionary of a PolyAttentionConfig."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_models(type(self))


class PolyModelMixin:
    """A stock model whose attention modules carry a `polyattn` child, created before the weights are loaded."""

    # continuous batching switches a model that claims flash attention over to it by itself
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        settings = read_settings(config)
        refuse_other_implementation(config._attn_implementation)
        config._attn_implementation = NAME
        super().__init__(config, *args, **kwargs)
        attach(self, settings)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PolyAttentionState):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        refuse_other_implementation(attn_implementation)


def read_settings(config: PretrainedConfig) -> PolyAttentionConfig:
    """The PolyAttentionConfig of a polynomial configuration; ValueError when config.json has lost it."""
    values = getattr(config, NAME, None)
    if not values:
        raise ValueError(
            f"a {config.model_type} configuration needs its `{NAME}` block, which says what the attention computes; this "
            "one has none. Build such models with hf_polyattn.patch_model"
        )
    return PolyAttentionConfig.from_dict(values)


def refuse_other_implementation(requested: Any) -> None:
    if requested not in (None, NAME):
        raise ValueError(
            f"attn_implementation={requested!r} contradicts this polynomial checkpoint: its weights are trained for "
            f'"{NAME}". Leave the argument out, or call hf_polyattn.unpatch_model(model) if softmax is what you want'
        )


def attach(model: PreTrainedModel, settings: PolyAttentionConfig) -> None:
    """Gives each chosen attention module its `polyattn` child, and inner models the classes that can initialise it."""
    architecture = get_architecture(model.config)
    modules = list(architecture.attention_modules(model))
    layers = chosen_layers(settings, len(modules))
    for index, (_, module) in enumerate(modules):
        if index not in layers:
            continue
        heads = architecture.num_heads(module)
        scaling = getattr(module, "scaling", None)
        like = next(module.parameters(), None)
        spread = architecture.initial_spread(module)
        if settings.qk_norm and scaling is not None:
            # normalised q and k of random direction: q . k has variance head_dim
            spread = scaling * head_dim(module) ** 0.5
        module.add_module(
            NAME,
            PolyAttentionState(settings, heads, chosen=chosen_heads(settings, index, heads), spread=spread, like=like),
        )
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and not isinstance(inner, PolyModelMixin):
            become(inner, poly_model_class(type(inner)))
    watch_output_attentions(model)


def become(model: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Turns an instance into one of a sub- or superclass."""
    model.__class__ = cls
    # Transformers notes what a class can record (attentions, hidden states) only when its base constructor runs
    PreTrainedModel.__init__(cls.__new__(cls), model.config)


def head_dim(module: nn.Module) -> int:
    config = module.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def chosen_layers(settings: PolyAttentionConfig, count: int) -> set[int]:
    """Indices of the attention modules to patch; ValueError for one that does not exist."""
    if settings.heads and (bad := [layer for layer in settings.heads if not 0 <= layer < count]):
        raise ValueError(f"heads names layers {bad}, but the model has {count} attention modules (0 to {count - 1})")
    if settings.layers is None:
        return set(range(count))
    if bad := [layer for layer in settings.layers if not -count <= layer < count]:
        raise ValueError(f"layers names {bad}, but the model has {count} attention modules (0 to {count - 1})")
    layers = {layer % count for layer in settings.layers}
    if settings.heads and (left_out := sorted(set(settings.heads) - layers)):
        raise ValueError(f"heads names layers {left_out} that layers= leaves out")
    return layers


def chosen_heads(settings: PolyAttentionConfig, layer: int, count: int) -> tuple[int, ...] | None:
    """Indices of the heads to patch in one layer, None for all of them."""
    heads = (settings.heads or {}).get(layer)
    if heads is None or heads == tuple(range(count)):
        return None
    if bad := [head for head in heads if not 0 <= head < count]:
        raise ValueError(f"heads[{layer}] names {bad}, but that layer has {count} heads (0 to {count - 1})")
    return heads


def states(model: nn.Module) -> dict[str, PolyAttentionState]:
    """The `polyattn` children by the name of their host module."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PolyAttentionState):
            found[name.partition(f".{NAME}")[0]] = module
    return found


def watch_output_attentions(model: PreTrainedModel) -> None:
    """Tells the states when a call asks for attention weights: not every attention module passes the argument on."""
    base = model.base_model
    if not getattr(base, "_polyattn_watched", False):
        base.register_forward_pre_hook(_want_weights, with_kwargs=True)
        base.register_forward_hook(_forget_weights, always_call=True)
        base._polyattn_watched = True


def _want_weights(model: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("output_attentions"):
        for state in states(model).values():
            state.return_weights = True


def _forget_weights(model: nn.Module, args: tuple, output: Any) -> None:
    for state in states(model).values():
        if state.return_weights:
            state.return_weights = False


@functools.cache
def poly_config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The polynomial subclass of a stock configuration class."""
    attributes = {"model_type": STOCK_PREFIX + base.model_type, "__module__": __name__, "stock_class": base}
    return _publish(type(f"Poly{base.__name__}", (PolyConfigMixin, base), attributes))


@functools.cache
def poly_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The polynomial subclass of a stock model class: isinstance with the stock class stays true."""
    attributes = {"config_class": poly_config_class(base.config_class), "__module__": __name__, "stock_class": base}
    return _publish(type(f"Poly{base.__name__}", (PolyModelMixin, base), attributes))


def poly_config(config: PretrainedConfig, settings: PolyAttentionConfig) -> PretrainedConfig:
    """A copy of a stock configuration as the polynomial one, ready for `AutoModel….from_config`."""
    out = copy.deepcopy(config)
    out.__class__ = poly_config_class(type(config))
    setattr(out, NAME, settings.to_dict())
    out._attn_implementation = NAME
    register_models(type(out))
    return out


def stock_config(config: PretrainedConfig, implementation: str | None) -> PretrainedConfig:
    """Inverse of `poly_config`: a stock configuration without any trace of the patch."""
    out = copy.deepcopy(config)
    out.__class__ = type(config).stock_class
    delattr(out, NAME)
    out._attn_implementation = implementation
    return out


def register_config(model_type: str) -> None:
    """Makes AutoConfig know `polyattn_<model_type>`; the models follow when such a configuration is first built."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"this version of transformers has no architecture {model_type!r}")
    base = CONFIG_MAPPING[model_type]
    AutoConfig.register(STOCK_PREFIX + model_type, poly_config_class(base), exist_ok=True)


@functools.cache
def register_models(config_class: type[PretrainedConfig]) -> None:
    """Registers the polynomial twin of each model class with each Auto class that its stock class is in."""
    from transformers.models.auto import modeling_auto

    stock = config_class.stock_class
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or stock not in mapping:
            continue
        base = mapping[stock]
        if isinstance(base, type):
            auto.register(config_class, poly_model_class(base), exist_ok=True)


def _publish(cls: type) -> type:
    """Puts a generated class where its __module__ says it is, so that pickle and copy find it."""
    setattr(_MODULE, cls.__name__, cls)
    return cls
