"""The fused form against the definition in float64, on a GPU, or in Triton's interpreter where there is none.

Not collected by itself: `test_ops_fused.py` runs it in processes that are told to interpret, and
`test_ops_fused_gpu.py` on a GPU. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/fused_checks.py
"""

import pytest
import torch
from attention_cases import NORMALIZATIONS, degree_of, error, inputs, masking, refused
from torch.utils.checkpoint import checkpoint

from hf_polyattn.activations import frobenius_gain
from hf_polyattn.ops import fused, polynomial_attention
from hf_polyattn.ops.forms import Call, choose_form
from hf_polyattn.ops.fused_launch import Tile, interpreted, splits
from hf_polyattn.ops.fused_masks import Masks
from hf_polyattn.ops.masks import build_keep

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = pytest.mark.skipif(fused.problem(DEVICE) is not None, reason=f"no fused form: {fused.problem(DEVICE)}")

if interpreted() and fused.problem(DEVICE) is None:
    from triton.runtime import interpreter

    # it prepares triton.language anew for each call inside a kernel, which takes half of the time
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)

# (B, H, Hk, T, S, D, Dv); up to 16 queries take the kernels of the decoding step
SHAPES = {
    "1": (1, 1, 1, 1, 1, 1, 1),
    "3": (2, 2, 1, 3, 3, 4, 5),
    "1x257": (2, 4, 2, 1, 257, 4, 4),
    "16x130": (1, 6, 2, 16, 130, 20, 7),
    "17x33": (2, 2, 1, 17, 33, 16, 16),
    "63": (1, 4, 2, 63, 63, 24, 40),
    "111x257": (1, 2, 1, 111, 257, 16, 3),
    "257x63": (1, 1, 1, 257, 63, 4, 6),
    "257": (1, 1, 1, 257, 257, 3, 3),
}
# every normalization, phi, mask and shape, several times over and in changing company
CASES = [
    ("sqrt_length", "s^3", "causal", "63"),
    ("length", "c^3", "causal", "63"),
    ("sum", "s^2", "lengths", "63"),
    ("l1", "a^3", "left-padding", "63"),
    ("l2", "c^2", "all", "63"),
    ("none", "s^1", "window", "63"),
    (14.0, "s^5", "full", "63"),
    ("length", "s^6", "blocks", "63"),
    ("l1", "s^4", "no-rows", "17x33"),
    ("sum", "c^2", "bool", "17x33"),
    ("sqrt_length", "c^3", "full", "111x257"),
    ("l2", "s^3", "causal-window", "111x257"),
    ("length", "a^2", "lengths", "111x257"),
    ("l1", "c^3", "blocks", "111x257"),
    ("sqrt_length", "s^2", "causal", "257x63"),
    ("l1", "s^3", "bool", "257x63"),
    ("length", "c^3", "causal-window", "257"),
    ("sum", "s^2", "left-padding", "257"),
    (14.0, "c^3", "window", "257"),
    ("length", "c^3", "full", "1"),
    ("l2", "s^3", "causal", "3"),
    ("sqrt_length", "s^3", "lengths", "1x257"),
    ("l1", "c^3", "left-padding", "1x257"),
    ("length", "a^3", "all", "16x130"),
    ("sum", "s^6", "causal-window", "16x130"),
    ("l2", "c^2", "bool", "16x130"),
]
HALF_CASES = [
    ("length", "c^3", "causal", "63"),
    ("sqrt_length", "s^3", "all", "17x33"),
    ("l1", "c^2", "blocks", "63"),
    ("l2", "s^3", "left-padding", "17x33"),
    ("sum", "s^2", "lengths", "16x130"),
]


def name(case: tuple) -> str:
    return "-".join(map(str, case))


def run(form: str, given: dict[str, torch.Tensor], weight: torch.Tensor | None = None, **options) -> dict:
    """Output and gradients by name, in float64 on the CPU."""
    leaves = {key: x.detach().requires_grad_() for key, x in given.items()}
    out = polynomial_attention(**leaves, backend=form, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) if weight is None else weight
    grads = torch.autograd.grad(out, list(leaves.values()), weight.to(out))
    return {"out": out.detach().double().cpu()} | {n: g.double().cpu() for n, g in zip(leaves, grads, strict=True)}


def on_device(given: dict) -> dict:
    return {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in given.items()}


def agrees(given: dict[str, torch.Tensor], dtype: torch.dtype, **options) -> None:
    """Within a few times the error of the definition in fp32; within 8 roundings of the dtype for 16 bits."""
    given = {key: x for key, x in given.items() if key != "bias"}
    given |= {key: given[key].to(dtype).float() for key in ("query", "key", "value")}
    keys = given["key"].shape[2]
    weight = torch.randn(*given["query"].shape[:3], given["value"].shape[-1]).to(dtype).float()
    exact = run("naive", {key: x.double() for key, x in given.items()}, weight, **options)
    rounded = run("naive", given, weight, **options)
    mixed = {key: x.to(dtype) if key in ("query", "key", "value") else x for key, x in given.items()}
    got = run("fused", on_device(mixed), weight.to(DEVICE), **on_device(options))
    # with one key a normalized weight is 1: its gradients are differences of roundings
    least = 0.05 if keys > 1 else 1.0
    for key, expected in exact.items():
        if dtype == torch.float32:
            # a GPU multiplies fp32 as three tf32 products
            tolerance = 3 * error(rounded[key], expected, least) + (1e-5 if interpreted() else 1e-4)
        else:
            tolerance = 8 * torch.finfo(dtype).eps
            # sums over all pairs, which cancel where Z depends on the weights
            tolerance *= 4 if options["normalization"] in ("sum", "l1", "l2") else 1
            tolerance *= 4 if key in ("alpha", "beta", "coefficients") else 1
        assert error(got[key], expected, least) < tolerance, key


def check(case: tuple, dtype: torch.dtype) -> None:
    normalization, phi, mask, shape = case
    batch, heads, _, queries, keys, _, _ = SHAPES[shape]
    options = {"normalization": normalization, "degree": degree_of(phi), **masking(mask, batch, heads, queries, keys)}
    agrees(inputs(phi, SHAPES[shape]), dtype, **options)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_fp32(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", HALF_CASES, ids=name)
def test_half(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", [CASES[4], CASES[1], ("l1", "s^3", "causal", "17x33")], ids=name)
def test_atomic_backward(case, monkeypatch):
    monkeypatch.setenv("HF_POLYATTN_FUSED_BACKWARD", "atomic")
    assert fused.adds_by_atomics()
    check(case, torch.float32)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_allow_no_atomics(monkeypatch):
    monkeypatch.setenv("HF_POLYATTN_FUSED_BACKWARD", "atomic")
    assert not fused.adds_by_atomics()


def test_two_backward_passes_give_the_same_bits():
    given = on_device({key: x for key, x in inputs("c^3", (1, 2, 1, 100, 130, 16, 16)).items() if key != "bias"})
    first, second = (run("fused", given, is_causal=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_table_is_whole():
    assert {case[0] for case in CASES} == set(NORMALIZATIONS)
    assert {case[1] for case in CASES} >= {f"s^{p}" for p in range(1, 7)} | {"a^2", "a^3", "c^2", "c^3"}
    assert {case[3] for case in CASES} == set(SHAPES)
    assert not any(refused(*case[:2]) for case in CASES)


@pytest.mark.parametrize("layout", ["heads", "strided", "expanded"])
def test_strides(layout):
    q, k, v = torch.randn(3, 1, 2, 33, 16)
    if layout == "heads":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "strided":
        q, k, v = (torch.randn(1, 2, 66, 32)[:, :, ::2, ::2] for _ in range(3))
    elif layout == "expanded":
        k, v = (x[:, :1].expand(1, 2, 33, 16) for x in (k, v))
    given = {"query": q, "key": k, "value": v}
    # moved without being made dense
    there = {key: x.to(DEVICE) for key, x in given.items()} if layout != "expanded" else on_device(given)
    exact, got = run("naive", given, degree=3, is_causal=True), run("fused", there, degree=3, is_causal=True)
    for key, expected in exact.items():
        assert error(got[key], expected) < (1e-5 if interpreted() else 1e-4)
    out = polynomial_attention(**there, degree=3, backend="fused")
    if layout == "heads":
        assert out.transpose(1, 2).is_contiguous()


def test_a_gain_that_is_learned_and_one_that_is_not():
    """One that is not is applied inside the kernels: in forward, decoding and backward."""
    for shape in ("17x33", "3"):
        given = inputs("s^3", SHAPES[shape])
        gain = given["gain"]
        tensors = {key: given[key] for key in ("query", "key", "value")}
        exact = run("naive", tensors, degree=3, gain=gain)
        for learned in (False, True):
            there = gain.clone().to(DEVICE).requires_grad_(learned)
            got = run("fused", on_device(tensors), degree=3, gain=there)
            for key, expected in exact.items():
                assert error(got[key], expected) < 1e-4, key


def test_masked_keys_may_hold_anything():
    q, k, v = torch.randn(3, 1, 1, 40, 8, device=DEVICE)
    keep = torch.ones(1, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    keep[..., 7] = keep[..., 33:] = False
    for rows in (40, 4):
        options = {"degree": 3, "keep": keep, "backend": "fused"}
        expected = polynomial_attention(q[:, :, :rows], k, v, **options)
        wild = k.clone()
        wild[:, :, 7] = torch.nan
        wild[:, :, 33:] = torch.inf
        assert torch.equal(polynomial_attention(q[:, :, :rows], wild, v, **options), expected)


def test_steps_with_a_cache_are_rows_of_the_whole():
    q, k, v = torch.randn(3, 1, 2, 40, 8, device=DEVICE)
    options = {"degree": 3, "is_causal": True, "sliding_window": 9, "normalization": "l1", "backend": "fused"}
    whole = polynomial_attention(q, k, v, **options)
    for first, last in ((39, 40), (20, 25)):
        step = polynomial_attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last], **options)
        torch.testing.assert_close(step, whole[:, :, first:last], rtol=1e-4, atol=1e-6)


def test_fp16_weights_beyond_its_range():
    """48^3 / sqrt(n) is beyond fp16; the output is not. Forward, decoding and gradients."""
    for rows in (2, 20):
        q = torch.full((1, 1, rows, 4), 24**0.5).half()
        v = 0.01 * torch.randn(1, 1, rows, 4).half()
        weight = torch.randn(1, 1, rows, 4) / 512
        given = {"query": q, "key": q.clone(), "value": v}
        exact = run("naive", {key: x.double() for key, x in given.items()}, weight, degree=3, gain=0.5)
        got = run("fused", on_device(given), weight.to(DEVICE), degree=3, gain=0.5)
        for key, expected in exact.items():
            assert error(got[key], expected) < 3e-3, key


def test_fp16_output_beyond_its_range_is_reported():
    q = torch.randn(1, 3, 4, 4, device=DEVICE).half()
    q[:, 1] = 30
    with pytest.raises(OverflowError, match=r"output .* in heads \[1\] exceeds float16's range of 65504"):
        polynomial_attention(q, q, q, degree=3, backend="fused")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_error_against_that_of_softmax(dtype):
    """Output and gradients; the budget is the error of torch's own softmax attention in the same dtype."""
    rounded = [x.to(dtype) for x in torch.randn(4, 1, 1, 96, 64)]

    def errors(function, device: str) -> torch.Tensor:
        results = []
        for kind, place in ((dtype, device), (torch.float64, "cpu")):
            leaves = [x.to(place, kind).requires_grad_() for x in rounded[:3]]
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, rounded[3].to(place, kind))])
        return torch.tensor([error(a.double().cpu(), b) for a, b in zip(*results, strict=True)])

    def cubic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        form = "naive" if q.dtype == torch.float64 else "fused"
        return polynomial_attention(q, k, v, degree=3, gain=frobenius_gain(3), is_causal=True, backend=form)

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    ours, theirs = errors(cubic, DEVICE), errors(softmax, DEVICE)
    # the interpreter cuts bf16 off where a GPU rounds to nearest: twice the error in each step
    factor = 4 if interpreted() and dtype == torch.bfloat16 else 1.5
    assert (ours < factor * theirs).all(), f"out, dq, dk, dv: {ours.tolist()}, softmax {theirs.tolist()}"


def test_checkpointing():
    q = torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True)
    coefficients = torch.rand(1, 4, device=DEVICE, requires_grad=True)

    def block(q: torch.Tensor) -> torch.Tensor:
        return polynomial_attention(q, q, q, coefficients=coefficients, backend="fused", normalization="length")

    plain = torch.autograd.grad(block(q).sum(), [q, coefficients])
    again = torch.autograd.grad(checkpoint(block, q, use_reentrant=False).sum(), [q, coefficients])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_second_derivative_is_refused_with_the_remedy():
    x = torch.randn(1, 1, 4, 4, device=DEVICE, requires_grad=True)
    out = polynomial_attention(x, x, x, degree=3, backend="fused")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='fused form .* no second derivative: use backend="naive"'):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    """Without a call before it, too: the graph takes the answer whether the form is there, and no more."""
    q = torch.randn(1, 20, 2, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    coefficients = torch.rand(2, 4, device=DEVICE, requires_grad=True)

    def f(q: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return polynomial_attention(q, q, q, coefficients=coefficients, is_causal=True, backend="fused").tanh()

    fused._problem.cache_clear()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(q, coefficients)
    expected = f(q, coefficients)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [q, coefficients]) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_are_not_traced_where_a_graph_breaks_around_the_call():
    q = torch.randn(1, 2, 17, 16, device=DEVICE)
    arguments = (q, q, q, None, None, 2, fused.NORMALIZATIONS["length"], 1.0, 0.25, False, 0, None, None)

    def broken(q: torch.Tensor) -> torch.Tensor:
        # what cannot be traced within a try leaves the whole function to Python, and what it calls to the compiler
        try:
            torch._dynamo.graph_break()
            return torch.ops.hf_polyattn.fused_forward(*arguments)[0]
        finally:
            pass

    assert torch.equal(torch.compile(broken, backend="eager")(q), broken(q))


def test_operators_are_registered_as_torch_wants_them():
    q = torch.randn(1, 2, 17, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True)
    coefficients, gain = torch.rand(2, 3, device=DEVICE, requires_grad=True), torch.rand(2, device=DEVICE)
    keep = torch.rand(1, 1, 17, 20, device=DEVICE) > 0.3
    code, lengths = fused.NORMALIZATIONS["l1"], torch.tensor([18], device=DEVICE)
    arguments = (q, k, k, coefficients, gain, 2, code, 1.0, 0.25, False, 0, lengths, keep)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_polyattn.fused_forward, arguments, test_utils=checks)


@pytest.mark.parametrize("mask", ["bool", "blocks", "no-rows", "left-padding", "all"])
def test_tile_lists(mask):
    """Each tile is listed as what it is, and once."""
    queries, keys, (rows, columns) = 70, 100, (32, 16)
    options = on_device(masking(mask, 2, 2, queries, keys))
    keep = options.pop("keep")
    keep = keep[(None,) * (4 - keep.ndim)]
    whole = build_keep((queries, keys), keep.device, keep=keep, **options).expand(2, 2, queries, keys).cpu()
    arguments = (options.get("is_causal", False), options.get("sliding_window", 0), options.get("key_lengths"), keep)
    for by_key in (False, True):
        lists, _ = Masks(2, queries, keys, *arguments).lists(Tile(rows, columns, 4, 1), by_key=by_key)
        lists = lists.cpu()
        for batch in range(2):
            for head in range(2):
                of_head = lists[min(batch, len(lists) - 1), min(head, lists.shape[1] - 1)]
                for block, (full, mixed, *order) in enumerate(of_head.tolist()):
                    for place, other in enumerate(order):
                        i, j = (other, block) if by_key else (block, other)
                        tile = whole[batch, head, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                        is_full = bool(tile.all()) and tile.numel() == rows * columns
                        assert is_full == (place < full)
                        assert bool(tile.any()) == (place < full + mixed)
                    assert sorted(order) == list(range(len(order)))


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("keys", [1, 64, 65, 5000])
def test_shares_cover_all_keys(keys, programs):
    shares, tiles = splits(programs, keys, 64, torch.device(DEVICE))
    assert (shares - 1) * tiles * 64 < keys <= shares * tiles * 64
    assert tiles >= 2
    assert shares == 1 or programs < 1000


def test_auto_takes_it_on_gpus_only():
    call = Call(device=DEVICE, dtypes=frozenset([torch.float16]), is_empty=False, is_polynomial=True)
    assert choose_form("auto", call) == ("tiled" if DEVICE == "cpu" else "fused")
    assert choose_form("fused", call) == "fused"
