"""results.json of a conversion, as the recipes write it, so that a model card can be made of it."""

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_stages import ConversionArguments, ConversionTextArguments

from .. import versions
from ..training.devices import device_name, peak_mib
from .plan import Planned
from .report import ConversionReport


def results_of(
    args: ConversionArguments,
    attention: AttentionArguments,
    text: ConversionTextArguments,
    plan: Sequence[Planned],
    report: ConversionReport,
    student: PreTrainedModel,
) -> dict[str, Any]:
    """What results.json holds."""
    key = "validation_loss" if report.metric == "loss" else report.metric
    score = report.rows[-1].score
    return {
        key: score,
        "best": score,
        "best_metric": key,
        "softmax": report.rows[0].score,
        "recipe": "convert",
        "steps": report.steps,
        "seed": args.seed,
        "attention": student.config.polyattn,
        "parameters": sum(p.numel() for p in student.parameters()),
        "tokens": report.tokens,
        "seconds": report.seconds,
        "peak_mib": peak_mib(),
        "device": device_name(student.device),
        "python": platform.python_version(),
        "versions": versions.of_packages(),
        "command": shlex.join(sys.argv),
        "arguments": {**asdict(args), **_named(attention), **asdict(text)},
        # each share goes through the same stages
        "plan": [[s.kind, asdict(s.settings)] for s in plan if s.share in (None, args.shares[0])],
        "stages": report.to_dict(),
    }


def _named(attention: AttentionArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(attention).items() if value is not None}
