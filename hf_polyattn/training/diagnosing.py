"""Attention statistics while a model trains: in the recipes' runs, and as a callback for `Trainer`.

Both measure a few sequences every so many steps, in eval mode and without touching weights, gradients or random
states, so that a run trains bit for bit as it would without.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..diagnostics.figure import draw_statistics
from ..diagnostics.measuring import attention_statistics
from ..diagnostics.report import append_report, read_reports
from .checkpoint import PARTIAL
from .losses import Loss

LINES = "diagnostics.jsonl"
"""File of a run's folder: one line a measurement, see `diagnostics.report`."""
FIGURE = "diagnostics.png"
SEQUENCES = 8
"""Sequences of a batch that are measured: enough for every head, few enough to cost little."""
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class RunDiagnostics:
    """What a recipe's run measures of its attention, every `every` steps; 0: nothing.

    Step s is measured on the first sequences of its own batch, with the weights before its update, so a resumed run
    writes the lines of an uninterrupted one. The main process measures; the others wait for it at the next step.

    Raises:
        ValueError: where the weights are sharded over processes.
    """

    def __init__(self, accelerator: Accelerator, every: int, folder: Path) -> None:
        if every and accelerator.distributed_type in SHARDING:
            raise ValueError(
                f"diagnostics_steps {every}: under {accelerator.distributed_type.value} no process holds all weights. "
                "Set it to 0 and measure a saved checkpoint with hf_polyattn.diagnostics.attention_statistics"
            )
        self.accelerator, self.every, self.folder = accelerator, every, folder

    def is_due(self, step: int, total_steps: int) -> bool:
        """The first step, the last one and every one between that `every` divides."""
        return self.every > 0 and (step in (1, total_steps) or step % self.every == 0)

    def measure(
        self, step: int, model: nn.Module, batch: Mapping[str, torch.Tensor], loss_of: Loss
    ) -> dict[str, float]:
        """Appends a line to diagnostics.jsonl; returns what trackers get, nothing on other processes than the main."""
        if not self.accelerator.is_main_process:
            return {}

        def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            sums, counts = loss_of(model, batch)
            return sums.sum() / counts.sum().clamp(min=1)

        return _append_line(self.folder, self.accelerator, step, model, first_sequences(batch), loss)

    def draw(self) -> Path | None:
        """diagnostics.png, from all lines there are; None where nothing was measured."""
        return _draw(self.folder) if self.every and self.accelerator.is_main_process else None


class DiagnosticsCallback(TrainerCallback):
    """Attention statistics of a fixed batch, every `steps` steps of a `Trainer`.

    They go to the trainer's log, and so to its trackers, as means over the heads ("attention_frobenius/layer_00"); to
    `<output_dir>/diagnostics.jsonl`, head by head; and, when training ends, to `<output_dir>/diagnostics.png`.

    Args:
        trainer: whose log to write to; works before and after `add_callback`.
        batch: model inputs; with labels, gradients are measured too. At most SEQUENCES of them are read.
        steps: between two measurements; the first is before the first step, the last after the last.

    Example:
        >>> trainer.add_callback(DiagnosticsCallback(trainer, batch))
    """

    def __init__(self, trainer: Trainer, batch: Mapping[str, torch.Tensor], steps: int = 100) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "under FSDP and DeepSpeed no process holds all weights: measure a saved checkpoint instead"
            )
        self.trainer, self.batch, self.steps = trainer, first_sequences(batch), steps
        # where Trainer itself writes when it is given no folder
        self.folder = Path(trainer.args.output_dir or "trainer_output")
        self._last = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = self.folder / LINES
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(path, state.global_step - 1)
        self._measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the last step too, here and not when training has ended: by then the best weights may have been loaded
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps or control.should_training_stop:
            self._measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            _draw(self.folder)

    def _measure(self, state: TrainerState) -> None:
        if state.global_step == self._last or not state.is_world_process_zero:
            return
        self._last = state.global_step
        trainer = self.trainer
        assert trainer.model is not None
        if scalars := _append_line(self.folder, trainer.accelerator, state.global_step, trainer.model, self.batch):
            trainer.log(scalars)


def _append_line(
    folder: Path,
    accelerator: Accelerator,
    step: int,
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    loss: Callable[..., torch.Tensor] | None = None,
) -> dict[str, float]:
    """Measures, and appends a line to diagnostics.jsonl; what trackers get, nothing where float16 overflowed."""
    start = time.perf_counter()
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    try:
        with accelerator.autocast():
            report = attention_statistics(bare, [batch], loss)
    except OverflowError as error:
        # what is measured must not stop the run: its own steps are looked at elsewhere
        accelerator.print(f"step {step}: the attention was not measured: {error}")
        return {}
    append_report(folder / LINES, step, report, seconds=round(time.perf_counter() - start, 4))
    return report.scalars()


def _draw(folder: Path) -> Path | None:
    """diagnostics.png, from all lines there are; None where nothing was measured."""
    path = folder / LINES
    reports = read_reports(path) if path.exists() else {}
    return draw_statistics(reports, folder / FIGURE) if reports else None


def first_sequences(batch: Mapping[str, Any], count: int = SEQUENCES) -> dict[str, Any]:
    """The first rows of all tensors of a batch that have one row a sequence."""
    rows = {len(x) for x in batch.values() if isinstance(x, torch.Tensor) and x.ndim}
    if len(rows) != 1:
        # something in it is not sorted by sequence: cutting it would mix them up
        return dict(batch)
    return {name: x[:count] if isinstance(x, torch.Tensor) and x.ndim else x for name, x in batch.items()}


def keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of a .jsonl file, where there is one, of steps after `last_step`: they will be done again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # the last line of a killed process may be cut
        if line.endswith("}") and json.loads(line)["step"] <= last_step:
            lines.append(line + "\n")
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(path)
