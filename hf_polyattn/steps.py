"""The optimizer steps that attention transfer and distillation share: rates, a progress bar, a place to go on from.

What a stopped run needs to go on lies in one safetensors file: the trained parameters, AdamW's moments, the losses so
far and the random state. It is written aside and renamed, so that there is always a whole one.
"""

import inspect
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from hf_polyattn_scripts import TrainingStoppedError

from .observing import as_inputs, real_tokens
from .patchable import base_model

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepCheckpoint:
    """Where the steps of one stage are kept, and how often. A file that is there is gone on from.

    Its batches must come again as they came: a DataLoader that shuffles needs a generator of its own, seeded alike.
    """

    file: Path
    every: int = 100


@dataclass(frozen=True)
class EarlyStop:
    """Ends the steps once `score()` has not fallen for `patience` measurements; the best weights come back."""

    score: Callable[[], float]
    every: int
    patience: int


class DivergedError(TrainingStoppedError):
    """Training led nowhere: losses that are not finite, or no lower than before. Lower rates may help."""


class Steps:
    """Steps of AdamW over batches; see `over`.

    Args:
        groups: AdamW's, each with "params" and the rates "first" and "last" of its cosine. Groups without parameters
            are left out.
        total: optimizer steps, the length of the cosine.
        name: of the bar and in messages.
        warmup_steps: over which the rates rise from zero.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        total: int,
        name: str,
        *,
        warmup_steps: int = 0,
        checkpoint: StepCheckpoint | None = None,
        early_stop: EarlyStop | None = None,
        progress: bool = True,
    ) -> None:
        kept = [{"lr": group["first"], **group} for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(kept, betas=(0.9, 0.95), weight_decay=0.0)
        self.parameters: list[nn.Parameter] = [p for group in kept for p in group["params"]]
        self.total, self.name, self.warmup_steps = total, name, warmup_steps
        self.checkpoint, self.early_stop, self.progress = checkpoint, early_stop, progress
        self.done = 0
        # all of them in one tensor: small ones kept from each step would lie between the large blocks of its forward
        # pass, and the allocator could not use their place again, which was seen to cost 3 MB a step
        self._losses = torch.empty(0)
        self.tokens, self.seconds = 0, 0.0
        self.first_inputs: dict[str, Any] = {}
        self.best, self._best_weights, self._waited = math.inf, list[torch.Tensor](), 0

    @property
    def losses(self) -> torch.Tensor:
        """[done, ...]: of each step so far, those of an earlier process included."""
        return self._losses[: self.done]

    def over(self, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The inputs of each step, for which the caller calls `take`; steps that a checkpoint holds are passed by.

        batches: the same from the start each time, as many as there are steps.
        Raises ValueError for a checkpoint of other steps than these.
        """
        random_states: dict[str, torch.Tensor] = {}
        if self.checkpoint is not None and self.checkpoint.file.exists():
            random_states = self._restore(self.checkpoint.file)
        first, mark = self.done, time.perf_counter()
        before = self.seconds
        with tqdm(total=self.total, initial=first, desc=self.name, disable=not self.progress) as bar:
            numbered = enumerate(batches)
            for step, batch in itertools.islice(numbered, first):
                if step == 0:
                    self.first_inputs = as_inputs(batch)
            # not before, for a DataLoader draws a number when its iteration starts
            self._set_random_states(random_states)
            for step, batch in numbered:
                inputs = as_inputs(batch)
                if step == 0:
                    self.first_inputs = inputs
                if self._is_over():
                    break
                self.tokens += count_tokens(inputs)
                warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
                for group in self.optimizer.param_groups:
                    group["lr"] = warm * cosine(group["first"], group["last"], step, self.total)
                yield inputs
                self.seconds = before + time.perf_counter() - mark
                bar.set_postfix(loss=f"{self.losses[-1].mean().item():.4f}", refresh=False)
                bar.update()
                self._measure()
                if self.checkpoint is not None and self.done % self.checkpoint.every == 0:
                    self._save(self.checkpoint.file)
        if self._best_weights:
            with torch.no_grad():
                for parameter, best in zip(self.parameters, self._best_weights, strict=True):
                    parameter.copy_(best)

    def take(self, loss: torch.Tensor) -> None:
        """One step of the optimizer on the gradients that are there; `loss` is kept, of any shape."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.done:
            self._losses = torch.zeros(self.total, *loss.shape)
        self._losses[self.done] = loss.detach()
        self.done += 1

    def _measure(self) -> None:
        stop = self.early_stop
        if stop is None or (self.done % stop.every and self.done != self.total):
            return
        score = stop.score()
        if score < self.best:
            self.best, self._waited = score, 0
            self._best_weights = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self._waited += 1

    def _is_over(self) -> bool:
        if self.early_stop is None or self._waited < self.early_stop.patience:
            return False
        if self.progress:
            what = f"no better for {self._waited} measurements, stopped after {self.done} steps"
            tqdm.write(f"{self.name}: {what}", file=sys.stderr)
        return True

    def _save(self, file: Path) -> None:
        tensors = {"losses": self.losses, "random_state": torch.get_rng_state()}
        if (state := device_random_state(self.parameters[0].device)) is not None:
            tensors[f"{self.parameters[0].device.type}_random_state"] = state
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}.parameter"] = parameter
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{name}": moments[name] for name in _MOMENTS if name in moments}
        tensors |= {f"{i}.best": best for i, best in enumerate(self._best_weights)}
        numbers = {"tokens": self.tokens, "seconds": self.seconds, "waited": self._waited, "best": self.best}
        aside = file.with_name(file.name + ".partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            aside,
            metadata={"shape": self._shape(), "numbers": json.dumps(numbers)},
        )
        os.replace(aside, file)

    def _restore(self, file: Path) -> dict[str, torch.Tensor]:
        """Everything but the random states, which are returned."""
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
            if metadata["shape"] != self._shape():
                raise ValueError(f"{file} holds the steps of another {self.name}: remove it to start anew")
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        numbers = json.loads(metadata["numbers"])
        self.done = len(tensors["losses"])
        self._losses = torch.zeros(self.total, *tensors["losses"].shape[1:])
        self._losses[: self.done] = tensors["losses"]
        self.tokens, self.seconds = numbers["tokens"], numbers["seconds"]
        self.best, self._waited = numbers["best"], numbers["waited"]
        moments: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"{i}.parameter"])
                if f"{i}.step" in tensors:
                    moments[i] = {name: tensors[f"{i}.{name}"] for name in _MOMENTS}
        count = len(self.parameters)
        self._best_weights = [tensors[f"{i}.best"].to(self.parameters[i]) for i in range(count) if "0.best" in tensors]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        return {name: tensor for name, tensor in tensors.items() if name.endswith("random_state")}

    def _set_random_states(self, states: dict[str, torch.Tensor]) -> None:
        if "random_state" in states:
            torch.set_rng_state(states["random_state"])
        device = self.parameters[0].device
        if (state := states.get(f"{device.type}_random_state")) is not None:
            set_device_random_state(device, state)

    def _shape(self) -> str:
        """What must be equal for steps to go on: how many there are, their rates, and what they train."""
        rates = [(group["first"], group["last"]) for group in self.optimizer.param_groups]
        return json.dumps([self.total, self.warmup_steps, rates, [list(p.shape) for p in self.parameters]])


def device_random_state(device: torch.device) -> torch.Tensor | None:
    """What dropout on an accelerator is drawn from; None on the CPU, whose generator is the global one."""
    if device.type == "cpu":
        return None
    source = torch.get_device_module(device)
    # MPS has one device and takes no argument for it
    return source.get_rng_state() if device.type == "mps" else source.get_rng_state(device)


def set_device_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Inverse of `device_random_state`."""
    source = torch.get_device_module(device)
    if device.type == "mps":
        source.set_rng_state(state)
    else:
        source.set_rng_state(state, device)


def cosine(first: float, last: float, step: int, total: int) -> float:
    """Half a cosine from `first` in step 0 to `last` in the final one.

    >>> [round(cosine(1.0, 0.0, step, 3), 2) for step in range(3)]
    [1.0, 0.5, 0.0]
    """
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, total - 1)))


def rounds(batches: Iterable[Any], steps: int | None) -> tuple[int, Iterator[Any]]:
    """The number of steps, and an iterator over so many batches, going round where `batches` is too short."""
    if steps is None:
        if not hasattr(batches, "__len__"):
            raise ValueError("batches of unknown length: say how many steps=")
        steps = len(batches)  # type: ignore[arg-type]
    if steps < 1:
        raise ValueError("no batches to train on: pass a few, and steps of 1 or more")
    return steps, _rounds(batches, steps)


def _rounds(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    done = 0
    while done < steps:
        before = done
        for batch in itertools.islice(batches, steps - done):
            ids = as_inputs(batch).get("input_ids")
            if ids is not None and ids.shape[-1] < 2:
                raise ValueError(
                    "a batch holds single tokens only, which have nothing to attend to: pass longer texts"
                )
            yield batch
            done += 1
        if done == before:
            raise ValueError(f"the batches ran out after {done} of {steps} steps: pass more, or a list to repeat")


def without_cache(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, and use_cache=False where the model inside, a PEFT model's too, would otherwise fill a cache."""
    has_cache = "use_cache" in inspect.signature(base_model(model).base_model.forward).parameters
    return {**inputs, "use_cache": False} if has_cache else inputs


def count_tokens(inputs: dict[str, Any]) -> int:
    rows = real_tokens(inputs)
    if rows is not None:
        return int(rows.sum())
    ids = inputs.get("input_ids")
    return ids.numel() if ids is not None else inputs["inputs_embeds"].shape[:-1].numel()
