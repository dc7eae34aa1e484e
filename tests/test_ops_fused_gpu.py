"""The fused form on a GPU: the checks that run in the interpreter elsewhere, and the table of all forms.

    python -m pytest -n 8 tests/test_ops_fused_gpu.py

Kernels are compiled on the way, some seconds for each kind of call; later runs find them in Triton's cache.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from attention_cases import CASES, IDS, degree_of, inputs, masking
from attention_cases import SHAPES as ALL_SHAPES
from fused_checks import *  # noqa: F403  the tests themselves
from fused_checks import agrees

# several tiles of the sizes that are really used, every padded head_dim, a cache
LONG = {
    "300x700": (1, 2, 1, 300, 700, 40, 72),
    "257x1100": (2, 2, 1, 257, 1100, 16, 16),
    "1000x1000": (1, 4, 2, 1000, 1000, 64, 64),
    "500x500": (1, 3, 3, 500, 500, 128, 128),
    "150x133": (2, 4, 2, 150, 133, 256, 20),
    "1x5000": (2, 8, 2, 1, 5000, 128, 128),
    "8x3000": (2, 6, 1, 8, 3000, 64, 80),
}


@pytest.mark.parametrize(("normalization", "phi", "mask", "shape"), CASES, ids=IDS)
def test_the_table_of_all_forms(normalization, phi, mask, shape):
    batch, heads, _, queries, keys, _, _ = ALL_SHAPES[shape]
    options = {"normalization": normalization, "degree": degree_of(phi), **masking(mask, batch, heads, queries, keys)}
    agrees(inputs(phi, ALL_SHAPES[shape]), torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mask", ["full", "causal", "lengths", "causal-window", "bool", "blocks", "all"])
@pytest.mark.parametrize("shape", LONG)
def test_sizes_that_are_really_used(shape, mask, dtype):
    batch, heads, _, queries, keys, _, _ = LONG[shape]
    place = list(LONG).index(shape)
    phi, normalization = ("s^3", "c^3", "a^2", "c^4")[place % 4], ("length", "sqrt_length", "l1", "l2")[place % 4]
    options = {"normalization": normalization, "degree": degree_of(phi), **masking(mask, batch, heads, queries, keys)}
    agrees(inputs(phi, LONG[shape]), dtype, **options)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(1, 1, 40, 16, device="cuda:1", requires_grad=True)
    out = polynomial_attention(x, x, x, degree=3, backend="fused")  # noqa: F405
    out.sum().backward()
    torch.testing.assert_close(out, polynomial_attention(x, x, x, degree=3, backend="naive"))  # noqa: F405
