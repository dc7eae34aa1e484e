"""The compiled CPU form: `cpu.cpp` and its headers, built on first use, kept on disk, called as torch operators.

`HF_POLYATTN_CPU=0` switches it off; the name of an instruction set (`portable`, `avx2`, `avx512`, `avx512_bf16`)
forces that build. Builds are kept in `HF_POLYATTN_CACHE`, by default `~/.cache/hf_polyattn`.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .results import ONCE

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("cpu.h", "cpu_decode.h")]
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"],
}
NORMALIZATIONS: dict[str | float, int] = {"sqrt_length": 0, "length": 1, "sum": 2, "l1": 3, "l2": 4}
CONSTANT = 5
DTYPES = (torch.float32, torch.bfloat16)
MAX_DEGREE = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """What came of the attempt to have the kernel."""

    instruction_set: str
    problem: str | None = None
    """Why there is none, and what to do."""


_build: Build | None = None


def build() -> Build:
    """Loads the kernel, after compiling it where that has not been done; the first call may take a minute."""
    global _build
    if _build is None:
        _build = _load()
        if _build.problem:
            logger.warning("compiled CPU attention is not available, using plain torch: %s", _build.problem)
    return _build


def is_loaded() -> bool:
    """Whether the kernel is there without building anything: what a graph that is being compiled may ask."""
    return _build is not None and _build.problem is None


_step: Callable[..., torch.Tensor] | None = None


def step() -> Callable[..., torch.Tensor] | None:
    """The operator of `one_row.attend_row`; None where there is no compiled form."""
    global _step
    if _step is None and build().problem is None:
        _step = torch.ops.hf_polyattn.cpu_step.default
    return _step


def instruction_set() -> str:
    """The widest one of this processor that the kernel knows."""
    has = torch.cpu.get_capabilities()
    if has.get("avx512_f") and has.get("avx512_bw") and has.get("avx512_vl") and has.get("avx512_dq"):
        return "avx512_bf16" if has.get("avx512_bf16") else "avx512"
    return "avx2" if has.get("avx2") and has.get("fma3") else "portable"


def _load() -> Build:
    wanted = os.environ.get("HF_POLYATTN_CPU", "")
    name = wanted if wanted in INSTRUCTION_SETS else instruction_set()
    if wanted == "0":
        return Build(name, "HF_POLYATTN_CPU=0 switches it off")
    if wanted and wanted not in INSTRUCTION_SETS:
        return Build(name, f"HF_POLYATTN_CPU={wanted} is neither 0 nor one of {', '.join(INSTRUCTION_SETS)}")
    if platform.system() != "Linux":
        return Build(name, f"it was made for Linux, not for {platform.system()}")
    try:
        library = _library(name)
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            _compile(name, library)
        _register()
    except Exception as error:  # a compiler can fail in any way; plain torch still works
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Build(name, f"{first}; it needs g++, Python's headers and ninja, or HF_POLYATTN_CPU=0 for silence")
    return Build(name)


def _library(name: str) -> Path:
    """Where the build for this source, torch and instruction set lies."""
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    key = "\0".join([*sources, torch.__version__, *FLAGS, *INSTRUCTION_SETS[name], platform.machine()])
    cache = Path(os.environ.get("HF_POLYATTN_CACHE") or Path.home() / ".cache" / "hf_polyattn")
    return cache / f"cpu_{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _compile(name: str, library: Path) -> None:
    """Builds aside and renames, under a lock that dies with its process: others wait, and then load."""
    from filelock import FileLock
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if library.exists():
            torch.ops.load_library(str(library))
            return
        logger.warning("compiling the CPU attention for %s, once: half a minute", name)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(
                name=library.stem,
                sources=[str(SOURCE)],
                extra_cflags=[*FLAGS, *INSTRUCTION_SETS[name]],
                # without this at::parallel_for silently runs on one thread
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
            built = Path(folder) / library.name
            shutil.copyfile(built, built.with_suffix(".copy"))
            os.replace(built.with_suffix(".copy"), library)


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    degree: int,
    coefficients: torch.Tensor | None,
    gain: torch.Tensor | None,
    normalization: str | float,
    scaling: float,
    keep: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """As `tiled_attention`, in the query's dtype, with a gain [H] that carries no gradient.

    query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv] with any strides but 1 in the last dimension.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if coefficients is not None:
        coefficients = coefficients.float().contiguous()
        degree = coefficients.shape[1] - 1
    is_named = isinstance(normalization, str) and normalization != "none"
    out, _ = torch.ops.hf_polyattn.cpu_forward.default(
        query,
        key,
        value,
        coefficients,
        None if gain is None else gain.detach().float().contiguous(),
        degree,
        NORMALIZATIONS[normalization] if is_named else CONSTANT,  # type: ignore[index]
        1.0 if isinstance(normalization, str) else normalization,
        scaling,
        is_causal,
        sliding_window or 0,
        None if key_lengths is None else key_lengths.to(torch.int64).contiguous(),
        None if keep is None else keep[(None,) * (4 - keep.ndim)],
    )
    return out


@functools.cache
def _register() -> None:
    """What torch must know of the operators beside their code: shapes, and derivatives."""
    library = torch.library

    @library.register_fake("hf_polyattn::cpu_forward")
    def forward_shapes(query: Any, key: Any, value: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, rows, _ = query.shape
        out = query.new_empty(batch, heads, rows, value.shape[-1])
        if query.stride(1) < query.stride(2):
            out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        return out, query.new_empty(batch, heads, rows, dtype=torch.float32)

    @library.register_fake("hf_polyattn::cpu_step")
    def step_shape(query: Any, key: Any, value: Any, *options: Any) -> torch.Tensor:
        return query.new_empty(*query.shape[:3], value.shape[-1])

    @library.register_fake("hf_polyattn::cpu_backward")
    def backward_shapes(
        grad: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        divisors: Any,
        wants: bool,
        coefficients: Any,
        *rest: Any,
    ) -> tuple[torch.Tensor, ...]:
        of_coefficients = coefficients if wants else query.new_empty(0, dtype=torch.float32)
        return (*(torch.empty_like(x) for x in (query, key, value)), torch.empty_like(of_coefficients))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        query, key, value, coefficients, gain, *options, key_lengths, keep = inputs
        ctx.save_for_backward(query, key, value, *output, coefficients, gain, key_lengths, keep)
        ctx.options = options
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: torch.Tensor, unused: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, divisors, coefficients, gain, key_lengths, keep = ctx.saved_tensors
        wants = coefficients is not None and ctx.needs_input_grad[3]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv, dc = torch.ops.hf_polyattn.cpu_backward(
            grad, query, key, value, out, divisors, wants, coefficients, gain, *ctx.options, key_lengths, keep
        )
        return (dq, dk, dv, dc if wants else None, *[None] * (len(ctx.options) + 3))

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(ONCE.format(form="compiled"))

    library.register_autograd("hf_polyattn::cpu_forward", differentiate, setup_context=save)
    library.register_autograd("hf_polyattn::cpu_backward", refuse)
