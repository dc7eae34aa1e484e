"""Launch configurations of the Triton kernels: how large a tile, how many warps, how deep a pipeline."""

import functools
import os
from typing import Any, NamedTuple

import torch

SPLIT_KEYS = 128
"""Fewest keys of one program of the decoding step."""


class Tile(NamedTuple):
    """rows: query rows; keys; warps of a program; stages: loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """forward; key_gradients: dK and dV; query_gradients: dQ; decode: a few rows against a long cache."""

    forward: Tile
    key_gradients: Tile
    query_gradients: Tile
    decode: Tile


# (architecture, widest padded head_dim, bits of the dtype). Chosen from what the compiler reports, not timed yet on
# any GPU. In bf16 no causal call with normalization "length" spills registers; fp16, "l2" and keep masks spill up to
# 56 bytes in the kernel of dK and dV; fp32, as three tf32 products, hundreds of bytes beyond a head_dim of 64.
TABLE = {
    (90, 64, 16): Launch(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 64, 4, 3)),
    (90, 128, 16): Launch(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 4, 3)),
    (90, 256, 16): Launch(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
    (80, 64, 16): Launch(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 4, 3)),
    (80, 128, 16): Launch(Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 64, 4, 3)),
    (80, 256, 16): Launch(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
    (80, 64, 32): Launch(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 2)),
    (80, 128, 32): Launch(Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
    (80, 256, 32): Launch(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
}
# the interpreter takes longer for each tile, not for each element; still several tiles in the tests' shapes
INTERPRETED = Launch(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), Tile(16, 64, 4, 1))


@functools.cache
def launch(architecture: int, width: int, bits: int) -> Launch:
    """The configuration for the widest padded head_dim; architecture: 10 * major + minor, 0 in the interpreter.

    bits: 32 for fp16 too, whose products with weights run on fp32 operands.
    """
    if architecture == 0:
        return INTERPRETED
    width = max(width, 64)
    # 8.6, 8.9 and 12.x have less shared memory than the 8.0 that the table was made for, and fit it all the same
    known = 90 if architecture in (90, 100, 103) and (90, width, bits) in TABLE else 80
    return TABLE[known, width, bits]


@functools.cache
def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 0 on a CPU, where only the interpreter runs."""
    if device.type == "cpu":
        return 0
    if torch.version.hip:
        return 80  # not tried; the tiles with the least shared memory
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def fp32_precision() -> str:
    """How tensor cores multiply fp32 operands: as three tf32 products, which err about as fp32 does, or as one.

    torch.set_float32_matmul_precision decides, as it does for torch's own products.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def padded(size: int) -> int:
    """The next power of two, 16 at least: what a product of tiles needs."""
    return max(16, 1 << (size - 1).bit_length())


def splits(programs: int, keys: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(shares of the keys, tiles of a share) that occupy the device twice over, with SPLIT_KEYS keys at least."""
    tiles = -(-keys // tile)
    wanted = -(-2 * processors(device) // programs)
    least = max(1, SPLIT_KEYS // tile)
    share = max(least, -(-tiles // wanted))
    return -(-tiles // share), share


def run(kernel: Any, programs: int, tile: Tile | None, *arguments: Any, **constants: Any) -> None:
    """Starts a Triton kernel on a grid of `programs`."""
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[(programs,)](*arguments, **constants, **options)


def interpreted() -> bool:
    """Whether Triton, once imported, interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
