"""Polynomial attention instead of softmax for Hugging Face Transformers models.

Importing this package registers an attention function, a mask function and the polynomial configurations with
Transformers. It changes nothing else.
"""

from . import attention
from ._version import __version__
from .activations import register_activation
from .architectures import fused_query_key, linear_query_key, register_architecture
from .calibration import calibrate, calibrate_gain
from .config import PolyAttentionConfig
from .initialization import start_scores
from .ops import polynomial_attention
from .patching import Coverage, choose_heads, coverage, patch_model, patched, set_backend, unpatch_model
from .recurrent_cache import RecurrentCache

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
