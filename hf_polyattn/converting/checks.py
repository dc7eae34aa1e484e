"""What is looked at before a conversion begins, so that a mistake is told at once and leaves nothing behind."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_stages import STAGES, CalibrateStage, ConversionArguments, ConversionTextArguments

from ..activations import resolve_config
from ..coefficient_fit import check_linear
from ..config import PolyAttentionConfig
from ..training.data import load_texts, texts_of
from ..training.tokenizers import load_tokenizer
from .folder import say
from .sources import is_gguf, load_own_tokenizer

SAMPLE = 20_000
"""Characters of the text that are looked at."""
UNKNOWN = 0.05
"""Share of its tokens above which a text is refused: rare signs are unknown to any tokenizer of words."""


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
    settings = resolve_config(attention.activation or "poly", calibrated=True, **named)
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
    """The tokenizer that the arguments name, or the checkpoint's own.

    Raises:
        ValueError: where it takes the text apart other than the checkpoint's own does, or does not know it.
    """
    rows = load_texts(text)
    sample = _beginning(texts_of(*rows, columns=[text.text_column]))
    own = load_own_tokenizer(args.model) if text.tokenizer or is_gguf(args.model) else None
    if own is not None and not text.tokenizer:
        tokenizer = own
    else:
        texts = texts_of(*rows, columns=[text.text_column])
        tokenizer = load_tokenizer(text.tokenizer or args.model, texts, special_tokens=())
        if own is not None:
            _check_alike(tokenizer, own, sample)
    _check_known(tokenizer, sample)
    return tokenizer


def _beginning(texts: Iterable[str]) -> list[str]:
    """The first texts, SAMPLE characters of them."""
    found: list[str] = []
    left = SAMPLE
    for text in texts:
        found.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return found


def _check_alike(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, sample: list[str]) -> None:
    """Raises ValueError where a tokenizer stands for other rows of the embedding than the checkpoint's own."""
    # not the one of padding, which is never attended to
    names = ("bos_token_id", "eos_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    special = [
        f"{name} is {getattr(tokenizer, name)}, its own {getattr(own, name)}"
        for name in names
        if getattr(tokenizer, name) != getattr(own, name)
    ]
    what = ", ".join(special)
    if not what and _ids(tokenizer, sample) != _ids(own, sample):
        what = "the text becomes other tokens"
    if what:
        raise ValueError(
            f"the tokenizer is not the one that the checkpoint was trained with: {what}. Leave --tokenizer out"
        )


def _check_known(tokenizer: PreTrainedTokenizerBase, sample: list[str]) -> None:
    """Raises ValueError where the tokenizer does not know the text; says so where a few tokens are unknown."""
    ids = _ids(tokenizer, sample)
    unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
    if not unknown:
        return
    what = f"{unknown:,} of the first {len(ids):,} tokens of the text are unknown to the tokenizer"
    if unknown > UNKNOWN * len(ids):
        raise ValueError(f"{what}: name the tokenizer that the checkpoint was trained with, or text of its language")
    say(what)


def _ids(tokenizer: PreTrainedTokenizerBase, sample: list[str]) -> list[int]:
    rows = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for row in rows for token in row]
