"""The stages of one conversion, run one after another; those that are finished are read."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_polyattn_stages import CalibrateStage, ConversionArguments

from ..fit_report import CoefficientReport
from ..models import poly_model_class, states
from ..steps import StepCheckpoint
from .folder import ConversionFolder, say
from .plan import TWIN, Planned, twin_settings
from .report import SOFTMAX, TEACHER, TUNED, Row
from .tasks import Task
from .training import convert_heads, run_calibration, run_training

CALIBRATED = "01-calibrate"
PATCHED = "patched"


class Job:
    """What the stages of one conversion share."""

    def __init__(
        self,
        args: ConversionArguments,
        folder: ConversionFolder,
        teacher: PreTrainedModel,
        task: Task,
    ) -> None:
        self.args, self.folder, self.teacher, self.task = args, folder, teacher, task
        self.rows = [Row(SOFTMAX, self._once("00-softmax", lambda: {"score": task.score(teacher)})["score"], 0, 0.0)]
        self.losses: dict[str, list[float]] = {}
        say(f"{TEACHER}: {task.metric} {self.rows[0].score:.4f}")

    def run(self, plan: list[Planned], patched: PreTrainedModel) -> PreTrainedModel:
        """The student after all stages; `patched` is where a new one starts."""
        done = [stage for stage in plan if self.folder.read(stage.name) is not None]
        if self.folder.is_resumed:
            say(f"going on in {self.folder.out} after {', '.join(s.label for s in done) or 'no finished stage'}")
        student = self._load(done[-1].name) if done else patched
        # in the report this is what the patch alone leaves, before anything was measured
        first = self._once("00-patched", lambda: {"score": self.task.score(student)})
        self.rows.append(Row(PATCHED, first["score"], 0, 0.0))
        position = 0
        for stage in plan:
            note = self.folder.read(stage.name)
            if note is None:
                student, note = self._run_stage(stage, student, position)
                self.folder.save(stage.name, student, note)
                self._drop_models(stage)
            row = Row(stage.label, note["score"], note["tokens"], note["seconds"], note["steps"])
            self.rows.append(row)
            if note["losses"]:
                self.losses[stage.label] = note["losses"]
            say(f"{stage.label}: {self.task.metric} {row.score:.4f}, {row.seconds:.0f} s")
            position += stage.steps * self.args.batch_size
        return student

    def _run_stage(
        self, stage: Planned, student: PreTrainedModel, position: int
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        note: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "steps": 0, "losses": []}
        if isinstance(stage.settings, CalibrateStage):
            batches = self.task.batches(0, stage.settings.batches, self.args.batch_size)
            start = time.perf_counter()
            report = run_calibration(student, stage.settings, batches)
            note |= {"seconds": time.perf_counter() - start, "choices": _choices(report, self.args.shares)}
        else:
            assert stage.share is not None
            student = self._share(student, stage)
            torch.manual_seed(self.args.seed)
            student, losses, tokens, seconds = run_training(
                student,
                self.teacher,
                stage.settings,
                self.task.batches(position, stage.steps, self.args.batch_size),
                stage.steps,
                StepCheckpoint(self.folder.steps(stage.name), self.args.save_steps),
                self._loss_like,
            )
            note |= {"losses": losses, "tokens": tokens, "seconds": seconds, "steps": len(losses)}
        return student, {**note, "score": self.task.score(student)}

    def _drop_models(self, last: Planned) -> None:
        """Leaves on the disk what a stop would have to go on from."""
        if not self.args.keep_stages:
            # heads of later shares start from what calibration has found
            fitted = {CALIBRATED} if self.args.shares != [1.0] else set()
            self.folder.drop_models({last.name, *fitted})

    def _loss_like(self, model: PreTrainedModel) -> float:
        return self.task.score(model) * (1 if self.task.lower_is_better else -1)

    def _share(self, student: PreTrainedModel, stage: Planned) -> PreTrainedModel:
        """The student with as many heads polynomial as the stage's share says."""
        note = self.folder.read(CALIBRATED) or {}
        chosen = note.get("choices", {}).get(str(stage.share))
        if chosen is None:
            return student
        heads = {int(layer): tuple(which) for layer, which in chosen["heads"].items()}
        fitted = dict(states(self._load(CALIBRATED)))
        return convert_heads(student, {"layers": tuple(chosen["layers"]), "heads": heads}, fitted)

    def tune_twin(self, plan: list[Planned]) -> Row:
        """The softmax model on as many tokens, with labels, at the rates of the last stage that trains all weights."""
        settings = twin_settings(plan, sum(row.steps for row in self.rows))

        def tune() -> dict[str, Any]:
            torch.manual_seed(self.args.seed)
            model, losses, tokens, seconds = run_training(
                copy.deepcopy(self.teacher),
                self.teacher,
                settings,
                self.task.batches(0, settings.steps, self.args.batch_size),
                settings.steps,
                StepCheckpoint(self.folder.steps(TWIN), self.args.save_steps),
                self._loss_like,
            )
            score = self.task.score(model)
            return {"score": score, "tokens": tokens, "seconds": seconds, "steps": len(losses)}

        note = self._once(TWIN, tune)
        say(f"{TUNED}: {self.task.metric} {note['score']:.4f}")
        return Row(TUNED, note["score"], note["tokens"], note["seconds"], note["steps"])

    def _once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        note = self.folder.read(name)
        if note is None:
            note = work()
            self.folder.save(name, None, note)
        return note

    def _load(self, name: str) -> PreTrainedModel:
        cls = poly_model_class(type(self.teacher))
        model = cls.from_pretrained(self.folder.stages / name, dtype=torch.float32)
        return model.to(self.teacher.device).eval()  # type: ignore[arg-type]


def _choices(report: CoefficientReport | None, shares: list[float]) -> dict[str, Any]:
    """Share -> the heads to convert; none where all are."""
    if report is None or shares == [1.0]:
        return {}
    return {str(share): report.easiest(share) for share in shares}
