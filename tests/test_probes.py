"""Probes of recall, against models whose recall is known: one that copies what followed before, and one that knows
nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from models import VOCAB, tiny
from torch import nn
from transformers import RobertaConfig, RobertaForCausalLM

from hf_polyattn.evaluation import difference
from hf_polyattn.evaluation.probes import passkey, repeated_tokens
from hf_polyattn.training.tokenizers import byte_tokenizer


class Copier(nn.Module):
    """Says what followed the last `reach` tokens when they stood before, with a logit of 50; else all are alike."""

    def __init__(self, vocabulary, reach, positions=None):
        super().__init__()
        self.reach = reach
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=positions, eos_token_id=0)

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(self.reach, len(ids)):
                suffix = ids[end + 1 - self.reach : end + 1]
                before = [t for t in range(self.reach - 1, end) if ids[t + 1 - self.reach : t + 1] == suffix]
                if before:
                    logits[row, end, ids[before[-1] + 1]] = 50
        return SimpleNamespace(logits=logits)


def values(found):
    return {name: score.value for name, score in found.scores.items()}


def test_a_model_that_copies_knows_the_second_copy():
    # two tokens of a thousand hardly ever come twice by chance
    found = values(repeated_tokens(Copier(1000, reach=2), 20, samples=8))
    assert found["first copy"] == pytest.approx(math.log(1000))
    # the first of the 19 that count has a single token of the copy before it
    assert found["accuracy"] == pytest.approx(18 / 19)
    assert found["second copy"] == pytest.approx(math.log(1000) / 19)


def test_a_model_that_knows_nothing_is_at_chance_in_both():
    found = values(repeated_tokens(Copier(1000, reach=99), 20, samples=8))
    assert found["first copy"] == found["second copy"] == pytest.approx(math.log(1000))
    assert found["accuracy"] < 0.05


def test_tokens_are_plain_and_the_same_for_all_models():
    seen = []

    class Watched(Copier):
        def forward(self, input_ids):
            seen.append(input_ids)
            return super().forward(input_ids)

    for reach in (1, 3):
        repeated_tokens(Watched(3, reach), 16, samples=4)
    # 0 is the end token
    assert set(seen[0].unique().tolist()) == {1, 2}
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    assert torch.equal(seen[0][:, :16], seen[0][:, 16:])


def test_a_key_that_was_stated_is_named():
    tokenizer = byte_tokenizer()
    found = values(passkey(Copier(len(tokenizer), reach=11), tokenizer, 160, samples=8))
    # it insists on the first letter that the text states; after another one nothing stood before
    unseen = (50 + 3 * math.log(len(tokenizer))) / 4
    assert found == {"key": pytest.approx(0, abs=1e-9), "unseen key": pytest.approx(unseen, abs=0.01), "accuracy": 1}
    found = values(passkey(Copier(len(tokenizer), reach=200), tokenizer, 160, samples=8))
    assert found["key"] == found["unseen key"] == pytest.approx(math.log(len(tokenizer)))
    assert found["accuracy"] == 0


def test_a_key_counts_when_all_of_it_is_right():
    class FirstLetterOnly(Copier):
        def forward(self, input_ids):
            logits = super().forward(input_ids).logits
            logits[:, -4:-1] = 0
            return SimpleNamespace(logits=logits)

    tokenizer = byte_tokenizer()
    found = values(passkey(FirstLetterOnly(len(tokenizer), reach=11), tokenizer, 160, samples=8))
    assert found["key"] == pytest.approx(3 / 4 * math.log(len(tokenizer)))
    assert found["accuracy"] == 0


def test_texts_have_the_length_that_was_asked_for():
    lengths = set()

    class Watched(Copier):
        def forward(self, input_ids):
            lengths.add(input_ids.shape[1])
            return super().forward(input_ids)

    tokenizer = byte_tokenizer()
    passkey(Watched(len(tokenizer), 11), tokenizer, 64, samples=2)
    passkey(Watched(len(tokenizer), 11), tokenizer, 100, samples=2)
    assert lengths == {64, 100}
    with pytest.raises(ValueError, match="raise length 20"):
        passkey(Copier(len(tokenizer), 11), tokenizer, 20)


def test_positions_are_checked():
    with pytest.raises(ValueError, match="64 positions: lower the 80 tokens"):
        repeated_tokens(tiny("gpt2", double=False), 40)
    with pytest.raises(ValueError, match="2 tokens or more, got 1"):
        repeated_tokens(tiny("gpt2", double=False), 1)


def test_positions_behind_padding_hold_no_tokens():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=VOCAB, max_position_embeddings=34, is_decoder=True, **sizes)
    model = RobertaForCausalLM(config).eval()
    repeated_tokens(model, 16, samples=1)
    with pytest.raises(ValueError, match="32 positions: lower the 34 tokens"):
        repeated_tokens(model, 17, samples=1)


def test_two_models_are_paired_and_keep_their_mode():
    model = tiny("gpt2", double=False).train()
    first = repeated_tokens(model, 16, samples=8)
    assert model.training
    assert values(first)["first copy"] == pytest.approx(math.log(VOCAB), rel=0.5)
    again = difference(first, repeated_tokens(model, 16, samples=8))
    assert all((score.value, score.standard_error) == (0, 0) for score in again.values())
