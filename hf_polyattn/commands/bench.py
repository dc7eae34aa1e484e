"""`hf-polyattn bench`: what an attention costs on this machine, beside softmax."""

import itertools
import json
import platform
from argparse import Namespace

import torch
import transformers
from tqdm import tqdm

from .._version import __version__
from ..ops.cpu import build
from ..ops.forms import FORMS
from ..tables import format_table
from ..timing import BASELINE, HEADS, TOKENS, Cell, Timing, measure

QUICK = {"dtypes": ["float32"], "lengths": [256], "seconds": 0.1}
FULL = {"dtypes": ["float32", "bfloat16"], "lengths": [512, 2048], "seconds": 1.0}
"""What is timed where the command line says nothing; minutes or seconds."""
ROUNDS = 5
STEADY = 0.25
"""Interquartile range over the median up to which the times of one candidate are taken for one number."""


def run(args: Namespace) -> str:
    """Times every cell, and says how, as a table or as JSON."""
    given = {name: getattr(args, name) for name in FULL if getattr(args, name) is not None}
    plan = {**(QUICK if args.quick else FULL), **given}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(args, plan, device)
    if args.threads:
        torch.set_num_threads(args.threads)
    forms = args.forms or (["fused", "tiled"] if device == "cuda" else ["cpu", "tiled"])
    cells = [
        Cell(pass_, dtype, args.mask, args.head_dim, length, device)
        for pass_, dtype, length in itertools.product(args.passes, plan["dtypes"], plan["lengths"])
    ]
    if "cpu" in forms:
        # half a minute where it is not there yet, and not to be timed
        build()
    timings: list[Timing] = []
    absent: list[str] = []
    for cell in tqdm(cells, desc="cells", disable=None):
        timings += measure(cell, args.phis, forms, plan["seconds"], absent.append, ROUNDS)
    here = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} {build().instruction_set}",
        "threads": torch.get_num_threads(),
        "versions": {"hf_polyattn": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if args.json:
        return json.dumps({**here, "timings": [_as_json(timing) for timing in timings], "absent": absent}, indent=2)
    return _as_table(args, timings, absent, here)


def _check(args: Namespace, plan: dict, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    for flag, values in (("lengths", plan["lengths"]), ("head-dim", [args.head_dim]), ("threads", [args.threads])):
        if any(value is not None and value < 1 for value in values):
            raise ValueError(f"--{flag} must be 1 or more, got {min(values)}")
    if not 0 <= plan["seconds"] < float("inf"):
        raise ValueError(f"--seconds must be 0 or more, got {plan['seconds']:g}")
    if unknown := [form for form in args.forms or () if form not in (*FORMS, "auto")]:
        raise ValueError(f"--forms: there is no form {unknown[0]!r}: choose of {', '.join((*FORMS, 'auto'))}")


def _as_json(timing: Timing) -> dict[str, object]:
    cell, (low, median, high) = timing.cell, timing.seconds
    return {
        "pass": cell.pass_,
        "dtype": cell.dtype,
        "mask": cell.mask,
        "head_dim": cell.head_dim,
        "length": cell.length,
        "candidate": timing.candidate,
        "milliseconds": {"median": median * 1e3, "quartiles": [low * 1e3, high * 1e3]},
        "speed_over_softmax": timing.ratio,
        "relative_error": timing.relative_error,
        "rounds": timing.rounds,
    }


def _as_table(args: Namespace, timings: list[Timing], absent: list[str], here: dict) -> str:
    names = list(dict.fromkeys(timing.candidate for timing in timings if timing.candidate != BASELINE))
    found: dict[Cell, dict[str, Timing]] = {}
    for timing in timings:
        found.setdefault(timing.cell, {})[timing.candidate] = timing
    rows = [
        [
            cell.pass_,
            cell.dtype,
            f"{cell.length:,}",
            f"{times[BASELINE].seconds[1] * 1e3:.3g} ms",
            *(f"{times[name].ratio:.2f}" if name in times else "-" for name in names),
        ]
        for cell, times in found.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    rounds = min(timing.rounds for timing in timings)
    return "\n".join(
        [
            format_table(["pass", "dtype", "N", BASELINE, *names], rows),
            f"speed over {BASELINE}: above 1 is faster. {args.mask}, {HEADS} heads of {args.head_dim}, {TOKENS:,} "
            f"tokens a batch or more; medians of {rounds} rounds or more, each result checked against the definition",
            f"{here['device']}, {here['threads']} threads; {versions}",
            *absent,
            *_unsteady(timings),
        ]
    )


def _unsteady(timings: list[Timing]) -> list[str]:
    """A line where times of the same call spread too far to be compared."""
    spreads = [(timing.seconds[2] - timing.seconds[0]) / timing.seconds[1] for timing in timings]
    loose = [spread for spread in spreads if spread > STEADY]
    if not loose:
        return []
    return [
        f"{len(loose)} of {len(timings)} times are unsteady, quartiles up to {max(loose):.0%} of the median apart: do "
        "not quote these ratios; stop what else is running, or raise --seconds"
    ]
