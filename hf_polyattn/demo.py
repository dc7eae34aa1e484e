"""`hf-polyattn demo`: a GPT-2 with softmax and one with a cubic, pretrained side by side on the same batches.

Everything runs offline: the text is the source of the running Python's standard library. Each model trains in a
process of its own, so that its peak memory is its own; this one prepares the data, draws progress bars and the figure.
"""

import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hf_polyattn_scripts import ExpectedError

from .demo_worker import Job, write_job
from .ops import cpu
from .tables import format_table
from .training.data import pack, stdlib_files, tokenise

PROMPT = """import os


class Reader:
    def __init__(self, path):
        self.path = path

    def read(self"""
END = "<|endoftext|>"
TIMED_STEPS = 100
"""Of fewer, tokens/s are noise."""
TABLES = ("encodings/", "pydoc_data/")
"""Parts of the standard library that hold tables, not code."""
WITHOUT_PLUGIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Size:
    """How much work a demo is."""

    steps: int
    batch_size: int
    block_size: int
    vocabulary: int
    text_bytes: int
    validation_blocks: int
    evaluations: int
    new_tokens: int
    model_config: dict[str, Any]


_COMMON = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
"""No dropout, and GPT-2's own function in one kernel."""
FULL = Size(
    steps=800,
    batch_size=8,
    block_size=128,
    vocabulary=1024,
    text_bytes=4_000_000,
    validation_blocks=128,
    evaluations=5,
    new_tokens=80,
    model_config={"n_layer": 2, "n_head": 4, "n_embd": 128, **_COMMON},
)
QUICK = Size(
    steps=30,
    batch_size=4,
    block_size=128,
    vocabulary=384,
    text_bytes=300_000,
    validation_blocks=16,
    evaluations=2,
    new_tokens=40,
    model_config={"n_layer": 2, "n_head": 2, "n_embd": 32, **_COMMON},
)


class DemoError(ExpectedError):
    """A step of the demo failed, or showed something that must not be."""


@dataclass
class Record:
    """What one model reported."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def describe_kernel() -> str:
    """How the cubic is computed here; compiles it now, so that it does not look as if training stood still."""
    if torch.cuda.is_available():
        return "the cubic: plain torch on the GPU"
    build = cpu.build()
    return f"the cubic: {'plain torch' if build.problem else f'compiled for this processor ({build.instruction_set})'}"


def run_demo(out: str = "demo", *, quick: bool = False, steps: int | None = None, seed: int = 0) -> Path:
    """Trains, compares, saves, reloads and draws; returns the folder of the saved polynomial model.

    out: new, empty, or what an earlier demo wrote, which goes.

    Raises:
        ValueError: for a number of steps that leaves nothing to measure.
        FileExistsError: when `out` holds anything else.
        DemoError: when a process fails, reloaded logits differ, or a process without the plugin loads the model.
    """
    start = time.perf_counter()
    size = QUICK if quick else FULL
    steps = size.steps if steps is None else steps
    if steps < 2:
        raise ValueError(f"steps must be >= 2, got {steps}")
    folder = Path(out)
    data = folder / "data"
    earlier = (data / "cubic.json").is_file()
    if not earlier and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{out} is not empty and holds no earlier demo: give --out a new folder")
    data.mkdir(parents=True, exist_ok=True)
    jobs = {
        name: Job(
            name=name,
            degree=degree,
            folder=str(folder / name),
            data=str(data),
            steps=steps,
            seed=seed,
            threads=max(1, min(4, (os.cpu_count() or 2) // 2)),
            block_size=size.block_size,
            batch_size=size.batch_size,
            evaluations=min(size.evaluations, steps),
            learning_rate=2e-3,
            model_config=size.model_config,
        )
        for name, degree in (("softmax", 0), ("cubic", 3))
    }
    # first, for by them the next demo knows that the rest may go, should this one be stopped
    files = {name: write_job(job, data / f"{name}.json") for name, job in jobs.items()}
    print(prepare_data(data, size, seed))
    print(describe_kernel())
    records = train_side_by_side(files, data, steps)
    timed = steps >= TIMED_STEPS
    print("\n" + results_table(records, timed))
    tokens = size.batch_size * size.block_size
    device = records["cubic"].facts["device"]
    speed = "" if timed else f"; no speed, which fewer than {TIMED_STEPS} steps do not tell"
    measured = f"measured while both trained side by side on {device}{speed}"
    print(f"{steps} steps of {tokens:,} tokens, seed {seed}; {measured}\n")

    figure = draw(records, folder / "losses.png", steps, size)
    saved = folder / "cubic"
    reloaded = reload_fresh(files["cubic"], data, size.new_tokens)
    print(f"reloaded {saved} in a fresh process as {reloaded['model_class']}: {reloaded['logits']:,} logits identical")
    print(f"without the plugin a fresh process refuses it:\n  {refusal(saved)}\n")
    print("the reloaded cubic model writes:\n" + "\n".join(f"  | {line}" for line in reloaded["text"].splitlines()))
    seconds = time.perf_counter() - start
    write_results(folder / "results.json", records, jobs, seconds)
    print(f"\nfigure of the losses: {figure}\nsaved model:          {saved}")
    print(f"next:                 hf-polyattn inspect {saved}")
    print(f"done in {seconds:.0f} s")
    return saved


def prepare_data(data: Path, size: Size, seed: int) -> str:
    """Writes tokenizer, training and validation blocks below `data`; returns a line that says what there is."""
    datasets.disable_progress_bars()
    texts = [source for path, source in stdlib_files(size.text_bytes) if not path.startswith(TABLES)]
    # files come in the order of their names' hashes, so the last ones are as good a sample as any
    cut = len(texts) - max(1, len(texts) // 10)
    tokenizer = train_tokenizer(texts[:cut], size.vocabulary)
    tokenizer.save_pretrained(data / "tokenizer")
    blocks = {}
    for name, part in (("train", texts[:cut]), ("validation", texts[cut:])):
        blocks[name] = pack(tokenise(datasets.Dataset.from_dict({"text": part}), tokenizer), size.block_size)
    few = min(size.validation_blocks, len(blocks["validation"]))
    blocks["validation"] = blocks["validation"].shuffle(seed=seed).select(range(few))
    for name, rows in blocks.items():
        shutil.rmtree(data / name, ignore_errors=True)
        rows.save_to_disk(data / name)
    return (
        f"text: the standard library of Python {platform.python_version()}, {len(tokenizer):,} byte-level BPE tokens; "
        f"{len(blocks['train']):,} blocks of {size.block_size} to train on, {few} of other files to validate"
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def train_side_by_side(jobs: dict[str, Path], logs: Path, steps: int) -> dict[str, Record]:
    """Starts one process a job, draws a progress bar for each, and returns what they reported."""
    events: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
    records = {name: Record() for name in jobs}
    processes: dict[str, subprocess.Popen] = {}
    terminal = sys.stderr.isatty()
    bars = {
        name: tqdm(total=steps, desc=f"{name:8}", unit="step", position=row, disable=not terminal, dynamic_ncols=True)
        for row, name in enumerate(jobs)
    }
    try:
        for name, job in jobs.items():
            processes[name] = start_worker(name, logs, "train", str(job))
            threading.Thread(target=_forward, args=(name, processes[name], events), daemon=True).start()
        running = set(jobs)
        while running:
            name, event = events.get()
            if event is None:
                running.remove(name)
                check_worker(name, processes[name], logs)
                continue
            record, bar = records[name], bars[name]
            kind = event.pop("event")
            if kind == "step":
                record.losses.append(event["loss"])
                bar.set_postfix_str(f"loss {event['loss']:.3f}", refresh=False)
                bar.update()
            elif kind == "evaluation":
                record.evaluations.append((event["step"], event["loss"]))
                if not terminal:
                    print(f"{name:8} step {event['step']:4}/{steps}  validation loss {event['loss']:.3f}", flush=True)
            elif kind == "built":
                # the clock starts with the training, not with the process
                bar.unpause()
                tqdm.write(f"{name:8} {event['attention']}, {event['parameters']:,} parameters")
                record.facts |= event
            else:
                record.facts |= event
    finally:
        for bar in bars.values():
            bar.close()
        for process in processes.values():
            process.kill()
            process.wait()
    return records


def start_worker(name: str, logs: Path, *arguments: str) -> subprocess.Popen:
    """A process of `demo_worker` whose standard output holds events; its standard error goes to a log."""
    with open(logs / f"{name}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hf_polyattn.demo_worker", *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
        )


def _forward(name: str, process: subprocess.Popen, events: queue.Queue) -> None:
    """Runs in a thread: the lines of one process become events; None says that there will be no more."""
    try:
        for event in _events(process):
            events.put((name, event))
    finally:
        events.put((name, None))


def _events(process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            # libraries print too
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def check_worker(name: str, process: subprocess.Popen, logs: Path) -> None:
    """Raises DemoError, with the last line that the process wrote, unless it ended well."""
    if code := process.wait():
        log = logs / f"{name}.log"
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it wrote nothing"]
        raise DemoError(f"the {name} process ended with status {code}: {lines[-1]} (all of it: {log})")


def reload_fresh(job: Path, logs: Path, new_tokens: int) -> dict[str, Any]:
    """Loads the saved model in a new process; raises DemoError unless its logits equal those of before, bitwise."""
    process = start_worker("reload", logs, "reload", str(job), PROMPT, str(new_tokens))
    found = list(_events(process))
    check_worker("reload", process, logs)
    if not found or not found[-1]["identical"]:
        raise DemoError(f"reloaded logits differ from those before saving: {found}")
    return found[-1]


def refusal(saved: Path) -> str:
    """The error of a process that has Transformers but not this package. Raises DemoError when there is none."""
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(saved)]
    # at a terminal Transformers would ask whether to run the code beside the weights
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode == 0:
        raise DemoError(
            f"a process without the plugin loaded {saved}: it would compute softmax with weights for a cubic"
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("ValueError:")]
    if not errors or "contains custom code" not in errors[-1]:
        raise DemoError(f"a process without the plugin failed for another reason: {result.stderr.strip()[-300:]}")
    return errors[-1].partition(" You can inspect")[0]


def results_table(records: dict[str, Record], timed: bool) -> str:
    """Validation loss, speed if `timed`, memory and ‖A‖_F / sqrt(N) of each layer, one row a model."""
    layers = len(next(iter(records.values())).facts["norms"])
    norms = [f"‖A‖_F/√N layer {layer}" for layer in range(layers)]
    rows = [
        [
            name,
            f"{record.evaluations[-1][1]:.3f}",
            f"{record.facts['tokens_per_second']:,.0f}" if timed else "-",
            f"{record.facts['peak_mib']:,.0f}",
            *(f"{norm:.2f}" for norm in record.facts["norms"]),
        ]
        for name, record in records.items()
    ]
    return format_table(["attention", "validation loss (nats/token)", "tokens/s", "peak memory (MiB)", *norms], rows)


def draw(records: dict[str, Record], path: Path, steps: int, size: Size) -> Path:
    """Training loss, smoothed, and validation loss of each model over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    window = max(1, steps // 50)
    for color, (name, record) in zip(("#c44e52", "#2a6fbb"), records.items(), strict=True):
        smooth = [sum(record.losses[at : at + window]) / window for at in range(len(record.losses) - window + 1)]
        axes.plot(
            range(window, window + len(smooth)), smooth, color=color, lw=1.2, alpha=0.7, label=f"{name}, training"
        )
        at, losses = zip(*record.evaluations, strict=True)
        axes.plot(at, losses, "o", color=color, ms=6, label=f"{name}, validation")
    layers = size.model_config["n_layer"]
    axes.set_title(f"GPT-2 ({layers} layers) on Python source: softmax against cubic attention")
    axes.set_xlabel(f"optimizer step ({size.batch_size * size.block_size:,} tokens each)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def write_results(path: Path, records: dict[str, Record], jobs: dict[str, Job], seconds: float) -> None:
    """Everything that was measured, as JSON."""
    packages = ("hf-polyattn", "torch", "transformers")
    content = {
        "command": " ".join(sys.argv),
        "seconds": seconds,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "models": {
            name: {
                **record.facts,
                "evaluations": record.evaluations,
                "losses": record.losses,
                "seed": jobs[name].seed,
                "steps": jobs[name].steps,
                "threads": jobs[name].threads,
            }
            for name, record in records.items()
        },
    }
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
