"""Runs of the console script in this process, and checkpoints on disk for it."""

from pathlib import Path

from models import tiny
from transformers import AutoModelForCausalLM

import hf_polyattn
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_cli import main

TEXT = "Polynomials instead of softmax: even, odd, and the sum of a row. "


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `hf-polyattn argv`."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def save(folder: Path, family: str = "gpt2", auto=AutoModelForCausalLM, poly: dict | None = None, **options) -> Path:
    """A tiny model with a byte tokenizer, patched where `poly` holds options for that."""
    tokenizer = byte_tokenizer(("eos_token", "pad_token", "cls_token", "sep_token", "mask_token"))
    options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **options}
    model = tiny(family, auto, double=False, **options)
    if poly is not None:
        hf_polyattn.patch_model(model, **poly)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
