"""Cases that every form of the operation must agree on with the definition in float64."""

import itertools

import torch

from hf_polyattn.ops import polynomial_attention

NORMALIZATIONS = ("sqrt_length", "length", "sum", "l1", "l2", "none", 14.0)
# s: a monomial; a: a monomial of an affine score; c: coefficients of an affine score
PHIS = ("s^1", "s^2", "s^3", "s^4", "s^5", "s^6", "a^2", "a^3", "c^2", "c^3")
MASKS = ("full", "causal", "lengths", "window", "causal-window", "bool", "blocks", "no-rows", "left-padding", "all")
# (B, H, Hk, T, S, D, Dv)
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "three": (2, 2, 1, 3, 3, 4, 5),
    "63": (2, 4, 4, 63, 63, 8, 8),
    "63-grouped": (1, 6, 2, 63, 63, 8, 4),
    "111x257": (1, 2, 1, 111, 257, 4, 3),
    "257x63": (1, 2, 2, 257, 63, 4, 6),
    "1x257": (3, 4, 2, 1, 257, 4, 4),
    "257": (1, 1, 1, 257, 257, 3, 3),
}


def degree_of(phi: str) -> int | None:
    return None if phi[0] == "c" else int(phi[2:])


def refused(normalization: str | float, phi: str) -> bool:
    return normalization == "sum" and int(phi[2:]) % 2 == 1


# every normalization with every phi, masks and shapes taken in turn; then every mask with every shape
_some = [shape for shape in SHAPES if shape not in ("one", "257", "257x63")]
_pairs = [pair for pair in itertools.product(NORMALIZATIONS, PHIS) if not refused(*pair)]
CASES = [(*pair, MASKS[i % len(MASKS)], _some[i % len(_some)]) for i, pair in enumerate(_pairs)]
CASES += [(*_pairs[(7 * i) % len(_pairs)], *pair) for i, pair in enumerate(itertools.product(MASKS, SHAPES))]
IDS = ["-".join(map(str, case)) for case in CASES]


def masking(name: str, batch: int, heads: int, queries: int, keys: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, keys + 1, (batch,), generator=generator)
    some = torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
    match name:
        case "full":
            return {}
        case "causal":
            return {"is_causal": True}
        case "lengths":
            return {"key_lengths": lengths}
        case "window":
            return {"sliding_window": 1 + keys // 5}
        case "causal-window":
            return {"is_causal": True, "sliding_window": 1 + keys // 3}
        case "bool":
            return {"keep": some}
        case "blocks":  # packed sequences: whole tiles are empty or full
            row, column = torch.arange(queries) * 3 // queries, torch.arange(keys) * 3 // keys
            return {"keep": (row[:, None] == column).expand(batch, heads, queries, keys)}
        case "no-rows":
            return {"keep": some[:1, 0] & (torch.arange(queries) % 3 > 0)[:, None]}
        case "left-padding":
            first = torch.randint(0, keys, (batch, 1, 1, 1), generator=generator)
            return {"keep": torch.arange(keys) >= first, "is_causal": True}
        case "all":
            head = torch.rand(1, heads, 1, keys, generator=generator) > 0.1
            return {"keep": head, "is_causal": True, "key_lengths": lengths, "sliding_window": 2 + keys // 2}
    raise AssertionError(name)


def inputs(phi: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch, heads, key_heads, queries, keys, dim, value_dim = shape
    out = {
        "query": torch.randn(batch, heads, queries, dim),
        "key": torch.randn(batch, key_heads, keys, dim),
        "value": torch.randn(batch, key_heads, keys, value_dim),
        "gain": 1 + torch.rand(heads),
        "bias": torch.randn(1, heads, 1 if queries % 2 else queries, keys),
    }
    if phi[0] in "ac":
        out |= {"alpha": 0.5 + torch.rand(heads), "beta": 0.1 * torch.randn(heads)}
    if phi[0] == "c":
        # positive, and odd powers below the even ones beside them: nowhere negative, as "sum" wants of even degrees
        out["coefficients"] = 0.5 + torch.rand(heads, int(phi[2:]) + 1)
        out["coefficients"][:, 1::2] *= 0.4 if int(phi[2:]) % 2 == 0 else 1
    return out


def error(got: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """Relative to the norm, or to that of a tensor with elements of size `least`; absolute where all is zero."""
    scale = max(expected.norm().item(), least * expected.numel() ** 0.5)
    return (got - expected).norm().item() / (scale or 1)


def run(
    form: str, given: dict[str, torch.Tensor], dtype: torch.dtype, *, autocast: bool = False, **options
) -> dict[str, torch.Tensor]:
    """Output and gradients by name, in float64."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = polynomial_attention(**leaves, backend=form, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"out": out.detach().double()} | {n: g.double() for n, g in zip(leaves, grads, strict=True)}
