"""The studies of recall, length, stability and ListOps: their data, against what is asked; that divergence is a row;
that their short forms run; that the committed tables are those of the committed rows."""

import csv
import itertools
import random
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import tiny
from recipe_runs import RECIPES, recipe, write_text

from hf_polyattn import patch_model
from hf_polyattn.training.losses import IGNORE
from hf_polyattn.training.nonfinite import NonFiniteError
from hf_polyattn.training.tokenizers import byte_tokenizer

RESULTS = RECIPES / "results"


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def recall():
    return recipe("study_recall")


@pytest.fixture
def listops():
    return recipe("study_listops")


@pytest.fixture
def length():
    return recipe("study_length")


@pytest.fixture
def stability():
    return recipe("study_stability")


def drawn(recall, task, length=64, pairs=8):
    return recall.TASKS[task](torch.Generator().manual_seed(0), 32, length, pairs)


def test_copies_of_a_pattern_follow_from_what_came_before(recall):
    tokens, labels = drawn(recall, "induction")
    periods = set()
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        period = next(p for p in range(1, 64) if row[p:] == row[:-p])
        periods.add(period)
        assert wanted == [IGNORE] * period + row[period + 1 :] + [IGNORE]
    # no single distance does
    assert len(periods) > 8
    assert min(periods) >= 16
    assert max(periods) <= 32


def test_the_passkey_is_the_value_behind_the_mark(recall):
    tokens, labels = drawn(recall, "passkey")
    places = set()
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row.count(recall.MARK) == 2
        assert wanted[:-1] == [IGNORE] * 63
        assert wanted[-1] == row[row.index(recall.MARK) + 1]
        places.add(row.index(recall.MARK))
    assert len(places) > 16


def test_every_key_is_asked_once_and_has_the_value_of_its_pair(recall):
    tokens, labels = drawn(recall, "recall")
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        asked = {row[i]: wanted[i] for i in range(64) if wanted[i] != IGNORE}
        assert asked == pairs
        assert row[16:].count(recall.BLANK) == 64 - 16 - 8
        assert wanted[:16] == [IGNORE] * 16
    assert ("recall", 32, 16) not in recall.settings_of((32, 64))
    assert ("recall", 64, 16) in recall.settings_of((32, 64))


def small(recall, steps=9):
    model, optimization = recall.build("poly", 1, 16, 32, steps)
    return model, optimization, recall.settings_of((32,))


def test_a_run_ends_when_every_task_is_solved(recall, monkeypatch):
    monkeypatch.setattr(recall, "WINDOW", 2)
    assert recall.train(*small(recall), 64)[1:] == (9, "")
    monkeypatch.setattr(recall, "SOLVED", 0)
    assert recall.train(*small(recall), 64)[1:] == (6, "")


def test_recall_that_diverges_is_a_row_without_accuracy(recall, monkeypatch, tmp_path):
    monkeypatch.setattr(recall, "token_losses", lambda logits, labels: (logits.sum((1, 2)) * torch.nan, labels.sum(1)))
    args = SimpleNamespace(lengths=[32], steps=5, width=16, tokens=64, samples=4)
    rows = recall.run("poly", 1, args)
    assert {(row["steps"], row["note"], row["accuracy"]) for row in rows} == {(1, "diverged at step 1", "")}
    recall.append(tmp_path / "r.csv", rows)
    assert "| degree 3, defaults | diverged at step 1 |" in recall.table(rows_in(tmp_path / "r.csv"))
    recall.draw(rows_in(tmp_path / "r.csv"), tmp_path / "r.png")


@pytest.mark.slow
def test_recall_in_short(recall, tmp_path, capsys, monkeypatch):
    out = tmp_path / "recall.csv"
    words = ["--quick", "--only", "softmax", "monomial-mean", "--out", str(out)]
    recall.main(words)
    rows = rows_in(out)
    assert {(row["task"], row["attention"]) for row in rows} == {
        (task, name) for task in recall.TASKS for name in ("softmax", "monomial-mean")
    }
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["loss"]) > 0 for row in rows)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "**recall**, accuracy by length:" in capsys.readouterr().out
    # what is done is not done again
    monkeypatch.setattr(recall, "run", lambda *args: pytest.fail("a finished run was repeated"))
    recall.main(words)
    assert rows_in(out) == rows


def test_checkpoints_are_probed_once_each(recall, tmp_path, capsys, monkeypatch):
    tokenizer = byte_tokenizer()
    for name in ("teacher", "student"):
        model = tiny("gpt2", double=False, vocab_size=len(tokenizer))
        patch_model(model, degree=3) if name == "student" else None
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    out = tmp_path / "probed.csv"
    words = ["--checkpoint", str(tmp_path / "teacher"), str(tmp_path / "student"), "--out", str(out)]
    recall.main([*words, "--lengths", "64", "128", "--samples", "4"])
    rows = rows_in(out)
    # 128 tokens are more than its positions
    assert [(row["checkpoint"], row["probe"], row["length"]) for row in rows] == [
        (name, probe, "64") for name in ("teacher", "student") for probe in ("repeated tokens", "passkey")
    ]
    assert str(tmp_path) not in out.read_text()
    assert "| repeated tokens, 64 | student |" in capsys.readouterr().out
    monkeypatch.setattr(recall, "probe", lambda *args: pytest.fail("a finished probe was repeated"))
    recall.main([*words, "--lengths", "64"])


def test_a_probe_longer_than_the_model_says_so(recall, tmp_path):
    tokenizer = byte_tokenizer()
    tiny("gpt2", double=False, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="64 positions: name --lengths of at most that"):
        recall.probe(str(tmp_path), None, [128], 4)


def value_of(tokens):
    """The value of an expression, by a stack."""
    stack = []
    for token in tokens:
        stack.append(int(token) if token.isdigit() else token)
        if token == "]":
            start = max(i for i, entry in enumerate(stack[:-1]) if isinstance(entry, str))
            operator, *values = stack[start:-1]
            middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
            found = {"[MIN": min(values), "[MAX": max(values), "[SM": sum(values) % 10}
            stack[start:] = [found.get(operator, sum(middle) // len(middle))]
    return stack[0]


def test_values_of_expressions(listops):
    assert value_of(["[MAX", "4", "[MIN", "7", "2", "]", "[SM", "8", "9", "]", "]"]) == 7
    assert value_of(["[MED", "1", "4", "8", "9", "]"]) == 6
    found = list(itertools.islice(listops.expressions(0, 20, 60), 300))
    assert all(value_of(tokens) == value for tokens, value in found)
    assert all(20 <= len(tokens) <= 60 for tokens, _ in found)
    assert {token for tokens, _ in found for token in tokens} == set(listops.CHARACTERS)
    # of so short ones some come twice
    short = [" ".join(tokens) for tokens, _ in itertools.islice(listops.expressions(0, 4, 5), 300)]
    assert len(set(short)) == 300


def test_giving_up_early_does_not_change_the_distribution(listops):
    """Against expressions that are drawn to their end and refused afterwards."""
    generator = random.Random(1)

    def whole(depth=1):
        if depth >= 10 or generator.random() > 0.25:
            return [str(generator.randrange(10))]
        operator = generator.choice(["[MIN", "[MAX", "[MED", "[SM"])
        return [operator, *(t for _ in range(generator.randint(2, 10)) for t in whole(depth + 1)), "]"]

    complete = []
    while len(complete) < 800:
        tokens = whole()
        if 10 <= len(tokens) <= 40:
            complete.append(tokens)
    early = [tokens for tokens, _ in itertools.islice(listops.expressions(0, 10, 40), 800)]
    for measure in (len, lambda tokens: sum(t.startswith("[") for t in tokens), lambda tokens: tokens[0] == "[SM"):
        one, other = ([float(measure(tokens)) for tokens in sample] for sample in (complete, early))
        error = (statistics.variance(one) / 800 + statistics.variance(other) / 800) ** 0.5
        assert abs(statistics.mean(one) - statistics.mean(other)) < 4 * error


def test_what_the_outermost_operator_gives(listops, tmp_path):
    (tmp_path / "train.csv").write_text("text,value\nm12],1\nm13],1\nm29],2\nM19],9\n")
    (tmp_path / "validation.csv").write_text("text,value\nm15],1\nm23],2\nM89],9\ns12],3\n")
    assert listops.outermost_accuracy(tmp_path / "train.csv", tmp_path / "validation.csv") == 0.5


@pytest.mark.slow
def test_listops_in_short(listops, tmp_path, capsys, monkeypatch):
    words = ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "listops.csv")]
    listops.main(words)
    rows = rows_in(tmp_path / "listops.csv")
    assert [row["attention"] for row in rows] == ["softmax", "poly"]
    for row in rows:
        thirds = [float(row[f"accuracy_{part}"]) for part in ("shorter", "middle", "longer")]
        # of the same rows, measured by other code
        assert statistics.mean(thirds) == pytest.approx(float(row["accuracy"]), abs=0.01)
    train, validation = (
        rows_in(next((tmp_path / "runs").glob(f"listops-{part}*"))) for part in ("train", "validation")
    )
    assert not {row["text"] for row in train} & {row["text"] for row in validation}
    assert str(tmp_path) not in (tmp_path / "listops.csv").read_text()
    assert "20 to 40 tokens, 4 steps, learning rate 0.001:" in capsys.readouterr().out
    monkeypatch.setattr(listops, "run", lambda *args: pytest.fail("a finished run was repeated"))
    listops.main(words)


def test_all_lengths_predict_the_same_characters(length):
    class Counter(torch.nn.Module):
        """Knows that i + 1 follows i, and is the surer the more it has seen."""

        def forward(self, input_ids):
            seen.append(input_ids[0])
            sureness = 0.3 * torch.arange(input_ids.shape[1]).sqrt()[:, None]
            return SimpleNamespace(logits=sureness * torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float())

    seen = []
    ids = torch.arange(3000) % 50
    losses = [length.tail_losses(Counter(), ids, n, [2490, 2997]) for n in (256, 512, 1024)]
    assert all(loss.shape == (2,) for loss in losses)
    assert losses[0].mean() > 2 * losses[1].mean() > 4 * losses[2].mean() > 0
    assert [window.tolist() for window in seen] == [
        ids[end - n : end].tolist() for n in (256, 512, 1024) for end in (2490, 2997)
    ]
    with pytest.raises(ValueError, match="no window of 4096: take a longer text"):
        length.ends_of_windows(4000, 4096)


@pytest.mark.slow
def test_length_in_short(length, tmp_path, capsys, monkeypatch):
    words = [
        "--quick",
        "--only",
        "softmax",
        "none",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "n.csv"),
    ]
    length.main(words)
    rows = rows_in(tmp_path / "n.csv")
    assert [(row["attention"], row["length"]) for row in rows] == [
        (name, n) for name in ("softmax", "none") for n in ("256", "512")
    ]
    assert all(float(row["loss"]) > 0 and row["note"] == "" for row in rows)
    assert all(float(row["minus_trained_length"]) == 0 for row in rows if row["length"] == "256")
    assert "| degree 3, none, alpha = 1/spread |" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "n.csv").read_text()
    monkeypatch.setattr(length, "run", lambda *args: pytest.fail("a finished run was repeated"))
    length.main(words)


@pytest.fixture
def diverging(monkeypatch):
    def diverge(argv):
        raise NonFiniteError("step 12: the loss is nan; first seen in somewhere. What helps: patience")

    monkeypatch.setitem(sys.modules, "pretrain_causal_lm", SimpleNamespace(main=diverge))


def test_a_run_that_breaks_is_a_row_with_its_step(stability, diverging, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s.csv"
    words = ["--data", str(write_text(tmp_path)), "--sweeps", "unclipped", "--only", "poly", "--out", str(out)]
    stability.main([*words, "--runs", str(tmp_path / "runs")])
    rows = rows_in(out)
    assert {(row["diverged_at"], row["validation_loss"], row["note"]) for row in rows} == {
        ("12", "", "the loss is nan; first seen in somewhere")
    }
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.003", "0.01", "0.03", "0.1", "0.3"]
    assert {row["clip"] for row in rows} == {"0"}
    assert "| degree 3, defaults | diverged at step 12 |" in capsys.readouterr().out
    monkeypatch.setattr(stability, "run", lambda *args: pytest.fail("a finished run was repeated"))
    stability.main([*words, "--runs", str(tmp_path / "runs")])


def test_length_that_diverges_is_a_row_too(length, diverging, tmp_path):
    rows = length.run("none", 1, write_text(tmp_path), [], tmp_path / "run", (256, 512))
    assert [(row["length"], row["loss"], row["note"]) for row in rows] == [
        (n, "", "step 12: the loss is nan") for n in (256, 512)
    ]
    length.append(tmp_path / "n.csv", rows)
    assert "| degree 3, none, alpha = 1/spread | diverged | diverged |  | 1 |" in length.table(
        rows_in(tmp_path / "n.csv")
    )


def test_errors_that_are_no_divergence_are_raised(stability, monkeypatch, tmp_path):
    def fail(argv):
        raise ValueError("block_size 64 is more than the model's 32 positions")

    monkeypatch.setitem(sys.modules, "pretrain_causal_lm", SimpleNamespace(main=fail))
    with pytest.raises(ValueError, match="positions"):
        stability.train([], tmp_path)


def test_fp16_is_not_trained_in_on_a_cpu(monkeypatch):
    """Which is why the study has no such row: were it otherwise one day, it should."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert not Accelerator(cpu=True, mixed_precision="fp16").native_amp


@pytest.mark.slow
def test_stability_in_short(stability, tmp_path, capsys):
    words = ["--quick", "--only", "monomial", "--sweeps", "rate", "precision", "--runs", str(tmp_path / "runs")]
    stability.main([*words, "--out", str(tmp_path / "s.csv")])
    rows = rows_in(tmp_path / "s.csv")
    assert [(row["learning_rate"], row["precision"]) for row in rows] == [
        *(("0.001", "no"), ("0.3", "no"), ("0.003", "no"), ("0.03", "fp16 weights"))
    ]
    assert all(row["validation_loss"] or row["diverged_at"] or row["note"] for row in rows)
    assert float(rows[0]["validation_loss"]) > 0
    assert str(tmp_path) not in (tmp_path / "s.csv").read_text()
    assert "**Learning rate, gradients clipped to norm 1**" in capsys.readouterr().out


def test_numbers_beyond_fp16_are_a_note(stability, tmp_path):
    model = patch_model(tiny("gpt2", double=False, vocab_size=260), activation="monomial", gain=1e9)
    model.save_pretrained(tmp_path / "hot")
    byte_tokenizer().save_pretrained(tmp_path / "hot")
    hot = stability.evaluate_cast(tmp_path / "hot", "float16", "some text " * 20)
    assert hot["validation_loss"] == ""
    assert hot["note"].startswith("overflow: ")
    assert float(stability.evaluate_cast(tmp_path / "hot", "bfloat16", "some text " * 20)["validation_loss"]) > 0


def test_a_reading_below_the_tables_is_kept(tmp_path):
    tables = recipe("study_tables")
    path = tmp_path / "study.md"
    tables.write_tables(path, "| old |")
    assert path.read_text() == "| old |\n"
    path.write_text(f"| old |\n\n{tables.SHOWS}\n\nWhat it shows.\n")
    tables.write_tables(path, "| new |")
    assert path.read_text() == f"| new |\n\n{tables.SHOWS}\n\nWhat it shows.\n"


@pytest.mark.parametrize("name", ["recall", "length", "stability", "listops"])
def test_committed_tables_are_those_of_the_rows(name):
    rows, shared = rows_in(RESULTS / f"{name}.csv"), recipe("study_tables")
    written = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    tables, mark, reading = written.partition(shared.SHOWS)
    assert tables.rstrip("\n") == recipe(f"study_{name}").table(rows)
    assert mark
    assert len(reading.split()) > 30
    assert all(row["command"].startswith("python recipes/") for row in rows)
    # and the guide says the same of it
    guide = (RECIPES.parent / "docs" / "limits.md").read_text(encoding="utf-8")
    assert tables.strip() in guide
