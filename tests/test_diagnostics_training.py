"""Attention statistics in the recipes' runs and in `Trainer`: what is written, and that training does not notice."""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from models import patched_tiny, tiny, token_ids
from recipe_runs import RECIPES, in_fork, in_processes, metrics, run_recipe, write_text
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_polyattn.diagnostics import STATISTICS, attention_statistics, draw_statistics, read_reports
from hf_polyattn.diagnostics.statistics import GRADIENTS
from hf_polyattn.training import diagnosing
from hf_polyattn.training.diagnosing import DiagnosticsCallback, RunDiagnostics, first_sequences, keep_lines

EVERYTHING = [*STATISTICS, *GRADIENTS]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """What a Trainer leaves of its data loader in accelerate's shared state would cut the batches of later tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def short(name, out, text, *extra):
    words = ["--max_steps", 6, "--eval_steps", 0, "--overwrite", *extra]
    return run_recipe(name, out, "--dataset", text, *words)


@pytest.mark.parametrize("name", ["pretrain_causal_lm", "pretrain_masked_lm"])
@pytest.mark.parametrize("activation", ["poly", "softmax"])
def test_recipes_measure_without_a_trace_in_training(name, activation, tmp_path):
    text = write_text(tmp_path)
    losses = []
    for steps in (0, 4):
        out = tmp_path / str(steps)
        words = ["--diagnostics_steps", steps, "--activation", activation, "--model_config.attn_pdrop", 0.2]
        short(name, out, text, *(words[:4] if name == "pretrain_masked_lm" else words))
        losses.append(metrics(out))
    assert losses[0] == losses[1]
    assert not (tmp_path / "0" / diagnosing.LINES).exists()
    reports = read_reports(tmp_path / "4" / diagnosing.LINES)
    assert sorted(reports) == [1, 4, 6]
    for report in reports.values():
        assert [list(statistics) for statistics in report.modules.values()] == [EVERYTHING] * len(report.modules)
        assert (report["query_gradient"] > 0).all()
        assert torch.isfinite(report["jacobian"]).all()
    assert not torch.equal(reports[1]["score_spread"], reports[6]["score_spread"])
    assert (tmp_path / "4" / diagnosing.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path, monkeypatch):
    text = write_text(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--diagnostics_steps", 2, "--save_steps", 3]
    short("pretrain_causal_lm", whole, text, *words)
    measure = RunDiagnostics.measure

    def fail(self, step, *rest):
        if step == 4:
            # a line that was half written when the process died
            with (parts / diagnosing.LINES).open("a") as file:
                file.write('{"step": 4, "mod')
            raise KeyboardInterrupt
        return measure(self, step, *rest)

    monkeypatch.setattr(RunDiagnostics, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        short("pretrain_causal_lm", parts, text, *words)
    monkeypatch.setattr(RunDiagnostics, "measure", measure)
    run_recipe("pretrain_causal_lm", parts, "--dataset", text, "--max_steps", 6, "--eval_steps", 0, *words, "--resume")
    assert metrics(whole) == metrics(parts)
    one, other = (read_reports(folder / diagnosing.LINES) for folder in (whole, parts))
    assert sorted(one) == sorted(other) == [1, 2, 4, 6]
    for step, report in one.items():
        for name in EVERYTHING:
            torch.testing.assert_close(other[step][name], report[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "words",
    [
        ["--mixed_precision", "bf16"],
        ["--gradient_checkpointing", "true"],
        ["--gradient_accumulation_steps", 2],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_what_is_measured_does_not_depend_on_how_a_step_is_computed(words, tmp_path):
    text = write_text(tmp_path)
    one, other = tmp_path / "plain", tmp_path / "changed"
    for out, more in ((one, []), (other, words)):

        def train():
            # precision is fixed for a process
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            short("pretrain_causal_lm", out, text, "--diagnostics_steps", 3, "--max_steps", 1, *more)  # noqa: B023

        assert in_fork(train) == 0
    (plain,), (changed,) = (read_reports(out / diagnosing.LINES).values() for out in (one, other))
    # accumulation halves the micro batch, which still has enough sequences of the same distribution
    tolerance = 0.3 if "accumulation" in words[0] else 0.05
    torch.testing.assert_close(changed["frobenius"], plain["frobenius"], rtol=tolerance, atol=0)
    torch.testing.assert_close(changed["score_spread"], plain["score_spread"], rtol=tolerance, atol=0)


def test_adapters_are_measured(tmp_path):
    """Frozen layers have no gradient of their own, and the adapters wrap the model once more."""
    text = write_text(tmp_path)
    short("pretrain_causal_lm", tmp_path / "base", text)
    words = ["--model", tmp_path / "base" / "last", "--lora_r", 2, "--diagnostics_steps", 3]
    short("finetune_causal_lm", tmp_path / "lora", text, *words)
    reports = read_reports(tmp_path / "lora" / diagnosing.LINES)
    assert sorted(reports) == [1, 3, 6]
    assert (reports[1]["query_gradient"] > 0).all()


def test_two_processes_write_one_line_a_measurement(tmp_path):
    text = write_text(tmp_path)
    out = tmp_path / "two"
    in_processes(2, lambda: short("pretrain_causal_lm", out, text, "--diagnostics_steps", 3))
    assert sorted(read_reports(out / diagnosing.LINES)) == [1, 3, 6]
    assert len((out / diagnosing.LINES).read_text().splitlines()) == 3
    without = tmp_path / "without"
    in_processes(2, lambda: short("pretrain_causal_lm", without, text))
    assert metrics(out) == metrics(without)


def test_lines_of_a_run_go_to_its_tracker(tmp_path):
    from accelerate import Accelerator

    logged = {}
    accelerator = Accelerator(cpu=True)
    model = patched_tiny("gpt2", double=False)
    ids = token_ids(10)
    diagnostics = RunDiagnostics(accelerator, 2, tmp_path)
    assert [step for step in range(1, 8) if diagnostics.is_due(step, 7)] == [1, 2, 4, 6, 7]
    loss = lambda model, batch: (model(**batch).loss[None], torch.ones(1))  # noqa: E731
    logged |= diagnostics.measure(2, model, {"input_ids": ids, "labels": ids}, loss)
    assert {name.split("/")[0].removeprefix("attention_") for name in logged} == set(EVERYTHING)
    (line,) = [json.loads(line) for line in (tmp_path / diagnosing.LINES).read_text().splitlines()]
    assert line["step"] == 2
    assert line["seconds"] > 0
    # a few sequences are enough, and cost less
    expected = attention_statistics(model, [{"input_ids": ids[:8], "labels": ids[:8]}])
    torch.testing.assert_close(read_reports(tmp_path / diagnosing.LINES)[2]["jacobian"], expected["jacobian"])


def test_an_overflow_while_measuring_does_not_stop_the_run(tmp_path, capsys):
    from accelerate import Accelerator

    def loss(model, batch):
        raise OverflowError("attention output of 7e4")

    diagnostics = RunDiagnostics(Accelerator(cpu=True), 1, tmp_path)
    assert diagnostics.measure(3, tiny("gpt2"), {"input_ids": token_ids()}, loss) == {}
    assert "step 3: the attention was not measured: attention output of 7e4" in capsys.readouterr().out
    assert diagnostics.draw() is None


def test_sharded_weights_are_refused(tmp_path):
    class Sharded:
        distributed_type = DistributedType.FSDP

    with pytest.raises(ValueError, match="diagnostics_steps 5: under FSDP no process holds all weights"):
        RunDiagnostics(Sharded(), 5, tmp_path)
    assert not RunDiagnostics(Sharded(), 0, tmp_path).is_due(1, 1)


def test_first_sequences_of_a_batch():
    batch = {"input_ids": torch.arange(24).view(12, 2), "labels": torch.arange(12), "weight": torch.tensor(2.0)}
    cut = first_sequences(batch, 5)
    assert {name: tuple(x.shape) for name, x in cut.items()} == {"input_ids": (5, 2), "labels": (5,), "weight": ()}
    uneven = {"input_ids": torch.zeros(4, 2), "choices": torch.zeros(8)}
    assert first_sequences(uneven, 2) == uneven


def test_keep_lines_drops_later_steps_and_cut_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    keep_lines(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')
    keep_lines(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("patch", [False, True])
def test_trainer_logs_and_draws(patch, tmp_path):
    ids = token_ids(10)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    batch = {"input_ids": ids, "labels": ids}
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = patched_tiny("gpt2", double=False) if patch else tiny("gpt2", double=False)
        arguments = TrainingArguments(
            str(tmp_path / "trainer"), max_steps=5, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        seen = []

        class Tracker(TrainerCallback):
            """What wandb and others are to a trainer."""

            def on_log(self, args, state, control, logs, **kwargs):
                seen.append((state.global_step, logs))  # noqa: B023

        trainer.add_callback(Tracker)
        if measured:
            start = attention_statistics(model, [first_sequences(batch)])
            trainer.add_callback(DiagnosticsCallback(trainer, batch, steps=2))
        trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    reports = read_reports(tmp_path / "trainer" / diagnosing.LINES)
    assert sorted(reports) == [0, 2, 4, 5]
    for name in EVERYTHING:
        torch.testing.assert_close(reports[0][name], start[name])
    end = attention_statistics(model, [first_sequences(batch)])
    torch.testing.assert_close(reports[5]["frobenius"], end["frobenius"])
    logged = {step: logs for step, logs in seen if "attention_frobenius/layer_00" in logs}
    assert sorted(logged) == [0, 2, 4, 5]
    assert logged[5]["attention_frobenius/layer_01"] == pytest.approx(end["frobenius"][1].mean().item())
    assert (tmp_path / "trainer" / diagnosing.FIGURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="steps must be >= 1"):
        DiagnosticsCallback(trainer, batch, steps=0)


@pytest.mark.parametrize("begins", [True, False])
def test_an_overflow_while_measuring_does_not_stop_a_trainer(begins, tmp_path, monkeypatch, capsys):
    def overflow(*unused):
        raise OverflowError("attention output of 7e4")

    monkeypatch.setattr(diagnosing, "attention_statistics", overflow)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    row = {"input_ids": token_ids()[0], "labels": token_ids()[0]}
    trainer = Trainer(tiny("gpt2", double=False), arguments, train_dataset=[row] * 8)
    callback = DiagnosticsCallback(trainer, {"input_ids": token_ids()})
    if begins:
        trainer.add_callback(callback)
        trainer.train()
        assert "step 1: the attention was not measured: attention output of 7e4" in capsys.readouterr().out
    else:
        # a trainer that was given it late
        callback.on_train_end(arguments, trainer.state, trainer.control)
    assert not (tmp_path / diagnosing.FIGURE).exists()


def test_nothing_measured_is_nothing_drawn(tmp_path):
    with pytest.raises(ValueError, match="no step was measured"):
        draw_statistics({}, tmp_path / "empty.png")


def test_recipes_agree_on_where_they_measure():
    """All recipes that train: once the step is known to be finite, and before the weights move."""
    recipes = [path for path in RECIPES.glob("*.py") if "run.steps(" in path.read_text()]
    assert len(recipes) >= 4
    lines = (
        "run.check_finite(step, loss, norm, model, micro_batches, loss_of)\n"
        "run.diagnose(step, model, micro_batches, loss_of)\n"
        "optimizer.step()\n"
    )
    assert all(lines in re.sub(r"^ +", "", p.read_text(), flags=re.MULTILINE) for p in recipes)
