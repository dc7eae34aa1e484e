"""Polynomial attention instead of softmax for Hugging Face Transformers models.

Importing this package registers an attention function, a mask function and the polynomial configurations with
Transformers. It changes nothing else. What only those need who make or change a model is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import attention
from ._version import __version__
from .activations import register_activation
from .architectures import fused_query_key, linear_query_key, register_architecture
from .config import PolyAttentionConfig
from .ops import polynomial_attention

if TYPE_CHECKING:
    from .calibration import calibrate, calibrate_gain
    from .initialization import start_scores
    from .patching import Coverage, choose_heads, coverage, patch_model, patched, set_backend, unpatch_model
    from .recurrent_cache import RecurrentCache

_ON_FIRST_USE = {
    "calibration": ["calibrate", "calibrate_gain"],
    "initialization": ["start_scores"],
    "patching": ["Coverage", "choose_heads", "coverage", "patch_model", "patched", "set_backend", "unpatch_model"],
    "recurrent_cache": ["RecurrentCache"],
}

attention.register()
register_architecture(
    "gpt2", ["GPT2Attention"], query_key=fused_query_key, output_projection="c_proj", reads_packing=True
)
register_architecture(
    "llama",
    ["LlamaAttention"],
    query_key=linear_query_key("q_proj", "k_proj"),
    output_projection="o_proj",
    reads_packing=True,
)
register_architecture(
    "bert",
    ["BertSelfAttention", "BertCrossAttention"],
    query_key=linear_query_key("query", "key"),
    output_projection=".output.dense",
)
register_architecture(
    "vit", ["ViTAttention"], query_key=linear_query_key("q_proj", "k_proj"), output_projection="o_proj"
)

__all__ = [
    "Coverage",
    "PolyAttentionConfig",
    "RecurrentCache",
    "__version__",
    "calibrate",
    "calibrate_gain",
    "choose_heads",
    "coverage",
    "patch_model",
    "patched",
    "polynomial_attention",
    "register_activation",
    "register_architecture",
    "set_backend",
    "start_scores",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    """Imports the module that a name comes from, or is the name of."""
    for module, names in _ON_FIRST_USE.items():
        if name == module or name in names:
            home = import_module(f".{module}", __name__)
            return home if name == module else globals().setdefault(name, getattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
