"""`hf-polyattn patch`: a checkpoint with polynomial attention, saved."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..activations import resolve_config
from ..models import read_settings
from ..patch_report import Source, advice, describe
from ..patching import coverage, patch_model
from ..training.tokenizers import own_tokenizer
from .loading import batches_of, check_vocabulary, load_checkpoint


def run(args: Namespace) -> str:
    """Loads args.source, patches it, saves it with its tokenizer, or the one that was named, in args.to."""
    out = Path(args.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give --to a new folder")
    # before the model is read, which may take minutes
    _check_calibration(args)
    options = _options(args)
    asked = {name: value for name, value in options.items() if name != "budget"}
    resolve_config(args.activation, calibrated=bool(args.calibrate), **asked)
    named = own_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.tokenizer and named is None:
        raise ValueError(f"{args.tokenizer} holds no tokenizer: name the folder or Hub name of one with --tokenizer")
    model = load_checkpoint(args.source)
    tokenizer = named or own_tokenizer(args.source)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model, args.source)
    if args.calibrate:
        if tokenizer is None:
            raise ValueError(f"{args.source} has no tokenizer, and --calibrate needs one: name it with --tokenizer")
        options["calibrate"] = batches_of(tokenizer, Path(args.calibrate), model)
        options["fit"] = args.fit or "gain"
    source = Source.of(model)
    patch_model(model, args.activation, **options)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    settings, what_next = read_settings(model.config), advice(source, model)
    if args.json:
        covered = coverage(model)
        report = {
            "saved": str(out),
            "tokenizer": tokenizer is not None,
            "patched": dict(covered.patched),
            "softmax": list(covered.softmax),
            "config": settings.to_dict(),
            "advice": what_next,
        }
        return json.dumps(report, indent=2)
    found = "" if tokenizer is not None else " (no tokenizer was found in the source)"
    return f"saved to {out}: {describe(settings)}{found}\n{what_next}"


def _check_calibration(args: Namespace) -> None:
    if args.calibrate and not Path(args.calibrate).is_file():
        raise FileNotFoundError(f"no such text for --calibrate: {args.calibrate}")
    if args.fit and not args.calibrate:
        raise ValueError("--fit says what --calibrate sets: give it a text too")
    if args.budget is not None and not args.calibrate:
        raise ValueError("--budget needs --calibrate FILE, the text on which it finds the heads that fit best")
    if args.budget is not None and not 0 < args.budget <= 1:
        raise ValueError(f"--budget must be a share of the heads, above 0 and up to 1, got {args.budget:g}")


def _options(args: Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        "degree": args.degree,
        "layers": args.layers,
        "qk_norm": args.qk_norm or None,
        "learn_gain": args.learn_gain or None,
        "budget": args.budget,
    }
    if args.coefficients:
        options["coefficients"] = tuple(args.coefficients)
    if args.normalization:
        try:
            options["normalization"] = float(args.normalization)
        except ValueError:
            options["normalization"] = args.normalization
    return {name: value for name, value in options.items() if value is not None}
