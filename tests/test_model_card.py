"""Model cards say what the model and its run say, in metadata that the Hub reads."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from card_results import RESULTS, TWIN
from huggingface_hub import ModelCard
from models import patched_tiny, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import hf_polyattn
from hf_polyattn import model_card as cards
from hf_polyattn.converting.report import TUNED, ConversionReport
from hf_polyattn.model_card import model_card, portable, published_scores, read_results


@pytest.fixture(scope="module")
def cubic():
    torch.manual_seed(0)
    return patched_tiny("gpt2", double=False)


def metadata(card: ModelCard) -> dict:
    """The block between the first two lines of dashes, as any YAML reader sees it."""
    return yaml.safe_load(str(card).split("---\n")[1])


def test_metadata_is_what_the_hub_reads(cubic):
    card = model_card(cubic, RESULTS, TWIN, name="me/cubic", license="apache-2.0")
    found = metadata(card)
    assert {k: found[k] for k in found if k != "model-index"} == {
        "base_model": "someone/base",
        "datasets": ["karpathy/tiny"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["polyattn", "polynomial-attention"],
        "metrics": ["perplexity"],
    }
    # through huggingface_hub's own reading of model-index and back
    again = ModelCard(str(card))
    assert again.data.to_dict() == found
    loss, perplexity = again.data.eval_results
    assert (loss.metric_type, loss.metric_value, loss.dataset_type) == ("loss", 1.9, "karpathy/tiny")
    assert perplexity.metric_value == pytest.approx(6.6859, abs=1e-3)
    assert again.data.model_name == "cubic"


def test_text_says_what_was_changed_trained_and_measured(cubic):
    text = str(model_card(cubic, RESULTS, TWIN, name="me/cubic", license="mit", figure="losses.png"))
    for line in (
        "A GPT2LMHeadModel whose attention is a polynomial of degree 3 instead of softmax, made from [someone/base]",
        "Patched 2 of 2 attention modules (8 of 8 heads). In them",
        "phi(x)  = c_0 + c_1 x + c_2 x^2 + c_3 x^3, learned for each head",
        "Z_i     = n_i, where",
        "| normalization | length |",
        "transformer.h.1.attn",
        "| command | `recipes/pretrain_causal_lm.py config.yaml --seed 7` |",
        "| data | karpathy/tiny |",
        "| tokens | 1,024,000 |",
        "| seed | 7 |",
        "| hardware | cpu (x86_64, 1 threads) |",
        "| seconds | 321 |",
        "| validation loss (nats per token) | 1.9 | 1.8 |",
        "| training speed (tokens/s) | 3,186 | 4,000 |",
        "Other arguments that differ: learning_rate (0.001 and 0.002).",
        "![Losses over the steps](losses.png)",
        "are signed and rows do not sum to 1",
        "vLLM, TGI and llama.cpp (GGUF)",
    ):
        assert line in text, f"{line}\n{text}"
    assert "1.91" not in text
    assert "secret" not in text
    assert "\n\n\n" not in text


def test_nothing_is_said_that_nobody_recorded(cubic):
    text = str(model_card(cubic, license="mit"))
    assert "If nobody has trained it since softmax was replaced, it writes nonsense." in text
    assert "None are recorded here." in text
    assert "![" not in text
    assert "model-index" not in text
    assert "datasets" not in metadata(ModelCard(text))


@pytest.mark.parametrize("door", [0, 1])
@pytest.mark.parametrize(
    ("family", "auto", "poly"),
    [
        ("gpt2", AutoModelForCausalLM, {}),
        ("bert", AutoModelForMaskedLM, {"activation": "relu"}),
        ("llama", AutoModelForSequenceClassification, {"activation": "monomial", "layers": (0,)}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_loading_code_runs(tmp_path, monkeypatch, family, auto, poly, door):
    """The second door is tried with the plugin at hand, whose class wins: test_remote_code has the other case."""
    model = patched_tiny(family, auto, poly=poly, double=False)
    model.save_pretrained(tmp_path / "me" / "cubic")
    code = re.findall(r"```python\n(.*?)```", str(model_card(model, name="me/cubic")), re.DOTALL)
    assert len(code) == 2
    assert "import hf_polyattn" in code[0]
    assert "trust_remote_code=True" in code[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code[door], "card", "exec"), names)
    assert type(names["model"]) is type(model)


@pytest.mark.parametrize(
    ("auto", "family", "task"),
    [
        (AutoModelForMaskedLM, "bert", "fill-mask"),
        (AutoModelForSequenceClassification, "llama", "text-classification"),
        (AutoModelForImageClassification, "vit", "image-classification"),
        (AutoModel, "bert", "feature-extraction"),
    ],
)
def test_task_follows_from_the_class(auto, family, task):
    assert metadata(model_card(patched_tiny(family, auto, double=False)))["pipeline_tag"] == task


def test_softmax_twin_has_a_card_without_polynomials():
    text = str(model_card(tiny("gpt2", double=False), TWIN, name="me/softmax", license="mit"))
    assert "A GPT2LMHeadModel with softmax attention" in text
    assert "hf_polyattn" not in text
    assert "trust_remote_code" not in text
    assert "tags" not in metadata(ModelCard(text))


def test_a_model_that_needs_the_package_offers_one_door(tmp_path):
    hf_polyattn.register_activation("tanh", lambda s, n: s.tanh(), defaults={"normalization": "length"}, exist_ok=True)
    text = str(model_card(hf_polyattn.patch_model(tiny("gpt2", double=False), "tanh")))
    assert "trust_remote_code" not in text
    assert "with tanh attention through hf_polyattn" in text


def test_license_comes_from_the_base(cubic, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# base\n")
    assert metadata(model_card(cubic, base_model=str(tmp_path)))["license"] == "cc-by-4.0"
    assert metadata(model_card(cubic, base_model=str(tmp_path), license="mit"))["license"] == "mit"
    assert "license" not in metadata(model_card(cubic))


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"best": 2.0}, {"validation_loss": 2.0, "perplexity": pytest.approx(7.389, abs=1e-3)}),
        ({"best": 0.9, "best_metric": "accuracy", "accuracy": 0.9, "f1": 0.8}, {"accuracy": 0.9, "f1": 0.8}),
        # of a classifier or of values, and not in nats per token
        ({"best": 0.9, "best_metric": "accuracy", "accuracy": 0.9, "validation_loss": 0.3}, {"accuracy": 0.9}),
        # the last evaluation was not the best: its other scores belong to another checkpoint
        ({"best": 0.9, "best_metric": "accuracy", "accuracy": 0.7, "f1": 0.6}, {"accuracy": 0.9}),
        ({"best": None}, {}),
        ({"best": float("nan")}, {}),
        ({}, {}),
    ],
)
def test_scores_are_those_of_the_published_checkpoint(results, expected):
    assert published_scores(results) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b/run.py --out=/c/d --lr 1/2", "run.py --out=d --lr 1/2"),
        ("~/runs/x", "x"),
        ("C:\\runs\\x.yaml", "x.yaml"),
        ("me/model", "me/model"),
        ("https://host/a/b", "https://host/a/b"),
        ({"k": ["/a/b", 3]}, {"k": ["b", 3]}),
    ],
)
def test_paths_of_a_machine_are_cut(text, expected):
    assert portable(text) == expected


def test_names_on_the_hub_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    assert cards._hub_name("runs/best") is None
    assert cards._hub_name("openai-community/gpt2") == "openai-community/gpt2"
    assert cards._hub_name("../somewhere/else") is None
    names = ("stdlib", "stdlib_lines", "text.txt", "pairs.tsv", "data/rows.jsonl", "wikitext", "a/b")
    assert [cards._hub_dataset(name) for name in names] == [None] * 5 + ["wikitext", "a/b"]


def test_other_files_are_no_results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no results\.json of a recipe"):
        read_results(path)
    assert SimpleNamespace(**RESULTS).best == 1.9


def test_a_conversion_shows_its_stages(cubic):
    rows = [
        {"stage": stage, "score": score, "tokens": 10, "seconds": 1.0, "steps": 1}
        for stage, score in (("softmax", 1.9), ("patched", 4.8), ("calibrate", 2.9))
    ]
    stages = {
        "metric": "loss",
        "lower_is_better": True,
        "rows": rows,
        "tuned": {**rows[0], "stage": TUNED, "score": 1.85},
    }
    results = {"arguments": {}, "command": "convert.py", "seconds": 1.0, "validation_loss": 2.9, "best": 2.9}
    card = str(model_card(cubic, {**results, "stages": stages}, figure="conversion.png"))
    assert "| calibrate | 2.9000 | +1.0000 | 10 | 1 |" in card
    assert "| softmax, fine-tuned on as many tokens | 1.8500 | -0.0500 | 10 | 1 |" in card
    assert "![Scores after each stage, and losses](conversion.png)" in card
    assert "stage by stage" not in str(model_card(cubic, results))


@pytest.mark.parametrize("metric", ["agreement", "rank_agreement"])
def test_the_metrics_of_a_conversion_have_names(cubic, metric):
    results = {
        "arguments": {},
        "command": "convert.py",
        "seconds": 1.0,
        metric: 0.9,
        "best": 0.9,
        "best_metric": metric,
    }
    card = model_card(cubic, results)
    assert card.data.eval_results[0].metric_value == 0.9


CARDS = sorted((Path(__file__).resolve().parents[1] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_cards_that_are_kept_are_whole_and_say_what_was_recorded(path):
    card = ModelCard.load(path)
    results = read_results(path.parent / "results.json")
    text = card.text
    assert card.data.license
    assert card.data.library_name == "transformers"
    assert {"polyattn", "polynomial-attention"} <= set(card.data.tags)
    measured = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    name = cards.METRICS[results.get("best_metric", "validation_loss")][1]
    assert measured[name] == pytest.approx(results["best"], abs=1e-4)
    if stages := results.get("stages"):
        assert ConversionReport.from_dict(stages).markdown() in text
    for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (path.parent / figure).stat().st_size > 10_000
    # a path of the machine that it was made on is nobody's business
    assert not re.search(r"(?<![\w.:/])/(?!\w+\.)[a-z]+/", text.partition("## How it was trained")[2])
    assert f"| [{path.parent.name}]({path.parent.name}/README.md) |" in (path.parents[1] / "README.md").read_text()
