"""Whatever way a sequence is fed in, whole, in pieces, padded, packed or as beams, the numbers are the same."""

import copy

import pytest
import torch
from models import LANGUAGE_MODELS, VOCAB, WIDTH, batch_for, patched_tiny, tiny, token_ids
from transformers import AutoModel, AutoModelForMaskedLM, DynamicCache, StaticCache

from hf_polyattn import ops, patch_model

RECIPES = {
    "poly-tiled": {"backend": "tiled"},
    "poly-naive": {"backend": "naive"},
    "square-length": {"activation": "monomial", "degree": 2, "normalization": "length"},
    "cube": {"activation": "monomial", "degree": 3},
    "l1": {"normalization": "l1"},
    "qk-norm": {"qk_norm": True, "normalization": "l2", "degree": 4},
    "part": {"layers": (0,), "heads": {0: (1, 2)}},
}
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
# greedy decoding goes on for as long as it is told to
NEW = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=[(f, r) for f in LANGUAGE_MODELS for r in RECIPES], ids="-".join)
def language_model(request):
    torch.manual_seed(0)
    family, recipe = request.param
    return patched_tiny(family, poly=RECIPES[recipe])


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def default_model(request):
    torch.manual_seed(0)
    return patched_tiny(request.param)


@torch.no_grad()
def in_pieces(model, ids, sizes, cache=None, **inputs):
    """Logits of a sequence fed in pieces of these sizes, the last one repeated until the end."""
    cache, logits, start = cache if cache is not None else DynamicCache(config=model.config), [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        piece = {k: v[:, : start + size] for k, v in inputs.items()}
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True, **piece)
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
def whole(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def patch_like(model, **options):
    """A copy with the same numbers and other options."""
    other = patch_model(copy.deepcopy(model), **options)
    other.load_state_dict(model.state_dict())
    return other


def padded(lengths, side, seed=0):
    """Ids and mask of sequences of several lengths in one batch, and the sequences alone."""
    alone = [token_ids(1, length, seed + i) for i, length in enumerate(lengths)]
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, sequence in enumerate(alone):
        span = slice(-sequence.shape[1], None) if side == "left" else slice(0, sequence.shape[1])
        ids[row, span], mask[row, span] = sequence[0], 1
    return ids, mask, alone


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


# whole against pieces


@pytest.mark.parametrize("sizes", [[1], [3], [5, 1], [8, 3]], ids=str)
def test_pieces_equal_the_whole(language_model, sizes):
    ids = token_ids(2, 11)
    assert torch.allclose(in_pieces(language_model, ids, list(sizes)), whole(language_model, ids), **TIGHT)


@pytest.mark.parametrize("sizes", [[11], [1], [6, 1], [4, 3]], ids=str)
@pytest.mark.parametrize("room", [11, 20])
def test_static_cache_equals_the_whole(language_model, sizes, room):
    ids = token_ids(2, 11)
    cache = StaticCache(config=language_model.config, max_cache_len=room)
    assert torch.allclose(in_pieces(language_model, ids, list(sizes), cache), whole(language_model, ids), **TIGHT)


@pytest.mark.parametrize("sizes", [[1], [3], [6, 1]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_pieces_equal_the_whole(default_model, sizes, kind):
    ids, mask, _ = padded([11, 7, 4], "left")
    cache = StaticCache(config=default_model.config, max_cache_len=16) if kind == "static" else None
    expected = whole(default_model, ids, attention_mask=mask, position_ids=torch.arange(11)[None])
    out = in_pieces(default_model, ids, list(sizes), cache, attention_mask=mask)
    assert torch.allclose(out[mask.bool()], expected[mask.bool()], **TIGHT)


def test_the_tiled_and_the_naive_form_agree(default_model, monkeypatch):
    calls = []
    tiled = ops.tiled_attention
    monkeypatch.setattr(ops, "tiled_attention", lambda *args, **kwargs: calls.append(1) or tiled(*args, **kwargs))
    ids, mask, _ = padded([11, 7, 4], "left")
    naive = patch_like(default_model, backend="naive")
    one = whole(naive, ids, attention_mask=mask)[mask.bool()]
    assert not calls
    other = whole(patch_like(naive, backend="tiled"), ids, attention_mask=mask)[mask.bool()]
    assert len(calls) == 2
    assert torch.allclose(one, other, **TIGHT)


@pytest.mark.parametrize("recipe", ["poly-tiled", "poly-naive", "cube", "qk-norm"])
def test_sliding_window(recipe):
    model = patched_tiny("mistral", poly=RECIPES[recipe])
    ids = token_ids(2, 14)
    expected = whole(model, ids)
    for sizes in ([1], [3], [6, 1], [9, 5]):
        assert torch.allclose(in_pieces(model, ids, list(sizes)), expected, **TIGHT), sizes
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert torch.allclose(in_pieces(model, ids, [5, 1], cache), expected, **TIGHT)
    # a window of 4 reaches 3 positions back in each of 2 layers
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 1) % VOCAB
    changed = (whole(model, other) - expected).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [3 <= position <= 9 for position in range(14)]


@pytest.mark.parametrize("recipe", ["poly-tiled", "cube"])
@pytest.mark.parametrize("family", ["gpt2-cross", "bert-cross"])
@torch.no_grad()
def test_pieces_with_cached_encoder_states_equal_the_whole(family, recipe):
    model = patched_tiny(family, poly=RECIPES[recipe])
    inputs = batch_for(model, length=9)
    ids = inputs.pop("input_ids")
    expected = model(ids, **inputs, use_cache=False).logits
    cache, logits = None, []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        out = model(ids[:, start:end], **inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert torch.allclose(torch.cat(logits, 1), expected, **TIGHT)


# generate


@torch.no_grad()
def greedy(model, ids, steps=8):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_generate_equals_the_full_pass_again_and_again(language_model):
    ids = token_ids(2, 6)
    expected = greedy(language_model, ids)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        out = language_model.generate(ids, attention_mask=torch.ones_like(ids), **NEW, **options)
        assert torch.equal(out, expected), options


def test_beam_search(language_model):
    ids = token_ids(2, 6)
    options = {
        **NEW,
        "num_beams": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "num_return_sequences": 3,
    }
    runs = [
        language_model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    for run in runs[1:]:
        assert torch.equal(run.sequences, runs[0].sequences)
        assert torch.allclose(run.sequences_scores, runs[0].sequences_scores, **TIGHT)
    # what the beams say of their own sequences is what the model says of them
    logits = whole(language_model, runs[0].sequences)[:, 5:-1].log_softmax(-1)
    per_new_token = logits.gather(-1, runs[0].sequences[:, 6:, None]).sum((1, 2)) / 8
    assert torch.allclose(runs[0].sequences_scores, per_new_token.float(), atol=1e-5)


def test_assisted_decoding_and_prompt_lookup(default_model):
    ids = token_ids(1, 6).repeat(1, 2)
    mask = torch.ones_like(ids)
    expected = greedy(default_model, ids)
    assistant = copy.deepcopy(default_model)
    with torch.no_grad():
        for name, tensor in assistant.state_dict().items():
            if "polyattn" in name:
                tensor.mul_(1.3)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        out = default_model.generate(ids, attention_mask=mask, **NEW, **options)
        assert torch.equal(out, expected), list(options)


def test_padded_batches_generate_what_single_sequences_do(default_model):
    ids, mask, alone = padded([9, 6, 3], "left")
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = default_model.generate(ids, attention_mask=mask, **NEW, **options)
        for row, sequence in enumerate(alone):
            assert torch.equal(out[row, -8:], greedy(default_model, sequence)[0, -8:]), (options, row)


# padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(language_model, side):
    ids, mask, alone = padded([9, 6, 3, 1], side)
    out = whole(language_model, ids, attention_mask=mask, position_ids=positions(mask))
    assert out.isfinite().all()
    for row, sequence in enumerate(alone):
        assert torch.allclose(out[row, mask[row].bool()], whole(language_model, sequence)[0], **TIGHT)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_an_encoder(recipe, side):
    model = patched_tiny("bert", AutoModelForMaskedLM, poly=RECIPES[recipe])
    ids, mask, alone = padded([9, 6, 3, 1], side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        for row, sequence in enumerate(alone):
            assert torch.allclose(out[row, mask[row].bool()], model(sequence).logits[0], **TIGHT)


@pytest.mark.parametrize("family", ["gpt2-cross", "bert-cross"])
@torch.no_grad()
def test_padding_of_encoder_states_changes_nothing(family):
    model = patched_tiny(family)
    inputs = batch_for(model, batch=1)
    expected = model(**inputs).logits
    states = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = torch.cat([states, torch.full((1, 3, WIDTH), 7.0, dtype=torch.float64)], 1)
    inputs["encoder_attention_mask"] = torch.tensor([[1] * 5 + [0] * 3])
    assert torch.allclose(model(**inputs).logits, expected, **TIGHT)
    ids = inputs.pop("input_ids")
    for length in (1, 4):
        assert torch.allclose(model(ids[:, :length], **inputs).logits, expected[:, :length], **TIGHT)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(family, recipe):
    model = patched_tiny(family, poly=RECIPES[recipe])
    _, _, alone = padded([5, 1, 7], "right")
    packed = torch.cat(alone, 1)
    position_ids = torch.cat([torch.arange(s.shape[1]) for s in alone])[None]
    expected = torch.cat([whole(model, s) for s in alone], 1)
    lengths = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    flash = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    for options in ({}, {"use_cache": False}, flash):
        # Transformers looks for packing only where there is no cache, and makes one unless told otherwise
        out = model(packed, position_ids=position_ids, **options)
        assert torch.allclose(out.logits, expected, **TIGHT), options
        assert out.past_key_values is None
    with pytest.raises(ValueError, match="pass position_ids that start at 0"):
        whole(model, packed, **flash)
    with pytest.raises(ValueError, match="only without a cache"):
        model(packed, position_ids=position_ids, use_cache=True)
    cached = model(packed, position_ids=torch.arange(13)[None])
    assert cached.past_key_values.get_seq_length() == 13


@pytest.mark.parametrize("family", ["bert", "bert-decoder"])
@torch.no_grad()
def test_packing_by_positions_is_refused_where_it_would_leak(family):
    model = patched_tiny(family, AutoModel)
    _, _, alone = padded([5, 1, 7], "right")
    packed = torch.cat(alone, 1)
    position_ids = torch.cat([torch.arange(s.shape[1]) for s in alone])[None]
    with pytest.raises(ValueError, match="BertModel does not keep packed sequences apart"):
        model(packed, position_ids=position_ids)
    starts = (position_ids[0] == 0).cumsum(0)
    keep = starts[:, None] == starts
    if family == "bert-decoder":
        keep = keep & torch.ones_like(keep).tril()
    out = model(packed, position_ids=position_ids, attention_mask=keep[None, None])[0]
    assert torch.allclose(out, torch.cat([model(s)[0] for s in alone], 1), **TIGHT)


# the future


@pytest.mark.parametrize("mask", [None, "left", "4-D"])
def test_no_position_sees_its_future(language_model, mask):
    model, length = language_model, 9
    embeddings = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = {}
    if mask == "left":
        inputs["attention_mask"] = torch.tensor([[1] * length, [0] * 3 + [1] * (length - 3)])
    elif mask == "4-D":
        inputs["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
    logits = model(inputs_embeds=embeddings, use_cache=False, **inputs).logits
    changed = embeddings.detach().clone()
    changed[:, 5:] += torch.randn_like(changed[:, 5:])
    with torch.no_grad():
        after = model(inputs_embeds=changed, use_cache=False, **inputs).logits
    assert torch.equal(logits[:, :5], after[:, :5])
    assert not torch.allclose(logits[:, 5:], after[:, 5:])
    (gradient,) = torch.autograd.grad(logits[:, 4].square().sum(), embeddings)
    assert (gradient[:, 5:] == 0).all()
    assert (gradient[0, :5].abs().amax(-1) > 0).all()


def test_an_encoder_sees_its_future():
    model = patched_tiny("bert", AutoModel)
    embeddings = torch.randn(1, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings)[0][:, 0].square().sum(), embeddings)
    assert (gradient.abs().amax(-1) > 0).all()


# masks that people make


def spellings(keep, dtype=torch.float64):
    zeros = torch.zeros(keep.shape, dtype=dtype)
    yield keep
    yield keep.long()
    for low in (
        -torch.inf,
        torch.finfo(dtype).min,
        torch.finfo(torch.float32).min,
        torch.finfo(torch.float16).min,
        -1e4,
    ):
        yield zeros.masked_fill(~keep, low)


@pytest.mark.parametrize(("family", "auto"), [("gpt2", AutoModel), ("llama", AutoModel), ("bert", AutoModel)])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_all_spellings_of_a_4d_mask_mean_the_same(family, auto, recipe):
    model = patched_tiny(family, auto, poly=RECIPES[recipe])
    ids = token_ids(2, 7)
    keep = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    # a row that may attend to nothing, and one that may to everything
    keep[0, 0, 2], keep[1, 0, 4] = False, True
    outputs = [model(ids, attention_mask=mask)[0] for mask in spellings(keep)]
    assert outputs[0].isfinite().all()
    for out in outputs[1:]:
        assert torch.equal(out, outputs[0])
    assert not torch.allclose(outputs[0], model(ids)[0])
    one_by_one = torch.cat([model(ids[i : i + 1], attention_mask=keep[i : i + 1])[0] for i in range(2)])
    assert torch.allclose(one_by_one, outputs[0], **TIGHT)


def test_a_float_mask_may_be_a_bias_on_the_scores():
    stock, model = tiny("gpt2"), patch_model(tiny("gpt2"), "softmax")
    model.load_state_dict(stock.state_dict(), strict=False)
    bias = torch.randn(1, 1, 7, 7, dtype=torch.float64)
    bias = bias.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    for mask in (bias, bias.expand(2, 4, 7, 7)):
        one, other = (whole(m, token_ids(2, 7), attention_mask=mask) for m in (stock, model))
        assert torch.allclose(one, other, **TIGHT)
    poly = patched_tiny("gpt2", poly={"normalization": "length"})
    plain = bias.masked_fill(bias.isfinite(), 0)
    assert not torch.allclose(*(whole(poly, token_ids(2, 7), attention_mask=mask) for mask in (bias, plain)))


# against the masks of stock models: with the softmax activation every number must be theirs


def twins(family, auto=None, **poly):
    stock = tiny(family, *([auto] if auto else []))
    model = patch_model(copy.deepcopy(stock), "softmax", **poly)
    return stock, model


@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, "mistral"])
@pytest.mark.parametrize("poly", [{}, {"layers": (0,)}, {"heads": {0: (2,), 1: (0, 3)}}], ids=str)
def test_softmax_through_the_seam_is_stock_softmax(family, poly):
    stock, model = twins(family, **poly)
    ids, mask, _ = padded([9, 6, 3], "left")
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])}
    for name, inputs in {
        "plain": {},
        "padded": {"attention_mask": mask},
        "packed": packed if "bert" not in family else {},
        "bidirectional": {"is_causal": False} if family == "llama" else {},
    }.items():
        one, other = (whole(m, ids, **inputs) for m in (stock, model))
        real = mask.bool() if name == "padded" else torch.ones_like(mask).bool()
        assert torch.allclose(one[real], other[real], **TIGHT), name
    for sizes in ([1], [5, 2]):
        one, other = (in_pieces(m, ids, list(sizes), attention_mask=mask) for m in (stock, model))
        assert torch.allclose(one[mask.bool()], other[mask.bool()], **TIGHT), sizes
    one, other = (m.generate(ids, attention_mask=mask, **NEW) for m in (stock, model))
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["bert", "gpt2-cross", "bert-cross"])
@torch.no_grad()
def test_softmax_through_the_seam_is_stock_softmax_outside_causal_models(family):
    stock, model = twins(family, AutoModel)
    inputs = batch_for(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 6:] = 0
    variants = [{}, {"attention_mask": mask}, {"token_type_ids": token_ids(2, 9, 5) % 2}]
    if "cross" in family:
        variants.append({"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])})
    for more in variants:
        one, other = (m(**inputs, **more)[0] for m in (stock, model))
        assert torch.allclose(one, other, **TIGHT), list(more)


def test_a_decoder_may_be_made_bidirectional():
    """`config.is_causal = False` turns a language model into an encoder; every position then sees all others."""
    stock = tiny("llama", AutoModel)
    stock.config.is_causal = False
    softmax, model = patch_model(copy.deepcopy(stock), "softmax"), patch_model(copy.deepcopy(stock))
    ids, mask, alone = padded([9, 6], "right")
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            one, other = (m(ids, use_cache=False, **inputs)[0] for m in (stock, softmax))
            assert torch.allclose(one, other, **TIGHT)
        out = model(ids, attention_mask=mask, use_cache=False)[0]
        assert torch.allclose(out[1, :6], model(alone[1], use_cache=False)[0][0], **TIGHT)
    embeddings = torch.randn(1, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    out = model(inputs_embeds=embeddings, use_cache=False)[0]
    (gradient,) = torch.autograd.grad(out[:, 0].square().sum(), embeddings)
    assert (gradient.abs().amax(-1) > 0).all()
