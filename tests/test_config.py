"""PolyAttentionConfig and the registry of activations: validation, defaults, JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyattn import PolyAttentionConfig, activations
from hf_polyattn.activations import (
    change_config,
    default_start,
    frobenius_gain,
    get_activation,
    register_activation,
    resolve_config,
    start_gain,
)
from hf_polyattn.config import BACKENDS, MAX_DEGREE, NORMALIZATIONS

NUMBERS = st.floats(-1e6, 1e6)
NONZERO = NUMBERS.filter(bool)
INDICES = st.lists(st.integers(0, 100), min_size=1, max_size=5, unique=True)


@st.composite
def configs(draw):
    degree = draw(st.integers(1, MAX_DEGREE))
    numbers = st.lists(NUMBERS, min_size=degree + 1, max_size=degree + 1)
    coefficients = draw(st.one_of(st.just("learnable"), st.just("monomial"), numbers))
    return PolyAttentionConfig(
        activation=draw(st.sampled_from(["poly", "monomial", "relu", "my own"])),
        degree=degree,
        coefficients=coefficients,
        init_coefficients=draw(st.none() | numbers) if coefficients == "learnable" else None,
        normalization=draw(st.sampled_from(NORMALIZATIONS) | st.floats(1e-3, 1e6) | st.integers(1, 1000)),
        alpha=draw(st.just("auto") | NONZERO),
        beta=draw(NUMBERS),
        gain=draw(st.just("auto") | NONZERO),
        learn_gain=draw(st.booleans()),
        learn_affine=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        layers=draw(st.none() | INDICES),
        heads=draw(st.none() | st.dictionaries(st.integers(0, 50), INDICES, min_size=1, max_size=3)),
        backend=draw(st.sampled_from(BACKENDS)),
    )


@settings(max_examples=200, deadline=None)
@given(configs())
def test_json_gives_an_equal_config_back(config):
    assert PolyAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_is_documented_where_it_is_declared():
    source = __import__("inspect").getsource(PolyAttentionConfig)
    lines = source.splitlines()
    for field in dataclasses.fields(PolyAttentionConfig):
        (line,) = (i for i, text in enumerate(lines) if text.startswith(f"    {field.name}:"))
        assert lines[line + 1].strip().startswith('"""'), field.name


@settings(max_examples=50, deadline=None)
@given(configs())
def test_equal_configs_have_equal_hashes(config):
    again = PolyAttentionConfig.from_dict(config.to_dict())
    assert hash(config) == hash(again)
    assert {config: 1}[again] == 1


def test_hashes_see_the_heads():
    assert len({PolyAttentionConfig(heads=heads) for heads in (None, {0: [1]}, {0: [2]}, {1: [1]}, {"0": [1]})}) == 4


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolyAttentionConfig().degree = 5


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("degree", [0, -1, MAX_DEGREE + 1, 2.0, "3", True], "degree must be an integer from 1 to 16"),
        ("activation", ["", None, 3], "activation must be the name of a registered activation"),
        ("coefficients", ["learned", ""], "coefficients must be one of"),
        ("coefficients", [(1.0, 2.0), range(9)], "degree 3 needs 4 coefficients"),
        ("coefficients", [(0, 1, 0, math.nan), (0, 1, 0, math.inf)], "coefficients must be finite"),
        ("init_coefficients", [(1.0,)], "degree 3 needs 4 init_coefficients"),
        ("normalization", ["sqrt", "L1", " "], "normalization must be one of"),
        ("normalization", [0, -1.0, math.inf, math.nan, None, True], "must be a positive number"),
        ("alpha", [0, math.nan, math.inf, "automatic", None, True], 'alpha must be "auto" or a finite number'),
        ("gain", [0, math.nan, "measured"], 'gain must be "auto" or a finite number'),
        ("beta", [math.nan, math.inf, "0", None], "beta must be a finite number"),
        ("backend", ["triton", None], "backend must be one of"),
        ("layers", [[]], "layers is empty"),
        ("layers", [[0, 0]], "repeated entries"),
        ("layers", [[0.5], ["0"], [True]], "layers must be integers"),
        ("heads", [{}, [0, 1]], "heads must map layer indices to head indices"),
        ("heads", [{0: []}], "heads is empty for layers"),
        ("heads", [{0: [1, 1]}], r"heads\[0\] has repeated entries"),
        ("learn_gain", ["yes", 1, None], "learn_gain must be True or False"),
        ("learn_affine", ["false"], "learn_affine must be True or False"),
        ("qk_norm", [0], "qk_norm must be True or False"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            PolyAttentionConfig(**{field: value})


def test_starting_coefficients_need_learnable_ones():
    with pytest.raises(ValueError, match='needs coefficients="learnable"'):
        PolyAttentionConfig(coefficients="monomial", init_coefficients=(0, 1, 0, 1))


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown polyattn fields \['colour', 'sharpness'\].*Upgrade"):
        PolyAttentionConfig.from_dict({"sharpness": 1, "degree": 3, "colour": 2})


def test_sequences_become_tuples_and_keys_become_numbers():
    config = PolyAttentionConfig(coefficients=[0, 1, 0, 2], layers=[3, 1], heads={"1": [2, 0]}, normalization=14)
    assert config.coefficients == (0.0, 1.0, 0.0, 2.0)
    assert config.layers == (1, 3)
    assert config.heads == {1: (0, 2)}
    assert config.normalization == 14.0


# the registry


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("poly", {"coefficients": "learnable", "degree": 3, "alpha": "auto", "normalization": "l1"}),
        ("monomial", {"coefficients": "monomial", "normalization": "sqrt_length", "alpha": 1.0, "gain": 1.0}),
        ("softmax", {"normalization": "sum", "alpha": 1.0, "gain": 1.0}),
        ("relu", {"normalization": "length", "alpha": 1.0, "gain": 1.0}),
        ("sigmoid", {"normalization": "none", "alpha": 1.0, "gain": 1.0}),
    ],
)
def test_defaults_of_the_activations(activation, expected):
    config = resolve_config(activation)
    assert config.activation == activation
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "new", "calibrated"),
    [
        ({}, "l1", "length"),
        ({"degree": 4}, "l1", "length"),
        ({"degree": 2}, "length", "length"),
        ({"degree": 1}, "length", "length"),
        ({"init_coefficients": (0, 1, 0, 1)}, "l1", "length"),
        ({"coefficients": (0, 1, 0, 1)}, "length", "length"),
        ({"coefficients": "monomial"}, "sqrt_length", "sqrt_length"),
        ({"normalization": "l2"}, "l2", "l2"),
    ],
    ids=str,
)
def test_default_normalization_of_a_polynomial(options, new, calibrated):
    assert PolyAttentionConfig(**{"degree": 3, **options}).normalization == new
    assert resolve_config("poly", **options).normalization == new
    assert resolve_config("poly", calibrated=True, **options).normalization == calibrated


@pytest.mark.parametrize("calibrated", [False, True])
def test_default_normalization_of_what_is_registered(monkeypatch, calibrated):
    monkeypatch.setattr(activations, "_REGISTRY", dict(activations._REGISTRY))
    register_activation("silu", lambda scores, lengths: scores)
    register_activation("quintic", defaults={"degree": 5})
    register_activation("l2 quintic", defaults={"degree": 5, "normalization": "l2"})
    assert resolve_config("silu", calibrated=calibrated).normalization == "length"
    assert resolve_config("quintic", calibrated=calibrated).normalization == ("length" if calibrated else "l1")
    assert resolve_config("l2 quintic", calibrated=calibrated).normalization == "l2"


def test_a_config_has_the_name_of_its_default_normalization():
    assert PolyAttentionConfig(normalization="") == PolyAttentionConfig()
    assert PolyAttentionConfig().to_dict()["normalization"] == "l1"
    # what was saved with a name stays what it is
    assert PolyAttentionConfig.from_dict({"normalization": "length"}).normalization == "length"
    assert change_config(PolyAttentionConfig(), degree=2).normalization == "l1"


def test_options_win_over_the_defaults_of_an_activation():
    config = resolve_config("monomial", normalization="l2", gain=2.0, degree=5)
    assert (config.normalization, config.gain, config.degree) == ("l2", 2.0, 5)


def test_number_of_coefficients_sets_the_degree():
    assert resolve_config("poly", coefficients=(0, 1, 2)).degree == 2
    with pytest.raises(ValueError, match="degree 3 needs 4 coefficients"):
        resolve_config("poly", coefficients=(0, 1, 2), degree=3)


def test_a_changed_config_keeps_what_was_not_named():
    config = resolve_config("poly", init_coefficients=(0, 1, 0, 1), normalization="l1", heads={0: [1]})
    assert change_config(config, backend="naive") == resolve_config(
        "poly", init_coefficients=(0, 1, 0, 1), normalization="l1", heads={0: [1]}, backend="naive"
    )
    assert change_config(config, degree=5).init_coefficients is None
    assert change_config(config, coefficients=(0, 1)).degree == 1
    with pytest.raises(ValueError, match="degree 5 needs 6 coefficients, got 2"):
        change_config(change_config(config, coefficients=(0, 1)), degree=5)


def test_activations_without_coefficients_refuse_them():
    with pytest.raises(ValueError, match="has no coefficients"):
        resolve_config("relu", coefficients=(0, 1))


@pytest.mark.parametrize(
    "coefficients",
    [
        "monomial",
        (0.0, 0.0, 1.0),
        (0.3, 0.0, 2.0),
        (1.0, 0.2, 1.0),
        [math.comb(4, k) / 4**k for k in range(5)],
        [math.comb(4, k) / 3**k for k in range(5)],
        [round(math.comb(8, k) / 3**k, 9) for k in range(9)],
        # x^2 (x - 1)^2 touches 0 twice
        (0.0, 0.0, 1.0, -2.0, 1.0),
        (1.0, 0.0, 0.0),
    ],
)
def test_sums_are_for_polynomials_that_are_nowhere_negative(coefficients):
    degree = 2 if coefficients == "monomial" else len(coefficients) - 1
    resolve_config("poly", coefficients=coefficients, degree=degree, normalization="sum")


@pytest.mark.parametrize(
    ("coefficients", "degree", "why"),
    [
        ("learnable", 2, "learnable coefficients may take any sign"),
        ("learnable", 3, "learnable"),
        ("monomial", 3, "degree 3 is odd"),
        ((0.0, 1.0, 0.29), 2, "falls below 0"),
        ((0.0, 0.0, 0.0, 1.0), 3, "falls below 0"),
        ((0.0, 0.0, -1.0), 2, "falls below 0"),
        ((1.0, 0.0, -3.0, 0.0, 1.0), 4, "falls below 0"),
        ((-0.01, 0.0, 1.0), 2, "falls below 0"),
        ((0.0, 0.0, 0.0), 2, "falls below 0"),
    ],
)
def test_sums_that_could_be_zero_are_refused(coefficients, degree, why):
    with pytest.raises(ValueError, match=f'"sum" needs weights of one sign, and .*{why}.* Use "l1" or "l2"'):
        resolve_config("poly", coefficients=coefficients, degree=degree, normalization="sum")


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="degre"):
        resolve_config("poly", degre=3)
    with pytest.raises(ValueError, match="unknown activation 'cubic'; registered: monomial, poly"):
        resolve_config("cubic")


def test_registering_twice_needs_consent():
    with pytest.raises(ValueError, match="already registered; pass exist_ok=True"):
        register_activation("poly")
    entry = get_activation("poly")
    assert entry.is_polynomial
    assert register_activation("poly", exist_ok=True) == entry


def test_powers_take_the_normalization_of_the_paper():
    assert resolve_config("poly", coefficients="monomial").normalization == "sqrt_length"
    assert resolve_config("poly", coefficients="monomial", normalization="l2").normalization == "l2"
    assert resolve_config("poly", coefficients=(0, 1, 2)).normalization == "length"


def test_default_start_is_the_gaussian_least_squares_fit_of_exp():
    """Against the normal equations on quadrature points, and the forms that the docstring names."""
    points, weight = np.polynomial.hermite_e.hermegauss(60)
    for degree in range(1, 9):
        powers = np.vander(points, degree + 1, increasing=True) * np.sqrt(weight)[:, None]
        best = np.linalg.lstsq(powers, np.exp(points - 0.5) * np.sqrt(weight), rcond=None)[0]
        assert default_start(degree) == pytest.approx(best, abs=1e-8)
        values = np.polynomial.polynomial.polyval(points, default_start(degree))
        assert (values * weight).sum() / weight.sum() == pytest.approx(1)
        assert start_gain(degree) ** -2 == pytest.approx((values**2 * weight).sum() / weight.sum())
    s = np.linspace(-4, 4, 9)
    assert np.polynomial.polynomial.polyval(s, default_start(3)) == pytest.approx((2 + (1 + s) ** 3) / 6)
    assert np.polynomial.polynomial.polyval(s, default_start(2)) == pytest.approx((1 + s) ** 2 / 2)


def test_gain_of_the_frobenius_norm():
    """E s^(2p) = (2p - 1)!! for unit Gaussian scores as it is tabled."""
    assert [round(frobenius_gain(p), 3) for p in (1, 2, 3, 4)] == [1.0, 0.577, 0.258, 0.098]
