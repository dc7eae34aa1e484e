"""Adapters through PEFT: low rank on the projections, the attention's learned state trained and saved in full."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_polyattn_arguments import LoraArguments

from ..architectures import get_architecture
from ..models import PolyModelMixin, read_settings
from ..patch_report import describe

ADAPTER = "adapter_model.safetensors"
BASE = "base"
"""Folder below a run's own where the base model of its adapters lies."""

NEEDS = """
## Base model

These adapters need the model in the folder `{base}` beside theirs, and no other: a {kind}.
Its attention is {attention}.

`base_model_name_or_path` in adapter_config.json is where it was. hf_polyattn finds it in another place too, if the
folders lie there as they did; for PEFT alone, correct that path. Merged into it, they are a model that needs no other:

```python
from pathlib import Path

from transformers import AutoModelForCausalLM  # or the Auto class of its task

from hf_polyattn.training.lora import load_trained

load_trained(AutoModelForCausalLM, Path("this folder")).save_pretrained("merged")
```

"""


def add_lora(accelerator: Accelerator, model: PreTrainedModel, args: LoraArguments, folder: Path) -> PeftModel:
    """`model` with adapters; the model is first saved to `folder`, and the adapter names that as its base.

    Whatever it was made from may differ: in its attention, which an adapter would meet in silence, or in its number
    of labels. The name is an absolute path: see `base_of` and `describe_base`.
    Raises RuntimeError when learned attention state would be left out of training.
    """
    targets = args.lora_target_modules or attention_projections(model)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    model.name_or_path = str(folder.resolve())
    learned = learned_state(model)
    classifies = "ForSequenceClassification" in type(model).__name__
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=["polyattn"] if learned else None,
        # GPT-2's layers hold their matrix the other way round
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=TaskType.SEQ_CLS if classifies else None,
    )
    adapted = get_peft_model(model, config)
    if missing := len(learned) - len(learned_state(adapted)):
        raise RuntimeError(f"{missing} of {len(learned)} learned attention tensors would not be trained under PEFT")
    return adapted


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of all attention modules, the output projection among them: where adapters go.

    Raises ValueError for an architecture whose entry finds none.
    """
    entry = get_architecture(model.config)
    layers: dict[nn.Module, None] = {}
    for name, module in entry.attention_modules(model):
        inside = [child for child in module.modules() if isinstance(child, (nn.Linear, Conv1D))]
        projection = entry.projection(model, name)
        layers |= dict.fromkeys([*inside, *([projection] if projection is not None else [])])
    names = [name for name, module in model.named_modules() if module in layers]
    if not names:
        raise ValueError(f"no linear layers in the attention of {entry.model_type!r}: set lora_target_modules")
    return names


def learned_state(model: nn.Module) -> list[str]:
    """Names of the trainable parameters below `polyattn` modules."""
    return [name for name, p in model.named_parameters() if ".polyattn." in name and p.requires_grad]


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Raises RuntimeError when a saved adapter lacks learned attention state of `model`."""
    with safe_open(folder / ADAPTER, framework="pt") as file:
        saved = set(file.keys())
    missing = [name for name in learned_state(model) if name.replace(".modules_to_save.default", "") not in saved]
    if missing:
        raise RuntimeError(f"{folder} lacks learned attention tensors: {missing[:3]}")


def base_of(folder: Path) -> str:
    """Where the base model of adapters is: the folder `base` beside theirs if they name one, else what they name.

    They name it by its path of then: a copy of both must not take a base that was trained anew at the old place.
    """
    named = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    was, beside = Path(named), folder.resolve().parent / BASE
    is_beside = was.is_absolute() and was.name == BASE and beside.is_dir()
    return str(beside) if is_beside else named


def describe_base(folder: Path, model: PeftModel, source: str | None) -> None:
    """Says in the README that PEFT has written which model the adapters need, which a path alone does not.

    source: the checkpoint that the base was made from.
    """
    base = model.get_base_model()
    attention = describe(read_settings(base.config)) if isinstance(base, PolyModelMixin) else "softmax"
    kind = type(base).__name__ + (f" made from {source}" if source else "")
    section = NEEDS.format(base=BASE, kind=kind, attention=attention)
    card = ModelCard.load(folder / "README.md")
    card.text = section + card.text
    # PEFT names it by the path here too, where a name on the Hub is meant
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.save(folder / "README.md")


def resume_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model`, the base, with the trainable adapters of a checkpoint."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def load_trained(auto_class: Any, folder: Path) -> PreTrainedModel:
    """The model of a checkpoint that a recipe wrote; adapters are merged into their base."""
    if not (folder / ADAPTER).exists():
        return auto_class.from_pretrained(folder)
    base = auto_class.from_pretrained(base_of(folder), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
