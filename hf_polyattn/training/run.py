"""One training run: its folder, its steps with a progress bar, its metrics, its checkpoints, its results."""

import itertools
import json
import logging
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_polyattn_arguments import OptimizationArguments, RunArguments
from hf_polyattn_parsing import Group, as_yaml
from hf_polyattn_scripts import ExpectedError, when_interrupted

from .. import versions
from ..figures import copy_beside, draw_losses
from ..hub import CARD, push
from ..model_card import model_card, portable
from .checkpoint import find_last, load_state, prune, read_position, register_hooks, save_checkpoint
from .devices import device_name, peak_mib
from .diagnosing import FIGURE, LINES, SHARDING, RunDiagnostics, keep_lines
from .lora import ADAPTER, BASE, load_trained
from .losses import Loss
from .models import print_once
from .nonfinite import NOT_REPEATABLE, REMEDY, SHARDED, NonFiniteError, find_nonfinite
from .optimization import check_deepspeed_clipping
from .precision import settle_precision

PUBLISHED = "published"
"""Folder below a run's own that holds what was pushed."""
MAY_CHANGE = {
    *("output_dir", "resume", "overwrite", "report_to", "push_to_hub", "hub_model_id", "hub_private", "hub_license"),
    *("eval_steps", "eval_batch_size", "save_steps", "logging_steps", "num_workers"),
    "diagnostics_steps",
}
"""Arguments that may differ when a run is resumed: they do not enter the losses."""
MAX_SKIPPED_STEPS = 25
"""Steps in a row that fp16's gradient scaler may skip before the run is stopped."""


def start_accelerator(optimization: OptimizationArguments, args: RunArguments) -> Accelerator:
    """An Accelerator whose batches are global: batch_size does not grow with the number of processes.

    Raises ValueError when the processes cannot share a batch evenly, and for fp16 on a CPU.
    """
    settle_precision(optimization.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=optimization.mixed_precision,
        # a step's micro batches are drawn before the first of them is computed, so the loader's end must not count
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=optimization.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False),
        rng_types=[],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        dynamo_backend="inductor" if optimization.torch_compile else None,
    )
    check_deepspeed_clipping(getattr(accelerator.state, "deepspeed_plugin", None), optimization.max_grad_norm)
    processes = accelerator.num_processes
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != processes:
        # happens with a multi-GPU configuration on a machine without GPUs: every process would train alone
        raise ExpectedError(
            f"{launched} processes were launched and accelerate joined {processes}: choose an accelerate "
            "configuration for this machine, or set ACCELERATE_USE_CPU=true with torchrun"
        )
    for what, size in (("micro batch", optimization.micro_batch_size), ("eval_batch_size", args.eval_batch_size)):
        if size % processes:
            raise ValueError(f"{processes} processes cannot share a {what} of {size} sequences: use a multiple")
    register_hooks(accelerator)
    _speak(accelerator)
    return accelerator


def _speak(accelerator: Accelerator) -> None:
    """What was patched and measured is printed once; progress bars of minor work only where somebody watches."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_polyattn").setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


class Run:
    """The state of one run.

    first_step: steps that are done already. checkpoint: where to load the model from to go on, None for a new run.
    best: best score so far. higher_is_better: for scores such as an accuracy; a loss otherwise.
    """

    def __init__(
        self, accelerator: Accelerator, args: RunArguments, *groups: Group, higher_is_better: bool = False
    ) -> None:
        self.accelerator, self.args = accelerator, args
        self.config_yaml = as_yaml(*groups, args)
        self.sign = -1 if higher_is_better else 1
        self.out = Path(args.output_dir)
        self.checkpoint: Path | None = None
        self.first_step = 0
        self.best: float | None = None
        self.seconds = 0.0
        self.tokens = 0
        self._skipped = self._step = self._total_steps = 0
        self._latest: dict[str, Any] = {}
        self._diagnostics = RunDiagnostics(accelerator, args.diagnostics_steps, self.out)
        self._open_folder()
        when_interrupted(self._where_it_stopped)
        if args.report_to != "none":
            values = yaml.safe_load(self.config_yaml)
            accelerator.init_trackers("hf_polyattn", {k: v if _is_scalar(v) else str(v) for k, v in values.items()})
            if args.report_to != "all" and accelerator.is_main_process and not accelerator.trackers:
                raise ValueError(f"report_to {args.report_to}: it is not installed: pip install {args.report_to}")

    def _open_folder(self) -> None:
        args, out = self.args, self.out
        if args.overwrite and args.resume:
            raise ValueError("resume and overwrite exclude each other")
        self.checkpoint = find_last(out) if not args.overwrite else None
        if self.checkpoint is not None and not args.resume:
            raise FileExistsError(f"{out} holds a run already: pass --resume, --overwrite or another --output_dir")
        if self.checkpoint is not None:
            self._read_checkpoint(self.checkpoint)
        elif args.resume:
            print_once(f"nothing to resume in {out}: starting anew")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if args.overwrite:
                _remove_run(out)
            out.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is not None:
                prune(out)
            for name in ("metrics.jsonl", LINES):
                self._cut_lines(self.out / name)
        self.accelerator.wait_for_everyone()

    def _read_checkpoint(self, folder: Path) -> None:
        old = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        new = yaml.safe_load(self.config_yaml)
        changed = sorted(k for k in {*old, *new} - MAY_CHANGE if old.get(k) != new.get(k))
        if changed:
            differences = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
            raise ValueError(f"{folder} cannot be resumed with other arguments ({differences}): losses would differ")
        position = read_position(folder)
        self.first_step, self.best = position["step"], position["best"]
        self.seconds, self.tokens, self._latest = position["seconds"], position["tokens"], position["latest"]
        print_once(f"resuming from step {self.first_step} in {folder}")

    def _cut_lines(self, path: Path) -> None:
        """Drops the lines of steps that will be done again; all of them where nothing is resumed."""
        if self.checkpoint is None:
            path.unlink(missing_ok=True)
        keep_lines(path, self.first_step)

    def load_state(self) -> None:
        """Optimizer and random states of the checkpoint, if there is one; call it after `accelerator.prepare`."""
        if self.checkpoint is not None:
            load_state(self.accelerator, self.checkpoint)

    def steps(self, loader: Iterable[Any], total_steps: int) -> Iterator[tuple[int, list[dict[str, torch.Tensor]]]]:
        """(step, its micro batches on this process) for each step left, counted from 1, with a progress bar."""
        if self.first_step >= total_steps:
            # the learning rate follows the number of steps, so that a longer run is another run
            last = self.out / "last"
            source = "" if (last / ADAPTER).exists() else f"--model {last} and "
            print_once(
                f"already at step {self.first_step} of {total_steps}: nothing left to train. For more steps start "
                f"another run, with {source}another --output_dir"
            )
            return
        self._total_steps = total_steps
        parts = self.accelerator.gradient_accumulation_steps
        batches = iter(loader)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=self.first_step,
            disable=not self.accelerator.is_main_process,
            # a log file gets a line now and then, not ten each second
            mininterval=0.1 if terminal else 30,
            unit="step",
            dynamic_ncols=True,
        )
        with self._bar:
            for step in range(self.first_step + 1, total_steps + 1):
                self._mark, self._step = time.perf_counter(), step
                micro_batches = list(itertools.islice(batches, parts))
                if len(micro_batches) < parts:
                    raise RuntimeError(f"the data ended in step {step} of {total_steps}")
                yield step, micro_batches
                self._bar.update()

    def loss(self, loss_of: Loss, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        """loss_of(model, batch); an attention output beyond fp16's range stops the run as a NaN does."""
        try:
            return loss_of(model, batch)
        except OverflowError as error:
            raise NonFiniteError(f"step {self._step}: {error}. {REMEDY}. {self._kept()}") from error

    def _kept(self) -> str:
        last = self.out / "last"
        return f"The last good checkpoint is {last.resolve()}" if last.exists() else "No checkpoint was written yet"

    def _where_it_stopped(self) -> str:
        """After Ctrl-C; empty but on the main process."""
        if not self.accelerator.is_main_process:
            return ""
        last = self.out / "last"
        kept = self._kept()
        if last.exists():
            kept += f", of step {read_position(last)['step']}: the same command with --resume goes on from it"
        return f"interrupted in step {self._step}. {kept}"

    def check_finite(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, model: nn.Module, batches: list[dict], loss_of: Loss
    ) -> None:
        """Call it before the optimizer's step, so that the weights are still those of the step before.

        Under DeepSpeed they are not: its engine has stepped at the end of backward, and only `last` is left of before.
        Raises NonFiniteError when the loss or the gradient's norm, equal on all processes, is not a number. Under fp16
        a gradient may overflow now and then: the scaler skips that step; MAX_SKIPPED_STEPS in a row are an error.
        """
        finite = torch.isfinite(torch.stack([loss.detach().float(), norm.detach().float()])).tolist()
        self._skipped = self._skipped + 1 if not finite[1] else 0
        if all(finite) or (finite[0] and self.accelerator.scaler is not None and self._skipped < MAX_SKIPPED_STEPS):
            return
        what = "gradient norm" if finite[0] else "loss"
        value = norm if finite[0] else loss
        place = self._find_nonfinite(model, batches, loss_of)
        raise NonFiniteError(
            f"step {step}: the {what} is {value.item()}; first seen in {place}. {REMEDY}. {self._kept()}"
        )

    def diagnose(self, step: int, model: nn.Module, batches: list[dict], loss_of: Loss) -> None:
        """Measures the attention in the steps that diagnostics_steps names; call it before the optimizer's step."""
        if self._diagnostics.is_due(step, self._total_steps):
            self.accelerator.log(self._diagnostics.measure(step, model, batches[0], loss_of), step=step)

    def _find_nonfinite(self, model: nn.Module, batches: list[dict], loss_of: Loss) -> str:
        kind = self.accelerator.distributed_type
        if kind in SHARDING:
            # a process that finds something stops early, and the others would wait for its shards
            return SHARDED.format(kind.value)
        with self.accelerator.autocast():
            place = find_nonfinite(self.accelerator.unwrap_model(model, keep_torch_compile=False), batches, loss_of)
        # only the process that holds the bad example finds it
        return next((found for found in gather_object([place]) if found), NOT_REPEATABLE)

    def log(self, step: int, tokens: int, **values: float) -> None:
        """One line of metrics.jsonl and of the tracker; `tokens` is what the step has read."""
        seconds = time.perf_counter() - self._mark
        self.seconds += seconds
        self.tokens += tokens
        values = {name: float(value) for name, value in values.items()}
        self._latest = {**self._latest, **values}
        rate = tokens / seconds
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}", "tokens/s": f"{rate:,.0f}"}, refresh=False)
        if step % self.args.logging_steps == 0:
            more = {"tokens": self.tokens, "tokens_per_second": rate, "seconds": self.seconds, "peak_mib": peak_mib()}
            self._write(step, {**values, **more})

    def log_evaluation(self, step: int, **values: float) -> None:
        """Like `log`, for values on the validation data."""
        values = {name: float(value) for name, value in values.items()}
        self._latest = {**self._latest, **values}
        self._write(step, values)
        print_once(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)

    def is_due(self, every: int, step: int, total_steps: int) -> bool:
        """Whether something that happens every `every` steps, and at the end, happens after `step`."""
        return step == total_steps or (every > 0 and step % every == 0)

    def save(
        self, step: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, score: float | None = None
    ) -> None:
        """A checkpoint, which becomes `last`, and `best` if `score` is the best so far. All processes must call it."""
        best = self.is_best(score)
        if best:
            self.best = score
        position = {
            "step": step,
            "best": self.best,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "latest": self._latest,
        }
        save_checkpoint(self.out, self.accelerator, model, tokenizer, position, self.config_yaml, best)

    def is_best(self, score: float | None) -> bool:
        """Whether `score` beats all before it; None, no evaluation, does not, and no more does NaN or infinity."""
        if score is None or not math.isfinite(score):
            return False
        return self.best is None or self.sign * score < self.sign * self.best

    def finish(
        self, auto_class: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase, **values: Any
    ) -> dict[str, Any]:
        """Writes OUT/results.json, publishes the best checkpoint if asked, and returns what results.json holds."""
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        settings = getattr(bare.config, "polyattn", None)
        results = {
            **self._latest,
            "best": self.best,
            **values,
            "attention": settings or "softmax",
            "parameters": sum(p.numel() for p in bare.parameters()),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else math.nan,
            "peak_mib": peak_mib(),
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "device": device_name(self.accelerator.device),
            "python": platform.python_version(),
            "versions": versions.of_packages(),
            "command": shlex.join(sys.argv),
            "arguments": yaml.safe_load(self.config_yaml),
        }
        if self.accelerator.is_main_process:
            (self.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
            if figure := self._diagnostics.draw():
                print_once(f"attention over the steps: {figure}")
            if self.args.push_to_hub:
                self._push(auto_class, tokenizer, results)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        saved = " and ".join(str(link) for link in (self.out / "best", self.out / "last") if link.exists())
        print_once(f"saved: {saved}; summary: {self.out / 'results.json'}")
        return results

    def _push(self, auto_class: Any, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]) -> None:
        """Publishes what was saved, adapters merged into their base, so that it loads by itself."""
        name = self.args.hub_model_id or self.out.resolve().name
        best = self.out / "best"
        # where no evaluation gave a number, nothing is best
        model = load_trained(auto_class, best if best.exists() else self.out / "last")
        folder = self.out / PUBLISHED
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        figure = draw_losses({"this model": self.out / "metrics.jsonl"}, folder / "losses.png")
        norms = copy_beside(self.out / FIGURE, folder) if (self.out / FIGURE).exists() else None
        card = model_card(
            model, results, name=name, license=self.args.hub_license, figure=figure.name, norms_figure=norms
        )
        if card.data.get("license") is None:
            print_once("the card names no licence: add it on the Hub, or pass --hub_license another time")
        card.save(folder / CARD)
        (folder / "results.json").write_text(json.dumps(portable(results), indent=2), encoding="utf-8")
        try:
            done = push(folder, name, private=self.args.hub_private or None)
        except (OSError, ValueError) as error:
            # hours of training must not end in an error because a connection broke or a name was taken
            # without it the second try would create the repository with the account's default, mostly public
            private = " --private" if self.args.hub_private else ""
            print_once(f"not pushed: {error}. Again: hf-polyattn push {folder} --to {name}{private}")
        else:
            print_once(f"pushed: {done.commit_url}")


def _remove_run(out: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in the folder."""
    for link in (out / "last", out / "best"):
        link.unlink(missing_ok=True)
    for folder in [*out.glob("checkpoint-*"), out / BASE, out / PUBLISHED]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("metrics.jsonl", "results.json", LINES, FIGURE):
        (out / name).unlink(missing_ok=True)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))
