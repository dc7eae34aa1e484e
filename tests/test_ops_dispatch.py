"""Which form computes a call."""

import csv
import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from hf_polyattn.config import BACKENDS
from hf_polyattn.ops import cpu, crossover, forms, fused, polynomial_attention
from hf_polyattn.ops.crossover import Lengths
from hf_polyattn.ops.forms import FORMS, Call, choose_form
from hf_polyattn.ops.masks import Masking

LONG = 2**20
CALL = Call(
    device="cpu",
    dtypes=frozenset([torch.float32]),
    is_empty=False,
    is_polynomial=True,
    masking=Masking((LONG, LONG), is_causal=True),
)


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
    assert choose_form("recurrent", CALL) == "recurrent"
    for name in ("recurrent", "cpu", "fused", "tiled"):
        with pytest.raises(ValueError, match="knows polynomials only"):
            choose_form(name, with_(is_polynomial=False))
    with pytest.raises(
        ValueError, match="must be \"auto\" or one of recurrent, cpu, fused, tiled, naive, got 'linear'"
    ):
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


@pytest.mark.parametrize("degree", [0, 17])
def test_degrees_that_the_compiled_form_does_not_know_are_left_to_others_by_auto(degree, has_kernel):
    reason = f"degrees 1 to 16, not {degree}"
    with pytest.raises(ValueError, match=f'backend="cpu" cannot compute this call: it knows {reason}'):
        choose_form("cpu", with_(degree=degree))
    assert choose_form("auto", with_(degree=degree)) == "tiled"


@pytest.fixture
def degree_1_only(monkeypatch):
    """A crossover of degree 1 that no measurement changes."""
    monkeypatch.setattr(crossover, "CROSSOVER", {(1, dim): Lengths(1000, 2000, 300, 400) for dim in (32, 64)})


def long(length: int, **changes: object) -> Call:
    masking = Masking((length, length), is_causal=changes.pop("is_causal", True), keep=changes.pop("keep", None))
    return with_(masking=masking, **{"degree": 1, **changes})


@pytest.mark.usefixtures("degree_1_only")
def test_auto_takes_the_recurrent_form_past_its_crossover_only(has_kernel):
    other = "cpu" if has_kernel else "tiled"
    for gradient, is_causal, threshold in (
        (False, True, 1000),
        (True, True, 2000),
        (False, False, 300),
        (True, False, 400),
    ):
        options = {"wants_gradient": gradient, "is_causal": is_causal}
        assert choose_form("auto", long(threshold, **options)) == "recurrent"
        assert choose_form("auto", long(threshold - 1, **options)) == other
    for unlike in (
        {"degree": 2},
        {"head_dim": 80},
        {"head_dim": 16},
        {"value_dim": 80},
        {"normalization": "l2"},
        {"dtypes": frozenset([torch.bfloat16])},
        {"keep": torch.rand(3000, 3000) > 0.5},
    ):
        assert choose_form("auto", long(3000, **unlike)) == other, unlike
    # new queries against a long cache: the sums would have to be built first
    assert choose_form("auto", dataclasses.replace(long(1), masking=Masking((1, 5000)))) == other
    assert choose_form("auto", long(3000, keep=torch.ones(3000, 3000, dtype=torch.bool).tril())) == "recurrent"
    assert choose_form("auto", long(3000, device="cuda")) == "tiled"


def test_the_crossover_is_the_measured_one():
    """Slower at no measured length from the table's on, and the table holds nothing that was not measured."""
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "recurrent_crossover.csv"
    slower, faster = {}, {}
    for row in csv.DictReader(path.read_text().splitlines()):
        cell = int(row["degree"]), int(row["head_dim"]), row["mask"] == "causal", "backward" in row["pass"]
        (faster if float(row["speed_ratio"]) > 1 else slower).setdefault(cell, []).append(int(row["length"]))
    assert {cell[:2] for cell in faster} == set(crossover.CROSSOVER)
    for cell, lengths in slower.items():
        assert max(lengths) < crossover.crossover(*cell) <= 1.2 * max(faster[cell]), cell


def test_compiled_graphs_build_nothing(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu, "_build", None)
    monkeypatch.setattr(cpu, "_load", lambda: pytest.fail("a build inside a graph"))
    assert choose_form("auto", CALL) == "naive"
    assert choose_form("tiled", CALL) == "naive"
    assert choose_form("auto", long(LONG)) == "naive"
    with pytest.raises(ValueError, match="not loaded before this graph was compiled"):
        choose_form("cpu", CALL)
    with pytest.raises(ValueError, match="its loop over chunks would be unrolled"):
        choose_form("recurrent", CALL)
    monkeypatch.setattr(cpu, "_build", cpu.Build("portable"))
    assert choose_form("auto", CALL) == "cpu"


def test_the_choice_is_logged(caplog):
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger=forms.__name__):
        polynomial_attention(x, x, x, degree=3)
    assert "form tiled" in caplog.text
