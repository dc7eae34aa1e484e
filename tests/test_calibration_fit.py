"""Coefficients by least squares: against a dense solution, what is reported, what is chosen, what is refused."""

import copy
import logging

import numpy as np
import pytest
import torch
from models import HEADS, LAYERS, WIDTH, batch_for, output, padded_batches, patched_tiny, tiny, token_ids
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_polyattn import calibrate, choose_heads, coverage, patch_model, register_architecture
from hf_polyattn.attention import polyattn_attention
from hf_polyattn.coefficient_fit import FitObserver, scores_beyond
from hf_polyattn.fitting import NormalEquations, lowest_slope, nonnegative_least_squares
from hf_polyattn.models import states

FAMILIES = [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)]
PROJECTIONS = {
    "gpt2": lambda model, layer: model.transformer.h[layer].attn.c_proj.weight.T,
    "llama": lambda model, layer: model.model.layers[layer].self_attn.o_proj.weight,
    "bert": lambda model, layer: model.bert.encoder.layer[layer].attention.output.dense.weight,
}
SCALES = {"length": lambda n: n, "sqrt_length": torch.sqrt, "none": torch.ones_like, 14.0: lambda n: 0 * n + 14}


def dense(seen, values, batches, normalization, degree=3):
    """[rows of the least squares problem, p + 1] of each head in powers of the bare score, and softmax's output."""
    terms, wanted = [], []
    for (scores, keep, out), value, batch in zip(seen, values, batches, strict=True):
        rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        length = keep.sum(-1, keepdim=True).clamp(min=1).double()
        bare = scores.masked_fill(~keep, 0)
        powers = [(bare**k * keep / SCALES[normalization](length)) @ value for k in range(degree + 1)]
        kept = rows[:, None, :, None].expand_as(out)
        terms.append(torch.stack([t.transpose(0, 1)[kept.transpose(0, 1)].view(HEADS, -1) for t in powers], -1))
        wanted.append(out.transpose(0, 1)[kept.transpose(0, 1)].view(HEADS, -1))
    return torch.cat(terms, 1), torch.cat(wanted, 1)


def bare_coefficients(state):
    """[H, p + 1] of powers of the score itself."""
    return state.coefficients.detach() * state.alpha[:, None] ** torch.arange(state.coefficients.shape[1])


def linear(model, **options):
    """Patched under a normalization in which coefficients can be fitted, which is no default without batches."""
    return patch_model(model, **{"normalization": "length", **options})


# the least squares


@pytest.mark.parametrize("normalization", SCALES, ids=str)
@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_fit_is_the_dense_least_squares_solution(family, auto, normalization, record):
    """With a padded sequence, and for LLaMA with grouped keys."""
    stock = tiny(family, auto)
    batches = padded_batches(stock)
    model = patch_model(copy.deepcopy(stock), normalization=normalization)
    report = calibrate(model, batches, ridge=1e-12)
    seen = record(stock, batches)
    for state, fit, one, values in zip(
        states(model).values(), report.modules.values(), seen, record.values, strict=True
    ):
        terms, wanted = dense(one, values, batches, normalization)
        expected = torch.linalg.lstsq(terms, wanted[..., None], driver="gelsd").solution[..., 0]
        assert torch.allclose(bare_coefficients(state), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
        left = wanted - (terms @ expected[..., None])[..., 0]
        r2 = 1 - left.square().sum(1) / wanted.square().sum(1)
        assert torch.allclose(fit.r2, r2, atol=1e-6)
        assert (r2 < 0.999).all()
        assert (state.gain == 1).all()
        used = torch.cat(
            [
                s.transpose(0, 1)[(k & b.get("attention_mask", torch.ones(2, 9)).bool()[:, None, :, None])
                .expand_as(s).transpose(0, 1)].view(HEADS, -1)
                for (s, k, _), b in zip(one, batches, strict=True)
            ],
            1,
        )  # fmt: skip
        assert torch.allclose(fit.spread, used.square().mean(1).sqrt().float(), rtol=1e-4)
        assert torch.allclose(fit.low, used.amin(1).float(), rtol=1e-5)
        assert torch.allclose(fit.high, used.amax(1).float(), rtol=1e-5)


@pytest.mark.parametrize(("family", "auto"), FAMILIES)
def test_r2_of_a_layer_is_that_of_its_output_behind_the_projection(family, auto, record):
    stock = tiny(family, auto)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    batches = padded_batches(stock)
    model = linear(copy.deepcopy(stock))
    report = calibrate(model, batches)
    seen = record(stock, batches)
    for layer, (state, fit, one, values) in enumerate(
        zip(states(model).values(), report.modules.values(), seen, record.values, strict=True)
    ):
        terms, wanted = dense(one, values, batches, "length")
        given = (terms @ bare_coefficients(state)[..., None])[..., 0]
        weight = PROJECTIONS[family](stock, layer)
        # [H, rows * D] -> [rows, H * D]
        flat = [
            x.view(HEADS, -1, WIDTH // HEADS).transpose(0, 1).flatten(1) @ weight.T for x in (wanted - given, wanted)
        ]
        assert fit.projected_r2 == pytest.approx(
            1 - (flat[0].square().sum() / flat[1].square().sum()).item(), abs=1e-6
        )


def test_a_fixed_gain_and_alpha_stay_and_enter_the_fit():
    stock = tiny("gpt2")
    batch = batch_for(stock)
    free, fixed = linear(copy.deepcopy(stock)), linear(copy.deepcopy(stock), gain=2.0, alpha=0.5)
    for model in (free, fixed):
        calibrate(model, [batch], ridge=1e-12)
    assert torch.allclose(output(free), output(fixed), rtol=1e-5, atol=1e-7)
    for state in states(fixed).values():
        assert (state.gain == 2).all()
        assert (state.alpha == 0.5).all()


def test_softmax_that_is_a_polynomial_is_recovered():
    """All scores equal: softmax is 1 / n, and any fitted polynomial has that value at that score."""
    stock = tiny("gpt2")
    with torch.no_grad():
        for block in stock.transformer.h:
            block.attn.c_attn.weight[:, : 2 * WIDTH] = 0
            block.attn.c_attn.bias[: 2 * WIDTH] = 0.7
    model = linear(copy.deepcopy(stock))
    report = calibrate(model, [batch_for(stock)])
    assert torch.allclose(output(model), output(stock), atol=1e-5)
    for fit in report.modules.values():
        assert torch.allclose(fit.r2, torch.ones(HEADS).double(), atol=1e-9)


def test_coefficients_of_a_polynomial_target_are_recovered():
    equations = NormalEquations(2, 4)
    truth = torch.tensor([[0.5, 1.0, -0.3, 0.2], [1.0, 0.0, 2.0, 100.0]])
    for _ in range(3):
        terms = torch.randn(4, 2, 2, 5, 3, dtype=torch.float64) * torch.tensor([1.0, 1e2, 1e4, 1e-3]).view(
            4, 1, 1, 1, 1
        )
        rows = torch.rand(2, 2, 5) < 0.7
        target = torch.einsum("kbhtd,hk->bhtd", terms, truth.double())
        # what does not count may be anything
        equations.add(terms, target.masked_fill(~rows[..., None], 1e3), rows)
    assert torch.allclose(equations.solve(1e-13), truth.double(), rtol=1e-6)
    assert torch.allclose(equations.r2(truth), torch.ones(2).double())
    assert torch.allclose(equations.r2(0 * truth), torch.zeros(2).double())


def test_a_head_without_values_gets_no_weights():
    equations = NormalEquations(1, 3)
    equations.add(torch.zeros(3, 1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, dtype=torch.bool))
    assert (equations.solve() == 0).all()
    assert equations.r2(equations.solve()) == 1


def test_heads_outside_the_patch_are_not_fitted():
    stock = tiny("llama")
    batch = batch_for(stock)
    part, whole = linear(copy.deepcopy(stock), heads={1: [1, 3]}, layers=[1]), linear(copy.deepcopy(stock))
    report = calibrate(part, [batch])
    everything = list(calibrate(whole, [batch]).modules.values())[1]
    (fit,) = report.modules.values()
    assert (fit.layer, fit.heads) == (1, (1, 3))
    assert torch.allclose(fit.coefficients, everything.coefficients[[1, 3]], rtol=1e-5)
    assert "1: 0." in str(report)


# whose inputs


def test_inputs_of_the_student_are_those_that_its_own_layers_make():
    model = linear(tiny("gpt2"))
    batch = batch_for(model)
    calibrate(model, [batch], inputs="student", ridge=1e-12)
    captured = []

    def capture(module, query, key, value, mask, **kwargs):
        captured.append((query, key, value, kwargs["scaling"]))
        return polyattn_attention(module, query, key, value, mask, **kwargs)

    registry = AttentionInterface._global_mapping
    registry["polyattn"] = capture
    try:
        output(model)
    finally:
        registry["polyattn"] = polyattn_attention
    fitted = []
    for (query, key, value, scaling), state in zip(captured, states(model).values(), strict=True):
        scores = scaling * query @ key.transpose(-1, -2)
        keep = torch.ones(9, 9, dtype=torch.bool).tril().expand_as(scores)
        out = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ value
        terms, wanted = dense([(scores, keep, out)], [value], [batch], "length")
        expected = torch.linalg.lstsq(terms, wanted[..., None], driver="gelsd").solution[..., 0]
        assert torch.allclose(bare_coefficients(state), expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
        fitted.append(state.coefficients.detach().clone())
    calibrate(model, [batch], inputs="teacher", ridge=1e-12)
    again = [state.coefficients for state in states(model).values()]
    assert torch.allclose(again[0], fitted[0], rtol=1e-5)
    assert not torch.allclose(again[1], fitted[1], rtol=1e-2)


# monotone polynomials and the range


@pytest.mark.parametrize("degree", [2, 3, 4, 7])
def test_monotone_polynomials_do_not_fall_within_the_range(degree):
    model = linear(tiny("gpt2"), degree=degree)
    batch = batch_for(model, 4, 16)
    free = calibrate(model, [batch])
    bound = calibrate(model, [batch], monotone=True)
    falling = 0
    for one, other in zip(free.modules.values(), bound.modules.values(), strict=True):
        for head in range(HEADS):
            ends = (one.alpha[head] * one.low[head]).item(), (one.alpha[head] * one.high[head]).item()
            scale = other.coefficients[head].abs().max().item()
            assert lowest_slope(other.coefficients[head].numpy(), *ends) >= -1e-9 * scale
            is_falling = lowest_slope(one.coefficients[head].numpy(), *ends) < 0
            falling += is_falling
            # no more is given away than must be
            assert (other.r2[head] < one.r2[head] - 1e-9) == is_falling
    assert falling


def test_monotone_solution_is_the_best_one():
    """Against a search over all quadratics that rise from -1 to 2."""
    x = torch.linspace(-1, 2, 50).double()
    equations = NormalEquations(1, 3)
    terms = torch.stack([x**k for k in range(3)])[:, None, None, :, None]
    target = torch.cos(2 * x)
    equations.add(terms, target.view(1, 1, -1, 1), torch.ones(1, 1, 50, dtype=torch.bool))
    found = equations.solve_monotone(torch.tensor([-1.0]), torch.tensor([2.0]), 1e-12)[0]
    best = torch.inf
    for slopes in torch.cartesian_prod(torch.linspace(0, 1, 201), torch.linspace(0, 1, 201)).double():
        # slope at -1 and at 2, both >= 0; the constant follows
        c2 = (slopes[1] - slopes[0]) / 6
        curve = (slopes[0] + 2 * c2) * x + c2 * x**2
        best = min(best, (target - curve - (target - curve).mean()).square().sum().item())
    mine = (target - sum(c * x**k for k, c in enumerate(found))).square().sum().item()
    assert mine == pytest.approx(best, rel=1e-3)
    assert mine <= best + 1e-9


def test_nonnegative_least_squares_meets_its_conditions():
    """u >= 0, gradient >= 0, and 0 wherever u > 0 (Karush, Kuhn, Tucker)."""
    generator = np.random.default_rng(0)
    for rows, columns in ((3, 2), (4, 12), (8, 30)):
        a, b = generator.normal(size=(rows, columns)), generator.normal(size=rows)
        u = nonnegative_least_squares(a, b)
        gradient = a.T @ (a @ u - b)
        assert (u >= 0).all()
        assert (gradient >= -1e-9).all()
        assert np.abs(gradient[u > 0]).max(initial=0) < 1e-9


def test_share_of_scores_beyond_the_calibrated_range():
    model = linear(tiny("llama"))
    batch = batch_for(model)
    report = calibrate(model, [batch], inputs="student")
    assert all((share == 0).all() for share in scores_beyond(model, [batch], report).values())
    first = next(iter(report.modules))
    with torch.no_grad():
        model.get_submodule(first).q_proj.weight.mul_(1.5)
    share = scores_beyond(model, [batch], report)[first]
    assert share.shape == (HEADS,)
    assert ((share > 0) & (share < 0.5)).all()
    with pytest.raises(ValueError, match="other modules or heads"):
        scores_beyond(linear(tiny("llama"), layers=[0]), [batch], report)


# which heads


def test_only_the_heads_that_are_kept_are_reported(caplog):
    model = tiny("gpt2")
    with caplog.at_level(logging.INFO, "hf_polyattn"):
        patch_model(model, heads="auto", budget=0.75, calibrate=padded_batches(model))
    assert [line for line in caplog.messages if "patched" in line] == [str(coverage(model))]
    assert "(6 of 8 heads)" in caplog.messages[-1]


def test_the_hardest_heads_stay_softmax():
    stock = tiny("gpt2")
    batches = padded_batches(stock)
    before = output(stock)
    report = calibrate(linear(copy.deepcopy(stock)), batches)
    r2 = torch.stack([fit.r2 for fit in report.modules.values()])
    chosen = choose_heads(stock, batches, budget=0.5)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert torch.equal(output(stock), before)
    mask = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    for layer, heads in chosen["heads"].items():
        mask[layer, list(heads)] = True
    assert mask.sum() == LAYERS * HEADS // 2
    assert r2[mask].min() > r2[~mask].max()
    assert chosen["layers"] == list(chosen["heads"])
    model = patch_model(copy.deepcopy(stock), heads="auto", budget=0.5, calibrate=batches, fit="coefficients")
    assert sum(coverage(model).patched.values()) == mask.sum()
    for (_, state), fit in zip(states(model).items(), (report.modules[name] for name in states(model)), strict=True):
        assert torch.allclose(state.coefficients, fit.coefficients[list(state.heads)], rtol=1e-4)
    (name, state), *_ = states(model).items()
    assert model.config.polyattn["heads"] is not None
    # a share of some layers only
    only = choose_heads(stock, batches, budget=0.5, layers=[1])
    assert only["layers"] == [1]
    assert len(only["heads"][1]) == HEADS // 2
    assert choose_heads(stock, batches, budget=1.0)["heads"] == {layer: list(range(HEADS)) for layer in range(LAYERS)}


# what is reported, set and left alone


def test_report_prints_and_draws(tmp_path):
    model = linear(tiny("gpt2"))
    report = calibrate(model, [batch_for(model)])
    lines = str(report).splitlines()
    assert lines[0].startswith("fitted degree 3 / length to softmax in 2 attention modules on 1 batches")
    first = report.modules["transformer.h.0.attn"]
    assert lines[2].split()[: 1 + HEADS] == ["transformer.h.0.attn", *(f"{r2:.3f}" for r2 in first.r2.tolist())]
    assert f"{first.projected_r2:.3f}" in lines[2]
    report.figure(tmp_path / "all.png")
    report.figure(tmp_path / "one.png", heads=[("transformer.h.1.attn", 2)])
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"head 7 of 'transformer.h.1.attn' was not fitted"):
        report.figure(tmp_path / "no.png", heads=[("transformer.h.1.attn", 7)])


def test_reported_weights_are_the_mean_of_softmax_times_z(record):
    stock = tiny("gpt2")
    batch = batch_for(stock)
    report = calibrate(linear(copy.deepcopy(stock)), [batch])
    ((scores, keep, _),) = record(stock, [batch])[0]
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1) * keep.sum(-1, keepdim=True)
    fit = report.modules["transformer.h.0.attn"]
    assert torch.equal(fit.seen.sum(1), keep.sum((0, 2, 3)).float().expand(HEADS))
    sums = (fit.weights * fit.seen).sum(1)
    assert torch.allclose(sums, weights.sum((0, 2, 3)).float(), rtol=1e-5)
    # the heaviest weights stand at the highest scores
    assert fit.weights[:, 0].max() < fit.weights[:, -1].min()


def test_without_an_output_projection_there_is_no_r2_of_the_layer(own_registry):
    register_architecture("gpt2", ["GPT2Attention"], exist_ok=True)
    model = linear(tiny("gpt2"))
    report = calibrate(model, [batch_for(model)])
    assert all(fit.projected_r2 is None for fit in report.modules.values())
    assert "0." in str(report)


def test_patching_with_batches_is_patching_and_fitting():
    stock = tiny("llama")
    batch = batch_for(stock)
    model = patch_model(copy.deepcopy(stock), calibrate=[batch["input_ids"]], fit="coefficients")
    other = linear(copy.deepcopy(stock))
    calibrate(other, iter([{**batch, "labels": batch["input_ids"]}]))
    assert torch.equal(output(model), output(other))
    gain = patch_model(copy.deepcopy(stock), calibrate=[batch])
    calibrate(other := linear(copy.deepcopy(stock)), [batch], fit="gain")
    assert torch.equal(output(gain), output(other))
    assert not torch.allclose(output(gain), output(model), atol=1e-3)


def test_fitting_again_changes_nothing():
    model = linear(tiny("gpt2"), learn_gain=True)
    calibrate(model, [batch_for(model)])
    before = output(model)
    calibrate(model, [batch_for(model)])
    assert torch.allclose(output(model), before, rtol=1e-6, atol=1e-9)


def test_modes_gradients_and_other_weights_are_left_alone():
    model = linear(tiny("gpt2")).train()
    model.transformer.h[0].ln_1.eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(model, padded_batches(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    changed = {k.rpartition(".")[2] for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {"alpha", "coefficients"}
    assert all(p.grad is None for p in model.parameters())
    assert all(s.observer is None for s in states(model).values())


# what is refused


def test_fits_that_cannot_be_are_refused():
    model = tiny("gpt2")
    batch = batch_for(model)

    def refuses(match, **options):
        with pytest.raises(ValueError, match=match):
            calibrate(model, [batch], **options)

    refuses("is not patched")
    linear(model)
    refuses("fit must be one of", fit="alpha")
    refuses("inputs must be one of", inputs="both")
    refuses("ridge must be positive", ridge=0)
    with pytest.raises(ValueError, match="no batches"):
        calibrate(model, [])
    for normalization in ("l1", "l2"):
        patch_model(model, normalization=normalization)
        refuses(f"normalization '{normalization}' divides by a sum")
    patch_model(model, coefficients=(1, 1, 0.5), normalization="sum")
    refuses("coefficients are .*nothing to fit")
    patch_model(model, "monomial")
    refuses("coefficients are 'monomial'")
    patch_model(model, "relu")
    refuses("'relu' has no coefficients")
    stock = tiny("gpt2")
    for budget in (0, 1.5, 0.01):
        with pytest.raises(ValueError, match="budget"):
            choose_heads(stock, [batch], budget=budget)
    for options in ({"heads": "auto"}, {"budget": 0.5, "heads": {0: [1]}, "calibrate": [batch]}, {"budget": 0.5}):
        with pytest.raises(ValueError, match='heads="auto"'):
            patch_model(stock, **options)
    assert type(stock).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("value", "match"), [(torch.nan, "are not finite"), (torch.inf, "are not finite"), (0.0, "have only zero scores")]
)
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_useless_batches_change_nothing(value, match, inputs):
    model = patched_tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    useless = {"inputs_embeds": torch.full((1, 4, WIDTH), value, dtype=torch.float64)}
    with pytest.raises(ValueError, match=match):
        calibrate(model, [batch_for(model), useless] if value != 0 else [useless], inputs=inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(state.observer is None for state in states(model).values())


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model = patched_tiny("gpt2").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(FitObserver, "_compare_projected", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [batch_for(model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_cross_attention_is_fitted_too():
    model = linear(tiny("gpt2-cross", AutoModel))
    report = calibrate(model, [batch_for(model), {**batch_for(model), "input_ids": token_ids()}])
    assert len(report.modules) == 2 * LAYERS
    assert all((fit.r2 > 0).all() for fit in report.modules.values())
