"""`hf-polyattn inspect`: which attention of a checkpoint is polynomial, and with what numbers."""

import json
from argparse import Namespace

from ..models import PolyModelMixin, read_settings, states
from ..patching import coverage
from ..tables import format_states
from .loading import holds_adapters, load_adapted, load_checkpoint


def run(args: Namespace) -> str:
    """Coverage, configuration and learned state of args.path, as tables or as JSON."""
    model, adapters = load_adapted(args.path) if holds_adapters(args.path) else (load_checkpoint(args.path), None)
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
