"""`hf-polyattn eval`: what a checkpoint is worth, alone or beside another one."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..evaluation import Evaluation, Score, difference
from ..models import PolyModelMixin, read_settings
from ..patch_report import describe
from ..patching import coverage
from ..tables import format_table
from ..training.devices import device_name
from ..training.tokenizers import own_tokenizer
from .loading import check_vocabulary, holds_adapters, load_adapted, load_checkpoint

OPTIONS = {
    "text": ("block_size", "stride"),
    "data": ("metric", "text_column", "pair_column", "label_column", "column_names", "max_length"),
    "tasks": ("include_path", "shots"),
}
"""What is measured -> the options that belong to it alone."""

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Evaluation]


def run(args: Namespace) -> str:
    """Measures args.path, and args.against if there is one, as a table or as JSON."""
    _check(args)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    names = [args.path, args.against] if args.against else [args.path]
    measure = _measure(args)
    reports, found = [], []
    for name in names:
        # one after the other, so that memory holds one model
        report, evaluation = _evaluate(name, args, measure)
        reports.append(report)
        found.append(evaluation)
    if len(found) == 2 and found[0].scores.keys() != found[1].scores.keys():
        raise ValueError(f"{args.path} and {args.against} are models of different kinds: there is nothing to compare")
    apart = difference(*found) if len(found) == 2 else {}
    if args.json:
        return json.dumps(_as_json(reports, found, apart), indent=2)
    return _as_table(args, reports, found, apart)


def _check(args: Namespace) -> None:
    """Raises for an option that would be left unread, and for files that are not there, before a model is loaded."""
    kind = _kind(args)
    for other, options in OPTIONS.items():
        for option in options:
            if other != kind and getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise ValueError(f"{flag} goes with --{other}, and this measures --{kind}: leave it out")
    for name in ("block_size", "stride", "max_length", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.text and not Path(args.text).is_file():
        raise FileNotFoundError(f"no such text for --text: {args.text}")
    if args.device and args.device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")


def _kind(args: Namespace) -> str:
    return next(kind for kind in OPTIONS if getattr(args, kind))


def _measure(args: Namespace) -> Measure:
    """What is to be done with each model; the imports of one kind are not needed for another."""
    common: dict[str, Any] = {"batch_size": args.batch_size} if args.batch_size else {}
    if args.text:
        return _text(args, common)
    if args.data:
        return _data(args, common)
    from ..evaluation.harness import find_tasks, measure_tasks

    manager = find_tasks(args.tasks, args.include_path)
    return partial(measure_tasks, names=args.tasks, manager=manager, shots=args.shots, limit=args.limit, **common)


def _text(args: Namespace, common: dict[str, Any]) -> Measure:
    from ..evaluation.text import default_block_size, measure_text

    text = Path(args.text).read_text(encoding="utf-8")
    # the first model's own, for both: a longer context would be an advantage
    sizes = [args.block_size] if args.block_size else []

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        sizes.append(default_block_size(model))
        options = {"block_size": sizes[0], "stride": args.stride, "limit": args.limit, **common}
        return measure_text(model, tokenizer, text, **options)

    return measure


def _data(args: Namespace, common: dict[str, Any]) -> Measure:
    from ..evaluation.labels import measure_labels
    from ..training.data import load_rows

    rows = load_rows(args.data, column_names=args.column_names)
    rows = rows.select(range(min(args.limit, len(rows)))) if args.limit else rows
    names = ("text_column", "pair_column", "label_column", "max_length")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return partial(measure_labels, rows=rows, metrics=args.metric, **options, **common)


def _evaluate(path: str, args: Namespace, measure: Measure) -> tuple[dict[str, Any], Evaluation]:
    """What the model at `path` is, and what was measured of it."""
    model, adapters = load_adapted(path) if holds_adapters(path) else (load_checkpoint(path), None)
    tokenizer = own_tokenizer(args.tokenizer or path)
    if tokenizer is None:
        raise ValueError(
            f"{args.tokenizer or path} holds no tokenizer: name the one that {path} was trained with, --tokenizer DIR"
        )
    check_vocabulary(tokenizer, model, path)
    if tokenizer.pad_token is None:
        # padded positions are masked, so that the token does not matter
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device=device, dtype=getattr(torch, args.dtype) if args.dtype else None)  # type: ignore[call-arg]
    report = {
        "path": path,
        "class": type(model).__name__,
        "attention": _attention(model),
        "coverage": str(coverage(model)),
        "adapters": adapters,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
    }
    try:
        return report, measure(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _attention(model: PreTrainedModel) -> str:
    if not isinstance(model, PolyModelMixin):
        return "softmax"
    covered = coverage(model)
    patched, heads = sum(covered.patched.values()), sum(covered.heads.values())
    return describe(read_settings(model.config)) + ("" if patched == heads else f", {patched} of {heads} heads")


def _as_json(reports: list[dict], found: list[Evaluation], apart: dict[str, Score]) -> dict[str, Any]:
    checkpoints = [
        {**report, "data": dict(evaluation.data), "scores": _numbers(evaluation.scores)}
        for report, evaluation in zip(reports, found, strict=True)
    ]
    versions = {"hf_polyattn": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"checkpoints": checkpoints, "difference": _numbers(apart) if apart else None, "versions": versions}


def _numbers(scores: Any) -> dict[str, dict[str, float | None]]:
    return {name: {"value": s.value, "standard_error": s.standard_error} for name, s in scores.items()}


def _as_table(args: Namespace, reports: list[dict], found: list[Evaluation], apart: dict[str, Score]) -> str:
    header = ["", *(report["path"] for report in reports), *(["difference"] if apart else [])]
    rows = [["attention", *(report["attention"] for report in reports), *([""] if apart else [])]]
    for name in found[0].scores:
        cells = [_shown(evaluation.scores[name]) for evaluation in found]
        rows.append([name, *cells, *([_shown(apart[name], sign=True)] if apart else [])])
    first = reports[0]
    device = " and ".join(dict.fromkeys(f"{report['dtype']} on {report['device']}" for report in reports))
    source = "" if args.tasks else f"{args.text or args.data}: "
    lines = [
        format_table(header, rows),
        f"{source}{_described(found[0])}; {device}",
    ]
    if any(score.standard_error is not None for score in found[0].scores.values()):
        lines.append("±: standard error" + ("; of the difference, paired" if _is_paired(apart) else ""))
    if args.text and any(report["vocabulary"] != first["vocabulary"] for report in reports):
        lines.append("their tokenizers differ: compare bits per byte, not the numbers per token")
    return "\n".join(lines)


def _is_paired(apart: dict[str, Score]) -> bool:
    return any(score.standard_error is not None for score in apart.values())


def _described(evaluation: Evaluation) -> str:
    data = evaluation.data
    if "blocks" in data:
        stride = f" from {data['stride']} to {data['stride']}" if data["stride"] != data["block_size"] else ""
        size = f"{data['blocks']:,} blocks of {data['block_size']}{stride}"
        return f"{data['predicted_tokens']:,} predicted tokens in {size}"
    if "rows" in data:
        return f"{data['rows']:,} rows"
    return ", ".join(f"{task} {count:,} documents" for task, count in data["documents"].items())


def _shown(score: Score, sign: bool = False) -> str:
    digits = 1 if abs(score.value) >= 1000 else 4
    value = format(score.value, f"{'+' if sign else ''},.{digits}f")
    return value if score.standard_error is None else f"{value} ± {score.standard_error:.{digits}f}"
