"""Tokens/s and peak memory of a training step: cubic attention (every form) against softmax (SDPA, eager).

    python benchmarks/training_step.py --shapes 0.8m 10.7m --repeats 15

All candidates of a shape run interleaved in one process, because timings on a shared machine drift: quote the ratio
column. Peak memory comes from a fresh process for each candidate. The losses of the two polynomial forms, and of the
two softmax forms, are checked against each other before anything is timed. About 6 minutes on two CPU cores.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config

import hf_polyattn
from hf_polyattn import patch_model

# name -> (GPT-2 configuration, batch size, block size); nanoGPT's CPU and GPU recipes for tiny Shakespeare
SHAPES = {
    "0.8m": ({"n_layer": 4, "n_head": 4, "n_embd": 128}, 12, 64),
    "10.7m": ({"n_layer": 6, "n_head": 6, "n_embd": 384}, 8, 256),
}
CANDIDATES = {
    "softmax sdpa": {"attn_implementation": "sdpa"},
    "softmax eager": {"attn_implementation": "eager"},
    "cubic cpu": {"backend": "cpu"},
    "cubic tiled": {"backend": "tiled"},
    "cubic naive": {"backend": "naive"},
    "monomial cpu": {"activation": "monomial", "gain": 0.2, "backend": "cpu"},
    "monomial tiled": {"activation": "monomial", "gain": 0.2, "backend": "tiled"},
}
VOCABULARY = 65


def build_step(shape: str, candidate: str, device: torch.device) -> Callable[[], float]:
    """One training step (forward, backward, AdamW) as a function that returns its loss."""
    overrides, batch, block = SHAPES[shape]
    options = dict(CANDIDATES[candidate])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=block, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **overrides
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=options.pop("attn_implementation", "sdpa"))
    if options:
        patch_model(model, options.pop("activation", "poly"), degree=3, **options)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (batch, block), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def check(losses: dict[str, float]) -> None:
    """The forms of one attention must agree before they are compared in speed."""
    pairs = [("softmax sdpa", "softmax eager"), ("cubic tiled", "cubic naive"), ("cubic cpu", "cubic naive")]
    for one, other in [*pairs, ("monomial cpu", "monomial tiled")]:
        if {one, other} <= set(losses) and abs(losses[one] - losses[other]) > 1e-4:
            sys.exit(f"{one} and {other} disagree: losses {losses[one]:.6f} and {losses[other]:.6f}")


def time_shape(shape: str, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each repeat of each candidate, interleaved."""
    here = [name for name, options in CANDIDATES.items() if device.type == "cpu" or options.get("backend") != "cpu"]
    steps = {name: build_step(shape, name, device) for name in here}
    check({name: step() for name, step in steps.items()})
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(repeats), desc=f"{shape}, interleaved rounds"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_mib(shape: str, candidate: str, device: str) -> float:
    """Peak memory of three steps in a fresh process: allocated on a GPU, growth of the resident set on a CPU."""
    command = [sys.executable, __file__, "--memory_of", shape, candidate, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(shape: str, candidate: str, device: torch.device) -> None:
    step = build_step(shape, candidate, device)
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
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds; the median is reported")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.csv")
    parser.add_argument("--memory_of", nargs=2, metavar=("SHAPE", "CANDIDATE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(*args.memory_of, device)
        return
    rows = []
    for shape in args.shapes:
        seconds = time_shape(shape, args.repeats, device)
        tokens = SHAPES[shape][1] * SHAPES[shape][2]
        baseline = statistics.median(seconds["softmax sdpa"])
        for name, values in seconds.items():
            low, _, high = statistics.quantiles(values, n=4)
            median = statistics.median(values)
            row = {
                "shape": shape,
                "candidate": name,
                "tokens_per_second": round(tokens / median),
                "quartiles": f"{tokens / high:.0f} to {tokens / low:.0f}",
                "ratio_to_sdpa": round(baseline / median, 3),
                "peak_mib": round(peak_mib(shape, name, args.device)),
            }
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()))
    processor = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    environment = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "threads": args.threads,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]).split(" --out")[0],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # rows of other machines stay
    is_new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment])
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **environment} for row in rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
