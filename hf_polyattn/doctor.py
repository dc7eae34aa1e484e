"""Which forms of the operation this machine has, and why not the others."""

import platform

import torch
import transformers

from ._version import __version__
from .ops import cpu, fused
from .ops.crossover import CROSSOVER


def report() -> str:
    """Versions, processor, and one line a form; compiles the CPU form if that has not been done."""
    build = cpu.build()
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    fused_problem = fused.problem("cuda")
    rows = [
        ("recurrent", "yes", f"plain torch in linear time, for low degrees; {_where_it_pays()}"),
        ("cpu", "no" if build.problem else "yes", build.problem or f"compiled for {build.instruction_set}"),
        ("fused", "no" if fused_problem else "yes", fused_problem or "Triton kernels for this GPU"),
        ("tiled", "yes", "plain torch in linear memory, on any device"),
        ("naive", "yes", "the definition; what output_attentions and activations other than polynomials take"),
    ]
    return "\n".join(
        [
            f"hf_polyattn {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}",
            f"processor {name}, {torch.get_num_threads()} threads; GPUs: {', '.join(devices) or 'none'}",
            "",
            *(f"{form:<11}{here:<5}{why}" for form, here, why in [("form", "here", "why"), *rows]),
        ]
    )


def _where_it_pays() -> str:
    """From how many tokens on "auto" takes the linear form, of a causal model with heads of 64, as most have."""
    lengths = [f"{x.causal_forward:,} (degree {p})" for (p, dim), x in CROSSOVER.items() if dim == 64]
    return f'at head_dim 64 "auto" takes it on CPUs in float32 from {" or ".join(lengths)} tokens on'
