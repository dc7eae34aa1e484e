"""Registers, spills and shared memory of the Triton kernels as they are launched, compiled without a GPU.

    python benchmarks/fused_registers.py --architectures 80 90 --head_dims 64 128 --out registers.csv

Runs the operators on CPU tensors with a driver that only names a GPU: everything is as in a real call, down to the
arguments that Triton specialises on, but kernels are compiled instead of launched. Says nothing of speed. Needs
Triton, whose package brings NVIDIA's assembler; a few seconds for each kernel.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from hf_polyattn.ops import fused, fused_launch, fused_masks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that one program may have, from NVIDIA's table of compute capabilities."""


class NamedGPU(DriverBase):
    """Tells Triton's compiler what to compile for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device, and would take it for the next architecture too
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None


def compiled(
    architecture: int,
    head_dim: int,
    dtype: str,
    *,
    phi: str = "coefficients",
    normalization: str = "length",
    masked: bool = False,
    decode: bool = False,
    tile: fused_launch.Tile | None = None,
) -> Iterator[dict[str, Any]]:
    """One row a kernel of a causal call, forward and backward, or of a decoding step; tile: instead of the table's."""
    rows = []

    def compile_only(kernel: Any, programs: int, tile: fused_launch.Tile | None, *arguments: Any, **rest: Any) -> None:
        options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
        out = kernel.warmup(*arguments, **rest, **options, grid=(programs,))
        if tile is not None:
            rows.append({"kernel": kernel.fn.__name__, **tile._asdict(), **resources(out)})

    driver.set_active(NamedGPU(architecture))
    table = fused_launch.launch(architecture, max(64, fused_launch.padded(head_dim)), 16 if dtype == "bf16" else 32)
    fused.run = fused_masks.run = compile_only  # type: ignore[attr-defined]
    fused.launch = lambda *key: table if tile is None else fused_launch.Launch(tile, tile, tile, tile)  # type: ignore[attr-defined]
    queries, keys = 1 if decode else 4096, 4096
    query, key, value = (
        torch.zeros(1, length, heads, head_dim, dtype=DTYPES[dtype]).transpose(1, 2)
        for length, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    coefficients = torch.zeros(4, 4) if phi == "coefficients" else None
    keep = torch.zeros(1, 1, queries, keys, dtype=torch.bool) if masked else None
    code = fused.NORMALIZATIONS[normalization]
    options = (coefficients, torch.ones(4), 3, code, 1.0, head_dim**-0.5, True, 0, None, keep)
    out, divisors = fused.fused_forward(query, key, value, *options)
    if not decode:
        wants = coefficients is not None
        fused.fused_backward(torch.zeros_like(out), query, key, value, out, divisors, wants, *options)
    case = {"architecture": architecture, "head_dim": head_dim, "dtype": dtype, "phi": phi}
    case |= {"normalization": normalization, "mask": "causal keep" if masked else "causal"}
    for row in rows:
        yield {"triton": triton.__version__, **case, **row}


def resources(kernel: Any) -> dict[str, int]:
    """What the assembler gave to one thread, and the shared memory of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    return {"registers": found["REG"], "spilled_bytes": found["STACK"], "shared_bytes": kernel.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--head_dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--phis", nargs="+", choices=["coefficients", "monomial"], default=["coefficients"])
    parser.add_argument("--normalizations", nargs="+", choices=fused.NORMALIZATIONS, default=["length"])
    parser.add_argument("--masked", action="store_true", help="with a keep mask too")
    parser.add_argument("--no_decode", action="store_true", help="leave the decoding step out")
    parser.add_argument("--kernels", default="", help="only those whose name contains this are printed")
    parser.add_argument("--tile", help="query rows, keys, warps, stages in place of the table's, such as 64,64,8,2")
    parser.add_argument("--out", type=Path, help="write a csv file too")
    args = parser.parse_args()
    if fused_launch.interpreted():
        sys.exit("TRITON_INTERPRET=1 is set: nothing would be compiled")
    tile = None if args.tile is None else fused_launch.Tile(*map(int, args.tile.split(",")))
    rows = []
    for architecture in args.architectures:
        for dtype in args.dtypes:
            for head_dim in args.head_dims:
                for phi in args.phis:
                    for normalization in args.normalizations:
                        case: dict[str, Any] = {"phi": phi, "normalization": normalization, "masked": args.masked}
                        for decode in (False,) if args.no_decode else (False, True):
                            for row in compiled(architecture, head_dim, dtype, **case, decode=decode, tile=tile):
                                if args.kernels in row["kernel"]:
                                    rows.append(row)
                                    print(*(f"{name}={value}" for name, value in row.items()), flush=True)
    if args.out and rows:
        with args.out.open("w", newline="") as file:
            print(f"# {' '.join(['python', os.path.relpath(__file__), *sys.argv[1:]])}", file=file)
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
