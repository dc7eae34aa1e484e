"""Masks as people write them, rows without keys, and the range and rounding of 16-bit tensors."""

import pytest
import torch
import torch.nn.functional as F

from hf_polyattn.activations import default_start, frobenius_gain, get_activation
from hf_polyattn.ops import attend, polynomial_attention, tiles
from hf_polyattn.ops.masks import build_keep, split_mask

FORMS = ("naive", "tiled")
NORMALIZATIONS = ("sqrt_length", "length", "sum", "l1", "l2", "none", 14.0)
KEEP = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def additive(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(KEEP.shape, dtype=dtype).masked_fill(~KEEP, value)


ENCODINGS = {"bool": KEEP, "int64": KEEP.long(), "int32": 3 * KEEP.int(), "uint8": KEEP.byte()}
for _name, _dtype in DTYPES.items():
    ENCODINGS[f"{_name} -inf"] = additive(-torch.inf, _dtype)
    ENCODINGS[f"{_name} finfo.min"] = additive(torch.finfo(_dtype).min, _dtype)
    ENCODINGS[f"{_name} -1e4"] = additive(-1e4, _dtype)
    # bf16 rounds it to -9984, and a cast afterwards keeps that
    ENCODINGS[f"{_name} -1e4 as fp32"] = additive(-1e4, _dtype).float()


@pytest.mark.parametrize("mask", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_all_masks_mean_the_same(mask):
    keep, bias = split_mask(mask)
    assert bias is None
    assert torch.equal(keep, KEEP)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_mask_can_carry_a_bias(dtype):
    slopes = -torch.arange(5, dtype=dtype)
    keep, bias = split_mask(additive(torch.finfo(dtype).min, dtype) / 2 + slopes)
    assert torch.equal(keep, KEEP)
    assert torch.equal(bias, slopes.expand(4, 5) * KEEP)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["bool", "fp32 -inf", "bf16 finfo.min", "fp16 -1e4"])
@pytest.mark.parametrize("degree", [2, 3])
def test_masked_keys_are_as_if_absent(encoding, degree, form):
    """(-inf)^2 is +inf and where(inf) has a NaN gradient: neither may be seen outside."""
    q, k, v = (torch.randn(1, 2, n, 3, requires_grad=True) for n in (4, 5, 5))
    keep, bias = split_mask(ENCODINGS[encoding])
    out = polynomial_attention(q, k, v, degree=degree, keep=keep, bias=bias, backend=form)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    row = [0, 1, 3]
    alone = polynomial_attention(q[:, :, :1], k[:, :, row], v[:, :, row], degree=degree, backend=form)
    torch.testing.assert_close(out[:, :, :1], alone)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_masked_bias_may_hold_anything(value, form):
    """A bias that is also -inf where the mask already forbids."""
    q, k, v = (torch.randn(1, 2, n, 3, requires_grad=True) for n in (4, 5, 5))
    bias = torch.randn(4, 5)
    options = {"coefficients": [0.5, 1.0, 1.0, 1.0], "keep": KEEP, "backend": form}
    expected = polynomial_attention(q, k, v, bias=bias, **options)
    wild = bias.masked_fill(~KEEP, value).requires_grad_()
    out = polynomial_attention(q, k, v, bias=wild, **options)
    torch.testing.assert_close(out, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, wild)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("coefficients", [None, [0.5, 0.1, 0.3]])
def test_rows_without_keys_give_zero(coefficients, normalization, form):
    q, k, v = (torch.randn(2, 2, n, 3, requires_grad=True) for n in (4, 5, 5))
    degree = 2 if coefficients is None else None
    for masks in (
        {"keep": KEEP},
        {"key_lengths": torch.tensor([0, 3])},
        {"keep": torch.zeros(1, 1, dtype=torch.bool)},
    ):
        out = polynomial_attention(
            q, k, v, degree=degree, coefficients=coefficients, normalization=normalization, backend=form, **masks
        )
        empty = ~build_keep((4, 5), q.device, **masks).any(-1).expand(2, 2, 4)
        assert empty.any()
        assert (out[empty] == 0).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][empty] == 0).all()


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
def test_rows_without_keys_give_zero_for_the_baselines(activation):
    entry = get_activation(activation)
    q, k, v = (torch.randn(1, 1, n, 3, requires_grad=True) for n in (4, 5, 5))
    out = attend(q, k, v, phi=entry.phi, exponential=entry.exponential, normalization="sum", keep=KEEP)
    assert (out[:, :, 1] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_build_keep_joins_all_restrictions():
    keep = build_keep(
        (3, 5),
        torch.device("cpu"),
        keep=torch.tensor([1, 1, 1, 0, 1]).bool(),
        is_causal=True,
        key_lengths=torch.tensor([5, 2]),
        sliding_window=3,
    )
    assert keep[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]]
    assert keep[1, 0].int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("form", FORMS)
def test_fp16_cube_of_a_score_beyond_its_range(form):
    """48^3 / sqrt(2) is 78200, beyond fp16; the output is not."""
    q = torch.full((1, 1, 2, 4), 24**0.5).half()
    v = 0.01 * torch.randn(1, 1, 2, 4).half()
    out, weights = polynomial_attention(q.float(), q.float(), v.float(), degree=3, return_weights=True)
    assert weights.max() > torch.finfo(torch.float16).max > 40.3**3
    got = polynomial_attention(q, q, v, degree=3, backend=form)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), out, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_fp16_output_beyond_its_range_is_reported(form):
    q = torch.randn(1, 3, 4, 4).half()
    q[:, 1] = 30
    with pytest.raises(
        OverflowError, match=r"output .* in heads \[1\] exceeds float16's range of 65504: use bfloat16.*calibrate"
    ):
        polynomial_attention(q, q, q, degree=3, backend=form)
    # the same numbers are no trouble elsewhere, nor under the remedies that the message names
    assert polynomial_attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), degree=3, backend=form).isfinite().all()
    assert polynomial_attention(q, q, q, degree=3, gain=1e-8, backend=form).isfinite().all()
    assert polynomial_attention(q, q, q / 30, degree=3, qk_norm=True, backend=form).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_fp16_output_beyond_even_the_range_of_fp32_is_reported(form):
    q = torch.full((1, 1, 2, 4), 6e4).half()
    with pytest.raises(OverflowError, match=r"output of inf in heads \[0\]"):
        polynomial_attention(q, q, q, degree=9, backend=form)
    # inputs that are not finite are somebody else's fault, and stay visible
    broken = q.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert polynomial_attention(broken, q, q, degree=3, backend=form).isnan().any()


def test_fp16_weights_beyond_its_range_are_reported():
    q = torch.full((1, 1, 2, 4), 24**0.5).half()
    with pytest.raises(OverflowError, match=r"attention weight of 7.81e\+04 in heads \[0\]"):
        polynomial_attention(q, q, q / 1000, degree=3, return_weights=True)


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("phi", "normalization"),
    [
        *(("cubic", name) for name in ("sqrt_length", "length", "l1", "l2", 14.0)),
        *(("coefficients", name) for name in ("sqrt_length", "length", "l2")),
        *(("square", name) for name in ("sum", "length")),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_bf16_error_against_that_of_softmax(form, phi, normalization, is_causal):
    """Output and gradients; the budget is the error of torch's own bf16 softmax attention on the same tensors."""
    options = {
        "square": {"degree": 2, "gain": frobenius_gain(2)},
        "cubic": {"degree": 3, "gain": frobenius_gain(3)},
        "coefficients": {"coefficients": default_start(3)},
    }[phi] | {"normalization": normalization}
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        rounded = [x.bfloat16() for x in torch.randn(4, 2, 2, 96, 64)]

        def errors(function) -> torch.Tensor:
            results = []
            for dtype in (torch.bfloat16, torch.float64):
                q, k, v, grad = (x.to(dtype) for x in rounded)
                leaves = [x.requires_grad_() for x in (q, k, v)]
                out = function(*leaves)
                results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
            return torch.tensor([relative(got, exact) for got, exact in zip(*results, strict=True)])

        ours.append(
            errors(lambda q, k, v: polynomial_attention(q, k, v, is_causal=is_causal, backend=form, **options))
        )
        theirs.append(errors(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)))
    ours, theirs = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
    assert (ours < 1.5 * theirs).all(), f"out, dq, dk, dv: {ours.tolist()}, softmax {theirs.tolist()}"


def tiles_of(query: torch.Tensor, key: torch.Tensor, rows: int, **masks) -> list[tuple[int, int, bool]]:
    """(first key, last key, has a mask) of the tiles of one block of rows."""
    tiling = tiles.Tiling.plan(query, key)
    nothing = {"keep": None, "is_causal": False, "key_lengths": None, "sliding_window": None}
    found = tiles.TileMasks(tiling, query.device, **{**nothing, **masks})
    batches, _, heads = next(tiling.spans())
    block = list(tiling.row_blocks())[rows]
    return [(c.start, c.stop - 1, mask is not None) for c, mask in found.tiles(batches, heads, block)]


def test_empty_tiles_are_skipped_and_full_ones_carry_no_mask(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": (32, 2**11)})
    monkeypatch.setattr(tiles, "CELL", 16)
    x = torch.empty(1, 1, 96, 4)
    assert tiles_of(x, x, 1) == [(0, 63, False), (64, 95, False)]
    assert tiles_of(x, x, 1, is_causal=True) == [(0, 31, False), (32, 63, True)]
    assert tiles_of(x, x, 2, is_causal=True, sliding_window=16) == [(48, 95, True)]
    assert tiles_of(x, x, 0, key_lengths=torch.tensor([40])) == [(0, 31, False), (32, 47, True)]
    row = torch.arange(96)
    packed = (row[:, None] // 48 == row // 48)[None, None]
    assert tiles_of(x, x, 0, keep=packed) == [(0, 47, False)]
    assert tiles_of(x, x, 1, keep=packed) == [(0, 63, True), (64, 95, True)]
    assert tiles_of(x, x, 2, keep=packed) == [(48, 95, False)]
    assert tiles_of(x, x, 2, keep=packed, is_causal=True) == [(48, 63, False), (64, 95, True)]
    assert tiles_of(x, x, 2, keep=torch.zeros(1, 1, 1, 1, dtype=torch.bool)) == []


def test_an_expanded_mask_is_read_once():
    x = torch.empty(2, 4, 96, 4)
    options = {"is_causal": False, "key_lengths": None, "sliding_window": None}
    tiling = tiles.Tiling.plan(x, x)
    for keep in (
        torch.ones(96, dtype=torch.bool).expand(2, 4, 96, 96),
        torch.ones(1, dtype=torch.bool).expand(96, 96),
    ):
        masks = tiles.TileMasks(tiling, x.device, keep=keep, **options)
        assert masks.keep.shape == (1, 1, 1, 96)


@pytest.mark.parametrize("edge", [15, 16, 17, 31, 32, 33, 47, 48])
def test_restrictions_that_end_at_the_edge_of_a_tile(edge, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": (32, 2**10)})
    monkeypatch.setattr(tiles, "CELL", 16)
    q, k, v = torch.randn(3, 1, 1, 48, 4, dtype=torch.float64)
    index = torch.arange(48)
    for masks in (
        {"key_lengths": torch.tensor([edge])},
        {"sliding_window": edge},
        {"sliding_window": edge, "is_causal": True},
        {"keep": index < edge},
        {"keep": index >= edge},
        {"keep": (index < edge)[:, None]},
    ):
        expected = polynomial_attention(q, k, v, degree=2, backend="naive", **masks)
        torch.testing.assert_close(polynomial_attention(q, k, v, degree=2, backend="tiled", **masks), expected)
    # fewer queries than keys: the diagonal crosses tiles elsewhere
    expected = polynomial_attention(q[:, :, :edge], k, v, degree=2, is_causal=True, backend="naive")
    got = polynomial_attention(q[:, :, :edge], k, v, degree=2, is_causal=True, backend="tiled")
    torch.testing.assert_close(got, expected)
