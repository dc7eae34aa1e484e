"""One stage of a conversion, run on a student: what each kind of stage calls."""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_polyattn_arguments import LoraArguments
from hf_polyattn_stages import CalibrateStage, DistillStage, FinetuneStage, TransferStage

from ..activations import change_config
from ..calibration import calibrate
from ..conversion import transfer_attention
from ..distillation import distill
from ..fit_report import CoefficientReport
from ..models import read_settings, states
from ..patching import patch_model
from ..state import PolyAttentionState
from ..steps import EarlyStop, StepCheckpoint
from ..training.lora import add_lora

Losses = list[float]
Score = Callable[[PreTrainedModel], float]


def run_calibration(
    student: PreTrainedModel, stage: CalibrateStage, batches: Iterable[Any]
) -> CoefficientReport | None:
    """Fits the student; the report where it tells how well each head is followed."""
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    options = {"inputs": stage.inputs, "monotone": stage.monotone} if stage.fit == "coefficients" else {}
    report = calibrate(student, inputs, fit=stage.fit, **options)
    tqdm.write(str(report), file=sys.stderr)
    return report if isinstance(report, CoefficientReport) else None


def run_training(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    stage: TransferStage | DistillStage | FinetuneStage,
    batches: Iterable[Any],
    steps: int,
    checkpoint: StepCheckpoint,
    score: Score,
) -> tuple[PreTrainedModel, Losses, int, float]:
    """(student, its losses, tokens, seconds); adapters are merged into the student that comes back."""
    if isinstance(stage, TransferStage):
        options = {name: value for name, value in asdict(stage).items() if name != "steps"}
        report: Any = transfer_attention(student, teacher, batches, steps=steps, checkpoint=checkpoint, **options)
        tqdm.write(str(report), file=sys.stderr)
        return student, report.losses.mean(1).tolist(), report.tokens, report.seconds
    skipped = ("steps", "eval_steps", "patience", "lora_r", "lora_alpha")
    options = {name: value for name, value in asdict(stage).items() if name not in skipped}
    if not isinstance(stage, DistillStage):
        options["cross_entropy"] = 1.0
    with tempfile.TemporaryDirectory() as folder:
        trained = _with_adapters(student, stage, Path(folder)) if stage.lora_r else student
        early = EarlyStop(lambda: score(trained), stage.eval_steps, stage.patience) if stage.patience else None
        report = distill(
            trained,
            teacher if isinstance(stage, DistillStage) else None,
            batches,
            steps=steps,
            checkpoint=checkpoint,
            early_stop=early,
            **options,
        )
    tqdm.write(str(report), file=sys.stderr)
    # PEFT freezes what is under its adapters, and leaves it so: the next stage may train all weights
    merged = trained.merge_and_unload().requires_grad_(True) if stage.lora_r else trained  # type: ignore[operator]
    return merged, report.losses.tolist(), report.tokens, report.seconds


def _with_adapters(student: PreTrainedModel, stage: FinetuneStage, folder: Path) -> Any:
    arguments = LoraArguments(lora_r=stage.lora_r, lora_alpha=stage.lora_alpha)
    return add_lora(Accelerator(cpu=student.device.type == "cpu"), student, arguments, folder)


def convert_heads(
    student: PreTrainedModel, chosen: dict[str, Any], fitted: dict[str, PolyAttentionState]
) -> PreTrainedModel:
    """The student with the heads `chosen` polynomial, in place: those that were keep what they have learned.

    chosen: the options `layers` and `heads` of patch_model.
    fitted: states of all heads, after calibration, which new heads start from.
    """
    learned = {name: copy.deepcopy(state) for name, state in states(student).items()}
    patch_model(student, config=change_config(read_settings(student.config), **chosen))
    with torch.no_grad():
        for name, state in states(student).items():
            # what was learned goes over what was fitted
            for source in (fitted[name], learned.get(name)):
                if source is not None:
                    state.keep(source, calibrated=False)
    return student
