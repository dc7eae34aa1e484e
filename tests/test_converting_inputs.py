"""What a conversion reads: lengths that the model has positions for, its own tokenizer, workers that load data."""

import json

import pytest
import torch
from models import HEADS, LAYERS, scale_attention, tiny, token_ids
from recipe_runs import recipe, write_text
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, RobertaConfig, RobertaModel

from hf_polyattn import register_architecture
from hf_polyattn.converting.tasks import TokenLoss, task_for
from hf_polyattn.positions import positions_of
from hf_polyattn.training.tokenizers import (
    SPECIAL_TOKENS,
    NoTokenizerError,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    own_tokenizer,
)
from hf_polyattn_stages import ConversionTextArguments

CALIBRATE = ("--stages", "calibrate", "--calibrate.batches", 1, "--batch_size", 4, "--validation_batches", 2)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path, 4_000)


def gpt2(folder, tokenizer, vocabulary=None):
    """A softmax checkpoint, with a tokenizer beside it where there is one."""
    torch.manual_seed(0)
    size = vocabulary or len(tokenizer)
    config = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=32, n_positions=32, vocab_size=size, eos_token_id=None)
    scale_attention(AutoModelForCausalLM.from_config(config), 8.0).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def convert(source, text, out, *extra):
    argv = ["--model", source, "--dataset", text, "--output_dir", out, *CALIBRATE, *extra]
    return recipe("convert").main(list(map(str, argv)))


def test_positions_behind_padding_hold_no_tokens(text, tmp_path, own_registry):
    """RoBERTa's first token has the position padding_idx + 1."""
    register_architecture("roberta", ["RobertaSelfAttention"], exist_ok=True)
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    config = RobertaConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        max_position_embeddings=34,
        vocab_size=len(tokenizer),
    )
    model = scale_attention(RobertaModel(config), 8.0).eval()
    assert positions_of(model) == 32
    model(input_ids=torch.full((1, 32), 40))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 40))
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{i}: a line of more than forty characters, to be cut\n" for i in range(40)))
    report = convert(tmp_path / "roberta", lines, tmp_path / "out")
    assert report.metric == "rank_agreement"
    with pytest.raises(ValueError, match="block_size 33 is more than the model's 32 positions"):
        convert(tmp_path / "roberta", lines, tmp_path / "out2", "--block_size", 33)


@pytest.mark.parametrize("family", [GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2)])
def test_positions_of_other_models_are_those_of_the_configuration(family):
    assert positions_of(AutoModel.from_config(family)) == 64


def test_workers_load_what_a_conversion_reads(text, tmp_path):
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(gpt2(tmp_path / "gpt2", tokenizer))
    found = []
    for workers in (0, 2):
        arguments = ConversionTextArguments(dataset=str(text), block_size=16, num_workers=workers)
        task = task_for(model, tokenizer, arguments, batch_size=4, validation_batches=2, seed=1)
        loader = task.batches(0, 3, 4)
        assert loader.num_workers == workers
        found.append([batch["input_ids"] for batch in loader])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_batches_without_a_masked_token_do_not_count():
    model = tiny("bert", AutoModelForMaskedLM, double=False)
    ids = token_ids()
    empty = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    batch = {"input_ids": ids, "labels": ids}
    assert TokenLoss(None, [empty, batch, empty], list).score(model) == TokenLoss(None, [batch], list).score(model)
    with pytest.raises(ValueError, match="no token of the held-out text is to be predicted"):
        TokenLoss(None, [empty], list).score(model)


def test_another_tokenizer_than_the_checkpoints_own_is_refused(text, tmp_path):
    """Its size alone does not show it."""
    characters = text.read_text()
    own = gpt2(tmp_path / "own", char_tokenizer([characters], ["eos_token"]), 300)
    with pytest.raises(ValueError, match=r"eos_token_id is None, its own \d+\. Leave --tokenizer out"):
        convert(own, text, tmp_path / "out", "--tokenizer", "chars", "--block_size", 16)
    plain = gpt2(tmp_path / "plain", char_tokenizer([characters]), 300)
    char_tokenizer([characters + "\t"]).save_pretrained(tmp_path / "shifted")
    with pytest.raises(ValueError, match="the text becomes other tokens"):
        convert(plain, text, tmp_path / "out", "--tokenizer", tmp_path / "shifted", "--block_size", 16)
    assert not (tmp_path / "out").exists()
    convert(plain, text, tmp_path / "out", "--tokenizer", "chars", "--block_size", 16)


def test_text_that_the_tokenizer_does_not_know_is_refused(text, tmp_path, capsys):
    known = char_tokenizer([text.read_text()], ["unk_token"])
    model = gpt2(tmp_path / "model", known)
    text.write_text(text.read_text() + "!")
    convert(model, text, tmp_path / "out", "--block_size", 16, "--validation_fraction", 0.2)
    assert "1 of the first 4,0" in capsys.readouterr().err
    text.write_text(text.read_text().upper())
    with pytest.raises(ValueError, match="tokens of the text are unknown to the tokenizer: name the tokenizer"):
        convert(model, text, tmp_path / "out2", "--block_size", 16)


def test_only_a_place_without_a_tokenizer_has_none(tmp_path):
    """A tokenizer that is there and cannot be read is told as what it is."""
    assert own_tokenizer(str(gpt2(tmp_path / "model", None, 100))) is None
    with pytest.raises(NoTokenizerError, match="model holds no tokenizer"):
        load_tokenizer(str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").write_text("{broken")
    with pytest.raises(json.JSONDecodeError):
        own_tokenizer(str(tmp_path / "model"))
    with pytest.raises(json.JSONDecodeError):
        load_tokenizer(str(tmp_path / "model"))


def test_a_hub_out_of_reach_is_not_a_checkpoint_without_a_tokenizer(monkeypatch):
    def refuse(*args, **options):
        raise OSError("we could not connect")

    monkeypatch.setattr("hf_polyattn.training.tokenizers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(OSError, match="could not connect"):
        own_tokenizer("somebody/model")
