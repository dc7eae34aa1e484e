"""Which forms of the operation this machine has, and why not the others."""

import platform
from typing import Any

import torch
import transformers

from ._version import __version__
from .ops import cpu, fused
from .ops.crossover import CROSSOVER


def facts() -> dict[str, Any]:
    """Versions, processor, and which forms are here; compiles the CPU form if that has not been done."""
    build = cpu.build()
    fused_problem = fused.problem("cuda")
    forms = [
        ("recurrent", True, f"plain torch in linear time, for low degrees; {_where_it_pays()}"),
        ("cpu", not build.problem, build.problem or f"compiled for {build.instruction_set}"),
        ("fused", not fused_problem, fused_problem or "Triton kernels for this GPU"),
        ("tiled", True, "plain torch in linear memory, on any device"),
        ("naive", True, "the definition; what output_attentions and activations other than polynomials take"),
    ]
    return {
        "versions": {
            "hf_polyattn": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "forms": {form: {"here": here, "why": why} for form, here, why in forms},
    }


def report() -> str:
    """The facts as text: versions, processor, and one line a form."""
    found = facts()
    forms = [(form, "yes" if entry["here"] else "no", entry["why"]) for form, entry in found["forms"].items()]
    return "\n".join(
        [
            ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
            f"processor {found['processor']}, {found['threads']} threads; GPUs: {', '.join(found['gpus']) or 'none'}",
            "",
            *(f"{form:<11}{here:<5}{why}" for form, here, why in [("form", "here", "why"), *forms]),
        ]
    )


def _where_it_pays() -> str:
    """From how many tokens on "auto" takes the linear form, of a causal model with heads of 64, as most have."""
    lengths = [f"{x.causal_forward:,} (degree {p})" for (p, dim), x in CROSSOVER.items() if dim == 64]
    return f'at head_dim 64 "auto" takes it on CPUs in float32 from {" or ".join(lengths)} tokens on'
