"""What `fuzz.py` draws: one random call of a form of the operation."""

import dataclasses
import math
import random

import torch

FORMS = ("cpu", "tiled", "recurrent")
DTYPES = {
    "cpu": (torch.float32, torch.float32, torch.bfloat16),
    "fused": (torch.float32, torch.bfloat16, torch.float16),
    "tiled": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "recurrent": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "auto": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
NORMALIZATIONS = ("sqrt_length", "length", "sum", "l1", "l2", "none", 14.0)
SIZES = (1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 97, 127, 130, 257, 300)
DIMS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 32, 33, 40, 64, 65, 80, 96, 128, 130, 200, 256)
LAYOUTS = ("plain", "heads inside", "every second row", "every second column", "one head for all")
MOST = 2**16
"""Elements of the scores, or of all rows, of a case; a case in ten may be four times as large."""


@dataclasses.dataclass
class Case:
    form: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int, int, int, int]
    """B, H, Hk, T, S, D, Dv."""
    degree: int
    normalization: str | float
    has_coefficients: bool
    is_affine: bool
    has_gain: bool
    qk_norm: bool
    softcap: float | None
    has_bias: bool
    masks: tuple[str, ...]
    layout: str
    probe_layout: str
    is_learned: bool
    """Whether coefficients, alpha, beta and gain get gradients, as the tensors do."""
    poison: float | None
    """What the keys that nobody attends to hold."""
    pieces: bool
    threads: int
    scaling: float | None

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self))


def draw(form: str, rng: random.Random) -> Case:
    """What a form takes, and now and then what it must refuse."""
    strange = rng.random() < 0.06
    dtype = rng.choice(DTYPES[form])
    degree = rng.choice((1, 2, 2, 3, 3, 3, 4, 5, 6))
    if strange and rng.random() < 0.2:
        degree = rng.choice((9, 16, 17, 20))
    batch, key_heads, groups = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4))
    queries, keys = rng.choice(SIZES), rng.choice(SIZES)
    if rng.random() < 0.5:
        queries = keys
    elif rng.random() < 0.3:
        queries, keys = rng.choice((1, 1, 2, 7, 8)), rng.choice((*SIZES, 600, 1300))
    dim, value_dim = rng.choice(DIMS), rng.choice(DIMS)
    most = MOST if rng.random() < 0.9 else 4 * MOST
    if form == "recurrent" and not (strange and rng.random() < 0.3):
        dim = min(dim, {1: 256, 2: 64, 3: 16, 4: 8}.get(degree, 5))
        most = MOST
    while batch * key_heads * groups * max(queries * keys, (queries + keys) * max(dim, value_dim)) > most:
        if batch * key_heads * groups > 1:
            batch, key_heads, groups = max(1, batch - 1), max(1, key_heads - 1), max(1, groups - 1)
        else:
            queries, keys, dim, value_dim = (max(1, n // 2) for n in (queries, keys, dim, value_dim))
    if strange and rng.random() < 0.2:
        queries, keys = rng.choice(((0, keys), (queries, 0)))
    masks = [name for name, p in (("causal", 0.45), ("lengths", 0.2), ("window", 0.2)) if rng.random() < p]
    kinds = ("left", "right", "keys", "arbitrary", "sparse", "dense", "packed", "dead rows", "additive", "view")
    if rng.random() < 0.6:
        masks.append(rng.choice(kinds))
    normalizations: tuple[str | float, ...] = NORMALIZATIONS
    if form == "recurrent" and not strange:
        normalizations = tuple(n for n in normalizations if n not in ("l1", "l2"))
        products = ("causal", "lengths", "left", "right", "keys")
        masks = [name for name in masks if name in products]
    normalization = rng.choice(normalizations)
    if normalization == "sum" and degree % 2:
        normalization = "length"
    has_extras = form in ("tiled", "auto") or strange
    has_coefficients = rng.random() < 0.5
    is_affine = rng.random() < 0.3
    pieces = form == "recurrent" and queries == keys > 0 and rng.random() < 0.25
    return Case(
        form=form,
        dtype=dtype,
        shape=(batch, key_heads * groups, key_heads, queries, keys, dim, value_dim),
        degree=0 if has_coefficients and strange and rng.random() < 0.2 else degree,
        normalization=normalization,
        has_coefficients=has_coefficients,
        is_affine=is_affine,
        has_gain=rng.random() < 0.5,
        qk_norm=rng.random() < 0.2,
        softcap=rng.choice((2.0, 5.0)) if has_extras and rng.random() < 0.25 else None,
        has_bias=has_extras and rng.random() < 0.25,
        masks=tuple(["causal", *masks] if pieces and "causal" not in masks else masks),
        layout=rng.choice(LAYOUTS) if rng.random() < 0.6 else "plain",
        probe_layout=rng.choice(("plain", "heads inside", "one number")),
        is_learned=rng.random() < 0.7,
        poison=rng.choice((math.nan, math.inf, 1e4, -1e9)) if rng.random() < 0.3 else None,
        pieces=pieces,
        threads=rng.choice((1, 1, 2, 5)) if form in ("cpu", "auto") else 1,
        scaling=rng.choice((None, None, None, 0.3, -0.2)),
    )
