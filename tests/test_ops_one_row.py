"""The short way of a decoding step: it agrees with the definition, it is taken where it may be, and only there."""

import pytest
import torch
from attention_cases import NORMALIZATIONS, degree_of, error, inputs, masking, refused
from models import batch_for, patched_tiny
from transformers import AutoModelForCausalLM

from hf_polyattn import set_backend
from hf_polyattn.ops import cpu, polynomial_attention

pytestmark = pytest.mark.skipif(cpu.build().problem is not None, reason=f"no compiled form: {cpu.build().problem}")

# (B, H, Hk, S, D, Dv): whole blocks of 16 keys and broken ones, head dimensions with and without a loop of their own
SHAPES = {
    "one-key": (1, 1, 1, 1, 64, 64),
    "32": (2, 3, 3, 48, 32, 32),
    "64": (1, 12, 12, 133, 64, 64),
    "128": (2, 2, 2, 97, 128, 128),
    "grouped": (2, 8, 2, 131, 64, 64),
    "80": (1, 3, 3, 50, 80, 80),
    "two-widths": (2, 4, 2, 37, 20, 7),
    "long": (1, 1, 1, 3001, 64, 64),
}


@pytest.fixture
def steps(monkeypatch):
    """What went the short way: the queries of the calls of its operator."""
    seen = []
    operator = cpu.step()

    def note(query, *rest):
        seen.append(query)
        return operator(query, *rest)

    monkeypatch.setattr(cpu, "step", lambda: note)
    return seen


def agrees(given: dict[str, torch.Tensor], dtype: torch.dtype, **options) -> None:
    given = {n: x.to(dtype) if n in ("query", "key", "value") else x for n, x in given.items() if n != "bias"}
    exact = polynomial_attention(**{n: x.double() for n, x in given.items()}, backend="naive", **options)
    out = polynomial_attention(**given, **options)
    assert (out.dtype, out.shape) == (dtype, exact.shape)
    assert error(out.double(), exact, 0.01) < (2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phi", ["s^2", "s^3", "s^5", "a^3", "c^2", "c^3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition(shape, phi, dtype, steps):
    batch, heads, key_heads, keys, dim, width = SHAPES[shape]
    for normalization in NORMALIZATIONS:
        if not refused(normalization, phi):
            agrees(
                inputs(phi, (batch, heads, key_heads, 1, keys, dim, width)),
                dtype,
                normalization=normalization,
                degree=degree_of(phi),
            )
    assert len(steps) == sum(not refused(n, phi) for n in NORMALIZATIONS)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "mask", ["full", "causal", "window", "causal-window", "bool", "no-rows", "left-padding", "heads"]
)
@pytest.mark.parametrize("shape", ["64", "grouped", "two-widths", "long"])
def test_masks_and_threads(shape, mask, threads, steps):
    """Also masks with holes: the operator reads them."""
    batch, heads, key_heads, keys, dim, width = SHAPES[shape]
    if mask == "heads":
        options = {"keep": torch.rand(1, heads, 1, keys) > 0.3}
    else:
        options = masking(mask, batch, heads, 1, keys)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for normalization in ("length", "l1"):
            given = inputs("c^3", (batch, heads, key_heads, 1, keys, dim, width))
            agrees(given, torch.float32, normalization=normalization, **options)
    finally:
        torch.set_num_threads(before)
    assert len(steps) == 2


def test_a_mask_that_keeps_all_keys_is_as_good_as_none(steps):
    q, (k, v) = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 4, 70, 64)
    expected = polynomial_attention(q, k, v, degree=3)
    for keep in (torch.ones(2, 1, 1, 70), torch.ones(1, 70), torch.ones(1, 1, 1, 1).expand(2, 4, 1, 70)):
        assert torch.equal(polynomial_attention(q, k, v, degree=3, keep=keep.bool()), expected)
    assert len(steps) == 4


def test_masked_keys_may_hold_anything(steps):
    q, (k, v) = torch.randn(1, 2, 1, 64), torch.randn(2, 1, 2, 40, 64)
    keep = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    keep[..., 7] = keep[..., 33:] = False
    expected = polynomial_attention(q, k, v, degree=3, keep=keep)
    k[:, :, 7], k[:, :, 33:] = torch.nan, torch.inf
    assert torch.equal(polynomial_attention(q, k, v, degree=3, keep=keep), expected)
    assert len(steps) == 2


@pytest.mark.parametrize("layout", ["heads", "strided", "slice of a static cache", "expanded"])
def test_strides(layout, steps):
    q, k, v = torch.randn(2, 4, 1, 64), *torch.randn(2, 2, 4, 90, 64)
    if layout == "heads":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "strided":
        q, k, v = torch.randn(2, 4, 1, 128)[..., ::2], *(torch.randn(2, 4, 180, 128)[:, :, ::2, ::2] for _ in range(2))
    elif layout == "expanded":
        k, v = (x[:, :1].expand(2, 4, 90, 64) for x in (k, v))
    else:
        k, v = (torch.randn(2, 4, 128, 64)[:, :, :90] for _ in range(2))
    agrees({"query": q, "key": k, "value": v}, torch.float32, degree=3)
    assert len(steps) == 1


def test_nothing_to_attend_to(steps):
    q = torch.randn(1, 2, 1, 8)
    empty = torch.randn(1, 2, 0, 8)
    assert torch.equal(polynomial_attention(q, empty, empty, degree=2), torch.zeros(1, 2, 1, 8))
    assert len(steps) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"softcap": 3.0},
        {"bias": torch.randn(1, 1, 1, 20)},
        {"return_weights": True},
        {"qk_norm": True},
        {"key_lengths": torch.tensor([3])},
        {"backend": "naive"},
        {"backend": "tiled"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_it_does_not_know(options, steps):
    q, (k, v) = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 2, 20, 8)
    polynomial_attention(q, k, v, degree=3, **options)
    assert steps == []


@pytest.mark.parametrize("kind", ["rows", "float64", "mixed", "degree", "compiled", "grad", "learned"])
def test_calls_that_are_not_for_it(kind, steps):
    q, (k, v) = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 2, 20, 8)
    options, call = {"degree": 3}, polynomial_attention
    if kind == "rows":
        q = torch.randn(1, 2, 2, 8)
    elif kind == "float64":
        q, k, v = q.double(), k.double(), v.double()
    elif kind == "mixed":
        q = q.bfloat16()
    elif kind == "degree":
        options = {"degree": cpu.MAX_DEGREE + 1}
    elif kind == "compiled":
        call = torch.compile(polynomial_attention, fullgraph=True, backend="aot_eager")
    elif kind == "grad":
        k.requires_grad_()
    else:
        options = {"coefficients": torch.rand(2, 4, requires_grad=True)}
    out = call(q, k, v, **options)
    assert steps == []
    assert out.requires_grad == (kind in ("grad", "learned"))
    with torch.no_grad():
        wide = polynomial_attention(q.double(), k.double(), v.double(), backend="naive", **options)
    assert error(out.detach().double(), wide) < 1e-2
    if out.requires_grad:
        with torch.no_grad():
            assert torch.allclose(polynomial_attention(q, k, v, **options), out, atol=1e-6)
        assert len(steps) == 1


@pytest.mark.parametrize(
    ("message", "shapes", "options"),
    [
        ("batch, key length, key heads and head_dim must agree", ((1, 2, 1, 8), (1, 2, 5, 4), (1, 2, 5, 4)), {}),
        ("must be a multiple of the key heads", ((1, 3, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {}),
        ("does not broadcast", ((1, 2, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"keep": torch.ones(4).bool()}),
        ("keep must be bool", ((1, 2, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"keep": torch.ones(5)}),
    ],
)
def test_what_does_not_fit_is_refused_as_everywhere(message, shapes, options):
    with pytest.raises(ValueError, match=message):
        polynomial_attention(*(torch.randn(shape) for shape in shapes), degree=2, **options)


def test_the_operator_has_no_derivative_and_says_so():
    q, k = torch.randn(1, 2, 1, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    numbers = (None, None, None, None, 3, cpu.NORMALIZATIONS["length"], 1.0, 0.3, 0, None)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.ops.hf_polyattn.cpu_step(q, k, k, *numbers)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(RuntimeError, match="has no derivative"):
            torch.ops.hf_polyattn.cpu_step(dual, k, k, *numbers)
    torch.library.opcheck(torch.ops.hf_polyattn.cpu_step, (q.detach(), k, k, *numbers))


# in models


def step_of(model: torch.nn.Module, backend: str) -> torch.Tensor:
    """Logits of the token after a padded batch, with a cache."""
    set_backend(model, backend)
    inputs = batch_for(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    with torch.no_grad():
        cache = model(**inputs, attention_mask=mask, use_cache=True).past_key_values
        more = torch.cat([mask, mask[:, -1:]], 1)
        return model(inputs["input_ids"][:, :1], attention_mask=more, past_key_values=cache).logits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "poly",
    [
        {},
        {"activation": "monomial"},
        {"learn_affine": True, "learn_gain": True, "coefficients": (0.5, 1.0, 0.25), "normalization": "l1"},
    ],
    ids=["learned", "monomial", "affine"],
)
def test_a_step_of_a_model_takes_it_in_every_layer(family, poly, steps):
    model = patched_tiny(family, AutoModelForCausalLM, poly=poly, double=False)
    out = step_of(model, "auto")
    assert len(steps) == model.config.num_hidden_layers
    torch.testing.assert_close(out, step_of(model, "naive"), rtol=1e-4, atol=1e-5)
    assert len(steps) == model.config.num_hidden_layers


@pytest.mark.parametrize("poly", [{"qk_norm": True}, {"heads": {0: (1,)}}, {"activation": "relu"}])
def test_a_step_of_a_model_that_computes_something_else(poly, steps):
    model = patched_tiny("gpt2", AutoModelForCausalLM, poly=poly, double=False, n_layer=1)
    out = step_of(model, "auto")
    assert len(steps) == (1 if "heads" in poly else 0)  # the polynomial heads alone
    torch.testing.assert_close(out, step_of(model, "naive"), rtol=1e-4, atol=1e-5)


def test_training_mode_dropout_and_gradients_take_the_general_way(steps):
    model = patched_tiny("gpt2", AutoModelForCausalLM, double=False, n_layer=1)
    inputs = batch_for(model)
    cache = model(**inputs, use_cache=True).past_key_values
    model(inputs["input_ids"][:, :1], past_key_values=cache).logits.sum().backward()
    assert steps == []
    model.config.attn_pdrop = 0.5
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.5
    model.train()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    assert steps == []
