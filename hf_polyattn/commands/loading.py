"""Checkpoints as the commands take them: a folder or a Hub name; every error says what to do."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import models
from ..architectures import STOCK_PREFIX
from ..positions import positions_of

ADAPTER_CONFIG = "adapter_config.json"
BATCHES, SEQUENCES, MAX_LENGTH = 4, 2, 256
"""What is read of a text to calibrate on or to measure on: batches, sequences of each, tokens of each at most."""


def load_checkpoint(path: str) -> PreTrainedModel:
    """The model at `path` (folder or Hub name), in the class that its config.json names.

    Raises:
        FileNotFoundError: when `path` is neither a folder nor can be a Hub name.
        ValueError: when a folder holds no config.json, or it names no class, or one that Transformers does not have.
    """
    transformers.logging.disable_progress_bar()
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"no such folder: {path}")
    if holds_adapters(path):
        raise ValueError(
            f"{path} holds adapters and no whole model: merge them first, as with "
            f"hf_polyattn.training.lora.load_trained(AutoModelForCausalLM, Path({path!r})).save_pretrained(OUT)"
        )
    _check_folder(Path(path))
    _check_model_type(path)
    config = AutoConfig.from_pretrained(path)
    names = config.architectures or []
    if not names:
        raise ValueError(f"config.json of {path} names no architectures, so the class of the model cannot be told")
    cls = getattr(models, names[0], None) or getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(f"{path} is a {names[0]}, which this version of transformers does not have")
    return cls.from_pretrained(path)


def _check_folder(folder: Path) -> None:
    """Raises for a folder that is no checkpoint, with the checkpoint inside it where it is the one of a run."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return
    inside = [folder / name for name in ("best", "last") if (folder / name / "config.json").exists()]
    if inside:
        raise ValueError(f"{folder} is the folder of a run: give its checkpoint, {inside[0]}")
    raise ValueError(
        f"{folder} holds no config.json, so it is no checkpoint: give a folder that save_pretrained wrote"
    )


def holds_adapters(path: str) -> bool:
    """Whether a folder holds adapters of PEFT and no whole model."""
    return Path(path, ADAPTER_CONFIG).is_file() and not Path(path, "config.json").exists()


def load_adapted(path: str) -> tuple[PreTrainedModel, str]:
    """The base model of the adapters in a folder with the adapters merged in, and what these are.

    Raises:
        FileNotFoundError: when the base that they name is a folder that is not there.
    """
    # only here: it takes a second, and most checkpoints need no PEFT
    from peft import PeftConfig, PeftModel

    from ..training.lora import base_of

    adapters = PeftConfig.from_pretrained(path)
    base = base_of(Path(path))
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise FileNotFoundError(
            f"the adapters in {path} belong to the model in {base}, which is not there: bring it back, or correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    model = PeftModel.from_pretrained(load_checkpoint(base), path).merge_and_unload()
    rank = f" of rank {adapters.r}" if hasattr(adapters, "r") else ""
    return model, f"{getattr(adapters.peft_type, 'value', adapters.peft_type)} adapters{rank} of {base}, merged in"


def _check_model_type(path: str) -> None:
    """Raises for a polynomial checkpoint of an architecture that only its makers' own module registers."""
    model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type") or ""
    if model_type.startswith(STOCK_PREFIX) and model_type not in CONFIG_MAPPING:
        stock = model_type.removeprefix(STOCK_PREFIX)
        raise ValueError(f"{path} is a {model_type}: it needs hf_polyattn.register_architecture({stock!r}, ...)")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, path: str) -> None:
    """Raises ValueError for a tokenizer of more tokens than the embedding of the model at `path` has rows."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, {path} {rows}: use the model's own tokenizer")


def batches_of(tokenizer: PreTrainedTokenizerBase, file: Path, model: PreTrainedModel) -> list[torch.Tensor]:
    """Up to BATCHES tensors of input ids [SEQUENCES, T] from the start of a text file.

    Raises:
        ValueError: for a text that does not fill one batch.
    """
    length = min(MAX_LENGTH, positions_of(model) or MAX_LENGTH)
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    size = SEQUENCES * length
    if len(ids) < size:
        raise ValueError(f"{file} holds {len(ids)} tokens, and at least {size} are needed")
    return [
        torch.tensor(ids[at : at + size]).view(SEQUENCES, length)
        for at in range(0, min(len(ids), BATCHES * size) - size + 1, size)
    ]
