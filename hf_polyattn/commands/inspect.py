"""`hf-polyattn inspect`: which attention of a checkpoint is polynomial, and with what numbers."""

import json
from argparse import Namespace
from pathlib import Path

from transformers import PreTrainedModel

from ..diagnostics import AttentionReport, attention_statistics, draw_heads
from ..models import PolyModelMixin, read_settings, states
from ..patching import coverage
from ..tables import format_states
from ..training.tokenizers import own_tokenizer
from .loading import batches_of, check_vocabulary, holds_adapters, load_adapted, load_checkpoint


def run(args: Namespace) -> str:
    """Coverage, configuration and learned state of args.path, as tables or as JSON."""
    if args.figure and not args.text:
        raise ValueError("--figure shows what a text makes of the heads: give --text FILE too")
    if args.text and not Path(args.text).is_file():
        raise FileNotFoundError(f"no such text: {args.text}")
    model, adapters = load_adapted(args.path) if holds_adapters(args.path) else (load_checkpoint(args.path), None)
    covered = coverage(model)
    settings = read_settings(model.config) if isinstance(model, PolyModelMixin) else None
    tensors = {name: dict(state.state_dict()) for name, state in states(model).items()}
    count = sum(p.numel() for p in model.parameters())
    report = _measured(model, args) if args.text else None
    if args.figure:
        gains = {name: dict(zip(s.heads, s.gain.tolist(), strict=True)) for name, s in states(model).items()}
        draw_heads(report, args.figure, gains)  # type: ignore[arg-type]
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
                "statistics": report.to_json() if report is not None else None,
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
    if report is not None:
        lines += ["", f"on {args.text}: {report}"]
    if args.figure:
        lines += ["", f"figure: {args.figure}"]
    return "\n".join(lines)


def _measured(model: PreTrainedModel, args: Namespace) -> AttentionReport:
    """Statistics of every head on the start of a text."""
    tokenizer = own_tokenizer(args.tokenizer or args.path)
    if tokenizer is None:
        raise ValueError(f"{args.path} has no tokenizer, and --text needs one: name it with --tokenizer")
    check_vocabulary(tokenizer, model, args.path)
    batches = batches_of(tokenizer, Path(args.text), model)
    return attention_statistics(model.eval(), [{"input_ids": ids} for ids in batches])
