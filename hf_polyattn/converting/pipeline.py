"""`convert`: calibrate -> attention transfer -> distillation -> fine-tuning, resumable, with a report."""

import copy
import json
from dataclasses import replace

from accelerate import PartialState

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_parsing import mapping
from hf_polyattn_scripts import when_interrupted
from hf_polyattn_stages import ConversionArguments, ConversionTextArguments, FinetuneStage, common_settings

from ..patching import coverage, patch_model
from ..positions import positions_of
from .checks import check_settings, find_tokenizer
from .folder import ConversionFolder
from .job import Job
from .plan import entries, needs_labels, plan_stages
from .report import ConversionReport
from .results import results_of
from .sources import load_teacher
from .tasks import task_for

BLOCK = 256
"""Tokens at a time, where nothing else is said."""


def convert(
    args: ConversionArguments, attention: AttentionArguments, text: ConversionTextArguments
) -> ConversionReport:
    """Converts a softmax checkpoint in stages and writes the model and its report to args.output_dir.

    The same arguments after a stop go on where it stopped: finished stages are read, and a stage under way goes on
    from its last saved step. Stages that are not finished may have other settings then, and start anew.

    Returns:
        scores after each stage; print it.
    Raises:
        FileExistsError, ValueError: before anything is written where settings, folder, model or text do not fit; see
            `ConversionFolder`, `load_teacher` and `task_for`.
    """
    settings = check_settings(args, attention)
    if PartialState().num_processes > 1:
        raise ValueError("a conversion runs in one process: start it without accelerate's --num_processes")
    folder = ConversionFolder(args.output_dir, common_settings(args, attention, text))
    teacher = load_teacher(args.model)
    if text.block_size is None:
        text = replace(text, block_size=min(BLOCK, positions_of(teacher) or BLOCK))
    device = PartialState().device
    teacher.to(device)
    tokenizer = find_tokenizer(args, text)
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
    folder.check(entries(plan, args))
    if args.twin and not any(stage.steps for stage in plan):
        raise ValueError("twin fine-tunes softmax on as many tokens, and no stage trains on any: leave it out")
    if any(isinstance(stage.settings, FinetuneStage) for stage in plan) and not task.has_logits:
        raise ValueError(f"{type(teacher).__name__} has no logits to train on: name the stages calibrate transfer")
    if not task.has_labels and (args.twin or any(needs_labels(stage.settings) for stage in plan)):
        raise ValueError(
            "this model learns nothing from text without labels: use --distill.cross_entropy 0 in place of finetune, "
            "leave twin out, or fine-tune it afterwards with recipes/finetune_classifier.py"
        )
    patched = patch_model(copy.deepcopy(teacher), config=settings)
    heads = sum(coverage(patched).patched.values())
    if not round(min(args.shares) * heads):
        raise ValueError(f"a share of {min(args.shares):g} leaves none of {heads} heads to convert: raise it")
    folder.open()
    when_interrupted(lambda: f"interrupted. What is done is kept in {folder.out}: the same command goes on from there")
    job = Job(args, folder, teacher, task)
    student = job.run(plan, patched)
    tuned = job.tune_twin(plan) if args.twin else None
    report = ConversionReport(task.metric, task.lower_is_better, tuple(job.rows), tuned)
    (folder.out / "conversion.md").write_text(report.markdown() + "\n", encoding="utf-8")
    report.figure(folder.out / "conversion.png", job.losses)
    folder.finish(student, tokenizer, results_of(args, attention, text, plan, report, student), keep=args.keep_stages)
    return report
