"""What is looked at before a conversion begins, so that a mistake is told at once and leaves nothing behind."""

from transformers import PreTrainedTokenizerBase

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_stages import STAGES, CalibrateStage, ConversionArguments, ConversionTextArguments

from ..activations import resolve_config
from ..coefficient_fit import check_linear
from ..config import PolyAttentionConfig
from ..training.data import load_texts, texts_of
from ..training.tokenizers import load_tokenizer
from .sources import is_gguf, load_own_tokenizer


def check_settings(args: ConversionArguments, attention: AttentionArguments) -> PolyAttentionConfig:
    """The settings of the patch.

    Raises ValueError for what means nothing here, and for polynomials that least squares cannot fit.
    """
    untouched = AttentionArguments()
    for name, instead in {
        "calibrate_batches": "calibrate.batches",
        "calibration_fit": "calibrate.fit",
        "calibration_target": "calibrate.fit",
        "transfer_steps": "transfer.steps",
    }.items():
        if getattr(attention, name) != getattr(untouched, name):
            raise ValueError(f"{name} belongs to the other recipes: use --{instead}")
    if attention.activation == "softmax":
        raise ValueError("softmax to softmax is no conversion: name a polynomial")
    named = {"alpha": "auto", "gain": "auto", **attention.options()}
    settings = resolve_config(attention.activation or "poly", **named)
    for _, stage in args.plan(tuple(STAGES)):
        if isinstance(stage, CalibrateStage) and stage.fit == "coefficients":
            try:
                check_linear(settings)
            except ValueError as error:
                raise ValueError(f"{error}; here: --calibrate.fit gain") from error
        if isinstance(stage, CalibrateStage) and stage.fit == "gain" and args.shares != [1.0]:
            raise ValueError("shares go by how well coefficients follow each head: use --calibrate.fit coefficients")
    return settings


def find_tokenizer(args: ConversionArguments, text: ConversionTextArguments) -> PreTrainedTokenizerBase:
    if is_gguf(args.model) and not text.tokenizer:
        return load_own_tokenizer(args.model)
    texts = texts_of(*load_texts(text), columns=[text.text_column])
    return load_tokenizer(text.tokenizer or args.model, texts, special_tokens=())
