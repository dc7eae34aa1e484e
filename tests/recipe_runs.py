"""Runs of recipes for tests: tiny, offline, in this process or in a forked one."""

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
from accelerate.state import AcceleratorState, GradientState

# what tests map must not end up in the user's cache
_CACHE = tempfile.TemporaryDirectory(prefix="datasets-")
datasets.config.HF_DATASETS_CACHE = Path(_CACHE.name)
datasets.disable_progress_bars()

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
# they import those beside them, as scripts do
sys.path.insert(0, str(RECIPES))


@cache
def recipe(name: str) -> ModuleType:
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def debug_config(name: str) -> str:
    return str(RECIPES / "configs" / name / "debug_cpu.yaml")


def run_recipe(name: str, out: Path, *extra: Any, config: str | None = None) -> dict:
    """Results of the debug configuration with `extra` arguments on top."""
    argv = [config or debug_config(name), "--output_dir", str(out), *map(str, extra)]
    return recipe(name).main(argv)


def write_text(folder: Path, characters: int = 8_000) -> Path:
    """A text file with a little structure to learn."""
    words = ["sum", "square", "root", "of", "even", "odd", "numbers", "is", "not", "the", "length", "norm"]
    state, out = 1, []
    while sum(map(len, out)) < characters:
        state = state * 1103515245 % 2**31 + 12345
        out.append(words[state // 2**16 % len(words)] + ("\n" if state % 11 == 0 else " "))
    path = folder / "text.txt"
    path.write_text("".join(out))
    return path


def metrics(out: Path, name: str = "loss") -> dict[int, float]:
    """step -> value, from metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def in_fork(function: Callable[[], Any]) -> int:
    """Exit code of a forked process that calls `function`; minus the signal when it was killed."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    return process.exitcode


def in_processes(count: int, function: Callable[[], Any]) -> None:
    """Calls `function` in `count` forked processes that form one distributed run on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        os.environ.update(
            ACCELERATE_USE_CPU="true",
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        # what earlier runs of this process left behind
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count


def die() -> None:
    """As if by kill -9: no handler, no clean-up, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
