"""Text to tokens to blocks, tokenizers without files, and the order of examples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_runs import write_text
from transformers import AutoTokenizer, BertConfig, GPT2Config

from hf_polyattn.training import data
from hf_polyattn.training.data import (
    load_rows,
    load_texts,
    next_token_batch,
    pack,
    packed_stream,
    split_from_end,
    stdlib_files,
    stdlib_texts,
    token_stream,
    tokenise,
    training_view,
)
from hf_polyattn.training.losses import IGNORE
from hf_polyattn.training.masking import masking_collator
from hf_polyattn.training.order import (
    Numbered,
    RandomWindows,
    Shuffled,
    evaluation_loader,
    first_inputs,
    training_loader,
)
from hf_polyattn.training.tokenizers import SPECIAL_TOKENS, byte_tokenizer, char_tokenizer, load_tokenizer
from hf_polyattn_arguments import TextArguments


def write_rows(path, count=10):
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(count)))
    return str(path)


def test_splits_of_local_files_are_refused(tmp_path):
    """They have none: validation would be the training rows."""
    path = write_rows(tmp_path / "a.jsonl")
    for name in ("validation_split", "train_split"):
        with pytest.raises(ValueError, match="is local and has no split 'test'.*validation_dataset"):
            load_texts(TextArguments(dataset=path, **{name: "test"}))
    other = write_rows(tmp_path / "b.jsonl", 3)
    train, validation = load_texts(TextArguments(dataset=path, validation_dataset=other))
    assert (len(train), len(validation)) == (10, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_on_the_hub(monkeypatch, streaming):
    """Their names, configurations and splits reach datasets.load_dataset as they were given."""
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        rows = Dataset.from_dict({"text": [f"{split} {i}" for i in range(20)]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(data, "load_dataset", load)
    arguments = {"dataset": "salesforce/wikitext", "dataset_config": "raw", "streaming": streaming}
    train, validation = load_texts(TextArguments(**arguments, validation_split="validation"))
    assert asked == [
        ("salesforce/wikitext", "raw", "train", streaming),
        ("salesforce/wikitext", "raw", "validation", False),
    ]
    assert next(iter(train))["text"] == "train 0"
    assert validation[0]["text"] == "validation 0"
    train, validation = load_texts(TextArguments(**arguments, validation_rows=4, validation_fraction=0.2))
    assert [row["text"] for row in validation] == [f"train {i}" for i in (range(4) if streaming else range(16, 20))]
    assert len(list(train)) == 16


def identity(rows):
    return rows


# tokenizers


@given(st.text())
@settings(max_examples=30, deadline=None)
def test_byte_tokens_are_the_bytes(text):
    tokenizer = byte_tokenizer()
    if any(token in text for token in SPECIAL_TOKENS.values()):
        return
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_character_tokens_are_sorted():
    tokenizer = char_tokenizer(["hello\n", "world é"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == sorted(set("hello\nworld é"))
    text = "llo wé\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(Exception, match="UNK"):
        tokenizer("x")
    open_to_all = char_tokenizer(["ab"], ["unk_token"])
    assert open_to_all("axb")["input_ids"] == [0, 2, 1]
    with pytest.raises(ValueError, match="got none"):
        char_tokenizer([])


@pytest.mark.parametrize("config", [GPT2Config(vocab_size=300), BertConfig()], ids=["gpt2", "bert"])
@pytest.mark.parametrize(
    "special", [("eos_token", "pad_token"), ("pad_token", "cls_token", "sep_token", "mask_token")]
)
def test_tokenizers_reload_beside_a_model(tmp_path, config, special):
    config.save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(special), char_tokenizer(["some text\n<"], special)):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        text = "to some  text\n"
        assert again(text).data == tokenizer(text).data
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
        assert [getattr(again, name + "_id") for name in special] == [
            getattr(tokenizer, name + "_id") for name in special
        ]
        assert len(again) == len(tokenizer)


def test_pairs_have_two_segments():
    encoded = byte_tokenizer(["cls_token", "sep_token"])("a", "b")
    assert encoded["input_ids"] == [256, 97, 257, 98, 257]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]


def test_loaded_tokenizer_without_what_a_job_needs(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    byte_tokenizer(["eos_token"]).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), special_tokens=["pad_token"]).pad_token == SPECIAL_TOKENS["eos_token"]
    with pytest.raises(ValueError, match="has no mask_token"):
        load_tokenizer(str(tmp_path), special_tokens=["mask_token"])


# sources


def test_a_place_without_a_tokenizer_is_named(tmp_path):
    for name in (None, ""):
        with pytest.raises(ValueError, match="a new model has no tokenizer of its own: set tokenizer to bytes"):
            load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "model")
    for folder in ("empty", "model"):
        with pytest.raises(ValueError, match=f"{folder} holds no tokenizer: set tokenizer to bytes"):
            load_tokenizer(str(tmp_path / folder))


def test_local_files(tmp_path):
    rows = [{"text": f"row {i}", "n": i} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"row {i},{i}\n" for i in range(10)))
    (tmp_path / "a.tsv").write_text("".join(f'row {i}\t"{i}\n' for i in range(10)))
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert load_rows(str(tmp_path / name))["text"][:] == [row["text"] for row in rows]
    quoted = load_rows(str(tmp_path / "a.tsv"), column_names=["text", "n"])
    assert quoted["n"][:2] == ['"0', '"1']
    with pytest.raises(ValueError, match="files of one kind"):
        load_rows(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load_rows("nowhere.txt")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("second\n")
    (folder / "a.txt").write_text("first\n\n line")
    assert load_rows(str(folder))["text"][:] == ["first\n\n line", "second\n"]


def test_split_from_the_end():
    one = Dataset.from_dict({"text": ["0123456789"]})
    train, validation = split_from_end(one, 0.2, "text")
    assert (train["text"][0], validation["text"][0]) == ("01234567", "89")
    train, validation = split_from_end(Dataset.from_dict({"text": list("0123456789")}), 0.2, "text")
    assert ("".join(train["text"]), "".join(validation["text"])) == ("01234567", "89")
    with pytest.raises(ValueError, match="too few"):
        split_from_end(Dataset.from_dict({"x": [1]}), 0.5)


def test_missing_column_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 4)
    with pytest.raises(ValueError, match=r"no column 'text': set text_column to one of \['body'\]"):
        load_texts(TextArguments(dataset=str(tmp_path / "a.jsonl")))


def test_standard_library_is_split_by_file_and_capped():
    files = stdlib_files(300_000)
    assert sum(len(source) for _, source in files) <= 300_000
    assert files == stdlib_files(300_000)
    # not the letters a to c
    assert len({path[0] for path, _ in files}) > 5
    train, validation = stdlib_texts(300_000, 0.2)
    sources = dict(files).values()
    assert sorted([*train["text"], *validation["text"]]) == sorted(sources)
    assert not set(train["text"]) & set(validation["text"])
    with pytest.raises(ValueError, match="raise stdlib_bytes"):
        stdlib_texts(300, 0.1)


# packing


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_each_token_is_predicted_once(lengths, block_size):
    texts = [chr(97 + i) * n for i, n in enumerate(lengths)]
    tokenizer = byte_tokenizer(["eos_token"])
    tokens = tokenise(Dataset.from_dict({"text": texts}), tokenizer)
    stream = token_stream(tokens)
    assert tokenizer.decode(stream) == "".join(text + "<|endoftext|>" for text in texts)
    count = (len(stream) - 1) // block_size
    if count == 0:
        with pytest.raises(ValueError, match="shorter than one block"):
            pack(tokens, block_size)
        return
    batch = next_token_batch(list(pack(tokens, block_size)))
    assert batch["labels"].flatten().tolist() == stream[1 : count * block_size + 1].tolist()
    assert batch["input_ids"].flatten().tolist() == stream[: count * block_size].tolist()


def test_stream_gives_the_same_blocks_as_packing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * 5}) + "\n" for i in range(20)))
    tokenizer = byte_tokenizer()
    packed = pack(tokenise(load_rows(str(path)), tokenizer), 16)["input_ids"][:]
    blocks = packed_stream(load_rows(str(path), streaming=True), tokenizer, 16, "text")
    assert [next(blocks) for _ in packed] == packed
    # and starts again
    assert next(blocks) == packed[0]


# order


def test_shuffled_sees_every_row_once_an_epoch():
    view = Shuffled(list(range(7)), seed=1)
    epochs = [[view[7 * epoch + i] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # any position can be asked for at any time
    assert view[3] == epochs[0][3]
    assert [Shuffled(list(range(7)), seed=2)[i] for i in range(7)] != epochs[0]


def test_random_windows_cover_the_stream():
    stream = np.arange(20, dtype=np.int32)
    view = RandomWindows(stream, 5, seed=0)
    windows = [view[i]["input_ids"] for i in range(400)]
    assert all((np.diff(window) == 1).all() and len(window) == 5 for window in windows)
    assert {window[0] for window in windows} == set(range(16))
    assert (view[7]["input_ids"] == windows[7]).all()
    with pytest.raises(ValueError, match="fewer than one window"):
        RandomWindows(stream, 21, seed=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_later_start_gives_the_same_batches(parts):
    view = Shuffled(list(range(10)), seed=3)

    def batches(first):
        return list(training_loader(view, 6, identity, first, 5, parts))

    assert sum(batches(2), []) == sum(batches(0), [])[12:]
    assert len(batches(0)) == 5 * parts
    # parts divide a step; they do not change what is in it
    assert sum(batches(0), []) == [view[i] for i in range(30)]


def test_calibration_reads_the_first_steps_in_as_many_parts_as_wanted():
    view = Shuffled([{"input_ids": [i, i + 1, i + 2]} for i in range(50)], seed=0)
    whole = torch.cat([b["input_ids"] for b in first_inputs(view, 8, next_token_batch, ["input_ids"], steps=3)])
    parts = [b["input_ids"] for b in first_inputs(view, 8, next_token_batch, ["input_ids"], steps=3, parts=4)]
    assert [len(part) for part in parts] == [2] * 12
    assert torch.equal(torch.cat(parts), whole)


def test_loaders_leave_the_random_state_alone():
    before = torch.get_rng_state()
    list(training_loader(Shuffled(list(range(10)), 0), 2, identity, 0, 2))
    list(evaluation_loader(list(range(10)), 4, identity))
    assert (torch.get_rng_state() == before).all()


def test_random_windows_ignore_epochs(tmp_path):
    args = TextArguments(dataset=str(write_text(tmp_path)), block_size=16, shuffle="random_windows")
    rows, _ = load_texts(args)
    view = training_view(rows, args, byte_tokenizer(), seed=0)
    assert len(view[10**6]["input_ids"]) == 17


# masking


def test_masks_depend_on_the_position_alone():
    tokenizer = byte_tokenizer(["pad_token", "cls_token", "sep_token", "mask_token"])
    rows = [{"input_ids": [257, *range(97, 117), 258]} for _ in range(400)]
    collate = masking_collator(tokenizer, seed=0, probability=0.2)
    view = Numbered(rows)
    batch = collate([view[i] for i in range(400)])
    again = collate([view[i] for i in (7, 3)])
    assert (again["input_ids"] == batch["input_ids"][[7, 3]]).all()
    assert (masking_collator(tokenizer, 1, 0.2)([view[0]])["labels"] != batch["labels"][:1]).any()

    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != IGNORE
    assert (batch["labels"][chosen] == original[chosen]).all()
    assert (batch["input_ids"][~chosen] == original[~chosen]).all()
    assert not chosen[:, [0, -1]].any()
    share = chosen[:, 1:-1].float().mean().item()
    assert share == pytest.approx(0.2, abs=0.02)
    masked = (batch["input_ids"] == tokenizer.mask_token_id)[chosen].float().mean().item()
    kept = (batch["input_ids"] == original)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.03)
    # random replacements are ordinary tokens
    replaced = chosen & (batch["input_ids"] != tokenizer.mask_token_id)
    assert batch["input_ids"][replaced].max() < 256


def test_mapping_is_cached(tmp_path):
    rows = load_dataset("text", data_files=str(write_text(tmp_path)), split="train")
    first = pack(tokenise(rows, byte_tokenizer()), 32)
    written = [Path(file["filename"]).stat().st_mtime_ns for file in first.cache_files]
    second = pack(tokenise(rows, byte_tokenizer()), 32)
    assert second.cache_files == first.cache_files
    assert [Path(file["filename"]).stat().st_mtime_ns for file in second.cache_files] == written
