"""The fused form without a GPU: `fused_checks.py` in Triton's interpreter, compilation for GPUs, and its absence.

What this leaves open: the interpreter multiplies bf16 and tf32 as fp32, launches programs one after the other and
knows neither shared memory nor pipelines. `test_ops_fused_gpu.py` runs the same checks where there is a GPU.
"""

import ast
import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_polyattn.ops import fused, fused_launch

ROOT = Path(__file__).parents[1]
CHECKS = Path(__file__).with_name("fused_checks.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton (Linux only)"
)


def in_process(*words: str, **environment: str) -> str:
    """What a fresh Python says; it must succeed."""
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


CHECK_NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
# two processes of about equal length, for two processors
PARTS = {"fp32": ["test_fp32"], "others": [name for name in CHECK_NAMES if name != "test_fp32"]}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part):
    """In a process of its own: Triton decides on import whether it interprets."""
    words = ["-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    # without numpy's threads for products of small tiles
    said = in_process(
        *words, *(f"{CHECKS}::{name}" for name in PARTS[part]), TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
    )
    # it ends with 5, and not 0, where it finds nothing to test
    assert "[100%]" in said
    assert "skipped" not in said


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "head_dims"), [(90, (64, 128)), (80, (64, 128))])
def test_kernels_compile_without_spilling(architecture, head_dims, tmp_path):
    """As they are launched, for a causal call in bf16 with coefficients; needs no GPU."""
    words = ["benchmarks/fused_registers.py", "--architectures", str(architecture), "--no_decode"]
    sizes = ["--head_dims", *map(str, head_dims), "--out", str(tmp_path / "out.csv")]
    in_process(*words, *sizes, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()[1:]))
    assert len(rows) == 3 * len(head_dims)
    for row in rows:
        assert int(row["spilled_bytes"]) == 0, row
        # 163 KiB is what a program may have on an A100; more recent ones have more
        assert int(row["shared_bytes"]) <= 163 * 1024, row
        assert 32 < int(row["registers"]) <= 255, row


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_call_has_a_configuration(architecture, bits):
    for width in (16, 32, 64, 128, 256):
        tiles = fused_launch.launch(architecture, width, bits)
        for tile in tiles:
            assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.rows, tile.keys)), tile


# absence

USE = """
import logging, sys, torch
torch.cuda.is_available = lambda: False
from hf_polyattn.doctor import report
from hf_polyattn.ops import polynomial_attention
x = torch.randn(1, 1, 9, 4, requires_grad=True)
polynomial_attention(x, x, x, degree=3).sum().backward()
try:
    polynomial_attention(x, x, x, degree=3, backend="fused")
except ValueError as error:
    print(error)
print(report())
"""


def test_without_a_gpu_triton_is_never_imported():
    """Nor any module that needs it; Transformers imports Triton itself, so blocked it must change nothing here."""
    code = "import transformers, sys; sys.modules['triton'] = None" + USE
    code += "print([name for name in sys.modules if 'fused_' in name])"
    said = in_process("-c", code, TRITON_INTERPRET="0", HF_POLYATTN_CPU="0")
    assert said.splitlines()[-1] == "['hf_polyattn.ops.fused_launch', 'hf_polyattn.ops.fused_masks']"
    assert 'backend="fused" cannot compute this call: it runs on GPUs; on a CPU only in Triton\'s interpreter' in said
    assert re.search(r"^fused +no +torch sees no GPU", said, re.MULTILINE)


def test_where_triton_is_missing_all_else_works():
    """Where it would be imported, the reason is told and not raised."""
    code = "import sys; sys.modules['triton'] = None; from hf_polyattn.ops import fused; print(fused.problem('cpu'))"
    assert "triton" in in_process("-c", code, TRITON_INTERPRET="1")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is said to be there."""
    fused._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    yield
    fused._problem.cache_clear()


def test_old_gpus_are_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    assert fused.problem("cuda") == "it needs compute capability 8.0, this GPU has 7.5"


def test_whatever_fails_in_the_trial_is_a_reason_and_said_once(gpu, monkeypatch, caplog):
    def fail(device: str) -> None:
        raise OSError("no compiler for the launcher\nlong story")

    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.7.1", raising=False)
    monkeypatch.setattr(fused, "_try", fail)
    assert fused.problem("cuda") == fused.problem("cuda") == "no compiler for the launcher"
    assert caplog.text.count("fused attention is not available, using plain torch: no compiler for the launcher") == 1


def test_old_versions_of_triton_are_refused(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.2.0", raising=False)
    assert fused.problem("cuda") == "it was tested with Triton 3.7 and newer, not 3.2.0"


def test_other_devices_are_refused():
    assert fused.problem("mps") == "it runs on CUDA devices, not on mps"
