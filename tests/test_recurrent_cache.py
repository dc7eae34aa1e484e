"""Decoding with sums in place of keys and values: the numbers of the full pass, at a size that stays the same."""

import copy

import pytest
import torch
from models import LANGUAGE_MODELS, patched_tiny, tiny, token_ids
from test_generation import NEW, TIGHT, greedy, in_pieces, padded, patch_like, whole
from transformers import DynamicCache

from hf_polyattn import RecurrentCache
from hf_polyattn.recurrent_layer import KeysWithPast, RecurrentLayer

RECIPES = {
    "degree-2": {"degree": 2},
    "degree-1": {"degree": 1, "normalization": "none"},
    "cube": {"activation": "monomial", "degree": 3},
    "square-sum": {"activation": "monomial", "degree": 2, "normalization": "sum"},
    "qk-norm": {"degree": 2, "qk_norm": True, "normalization": 3.0, "learn_affine": True, "learn_gain": True},
    "first-layer": {"degree": 2, "layers": (0,)},
    "second-layer": {"degree": 2, "layers": (1,)},
}
# from the first call on; in the middle of the sequences here
SWITCHES = [0, 5]


@pytest.fixture(scope="module", params=[(f, r) for f in LANGUAGE_MODELS for r in RECIPES], ids="-".join)
def language_model(request):
    torch.manual_seed(0)
    family, recipe = request.param
    return patched_tiny(family, poly=RECIPES[recipe])


@pytest.fixture(
    scope="module", params=[(f, r) for f in LANGUAGE_MODELS for r in ("degree-2", "second-layer")], ids="-".join
)
def some_model(request):
    torch.manual_seed(0)
    family, recipe = request.param
    return patched_tiny(family, poly=RECIPES[recipe])


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def default_model(request):
    torch.manual_seed(0)
    return patched_tiny(request.param, poly={"degree": 2})


@pytest.mark.parametrize("switch_at", SWITCHES)
@pytest.mark.parametrize("sizes", [[1], [4, 3], [6, 1], [11]], ids=str)
def test_pieces_equal_the_whole(language_model, sizes, switch_at):
    ids = token_ids(2, 11)
    cache = RecurrentCache(language_model, switch_at=switch_at)
    out = in_pieces(language_model, ids, list(sizes), cache)
    assert torch.allclose(out, whole(language_model, ids), **TIGHT)
    assert cache.get_seq_length() == 11
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    assert {layer.is_summed for layer in layers} == {True}


@pytest.mark.parametrize("switch_at", SWITCHES)
@pytest.mark.parametrize("sizes", [[1], [3], [6, 1], [11]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_pieces_equal_the_whole(some_model, sizes, side, switch_at):
    """Rows of a batch keep different numbers of keys; those of right padding follow in the middle."""
    ids, mask, _ = padded([11, 7, 4], side)
    inputs = {"attention_mask": mask}
    expected = whole(some_model, ids, **inputs, position_ids=torch.arange(11)[None])
    cache = RecurrentCache(some_model, switch_at=switch_at)
    out = in_pieces(some_model, ids, list(sizes), cache, **inputs)
    assert torch.allclose(out[mask.bool()], expected[mask.bool()], **TIGHT)
    summed = next(layer for layer in cache.layers if isinstance(layer, RecurrentLayer))
    assert summed.past.lengths.tolist() == [11, 7, 4]


@pytest.mark.parametrize("switch_at", SWITCHES)
def test_generate_equals_the_full_pass(language_model, switch_at):
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    for options in ({}, {"prefill_chunk_size": 4}):
        cache = RecurrentCache(language_model, switch_at=switch_at)
        out = language_model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW, **options)
        assert torch.equal(out, greedy(language_model, ids)), options
    # the cache goes on where it stopped
    more = language_model.generate(out, attention_mask=torch.ones_like(out), past_key_values=cache, **NEW)
    assert torch.equal(more, greedy(language_model, out))


@pytest.mark.parametrize("switch_at", [0, 8])
def test_padded_batches_generate_what_single_sequences_do(default_model, switch_at):
    ids, mask, alone = padded([9, 6, 3], "left")
    cache = RecurrentCache(default_model, switch_at=switch_at)
    out = default_model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
    for row, sequence in enumerate(alone):
        assert torch.equal(out[row, -8:], greedy(default_model, sequence)[0, -8:]), row


@pytest.mark.parametrize("switch_at", [0, 9])
def test_beam_search(language_model, switch_at):
    """Beams that are dropped and doubled take their sums with them, padded rows included."""
    ids, mask, _ = padded([6, 4], "left")
    options = {
        **NEW,
        "num_beams": 3,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = language_model.generate(ids, attention_mask=mask, **options)
    cache = RecurrentCache(language_model, switch_at=switch_at)
    got = language_model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.allclose(got.sequences_scores, expected.sequences_scores, **TIGHT)


def test_the_size_stays_the_same():
    """2,000 tokens, after which the recurrent cache holds what it held at the start; an ordinary one grows."""
    torch.manual_seed(0)
    model = patched_tiny("llama", poly={"degree": 2}, max_position_embeddings=4096)
    ids = token_ids(1, 2001)
    cache, sizes = RecurrentCache(model, switch_at=0), []
    with torch.no_grad():
        for start in (*range(0, 1900, 100), *range(1900, 2000)):
            end = start + (100 if start < 1900 else 1)
            logits = model(ids[:, start:end], past_key_values=cache).logits
            sizes.append(cache.nbytes)
        assert torch.allclose(logits[:, -1], model(ids[:, :2000]).logits[:, -1], **TIGHT)
    features, key_heads, dim = 1 + 8 + 36, 2, 8
    assert set(sizes) == {2 * (8 * key_heads * features * dim + 8)}
    ordinary = DynamicCache(config=model.config)
    whole_cache = RecurrentCache(model, switch_at=10_000)
    for c in (ordinary, whole_cache):
        with torch.no_grad():
            model(ids[:, :2000], past_key_values=c)
    assert whole_cache.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in ordinary.layers)
    assert whole_cache.nbytes > 10 * sizes[0]


def test_auto_switches_where_sums_take_less_memory(default_model):
    cache = RecurrentCache(default_model)
    # 45 features by 8, or 16 numbers a token, all in fp64
    assert cache.switch_at == 23
    ids = token_ids(1, 24)
    sizes = {}
    with torch.no_grad():
        for i in range(24):
            default_model(ids[:, i : i + 1], past_key_values=cache)
            sizes[i + 1] = cache.nbytes
    assert sizes[22] == 22 * sizes[1]
    assert sizes[23] == sizes[24] < 23 * sizes[1]


def test_a_half_precision_model_keeps_sums_in_fp32():
    torch.manual_seed(0)
    model = patched_tiny("llama", poly={"degree": 2}, factor=4.0)
    ids = token_ids(2, 12)
    exact, model = whole(model, ids), model.bfloat16()
    cache = RecurrentCache(model, switch_at=0)
    out = in_pieces(model, ids, [1], cache)
    assert out.dtype == torch.bfloat16
    assert cache.layers[0].past.sums.dtype == torch.float32
    rounding = (in_pieces(model, ids, [1]) - exact).norm()
    assert (out - exact).norm() < 1.2 * rounding


# what a Transformers cache can do


@torch.no_grad()
def test_batches_can_be_repeated_selected_and_copied(default_model):
    model = default_model
    ids, mask, _ = padded([8, 5], "left")
    for switch_at in (0, 100):
        cache = RecurrentCache(model, switch_at=switch_at)
        in_pieces(model, ids, [8], cache, attention_mask=mask)
        before = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        next_ids = token_ids(2, 1, seed=5)
        longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
        got = model(next_ids, past_key_values=cache, attention_mask=longer.flip(0)).logits
        expected = model(next_ids.flip(0), past_key_values=before, attention_mask=longer).logits.flip(0)
        assert torch.allclose(got, expected, **TIGHT)
        assert before.get_seq_length() == cache.get_seq_length() == 9


@torch.no_grad()
def test_reset_starts_anew_with_another_batch(default_model):
    for switch_at in (0, 100):
        cache = RecurrentCache(default_model, switch_at=switch_at)
        in_pieces(default_model, token_ids(2, 9), [9], cache)
        cache.reset()
        assert cache.get_seq_length() == cache.nbytes == 0
        ids = token_ids(3, 7)
        assert torch.allclose(in_pieces(default_model, ids, [3, 1], cache), whole(default_model, ids), **TIGHT)


def test_a_sum_cannot_forget(default_model):
    ids = token_ids(1, 6)
    cache = RecurrentCache(default_model, switch_at=0)
    assert not cache.is_croppable
    assert not cache.is_compileable
    in_pieces(default_model, ids, [6], cache)
    cache.crop(0)
    with pytest.raises(RuntimeError, match="cannot forget some of them: use an ordinary DynamicCache"):
        cache.crop(-1)
    options = {"past_key_values": RecurrentCache(default_model), "prompt_lookup_num_tokens": 3}
    with pytest.raises(RuntimeError, match="as assisted decoding and prompt lookup do"):
        default_model.generate(ids, attention_mask=torch.ones_like(ids), **NEW, **options)


# what it refuses


@pytest.mark.parametrize(
    ("family", "poly", "message"),
    [
        ("gpt2", {"normalization": "l2"}, 'under normalization "l2", the squares .* "length"'),
        ("gpt2", {"normalization": "l1"}, "absolute values do not factor"),
        ("llama", {"activation": "relu"}, "relu is not a polynomial"),
        ("gpt2", {"heads": {1: (0, 2)}}, r"layer 1 .* its heads \[1, 3\] are softmax"),
        ("mistral", {}, "it has a sliding window, and sums cannot forget"),
        ("gpt2-cross", {}, "decoders without cross-attention"),
        ("bert", {}, "layer 0 cannot keep sums: it is not causal"),
    ],
)
def test_models_that_do_not_qualify(family, poly, message):
    from transformers import AutoModel

    degree = {} if "activation" in poly else {"degree": 2}
    model = patched_tiny(family, *([AutoModel] if family == "bert" else []), poly={**degree, **poly})
    with pytest.raises(ValueError, match=message):
        RecurrentCache(model)


def test_a_stock_model_is_refused():
    with pytest.raises(ValueError, match=r"was never patched: call patch_model\(model, degree=2\) first"):
        RecurrentCache(tiny("gpt2"))


def test_the_cache_of_another_model_is_noticed(default_model):
    """Softmax would attend to the newest keys alone, and nobody would see it."""
    ids = token_ids(1, 5)
    family = default_model.config.model_type.removeprefix("polyattn_")
    stock = tiny("bert-decoder" if family == "bert" else family)
    with torch.no_grad(), pytest.raises(RuntimeError, match="read by something other than polynomial attention"):
        stock(ids, past_key_values=RecurrentCache(default_model))
    cache = RecurrentCache(default_model)
    changed = patch_like(default_model, degree=2, normalization=2.0)
    with torch.no_grad(), pytest.raises(ValueError, match="patched anew since its RecurrentCache was made"):
        changed(ids, past_key_values=cache)


def test_large_sums_are_refused_with_the_numbers():
    model = patched_tiny("llama", poly={"degree": 3}, head_dim=64, double=False)
    assert RecurrentCache(model).switch_at == 23_953
    with pytest.raises(ValueError, match="47,905 features of 11.7 MiB a head .* 100 tokens: .* 23,953 at least"):
        RecurrentCache(model, switch_at=100)
    with pytest.raises(ValueError, match='switch_at must be "auto" or a number of tokens, got -1'):
        RecurrentCache(model, switch_at=-1)


def test_gradients_are_refused(default_model):
    cache = RecurrentCache(default_model, switch_at=0)
    ids = token_ids(1, 5)
    with torch.no_grad():
        default_model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"decode under torch.no_grad\(\)"):
        default_model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_masks_that_sums_cannot_honour(default_model):
    ids = token_ids(1, 6)
    some = torch.ones(6, 6, dtype=torch.bool).tril()
    some[4, 1] = False
    with pytest.raises(ValueError, match="the keys cannot be summed up: its rows differ"):
        default_model(ids, attention_mask=some[None, None], past_key_values=RecurrentCache(default_model, switch_at=0))
    cache = RecurrentCache(default_model, switch_at=0)
    default_model(ids, past_key_values=cache)
    late = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    expected = default_model(ids[:, :1], attention_mask=late, past_key_values=copy.deepcopy(cache)).logits
    late[..., 2] = False
    with pytest.raises(ValueError, match="the mask hides keys that earlier rows attended to"):
        default_model(ids[:, :1], attention_mask=late, past_key_values=copy.deepcopy(cache))
    assert torch.allclose(default_model(ids[:, :1], past_key_values=cache).logits, expected, **TIGHT)


@torch.no_grad()
def test_weights_of_the_past_are_refused(default_model):
    cache = RecurrentCache(default_model, switch_at=0)
    default_model(token_ids(1, 6), past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions needs an ordinary cache"):
        default_model(token_ids(1, 1), past_key_values=cache, output_attentions=True)


def test_keys_with_past_say_their_shape_and_nothing_else():
    keys = KeysWithPast.of(torch.randn(1, 2, 3, 4), None)
    assert keys.shape == (1, 2, 3, 4)
    assert keys.dtype == torch.float32
    assert keys.device.type == "cpu"
    for read in (lambda: keys + 1, lambda: keys[:, :1], lambda: keys.transpose(1, 2), lambda: torch.cat([keys, keys])):
        with pytest.raises(RuntimeError, match="DynamicCache"):
            read()
