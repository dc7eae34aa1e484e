"""Persistence by a distinct model_type: generated subclasses of stock configurations and models.

`save_pretrained` drops the attention implementation, so a patched checkpoint of a stock class would reload, in
silence, as softmax. A polynomial model is therefore an instance of a generated subclass (PolyGPT2LMHeadModel,
model_type polyattn_gpt2) that Auto classes find when this package is imported, and that nobody can load without it.
"""

import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from .architectures import STOCK_PREFIX, Architecture, get_architecture, spread_of_weights, unit_spread
from .attention import NAME
from .config import PolyAttentionConfig
from .forwarding import unwatch, watch
from .lookups import add_model_name, add_peft_targets, add_tokenizer
from .remote_code import without_ours, write_remote_code
from .state import PolyAttentionState

_MODULE = sys.modules[__name__]
_PREFIX = "Poly"
_Function = TypeVar("_Function", bound=Callable[..., Any])

# the mixins stand before a stock class in the order of bases, which a type checker cannot know
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
    from transformers import PreTrainedModel as _Model
else:
    _Config = _Model = object


def _cached(function: _Function) -> _Function:
    return cast(_Function, functools.cache(function))


class PolyConfigMixin(_Config):
    """A stock configuration plus `polyattn`, the dictionary of a PolyAttentionConfig."""

    stock_class: ClassVar[type[PretrainedConfig]]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_models(type(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # unpickled in a fresh process it is the first of its kind, and its constructor does not run
        self.__dict__.update(state)
        register_models(type(self))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; also writes what loads the model without this package, see `remote_code`.

        Models save their configuration through this method, so their code is there before anything is uploaded.
        """
        autos = {auto.__name__: stock.__name__ for auto, stock in auto_classes(self.stock_class)}
        ours = write_remote_code(self, read_settings(self), autos, Path(save_directory))
        _set_auto_map(self, {**without_ours(getattr(self, "auto_map", None)), **ours})
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # PEFT looks its default targets up by the model_type that it finds in this dictionary
        add_peft_targets(type(self).model_type, self.stock_class.model_type)
        # GPT2LMHeadModel.from_pretrained would take our checkpoint with no more than a warning; asked for an
        # implementation that only this package registers, it raises
        return {**super().to_dict(), "attn_implementation": NAME}


class PolyModelMixin(_Model):
    """A stock model whose attention modules carry a `polyattn` child, created before the weights are loaded."""

    stock_class: ClassVar[type[PreTrainedModel]]
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
            f"a {config.model_type} configuration needs its `{NAME}` block, which says what the attention computes; "
            "this one has none. Build such models with hf_polyattn.patch_model"
        )
    return PolyAttentionConfig.from_dict(values)


def refuse_other_implementation(requested: Any) -> None:
    if requested not in (None, NAME):
        raise ValueError(
            f"attn_implementation={requested!r} contradicts this polynomial checkpoint: its weights are trained for "
            f'"{NAME}". Leave the argument out, or call hf_polyattn.unpatch_model(model) if softmax is what you want'
        )


def attach(model: PreTrainedModel, settings: PolyAttentionConfig, *, has_weights: bool = False) -> None:
    """Gives each chosen attention module its `polyattn` child, and inner models the classes that can initialise it.

    has_weights: the default alpha follows from the weights of queries and keys; without, as in a constructor, from
        what the configuration says about their initialisation.
    """
    architecture = get_architecture(model.config)
    modules = list(architecture.attention_modules(model))
    layers = chosen_layers(settings, len(modules))
    for index, (_, module) in enumerate(modules):
        # None: known to the patcher, and softmax on purpose
        state = None
        if index in layers:
            heads = architecture.num_heads(module)
            spread = _expected_spread(architecture, module, settings.qk_norm, has_weights)
            chosen = chosen_heads(settings, index, heads)
            state = PolyAttentionState(settings, heads, chosen=chosen, spread=spread, like=_floating(module, model))
            state.train(module.training)
        module.add_module(NAME, state)
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and not isinstance(inner, PolyModelMixin):
            become(inner, poly_model_class(type(inner)))
    watch(model)


def _expected_spread(entry: Architecture, module: Any, qk_norm: bool, has_weights: bool) -> float:
    if qk_norm:
        # of random direction, with entries of mean square one
        return unit_spread(module)
    measured = spread_of_weights(entry, module) if has_weights else None
    return measured or entry.initial_spread(module)


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`, but for the configuration."""
    unwatch(model)
    for _, module in get_architecture(model.config).attention_modules(model):
        if hasattr(module, NAME):
            delattr(module, NAME)
    for inner in model.modules():
        if isinstance(inner, PolyModelMixin):
            inner.__class__ = type(inner).stock_class  # type: ignore[assignment]


def become(model: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Turns an instance into one of a sub- or superclass."""
    model.__class__ = cls
    # Transformers notes what a class can record (attentions, hidden states) only when its base constructor runs
    PreTrainedModel.__init__(cls.__new__(cls), model.config)


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
            # of a copy that PEFT keeps for training, the last one counts
            found[name.partition(f".{NAME}")[0]] = module
    return found


def _floating(module: nn.Module, model: PreTrainedModel) -> nn.Parameter | None:
    """A parameter to take dtype and device from; quantized ones are stored as integers."""
    candidates = (p for source in (module, model) for p in source.parameters())
    return next((p for p in candidates if p.is_floating_point() and p.element_size() > 1), None)


@_cached
def poly_config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The polynomial subclass of a stock configuration class."""
    attributes = {"model_type": STOCK_PREFIX + base.model_type, "__module__": __name__, "stock_class": base}
    return _publish(type(_PREFIX + base.__name__, (PolyConfigMixin, base), attributes))


@_cached
def poly_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The polynomial subclass of a stock model class: isinstance with the stock class stays true."""
    attributes = {
        "config_class": poly_config_class(cast(type[PretrainedConfig], base.config_class)),
        "__module__": __name__,
        "stock_class": base,
    }
    return _publish(type(_PREFIX + base.__name__, (PolyModelMixin, base), attributes))


def poly_config(config: PretrainedConfig, settings: PolyAttentionConfig) -> PretrainedConfig:
    """A copy of a stock configuration as the polynomial one, ready for `AutoModel….from_config`."""
    out = copy.deepcopy(config)
    out.__class__ = poly_config_class(type(config))
    # a configuration that was loaded carries the name in itself too
    out.__dict__.pop("model_type", None)
    setattr(out, NAME, settings.to_dict())
    out._attn_implementation = NAME
    register_models(cast(type[PolyConfigMixin], type(out)))
    return out


def stock_config(config: Any, implementation: str | None) -> PretrainedConfig:
    """Inverse of `poly_config`: a stock configuration without any trace of the patch."""
    out = copy.deepcopy(config)
    out.__class__ = type(config).stock_class
    delattr(out, NAME)
    _set_auto_map(out, without_ours(getattr(out, "auto_map", None)))
    out._attn_implementation = implementation
    if out.architectures:
        out.architectures = [name.removeprefix(_PREFIX) for name in out.architectures]
    return out


def _set_auto_map(config: Any, auto_map: dict[str, Any]) -> None:
    config.__dict__.pop("auto_map", None)
    if auto_map:
        config.auto_map = auto_map


def register_config(model_type: str) -> None:
    """Makes AutoConfig know `polyattn_<model_type>`; the models follow when such a configuration is first built."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"this version of transformers has no architecture {model_type!r}")
    base = CONFIG_MAPPING[model_type]
    AutoConfig.register(STOCK_PREFIX + model_type, poly_config_class(base), exist_ok=True)


@_cached
def register_models(config_class: type[PolyConfigMixin]) -> None:
    """Registers the polynomial twin of each model class with each Auto class that its stock class is in."""
    for auto, base in auto_classes(config_class.stock_class):
        twin = poly_model_class(base)
        auto.register(config_class, twin, exist_ok=True)
        add_model_name(auto, config_class.model_type, twin.__name__)
    add_tokenizer(config_class, config_class.stock_class)


@_cached
def auto_classes(stock: type[PretrainedConfig]) -> list[tuple[Any, type[PreTrainedModel]]]:
    """(Auto class, model class) for each Auto class of models that knows a stock configuration."""
    from transformers.models.auto import modeling_auto

    found = []
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or stock not in mapping:
            continue
        # an Auto class may list a model of another architecture, which has a configuration of its own
        if isinstance(base := mapping[stock], type) and getattr(base, "config_class", stock) is stock:
            found.append((auto, base))
    return found


def _publish(cls: type) -> type:
    """Puts a generated class where its __module__ says it is, so that pickle and copy find it."""
    setattr(_MODULE, cls.__name__, cls)
    return cls


def __getattr__(name: str) -> type:
    """Generates the twin of a Transformers class on demand: a fresh process unpickles PolyGPT2LMHeadModel."""
    stock = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PretrainedConfig):
        return poly_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return poly_model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
