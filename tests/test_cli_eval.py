"""`hf-polyattn eval`: the numbers are those of the definition, written out here once more, and errors name the way."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runs import TEXT, run, save, write
from datasets import Dataset
from models import tiny
from recipe_runs import run_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_polyattn.evaluation import Score
from hf_polyattn.evaluation.labels import measure_labels
from hf_polyattn.training.data import pack, tokenise
from hf_polyattn.training.losses import token_losses
from hf_polyattn.training.masking import masking_collator
from hf_polyattn.training.tokenizers import char_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by name: a GPT-2, its cubic twin, and a BERT that fills in masks."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    save(root / "softmax")
    torch.manual_seed(0)
    save(root / "cubic", poly={"degree": 3})
    save(root / "bert", "bert", AutoModelForMaskedLM)
    return root


def report(capsys, *argv):
    code, said, error = run(capsys, "eval", *argv, "--json")
    assert code == 0, error
    return json.loads(said)


def scores_of(found, index=0):
    return {name: score["value"] for name, score in found["checkpoints"][index]["scores"].items()}


@torch.no_grad()
def losses_by_hand(folder, text, size, stride):
    """[tokens - 1]: the loss of each token, predicted in the first block that has it."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder), list(text.encode())
    losses = {}
    for start in range(0, len(ids) - 1, stride):
        logits = model(input_ids=torch.tensor([ids[start : start + size]])).logits[0]
        for offset, row in enumerate(logits):
            target = start + offset + 1
            if target < len(ids) and target not in losses:
                losses[target] = F.cross_entropy(row[None], torch.tensor([ids[target]])).item()
    return np.array([losses[target] for target in range(1, len(ids))])


@pytest.mark.parametrize(("name", "stride"), [("softmax", None), ("cubic", None), ("cubic", 3)])
def test_loss_of_a_text_is_the_mean_over_all_its_tokens(name, stride, folders, tmp_path, capsys):
    text = "π " + TEXT  # letters of several bytes count as their bytes
    words = [folders / name, "--text", write(tmp_path / "text.txt", text), "--block-size", 10]
    words += ["--stride", stride] if stride else []
    losses = losses_by_hand(folders / name, text, 10, stride or 10)
    found = report(capsys, *words)
    scores = scores_of(found)
    assert scores["nats/token"] == pytest.approx(losses.mean(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    # the first token, half of the letter, is no letter by itself: three bytes when it is decoded
    size = len(text.encode()) - len(b"\xcf".decode(errors="replace").encode())
    assert scores["bits/byte"] == pytest.approx(losses.sum() / math.log(2) / size, rel=1e-5)
    assert found["checkpoints"][0]["data"]["predicted_tokens"] == len(losses)
    for size in (1, 3):
        assert scores_of(report(capsys, *words, "--batch-size", size)) == pytest.approx(scores, rel=1e-5)


@torch.no_grad()
def test_loss_is_that_of_the_recipes_where_they_drop_no_tail(folders, tmp_path, capsys):
    text = (TEXT * 4)[: 8 * 25]
    tokenizer = AutoTokenizer.from_pretrained(folders / "cubic")
    # the recipe closes a text with its end token: the 201st
    blocks = pack(tokenise(Dataset.from_dict({"text": [text]}), tokenizer), 25)
    model = AutoModelForCausalLM.from_pretrained(folders / "cubic")
    rows = torch.tensor(blocks["input_ids"])
    sums, counts = token_losses(model(input_ids=rows[:, :-1]).logits, rows[:, 1:])
    path = write(tmp_path / "text.txt", text + "<|endoftext|>")
    found = report(capsys, folders / "cubic", "--text", path, "--block-size", 25)
    assert scores_of(found)["nats/token"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)


@torch.no_grad()
def test_a_masked_model_fills_in_the_masks_that_the_recipe_draws(folders, tmp_path, capsys):
    text = TEXT * 3
    tokenizer, ids = AutoTokenizer.from_pretrained(folders / "bert"), list(text.encode())
    rows = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    assert len(rows[-1]) < 16
    model, losses = AutoModelForMaskedLM.from_pretrained(folders / "bert"), []
    for position, row in enumerate(rows):
        batch = masking_collator(tokenizer, 0)([(position, {"input_ids": row})])
        logits = model(input_ids=batch["input_ids"]).logits[0]
        losses += [
            F.cross_entropy(logits[i], label).item() for i, label in enumerate(batch["labels"][0]) if label >= 0
        ]
    path = write(tmp_path / "text.txt", text)
    found = report(capsys, folders / "bert", "--text", path, "--block-size", 16)
    assert scores_of(found)["nats/token"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["checkpoints"][0]["data"]["predicted_tokens"] == len(losses)
    assert "bits/byte" not in scores_of(found)


def test_a_text_of_which_no_token_is_masked_is_refused(folders, tmp_path, capsys):
    path = write(tmp_path / "text.txt", "ab")
    code, said, error = run(capsys, "eval", folders / "bert", "--text", path, "--block-size", 2)
    assert (code, said) == (1, "")
    assert "no token of the 1 blocks of 2 came to be masked: give more text" in error


def test_a_twin_stands_beside_with_the_paired_difference(folders, tmp_path, capsys):
    path = write(tmp_path / "text.txt", TEXT * 3)
    words = [folders / "cubic", "--against", folders / "softmax", "--text", path, "--block-size", 13]
    code, said, _ = run(capsys, "eval", *words)
    assert code == 0
    first, second = (losses_by_hand(folders / name, TEXT * 3, 13, 13) for name in ("cubic", "softmax"))
    gap, units = first - second, range(0, len(first), 13)
    mean = gap.mean()
    blocks = np.array([(gap[at : at + 13] - mean).sum() for at in units])
    error = math.sqrt(len(blocks) / (len(blocks) - 1) * (blocks**2).sum()) / len(gap)
    line = next(line for line in said.splitlines() if line.startswith("nats/token"))
    shown = f"{first.mean():.4f}", f"{second.mean():.4f}", f"{mean:+.4f} ± {error:.4f}"
    assert all(number in line for number in shown), (line, shown)
    assert "poly of degree 3" in said
    assert "of the difference, paired" in said
    assert f"{len(first)} predicted tokens in {len(blocks)} blocks of 13" in said
    assert "tokenizers differ" not in said
    same = report(capsys, folders / "cubic", "--against", folders / "cubic", "--text", path)
    assert same["difference"]["nats/token"] == {"value": 0, "standard_error": 0}


def test_other_tokenizers_are_pointed_out(folders, tmp_path, capsys):
    path, other = write(tmp_path / "text.txt", TEXT * 3), save(tmp_path / "chars", vocab_size=263)
    char_tokenizer([TEXT]).save_pretrained(other)
    words = ["eval", other, "--against", folders / "softmax", "--text", path, "--block-size", 8]
    code, said, error = run(capsys, *words)
    assert code == 0, error
    assert "their tokenizers differ: compare bits per byte" in said
    write(path, "ßß not among its characters ßß")
    code, _, error = run(capsys, "eval", other, "--text", path, "--block-size", 8)
    assert code == 1
    assert "the tokenizer cannot encode this text" in error
    # a tokenizer can be named
    named = report(capsys, other, "--text", path, "--block-size", 8, "--tokenizer", folders / "softmax")
    assert named["checkpoints"][0]["data"]["predicted_tokens"] == len(path.read_bytes()) - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "absent.txt"], "no such text for --text: absent.txt"),
        (["--text", "short.txt"], "holds 12 tokens, and one block of 64 needs 65: give more text, or --block-size 11"),
        (["--text", "text.txt", "--block-size", "65"], "the model has 64 positions: lower --block-size 65"),
        (["--text", "text.txt", "--block-size", "0"], "--block-size must be 1 or more, got 0"),
        (["--text", "text.txt", "--block-size", "8", "--stride", "9"], "--stride must be from 1 to the block size 8"),
        (["--text", "text.txt", "--metric", "f1"], "--metric goes with --data, and this measures --text"),
        (["--data", "rows.csv"], "gives no label for a text, which --data needs: for a language model give --text"),
        (["--data", "rows.csv", "--stride", "4"], "--stride goes with --text, and this measures --data"),
        (["--data", "absent.csv"], "no such file or folder: absent.csv"),
        (["--text", "text.txt", "--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--text", "text.txt", "--against", "./nowhere"], "no such folder: ./nowhere"),
        (["--text", "text.txt", "--tokenizer", "EMPTY"], "holds no tokenizer: name the one"),
    ],
)
def test_errors_name_the_remedy(words, message, folders, tmp_path, monkeypatch, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text.txt", TEXT * 3)
    write(tmp_path / "short.txt", "twelve bytes")
    write(tmp_path / "rows.csv", "text,label\na,0\n")
    (tmp_path / "EMPTY").mkdir()
    code, said, error = run(capsys, "eval", folders / "cubic", *words)
    assert (code, said) == (1, "")
    assert message in error
    assert error.splitlines()[-1].startswith("hf-polyattn eval: ")


def test_one_thing_is_measured_at_a_time(folders, capsys):
    for words in ([], ["--text", "a", "--data", "b"], ["--data", "a", "--metric", "charm"]):
        with pytest.raises(SystemExit) as stop:
            run(capsys, "eval", folders / "cubic", *words)
        assert stop.value.code == 2


def test_a_loss_that_is_no_number_is_an_error(folders, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folders / "softmax")
    model.transformer.wpe.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    path = write(tmp_path / "text.txt", TEXT * 3)
    words = ["--tokenizer", folders / "softmax", "--block-size", 8]
    code, _, error = run(capsys, "eval", tmp_path / "broken", "--text", path, *words)
    assert code == 1
    assert "the loss becomes nan in block 0 to 3" in error


ROWS = [("of even powers", "even"), ("an odd one", "odd"), ("odd again, and longer", "odd"), ("even", "even")]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Three classes with names; the second is never right."""
    names = {0: "even", 1: "neither", 2: "odd"}
    labels = {name: index for index, name in names.items()}
    torch.manual_seed(1)
    options = {"id2label": names, "label2id": labels, "poly": {"degree": 2}}
    return save(tmp_path_factory.mktemp("classifier"), "bert", AutoModelForSequenceClassification, **options)


@torch.no_grad()
def logits_by_hand(folder, *texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.stack([model(**tokenizer(*parts, return_tensors="pt")).logits[0] for parts in zip(*texts)])


def csv_of(path, rows, header="text,label"):
    return write(path, "\n".join([header, *(",".join(f'"{cell}"' for cell in row) for row in rows)]))


@pytest.mark.parametrize("by_name", [True, False])
def test_metrics_of_a_classifier(by_name, classifier, tmp_path, capsys):
    index = {"even": 0, "odd": 2}
    rows = ROWS if by_name else [(text, index[label]) for text, label in ROWS]
    path = csv_of(tmp_path / "rows.csv", rows)
    logits = logits_by_hand(classifier, [text for text, _ in ROWS])
    right = torch.tensor([index[label] for _, label in ROWS])
    expected = {
        "accuracy": (logits.argmax(-1) == right).double().mean().item(),
        "loss": F.cross_entropy(logits, right).item(),
    }
    for size in (1, 3):
        found = report(capsys, classifier, "--data", path, "--metric", "accuracy", "loss", "--batch-size", size)
        assert scores_of(found) == pytest.approx(expected, rel=1e-4)
    assert found["checkpoints"][0]["data"] == {"rows": 4}
    assert found["checkpoints"][0]["attention"] == "poly of degree 2"
    assert set(scores_of(report(capsys, classifier, "--data", path))) == {"accuracy", "f1", "loss"}
    part = report(capsys, classifier, "--data", path, "--limit", 2, "--metric", "loss")
    assert scores_of(part)["loss"] == pytest.approx(F.cross_entropy(logits[:2], right[:2]).item(), rel=1e-4)


def test_the_configuration_comes_out_as_it_went_in(classifier):
    model = tiny("gpt2", AutoModelForSequenceClassification, vocab_size=300, pad_token_id=None, double=False)
    rows = Dataset.from_dict({"text": ["even", "odd and longer"], "label": [0, 1]})
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    measure_labels(model, tokenizer, rows, metrics=["loss"])
    assert model.config.pad_token_id is None


def test_the_recipe_and_the_command_agree(tmp_path, capsys):
    """A classifier of the recipe's, measured again on the rows that it validated on."""
    rows = [(f"{word} number {i}", word) for i in range(12) for word in ("even", "odd")]
    train, held = csv_of(tmp_path / "train.csv", rows), csv_of(tmp_path / "held.csv", rows[:9])
    out = tmp_path / "run"
    words = ["--dataset", train, "--validation_dataset", held, "--max_steps", 3, "--eval_steps", 3, "--save_steps", 3]
    run_recipe("finetune_classifier", out, *words)
    line = json.loads([x for x in (out / "metrics.jsonl").read_text().splitlines() if "validation_loss" in x][-1])
    found = scores_of(report(capsys, out / "best", "--data", held))
    assert found["loss"] == pytest.approx(line["validation_loss"], rel=1e-4)
    assert found["accuracy"] == line["accuracy"]
    assert found["f1"] == line["f1"]


def test_values_of_pairs(tmp_path, capsys):
    torch.manual_seed(2)
    folder = save(tmp_path / "values", "bert", AutoModelForSequenceClassification, num_labels=1, poly={"degree": 3})
    rows = [("one", "another", 0.5), ("even", "odd", -1), ("a row", "a line of text", 2), ("x", "y", 0.25)]
    path = csv_of(tmp_path / "pairs.csv", rows, "left,right,score")
    words = ["--text-column", "left", "--pair-column", "right", "--label-column", "score"]
    found = scores_of(report(capsys, folder, "--data", path, *words))
    values = logits_by_hand(folder, *zip(*[row[:2] for row in rows]))[:, 0].double()
    right = torch.tensor([row[2] for row in rows]).double()
    assert found["mean_squared_error"] == pytest.approx(F.mse_loss(values, right).item(), rel=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, right)[0, 1], abs=1e-4)
    code, _, error = run(capsys, "eval", folder, "--data", path, *words, "--metric", "accuracy")
    assert code == 1
    assert "--metric accuracy is not for a model that gives a value: choose of pearson, spearman" in error


def test_labels_and_columns_that_are_not_there(classifier, tmp_path, capsys):
    for rows, header, message in (
        ([("a", "blue")], "text,label", "row 0 has the label 'blue', and the model's classes are ['even', 'neither'"),
        ([("a", 3)], "text,label", "row 0 has the label 3, and"),
        ([("a", "odd")], "words,label", "no column 'text' among ['words', 'label']: name yours with --text-column"),
    ):
        path = csv_of(tmp_path / "rows.csv", rows, header)
        code, _, error = run(capsys, "eval", classifier, "--data", path)
        assert code == 1
        assert message in error
    code, _, error = run(capsys, "eval", classifier, "--text", write(tmp_path / "text.txt", TEXT))
    assert code == 1
    assert "is no language model, which --text needs: for a classifier give --data FILE" in error


@torch.no_grad()
def test_long_texts_are_cut(classifier, tmp_path, capsys):
    path = csv_of(tmp_path / "rows.csv", [(TEXT * 3, "odd"), ("short", "even")])
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    # the model has 64 positions
    for words, length in (([], 64), (["--max-length", 5], 5)):
        cut = [tokenizer(x, truncation=True, max_length=length, return_tensors="pt") for x in (TEXT * 3, "short")]
        logits = torch.stack([model(**inputs).logits[0] for inputs in cut])
        expected = F.cross_entropy(logits, torch.tensor([2, 0])).item()
        found = report(capsys, classifier, "--data", path, "--metric", "loss", *words)
        assert scores_of(found)["loss"] == pytest.approx(expected, rel=1e-4)


def test_classes_with_numbers_for_names_are_no_indices(tmp_path, capsys):
    """Classes 1 and 2 have the indices 0 and 1: a label 0 is a mistake, and 1 is the first class."""
    names = {"id2label": {0: "1", 1: "2"}, "label2id": {"1": 0, "2": 1}}
    folder = save(tmp_path / "numbers", "bert", AutoModelForSequenceClassification, **names)
    found = report(capsys, folder, "--data", csv_of(tmp_path / "rows.csv", [("even", 1), ("odd", 2)]))
    logits = logits_by_hand(folder, ["even", "odd"])
    assert scores_of(found)["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor([0, 1])).item(), rel=1e-4)
    code, _, error = run(capsys, "eval", folder, "--data", csv_of(tmp_path / "rows.csv", [("even", 0)]))
    assert code == 1
    assert "row 0 has the label 0, and the model's classes are ['1', '2']" in error


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path, capsys):
    small = save(tmp_path / "small", vocab_size=100, pad_token_id=0)
    path = write(tmp_path / "text.txt", TEXT)
    code, _, error = run(capsys, "eval", small, "--text", path, "--tokenizer", folders / "softmax")
    assert code == 1
    assert "the tokenizer has 261 tokens, " in error
    assert "use the model's own tokenizer" in error


def test_adapters_are_measured_with_their_base(folders, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders / "cubic")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "lora")
    AutoTokenizer.from_pretrained(folders / "cubic").save_pretrained(tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    path = write(tmp_path / "text.txt", TEXT * 3)
    words = ["--against", tmp_path / "merged", "--tokenizer", folders / "cubic", "--text", path]
    found = report(capsys, tmp_path / "lora", *words)
    assert scores_of(found) == pytest.approx(scores_of(found, 1), rel=1e-5)
    assert "LORA adapters of rank 2" in found["checkpoints"][0]["adapters"]
    assert scores_of(found) != scores_of(report(capsys, folders / "cubic", "--text", path))


def test_models_of_different_kinds_are_not_compared(folders, tmp_path, capsys):
    path = write(tmp_path / "text.txt", TEXT * 3)
    words = ["--against", folders / "bert", "--text", path, "--block-size", 16]
    code, _, error = run(capsys, "eval", folders / "cubic", *words)
    assert code == 1
    assert "are models of different kinds" in error


def test_standard_error_is_that_of_repeated_samples():
    """Over many texts drawn from one source, values spread as one text's own standard error says."""
    draw = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(2000):
        counts = draw.integers(5, 20, 50).astype(float)
        score = Score.mean(counts * draw.normal(2, 0.3, 50), counts)
        values.append(score.value)
        errors.append(score.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)
    assert Score.mean(np.ones(1), np.ones(1)).standard_error is None


TASK = """
task: parity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["even", "odd"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_tasks_of_the_harness(folders, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    questions = [{"question": f"{number} is", "answer": number % 2} for number in range(11)]
    rows = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, questions)))
    write(tmp_path / "parity.yaml", TASK.format(rows=rows))
    words = ["--tasks", "parity", "--include_path", tmp_path]
    found = report(capsys, folders / "cubic", "--against", folders / "softmax", *words)
    for index, name in enumerate(("cubic", "softmax")):
        model, right = AutoModelForCausalLM.from_pretrained(folders / name), 0
        for row in questions:
            sums = []
            for choice in (" even", " odd"):
                start, ids = len(row["question"]), list((row["question"] + choice).encode())
                logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
                sums.append(-F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item())
            right += int(np.argmax(sums) == row["answer"])
        assert scores_of(found, index)["parity acc"] == pytest.approx(right / len(questions))
    assert found["checkpoints"][0]["data"]["documents"] == {"parity": 11}
    code, said, _ = run(capsys, "eval", folders / "cubic", *words, "--limit", 4, "--shots", 1)
    assert code == 0
    assert "parity acc" in said
    assert said.splitlines()[-2].startswith("parity 4 documents; ")
    code, _, error = run(capsys, "eval", folders / "cubic", "--tasks", "prity", "--include-path", tmp_path)
    assert code == 1
    assert "no task 'prity' in" in error
    code, _, error = run(capsys, "eval", folders / "bert", *words)
    assert code == 1
    assert "is no causal language model, which the harness's tasks need" in error


def test_without_the_harness_the_error_says_how_to_get_it(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, said, error = run(capsys, "eval", folders / "cubic", "--tasks", "parity")
    assert (code, said) == (1, "")
    assert error == "hf-polyattn eval: --tasks needs lm-evaluation-harness: pip install lm-eval\n"
