"""`convert`: calibrate -> attention transfer -> distillation -> fine-tuning, resumable, with a report."""

import copy
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_polyattn_arguments import AttentionArguments, mapping
from hf_polyattn_stages import (
    STAGES,
    CalibrateStage,
    ConversionArguments,
    ConversionTextArguments,
    FinetuneStage,
    Stage,
    settings_yaml,
)

from ..activations import resolve_config
from ..coefficient_fit import check_linear
from ..config import PolyAttentionConfig
from ..models import poly_model_class, states
from ..patching import coverage, patch_model
from ..steps import StepCheckpoint
from ..training.data import load_texts, texts_of
from ..training.devices import device_name, peak_mib
from ..training.tokenizers import load_tokenizer
from .folder import ConversionFolder
from .report import SOFTMAX, TUNED, ConversionReport, Row
from .sources import is_gguf, load_own_tokenizer, load_teacher
from .tasks import Task, task_for
from .training import convert_heads, run_calibration, run_training

PACKAGES = ("hf-polyattn", "torch", "transformers", "accelerate", "datasets", "peft")
BLOCK = 256
"""Tokens at a time, where nothing else is said."""
CALIBRATED = "01-calibrate"
PATCHED = "patched"


@dataclass(frozen=True)
class Planned:
    """One stage at one share of the heads."""

    name: str
    """Of its folder."""
    label: str
    kind: str
    settings: Any
    steps: int
    share: float | None
    """Of the heads that are to be polynomial from here on; None for calibration, which measures all."""


def convert(
    args: ConversionArguments, attention: AttentionArguments, text: ConversionTextArguments
) -> ConversionReport:
    """Converts a softmax checkpoint in stages and writes the model and its report to args.output_dir.

    The same arguments after a stop go on where it stopped: finished stages are read, and a stage under way goes on
    from its last saved step.

    Returns:
        scores after each stage; print it.
    Raises:
        FileExistsError, ValueError: before anything is loaded where settings, folder or model do not fit; see
            `ConversionFolder`, `load_teacher` and `task_for`.
    """
    settings = _check(args, attention)
    if PartialState().num_processes > 1:
        raise ValueError("a conversion runs in one process: start it without accelerate's --num_processes")
    folder = ConversionFolder(args.output_dir, settings_yaml(args, attention, text))
    teacher = load_teacher(args.model)
    if text.block_size is None:
        positions = getattr(teacher.config, "max_position_embeddings", None) or BLOCK
        text = replace(text, block_size=min(BLOCK, positions))
    device = PartialState().device
    teacher.to(device)
    tokenizer = _tokenizer(args, text)
    task = task_for(
        teacher,
        tokenizer,
        text,
        batch_size=args.batch_size,
        validation_batches=args.validation_batches,
        seed=args.seed,
    )
    distill = mapping("distill", args.distill)
    if task.has_logits and not task.has_labels and not args.stages and "cross_entropy" not in distill:
        # the teacher's decisions are all that there is to learn from
        args = replace(args, distill=json.dumps({**distill, "cross_entropy": 0.0}))
    plan = plan_stages(args, task.has_logits)
    if args.twin and not any(stage.steps for stage in plan):
        raise ValueError("twin fine-tunes softmax on as many tokens, and no stage trains on any: leave it out")
    if any(isinstance(stage.settings, FinetuneStage) for stage in plan) and not task.has_logits:
        raise ValueError(f"{type(teacher).__name__} has no logits to train on: name the stages calibrate transfer")
    if not task.has_labels and (args.twin or any(_needs_labels(stage.settings) for stage in plan)):
        raise ValueError(
            "this model learns nothing from text without labels: use --distill.cross_entropy 0 in place of finetune, "
            "leave twin out, or fine-tune it afterwards with recipes/finetune_classifier.py"
        )
    patched = patch_model(copy.deepcopy(teacher), config=settings)
    heads = sum(coverage(patched).patched.values())
    if not round(min(args.shares) * heads):
        raise ValueError(f"a share of {min(args.shares):g} leaves none of {heads} heads to convert: raise it")
    folder.open()
    job = _Job(args, folder, teacher, task)
    student = job.run(plan, patched)
    tuned = job.tune_twin() if args.twin else None
    report = ConversionReport(task.metric, task.lower_is_better, tuple(job.rows), tuned)
    (folder.out / "conversion.md").write_text(report.markdown() + "\n", encoding="utf-8")
    report.figure(folder.out / "conversion.png", job.losses)
    folder.finish(student, tokenizer, _results(args, attention, text, report, student), keep=args.keep_stages)
    return report


def plan_stages(args: ConversionArguments, has_logits: bool) -> list[Planned]:
    """Every stage at every share, in order; the steps of a stage are divided among the shares."""
    default = ("calibrate", "transfer", "distill") if has_logits else ("calibrate", "transfer")
    stages = args.plan(default)
    planned: list[Planned] = []

    def add(kind: str, settings: Stage, steps: int, share: float | None, end: str) -> None:
        name = f"{len(planned) + 1:02d}-{kind}{end.replace(' ', '-').replace('%', '')}"
        planned.append(Planned(name, kind + end, kind, settings, steps, share))

    if stages and isinstance(stages[0][1], CalibrateStage):
        add("calibrate", stages.pop(0)[1], 0, None, "")
    for share in args.shares:
        end = f" {share:.0%}" if args.shares != [1.0] else ""
        for kind, settings in stages:
            add(kind, settings, max(1, round(settings.steps / len(args.shares))), share, end)  # type: ignore[union-attr]
    return planned


class _Job:
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
        self.say(f"{SOFTMAX}: {task.metric} {self.rows[0].score:.4f}")

    def run(self, plan: list[Planned], patched: PreTrainedModel) -> PreTrainedModel:
        """The student after all stages; `patched` is where a new one starts."""
        done = [stage for stage in plan if self.folder.read(stage.name) is not None]
        if self.folder.is_resumed:
            self.say(f"going on in {self.folder.out} after {', '.join(s.label for s in done) or 'no finished stage'}")
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
            row = Row(stage.label, note["score"], note["tokens"], note["seconds"], note["steps"])
            self.rows.append(row)
            if note["losses"]:
                self.losses[stage.label] = note["losses"]
            self.say(f"{stage.label}: {self.task.metric} {row.score:.4f}, {row.seconds:.0f} s")
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

    def _loss_like(self, model: PreTrainedModel) -> float:
        return self.task.score(model) * (1 if self.task.lower_is_better else -1)

    def _share(self, student: PreTrainedModel, stage: Planned) -> PreTrainedModel:
        """The student with as many heads polynomial as the stage's share says."""
        note = self.folder.read(CALIBRATED) or {}
        chosen = note.get("choices", {}).get(f"{stage.share:g}")
        if chosen is None:
            return student
        heads = {int(layer): tuple(which) for layer, which in chosen["heads"].items()}
        fitted = dict(states(self._load(CALIBRATED)))
        return convert_heads(student, {"layers": tuple(chosen["layers"]), "heads": heads}, fitted)

    def tune_twin(self) -> Row:
        """The softmax model on as many tokens, with labels, at the rates of the last stage that trains all weights."""
        steps = sum(row.steps for row in self.rows)
        planned = [settings for _, settings in self.args.plan(("calibrate", "transfer", "distill"))]
        stages = [s for s in planned if isinstance(s, FinetuneStage) and not s.lora_r]
        names = set(FinetuneStage.__dataclass_fields__)
        last = {name: value for name, value in asdict(stages[-1]).items() if name in names} if stages else {}
        settings = FinetuneStage(**{**last, "steps": steps})
        if settings.patience:
            # it may choose its best weights as the student does, and sees as many tokens all the same
            settings = replace(settings, patience=steps)

        def tune() -> dict[str, Any]:
            torch.manual_seed(self.args.seed)
            model, losses, tokens, seconds = run_training(
                copy.deepcopy(self.teacher),
                self.teacher,
                settings,
                self.task.batches(0, settings.steps, self.args.batch_size),
                settings.steps,
                StepCheckpoint(self.folder.steps("99-softmax-tuned"), self.args.save_steps),
                self._loss_like,
            )
            score = self.task.score(model)
            return {"score": score, "tokens": tokens, "seconds": seconds, "steps": len(losses)}

        note = self._once("99-softmax-tuned", tune)
        self.say(f"{TUNED}: {self.task.metric} {note['score']:.4f}")
        return Row(TUNED, note["score"], note["tokens"], note["seconds"], note["steps"])

    def _once(self, name: str, work: Any) -> dict[str, Any]:
        note = self.folder.read(name)
        if note is None:
            note = work()
            self.folder.save(name, None, note)
        return note

    def _load(self, name: str) -> PreTrainedModel:
        cls = poly_model_class(type(self.teacher))
        model = cls.from_pretrained(self.folder.stages / name, dtype=torch.float32)
        return model.to(self.teacher.device).eval()  # type: ignore[arg-type]

    @staticmethod
    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def _check(args: ConversionArguments, attention: AttentionArguments) -> PolyAttentionConfig:
    """The settings of the patch.

    Raises ValueError for what means nothing here, and for polynomials that least squares cannot fit.
    """
    untouched = AttentionArguments()
    for name, instead in {
        "calibrate_batches": "calibrate.batches",
        "calibration_fit": "calibrate.fit",
        "calibration_target": "calibrate.fit",
        "transfer_steps": "transfer.steps",
    }.items():
        if getattr(attention, name) != getattr(untouched, name):
            raise ValueError(f"{name} belongs to the other recipes: use --{instead}")
    if attention.activation == "softmax":
        raise ValueError("softmax to softmax is no conversion: name a polynomial")
    named = {"alpha": "auto", "gain": "auto", **attention.options()}
    settings = resolve_config(attention.activation or "poly", **named)
    for _, stage in args.plan(tuple(STAGES)):
        if isinstance(stage, CalibrateStage) and stage.fit == "coefficients":
            try:
                check_linear(settings)
            except ValueError as error:
                raise ValueError(f"{error}; here: --calibrate.fit gain") from error
        if isinstance(stage, CalibrateStage) and stage.fit == "gain" and args.shares != [1.0]:
            raise ValueError("shares go by how well coefficients follow each head: use --calibrate.fit coefficients")
    return settings


def _needs_labels(settings: Any) -> bool:
    return isinstance(settings, FinetuneStage) and getattr(settings, "cross_entropy", 1.0) > 0


def _tokenizer(args: ConversionArguments, text: ConversionTextArguments) -> PreTrainedTokenizerBase:
    if is_gguf(args.model) and not text.tokenizer:
        return load_own_tokenizer(args.model)
    texts = texts_of(*load_texts(text), columns=[text.text_column])
    return load_tokenizer(text.tokenizer or args.model, texts, special_tokens=())


def _choices(report: Any, shares: list[float]) -> dict[str, Any]:
    """Share -> the heads to convert; none where all are."""
    if report is None or shares == [1.0]:
        return {}
    return {f"{share:g}": report.easiest(share) for share in shares}


def _results(
    args: ConversionArguments,
    attention: AttentionArguments,
    text: ConversionTextArguments,
    report: ConversionReport,
    student: PreTrainedModel,
) -> dict[str, Any]:
    """What results.json holds, as the recipes write it, so that a model card can be made of it."""
    key = "validation_loss" if report.metric == "loss" else report.metric
    score = report.rows[-1].score
    return {
        key: score,
        "best": score,
        "best_metric": key,
        "softmax": report.rows[0].score,
        "recipe": "convert",
        "steps": report.steps,
        "seed": args.seed,
        "attention": student.config.polyattn,
        "parameters": sum(p.numel() for p in student.parameters()),
        "tokens": report.tokens,
        "seconds": report.seconds,
        "peak_mib": peak_mib(),
        "device": device_name(student.device),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": shlex.join(sys.argv),
        "arguments": {**asdict(args), **_named(attention), **asdict(text)},
        "plan": [[kind, asdict(settings)] for kind, settings in args.plan(())],
        "stages": report.to_dict(),
    }


def _named(attention: AttentionArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(attention).items() if value is not None}
