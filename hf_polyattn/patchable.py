"""What may be patched, and what is refused with the remedy."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture, get_architecture, is_registered, registered
from .attention import NAME
from .config import PolyAttentionConfig
from .models import PolyModelMixin, auto_classes, chosen_heads, chosen_layers
from .remote_code import documented_auto_class
from .state import PolyAttentionState


def unwrap_outer(model: nn.Module) -> PreTrainedModel:
    """As `unwrap`, also of a model whose attention state an adapter trains: for what leaves that state alone."""
    if not isinstance(model, nn.Module):
        base_model(model)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("the model is compiled: patch or unpatch it first, then torch.compile")
    for module in model.modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_fsdp(module):
            raise ValueError(
                f"the model is wrapped in {type(module).__name__}: patch or unpatch it first, then wrap or prepare it"
            )
    return base_model(model)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The PreTrainedModel inside `model`; refuses wrappers that would not notice the change, with the remedy."""
    base = unwrap_outer(model)
    children = [module._modules.get(NAME) for module in base.modules()]
    if any(child is not None and not isinstance(child, PolyAttentionState) for child in children):
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
    """Raises where a patch would cover nothing, or other parts than asked for, or lose what was learned."""
    _check_class(model)
    entry = architecture_of(model)
    _check_interface(model)
    modules = dict(entry.attention_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no module of class {', '.join(entry.attention_classes)} to patch"
        )
    if why := _out_of_reach(model, modules.values()):
        raise ValueError(why)
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


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The entry of a model's architecture.

    Raises:
        ValueError: where there is none, with the call that makes one, or why no entry would help.
    """
    if is_registered(model.config):
        return get_architecture(model.config)
    _check_interface(model)
    hosts = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    if not hosts:
        raise ValueError(
            f"{type(model).__name__} has no module whose class is called ...Attention: there is nothing to patch"
        )
    # wrappers such as T5LayerSelfAttention only hold the module that computes
    hosts = [module for module in hosts if _calls_interface(type(module))] or hosts
    if why := _out_of_reach(model, hosts):
        raise ValueError(why)
    classes = sorted({type(module).__name__ for module in hosts})
    raise ValueError(
        f"no entry for architecture {model.config.model_type!r}; registered: {', '.join(registered())}. Its attention "
        f"goes through transformers' AttentionInterface: call hf_polyattn.register_architecture("
        f"{model.config.model_type!r}, {classes}) and test it"
    )


def _check_interface(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes its attention by itself and not through transformers' AttentionInterface"
            ": it cannot be patched"
        )


def _check_class(model: PreTrainedModel) -> None:
    """Raises for a polynomial checkpoint in a class that is not of this package, which has not loaded its numbers."""
    if isinstance(model, PolyModelMixin) or not getattr(model.config, NAME, None):
        return
    # the code beside a checkpoint has classes of its own, below the stock ones
    autos = [auto_classes(cls) for cls in type(model.config).__mro__ if issubclass(cls, PretrainedConfig)]
    names = {auto.__name__: stock.__name__ for auto, stock in next(filter(None, autos), [])}
    auto = documented_auto_class([cls.__name__ for cls in type(model).__mro__], names)
    raise ValueError(
        f"this checkpoint is polynomial, and {type(model).__name__} is not the class that loads its learned numbers: "
        f"import hf_polyattn, and load it with {auto}.from_pretrained; that model may be patched anew"
    )


def _calls_interface(cls: type) -> bool:
    """Whether the source of a class fetches its attention function from Transformers, where it can be read."""
    try:
        return "get_interface(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


def _out_of_reach(model: PreTrainedModel, hosts: Iterable[nn.Module]) -> str:
    """Why the attention modules would not notice a patch of the model's configuration; empty where they do."""
    apart = {type(host).__name__ for host in hosts if getattr(host, "config", model.config) is not model.config}
    if not apart:
        return ""
    return (
        f"{', '.join(sorted(apart))} of {type(model).__name__} reads a copy of the model's configuration, as the "
        "parts of encoder-decoder models do, and would go on with softmax: it cannot be patched"
    )


def _related(name: str, known: str) -> bool:
    """Whether one of two modules is the other, or lies inside it."""
    return f"{name}.".startswith(f"{known}.") or f"{known}.".startswith(f"{name}.")


def base_model(model: Any) -> PreTrainedModel:
    """The PreTrainedModel itself, or the one inside a PEFT model; TypeError for anything else."""
    if isinstance(model, (str, os.PathLike, type, PretrainedConfig)):
        what = repr(model) if isinstance(model, (str, type)) else type(model).__name__
        raise TypeError(
            f"expected a transformers model, got {what}: load one first, for example "
            "model = AutoModelForCausalLM.from_pretrained(name)"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(base).__name__}; of a wrapper, pass the model inside, such as "
            "accelerator.unwrap_model(model); for plain tensors there is hf_polyattn.polynomial_attention"
        )
    return base


def _is_fsdp(model: nn.Module) -> bool:
    return any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(model).__mro__)
