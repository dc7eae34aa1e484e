"""Every form against the definition in float64: outputs and all gradients, odd sizes, memory, dropout, strides."""

import contextlib
import itertools

import pytest
import torch
from attention_cases import CASES, IDS, NORMALIZATIONS, SHAPES, degree_of, error, inputs, masking, refused, run
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_polyattn.activations import get_activation
from hf_polyattn.ops import attend, polynomial_attention, tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that the sizes here need many of them, in every direction."""
    monkeypatch.setattr(tiles, "TILE", {"cpu": (48, 2**12)})
    monkeypatch.setattr(tiles, "CELL", 16)


@pytest.mark.parametrize(("normalization", "phi", "mask", "shape"), CASES, ids=IDS)
@pytest.mark.usefixtures("small_tiles")
def test_output_and_gradients(normalization, phi, mask, shape):
    batch, heads, _, queries, keys, _, _ = SHAPES[shape]
    given = inputs(phi, SHAPES[shape])
    options = {"normalization": normalization, **masking(mask, batch, heads, queries, keys)}
    options["softcap"] = 5.0 if keys % 3 else None
    options["degree"] = degree_of(phi)
    exact = run("naive", given, torch.float64, **options)
    for name, got in run("tiled", given, torch.float64, **options).items():
        assert error(got, exact[name]) < 1e-8, name
    rounded = run("naive", given, torch.float32, **options)
    for name, got in run("tiled", given, torch.float32, **options).items():
        # The error of the definition in the same dtype, and some roundings for what it happens to hit exactly.
        # Gradients that cancel are measured against elements of 0.05; of 1 for one key, whose normalized weight is 1.
        least = 0.05 if keys > 1 else 1.0
        same_dtype = error(rounded[name], exact[name], least)
        assert same_dtype < 1e-3, name
        assert error(got, exact[name], least) < 3 * same_dtype + 2e-5, name


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30])
def test_masked_keys_may_hold_anything(fill):
    """Their gradients are zero and those of the other keys as ever, under a soft cap too."""
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    keep = (torch.arange(40) < 33) & (torch.arange(40) != 7)
    results = []
    for held in (0.0, fill):
        leaves = [q.requires_grad_(), k.masked_fill(~keep[:, None], held).requires_grad_(), v.requires_grad_()]
        out = polynomial_attention(*leaves, degree=3, keep=keep, softcap=2.0, backend="tiled")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves[1:])])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("phi", ["s^1", "s^3", "a^3", "c^3"])
def test_real_tile_sizes(phi):
    """Long enough for several tiles of the size that is really used."""
    given = inputs(phi, (2, 2, 1, 300, 2300, 4, 3))
    options = {"degree": degree_of(phi), "is_causal": True, "keep": torch.rand(2, 1, 1, 2300) > 0.1}
    exact = run("naive", given, torch.float64, **options)
    for name, got in run("tiled", given, torch.float64, **options).items():
        assert error(got, exact[name]) < 1e-10, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("phi", ["s^1", "s^2", "s^3", "s^5", "a^3", "c^2", "c^3"])
def test_gradcheck(normalization, phi):
    if refused(normalization, phi):
        phi = "c^4"
    given = inputs(phi, (1, 2, 1, 4, 5, 2, 3))
    leaves = [x.double().requires_grad_() for x in given.values()]
    keep = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)

    def tiled(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(given, tensors, strict=True))
        return polynomial_attention(
            **named,
            degree=degree_of(phi),
            normalization=normalization,
            keep=keep,
            is_causal=True,
            softcap=3.0,
            backend="tiled",
        )

    assert torch.autograd.gradcheck(tiled, leaves, fast_mode=True)


def test_no_gradient_where_none_is_wanted():
    given = inputs("c^3", SHAPES["63"])
    given["value"].requires_grad_()
    out = polynomial_attention(**given, backend="tiled")
    out.sum().backward()
    other = {n: x.detach().clone() for n, x in given.items()}
    other["value"].requires_grad_()
    polynomial_attention(**other, backend="naive").sum().backward()
    # sums of up to 63 terms in another order
    torch.testing.assert_close(given["value"].grad, other["value"].grad, rtol=1e-5, atol=1e-5)
    assert given["query"].grad is None


def test_second_derivative_is_refused_with_the_remedy():
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    out = polynomial_attention(x, x, x, degree=3, backend="tiled")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(polynomial_attention(x, x, x, degree=3, backend="naive").sum(), x)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match='the tiled form .* no second derivative: use backend="naive"'):
        grad.sum().backward()
    out = polynomial_attention(x, x, x, degree=3, backend="naive")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    grad.sum().backward()


@pytest.mark.parametrize("form", ["tiled", "recurrent", "auto"])
@pytest.mark.parametrize("of", [0, 1, 2, 3])
def test_a_second_derivative_by_the_input_alone_is_refused_too(form, of):
    """No parameter stands before the attention: whatever the gradient was computed from has to lead to the refusal."""
    given = [*torch.randn(3, 1, 1, 5, 2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)]

    def loss(x: torch.Tensor) -> torch.Tensor:
        q, k, v, c = (x if i == of else y for i, y in enumerate(given))
        options = {"coefficients": c, "normalization": "length", "backend": form}
        return polynomial_attention(q, k, v, **options).square().sum()

    with pytest.raises(RuntimeError, match='no second derivative: use backend="naive"'):
        torch.autograd.functional.hessian(loss, given[of])


@pytest.mark.parametrize("form", ["tiled", "recurrent"])
def test_a_second_derivative_by_the_incoming_gradient_is_refused_too(form):
    q, k, v = torch.randn(3, 1, 1, 5, 2, dtype=torch.float64)
    out = polynomial_attention(q.requires_grad_(), k, v, degree=2, normalization="length", backend=form)
    incoming = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, q, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: use backend="naive"'):
        torch.autograd.grad(grad.sum(), incoming)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("transform", ["jacfwd", "jacrev", "grad", "vmap", "dual"])
def test_transforms_take_the_definition(transform, rows, dtype):
    q, k, v = torch.randn(1, 2, rows, 4, dtype=dtype), *torch.randn(2, 1, 2, 5, 4, dtype=dtype)

    def through(form: str) -> torch.Tensor:
        def block(x: torch.Tensor) -> torch.Tensor:
            out = polynomial_attention(x, k, v, degree=2, normalization="length", backend=form)
            return out.sum() if transform == "grad" else out

        if transform == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(block(forward_ad.make_dual(q, torch.ones_like(q)))).tangent
        return getattr(torch.func, transform)(block)(q[None] if transform == "vmap" else q)

    expected = through("naive")
    assert expected.abs().max() > 0
    assert torch.equal(through("auto"), expected)
    for form in ("tiled", "recurrent", *(["cpu"] if dtype == torch.float32 else [])):
        with pytest.raises(ValueError, match='torch.func; use backend="naive"'):
            through(form)


@pytest.mark.parametrize("name", ["key", "value", "coefficients", "gain", "bias"])
def test_a_tangent_of_any_argument_is_noticed(name):
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    given = {"query": q, "key": k, "value": v, "coefficients": torch.ones(2, 4), "gain": torch.ones(2)}
    given |= {"bias": torch.zeros(5, 5)} if name == "bias" else {}

    def tangent(form: str) -> torch.Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            return forward_ad.unpack_dual(polynomial_attention(**given | {name: dual}, backend=form)).tangent

    assert torch.equal(tangent("auto"), tangent("naive"))


@pytest.mark.parametrize("form", ["naive", "tiled"])
def test_dropout_obeys_the_seed(form):
    q, k, v = torch.randn(3, 2, 2, 65, 8)

    def once(seed: int, dropout: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return polynomial_attention(q, k, v, degree=3, dropout=dropout, backend=form)

    assert torch.equal(once(1, 0.2), once(1, 0.2))
    assert not torch.allclose(once(1, 0.2), once(2, 0.2))
    assert torch.equal(once(1, 0.0), once(2, 0.0))
    torch.manual_seed(1)
    first, second = (polynomial_attention(q, k, v, degree=3, dropout=0.2, backend=form) for _ in range(2))
    assert not torch.allclose(first, second)


def survivors(shape: tuple[int, ...], probability: float, seed: int, **masks) -> torch.Tensor:
    """The dropout factors that the tiled form draws where keys are kept, read off by unit weights and values."""
    batch, heads, key_heads, queries, keys, dim, _ = shape
    torch.manual_seed(seed)
    value = torch.eye(keys, dtype=torch.float64).expand(batch, key_heads, keys, keys)
    zeros = torch.zeros(batch, max(heads, key_heads), max(queries, keys), dim, dtype=torch.float64)
    return polynomial_attention(
        zeros[:, :heads, :queries],
        zeros[:, :key_heads, :keys],
        value,
        coefficients=[1.0, 0.0],
        dropout=probability,
        normalization="none",
        backend="tiled",
        **masks,
    )


@pytest.mark.usefixtures("small_tiles")
def test_dropout_keeps_the_expected_share():
    factors = survivors((3, 4, 2, 70, 130, 2, 0), 0.3, seed=5)
    share = (factors > 0).double().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.21 / factors.numel()) ** 0.5)
    # what survives is scaled up so that the mean stays
    assert factors[factors > 0].unique().tolist() == pytest.approx([1 / 0.7], rel=1e-4)
    # no two tiles, heads or batch rows share their draws
    blocks = [b for x in factors.flatten(0, 1) for row in x.split(35) for b in row.split(65, dim=-1)]
    for a, b in itertools.combinations(blocks, 2):
        assert ((a > 0) == (b > 0)).double().mean().item() == pytest.approx(0.58, abs=0.08)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("phi", ["s^1", "s^2", "s^3", "c^2"])
@pytest.mark.usefixtures("small_tiles")
def test_dropout_backward_sees_the_mask_of_the_forward(normalization, phi):
    if refused(normalization, phi):
        phi = "s^4"
    shape = (2, 4, 2, 37, 70, 3, 5)
    given = {n: x.double().requires_grad_() for n, x in inputs(phi, shape).items()}
    options = {"normalization": normalization, "is_causal": True, "degree": degree_of(phi)}
    factors = survivors(shape, 0.25, seed=3, is_causal=True)
    torch.manual_seed(3)
    out = polynomial_attention(**given, dropout=0.25, backend="tiled", **options)
    _, weights = polynomial_attention(**given, return_weights=True, **options)
    expected = (weights * factors) @ given["value"].repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(out)
    leaves = list(given.values())
    for got, want in zip(torch.autograd.grad(out, leaves, probe), torch.autograd.grad(expected, leaves, probe)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_dropout_under_checkpointing():
    x = torch.randn(1, 2, 40, 4, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return polynomial_attention(x, x, x, degree=3, dropout=0.5, backend="tiled")

    grads = []
    for wrapped in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(wrapped(x).sum(), x)[0])
    assert torch.equal(*grads)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, views of what was there before left out."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def largest(form: str, length: int, **options) -> int:
    q, k, v = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3))
    known = [x for x in options.values() if isinstance(x, torch.Tensor)]
    with Largest(q, k, v, *known) as seen:
        polynomial_attention(q, k, v, coefficients=[1.0, 1.0, 1.0, 1.0], backend=form, **options).sum().backward()
    return seen.elements


@pytest.mark.parametrize("mask", ["causal", "bool"])
@pytest.mark.parametrize("normalization", ["sqrt_length", "l2"])
def test_no_full_score_matrix(normalization, mask, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {"cpu": (64, 2**14)})

    def options(length: int) -> dict:
        masks = {"is_causal": True} if mask == "causal" else {"keep": torch.rand(1, 1, length, length) > 0.5}
        return {"normalization": normalization, "dropout": 0.1, **masks}

    assert largest("tiled", 1024, **options(1024)) <= 64 * 256
    # the same probe sees the definition's
    assert largest("naive", 256, **options(256)) >= 2 * 256 * 256


def test_expanded_masks_stay_expanded():
    length = 1024
    keep = (torch.rand(length) > 0.5).expand(1, 2, length, length)
    assert largest("tiled", length, keep=keep) <= tiles.TILE["cpu"][1]
    batch, heads = torch.rand(1, 1, 1, 9) > 0.5, 2
    q, k, v = torch.randn(3, 3, heads, 9, 4)
    got = polynomial_attention(q, k, v, degree=3, keep=batch.expand(3, heads, 9, 9), backend="tiled")
    torch.testing.assert_close(got, polynomial_attention(q, k, v, degree=3, keep=batch, backend="naive"))


def test_transposed_and_expanded_inputs():
    """Layouts as models pass them: [B, T, H, D] seen as [B, H, T, D], one key head seen as many, every second row."""
    q = torch.randn(2, 33, 4, 8, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(2, 1, 66, 8, dtype=torch.float64)[:, :, ::2].expand(2, 4, 33, 8)
    v = torch.randn(2, 4, 8, 33, dtype=torch.float64).transpose(2, 3)
    results = {}
    for form in ("naive", "tiled"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = polynomial_attention(*leaves, degree=3, is_causal=True, backend=form)
        results[form] = [out, *torch.autograd.grad(out, leaves, v)]
    for got, expected in zip(results["tiled"], results["naive"]):
        torch.testing.assert_close(got, expected)
    # the layout of the query, so that the model's transpose back costs nothing
    assert results["tiled"][0].transpose(1, 2).is_contiguous()
    assert polynomial_attention(q.contiguous(), k, v, degree=3, backend="tiled").is_contiguous()


@pytest.mark.parametrize("form", ["naive", "tiled"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(form, queries, keys):
    q = torch.randn(2, 2, queries, 4, requires_grad=True)
    k, v = (torch.randn(2, 1, keys, 4, requires_grad=True) for _ in range(2))
    for options in ({"is_causal": True}, {"keep": torch.ones(2, 1, queries, keys, dtype=torch.bool)}, {}):
        for normalization in NORMALIZATIONS:
            out = polynomial_attention(q, k, v, degree=2, normalization=normalization, backend=form, **options)
            assert torch.equal(out, torch.zeros(2, 2, queries, 4))
            for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
                assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("form", ["naive", "tiled"])
def test_autocast_does_not_round_the_scores(form):
    given = inputs("c^3", SHAPES["63"])
    plain = run(form, given, torch.float32)
    inside = run(form, given, torch.float32, autocast=True)
    for name, expected in plain.items():
        assert torch.equal(inside[name], expected), name


@pytest.mark.parametrize("form", ["naive", "tiled"])
def test_parameters_in_bf16_are_composed_in_fp32(form):
    """A model in bf16 keeps coefficients, alpha, beta and gain in bf16: their products must not be rounded to it."""
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    state = {"coefficients": torch.randn(2, 4), "gain": torch.rand(2)}
    affine = (1 + torch.rand(2), torch.randn(2))
    state = {n: x.bfloat16() for n, x in state.items()}
    affine = tuple(x.bfloat16() for x in affine)
    exact = attend(
        *(x.double() for x in (q, k, v)),
        **{n: x.double() for n, x in state.items()},
        affine=tuple(x.double() for x in affine),
        backend="naive",
    )
    out = attend(q, k, v, **state, affine=affine, backend=form)
    assert error(out.double(), exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_dtype_is_the_query_dtype(dtype):
    q, k, v = torch.randn(3, 1, 2, 9, 8).to(dtype)
    for form in ("naive", "tiled"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, weights = polynomial_attention(*leaves, degree=3, backend=form, return_weights=True)
        assert out.dtype == weights.dtype == dtype
        out = polynomial_attention(*leaves, degree=3, backend=form)
        assert {g.dtype for g in torch.autograd.grad(out.sum(), leaves)} == {dtype}


def test_compiles_without_graph_breaks():
    given = inputs("c^3", SHAPES["63"])

    def f(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return polynomial_attention(**given, is_causal=True, qk_norm=True, softcap=3.0, backend="naive")

    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="eager")(given), f(given))


def test_softmax_through_attend_takes_no_keys():
    entry = get_activation("softmax")
    q, kv = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 0, 2)
    out = attend(q, kv, kv, phi=entry.phi, exponential=True, normalization="sum")
    assert torch.equal(out, torch.zeros(1, 1, 3, 2))
