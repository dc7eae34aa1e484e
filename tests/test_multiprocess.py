"""Two processes with the same global batch give the losses of one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from recipe_runs import RECIPES, ROOT, debug_config, in_processes, metrics, recipe, run_recipe, write_text
from transformers import AutoModelForCausalLM

from hf_polyattn.training import checkpoint as checkpoints
from hf_polyattn.training.nonfinite import NonFiniteError

STEPS = ["--max_steps", 6, "--eval_steps", 3, "--save_steps", 3, "--batch_size", 12, "--learning_rate", 3e-3]
# no dropout: it differs between processes, as it should
GPT2 = ["--model_config", "{n_layer: 2, n_head: 2, n_embd: 32, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}"]
BERT = [
    "--model_config",
    "{num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 32, intermediate_size: 64,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}",
]
TOLERANCE = 2e-6
"""A few units in the last place of losses near 5 in fp32; what is added up in another order differs by that."""


def assert_close_metrics(a, b, names=("loss", "gradient_norm", "validation_loss")):
    for name in names:
        one, two = metrics(a, name), metrics(b, name)
        assert one.keys() == two.keys()
        # AdamW turns the rounding of a gradient near 0 into a step of full size, and gradients feel that first
        tolerance = 10 * TOLERANCE if name == "gradient_norm" else TOLERANCE
        assert one == pytest.approx(two, rel=tolerance), name
    assert metrics(a, "tokens") == metrics(b, "tokens")


def both(name, folder, arguments):
    """The same run in one process and in two."""
    run_recipe(name, folder / "one", *arguments)
    in_processes(2, lambda: run_recipe(name, folder / "two", *arguments))
    return folder / "one", folder / "two"


@pytest.mark.parametrize(
    "extra",
    [
        ["--gradient_accumulation_steps", 3, "--eval_batch_size", 64],
        ["--shuffle", "random_windows", "--activation", "softmax"],
    ],
    ids=["epochs, three parts", "random windows, softmax"],
)
def test_causal_lm(tmp_path, extra):
    text = write_text(tmp_path)
    assert_close_metrics(*both("pretrain_causal_lm", tmp_path, [*STEPS, *GPT2, "--dataset", text, *extra]))


def test_calibration_needs_no_more_memory_than_training(tmp_path):
    """The batches it sees are those of one process and one part."""
    module = recipe("pretrain_causal_lm")
    arguments = [*STEPS, *GPT2, "--dataset", write_text(tmp_path), "--gradient_accumulation_steps", 3]

    def child():
        read = module.first_inputs

        def checked(*args, **kwargs):
            for batch in read(*args, **kwargs):
                assert len(batch["input_ids"]) == 12 // 3 // 2
                yield batch

        module.first_inputs = checked
        run_recipe("pretrain_causal_lm", tmp_path / "out", *arguments, "--max_steps", 1)

    in_processes(2, child)


def test_masked_lm_with_unequal_labels_per_process(tmp_path):
    text = write_text(tmp_path)
    arguments = [*STEPS, *BERT, "--dataset", text, "--gradient_accumulation_steps", 2]
    assert_close_metrics(*both("pretrain_masked_lm", tmp_path, arguments))


def test_stream(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * (i % 7 + 5)}) + "\n" for i in range(40)))
    arguments = [*STEPS, *GPT2, "--dataset", rows, "--streaming", "--validation_rows", 10, "--block_size", 32]
    assert_close_metrics(*both("pretrain_causal_lm", tmp_path, arguments))


def test_classifier_counts_every_validation_row_once(tmp_path):
    arguments = [*STEPS, *BERT, "--max_validation_samples", 101, "--eval_batch_size", 16]
    names = ("loss", "gradient_norm", "validation_loss", "accuracy", "f1")
    assert_close_metrics(*both("finetune_classifier", tmp_path, arguments), names)


def test_prompts_and_completions(tmp_path):
    base = tmp_path / "base"
    run_recipe("pretrain_causal_lm", base, "--max_steps", 1, *GPT2)
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "a" * (i % 9 + 1), "completion": "b" * (i % 5 + 1)} for i in range(60)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [*STEPS, "--model", base / "last", "--dataset", rows, "--prompt_column", "prompt"]
    assert_close_metrics(*both("finetune_causal_lm", tmp_path, arguments))


def test_resume_needs_the_same_number_of_processes(tmp_path):
    arguments = [*STEPS, *GPT2, "--dataset", write_text(tmp_path)]
    in_processes(2, lambda: run_recipe("pretrain_causal_lm", tmp_path / "two", *arguments))
    with pytest.raises(RuntimeError, match="written by 2 processes"):
        run_recipe("pretrain_causal_lm", tmp_path / "two", *arguments, "--resume")


def test_batch_that_cannot_be_shared_is_refused(tmp_path):
    def child():
        with pytest.raises(ValueError, match="2 processes cannot share a micro batch of 3"):
            recipe("pretrain_causal_lm").main([debug_config("pretrain_causal_lm"), "--batch_size", "3"])

    in_processes(2, child)


def test_non_finite_values_are_found_on_whatever_process_has_them(tmp_path):
    def child():
        module = recipe("pretrain_causal_lm")
        collate = module.next_token_batch

        def poisoned(rows):
            batch = collate(rows)
            if os.environ["RANK"] == "1":
                # only the second process ever sees this token, whose embedding is too large
                batch["input_ids"][0, 0] = 257
            return batch

        def build(*args, **kwargs):
            model = build_model(*args, **kwargs)
            with torch.no_grad():
                model.transformer.wte.weight[257] = 3e38
            return model

        build_model = module.build_model
        module.next_token_batch, module.build_model = poisoned, build
        untied = ["--model_config.vocab_size", 258, "--model_config.tie_word_embeddings", "false"]
        arguments = [*STEPS, *GPT2, *untied, "--calibrate_batches", 0]
        with pytest.raises(NonFiniteError, match="first seen in the output of transformer"):
            run_recipe("pretrain_causal_lm", tmp_path / "out", *arguments)

    in_processes(2, child)


@pytest.mark.slow
def test_sharded_model(tmp_path):
    """FSDP2, which accelerate itself sets up on GPUs only: losses, saved model and resume are those of one process."""

    def sharded(*arguments, prune=checkpoints.prune):
        checkpoints.prune = prune
        module = recipe("pretrain_causal_lm")
        start = module.start_accelerator

        def start_sharded(*args):
            accelerator = start(*args)
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=False
            )
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            return accelerator

        module.start_accelerator = start_sharded
        run_recipe("pretrain_causal_lm", tmp_path / "two", *arguments)

    short = [*GPT2, "--dataset", write_text(tmp_path), "--max_steps", 4, "--save_steps", 2, "--eval_steps", 4]
    run_recipe("pretrain_causal_lm", tmp_path / "one", *short)
    in_processes(2, lambda: sharded(*short))
    assert_close_metrics(tmp_path / "one", tmp_path / "two")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "last") for name in ("one", "two"))
    torch.testing.assert_close(dict(two.state_dict()), dict(one.state_dict()), rtol=1e-4, atol=1e-5)

    whole = metrics(tmp_path / "two")
    # a checkpoint that nothing points to would be deleted
    in_processes(2, lambda: sharded(*short, "--overwrite", "--save_steps", 3, prune=lambda out: None))
    checkpoints.point(tmp_path / "two" / "last", tmp_path / "two" / "checkpoint-000003")
    in_processes(2, lambda: sharded(*short, "--resume"))
    assert metrics(tmp_path / "two") == whole


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    """As with a multi-GPU configuration on a machine without GPUs: all would write into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched and accelerate joined 1"):
        run_recipe("pretrain_causal_lm", tmp_path)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The launch that accelerate/cpu.yaml documents, without the helpers of this file."""
    arguments = [debug_config("pretrain_causal_lm"), "--max_steps", "4", "--gradient_accumulation_steps", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(RECIPES / "pretrain_causal_lm.py"), *arguments, "--output_dir", str(tmp_path / "two")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            assert launcher.wait(240) == 0, log.read_text()
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGTERM)
    # said by the main process alone
    assert log.read_text().count("patched 2 of 2") == 1
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    run_recipe("pretrain_causal_lm", tmp_path / "one", *arguments[1:])
    assert_close_metrics(tmp_path / "one", tmp_path / "two")
