"""What the commands `patch`, `inspect`, `card`, `push` and `doctor` do; each returns the text to print."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import doctor as machine
from . import models
from .activations import resolve_config
from .architectures import STOCK_PREFIX
from .figures import draw_losses
from .hub import CARD
from .hub import push as publish
from .model_card import model_card, portable, read_results
from .models import PolyModelMixin, read_settings, states
from .patch_report import Source, advice, describe
from .patching import coverage, patch_model
from .tables import format_states

ADAPTER_CONFIG = "adapter_config.json"
BATCHES, SEQUENCES, MAX_LENGTH = 4, 2, 256
"""Calibration from a file: batches, sequences of each, and tokens of each at most."""


def load_checkpoint(path: str) -> PreTrainedModel:
    """The model at `path` (folder or Hub name), in the class that its config.json names.

    Raises:
        FileNotFoundError: when `path` is neither a folder nor can be a Hub name.
        ValueError: when config.json names no class, or one that Transformers does not have.
    """
    transformers.logging.disable_progress_bar()
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"no such folder: {path}")
    if _holds_adapters(path):
        raise ValueError(
            f"{path} holds adapters and no whole model: merge them first, as with "
            f"hf_polyattn.training.lora.load_trained(AutoModelForCausalLM, Path({path!r})).save_pretrained(OUT)"
        )
    _check_model_type(path)
    config = AutoConfig.from_pretrained(path)
    names = config.architectures or []
    if not names:
        raise ValueError(f"config.json of {path} names no architectures, so the class of the model cannot be told")
    cls = getattr(models, names[0], None) or getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(f"{path} is a {names[0]}, which this version of transformers does not have")
    return cls.from_pretrained(path)


def _holds_adapters(path: str) -> bool:
    return Path(path, ADAPTER_CONFIG).is_file() and not Path(path, "config.json").exists()


def load_adapted(path: str) -> tuple[PreTrainedModel, str]:
    """The base model of the adapters in a folder with the adapters merged in, and what these are.

    Raises:
        FileNotFoundError: when the base that they name is a folder that is not there.
    """
    # only here: it takes a second, and most checkpoints need no PEFT
    from peft import PeftConfig, PeftModel

    adapters = PeftConfig.from_pretrained(path)
    base = str(adapters.base_model_name_or_path)
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


def patch(args: Namespace) -> str:
    """Loads args.source, patches it, saves it with its tokenizer in args.to."""
    out = Path(args.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give --to a new folder")
    # before the model is read, which may take minutes
    _check_calibration(args)
    options = _options(args)
    resolve_config(args.activation, **{name: value for name, value in options.items() if name != "budget"})
    model = load_checkpoint(args.source)
    tokenizer = load_tokenizer(args.source)
    if args.calibrate:
        if tokenizer is None:
            raise ValueError(f"{args.source} has no tokenizer, and --calibrate needs one")
        options["calibrate"] = calibration_batches(tokenizer, Path(args.calibrate), model)
        options["fit"] = args.fit or "gain"
    source = Source.of(model)
    patch_model(model, args.activation, **options)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    what = describe(read_settings(model.config))
    found = "" if tokenizer is not None else " (no tokenizer was found in the source)"
    return f"saved to {out}: {what}{found}\n{advice(source, model)}"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, None when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None
    # for a folder without tokenizer files Transformers makes one up that knows special tokens only
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


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


def calibration_batches(tokenizer: PreTrainedTokenizerBase, file: Path, model: PreTrainedModel) -> list[torch.Tensor]:
    """Up to BATCHES tensors of input ids [SEQUENCES, T] from the start of a text file.

    Raises:
        ValueError: for a text that does not fill one batch.
    """
    length = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    size = SEQUENCES * length
    if len(ids) < size:
        raise ValueError(f"{file} holds {len(ids)} tokens, and calibration needs at least {size}")
    return [
        torch.tensor(ids[at : at + size]).view(SEQUENCES, length)
        for at in range(0, min(len(ids), BATCHES * size) - size + 1, size)
    ]


def card(args: Namespace) -> str:
    """Writes the card of args.path; results and figure go beside it, where `push` finds them."""
    folder = Path(args.path)
    out = Path(args.out) if args.out else folder / CARD
    results, twin = (read_results(path) if path else None for path in (args.results, args.twin))
    model = load_checkpoint(args.path)
    runs = {"this model": args.results, "softmax twin": args.twin}
    logs = {label: Path(path).with_name("metrics.jsonl") for label, path in runs.items() if path}
    figure = _figure(args.figure, {label: log for label, log in logs.items() if log.exists()}, out.parent)
    text = model_card(
        model,
        results,
        twin,
        name=args.name or folder.resolve().name,
        base_model=args.base_model,
        license=args.license,
        figure=figure,
    )
    if text.data.get("license") is None:
        raise ValueError("the licence cannot be told from the base model: name it, such as --license apache-2.0")
    text.save(out)
    for content, name in ((results, "results.json"), (twin, "results_softmax.json")):
        if content:
            (out.parent / name).write_text(json.dumps(portable(content), indent=2), encoding="utf-8")
    return f"card: {out}"


def _figure(given: str | None, logs: dict[str, Path], folder: Path) -> str | None:
    """Name of the image in `folder`: a copy of the given one, or the losses of `logs`; None without either."""
    if given:
        target = folder / Path(given).name
        if not target.exists() or not target.samefile(given):
            shutil.copyfile(given, target)
        return target.name
    return draw_losses(logs, folder / "losses.png").name if logs else None


def push(args: Namespace) -> str:
    """Uploads args.path to args.to."""
    transformers.logging.disable_progress_bar()
    done = publish(
        args.path,
        args.to,
        private=args.private or None,
        revision=args.revision,
        message=args.message,
        create_pr=args.create_pr,
    )
    url = done.pr_url or done.commit_url
    return json.dumps({"url": url, "commit": done.oid}, indent=2) if args.json else f"pushed: {url}"


def doctor(args: Namespace) -> str:
    """Which forms this machine has."""
    return machine.report()


def inspect(args: Namespace) -> str:
    """Coverage, configuration and learned state of args.path, as tables or as JSON."""
    model, adapters = load_adapted(args.path) if _holds_adapters(args.path) else (load_checkpoint(args.path), None)
    covered = coverage(model)
    settings = read_settings(model.config) if isinstance(model, PolyModelMixin) else None
    tensors = {name: dict(state.state_dict()) for name, state in states(model).items()}
    count = sum(p.numel() for p in model.parameters())
    if args.json:
        return json.dumps(
            {
                "class": type(model).__name__,
                "model_type": model.config.model_type,
                "adapters": adapters,
                "parameters": count,
                "patched": dict(covered.patched),
                "softmax": list(covered.softmax),
                "config": settings.to_dict() if settings else None,
                "state": {name: {key: x.tolist() for key, x in state.items()} for name, state in tensors.items()},
            },
            indent=2,
        )
    lines = [f"{type(model).__name__}, model_type {model.config.model_type}, {count:,} parameters", str(covered)]
    if adapters is not None:
        lines.append(adapters)
    if settings is not None:
        shown = {name: value for name, value in settings.to_dict().items() if value is not None}
        lines += ["", *(f"  {name}: {value}" for name, value in shown.items())]
        lines += ["", "mean over heads (min to max)", format_states(tensors)]
    return "\n".join(lines)
