"""The rules of the definition, one by one: sizes of the weights, row lengths, baselines, messages."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_polyattn.activations import frobenius_gain, get_activation, horner, resolve_config
from hf_polyattn.ops import attend, polynomial_attention
from hf_polyattn.ops.affine import shift_and_scale

NORMALIZATIONS = ("sqrt_length", "length", "sum", "l1", "l2", "none", 14.0)


def tensors(*shape: int, heads: int = 2, key_heads: int | None = None, dtype: torch.dtype = torch.float64):
    """query, key, value for shape (B, T, S, D)."""
    batch, queries, keys, dim = shape
    key_heads = key_heads or heads
    return (
        torch.randn(batch, heads, queries, dim, dtype=dtype),
        torch.randn(batch, key_heads, keys, dim, dtype=dtype),
        torch.randn(batch, key_heads, keys, dim, dtype=dtype),
    )


def weights_of(scores: torch.Tensor, **options) -> torch.Tensor:
    """Weights for given scores [1, H, T, S]: queries of zero leave the bias alone."""
    _, heads, queries, keys = scores.shape
    q = torch.zeros(1, heads, queries, 1, dtype=scores.dtype)
    k = torch.zeros(1, heads, keys, 1, dtype=scores.dtype)
    return polynomial_attention(q, k, k, bias=scores, return_weights=True, **options)[1]


def test_formula_by_hand():
    """Every term of the definition, written as loops over plain numbers."""
    q, k, v = tensors(1, 3, 4, 2, heads=2, key_heads=1)
    bias = torch.randn(2, 3, 4, dtype=torch.float64)
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    gain, alpha, beta, coefficients = [0.5, 2.0], [1.5, -0.5], [0.25, 1.0], [0.1, -0.2, 0.3, 0.4]
    out, weights = polynomial_attention(
        q,
        k,
        v,
        coefficients=coefficients,
        gain=torch.tensor(gain),
        alpha=torch.tensor(alpha),
        beta=torch.tensor(beta),
        keep=keep,
        bias=bias,
        softcap=1.5,
        scaling=0.7,
        return_weights=True,
    )
    for h in range(2):
        for i in range(3):
            length = max(1, int(keep[i].sum()))
            expected = [0.0, 0.0]
            for j in range(4):
                s = 0.7 * sum(float(q[0, h, i, d] * k[0, 0, j, d]) for d in range(2))
                s = alpha[h] * (1.5 * math.tanh(s / 1.5) + float(bias[h, i, j])) + beta[h]
                phi = sum(c * s**power for power, c in enumerate(coefficients))
                a = float(keep[i, j]) * gain[h] * phi / math.sqrt(length)
                assert weights[0, h, i, j].item() == pytest.approx(a, rel=1e-6)
                expected = [expected[d] + a * float(v[0, 0, j, d]) for d in range(2)]
            assert out[0, h, i].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_even_moments_of_gaussian_scores(degree):
    for sigma in (0.5, 1.0, 2.0):
        moment = (sigma * torch.randn(500_000, dtype=torch.float64)).pow(2 * degree).mean().item()
        double_factorial = math.prod(range(1, 2 * degree, 2))
        assert moment == pytest.approx(sigma ** (2 * degree) * double_factorial, rel=0.04)
    assert frobenius_gain(degree) == pytest.approx(1 / math.sqrt(double_factorial))
    assert frobenius_gain(degree) == pytest.approx([1, 0.577, 0.258, 0.0976][degree - 1], abs=5e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_sqrt_length_with_frobenius_gain_has_norm_sqrt_n(degree, sigma, is_causal):
    n = 256
    scores = sigma * torch.randn(1, 16, n, n)
    weights = weights_of(scores, degree=degree, gain=frobenius_gain(degree), alpha=1 / sigma, is_causal=is_causal)
    assert weights.norm(dim=(-2, -1)).mean().item() == pytest.approx(math.sqrt(n), rel=0.03)
    # early rows are as large as late ones: lengths are counted row by row
    energy = weights.square().sum(-1).mean((0, 1))
    assert energy[16:80].mean().item() == pytest.approx(energy[-64:].mean().item(), rel=0.35)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_norm_bounds_of_the_normalized_modes(size, is_causal):
    n = 63
    scores = size * torch.randn(1, 8, n, n, dtype=torch.float64)
    for normalization, degree in (("sum", 2), ("sum", 4), ("l1", 1), ("l1", 3), ("l1", 4)):
        weights = weights_of(scores, degree=degree, normalization=normalization, is_causal=is_causal)
        assert (weights.norm(dim=(-2, -1)) <= math.sqrt(n)).all()
        assert (weights.abs().sum(-1) <= 1 + 1e-12).all()
    one_key = torch.full((1, 1, n, n), 1e-3, dtype=torch.float64) + 10 * torch.eye(n, dtype=torch.float64)
    sharp = weights_of(one_key, degree=4, normalization="sum")
    assert sharp.norm().item() == pytest.approx(math.sqrt(n), rel=1e-6)


def test_l2_has_norm_sqrt_n_exactly():
    for n, degree, is_causal in ((1, 1, True), (63, 3, True), (111, 2, False)):
        scores = 3 + torch.randn(1, 4, n, n, dtype=torch.float64)
        weights = weights_of(scores, degree=degree, normalization="l2", is_causal=is_causal)
        assert weights.norm(dim=(-2, -1)).flatten().tolist() == pytest.approx([math.sqrt(n)] * 4, rel=1e-5)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_length_has_the_size_of_softmax_at_initialisation(degree):
    n = 256
    softmax = torch.softmax(torch.zeros(n, n), -1)
    weights = weights_of(torch.randn(1, 16, n, n), degree=degree, normalization="length", gain=frobenius_gain(degree))
    assert softmax.norm().item() == pytest.approx(1)
    assert weights.norm(dim=(-2, -1)).mean().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_norm_of_the_jacobian(degree, sigma):
    n = 256
    scores = (sigma * torch.randn(1, 8, n, n)).requires_grad_()
    weights = weights_of(scores, degree=degree, gain=frobenius_gain(degree) / sigma**degree)
    # element-wise, so that the gradient of the sum is the diagonal of the Jacobian
    (jacobian,) = torch.autograd.grad(weights.sum(), scores)
    expected = degree / (sigma * math.sqrt(2 * degree - 1)) * math.sqrt(n)
    assert jacobian.norm(dim=(-2, -1)).mean().item() == pytest.approx(expected, rel=0.03)


def test_the_jacobian_stays_inside_the_bound_of_softmax_up_to_degree_7():
    inside = [p for p in range(1, 17) if p / math.sqrt(2 * p - 1) <= 2]
    assert inside == [1, 2, 3, 4, 5, 6, 7]


def test_a_constant_starves_the_early_rows_of_a_causal_model():
    """Their energy is i / N; with the row's own length it is the same everywhere."""
    n = 256
    scores = torch.randn(1, 64, n, n)
    for normalization, early in ((math.sqrt(n), 16 / n), ("sqrt_length", 1.0)):
        weights = weights_of(scores, degree=1, normalization=normalization, is_causal=True)
        energy = weights.square().sum(-1).mean((0, 1))
        assert energy[15].item() == pytest.approx(early, rel=0.1)
        assert energy[-1].item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_row_sums_grow_for_even_degrees_only(n):
    scores = torch.randn(1, 2, n, n)
    sums = {p: weights_of(scores, degree=p, gain=frobenius_gain(p)).sum(-1).mean().item() for p in (1, 2, 3)}
    assert sums[2] == pytest.approx(0.577 * math.sqrt(n), rel=0.03)
    assert abs(sums[1]) < 0.1
    assert abs(sums[3]) < 0.15
    # with "length" the drift is gone
    even = weights_of(scores, degree=2, gain=frobenius_gain(2), normalization="length").sum(-1).mean().item()
    assert even == pytest.approx(0.577, rel=0.03)


@pytest.mark.parametrize("form", ["naive", "tiled"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_prefill_equals_decode(normalization, form):
    n, degree = 9, 2 if normalization == "sum" else 3
    q, k, v = tensors(2, n, n, 4)
    options = {"degree": degree, "normalization": normalization, "backend": form, "is_causal": True}
    full = polynomial_attention(q, k, v, **options)
    for i in range(n):
        step = polynomial_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **options)
        torch.testing.assert_close(step, full[:, :, i : i + 1])
    chunk = polynomial_attention(q[:, :, 4:7], k[:, :, :7], v[:, :, :7], **options)
    torch.testing.assert_close(chunk, full[:, :, 4:7])


def test_qk_norm_bounds_the_scores():
    dim = 16
    q, k, v = tensors(1, 20, 20, dim)
    q[..., 0, :] = k[..., 0, :]
    options = {"degree": 1, "normalization": "none", "return_weights": True}
    _, scores = polynomial_attention(1000 * q, 0.01 * k, v, qk_norm=True, **options)
    assert scores.abs().max().item() <= math.sqrt(dim)
    assert scores[0, :, 0, 0].min().item() == pytest.approx(math.sqrt(dim), rel=1e-2)
    _, unbounded = polynomial_attention(1000 * q, 0.01 * k, v, **options)
    assert unbounded.abs().max().item() > math.sqrt(dim)


def test_constant_normalization():
    q, k, v = tensors(1, 5, 7, 4)
    by_fourteen = polynomial_attention(q, k, v, degree=3, normalization=14)
    expected = (q @ k.transpose(-1, -2) / 2) ** 3 / 14 @ v
    torch.testing.assert_close(by_fourteen, expected)
    torch.testing.assert_close(polynomial_attention(q, k, v, degree=3, normalization="none"), 14 * expected)


@pytest.mark.parametrize("case", ["full", "causal", "mask", "grouped"])
def test_softmax_baseline_is_sdpa(case):
    entry, config = get_activation("softmax"), resolve_config("softmax")
    q, k, v = tensors(2, 6, 6, 4, heads=4, key_heads=2 if case == "grouped" else 4)
    q = 3 * q
    keep = (torch.rand(2, 1, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool) if case == "mask" else None
    causal = case == "causal"
    out = attend(
        q,
        k,
        v,
        phi=entry.phi,
        exponential=entry.exponential,
        normalization=config.normalization,
        keep=keep,
        is_causal=causal,
    )
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal, enable_gqa=case == "grouped")
    # the eps of "sum" against a sum of at least 1
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def test_softmax_baseline_survives_large_scores():
    entry = get_activation("softmax")
    scores = 1e4 * torch.randn(1, 1, 5, 5)
    _, weights = attend(
        *(torch.zeros(1, 1, 5, 1) for _ in range(3)),
        phi=entry.phi,
        exponential=True,
        normalization="sum",
        bias=scores,
        return_weights=True,
    )
    torch.testing.assert_close(weights, torch.softmax(scores, -1))


def test_relu_baseline_is_relu_over_length():
    entry, config = get_activation("relu"), resolve_config("relu")
    q, k, v = tensors(1, 6, 6, 4)
    out = attend(q, k, v, phi=entry.phi, normalization=config.normalization, is_causal=True)
    weights = torch.relu(q @ k.transpose(-1, -2) / 2).tril() / torch.arange(1, 7).view(-1, 1)
    torch.testing.assert_close(out, weights @ v)


def test_sigmoid_baseline_has_the_bias_of_its_row_length():
    entry, config = get_activation("sigmoid"), resolve_config("sigmoid")
    q, k, v = tensors(1, 6, 6, 4)
    out = attend(q, k, v, phi=entry.phi, normalization=config.normalization, is_causal=True)
    for i in range(6):
        s = q[:, :, i : i + 1] @ k[:, :, : i + 1].transpose(-1, -2) / 2
        expected = torch.sigmoid(s - math.log(i + 1)) @ v[:, :, : i + 1]
        torch.testing.assert_close(out[:, :, i : i + 1], expected)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_affine_score_and_its_composed_coefficients(degree):
    heads = 3
    q, k, v = tensors(1, 5, 7, 4, heads=heads)
    c = torch.randn(heads, degree + 1, dtype=torch.float64)
    alpha, beta = torch.randn(2, heads, dtype=torch.float64)
    s = q @ k.transpose(-1, -2) / 2
    shifted = alpha.view(-1, 1, 1) * s + beta.view(-1, 1, 1)
    direct = sum(c[:, p].view(-1, 1, 1) * shifted**p for p in range(degree + 1))
    torch.testing.assert_close(horner(s, shift_and_scale(c, alpha, beta)), direct)
    assert torch.autograd.gradcheck(shift_and_scale, [x.requires_grad_() for x in (c, alpha, beta)])
    c, alpha, beta = (x.detach() for x in (c, alpha, beta))
    out = polynomial_attention(q, k, v, coefficients=c, alpha=alpha, beta=beta, normalization="none", backend="naive")
    torch.testing.assert_close(out, direct @ v)
    monomial = polynomial_attention(q, k, v, degree=degree, alpha=alpha, beta=beta, normalization="none")
    torch.testing.assert_close(monomial, shifted**degree @ v)


def test_one_number_or_one_for_each_head():
    q, k, v = tensors(2, 5, 5, 4, heads=3)
    plain = polynomial_attention(q, k, v, degree=3)
    gain = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    per_head = polynomial_attention(q, k, v, degree=3, gain=gain)
    torch.testing.assert_close(per_head, plain * gain.view(-1, 1, 1))
    torch.testing.assert_close(polynomial_attention(q, k, v, degree=3, gain=2.0), 2 * plain)
    shared = polynomial_attention(q, k, v, coefficients=[0, 0, 0, 1.0])
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(polynomial_attention(q, k, v, degree=3, alpha=2.0), 8 * plain)


def test_causal_rows_end_where_the_keys_end():
    q, k, v = tensors(1, 3, 5, 4)
    _, weights = polynomial_attention(q, k, v, degree=2, is_causal=True, return_weights=True)
    assert (weights[0, 0] != 0).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_window_counts_the_own_position():
    q, k, v = tensors(1, 4, 4, 4)
    _, causal = polynomial_attention(q, k, v, degree=2, is_causal=True, sliding_window=2, return_weights=True)
    assert (causal[0, 0] != 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    _, both = polynomial_attention(q, k, v, degree=2, sliding_window=2, return_weights=True)
    assert (both[0, 0] != 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_lengths_come_from_the_mask_not_from_the_width():
    """The same keys give the same output, however much padding stands beside them and however the mask is shaped."""
    q, k, v = tensors(2, 3, 6, 4)
    alone = polynomial_attention(q, k[:, :, :4], v[:, :, :4], degree=3)
    by_length = polynomial_attention(q, k, v, degree=3, key_lengths=torch.tensor([4, 4]))
    by_mask = polynomial_attention(q, k, v, degree=3, keep=torch.arange(6) < 4)
    left = polynomial_attention(q, k.roll(2, 2), v.roll(2, 2), degree=3, keep=torch.arange(6) >= 2)
    for other in (by_length, by_mask, left):
        torch.testing.assert_close(other, alone)
    # a mask with one column for all keys is as long as the keys
    rows = torch.tensor([True, False, True]).view(3, 1)
    for form in ("naive", "tiled"):
        one_column = polynomial_attention(q, k, v, degree=3, keep=rows, backend=form)
        torch.testing.assert_close(one_column, polynomial_attention(q, k, v, degree=3) * rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degree": None}, "give exactly one of degree and coefficients"),
        ({"coefficients": [0.0, 1.0]}, "give exactly one of degree and coefficients"),
        ({"degree": 0}, "degree must be an integer >= 1, got 0"),
        ({"degree": 1.5}, "degree must be an integer >= 1, got 1.5"),
        ({"normalization": "sum"}, 'needs an even degree, got 3.*use "l1"'),
        ({"degree": None, "coefficients": [1.0] * 4, "normalization": "sum"}, "needs an even degree, got 3"),
        ({"degree": None, "coefficients": torch.ones(3, 4)}, r"must be \[p \+ 1\] or \[2, p \+ 1\], got \(3, 4\)"),
        ({"degree": None, "coefficients": torch.ones(())}, r"coefficients must be .* got \(\)"),
        (
            {"degree": None, "coefficients": [0.0, 1.0, 0.29], "normalization": "sum"},
            r'needs weights of one sign, and the polynomial \(0.0, 1.0, 0.28.* falls below 0.*use "l1" or "l2"',
        ),
        (
            {"degree": None, "coefficients": torch.tensor([[1.0, 0, 1], [0, 0, 0]]), "normalization": "sum"},
            r"the polynomial \(0.0, 0.0, 0.0\) falls below 0, or is 0 throughout",
        ),
        ({"normalization": "median"}, "normalization must be one of .*'median'"),
        ({"normalization": -1.0}, "must be a positive number, got -1.0"),
        ({"normalization": math.nan}, "must be a positive number, got nan"),
        ({"gain": torch.ones(3)}, r"must be numbers or \[2\], got \(3,\)"),
        ({"keep": torch.ones(5, 5)}, "keep must be bool .*float32; see ops.masks.split_mask"),
        ({"keep": torch.ones(4, 5, dtype=torch.bool)}, r"keep \(4, 5\) does not broadcast to .* = \(1, 2, 5, 5\)"),
        ({"bias": torch.ones(1, 3, 5, 5)}, r"bias \(1, 3, 5, 5\) does not broadcast"),
        ({"key_lengths": torch.tensor([1, 2])}, r"key_lengths must be \[B\] = \[1\], got \(2,\)"),
        ({"dropout": 1.0}, "dropout must be a probability below 1, got 1.0"),
        ({"softcap": 0.0}, "softcap must be positive, or None"),
        ({"sliding_window": 0}, "is 1 at least, got 0"),
        ({"backend": "fast"}, "backend must be \"auto\" or one of .* got 'fast'"),
    ],
)
def test_argument_errors(change, message):
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        polynomial_attention(x, x, x, **{"degree": 3, **change})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 4), (2, 5, 4), (2, 5, 4)), r"expected query \[B, H, T, D\].*got query \(2, 5, 4\)"),
        (((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 5, 4)), "batch, key length, key heads and head_dim must agree"),
        (((1, 2, 5, 4), (1, 2, 5, 3), (1, 2, 5, 4)), "batch, key length, key heads and head_dim must agree"),
        (((1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), "must be a multiple of the key heads; got query .1, 3, 5, 4."),
    ],
)
def test_shape_errors(shapes, message):
    with pytest.raises(ValueError, match=message):
        polynomial_attention(*(torch.randn(shape) for shape in shapes), degree=3)


def test_the_tiled_form_refuses_other_activations():
    x = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match='polynomials only; use backend="auto"'):
        attend(x, x, x, phi=torch.sigmoid, backend="tiled")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_floating_point_is_refused(rows, which, dtype):
    given = [x.to(dtype) if i == which else x for i, x in enumerate(tensors(1, rows, 3, 2, dtype=torch.float32))]
    with pytest.raises(TypeError, match=rf"must be floating point, got .*{dtype}.*query.float\(\)"):
        polynomial_attention(*given, degree=2)


def test_floating_point_dtypes_may_differ():
    q, k, v = tensors(1, 3, 3, 2, dtype=torch.float32)
    out = polynomial_attention(q.bfloat16(), k.bfloat16(), v, degree=2)
    assert out.dtype == torch.bfloat16
