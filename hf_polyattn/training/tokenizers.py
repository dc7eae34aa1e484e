"""Two tokenizers that need no files, and the door to all others. Saved with a model, each reloads by AutoTokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "unk_token": "<|unknown|>",
    "cls_token": "<|cls|>",
    "sep_token": "<|sep|>",
    "mask_token": "<|mask|>",
}
"""Appended after the plain vocabulary, in this order, where a job asks for them."""


_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "source.spm", "bpe.codes", "tiktoken")
"""How the files begin of which a tokenizer is made."""


class NoTokenizerError(ValueError):
    """Where a tokenizer was looked for there is none."""


def load_tokenizer(
    name: str | None, texts: Iterable[str] = (), special_tokens: Iterable[str] = ("eos_token", "pad_token")
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe.

    name: "bytes", "chars", a folder or a Hub name.
    texts: what "chars" takes its characters from.
    special_tokens: keys of SPECIAL_TOKENS that "bytes" and "chars" get, and that any other must have.
    Raises:
        NoTokenizerError: a ValueError, for a folder or repository without a tokenizer.
        ValueError: for no name, or a special token that is missing and cannot be replaced.
        OSError: for files that cannot be read, or a Hub that cannot be reached.
    """
    names = list(special_tokens)
    if not name:
        raise ValueError(
            "a new model has no tokenizer of its own: set tokenizer to bytes, chars, a folder or a Hub name"
        )
    if name == "bytes":
        return byte_tokenizer(names)
    if name == "chars":
        return char_tokenizer(texts, names)
    tokenizer = _load(name)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # GPT-2 and its like were trained without padding; padded positions carry no loss, so the token does not matter
        tokenizer.pad_token = tokenizer.eos_token
    if missing := [token for token in names if getattr(tokenizer, token, None) is None]:
        raise ValueError(
            f"tokenizer {name!r} has no {', '.join(missing)}, which this recipe needs: choose another one"
        )
    return tokenizer


def _load(name: str) -> PreTrainedTokenizerBase:
    none = f"{name} holds no tokenizer: set tokenizer to bytes, chars, a folder or a Hub name"
    folder = Path(name)
    if folder.is_dir() and not any(path.name.startswith(_FILES) for path in folder.iterdir()):
        raise NoTokenizerError(none)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        # of a repository without tokenizer files; what is there and broken, and a Hub out of reach, say so themselves
        if folder.is_dir() or isinstance(error, json.JSONDecodeError):
            raise
        raise NoTokenizerError(none) from error
    # of a repository without tokenizer files Transformers makes one up that knows special tokens only
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise NoTokenizerError(none)
    return tokenizer


def own_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, a folder or a Hub name; None where there is none.

    Raises OSError or ValueError for one that is there and cannot be read, or a Hub that cannot be reached.
    """
    try:
        return _load(name)
    except NoTokenizerError:
        return None


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token where a tokenizer puts one in front of a text by itself, as LLaMA's do; empty elsewhere."""
    bos = tokenizer.bos_token_id
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return first if bos is not None and first == [bos] else []


def byte_tokenizer(special_tokens: Iterable[str] = ("eos_token", "pad_token")) -> PreTrainedTokenizerFast:
    """Token i is byte i of the UTF-8 text; special tokens follow from 256 on."""
    # the printable stand-in for each byte, in the order in which GPT-2 assigns them
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in stand_in]
    stand_in.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    tokenizer = Tokenizer(models.BPE({stand_in[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, special_tokens)


def char_tokenizer(texts: Iterable[str], special_tokens: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Token i is the i-th of the sorted characters of `texts`. A character that is not among them is an error.

    With "unk_token" among the special tokens such a character becomes that token instead.
    """
    special_tokens = list(special_tokens)
    characters = sorted(set().union(*texts))
    if not characters:
        raise ValueError("a character tokenizer needs text to take its characters from, and got none")
    unknown = SPECIAL_TOKENS["unk_token"] if "unk_token" in special_tokens else None
    words = [*characters, unknown] if unknown else characters
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer, special_tokens)


def _finish(tokenizer: Tokenizer, special_tokens: Iterable[str]) -> PreTrainedTokenizerFast:
    special = {name: SPECIAL_TOKENS[name] for name in special_tokens}
    tokenizer.add_special_tokens(list(special.values()))
    if {"cls_token", "sep_token"} <= set(special):
        cls, sep = special["cls_token"], special["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_input_names=_inputs(special), **special
    )


def _inputs(special: dict[str, str]) -> list[str]:
    pairs = ["token_type_ids"] if "sep_token" in special else []
    return ["input_ids", *pairs, "attention_mask"]
