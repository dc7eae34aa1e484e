"""Tokens/s and memory of whole models: a training step and generation, cubic attention against softmax.

    python benchmarks/whole_model.py --shapes 0.8m 10.7m --repeats 15
    python benchmarks/whole_model.py --shapes gpt2 smollm2 minilm --dtypes float32 bfloat16 --repeats 5 --no-memory
    python benchmarks/whole_model.py --shapes gpt2 smollm2 --passes generate --dtypes float32 bfloat16 --repeats 5

All candidates of a cell run interleaved in one process, because timings on a shared machine drift: quote the ratio
column, the median of softmax's times with SDPA over the candidate's. Weights are random and tokens too, which costs as
much as real ones. Peak memory comes from a fresh process for each candidate. What forms of one attention give is
compared before anything is timed. "cubic" is degree 3 with rows of "length", "cubic l1" what `patch_model` does by
default. The small shapes take 6 minutes on two CPU cores, the large ones 20.
"""

import argparse
import csv
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import hf_polyattn
from hf_polyattn import patch_model


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that it is timed on."""

    model_type: str
    config: dict[str, Any]
    batch: int
    block: int
    auto: Any = AutoModelForCausalLM
    shortest: float = 1.0
    """Length of the shortest sequence over the longest: below 1 the batch is padded, its lengths evenly spread."""
    new_tokens: int = field(default=32)
    """Of generation, behind a prompt of one block."""


TINY = {"vocab_size": 65, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = {
    # nanoGPT's CPU and GPU recipes for tiny Shakespeare
    "0.8m": Shape("gpt2", {**TINY, "n_layer": 4, "n_head": 4, "n_embd": 128}, 12, 64),
    "10.7m": Shape("gpt2", {**TINY, "n_layer": 6, "n_head": 6, "n_embd": 384}, 8, 256),
    "gpt2": Shape("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 1, 1024),
    "smollm2": Shape(
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        1,
        1024,
    ),
    "minilm": Shape(
        "bert",
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        16,
        128,
        AutoModelForMaskedLM,
        shortest=0.25,
    ),
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "softmax sdpa": {"attn_implementation": "sdpa"},
    "softmax eager": {"attn_implementation": "eager"},
    "cubic cpu": {"normalization": "length", "backend": "cpu"},
    "cubic fused": {"normalization": "length", "backend": "fused"},
    "cubic tiled": {"normalization": "length", "backend": "tiled"},
    "cubic naive": {"normalization": "length", "backend": "naive"},
    "cubic l1 cpu": {"normalization": "l1", "backend": "cpu"},
    "cubic l1 fused": {"normalization": "l1", "backend": "fused"},
    "cubic l1 tiled": {"normalization": "l1", "backend": "tiled"},
    "monomial cpu": {"activation": "monomial", "gain": 0.2, "backend": "cpu"},
    "monomial fused": {"activation": "monomial", "gain": 0.2, "backend": "fused"},
    "monomial tiled": {"activation": "monomial", "gain": 0.2, "backend": "tiled"},
}
BASELINE = "softmax sdpa"
AGREEING = [("softmax sdpa", "softmax eager"), ("monomial cpu", "monomial tiled")]
AGREEING += [(f"cubic l1 {form}", "cubic l1 tiled") for form in ("cpu", "fused")]
AGREEING += [(f"cubic {form}", "cubic naive") for form in ("cpu", "tiled", "fused")]
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference of losses: bf16 rounds each layer's output to 8 bits."""


def build_model(shape: Shape, candidate: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    options = dict(CANDIDATES[candidate])
    torch.manual_seed(0)
    positions = shape.block + shape.new_tokens
    config = AutoConfig.for_model(shape.model_type, **{"max_position_embeddings": positions, **shape.config})
    model = shape.auto.from_config(config, attn_implementation=options.pop("attn_implementation", "sdpa"))
    if options:
        patch_model(model, options.pop("activation", "poly"), degree=3, **options)
    return model.to(device, dtype)


def batch_of(shape: Shape, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (shape.batch, shape.block), generator=generator)
    inputs = {"input_ids": ids}
    if shape.shortest < 1:
        lengths = torch.linspace(shape.shortest * shape.block, shape.block, shape.batch).long()
        inputs["attention_mask"] = (torch.arange(shape.block) < lengths[:, None]).long()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def training_step(shape: Shape, candidate: str, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """One training step (forward, backward, AdamW) as a function that returns its loss."""
    model = build_model(shape, candidate, dtype, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = batch_of(shape, model.config.vocab_size, device)

    def step() -> float:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def generation(shape: Shape, candidate: str, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """new_tokens greedy tokens behind a prompt of one block; returns the seconds of the tokens after the first."""
    model = build_model(shape, candidate, dtype, device).eval()
    inputs = batch_of(shape, model.config.vocab_size, device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    @torch.no_grad()
    def generate() -> float:
        start = time.perf_counter()
        model.generate(**inputs, **options, max_new_tokens=1)
        first = time.perf_counter()
        model.generate(**inputs, **options, max_new_tokens=shape.new_tokens)
        last = time.perf_counter()
        return (last - first) - (first - start)

    return generate


def check(losses: dict[str, float], dtype: str) -> None:
    """The forms of one attention must agree before they are compared in speed."""
    for one, other in AGREEING:
        if {one, other} <= set(losses) and abs(losses[one] / losses[other] - 1) > TOLERANCE[dtype]:
            sys.exit(f"{one} and {other} disagree: losses {losses[one]:.6f} and {losses[other]:.6f}")


def time_cell(shape: Shape, pass_: str, dtype: str, names: list[str], repeats: int, device: torch.device) -> Any:
    """Seconds of each repeat of each candidate, interleaved."""
    kind = training_step if pass_ == "training step" else generation
    runs = {name: kind(shape, name, getattr(torch, dtype), device) for name in names}
    first = {name: run() for name, run in runs.items()}
    if pass_ == "training step":
        check(first, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=f"{pass_}, {dtype}, interleaved rounds"):
        for name, run in runs.items():
            start = time.perf_counter()
            value = run()
            seconds[name].append(value if pass_ == "generate" else time.perf_counter() - start)
    return seconds


def peak_mib(shape: str, candidate: str, device: str) -> float:
    """Peak memory of three fp32 steps in a fresh process: allocated on a GPU, growth of the resident set on a CPU."""
    command = [sys.executable, __file__, "--memory_of", shape, candidate, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(shape: str, candidate: str, device: torch.device) -> None:
    step = training_step(SHAPES[shape], candidate, torch.float32, device)
    if device.type == "cuda":
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    # importing has a higher peak than a small step: Linux can start the count anew
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    for _ in range(3):
        step()
    print((resident_kib("VmHWM") - before) / 1024)


def resident_kib(field: str) -> int:
    """VmRSS, resident now, or VmHWM, its peak, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.8m", "10.7m"])
    parser.add_argument("--passes", nargs="+", choices=("training step", "generate"), default=["training step"])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds; the median is reported")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="of training in fp32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "whole_model.csv")
    parser.add_argument("--memory_of", nargs=2, metavar=("SHAPE", "CANDIDATE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(*args.memory_of, device)
        return
    other = "cpu" if device.type == "cuda" else "fused"
    names = [name for name in args.candidates if CANDIDATES[name].get("backend") != other]
    processor = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    environment = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "threads": args.threads,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]).split(" --out")[0],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes:
        for pass_ in args.passes:
            for dtype in args.dtypes:
                rows = rows_of(shape, pass_, dtype, names, args)
                append(args.out, [{**row, **environment} for row in rows])
    print(f"wrote {args.out}")


def rows_of(name: str, pass_: str, dtype: str, names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each candidate of a cell."""
    shape = SHAPES[name]
    seconds = time_cell(shape, pass_, dtype, names, args.repeats, torch.device(args.device))
    tokens = shape.batch * (shape.block if pass_ == "training step" else shape.new_tokens - 1)
    baseline = statistics.median(seconds[BASELINE])
    rows = []
    for candidate, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        is_measured = args.memory and pass_ == "training step" and dtype == "float32"
        row = {
            "shape": name,
            "pass": pass_,
            "dtype": dtype,
            "candidate": candidate,
            "tokens_per_second": round(tokens / median),
            "quartiles": f"{tokens / high:.0f} to {tokens / low:.0f}",
            "ratio_to_sdpa": round(baseline / median, 3),
            "peak_mib": round(peak_mib(name, candidate, args.device)) if is_measured else "",
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    return rows


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of other machines stay."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
