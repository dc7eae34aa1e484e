"""The softmax checkpoint that a conversion starts from: a folder, a Hub name or a GGUF file."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models import PolyConfigMixin
from ..training.tokenizers import own_tokenizer


def load_teacher(name: str) -> PreTrainedModel:
    """The model of `name` in float32 and in eval mode, in the class that its configuration names.

    Raises:
        FileNotFoundError: when `name` is neither a folder or file nor can be a Hub name.
        ValueError: for a checkpoint that is polynomial already, or one whose class cannot be told.
    """
    where, options = _location(name)
    config = AutoConfig.from_pretrained(where, **options)
    if isinstance(config, PolyConfigMixin):
        raise ValueError(f"{name} is polynomial already: a conversion starts from a softmax checkpoint")
    names = config.architectures or (["LlamaForCausalLM"] if options and config.model_type == "llama" else [])
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(f"the configuration of {name} names no class of this version of transformers: {names}")
    model = cls.from_pretrained(where, dtype=torch.float32, **options)
    if options:
        # de-quantised weights are plain ones; without this save_pretrained takes them for quantised and refuses
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.eval()


def load_own_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or inside a GGUF file; None where there is none."""
    where, options = _location(name)
    return AutoTokenizer.from_pretrained(where, **options) if options else own_tokenizer(where)


def is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def _location(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if is_gguf(name):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {name}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"no such folder: {name}")
    return name, {}
