"""The private mode: one polynomial and one number, a graph of additions and multiplications, and its depth."""

import copy

import pytest
import torch
from models import LAYERS, batch_for, output, padded_batches, patched_tiny, same_bits, tiny, token_ids
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_polyattn import patch_model
from hf_polyattn.models import read_settings, states
from hf_polyattn.ops import polynomial_phi
from hf_polyattn.ops.naive import naive_attention
from hf_polyattn.private import (
    Depth,
    PrivateAttention,
    check_graph,
    computing_privately,
    depth_of,
    export_attention,
    make_private,
    operations,
    private_report,
)
from hf_polyattn.private.fold import fold
from hf_polyattn.private.report import depth_of_scheme
from hf_polyattn.state import softmax_attention

SCHEMES = ("horner", "even_odd", "monic")
HEADS, LENGTH, SIZE = 4, 6, 8


def tensors(heads=HEADS, key_heads=HEADS):
    """Query, key and value in float64, and a mask that leaves the last two keys of the first sequence out."""
    query, key, value = (torch.randn(2, n, LENGTH, SIZE).double() for n in (heads, key_heads, key_heads))
    mask = torch.ones(2, LENGTH).double()
    mask[0, -2:] = 0
    return query, key, value, mask


def encoder(auto=AutoModel, **poly):
    """A BERT of degree 2 whose numbers all differ from their defaults, in float64."""
    return patched_tiny("bert", auto, poly={"degree": 2, **poly})


def program_of(module: nn.Module, *example):
    return torch.export.export(module, example or tensors(), strict=False)


# the operation


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_operation_is_the_definition(scheme, degree, key_heads):
    query, key, value, mask = tensors(key_heads=key_heads)
    coefficients = torch.randn(HEADS, degree + 1).double()
    gain, alpha, beta = torch.randn(3, HEADS).double()
    expected, _ = naive_attention(
        query,
        key,
        value,
        polynomial_phi(degree, coefficients),
        keep=mask[:, None, None].bool(),
        normalization=5.0,
        scaling=0.3,
        gain=gain,
        alpha=alpha,
        beta=beta,
    )
    model = encoder(degree=degree, normalization=5.0)
    state = next(iter(states(model).values()))
    with torch.no_grad():
        for name, tensor in (("gain", gain), ("alpha", alpha), ("beta", beta), ("coefficients", coefficients)):
            getattr(state, name).copy_(tensor)
    given = PrivateAttention(fold(state, 0.3), 5.0, scheme)(query, key, value, mask)
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


def test_a_mask_that_carries_one_over_the_length_gives_each_row_its_own_denominator():
    query, key, value, mask = tensors()
    coefficients = torch.randn(HEADS, 3).double()
    options = {"keep": mask[:, None, None].bool(), "normalization": "length", "scaling": 1.0}
    expected, _ = naive_attention(query, key, value, polynomial_phi(2, coefficients), **options)
    given = PrivateAttention(coefficients, 1.0)(query, key, value, mask / mask.sum(1, keepdim=True))
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


def test_what_the_operation_refuses():
    with pytest.raises(ValueError, match="scheme must be one of"):
        PrivateAttention(torch.ones(1, 3), 2.0, "fast")
    with pytest.raises(ValueError, match=r"heads \[1\] are 0"):
        PrivateAttention(torch.tensor([[1.0, 1, 1], [1, 1, 0]]), 2.0, "monic")


# the graph


class Attention(nn.Module):
    """The definition under some options, to be exported."""

    def __init__(self, degree=2, **options):
        super().__init__()
        self.phi, self.options = polynomial_phi(degree, None), {"normalization": 5.0, "scaling": 0.3, **options}

    def forward(self, query, key, value, mask):
        keep = mask[:, None, None] > 0 if self.options.get("masked") else torch.ones(LENGTH, dtype=torch.bool)
        options = {name: value for name, value in self.options.items() if name != "masked"}
        return naive_attention(query, key, value, self.phi, keep=keep, **options)[0]


class Softmax(nn.Module):
    def forward(self, query, key, value, mask):
        options = {"keep": None, "bias": None, "is_causal": False, "scaling": 0.3, "dropout": 0.0}
        return softmax_attention(query, key, value, **options)[0]


class Written(nn.Module):
    """Softmax without a name of its own."""

    def forward(self, query, key, value, mask):
        scores = query @ key.transpose(-1, -2)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ value


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_graph_has_additions_and_multiplications_only(degree, scheme):
    program = program_of(PrivateAttention(torch.randn(HEADS, degree + 1).double(), 5.0, scheme))
    assert check_graph(program) == operations(program)
    arithmetic = set(operations(program)) - {"transpose", "unsqueeze", "unbind", "getitem"}
    assert arithmetic == {"matmul", "mul", "add"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Softmax(), ["scaled_dot_product_attention"]),
        (Written(), ["amax", "exp", "div"]),
        (Attention(normalization="l1"), ["abs", "div"]),
        (Attention(normalization="l2"), ["sqrt", "div"]),
        (Attention(normalization="length"), ["div"]),
        (Attention(masked=True), ["gt", "masked_fill"]),
        (Attention(softcap=3.0), ["tanh"]),
        (Function(lambda q, k, v, m: torch.where(m > 0, m, 0.0)), ["gt", "where"]),
        (Function(lambda q, k, v, m: q.clamp(-1, 1)), ["clamp"]),
        (Function(lambda q, k, v, m: q.relu()), ["relu"]),
        (Function(lambda q, k, v, m: q**0.5), ["pow"]),
        (Function(lambda q, k, v, m: q**-1), ["pow"]),
        (Function(lambda q, k, v, m: torch.maximum(q, k)), ["maximum"]),
    ],
    ids=lambda x: x.__class__.__name__ if isinstance(x, nn.Module) else "-".join(x),
)
def test_everything_else_is_found(module, names):
    with pytest.raises(ValueError, match="additions and multiplications only") as caught:
        check_graph(program_of(module))
    found = str(caught.value)
    assert all(f"{name} (" in found or f"{name};" in found or f"{name}." in found for name in names), found
    assert "make_private" in found


def test_refusal_shows_the_line_of_source():
    with pytest.raises(ValueError, match=r"exp \(weights = .*amax.*\.exp\(\)\)"):
        check_graph(program_of(Written()))


# depth, by hand


@pytest.mark.parametrize(
    ("function", "products", "levels"),
    [
        (lambda q, k, v, m: q + k - v, 0, 0),
        (lambda q, k, v, m: q * 3.0, 0, 1),
        (lambda q, k, v, m: q * q, 1, 1),
        (lambda q, k, v, m: q**3 + q, 2, 2),
        (lambda q, k, v, m: (q * k) * (k * v), 2, 2),
        (lambda q, k, v, m: ((q * k) * k) * v, 3, 3),
        (lambda q, k, v, m: (q * 2.0) * k + v, 1, 2),
        # the longest in products and the longest in levels are two paths
        (lambda q, k, v, m: q * k + ((v * 2.0) * 2.0) * 2.0, 1, 3),
        (lambda q, k, v, m: q * m[:, None, :, None], 0, 1),
        (lambda q, k, v, m: m * m, 0, 0),
        (lambda q, k, v, m: torch.stack([q, k * k]).sum(0), 1, 1),
    ],
)
def test_depth_is_the_longest_path(function, products, levels):
    assert depth_of(program_of(Function(function)), public=["args_3"]) == Depth(products, levels)


def test_depth_of_a_mask_that_is_encrypted():
    program = program_of(Function(lambda q, k, v, m: q * m[:, None, :, None]))
    assert depth_of(program) == Depth(1, 1)
    with pytest.raises(ValueError, match="public names"):
        depth_of(program, public=["mask"])
    with pytest.raises(ValueError, match="relu"):
        depth_of(program_of(Function(lambda q, k, v, m: q.relu())))


@pytest.mark.parametrize(
    ("degree", "horner", "even_odd", "monic"),
    # products of ciphertexts and levels: q . k and P v are two of each
    [
        (1, (2, 3), (2, 3), (2, 2)),
        (2, (3, 4), (3, 4), (3, 3)),
        (3, (4, 5), (4, 5), (4, 4)),
        (4, (5, 6), (4, 5), (5, 5)),
        (8, (9, 10), (6, 7), (9, 9)),
    ],
)
def test_depth_by_scheme(degree, horner, even_odd, monic):
    for scheme, expected in zip(SCHEMES, (horner, even_odd, monic), strict=True):
        assert depth_of_scheme(degree, scheme)[0] == Depth(*expected), scheme
        program = program_of(PrivateAttention(torch.ones(HEADS, degree + 1).double(), 2.0, scheme))
        assert depth_of(program, public=["mask"]) == Depth(*expected)
        if degree > 1:
            # a mask that is encrypted too costs a product beside the scores, and no depth
            assert depth_of(program) == Depth(*expected)


# the mode


@pytest.mark.parametrize(
    "poly", [{}, {"activation": "monomial"}, {"learn_affine": True}], ids=["poly", "monomial", "affine"]
)
@pytest.mark.parametrize(
    ("normalization", "options", "expected"),
    [("length", {"length": 9}, 9.0), ("sqrt_length", {"length": 9}, 3.0), (7, {}, 7.0), ("none", {}, "none")],
)
def test_private_model_computes_what_it_did_and_has_plain_numbers(normalization, options, expected, poly):
    model = encoder(AutoModelForMaskedLM, normalization=normalization, **poly)
    before = output(model)
    assert make_private(model, **options) is model
    torch.testing.assert_close(output(model), before, rtol=1e-9, atol=1e-9)
    settings = read_settings(model.config)
    assert settings.normalization == expected
    assert (settings.alpha, settings.beta, settings.gain, settings.coefficients) == (1, 0, 1, "learnable")
    for state in states(model).values():
        assert torch.equal(state.alpha, torch.ones_like(state.alpha))
        assert torch.equal(state.gain, torch.ones_like(state.gain))
        assert not state.beta.any()
        assert [name for name, _ in state.named_parameters()] == ["coefficients"]


@pytest.mark.parametrize("double", [True, False])
def test_saved_and_reloaded_bit_by_bit(tmp_path, double):
    model = patched_tiny("bert", AutoModelForMaskedLM, poly={"degree": 2, "learn_gain": True}, double=double)
    make_private(model, padded_batches(model))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert same_bits(model, reloaded)
    assert read_settings(reloaded.config) == read_settings(model.config)
    with computing_privately(model), computing_privately(reloaded):
        assert same_bits(model, reloaded)


def test_denominator_is_measured_on_rows_that_are_no_padding(caplog):
    model = encoder()
    # 6 rows of 6 keys and 3 sequences of 9 rows and keys
    make_private(model, padded_batches(model))
    assert read_settings(model.config).normalization == pytest.approx(33 / (6 / 6 + 27 / 9))
    model = encoder(normalization="sqrt_length")
    with caplog.at_level("INFO", "hf_polyattn"):
        make_private(model, padded_batches(model))
    expected = 33 / (6 / 6**0.5 + 27 / 3)
    assert read_settings(model.config).normalization == pytest.approx(expected)
    assert f"denominator {expected:.6g} (rows had 2.449 to 3: " in caplog.text


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny("bert", AutoModel), {"length": 9}, "not patched: call patch_model first"),
        (lambda: encoder(qk_norm=True), {"length": 9}, "qk_norm=False"),
        (lambda: encoder(normalization="l1"), {"length": 9}, 'normalization="length" or a number'),
        (lambda: encoder(normalization="l2"), {"length": 9}, "divides by a sum over the weights"),
        (lambda: encoder(layers=[0]), {"length": 9}, r"still softmax: encoder\.layer\.1"),
        (lambda: encoder(heads={1: [0, 2]}), {"length": 9}, r"heads \[1, 3\] of encoder\.layer\.1"),
        (lambda: patch_model(tiny("bert", AutoModel), "relu"), {"length": 9}, "no polynomial"),
        (lambda: patched_tiny("gpt2"), {"length": 9}, "is for encoders"),
        (lambda: encoder(), {}, "either batches or the length"),
        (lambda: encoder(), {"length": 9, "batches": []}, "either batches or the length"),
        (lambda: encoder(), {"batches": []}, "no batches"),
        (lambda: encoder(), {"length": 0}, "number of tokens"),
        (lambda: encoder(normalization=7), {"length": 9}, "already"),
        (lambda: encoder(degree=3, alpha=1e4).half(), {"length": 9}, r"torch\.float16 cannot hold: .*model\.float"),
    ],
)
def test_what_cannot_be_private_says_why_and_stays(make, options, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        make_private(model, **options)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# in the place of the model's own attention


@pytest.mark.parametrize("scheme", SCHEMES)
def test_model_computes_the_same_on_the_private_graph(scheme):
    model = make_private(encoder(), length=9)
    for batch in padded_batches(model):
        expected = output(model, **batch)
        with computing_privately(model, scheme) as same:
            assert same is model
            torch.testing.assert_close(output(model, **batch), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(output(model, **batch), expected)


def test_the_private_graph_really_stands_in():
    model = make_private(encoder(), length=9)
    seen = []
    with computing_privately(model, watch=lambda name, operation, inputs: seen.append((name, inputs[3]))):
        output(model, **padded_batches(model)[0])
    assert [name for name, _ in seen] == list(states(model))
    assert seen[0][1].tolist() == [[1.0] * 6 + [0.0] * 3, [1.0] * 9]


def test_modes_and_observers_are_what_they_were_even_after_an_error():
    model = make_private(encoder(), length=9).train()
    with computing_privately(model):
        assert not model.training
        with pytest.raises(ValueError, match="being observed"), computing_privately(model):
            pass
    assert model.training
    with pytest.raises(IndexError), computing_privately(model):
        model(input_ids=token_ids() + 1000)
    assert model.training
    assert all(state.observer is None for state in states(model).values())


def test_inputs_that_the_graph_does_not_have():
    model = make_private(encoder(), length=9)
    rows = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril().double()
    added = torch.zeros(2, 1, 9, 9).double()
    added[0, 0, 1, 2] = 0.5
    with computing_privately(model):
        with pytest.raises(ValueError, match="not one of keys alone"):
            model(input_ids=token_ids(), attention_mask=rows.bool())
        with pytest.raises(ValueError, match="has bias"):
            model(input_ids=token_ids(), attention_mask=added)
        with pytest.raises(ValueError, match="without output_attentions"):
            model(input_ids=token_ids(), output_attentions=True)
    with pytest.raises(ValueError, match=r"make_private\(model, batches\)"), computing_privately(encoder()):
        pass


# exported


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_exported_programs_compute_the_attention(scheme, masked, tmp_path):
    model = make_private(encoder(), length=9)
    batch = padded_batches(model)[0]
    if not masked:
        del batch["attention_mask"]
    programs = export_attention(model, batch, scheme=scheme)
    assert list(programs) == list(states(model))
    seen, outputs = {}, {}
    with computing_privately(model, scheme, lambda name, operation, inputs: seen.setdefault(name, inputs)):
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: outputs.setdefault(name, out[0])
            )
            for name in programs
        ]
        output(model, **batch)
    for hook in hooks:
        hook.remove()
    for name, program in programs.items():
        torch.export.save(program, tmp_path / "one.pt2")
        again = torch.export.load(tmp_path / "one.pt2")
        inputs = seen[name] if masked else seen[name][:3]
        given = again.module()(*inputs)  # [B, H, T, D]
        torch.testing.assert_close(given.transpose(1, 2).flatten(2), outputs[name], rtol=1e-12, atol=1e-12)
        assert check_graph(again) == operations(program)
        assert program.graph_signature.user_inputs == ("query", "key", "value", "mask")[: 4 if masked else 3]


def test_whole_attention_module_of_the_model_is_such_a_graph():
    """With its projections, as Transformers calls it."""
    model = make_private(encoder(), length=9)
    states_in = torch.randn(2, 9, 32).double()
    with computing_privately(model):
        # the operation is built from the scaling of the first call
        output(model)
        module = model.encoder.layer[0].attention.self
        program = torch.export.export(module, (states_in,), strict=False)
    assert operations(program).count("linear") == 3
    assert check_graph(program).count("matmul") == 2
    # a level for the projections
    assert depth_of(program) == Depth(3, 5)
    stock = tiny("bert", AutoModel)
    stock.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="softmax"):
        check_graph(torch.export.export(stock.encoder.layer[0].attention.self, (states_in,), strict=False))


# the report


def test_report_holds_the_ranges_of_every_intermediate():
    model = make_private(encoder(), length=9)
    batches = padded_batches(model)
    report = private_report(model, batches)
    seen = []
    with computing_privately(model, watch=lambda name, operation, inputs: seen.append((name, operation, inputs))):
        for batch in batches:
            output(model, **batch)
    assert report.batches == 2
    for name, ranges in report.ranges.items():
        calls = [(operation, inputs) for other, operation, inputs in seen if other == name]
        scores = torch.cat([inputs[0] @ inputs[1].transpose(-1, -2) for _, inputs in calls])
        c = fold(states(model)[name], SIZE**-0.5)[..., None, None, None].transpose(0, 1)
        c = [x.view(-1, 1, 1) for x in c]
        expected = {
            "query": torch.cat([inputs[0] for _, inputs in calls]),
            "q . k": scores,
            "P(x)": c[0] + c[1] * scores + c[2] * scores**2,
            "sum_j P w v": torch.cat([operation(*inputs) for operation, inputs in calls]),
        }
        for what, values in expected.items():
            assert ranges[what] == pytest.approx((values.min().item(), values.max().item()), rel=1e-9), what
    largest = max(abs(end) for ranges in report.ranges.values() for end in ranges["q . k"])
    assert 2 ** (report.integer_bits["q . k"] - 1) <= largest < 2 ** report.integer_bits["q . k"]
    lines = str(report).splitlines()
    assert lines[0].startswith("degree 2, horner:")
    assert sum(line.startswith("encoder.layer.") for line in lines) == LAYERS
    assert [line.split() for line in lines[-3:]] == [
        ["horner", "3", "4", "8"],
        ["even_odd", "3", "4", "9"],
        ["monic", "3", "3", "7"],
    ]


def test_report_leaves_out_what_the_coefficients_do_not_allow_and_names_what_is_not_finite():
    model = make_private(encoder(), length=9)
    state = next(iter(states(model).values()))
    with torch.no_grad():
        state.coefficients[1, 2] = 0
    assert set(private_report(model, [batch_for(model)]).depths) == {"horner", "even_odd"}
    with torch.no_grad():
        state.coefficients[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"P\(x\) of encoder\.layer\.0\.attention\.self is not finite"):
        private_report(model, [batch_for(model)])
    with pytest.raises(ValueError, match="no batches"):
        private_report(model, [])


def test_a_causal_model_is_refused_though_its_denominator_is_constant():
    model = patch_model(copy.deepcopy(tiny("gpt2", AutoModelForCausalLM)), degree=2, normalization=9)
    with pytest.raises(ValueError, match="encoders"):
        export_attention(model, batch_for(model))
