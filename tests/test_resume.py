"""A killed run that goes on gives, bit for bit, the losses of the run that was never killed."""

import itertools
import json
import os
import pickle
import shutil

import pytest
import torch
import yaml
from recipe_runs import die, in_fork, metrics, run_recipe, write_text

from hf_polyattn.training import checkpoint as checkpoints
from hf_polyattn.training.run import Run

# GPT-2's own dropout of 0.1, so that random states matter; two parts a step
STEPS = ["--max_steps", 12, "--save_steps", 5, "--eval_steps", 4, "--gradient_accumulation_steps", 2]
GPT2 = ["--batch_size", 10, "--model_config", "{n_layer: 2, n_head: 2, n_embd: 32}"]
STREAM = ["--max_steps", 9, "--save_steps", 3, "--eval_steps", 0, "--streaming_shuffle_buffer", 3, "--streaming"]
NAMES = ("loss", "gradient_norm", "learning_rate", "validation_loss", "tokens")


def run_and_die(recipe, out, arguments, when):
    """Runs in a forked process that kills itself as kill -9 does; `when(die)` arranges it there."""

    def child():
        when(die)
        run_recipe(recipe, out, *arguments)

    assert in_fork(child) == -9


def in_step(step):
    """After `step` has been computed and logged."""

    def arrange(die):
        log = Run.log

        def log_and_die(self, at, *args, **kwargs):
            log(self, at, *args, **kwargs)
            if at == step:
                die()

        Run.log = log_and_die

    return arrange


def while_saving(count, function):
    """At the count-th save, in front of `function` of the checkpoint module."""

    def arrange(die):
        original = getattr(checkpoints, function)
        calls = itertools.count(1)

        def die_first(*args, **kwargs):
            if next(calls) == count:
                die()
            return original(*args, **kwargs)

        setattr(checkpoints, function, die_first)

    return arrange


def assert_same_metrics(a, b):
    for name in NAMES:
        assert metrics(a, name) == metrics(b, name), name
        assert metrics(a, name) or name == "validation_loss"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data"), characters=5_000)


@pytest.fixture(scope="module")
def arguments(text):
    return [*STEPS, *GPT2, "--dataset", text]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    out = tmp_path_factory.mktemp("whole")
    run_recipe("pretrain_causal_lm", out, *arguments)
    return out


def test_killed_run_resumes_across_an_epoch(whole, arguments, tmp_path):
    epochs = metrics(whole, "epoch")
    # the checkpoint of step 5 lies in another epoch than the steps after it
    assert int(epochs[5]) < int(epochs[10]), epochs
    run_and_die("pretrain_causal_lm", tmp_path, arguments, in_step(7))
    assert max(metrics(tmp_path)) == 7
    assert (tmp_path / "last").resolve().name == "checkpoint-000005"
    run_recipe("pretrain_causal_lm", tmp_path, *arguments, "--resume")
    assert_same_metrics(tmp_path, whole)


@pytest.mark.parametrize("function", ["random_state_digest", "_flush", "point", "prune"])
def test_death_while_saving_keeps_the_previous_checkpoint(whole, arguments, tmp_path, function):
    # saves: at step 4, the best so far, and at step 5; `point` is called twice for step 4
    count = 3 if function == "point" else 2
    run_and_die("pretrain_causal_lm", tmp_path, arguments, while_saving(count, function))
    last = (tmp_path / "last").resolve()
    # prune comes after the new checkpoint has been published
    assert last.name == ("checkpoint-000005" if function == "prune" else "checkpoint-000004")
    assert checkpoints.find_last(tmp_path) == last
    run_recipe("pretrain_causal_lm", tmp_path, *arguments, "--resume")
    assert_same_metrics(tmp_path, whole)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {(tmp_path / name).resolve().name for name in ("last", "best")}


def test_stream_resumes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * (i % 7 + 5)}) + "\n" for i in range(40)))
    stream = [*STREAM, "--dataset", rows, "--validation_rows", 10, "--block_size", 32]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_recipe("pretrain_causal_lm", whole, *stream)
    run_and_die("pretrain_causal_lm", killed, stream, in_step(5))
    run_recipe("pretrain_causal_lm", killed, *stream, "--resume")
    assert_same_metrics(killed, whole)


@pytest.mark.parametrize("extra", [[], ["--lora_r", 2, "--lora_dropout", 0.1]], ids=["all weights", "LoRA"])
def test_fine_tuning_resumes(whole, text, tmp_path, extra):
    arguments = [*STEPS, "--model", whole / "best", "--dataset", text, "--batch_size", 10, *extra]
    run_recipe("finetune_causal_lm", tmp_path / "whole", *arguments)
    run_and_die("finetune_causal_lm", tmp_path / "killed", arguments, in_step(7))
    run_recipe("finetune_causal_lm", tmp_path / "killed", *arguments, "--resume")
    assert_same_metrics(tmp_path / "killed", tmp_path / "whole")


def test_masked_model_and_classifier_resume(text, tmp_path):
    bert = "{num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, intermediate_size: 32}"
    for recipe, data in (("pretrain_masked_lm", ["--dataset", text]), ("finetune_classifier", [])):
        arguments = [*STEPS, "--batch_size", 10, "--model_config", bert, *data]
        run_recipe(recipe, tmp_path / recipe / "whole", *arguments)
        run_and_die(recipe, tmp_path / recipe / "killed", arguments, in_step(7))
        run_recipe(recipe, tmp_path / recipe / "killed", *arguments, "--resume")
        assert_same_metrics(tmp_path / recipe / "killed", tmp_path / recipe / "whole")


def test_nothing_to_resume_is_said(arguments, tmp_path, capsys):
    run_recipe("pretrain_causal_lm", tmp_path / "new", *arguments, "--resume", "--max_steps", 2)
    assert f"nothing to resume in {tmp_path / 'new'}: starting anew" in capsys.readouterr().out


def test_what_cannot_be_resumed_is_refused(whole, arguments, tmp_path):
    with pytest.raises(FileExistsError, match="pass --resume, --overwrite"):
        run_recipe("pretrain_causal_lm", whole, *arguments)
    with pytest.raises(ValueError, match="learning_rate: 0.001 -> 0.5"):
        run_recipe("pretrain_causal_lm", whole, *arguments, "--resume", "--learning_rate", 0.5)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    weights = copy / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="missing or cut"):
        run_recipe("pretrain_causal_lm", copy, *arguments, "--resume")
    run_recipe("pretrain_causal_lm", copy, *arguments, "--overwrite", "--max_steps", 2)
    assert max(metrics(copy)) == 2


def test_a_finished_run_says_that_nothing_is_left(whole, arguments, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    run_recipe("pretrain_causal_lm", copy, *arguments, "--resume")
    said = capfd.readouterr().out
    assert "already at step 12 of 12: nothing left to train" in said
    # and what it advises works
    advised = ["--model_type=", "--model_config={}", "--model", copy / "last", "--max_steps", 14]
    assert f"--model {copy / 'last'} and another --output_dir" in said
    run_recipe("pretrain_causal_lm", tmp_path / "longer", *arguments, *advised)
    assert max(metrics(tmp_path / "longer")) == 14
    assert_same_metrics(copy, whole)


@pytest.mark.parametrize("extra", [[], ["--resume"]], ids=["new run", "resumed"])
def test_a_checkpoint_that_is_gone_is_refused(whole, arguments, tmp_path, extra):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    shutil.rmtree((copy / "last").resolve())
    before = metrics(copy)
    with pytest.raises(FileNotFoundError, match="points to checkpoint-000012, which is not there: .* overwrite"):
        run_recipe("pretrain_causal_lm", copy, *arguments, *extra)
    assert metrics(copy) == before
    run_recipe("pretrain_causal_lm", copy, *arguments, "--overwrite", "--max_steps", 2)
    assert max(metrics(copy)) == 2


def test_checkpoint_says_how_it_was_made(whole, text):
    config = yaml.safe_load((whole / "last" / "config.yaml").read_text())
    assert config["dataset"] == str(text)
    assert config["activation"] == "poly"
    position = json.loads((whole / "last" / "position.json").read_text())
    assert position["step"] == 12
    assert "model.safetensors" in position["files"]
    # weights are stored once
    assert not (whole / "last" / "state" / "model.safetensors").exists()


class Evil:
    def __reduce__(self):
        return os._exit, (66,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_checkpoint_cannot_run_code(whole, arguments, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    torch.save(Evil(), copy / "last" / "state" / name)
    position = copy / "last" / "position.json"
    values = json.loads(position.read_text())
    values["files"][f"state/{name}"] = (copy / "last" / "state" / name).stat().st_size
    position.write_text(json.dumps(values))

    def child():
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            run_recipe("pretrain_causal_lm", copy, *arguments, "--resume")

    assert in_fork(child) == 0


def test_new_run_starts_with_empty_metrics(tmp_path, text):
    """What a run that died before its first checkpoint has left does not mix with the next one."""
    arguments = [*STEPS, *GPT2, "--dataset", text]
    run_and_die("pretrain_causal_lm", tmp_path, arguments, in_step(2))
    assert list(metrics(tmp_path)) == [1, 2]
    run_recipe("pretrain_causal_lm", tmp_path, *arguments, "--max_steps", 1)
    assert list(metrics(tmp_path)) == [1]


def test_random_state_that_does_not_come_back_is_noticed(whole, arguments, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    states = copy / "last" / "state" / "random_states_0.pkl"
    states.write_bytes(b"x" * states.stat().st_size)
    with pytest.raises(RuntimeError, match="random state"):
        run_recipe("pretrain_causal_lm", copy, *arguments, "--resume")
