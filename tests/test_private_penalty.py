"""The penalty on the range of scores: its value, its gradient, and what training with it does."""

import copy

import pytest
import torch
from models import HEADS, batch_for, output, padded_batches, patched_tiny, tiny, token_ids
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hf_polyattn import calibrate, patch_model
from hf_polyattn.conversion import transfer_attention
from hf_polyattn.models import states
from hf_polyattn.private import computing_privately, penalty, score_range_penalty


def by_hand(found, bound):
    """The penalty of [(scores, keep, output)] of each module."""
    parts = [
        (scores[keep.expand_as(scores)].abs() - bound).relu().square() for calls in found for scores, keep, _ in calls
    ]
    return torch.cat(parts).mean()


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize(
    ("family", "auto"), [("bert", AutoModel), ("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM)]
)
def test_penalty_is_that_of_the_scores_that_count(family, auto, rows, record, monkeypatch):
    """Of the first layer, whose inputs do not depend on the patch: padded and future keys do not count."""
    monkeypatch.setattr(penalty, "ROWS", rows)
    stock = tiny(family, auto)
    batches = padded_batches(stock)
    model = patch_model(copy.deepcopy(stock), layers=[0])
    expected = by_hand(record(stock, batches)[:1], bound=1.5)
    before = [output(model, **batch) for batch in batches]
    with score_range_penalty(model, bound=1.5) as found:
        with torch.no_grad():
            outputs = [model(**batch)[0] for batch in batches]
        largest = found.largest
        given = found.take()
        assert found.largest == 0
    assert all(torch.equal(*both) for both in zip(before, outputs, strict=True))
    assert given.item() == pytest.approx(expected.item(), rel=1e-9)
    assert given > 0.1
    with score_range_penalty(model, bound=largest * 1.0001) as found:
        model(**batches[0])
        model(**batches[1])
        assert found.take() == 0


def test_gradient_is_that_of_the_scores(monkeypatch):
    """Against autograd through the scores written out, with and without parts."""
    model = patched_tiny("bert", AutoModel, num_hidden_layers=1)
    attention = model.encoder.layer[0].attention.self
    with score_range_penalty(model, bound=1.5) as found:
        model(**batch_for(model))
        found.take().backward()
    given = {
        name: parameter.grad.clone() for name, parameter in attention.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    states_in = model.embeddings(**batch_for(model))
    query, key = (
        layer(states_in).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (attention.query, attention.key)
    )
    scores = attention.scaling * query @ key.transpose(-1, -2)
    (scores.abs() - 1.5).relu().square().mean().backward()
    for name in ("query.weight", "key.weight", "query.bias", "key.bias"):
        torch.testing.assert_close(given[name], attention.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    assert not any("value" in name or "polyattn" in name for name in given)
    monkeypatch.setattr(penalty, "ROWS", 4)
    expected = attention.query.weight.grad.clone()
    model.zero_grad()
    with score_range_penalty(model, bound=1.5) as found:
        model(**batch_for(model))
        found.take().backward()
    torch.testing.assert_close(attention.query.weight.grad, expected, rtol=1e-9, atol=1e-12)


def largest_scores(model, batches):
    with score_range_penalty(model, bound=1.0) as found, torch.no_grad():
        for batch in batches:
            model(**batch)
        return found.largest


def test_training_with_it_narrows_the_range():
    batches = [batch_for(tiny("bert"), 4, 16, seed) for seed in range(4)]
    losses, ranges = [], []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = patched_tiny("bert", AutoModelForMaskedLM, double=False, poly={"degree": 2}).train()
        before = largest_scores(model, batches)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with score_range_penalty(model, bound=2.0) as found:
            for step in range(40):
                batch = batches[step % 4]
                loss = model(**batch, labels=batch["input_ids"]).loss
                (loss + weight * found.take()).backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
        ranges.append(largest_scores(model, batches))
    assert before > 6
    assert ranges[1] < 0.6 * min(ranges[0], before)
    assert losses[1] < 1.2 * losses[0] + 0.2


def test_attention_transfer_with_a_bound_narrows_the_range_and_still_learns():
    teacher = tiny("bert", AutoModel, double=False)
    batches = [token_ids(8, 16, seed) for seed in range(20)]
    start = patch_model(copy.deepcopy(teacher), degree=2)
    calibrate(start, batches[:2])
    reports, ranges = [], []
    for bound in (None, 3.0, 1e6):
        student = copy.deepcopy(start)
        options = {} if bound is None else {"penalty": score_range_penalty(student, bound), "penalty_weight": 1.0}
        reports.append(transfer_attention(student, teacher, batches, learning_rate=3e-3, progress=False, **options))
        ranges.append(largest_scores(student, [{"input_ids": ids} for ids in batches[:2]]))
        assert all(state.observer is None for state in states(student).values())
    assert ranges[1] < 0.7 * ranges[0]
    assert reports[1].after.mean() < 0.9 * reports[1].before.mean()
    # what is reported is the error alone, and a bound that nothing reaches changes nothing
    assert torch.equal(reports[0].before, reports[1].before)
    assert torch.equal(reports[0].losses, reports[2].losses)


def test_masked_keys_count_on_demand(record):
    stock = tiny("bert", AutoModel)
    batches = padded_batches(stock)
    model = patch_model(copy.deepcopy(stock), layers=[0])
    calls = [(scores, torch.ones_like(keep), out) for scores, keep, out in record(stock, batches)[0]]
    with score_range_penalty(model, bound=1.5, masked=True) as found, torch.no_grad():
        for batch in batches:
            model(**batch)
        assert found.largest == pytest.approx(max(scores.abs().max().item() for scores, _, _ in calls), rel=1e-9)
        assert found.take().item() == pytest.approx(by_hand([calls], 1.5).item(), rel=1e-9)


def test_in_the_loops_of_the_recipes():
    """Their losses are sums and counts by row, which a step divides by all labels."""
    model = patched_tiny("bert", AutoModelForMaskedLM)

    def loss(model, batch):
        return model(**batch).logits.mean((1, 2)), torch.tensor([3.0, 5.0])

    batch = batch_for(model)
    sums, counts = loss(model, batch)
    with score_range_penalty(model, bound=1.5) as found:
        given, same = found.added_to(loss, weight=0.5)(model, batch)
        model(**batch)
        expected = found.take()
    assert torch.equal(same, counts)
    torch.testing.assert_close(given.sum() / 8, sums.sum() / 8 + 0.5 * expected)


def test_what_it_refuses():
    model = patched_tiny("bert", AutoModelForMaskedLM)
    with pytest.raises(ValueError, match="not patched"):
        score_range_penalty(tiny("bert"), 1.0)
    with pytest.raises(ValueError, match="bound must be positive"):
        score_range_penalty(model, 0.0)
    with pytest.raises(ValueError, match="of another model"):
        transfer_attention(
            copy.deepcopy(model),
            tiny("bert", AutoModelForMaskedLM),
            [token_ids()],
            penalty=score_range_penalty(model, 1),
        )
    with score_range_penalty(model, 1.0) as found:
        with pytest.raises(RuntimeError, match="call the model inside"):
            found.take()
        with pytest.raises(ValueError, match="being observed"), score_range_penalty(model, 1.0):
            pass
        # the inner one has not taken the outer one's place
        model(**batch_for(model))
        found.take()
    assert all(state.observer is None for state in states(model).values())
    model.bert.encoder.layer[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing"), score_range_penalty(model, 1.0):
        pass


def test_it_and_the_private_graph_exclude_each_other():
    model = patched_tiny("bert", AutoModel, poly={"normalization": 9})
    with (
        computing_privately(model),
        pytest.raises(ValueError, match="being observed"),
        score_range_penalty(model, 1.0),
    ):
        pass
    assert output(model).isfinite().all()
