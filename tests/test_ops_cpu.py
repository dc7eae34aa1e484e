"""The compiled form against the definition in float64, how it is built, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, IDS, SHAPES, degree_of, error, inputs, masking, refused, run
from torch.utils.checkpoint import checkpoint

from hf_polyattn.ops import NORMALIZED, cpu, polynomial_attention

pytestmark = pytest.mark.skipif(cpu.build().problem is not None, reason=f"no compiled form: {cpu.build().problem}")

# the compiled strips, panels and blocks: 12 or 6 rows, 8 to 32 keys, 48 and 96 rows, 32, 96 and 256 keys
LONG = {
    "300x700": (1, 2, 1, 300, 700, 40, 72),
    "257x1100": (2, 2, 1, 257, 1100, 16, 16),
    "97x97": (1, 3, 3, 97, 97, 128, 128),
    "50x33": (2, 4, 2, 50, 33, 256, 20),
}


def agrees(given: dict[str, torch.Tensor], dtype: torch.dtype, tolerance: float, least: float, **options) -> None:
    given = {name: x for name, x in given.items() if name != "bias"}
    given |= {name: given[name].to(dtype).float() for name in ("query", "key", "value")}
    exact = run("naive", given, torch.float64, **options)
    mixed = {n: x.to(dtype) if n in ("query", "key", "value") else x for n, x in given.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in mixed.items()}
    out = polynomial_attention(**leaves, backend="cpu", **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out, list(leaves.values()), weight.to(out.dtype))
    assert out.dtype == dtype
    for name, got in [("out", out.detach()), *zip(leaves, grads, strict=True)]:
        # sums over all pairs, which cancel where Z depends on the weights
        cancels = dtype == torch.bfloat16 or options.get("normalization") in NORMALIZED
        slack = 10 if name in ("alpha", "beta", "coefficients") and cancels else 1
        assert error(got.double(), exact[name], least) < slack * tolerance, name


@pytest.mark.parametrize(("normalization", "phi", "mask", "shape"), CASES, ids=IDS)
def test_output_and_gradients(normalization, phi, mask, shape):
    batch, heads, _, queries, keys, _, _ = SHAPES[shape]
    options = {"normalization": normalization, "degree": degree_of(phi), **masking(mask, batch, heads, queries, keys)}
    # with one key a normalized weight is 1: its gradients are differences of roundings
    agrees(inputs(phi, SHAPES[shape]), torch.float32, 1e-4, 0.05 if keys > 1 else 1.0, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["length", "l1", "l2"])
@pytest.mark.parametrize("mask", ["full", "causal", "lengths", "causal-window", "bool", "blocks", "all"])
@pytest.mark.parametrize("shape", LONG)
def test_sizes_beyond_one_block(shape, mask, normalization, dtype):
    batch, heads, _, queries, keys, _, _ = LONG[shape]
    phi = ("s^3", "c^3", "a^2", "c^5")[list(LONG).index(shape)]
    options = {"normalization": normalization, "degree": degree_of(phi), **masking(mask, batch, heads, queries, keys)}
    # differences of roundings where Z depends on the weights
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2 if normalization == "length" else 1e-1
    agrees(inputs(phi, LONG[shape]), dtype, tolerance, 0.05, **options)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["full", "causal", "lengths", "causal-window", "bool", "left-padding"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_few_rows_against_a_long_cache(rows, mask, dtype, threads):
    """The decoding step: keys and values are read where they lie, and shared out when heads are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((2, 2, 1, rows, 1300, 64, 72), (1, 6, 2, rows, 600, 20, 7)):
            options = masking(mask, shape[0], shape[1], rows, shape[4])
            agrees(inputs("c^3", shape), dtype, 1e-4 if dtype == torch.float32 else 3e-2, 0.05, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_keys_are_shared_out_when_heads_are_few(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agrees(inputs("c^3", (1, 1, 1, 130, 1300, 16, 24)), torch.float32, 1e-4, 0.05, is_causal=True)
    finally:
        torch.set_num_threads(before)


def test_two_runs_give_the_same_bits():
    given = {name: x for name, x in inputs("c^3", (2, 4, 2, 200, 900, 32, 32)).items() if name != "bias"}
    first, second = (run("cpu", given, torch.float32, is_causal=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["rows", "heads", "strided", "expanded"])
def test_strides(layout):
    q, k, v = torch.randn(3, 2, 4, 40, 16)
    if layout == "heads":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "strided":
        q, k, v = (torch.randn(2, 4, 80, 32)[:, :, ::2, ::2] for _ in range(3))
    elif layout == "expanded":
        k, v = (x[:, :1].expand(2, 4, 40, 16) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for form in ("cpu", "naive"):
        out = polynomial_attention(*leaves, degree=3, is_causal=True, backend=form)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert error(got.double(), expected.double()) < 1e-5
    assert results[0][0].stride() == (q.transpose(1, 2) if layout == "heads" else q).contiguous().stride() or (
        layout == "heads" and results[0][0].transpose(1, 2).is_contiguous()
    )


def test_masked_keys_may_hold_anything():
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    keep = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    keep[..., 7] = keep[..., 33:] = False
    expected = polynomial_attention(q, k, v, degree=3, keep=keep, backend="cpu")
    k[:, :, 7] = torch.nan
    k[:, :, 33:] = torch.inf
    assert torch.equal(polynomial_attention(q, k, v, degree=3, keep=keep, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_may_be_large_where_gradients_are_wanted(dtype):
    """A power of their scores overflows, and 0 times infinity is no number."""
    q, k, v = torch.randn(3, 1, 2, 40, 16).to(dtype)
    keep = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    keep[..., 7] = keep[..., 33:] = False
    results = []
    for fill in (0.0, -1e9):
        leaves = [q.requires_grad_(), k.masked_fill(~keep[0, 0, 0, :, None], fill).requires_grad_()]
        leaves += [v.requires_grad_(), torch.rand(2, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()]
        out = polynomial_attention(*leaves[:3], coefficients=leaves[3], keep=keep, backend="cpu")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_checkpointing_and_double_use():
    q = torch.randn(1, 2, 50, 16, requires_grad=True)
    coefficients = torch.rand(2, 4, requires_grad=True)

    def twice(q: torch.Tensor, form: str) -> torch.Tensor:
        inner = polynomial_attention(q, q, q, coefficients=coefficients, backend=form, normalization="length")
        return polynomial_attention(inner, q, inner, coefficients=coefficients, backend=form, normalization="length")

    plain = torch.autograd.grad(twice(q, "cpu").sum(), [q, coefficients])
    again = torch.autograd.grad(checkpoint(twice, q, "cpu", use_reentrant=False).sum(), [q, coefficients])
    exact = torch.autograd.grad(twice(q, "naive").sum(), [q, coefficients])
    for a, b, c in zip(plain, again, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


def test_second_derivative_is_refused_with_the_remedy():
    x = torch.randn(1, 1, 30, 4, requires_grad=True)
    out = polynomial_attention(x, x, x, degree=3, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='the compiled form .* no second derivative: use backend="naive"'):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    q = torch.randn(2, 4, 64, 16).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    coefficients = torch.rand(4, 4, requires_grad=True)

    def f(q: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return polynomial_attention(q, q, q, coefficients=coefficients, is_causal=True).tanh()

    expected = f(q, coefficients)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(q, coefficients)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [q, coefficients]) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("learned", [False, True])
def test_operators_are_registered_as_torch_wants_them(learned):
    q = torch.randn(2, 4, 20, 16, requires_grad=True)
    k = torch.randn(2, 2, 30, 16, requires_grad=True)
    coefficients = torch.rand(4, 4, requires_grad=learned)
    keep = torch.rand(1, 1, 20, 30) > 0.3
    options = (coefficients, torch.rand(4), 3, cpu.NORMALIZATIONS["l1"], 1.0, 0.25, False, 0, torch.tensor([30, 9]))
    torch.library.opcheck(torch.ops.hf_polyattn.cpu_forward, (q, k, k, *options, keep))


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("no softcap", {"softcap": 2.0}),
        ("no dropout", {"dropout": 0.1}),
        ("no bias", {"bias": torch.zeros(1, 1, 1, 9)}),
    ],
)
def test_what_it_cannot_do_is_refused_by_name_and_left_to_others_by_auto(reason, options):
    x = torch.randn(1, 1, 9, 4)
    with pytest.raises(ValueError, match=f'backend="cpu" cannot compute this call: it has {reason}'):
        polynomial_attention(x, x, x, degree=2, backend="cpu", **options)
    assert polynomial_attention(x, x, x, degree=2, **options).isfinite().all()


def test_dtypes_that_it_does_not_know():
    x = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"knows torch.float32 and torch.bfloat16, not torch.float64"):
        polynomial_attention(x, x, x, degree=2, backend="cpu")


def test_bf16_error_is_no_more_than_that_of_softmax():
    """Output and gradients, against torch's own bf16 softmax attention on the same tensors."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        rounded = [x.bfloat16() for x in torch.randn(3, 1, 4, 256, 64)]
        grad = torch.randn(1, 4, 256, 64).bfloat16()

        def relative(function, rounded=rounded, grad=grad) -> torch.Tensor:
            results = []
            for dtype in (torch.bfloat16, torch.float64):
                leaves = [x.to(dtype).requires_grad_() for x in rounded]
                out = function(*leaves)
                results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
            got, exact = results
            return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(got, exact, strict=True)])

        ours = relative(
            lambda q, k, v: polynomial_attention(
                q, k, v, degree=3, is_causal=True, backend="cpu" if q.dtype == torch.bfloat16 else "naive"
            )
        )
        theirs = relative(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        ratios.append(ours / theirs)
    assert torch.stack(ratios).mean(0).max() < 1.25


# building


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(instruction_set):
    """The same tests in a process that is told to use another build."""
    if list(cpu.INSTRUCTION_SETS).index(instruction_set) > list(cpu.INSTRUCTION_SETS).index(cpu.instruction_set()):
        pytest.skip(f"this processor has no {instruction_set}")
    selected = "test_sizes_beyond_one_block or test_strides or masked_keys or (test_output_and_gradients and 63)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", __file__, "-k"]
    done = subprocess.run(
        [*command, selected],
        env={**os.environ, "HF_POLYATTN_CPU": instruction_set},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def in_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


REPORT = (
    "import torch\nfrom hf_polyattn.ops import NORMALIZED, cpu, polynomial_attention\nx = torch.randn(1, 1, 9, 4)\n"
)
REPORT += (
    "polynomial_attention(x, x, x, degree=3)\npolynomial_attention(x, x, x, degree=3)\nprint(cpu.build().problem)\n"
)


def test_switched_off_it_says_so_once_and_plain_torch_takes_over():
    said = in_process(REPORT, HF_POLYATTN_CPU="0")
    assert said.count("compiled CPU attention is not available, using plain torch") == 1
    assert "HF_POLYATTN_CPU=0 switches it off" in said


def test_a_wrong_name_is_named():
    assert "neither 0 nor one of portable, avx2" in in_process(REPORT, HF_POLYATTN_CPU="mmx")


def test_without_a_compiler_plain_torch_takes_over(tmp_path):
    said = in_process(
        REPORT, HF_POLYATTN_CACHE=str(tmp_path), CXX="/nowhere/g++", PATH=os.path.dirname(sys.executable)
    )
    assert said.count("compiled CPU attention is not available, using plain torch") == 1
    assert "g++" in said
    assert not list(tmp_path.glob("*.so"))


def test_a_build_that_is_there_is_loaded_without_a_compiler(tmp_path):
    library = cpu._library(cpu.instruction_set())
    (tmp_path / library.name).write_bytes(library.read_bytes())
    assert in_process(REPORT, HF_POLYATTN_CACHE=str(tmp_path), CXX="/nowhere/g++").strip() == "None"


def test_normalizations_that_are_refused_stay_refused():
    assert refused("sum", "s^3")
    x = torch.randn(1, 1, 9, 4)
    with pytest.raises(ValueError, match="even degree"):
        polynomial_attention(x, x, x, degree=3, normalization="sum", backend="cpu")
