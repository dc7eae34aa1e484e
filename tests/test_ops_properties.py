"""What must hold for any shapes, masks, degrees and dtypes, on examples that hypothesis chooses."""

from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_polyattn.ops import polynomial_attention, tiles

bounded = settings(max_examples=40, deadline=None, derandomize=True, database=None)
forms = st.sampled_from(["naive", "tiled"])
# norm-relative; the bf16 and fp16 forms differ by the rounding of the output only
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_tiles():
    with mock.patch.object(tiles, "TILE", {"cpu": (32, 2**11)}), mock.patch.object(tiles, "CELL", 16):
        yield


@st.composite
def problems(draw, dtypes=(torch.float64,), masked=True, square=False):
    """Arguments of polynomial_attention, the three tensors first."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, key_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    queries = keys if square else queries
    dtype, dim = draw(st.sampled_from(dtypes)), draw(st.integers(1, 9))
    heads = key_heads * groups
    q = torch.randn(batch, heads, queries, dim, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, key_heads, keys, dim, dtype=torch.float64).to(dtype)
    v = torch.randn(batch, key_heads, keys, draw(st.integers(1, 9)), dtype=torch.float64).to(dtype)
    degree = draw(st.integers(1, 6))
    normalizations = ["sqrt_length", "length", "l1", "l2", "none", 14.0]
    options = {"normalization": draw(st.sampled_from(normalizations + ["sum"] * (degree % 2 == 0)))}
    if draw(st.booleans()):
        options["coefficients"] = 0.2 + torch.rand(heads, degree + 1, dtype=torch.float64)
        if options["normalization"] == "sum":
            options["coefficients"][:, 1::2] *= 0.2  # nowhere negative
    else:
        options["degree"] = degree
    if masked:
        options["is_causal"] = draw(st.booleans())
        options["sliding_window"] = draw(st.none() | st.integers(1, 80))
        if draw(st.booleans()):
            options["key_lengths"] = torch.randint(0, keys + 1, (batch,))
        if draw(st.booleans()):
            shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
            options["keep"] = torch.rand(shape) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    return (q, k, v), options


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-8) -> bool:
    """Norm-relative. Gradients of normalized rows can cancel to nothing, so that 1e-3 counts as zero."""
    scale = max(expected.double().norm().item(), 1e-3 * expected.numel() ** 0.5)
    return (got.double() - expected.double()).norm().item() <= tolerance * scale


@bounded
@given(problems(dtypes=tuple(TOLERANCES)))
def test_tiled_equals_naive(problem):
    tensors, options = problem
    dtype = tensors[0].dtype
    outs, grads = [], []
    for form in ("naive", "tiled"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        outs.append(polynomial_attention(*leaves, backend=form, **options))
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(outs[-1], leaves, torch.randn_like(outs[-1])))
    assert close(outs[1], outs[0], TOLERANCES[dtype])
    for got, expected in zip(grads[1], grads[0], strict=True):
        assert close(got, expected, 20 * TOLERANCES[dtype])


@bounded
@given(problems(masked=False), forms, st.randoms(use_true_random=False))
def test_keys_have_no_order_under_a_full_mask(problem, form, random):
    (q, k, v), options = problem
    order = list(range(k.shape[2]))
    random.shuffle(order)
    shuffled = polynomial_attention(q, k[:, :, order], v[:, :, order], backend=form, **options)
    assert close(shuffled, polynomial_attention(q, k, v, backend=form, **options))


@bounded
@given(problems(square=True), forms, st.data())
def test_the_future_is_invisible(problem, form, data):
    (q, k, v), options = problem
    options["is_causal"] = True
    now = data.draw(st.integers(0, q.shape[2] - 1))
    before = polynomial_attention(q, k, v, backend=form, **options)
    for x in (q, k, v):
        x[:, :, now + 1 :] = 100 * torch.randn_like(x[:, :, now + 1 :])
    after = polynomial_attention(q, k, v, backend=form, **options)
    assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])


@bounded
@given(problems(), forms)
def test_linear_in_the_values(problem, form):
    (q, k, v), options = problem
    other = torch.randn_like(v)
    both = polynomial_attention(q, k, 2 * v - 3 * other, backend=form, **options)
    apart = [polynomial_attention(q, k, x, backend=form, **options) for x in (v, other)]
    assert close(both, 2 * apart[0] - 3 * apart[1])


@bounded
@given(problems(), forms, st.floats(-10, 10))
def test_homogeneous_in_the_gain(problem, form, factor):
    tensors, options = problem
    gain = torch.rand(tensors[0].shape[1], dtype=torch.float64)
    plain = polynomial_attention(*tensors, backend=form, **options)
    out = polynomial_attention(*tensors, gain=factor * gain, backend=form, **options)
    assert close(out, factor * gain.view(-1, 1, 1) * plain)


@bounded
@given(problems(), forms, st.floats(0.1, 10))
def test_a_monomial_is_homogeneous_in_the_scaling(problem, form, factor):
    (q, k, v), options = problem
    options["normalization"] = "length"
    options.pop("coefficients", None)
    degree = options.setdefault("degree", 3)
    plain = polynomial_attention(q, k, v, scaling=1.0, backend=form, **options)
    scaled = polynomial_attention(q, k, v, scaling=factor, backend=form, **options)
    assert close(scaled, factor**degree * plain)
