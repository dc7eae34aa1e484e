"""Which form computes a call."""

import dataclasses
import logging

import pytest
import torch

from hf_polyattn.config import BACKENDS
from hf_polyattn.ops import cpu, forms, fused, polynomial_attention
from hf_polyattn.ops.forms import FORMS, Call, choose_form

CALL = Call(device="cpu", dtypes=frozenset([torch.float32]), is_empty=False, is_polynomial=True)


@pytest.fixture(params=[True, False], ids=["compiled", "without compiler"])
def has_kernel(request, monkeypatch):
    monkeypatch.setattr(cpu, "_build", cpu.Build("portable", None if request.param else "no compiler"))
    return request.param


@pytest.fixture(params=[None, "no GPU"], ids=["with GPU", "without GPU"])
def gpu_problem(request, monkeypatch):
    monkeypatch.setattr(fused, "problem", lambda device: request.param if device == "cuda" else "not a GPU")
    return request.param


def with_(**changes: object) -> Call:
    return dataclasses.replace(CALL, **changes)


def test_names_are_those_of_the_configuration():
    assert ("auto", *FORMS) == BACKENDS


def test_auto(has_kernel, gpu_problem):
    fastest = "cpu" if has_kernel else "tiled"
    assert choose_form("auto", CALL) == fastest
    assert choose_form("auto", with_(dtypes=frozenset([torch.bfloat16]))) == fastest
    for other in (
        with_(is_empty=True),
        with_(extras=("dropout",)),
        with_(device="mps"),
        with_(dtypes=frozenset([torch.float64])),
        with_(dtypes=frozenset([torch.float32, torch.bfloat16])),
    ):
        assert choose_form("auto", other) == "tiled"
    on_gpu = "tiled" if gpu_problem else "fused"
    assert choose_form("auto", with_(device="cuda")) == on_gpu
    assert choose_form("auto", with_(device="cuda", dtypes=frozenset([torch.float16]))) == on_gpu
    assert choose_form("auto", with_(is_polynomial=False)) == "naive"
    assert choose_form("auto", with_(return_weights=True)) == "naive"


def test_by_name(has_kernel):
    assert choose_form("naive", CALL) == "naive"
    assert choose_form("tiled", CALL) == "tiled"
    assert choose_form("tiled", with_(return_weights=True)) == "naive"
    if has_kernel:
        assert choose_form("cpu", CALL) == "cpu"
    else:
        with pytest.raises(
            ValueError, match='backend="cpu" cannot compute this call: no compiler; use backend="auto"'
        ):
            choose_form("cpu", CALL)
    with pytest.raises(ValueError, match="runs on CPUs, not on cuda"):
        choose_form("cpu", with_(device="cuda"))
    for name in ("cpu", "fused", "tiled"):
        with pytest.raises(ValueError, match="knows polynomials only"):
            choose_form(name, with_(is_polynomial=False))
    with pytest.raises(ValueError, match="must be \"auto\" or one of cpu, fused, tiled, naive, got 'linear'"):
        choose_form("linear", CALL)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no dropout, bias", {"extras": ("dropout", "bias")}),
        ("a dimension is 0", {"is_empty": True}),
        ("degrees up to 16, not 17", {"degree": 17}),
        ("head_dim up to 256, not 257", {"head_dim": 257}),
        ("not torch.float64", {"dtypes": frozenset([torch.float64])}),
        ("not torch.bfloat16, torch.float32", {"dtypes": frozenset([torch.float32, torch.bfloat16])}),
    ],
)
def test_what_the_fused_form_cannot_do_is_refused_by_name_and_left_to_others_by_auto(reason, changes, monkeypatch):
    monkeypatch.setattr(fused, "problem", lambda device: None)
    call = with_(device="cuda", **changes)
    with pytest.raises(ValueError, match=f'backend="fused" cannot compute this call: .*{reason}'):
        choose_form("fused", call)
    assert choose_form("auto", call) == "tiled"


def test_compiled_graphs_build_nothing(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu, "_build", None)
    monkeypatch.setattr(cpu, "_load", lambda: pytest.fail("a build inside a graph"))
    assert choose_form("auto", CALL) == "naive"
    assert choose_form("tiled", CALL) == "naive"
    with pytest.raises(ValueError, match="not loaded before this graph was compiled"):
        choose_form("cpu", CALL)
    monkeypatch.setattr(cpu, "_build", cpu.Build("portable"))
    assert choose_form("auto", CALL) == "cpu"


def test_the_choice_is_logged(caplog):
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger=forms.__name__):
        polynomial_attention(x, x, x, degree=3)
    assert "form tiled" in caplog.text
