"""Statistics of the heads: the row map against the definition and autograd, streaming against whole matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import AUTO_CLASSES, batch_for, padded_batches, patched_tiny, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    Gemma2Config,
    Gemma2ForCausalLM,
)

import hf_polyattn
from hf_polyattn.activations import get_activation, horner
from hf_polyattn.diagnostics import STATISTICS, AttentionReport, RowMap, attention_statistics, weight_norms
from hf_polyattn.diagnostics import statistics as streaming
from hf_polyattn.diagnostics.probing import PROBE, probing
from hf_polyattn.diagnostics.statistics import DEAD_SLOPE, GRADIENTS, HeadSums
from hf_polyattn.ops.masks import build_keep
from hf_polyattn.ops.naive import naive_attention

HEADS = 2


def row_map(name: str, normalization: str | float) -> RowMap:
    """A map whose every number differs from head to head."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return (0.5 + torch.rand(*shape, generator=generator)).double()

    if name == "softmax":
        return RowMap.softmax()
    affine = {"gain": numbers(HEADS), "alpha": numbers(HEADS), "beta": numbers(HEADS) - 1}
    if name == "poly":
        return RowMap(degree=3, coefficients=numbers(HEADS, 4), normalization=normalization, **affine)
    if name.startswith("monomial"):
        return RowMap(degree=int(name[-1]), normalization=normalization, **affine)
    return RowMap(get_activation(name).phi, normalization=normalization, **affine)


MAPS = [
    ("softmax", "sum"),
    ("sigmoid", "none"),
    ("relu", "length"),
    ("monomial1", "none"),
    ("monomial2", "sum"),
    ("monomial3", "sqrt_length"),
    *(("poly", normalization) for normalization in ("length", "sqrt_length", "l1", "l2", "none", 14.0)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "normalization"), MAPS)
def test_row_map_is_the_definition_and_its_jacobian_that_of_autograd(name, normalization, causal):
    mapping = row_map(name, normalization)
    query, key, value = (torch.randn(2, HEADS, 5, 4, dtype=torch.float64) for _ in range(3))
    keep = build_keep((5, 5), query.device, is_causal=causal, key_lengths=torch.tensor([5, 3]))
    phi = mapping.phi
    if phi is None and mapping.coefficients is not None:
        phi = lambda scores, lengths: horner(scores, mapping.coefficients)  # noqa: E731
    elif phi is None:
        phi = lambda scores, lengths: scores**mapping.degree  # noqa: E731
    options = {"keep": keep, "normalization": normalization, "exponential": mapping.exponential}
    options |= {"gain": mapping.gain, "alpha": mapping.alpha, "beta": mapping.beta}

    def weights_of(scores):
        """The definition, from scores: queries that are the scores against keys that are unit vectors."""
        unit = torch.eye(5, dtype=torch.float64).expand(2, HEADS, 5, 5)
        return naive_attention(scores, unit, unit, phi, scaling=1.0, **options)[1]

    scores = query @ key.transpose(-1, -2)
    rows = mapping(scores, keep)
    torch.testing.assert_close(rows.weights, weights_of(scores))
    full = torch.autograd.functional.jacobian(weights_of, scores)  # [b, h, i, j, b, h, i, k]
    blocks = torch.einsum("bhijbhik->bhijk", full)
    torch.testing.assert_close(rows.slopes, blocks.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(rows.jacobian_squares, blocks.square().sum((-1, -2)))
    # no row depends on the scores of another
    torch.testing.assert_close(full.square().sum(), blocks.square().sum())


@pytest.mark.parametrize(("name", "normalization"), [("softmax", "sum"), ("poly", "l1"), ("poly", "l2")])
def test_jacobian_of_long_rows_agrees_with_random_projections(name, normalization):
    """E ‖J'v‖^2 = ‖J‖_F^2 for signs v (Hutchinson): an estimate that needs no formula, at any length."""
    mapping = row_map(name, normalization)
    scores = 2 * torch.randn(1, HEADS, 1, 4096, dtype=torch.float64)
    exact = mapping(scores).jacobian_squares[0, :, 0]
    generator = torch.Generator().manual_seed(0)

    def weights_of(x):
        # by autograd through the definition, not through `RowMap`
        if name == "softmax":
            return x.softmax(-1)
        values = horner(mapping.alpha.view(-1, 1, 1) * x + mapping.beta.view(-1, 1, 1), mapping.coefficients)
        size = values.abs().sum(-1, True) if normalization == "l1" else values.square().sum(-1, True).sqrt()
        return mapping.gain.view(-1, 1, 1) * values / size

    estimates = []
    for _ in range(200):
        leaf = scores.clone().requires_grad_()
        signs = torch.randint(0, 2, scores.shape, generator=generator).double() * 2 - 1
        (projected,) = torch.autograd.grad(weights_of(leaf), leaf, signs)
        estimates.append(projected.square().sum(-1)[0, :, 0])
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error < 0.2 * exact).all()
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()


rows_of_scores = st.integers(1, 24).flatmap(
    lambda n: st.lists(st.lists(st.floats(-80, 80, width=32), min_size=n, max_size=n), min_size=1, max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(rows_of_scores)
def test_bounds_of_softmax(scores):
    """‖A‖_F <= sqrt N and ‖dA‖_F <= 2 sqrt N for every input; the second is never above sqrt(N) / 2."""
    x = torch.tensor(scores, dtype=torch.float64)[None, None]
    rows = RowMap.softmax()(x)
    length = x.shape[2]
    assert rows.weights.square().sum() <= length * (1 + 1e-9)
    # a row's Jacobian is at its largest for two equal keys, ‖J‖_F = 1/2: four times below the bound
    assert rows.jacobian_squares.sum() <= length / 4 * (1 + 1e-9)


def test_bounds_of_softmax_are_reached():
    """One key takes all: ‖A‖_F = sqrt N. Two keys tie: ‖J‖_F = 1/2 a row. So neither bound can be sharpened."""
    hot = torch.full((1, 1, 8, 8), -80.0, dtype=torch.float64)
    hot[..., 0] = 0
    assert RowMap.softmax()(hot).weights.square().sum() == pytest.approx(8, rel=1e-5)
    hot[..., 1] = 0
    assert RowMap.softmax()(hot).jacobian_squares == pytest.approx(torch.full((1, 1, 8), 0.25), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(rows_of_scores, st.sampled_from(["l1", "l2"]), st.integers(1, 6))
def test_bounds_of_exact_normalizations(scores, normalization, degree):
    """ "l1" obeys softmax's bound at any degree and any input, "l2" meets it but for eps."""
    x = torch.tensor(scores, dtype=torch.float64)[None, None]
    weights = RowMap(degree=degree, normalization=normalization)(x).weights
    assert weights.square().sum() <= x.shape[2] * (1 + 1e-9)


def dense(mapping, query, key, value, options, tokens=None):
    """Name -> [heads], from the whole matrices and by the words of STATISTICS."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    keep = build_keep(
        (query.shape[2], key.shape[2]),
        query.device,
        keep=options["keep"],
        is_causal=options["is_causal"],
        sliding_window=options["sliding_window"],
    )
    scores = options["scaling"] * (query @ key.transpose(-1, -2))
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options["bias"] is not None:
        scores = scores + options["bias"]
    rows = mapping(scores, keep)
    out = rows.weights @ value
    used = keep.expand_as(scores)
    if tokens is not None:
        used = used & tokens[:, None, :, None]
    real = used.any(-1)
    result = {name: [] for name in STATISTICS}
    for h in range(query.shape[1]):
        a, s = rows.weights[:, h][real[:, h]], scores[:, h][used[:, h]]
        o = out[:, h][real[:, h]]
        slopes = (rows.slopes * rows.lengths)[:, h][used[:, h]]
        largest = max(s.abs().max(), a.abs().max(), o.abs().max())
        values = {
            "frobenius": torch.linalg.matrix_norm(a) / math.sqrt(len(a)),
            "jacobian": (rows.jacobian_squares[:, h][real[:, h]].sum() / len(a)).sqrt(),
            "row_sum": a.sum(-1).mean(),
            "row_sum_std": a.sum(-1).std(correction=0),
            "effective_keys": (a.abs().sum(-1) ** 2 / a.square().sum(-1)).mean(),
            "score_mean": s.mean(),
            "score_spread": s.square().mean().sqrt(),
            "score_min": s.min(),
            "score_max": s.max(),
            "dead_share": (slopes.abs() < DEAD_SLOPE).double().mean(),
            "output_rms": o.square().mean().sqrt(),
            "fp16_octaves": torch.log2(65504 / largest),
        }
        for name, value_of_head in values.items():
            result[name].append(value_of_head)
    return {name: torch.stack(column).float() for name, column in result.items()}, out


CASES = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"sliding_window": 3},
    "causal window": {"is_causal": True, "sliding_window": 4},
    "mask": {"keep": torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.6},
    "mask by head, causal": {"keep": torch.rand(2, 4, 1, 9) < 2, "is_causal": True},
    "bias": {"bias": torch.linspace(-1, 1, 4 * 81, dtype=torch.float64).view(1, 4, 9, 9), "is_causal": True},
    "softcap": {"softcap": 1.5},
    "padding": {"tokens": torch.arange(9) < torch.tensor([[9], [6]]), "is_causal": True},
}


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_rows_add_up_to_the_whole(case, rows, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", rows * 2 * 4 * 9)
    options = {"keep": None, "bias": None, "is_causal": False, "sliding_window": None, "softcap": None, **CASES[case]}
    tokens = options.pop("tokens", None)
    options["scaling"] = 0.7
    query = torch.randn(2, 4, 9, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 4, dtype=torch.float64)  # four query heads, two of keys
    for mapping in (RowMap.softmax(), RowMap(degree=3, normalization="sqrt_length")):
        expected, out = dense(mapping, query, key, value, options, tokens)
        sums = HeadSums([((0, 1, 2, 3), mapping)])
        sums.add(query, key, out, options, tokens)
        result = sums.result()
        assert list(result) == list(STATISTICS)
        for name, column in result.items():
            torch.testing.assert_close(column, expected[name], msg=lambda text, name=name: f"{name}: {text}")


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_weights_is_held(causal, monkeypatch):
    length, block = 512, 2**13
    monkeypatch.setattr(streaming, "BLOCK", block)
    query, key = torch.randn(2, 1, 2, length, 8)
    options = {"scaling": 1.0, "is_causal": causal}
    with LargestTensor() as mode:
        HeadSums([((0, 1), RowMap(degree=2))]).add(query, key, query, options)
    # a dozen sums by row are stacked, which is less than a block of scores where rows are long
    assert block <= mode.largest <= 3 * block < 2 * length * length


def test_dead_scores_and_the_distance_to_overflow():
    """Under "length" a score of s^3 is dead where 3 s^2 < DEAD_SLOPE."""
    edge = math.sqrt(DEAD_SLOPE / 3)
    query = torch.tensor([[0.0], [0.9 * edge], [1.1 * edge], [40.0]]).view(1, 1, 4, 1)
    key = torch.ones(1, 1, 1, 1)
    sums = HeadSums([((0,), RowMap(degree=3, normalization="length"))])
    sums.add(query, key, query**3, {"scaling": 1.0, "is_causal": False})
    result = sums.result()
    assert result["dead_share"].item() == 0.5
    assert result["fp16_octaves"].item() == pytest.approx(math.log2(65504 / 40**3), rel=1e-4)
    assert result["score_min"].item() == 0
    assert result["score_max"].item() == 40


MODELS = [(family, patch) for family in (*AUTO_CLASSES, "mistral") for patch in (False, True)]


def build(family, patch, **settings):
    auto = AutoModelForCausalLM if family == "mistral" else AUTO_CLASSES[family][1]
    return patched_tiny(family, auto, poly=settings) if patch else tiny(family, auto)


@pytest.mark.parametrize(("family", "patch"), [*MODELS, ("gpt2", "part"), ("llama", "part")])
def test_models_are_measured_as_they_are(family, patch):
    if patch == "part":
        model = tiny(family)
        hf_polyattn.patch_model(model, activation="poly", heads={0: [1, 2]}, calibrate=[batch_for(model)])
    else:
        model = build(family, patch)
    batch = padded_batches(model)[0]
    if family.endswith("cross") or family == "bert-decoder":
        batch.pop("attention_mask")
    before = model(**batch)[0]
    random = torch.get_rng_state()
    implementation = model.config._attn_implementation
    report = attention_statistics(model, [batch])
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch)[0], before)
    selves = [name for name in report.modules if "cross" not in name]
    frobenius = torch.stack([report.modules[name]["frobenius"] for name in selves])
    torch.testing.assert_close(frobenius, weight_norms(model, batch), rtol=1e-5, atol=1e-6)
    if not patch:
        assert report["row_sum"].numpy() == pytest.approx(1, abs=1e-4)
        assert (report["jacobian"] <= 0.5).all()
    else:
        assert not torch.allclose(report["row_sum"], torch.ones(()), atol=1e-2)
    assert len(report.modules) == (4 if family.endswith("cross") else 2)


def unregistered(name):
    """A stock model that nobody has registered for patching, and inputs: windows and softcap, or no mask at all."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    if name == "deit":
        config = DeiTConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.3)
        return DeiTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = Gemma2Config(
        **sizes, head_dim=8, num_key_value_heads=2, vocab_size=64, sliding_window=4, initializer_range=0.5
    )
    return Gemma2ForCausalLM(config), {"input_ids": torch.randint(2, 60, (2, 9))}


@pytest.mark.parametrize("name", ["deit", "gemma2"])
def test_stock_models_that_cannot_be_patched_are_measured_too(name):
    model, batch = unregistered(name)
    model.eval()
    before = model.config._attn_implementation
    report = attention_statistics(model, [batch])
    torch.testing.assert_close(report["frobenius"], weight_norms(model, batch), rtol=1e-4, atol=1e-5)
    # heads that differ, so that a wrong mask would show
    assert (report["frobenius"].std(1) > 1e-3).all()
    assert report["row_sum"].numpy() == pytest.approx(1, abs=1e-4)
    assert model.config._attn_implementation == before


def test_half_precision_is_measured_in_single():
    model = patched_tiny("gpt2", double=False)
    batch = batch_for(model)
    single = attention_statistics(model, [batch])
    half = attention_statistics(model.bfloat16(), [batch])
    for name in ("frobenius", "jacobian", "score_spread", "output_rms"):
        torch.testing.assert_close(half[name], single[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("settings", [{"qk_norm": True}, {"qk_norm": True, "normalization": "l1", "degree": 2}])
def test_scores_are_those_behind_qk_norm(settings):
    model = build("gpt2", True, **settings)
    batch = batch_for(model)
    report = attention_statistics(model, [batch])
    torch.testing.assert_close(report["frobenius"], weight_norms(model, batch), rtol=1e-5, atol=1e-6)
    # |s| <= sqrt(head_dim), which scores without the norm leave behind
    assert (report["score_max"] <= math.sqrt(8)).all()
    assert (attention_statistics(build("gpt2", False), [batch])["score_max"] > math.sqrt(8)).all()


def test_a_probe_changes_neither_outputs_nor_gradients():
    for patch in (False, True):
        model = build("llama", patch)
        ids = batch_for(model)["input_ids"]
        grads, calls = [], []
        for probe in (None, lambda *seen: calls.append(seen)):
            model.zero_grad()
            if probe is None:
                loss = model(input_ids=ids, labels=ids).loss
            else:
                with probing(model, probe):
                    loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(calls) == 2
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_norms_are_those_of_the_projections():
    """The gradient by llama's values is that of the output of v_proj, which nothing stands between."""
    model = build("llama", True)
    ids = batch_for(model)["input_ids"]
    outputs = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: outputs.append(out))
    loss = model(input_ids=ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, outputs)
    report = attention_statistics(model, [{"input_ids": ids, "labels": ids}])
    expected = torch.stack([g.view(*ids.shape, 2, -1).square().sum((0, 1, 3)).sqrt() for g in gradients])
    torch.testing.assert_close(report["value_gradient"], expected.repeat_interleave(2, 1).float())
    assert all(p.grad is None for p in model.parameters())
    # two equal batches have the gradient of one
    twice = attention_statistics(model, [{"input_ids": ids, "labels": ids}] * 2)
    for name in (*STATISTICS, *GRADIENTS):
        torch.testing.assert_close(twice[name], report[name])
    # frozen layers are measured as well
    frozen = attention_statistics(model.requires_grad_(False), [{"input_ids": ids, "labels": ids}])
    torch.testing.assert_close(frozen["query_gradient"], report["query_gradient"])


def test_gradients_of_a_loss_of_ones_own():
    model = build("gpt2", True)
    batch = batch_for(model)
    report = attention_statistics(model, [batch], lambda model, batch: model(**batch).logits.square().mean())
    assert (report["query_gradient"] > 0).all()
    with pytest.raises(KeyError, match="'query_gradient' was not measured; there are frobenius, jacobian"):
        attention_statistics(model, [batch])["query_gradient"]


def test_what_cannot_be_measured_is_refused():
    model = build("gpt2", False)
    with pytest.raises(ValueError, match="at least one batch"):
        attention_statistics(model, [])
    with pytest.raises(ValueError, match="list of batches"):
        attention_statistics(model, batch_for(model))
    model.config._attn_implementation = PROBE
    with pytest.raises(RuntimeError, match=r"inside hf_polyattn\.diagnostics only"):
        model(**batch_for(model))
    config = BertConfig(num_hidden_layers=0, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="no attention was seen in BertModel"):
        attention_statistics(BertModel(config), [torch.zeros(1, 2, dtype=torch.long)])


def test_after_an_error_the_model_is_what_it_was():
    model = build("gpt2", False).train()
    with pytest.raises(KeyError):
        attention_statistics(model, [batch_for(model)], lambda model, batch: batch["missing"])
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_report_as_table_numbers_and_json():
    model = build("gpt2", True)
    report = attention_statistics(model, [batch_for(model)])
    assert str(report).startswith("2 attention modules: mean (min to max) of the heads\nmodule")
    scalars = report.scalars()
    assert scalars["attention_jacobian/layer_01"] == pytest.approx(report["jacobian"][1].mean().item())
    assert len(scalars) == 2 * len(STATISTICS)
    again = AttentionReport.from_json(report.to_json())
    for name in STATISTICS:
        torch.testing.assert_close(again[name], report[name])
    uneven = AttentionReport({"a": {"frobenius": torch.ones(1)}, "b": {"frobenius": torch.ones(2)}})
    with pytest.raises(ValueError, match="differ in their number of heads"):
        uneven["frobenius"]
