"""`hf-polyattn patch` with what is not the checkpoint's own."""

import json

from cli_runs import TEXT, run, save, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_polyattn.training.tokenizers import byte_tokenizer


def test_a_tokenizer_may_come_from_elsewhere(tmp_path, capsys):
    stock, bare, text = save(tmp_path / "stock"), tmp_path / "bare", write(tmp_path / "text.txt", TEXT * 8)
    AutoModelForCausalLM.from_pretrained(stock).save_pretrained(bare)
    code, _, error = run(capsys, "patch", bare, "--to", tmp_path / "out", "--calibrate", text)
    assert (code, "name it with --tokenizer" in error) == (1, True)
    words = ("--calibrate", text, "--tokenizer", stock, "--json")
    code, said, error = run(capsys, "patch", bare, "--to", tmp_path / "out", *words)
    assert code == 0, error
    assert json.loads(said)["tokenizer"] is True
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("hi").input_ids
        == AutoTokenizer.from_pretrained(stock)("hi").input_ids
    )
    large = byte_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(9)])
    large.save_pretrained(tmp_path / "large")
    code, _, error = run(capsys, "patch", bare, "--to", tmp_path / "two", "--tokenizer", tmp_path / "large")
    assert (code, "the tokenizer has 267 tokens" in error) == (1, True)
