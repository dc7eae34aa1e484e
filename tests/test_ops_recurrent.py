"""The linear-cost form: monomials, chunks and offsets against the definition in float64, memory, refusals."""

import itertools
import math

import pytest
import torch
from attention_cases import NORMALIZATIONS, degree_of, error, inputs, masking, refused, run

from hf_polyattn.ops import attend, polynomial_attention, recurrent
from hf_polyattn.ops.monomials import Monomials
from hf_polyattn.ops.recurrent import Past, absorb, new_past

PHIS = ("s^1", "s^2", "s^3", "s^4", "a^2", "c^1", "c^2", "c^3")
MASKS = ("full", "causal", "lengths", "left-padding", "right-padding")
# (B, H, Hk, T, S, D, Dv)
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "three": (2, 2, 1, 3, 3, 4, 5),
    "chunk": (1, 2, 2, 16, 16, 3, 4),
    "chunk+1": (2, 4, 2, 17, 17, 5, 2),
    "63": (2, 4, 4, 63, 63, 8, 8),
    "63-grouped": (1, 6, 2, 63, 63, 8, 4),
    "111x257": (1, 2, 1, 111, 257, 4, 3),
    "257x63": (2, 2, 2, 257, 63, 4, 6),
    "1x257": (3, 4, 2, 1, 257, 4, 4),
    "257": (1, 1, 1, 257, 257, 3, 3),
}
FACTORED = tuple(n for n in NORMALIZATIONS if n not in ("l1", "l2"))
_pairs = [pair for pair in itertools.product(FACTORED, PHIS) if not refused(*pair)]
_places = list(itertools.product(MASKS, SHAPES))
CASES = [(*_pairs[(7 * i) % len(_pairs)], *place) for i, place in enumerate(_places)]
CASES += [(*pair, *_places[(3 * i) % len(_places)]) for i, pair in enumerate(_pairs)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that the sizes here need many of them, of one head at a time."""
    monkeypatch.setattr(recurrent, "CHUNK", 16)
    monkeypatch.setattr(recurrent, "LONG_CHUNK", 16)
    monkeypatch.setattr(recurrent, "FEATURES", {"cpu": 2**10})


def masks(name: str, batch: int, heads: int, queries: int, keys: int) -> dict:
    if name != "right-padding":
        return masking(name, batch, heads, queries, keys)
    # as models pass it: causal order and padding in one mask of all rows
    rows = torch.arange(queries)[:, None] + keys - queries
    lengths = torch.arange(keys, 0, -1)[:batch].clamp(min=keys // 2).view(-1, 1, 1, 1)
    return {"keep": (torch.arange(keys) <= rows) & (torch.arange(keys) < lengths)}


def given_for(phi: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in inputs(phi, shape).items() if name != "bias"}


@pytest.mark.parametrize(("normalization", "phi", "mask", "shape"), CASES, ids=["-".join(map(str, c)) for c in CASES])
@pytest.mark.usefixtures("small_chunks", "deterministic")
def test_output_and_gradients(normalization, phi, mask, shape):
    batch, heads, _, queries, keys, _, _ = SHAPES[shape]
    given = given_for(phi, SHAPES[shape])
    options = {"normalization": normalization, **masks(mask, batch, heads, queries, keys), "degree": degree_of(phi)}
    exact = run("naive", given, torch.float64, **options)
    for name, got in run("recurrent", given, torch.float64, **options).items():
        assert error(got, exact[name]) < 1e-10, name
    rounded = run("naive", given, torch.float32, **options)
    for name, got in run("recurrent", given, torch.float32, **options).items():
        # as in test_ops_forms: gradients that cancel are measured against elements of 0.05
        least = 0.05 if keys > 1 else 1.0
        same_dtype = error(rounded[name], exact[name], least)
        # monomials cancel where q . k is small against |q| |k|, more so at high degrees: 7e-5 was the largest for s^4
        roundings = 1e-4 if phi == "s^4" else 2e-5
        assert error(got, exact[name], least) < 3 * same_dtype + roundings, name


@pytest.mark.parametrize("phi", ["s^1", "s^2", "c^2"])
@pytest.mark.parametrize("dim", [32, 64])
def test_real_sizes(phi, dim):
    """Several chunks of the size that is really used, with coefficients of both signs."""
    given = given_for(phi, (1, 2, 1, 700, 700, dim, dim))
    if "coefficients" in given:
        given["coefficients"] = torch.tensor([[0.5, -1.0, 0.5], [-0.3, 0.2, -0.7]])
    options = {"degree": degree_of(phi), "normalization": "length", "is_causal": True}
    exact = run("naive", given, torch.float64, **options)
    for name, got in run("recurrent", given, torch.float64, **options).items():
        assert error(got, exact[name]) < 1e-12, name
    for name, got in run("recurrent", given, torch.float32, **options).items():
        assert error(got, exact[name]) < 2e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phi", ["s^2", "c^2", "c^3"])
def test_half_precision_sums_in_fp32(phi, dtype):
    """As exact as the definition, which computes in fp32, on the same rounded inputs."""
    given = {n: x.to(dtype).float() for n, x in given_for(phi, (1, 4, 2, 300, 300, 8, 8)).items()}
    options = {"degree": degree_of(phi), "normalization": "length", "is_causal": True}
    exact = run("naive", given, torch.float64, **options)
    rounded, got = (run(form, given, dtype, **options) for form in ("naive", "recurrent"))
    for name, expected in exact.items():
        assert error(got[name], expected) < 1.1 * error(rounded[name], expected) + 1e-5, name


@pytest.mark.parametrize("phi", ["s^1", "s^3", "a^2", "c^2", "c^3"])
def test_gradcheck(phi, small_chunks):
    given = given_for(phi, (2, 2, 1, 18, 19, 2, 3))
    leaves = [x.double().requires_grad_() for x in given.values()]
    lengths = torch.tensor([19, 7])

    def compute(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(given, tensors, strict=True))
        options = {"degree": degree_of(phi), "key_lengths": lengths, "is_causal": True}
        return polynomial_attention(**named, **options, backend="recurrent")

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


def test_second_derivative_is_refused_with_the_remedy():
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    out = polynomial_attention(x, x, x, degree=3, backend="recurrent")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='the recurrent form .* no second derivative: use backend="naive"'):
        grad.sum().backward()


@pytest.mark.parametrize(("dim", "degrees"), [(1, (4,)), (3, (0, 1, 2, 3)), (5, (5,)), (8, (0, 1)), (2, (0,))])
@pytest.mark.parametrize("positions", [2, recurrent.CHUNK])
def test_monomials_are_each_there_once(dim, degrees, positions):
    monomials = Monomials(dim, degrees)
    primes = torch.tensor([2.0, 3, 5, 7, 11, 13, 17, 19], dtype=torch.float64)[:dim]
    features = monomials.of(primes[None, :, None].expand(1, dim, positions).contiguous())[0, :, -1]
    expected = [
        (math.prod(primes[list(c)].tolist()), math.factorial(k) / math.prod(map(math.factorial, map(c.count, set(c)))))
        for k in degrees
        for c in itertools.combinations_with_replacement(range(dim), k)
    ]
    assert list(zip(features.tolist(), monomials.multiplicities(features).tolist())) == expected
    assert monomials.count == len(expected)


def test_masked_keys_may_hold_anything():
    """What a padded position holds must not matter, inf and NaN included."""
    q, k, v = torch.randn(3, 2, 2, 40, 4)
    keep = torch.arange(40) >= torch.tensor([5, 0]).view(-1, 1, 1, 1)
    options = {"degree": 2, "is_causal": True, "keep": keep, "backend": "recurrent"}
    expected = polynomial_attention(q, k, v, **options)
    k[0, :, :5], v[0, :, :5] = math.nan, math.inf
    torch.testing.assert_close(polynomial_attention(q, k, v, **options), expected)


def test_features_exist_for_a_chunk_only(monkeypatch):
    from test_ops_forms import Largest

    monkeypatch.setattr(recurrent, "FEATURES", {"cpu": 2**12})
    q, k, v = (torch.randn(1, 2, 4096, 4, requires_grad=True) for _ in range(3))
    with Largest(q, k, v) as seen:
        out = polynomial_attention(q, k, v, coefficients=[1.0, 1.0, 1.0], is_causal=True, backend="recurrent")
        out.sum().backward()
    features = Monomials.of_polynomial(4, 2, True).count * 4096
    assert seen.elements <= 2 * 4096 * 4 < features


# the past


PAST = [("s^2", "sqrt_length"), ("c^2", "length"), ("c^3", "none"), ("s^2", "sum"), ("a^1", 14.0)]


@pytest.mark.parametrize(("phi", "normalization"), PAST)
@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 1, 11], [20]], ids=str)
@torch.no_grad()
def test_pieces_equal_the_whole(phi, normalization, sizes, small_chunks):
    given = {n: x.double() for n, x in given_for(phi, (2, 4, 2, 20, 20, 3, 5)).items()}
    q, k, v = (given.pop(name) for name in ("query", "key", "value"))
    affine = (given.pop("alpha"), given.pop("beta")) if "alpha" in given else None
    options = {**given, "affine": affine, "degree": degree_of(phi), "normalization": normalization, "is_causal": True}
    keep = torch.arange(20) >= torch.tensor([0, 6]).view(-1, 1, 1, 1)
    expected = attend(q, k, v, **options, keep=keep, backend="naive")
    polynomial = {"degree": int(phi[2:]), "has_coefficients": phi[0] in "ac"}
    past, absorbed = (new_past(k, v, normalization=normalization, **polynomial) for _ in range(2))
    parts, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        inputs = (x[:, :, here] for x in (q, k, v))
        parts.append(attend(*inputs, **options, keep=keep[..., here], past=past))
        start += size
    torch.testing.assert_close(torch.cat(parts, 2), expected)
    assert past.lengths.tolist() == [20, 14]
    absorb(absorbed, k, v, key_keep=keep[:, 0, 0], **polynomial)
    torch.testing.assert_close(absorbed.sums, past.sums)
    assert torch.equal(absorbed.lengths, past.lengths)


@torch.no_grad()
@pytest.mark.parametrize("phi", ["s^2", "c^2", "c^3"])
def test_bf16_decoding_sums_in_fp32(phi):
    """Keys one after the other into sums of fp32: as exact as the definition with all keys at once."""
    dim, length, fed = (8, 700, 600) if phi == "c^3" else (16, 700, 600)
    given = {n: x.bfloat16() for n, x in given_for(phi, (1, 4, 2, length, length, dim, dim)).items()}
    q, k, v = (given.pop(name) for name in ("query", "key", "value"))
    affine = (given.pop("alpha").float(), given.pop("beta").float()) if "alpha" in given else None
    given = {n: x.float() for n, x in given.items()}
    options = {"degree": degree_of(phi), "normalization": "length", "is_causal": True}
    wide = {n: x.double() for n, x in given.items()}
    wide["affine"] = affine and tuple(x.double() for x in affine)
    exact = attend(q.double(), k.double(), v.double(), **wide, **options, backend="naive")
    rounded = attend(q, k, v, **given, affine=affine, **options, backend="naive")
    past = new_past(k, v, degree=int(phi[2:]), has_coefficients=phi[0] in "ac", normalization="length")
    parts = [slice(0, fed), *(slice(i, i + 1) for i in range(fed, length))]
    out = torch.cat(
        [attend(*(x[:, :, p] for x in (q, k, v)), **given, affine=affine, **options, past=past) for p in parts], 2
    )
    assert past.sums.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    steps = slice(fed, length)
    # the rounding of the output to bf16, 1.7e-3 on average, is nearly all of both errors
    assert error(out[:, :, steps].double(), exact[:, :, steps]) < 1.1 * error(
        rounded[:, :, steps].double(), exact[:, :, steps]
    )


def test_a_past_has_no_gradients():
    x = torch.randn(1, 1, 1, 2, requires_grad=True)
    past = Past(torch.zeros(1, 1, 3, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"decode under torch.no_grad\(\), train without a cache"):
        attend(x, x, x, degree=2, past=past)


# what it refuses


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization": "l1"}, "absolute values do not factor"),
        ({"normalization": "l2"}, "the squares in Z_i have twice the degree"),
        ({"softcap": 2.0}, "it has no softcap"),
        ({"dropout": 0.1}, "it has no dropout"),
        ({"bias": torch.zeros(9, 9)}, "it has no bias"),
        ({"sliding_window": 3}, "rows have a sliding window"),
        ({"keep": torch.rand(1, 1, 9, 9) > 0.5}, "its rows differ in more than the causal order"),
        ({"keep": torch.arange(9)[:, None] // 3 == torch.arange(9) // 3}, "its rows differ in more than"),
        ({"keep": torch.rand(1, 2, 1, 9) > 0.5}, "differs between heads"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(options, reason):
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    with pytest.raises(ValueError, match=f'backend="recurrent" cannot compute this call: .*{reason}'):
        polynomial_attention(q, k, v, degree=2, backend="recurrent", **options)


def test_a_state_larger_than_the_keys_is_refused_with_the_numbers():
    q, k, v = torch.randn(3, 1, 1, 9, 64)
    message = "degree 3 at head_dim 64 means 45,760 features of 11.2 MiB a head, .* of 9 tokens: .* at 22,880"
    with pytest.raises(ValueError, match=message):
        polynomial_attention(q, k, v, degree=3, backend="recurrent")
    # 0.5 MiB is small whatever the length
    polynomial_attention(q, k, v, degree=2, backend="recurrent")


def test_a_window_that_reaches_everything_is_none():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    got, expected = (
        polynomial_attention(q, k, v, degree=2, is_causal=True, sliding_window=window, backend="recurrent")
        for window in (9, None)
    )
    assert torch.equal(got, expected)
