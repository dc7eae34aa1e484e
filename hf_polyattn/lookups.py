"""Tables of other libraries that are keyed by model_type or class name: the polynomial twin gets its stock entry.

Without them nothing raises: Trainer's label smoothing does not shift the labels of a causal model it cannot name,
pipelines report an unsupported model, AutoTokenizer guesses, PEFT asks for target modules.
"""

import sys
from collections.abc import MutableMapping
from typing import Any

from transformers import PretrainedConfig


def add_model_name(auto: type, model_type: str, class_name: str) -> None:
    """Enters a class into the table of names behind one Auto class, such as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES."""
    auto._model_mapping._model_mapping[model_type] = class_name  # type: ignore[attr-defined]


def add_tokenizer(config_class: type[PretrainedConfig], stock: type[PretrainedConfig]) -> None:
    """Gives a configuration class the tokenizer of its stock class."""
    # Transformers' tokenizers take as long to import as half of this package, and most of what imports it has none
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if (name := names.get(stock.model_type)) is not None:
        names[config_class.model_type] = name
    tokenizer = tokenization_auto.TOKENIZER_MAPPING.get(stock, None)
    if tokenizer is not None:
        AutoTokenizer.register(config_class, tokenizer_class=tokenizer, exist_ok=True)


def add_peft_targets(model_type: str, stock_type: str) -> None:
    """PEFT's default target modules for a model_type; does nothing until somebody has imported PEFT."""
    constants: Any = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, MutableMapping) and stock_type in table:
            table.setdefault(model_type, table[stock_type])
