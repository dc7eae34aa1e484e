"""The registry of architectures: one entry each, no branches elsewhere."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

STOCK_PREFIX = "polyattn_"


def _field(module: Any, name: str) -> Any:
    """A field of the host's configuration.

    Raises:
        ValueError: where there is none of this name, with what to give register_architecture instead.
    """
    value = getattr(module.config, name, None)
    if value is None:
        remedy = "num_heads=" if name == "num_attention_heads" else "initial_spread="
        raise ValueError(
            f"{type(module.config).__name__} has no field {name!r}, from which an entry reads the number of heads and "
            f"the first spread of the scores: give register_architecture {remedy} for {type(module).__name__}"
        )
    return value


def head_dim(module: nn.Module) -> int:
    size = getattr(module.config, "head_dim", None)
    return size or _field(module, "hidden_size") // _field(module, "num_attention_heads")


def unit_spread(module: nn.Module) -> float:
    """Spread of q . k where all entries of q and k have variance one: scaling * sqrt(head_dim).

    1 for a module that does not keep its scaling, or keeps it under another name.
    """
    scaling = getattr(module, "scaling", None)
    return scaling * head_dim(module) ** 0.5 if scaling else 1.0


def _heads_from_config(module: nn.Module) -> int:
    return int(_field(module, "num_attention_heads"))


def _spread_at_initialization(module: nn.Module) -> float:
    """Score spread of an untrained module: sigma = scaling * sqrt(head_dim) * width * initializer_range^2.

    Inputs come out of a norm with unit variance, so each entry of q and k has variance width * range^2, and q . k has
    variance head_dim times its square.
    """
    return unit_spread(module) * _field(module, "hidden_size") * _field(module, "initializer_range") ** 2


def spread_of_weights(entry: "Architecture", module: nn.Module) -> float | None:
    """Score spread that the weights themselves imply: sigma = scaling * sqrt(head_dim) * width * rms(W_q) * rms(W_k).

    The formula of `_spread_at_initialization` with the weights' own size in the place of initializer_range, so that
    it holds for weights that were scaled or trained. None where the weights cannot be read: no query_key, quantized
    layers, tensors on the meta device or sharded away.
    """
    if entry.query_key is None:
        return None
    try:
        weights, _ = entry.query_key(module)
    except AttributeError:
        # a quantized layer keeps its matrix under another name
        return None
    if not weights or any(not _is_readable(weight) for weight in weights):
        return None
    sizes = [_root_mean_square(weight.detach()) for weight in weights]
    # one fused matrix, or two: the geometric mean squared is rms(W_q) * rms(W_k)
    spread = unit_spread(module) * _field(module, "hidden_size") * math.prod(sizes) ** (2 / len(sizes))
    return spread if 0 < spread < math.inf else None


def _root_mean_square(weight: torch.Tensor) -> float:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dtype=wide).item() / weight.numel() ** 0.5


def _is_readable(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta and weight.numel() > 0


def linear_query_key(*names: str) -> Callable[[nn.Module], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """`query_key` of attention modules that have one linear layer for queries and one for keys, by their names."""

    def find(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        layers = [getattr(module, name) for name in names]
        return [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]

    return find


def fused_query_key(module: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`query_key` of GPT-2, whose c_attn makes queries, keys and values side by side, in columns."""
    width = module.embed_dim
    first, second = slice(0, width), slice(width, 2 * width)
    if module.is_cross_attention:
        parts = [(module.q_attn, first), (module.c_attn, first)]
    else:
        parts = [(module.c_attn, first), (module.c_attn, second)]
    return [layer.weight[:, part] for layer, part in parts], [layer.bias[part] for layer, part in parts]


@dataclass(frozen=True)
class Architecture:
    """What the patcher must know of one model_type.

    model_type: of the stock configuration, for example "gpt2".
    attention_classes: names of the modules that call `ALL_ATTENTION_FUNCTIONS.get_interface` in their forward.
    num_heads: query heads of such a module.
    initial_spread: root mean square of its scores at initialisation.
    query_key: views of the weights, and of the biases, that make queries and keys; None where nobody has said, or
        where the weights do not decide the size of the scores, as behind a norm of queries and keys.
    reads_packing: the model hands position_ids to Transformers' mask function, so that those which start anew within
        a row keep packed sequences apart. Where it does not, such inputs are refused.
    output_projection: where the linear layer behind the heads is, seen from such a module: "o_proj" inside it,
        ".output.dense" beside it, as a relative import would say it. Calibration and attention transfer ask for it.
    """

    model_type: str
    attention_classes: tuple[str, ...]
    num_heads: Callable[[nn.Module], int] = _heads_from_config
    initial_spread: Callable[[nn.Module], float] = _spread_at_initialization
    query_key: Callable[[nn.Module], tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None
    reads_packing: bool = False
    output_projection: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the configuration alone tells the number of heads and the first spread of the scores."""
        return self.num_heads is _heads_from_config and self.initial_spread is _spread_at_initialization

    def attention_modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every attention module, in the order of `named_modules`."""
        for name, module in model.named_modules():
            if any(cls.__name__ in self.attention_classes for cls in type(module).__mro__):
                yield name, module

    def projection(self, model: nn.Module, name: str) -> nn.Module | None:
        """The output projection of the attention module called `name`; None where nobody has said where it is."""
        path = self.output_projection
        if path is None:
            return None
        home = name
        while path.startswith("."):
            path, home = path[1:], home.rpartition(".")[0]
        return model.get_submodule(f"{home}.{path}".lstrip("."))


_REGISTRY: dict[str, Architecture] = {}


def register_architecture(
    model_type: str,
    attention_classes: tuple[str, ...] | list[str],
    *,
    num_heads: Callable[[nn.Module], int] | int | None = None,
    initial_spread: Callable[[nn.Module], float] | float | None = None,
    query_key: Callable[[nn.Module], tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None,
    reads_packing: bool = False,
    output_projection: str | None = None,
    exist_ok: bool = False,
) -> Architecture:
    """Make `patch_model` and `from_pretrained` work for one more model_type of Transformers.

    The modelling code must fetch its attention through `ALL_ATTENTION_FUNCTIONS.get_interface`, and its attention
    modules must carry `is_causal`. The optional arguments are the fields of `Architecture`;
    num_heads and initial_spread may be numbers, the same for all modules.

    Raises:
        TypeError: when num_heads or initial_spread is neither a function nor a number.
        ValueError: for a number that is not positive, and when the model_type is unknown to Transformers or registered
            already.

    Example:
        >>> entry = register_architecture("mistral", ["MistralAttention"], exist_ok=True)
    """
    from .models import register_config

    if model_type in _REGISTRY and not exist_ok:
        raise ValueError(f"architecture {model_type!r} is already registered; pass exist_ok=True to replace it")
    entry = Architecture(
        model_type,
        tuple(attention_classes),
        _heads_from_config if num_heads is None else _function("num_heads", num_heads, int),
        _spread_at_initialization if initial_spread is None else _function("initial_spread", initial_spread, float),
        query_key,
        reads_packing,
        output_projection,
    )
    register_config(model_type)
    _REGISTRY[model_type] = entry
    return entry


def _function(name: str, value: Any, kind: type) -> Callable[[nn.Module], Any]:
    """`value`, or a function that gives it for every module where it is a number."""
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a function of the attention module, got {value!r}")
    if not 0 < value < math.inf or kind(value) != value:
        raise ValueError(f"{name} must be a positive {kind.__name__}, got {value!r}")
    return lambda module: kind(value)


def registered() -> list[str]:
    """The model types that have an entry."""
    return sorted(_REGISTRY)


def is_registered(config: PretrainedConfig) -> bool:
    """Whether a stock or polynomial configuration has an entry."""
    return config.model_type.removeprefix(STOCK_PREFIX) in _REGISTRY


def get_architecture(config: PretrainedConfig) -> Architecture:
    """The entry of a stock or polynomial configuration.

    Raises:
        ValueError: with the remedy, for an architecture that nobody has registered.
    """
    model_type = config.model_type.removeprefix(STOCK_PREFIX)
    if not is_registered(config):
        raise ValueError(
            f"no entry for architecture {model_type!r}; registered: {', '.join(registered())}. If its attention "
            "goes through transformers' AttentionInterface, call hf_polyattn.register_architecture("
            f"{model_type!r}, [names of its attention classes]) and test it; if not, it cannot be patched"
        )
    return _REGISTRY[model_type]
