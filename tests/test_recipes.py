"""Each recipe end to end with its debug configuration: what it writes, what reloads, what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from recipe_runs import RECIPES, debug_config, metrics, recipe, run_recipe, write_text
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_polyattn import coverage
from hf_polyattn.hub import check_folder
from hf_polyattn.training import run as training_run
from hf_polyattn.training.lora import load_trained
from hf_polyattn.training.nonfinite import NonFiniteError
from hf_polyattn.training.run import MAX_SKIPPED_STEPS
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_cli import main

WITHOUT_DROPOUT = {
    "pretrain_causal_lm": "{n_layer: 2, n_head: 2, n_embd: 32, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}",
    "pretrain_masked_lm": "{num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 32, intermediate_size: 64,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}",
}
SHORT = ["--max_steps", 4, "--eval_steps", 2, "--save_steps", 2]


def lines_of(arguments, capfd):
    capfd.readouterr()
    run_recipe(*arguments)
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A polynomial GPT-2 and its results, from the debug configuration as it is."""
    out = tmp_path_factory.mktemp("pretrained")
    return out, run_recipe("pretrain_causal_lm", out)


def test_pretraining_learns_and_tells(pretrained):
    out, results = pretrained
    losses = metrics(out)
    assert list(losses) == list(range(1, 21))
    assert losses[20] < losses[1] - 0.3
    assert results == json.loads((out / "results.json").read_text())
    assert results["validation_loss"] == metrics(out, "validation_loss")[20]
    assert results["attention"]["activation"] == "poly"
    assert results["tokens"] == 20 * 8 * 64
    assert results["versions"]["torch"] == torch.__version__
    assert results["seed"] == results["arguments"]["seed"] == 1337
    for name in ("learning_rate", "gradient_norm", "epoch", "tokens_per_second", "seconds", "peak_mib"):
        assert list(metrics(out, name)) == list(losses)
        assert min(metrics(out, name).values()) > 0


def test_checkpoint_reloads_with_auto_classes(pretrained):
    out, results = pretrained
    model = AutoModelForCausalLM.from_pretrained(out / "best")
    assert str(coverage(model)).startswith("poly: patched 2 of 2")
    tokenizer = AutoTokenizer.from_pretrained(out / "best")
    assert tokenizer("import os")["input_ids"] == list(b"import os")
    inputs = tokenizer("def ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("def ")


def test_twins_differ_in_attention_only(tmp_path):
    results = run_recipe("pretrain_causal_lm", tmp_path, *SHORT, "--activation", "softmax")
    assert results["attention"] == "softmax"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert type(model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    "extra",
    [
        ["--activation", "monomial", "--learn_gain", "--qk_norm", "--calibrate_batches", 0],
        ["--activation", "relu", "--mixed_precision", "bf16"],
        [
            "--model_type",
            "llama",
            "--model_config",
            "{num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, intermediate_size: 16}",
            "--tokenizer",
            "chars",
        ],
        ["--activation", "sigmoid", "--gradient_checkpointing", "--num_workers", 1],
    ],
    ids=["monomial", "relu bf16", "llama chars", "sigmoid checkpointing"],
)
def test_options(tmp_path, extra):
    results = run_recipe("pretrain_causal_lm", tmp_path, *SHORT, *extra)
    AcceleratorState._reset_state()
    assert results["loss"] < 6


@pytest.mark.parametrize("name", ["pretrain_causal_lm", "pretrain_masked_lm"])
def test_saving_memory_changes_nothing(tmp_path, name):
    """A batch in parts, with activations computed twice; masked models have parts of unequal weight."""
    options = [*SHORT, "--eval_steps", 4, "--model_config", WITHOUT_DROPOUT[name]]
    run_recipe(name, tmp_path / "plain", *options)
    run_recipe(name, tmp_path / "frugal", *options, "--gradient_accumulation_steps", 4, "--gradient_checkpointing")
    for value in ("loss", "gradient_norm", "validation_loss"):
        plain, frugal = metrics(tmp_path / "plain", value), metrics(tmp_path / "frugal", value)
        assert plain == pytest.approx(frugal, rel=2e-6), value


def test_masked_lm(tmp_path):
    run_recipe("pretrain_masked_lm", tmp_path)
    losses = metrics(tmp_path, "validation_loss")
    assert losses[20] < losses[10]
    assert "patched 2 of 2" in str(coverage(AutoModelForMaskedLM.from_pretrained(tmp_path / "best")))
    assert AutoTokenizer.from_pretrained(tmp_path / "best").mask_token_id is not None


def test_fine_tuning_goes_on_from_a_polynomial_checkpoint(pretrained, tmp_path):
    out, _ = pretrained
    results = run_recipe("finetune_causal_lm", tmp_path, "--model", out / "best")
    losses = metrics(tmp_path, "validation_loss")
    assert losses[10] < losses[0]
    assert results["attention"]["activation"] == "poly"


def test_prompts_carry_no_loss(tmp_path):
    """The loss goes to 0 although the letters of the prompts are random."""
    base = tmp_path / "base"
    run_recipe("pretrain_causal_lm", base, "--max_steps", 1, "--activation", "softmax")
    rows = tmp_path / "rows.jsonl"
    noise = torch.randint(97, 123, (200, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows.write_text("".join(json.dumps({"q": bytes(n).decode(), "a": "!"}) + "\n" for n in noise))
    results = run_recipe(
        *("finetune_causal_lm", tmp_path / "out", "--model", base / "last", "--dataset", rows, "--prompt_column", "q"),
        *("--completion_column", "a", "--max_steps", 60, "--learning_rate", 2e-2, "--eval_steps", 0),
    )
    # the loss of random letters is log 26 = 3.3
    assert results["validation_loss"] < 0.1
    assert results["attention"]["activation"] == "poly"


def test_pairs_name_the_missing_column_and_count_what_is_left_out(capsys):
    module = recipe("finetune_causal_lm")
    args = module.FinetuneTextArguments(prompt_column="q", completion_column="a", block_size=4)
    rows = module.Dataset.from_dict({"q": ["ab", "abcdef"], "a": ["c", "g"]})
    encoded = module.encode_pairs(rows, args, byte_tokenizer())
    assert len(encoded) == 1
    assert "left out 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no column \['a'\]"):
        module.encode_pairs(rows.remove_columns("a"), args, byte_tokenizer())


def test_pairs_begin_as_the_tokenizer_begins_a_text():
    """With BOS where it adds one, as LLaMA's tokenizers do; it carries no loss and is fed in front of the prompt."""
    module = recipe("finetune_causal_lm")
    args = module.FinetuneTextArguments(prompt_column="q", completion_column="a", block_size=16)
    rows = module.Dataset.from_dict({"q": ["ab"], "a": ["c"]})
    plain, with_bos = byte_tokenizer(["eos_token"]), byte_tokenizer(["eos_token"])
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (row,) = module.encode_pairs(rows, args, plain)
    assert row == {"input_ids": [97, 98, 99], "labels": [module.IGNORE, 99, 256]}
    (row,) = module.encode_pairs(rows, args, with_bos)
    assert row == {"input_ids": [bos, 97, 98, 99], "labels": [module.IGNORE, module.IGNORE, 99, 256]}


def test_classifier_learns_code_from_comments(tmp_path):
    results = run_recipe(
        *("finetune_classifier", tmp_path, "--max_steps", 60, "--eval_steps", 20),
        *("--activation", "softmax", "--seed", 1),
    )
    accuracy = metrics(tmp_path, "accuracy")
    assert results["best"] == max(accuracy.values()) > 0.62
    best = max(accuracy, key=accuracy.get)
    assert (tmp_path / "best").resolve().name == f"checkpoint-{best:06d}"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    assert model.config.id2label == {0: "0", 1: "1"}


def test_classifier_of_pairs_with_named_classes(tmp_path):
    data = tmp_path / "pairs.csv"
    rows = [(f"w{i % 7}", f"w{j % 7}", "same" if i % 7 == j % 7 else "other") for i in range(9) for j in range(9)]
    data.write_text("".join(",".join(row) + "\n" for row in rows))
    run_recipe(
        *("finetune_classifier", tmp_path / "out", *SHORT, "--dataset", data, "--column_names", "a", "b", "kind"),
        *("--text_column", "a", "--pair_column", "b", "--label_column", "kind", "--lora_r", 2),
    )
    model = load_trained(AutoModelForSequenceClassification, tmp_path / "out" / "last")
    assert model.config.label2id == {"other": 0, "same": 1}
    with pytest.raises(ValueError, match=r"no column \['kid'\]"):
        run_recipe(
            "finetune_classifier", tmp_path / "x", "--dataset", data, "--label_column", "kid", "--text_column", "w0"
        )


def test_evaluating_a_classifier_leaves_every_module_in_its_mode():
    module = recipe("finetune_classifier")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes, vocab_size=9)).train()
    model.bert.embeddings.eval()
    before = [part.training for part in model.modules()]
    rows = [{"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])}]
    module.evaluate(Accelerator(cpu=True), model, rows)
    assert [part.training for part in model.modules()] == before


def test_classifier_pads_with_bytes_too(pretrained, tmp_path):
    arguments = ["--model_type=", "--model_config={}", "--model", pretrained[0] / "best", "--tokenizer", "bytes"]
    run_recipe("finetune_classifier", tmp_path, *arguments, *SHORT, "--max_length", 16)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "last")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "last")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 256


def test_regression(tmp_path):
    data = tmp_path / "values.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * (i % 9 + 1), "label": i % 9 / 4}) + "\n" for i in range(90)))
    results = run_recipe("finetune_classifier", tmp_path / "out", *SHORT, "--dataset", data, "--regression")
    assert set(metrics(tmp_path / "out", "spearman")) == {2, 4}
    assert results["mean_squared_error"] == pytest.approx(results["validation_loss"], rel=1e-5)


def test_progress_shows_loss_speed_and_time_left(tmp_path, capfd):
    shown = lines_of(("pretrain_causal_lm", tmp_path, *SHORT), capfd)
    assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, .*loss=\d\.\d{4}, tokens/s=[\d,]+\]", shown)


def test_checkpointing_computes_the_same_losses_with_adapters(pretrained, tmp_path, monkeypatch):
    arguments = ["--model", pretrained[0] / "best", *SHORT, "--lora_r", 2]
    run_recipe("finetune_causal_lm", tmp_path / "plain", *arguments)
    calls = []
    call = GradientCheckpointingLayer.__call__
    monkeypatch.setattr(
        GradientCheckpointingLayer,
        "__call__",
        lambda self, *a, **k: (calls.append(self.gradient_checkpointing and self.training), call(self, *a, **k))[1],
    )
    run_recipe("finetune_causal_lm", tmp_path / "checkpointed", *arguments, "--gradient_checkpointing")
    assert metrics(tmp_path / "checkpointed") == pytest.approx(metrics(tmp_path / "plain"), rel=1e-5)
    assert any(calls)


def test_bf16_trains_the_polynomial_as_fp32_does(tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        run_recipe("pretrain_causal_lm", tmp_path / precision, *SHORT, "--mixed_precision", precision)
        losses[precision] = metrics(tmp_path / precision)
    assert losses["bf16"] == pytest.approx(losses["no"], abs=1e-2)
    assert losses["bf16"] != losses["no"]


def test_each_run_in_a_process_has_the_precision_that_it_asks_for(tmp_path, monkeypatch):
    found = {}
    for name, words, launched in (
        ("bf16", ["--mixed_precision", "bf16"], None),
        ("empty", [], None),
        ("launched", [], "bf16"),
        ("named", ["--mixed_precision", "no"], "bf16"),
    ):
        with monkeypatch.context() as environment:
            if launched:
                environment.setenv("ACCELERATE_MIXED_PRECISION", launched)
            found[name] = run_recipe("pretrain_causal_lm", tmp_path / name, *SHORT, *words)["mixed_precision"]
    assert found == {"bf16": "bf16", "empty": "no", "launched": "bf16", "named": "no"}


@pytest.mark.parametrize("launched", [True, False])
def test_fp16_on_a_cpu_is_refused_with_the_remedy(launched, tmp_path, monkeypatch):
    words = [] if launched else ["--mixed_precision", "fp16"]
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(
        ValueError, match="fp16 needs a GPU, and this run would be on a CPU: use --mixed_precision bf16"
    ):
        run_recipe("pretrain_causal_lm", tmp_path / "run", *SHORT, *words)
    assert not (tmp_path / "run").exists()


def test_run_that_blows_up_stops_with_place_and_remedy(tmp_path):
    with pytest.raises(NonFiniteError) as error:
        run_recipe(
            *("pretrain_causal_lm", tmp_path, "--activation", "monomial", "--calibrate_batches", 0, "--degree", 9),
            *("--learning_rate", 1e5, "--warmup_steps", 3, "--eval_steps", 0, "--save_steps", 1, "--max_grad_norm", 0),
        )
    message = str(error.value)
    step = int(message.split()[1].rstrip(":"))
    assert "transformer." in message
    assert "lower learning_rate" in message
    # the checkpoint of the step before is whole and finite
    assert (tmp_path / "last").resolve().name == f"checkpoint-{step - 1:06d}"
    assert str((tmp_path / "last").resolve()) in message
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert max(metrics(tmp_path)) == step - 1
    assert MAX_SKIPPED_STEPS > 1


def test_script_ends_with_an_exit_code(tmp_path):
    """The documented command in a process of its own: it must fail aloud."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(RECIPES / "accelerate" / "cpu.yaml")),
            *(str(RECIPES / "pretrain_causal_lm.py"), debug_config("pretrain_causal_lm")),
            *("--output_dir", str(tmp_path), "--dataset", str(write_text(tmp_path)), "--learning_rate", "1e30"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        timeout=200,
    )
    assert done.returncode == 1
    # one line of the recipe's, before what accelerate says of it
    assert re.search(r"^pretrain_causal_lm.py: step \d+: ", done.stderr, re.MULTILINE), done.stderr


def test_compiled_model_is_saved_under_its_own_names(tmp_path, monkeypatch):
    """As `--torch_compile`, with a backend that needs no compiler."""
    from accelerate.state import AcceleratorState

    arguments = [*SHORT, "--model_config.n_layer", 1, "--activation", "softmax"]
    run_recipe("pretrain_causal_lm", tmp_path / "plain", *arguments)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run_recipe("pretrain_causal_lm", tmp_path / "compiled", *arguments)
    AcceleratorState._reset_state()
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(tmp_path / "plain"), rel=1e-6)
    plain, compiled = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "last") for name in ("plain", "compiled")
    )
    torch.testing.assert_close(dict(compiled.state_dict()), dict(plain.state_dict()))


@pytest.fixture
def pushed(monkeypatch) -> list:
    """What recipes push, instead of pushing it: (folder, name, private)."""
    calls = []

    def push(folder, name, *, private):
        check_folder(folder)
        calls.append((folder, name, private))
        return SimpleNamespace(commit_url="a commit")

    monkeypatch.setattr(training_run, "push", push)
    return calls


def test_push_publishes_a_model_that_stands_alone(pretrained, tmp_path, pushed, capsys):
    results = run_recipe(
        *("finetune_causal_lm", tmp_path / "mine", "--model", pretrained[0] / "best", *SHORT, "--lora_r", 2),
        *("--push_to_hub", "--hub_private", "--hub_license", "mit", "--diagnostics_steps", 5),
    )
    ((folder, name, private),) = pushed
    assert name == "mine"
    assert private
    assert "pushed: a commit" in capsys.readouterr().out
    # adapters are merged: the base is a folder on this machine
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "PolyGPT2LMHeadModel"
    assert not any("lora" in key for key in model.state_dict())
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 256
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == pytest.approx(results["best"], abs=1e-4)
    for figure in ("losses.png", "diagnostics.png"):
        assert f"]({figure})" in card.text
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (folder / "results.json").read_text() + str(card)


def test_a_push_that_fails_does_not_end_the_run(pretrained, tmp_path, monkeypatch, capsys):
    def refuse(*unused, **options):
        raise ConnectionError("the connection to the Hub broke")

    monkeypatch.setattr(training_run, "push", refuse)
    arguments = [
        "--model",
        pretrained[0] / "best",
        *SHORT,
        "--push_to_hub",
        "--hub_model_id",
        "me/mine",
        "--hub_private",
    ]
    run_recipe("finetune_causal_lm", tmp_path / "out", *arguments)
    said = capsys.readouterr().out
    assert "not pushed: the connection to the Hub broke" in said
    assert f"hf-polyattn push {tmp_path / 'out' / 'published'} --to me/mine --private" in said
    assert "names no licence" in said


def test_adapters_of_a_softmax_twin_stay_softmax(pretrained, tmp_path, monkeypatch):
    """The checkpoint it started from is polynomial; output_dir is relative, and is read from elsewhere."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", pretrained[0] / "best", "--activation", "softmax", "--lora_r", 2, "--save_steps", 2]
    run_recipe("finetune_causal_lm", Path("out"), *arguments, "--max_steps", 3, "--eval_steps", 0)
    results = run_recipe(
        "finetune_causal_lm", Path("out"), *arguments, "--max_steps", 3, "--eval_steps", 0, "--resume"
    )
    assert results["attention"] == "softmax"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert type(load_trained(AutoModelForCausalLM, tmp_path / "out" / "last")).__name__ == "GPT2LMHeadModel"


def test_adapters_say_what_they_need_and_are_found_with_it_in_another_place(pretrained, tmp_path, capsys):
    arguments = ["--model", pretrained[0] / "best", *SHORT, "--lora_r", 2]
    run_recipe("finetune_causal_lm", tmp_path / "out", *arguments)
    before = load_trained(AutoModelForCausalLM, tmp_path / "out" / "last").state_dict()
    (tmp_path / "out").rename(tmp_path / "moved")
    checkpoint = next((tmp_path / "moved").glob("checkpoint-*"))
    after = load_trained(AutoModelForCausalLM, checkpoint).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    said = (checkpoint / "README.md").read_text()
    assert f"a PolyGPT2LMHeadModel made from {pretrained[0] / 'best'}.\nIts attention is poly of degree 3." in said
    assert str(tmp_path / "out") not in said
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0
    assert f"adapters of rank 2 of {tmp_path / 'moved' / 'base'}, merged in" in capsys.readouterr().out
    (tmp_path / "moved" / "base").rename(tmp_path / "lost")
    assert main(["inspect", str(checkpoint)]) == 1
    assert f"belong to the model in {tmp_path / 'out' / 'base'}, which is not there" in capsys.readouterr().err


def test_adapters_of_a_stock_classifier_are_published_with_their_labels(tmp_path, pushed):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    tokenizer = byte_tokenizer(["pad_token", "cls_token", "sep_token"])
    # a base without labels, as on the Hub
    AutoModelForMaskedLM.from_config(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "stock"
    )
    tokenizer.save_pretrained(tmp_path / "stock")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "ab"[i % 2] * 5, "label": "xyz"[i % 3]}) + "\n" for i in range(60)))
    arguments = {"model": tmp_path / "stock", "dataset": data, "activation": "softmax", "lora_r": 2, "max_steps": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({k: str(v) for k, v in arguments.items()} | {"batch_size": 8, "max_length": 8}))
    run_recipe("finetune_classifier", tmp_path / "out", "--push_to_hub", config=str(config))
    model = AutoModelForSequenceClassification.from_pretrained(pushed[0][0])
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert type(model).__name__ == "BertForSequenceClassification"
    assert "accuracy" in ModelCard.load(pushed[0][0] / "README.md").data.metrics


def test_trackers_through_accelerate(tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker

    logged = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "ours", False, True
        tracker = None

        def store_init_configuration(self, values):
            logged.append(values)

        def log(self, values, step, **kwargs):
            logged.append((step, set(values)))

    module = recipe("pretrain_causal_lm")
    start = module.start_accelerator

    def with_tracker(*args):
        accelerator = start(*args)
        accelerator.log_with = [Tracker()]
        return accelerator

    monkeypatch.setattr(module, "start_accelerator", with_tracker)
    run_recipe("pretrain_causal_lm", tmp_path, *SHORT, "--report_to", "all")
    assert logged[0]["block_size"] == 64
    assert (4, {"validation_loss", "perplexity"}) in logged
