"""From which length the linear-cost form overtakes the best quadratic one: degrees 1 and 2, head_dim 32 and 64.

    python benchmarks/recurrent_crossover.py

One thread, and its processor time, which other work on the machine changes least. The two forms of a cell run one
after the other, round after round, in one process: a round gives one ratio, and the median and quartiles of the ratios
are reported. Outputs are checked against each other before anything is timed. The last lines say where the ratio
passes 1, between two measured lengths; the table in hf_polyattn/ops/crossover.py is taken from them. About 10 minutes
on one CPU core without other load.
"""

import argparse
import csv
import datetime
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hf_polyattn
from hf_polyattn import polynomial_attention
from hf_polyattn.ops import cpu
from hf_polyattn.ops.crossover import crossover

LENGTHS = {
    (1, 32): (128, 256, 512, 1024, 2048, 4096),
    (1, 64): (128, 256, 512, 1024, 2048, 4096),
    (2, 32): (512, 1024, 2048, 4096, 8192, 16384),
    (2, 64): (2048, 4096, 8192, 16384),
}
HEADS = 2


def build(
    degree: int, dim: int, length: int, is_causal: bool, backward: bool, form: str
) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(1, HEADS, length, dim).requires_grad_(backward) for _ in range(3)]
    coefficients = torch.rand(HEADS, degree + 1)
    probe = torch.randn(1, HEADS, length, dim)

    def once() -> torch.Tensor:
        out = polynomial_attention(
            *leaves, coefficients=coefficients, normalization="length", is_causal=is_causal, backend=form
        )
        if backward:
            torch.autograd.grad(out, leaves, probe)
        return out.detach()

    return once


def measure(forms: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each round of each form, interleaved; the first call of each is the check."""
    outputs = [once() for once in forms.values()]
    if not torch.allclose(*outputs, rtol=1e-3, atol=1e-4):
        sys.exit("the two forms disagree")
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, once in forms.items():
            start = time.process_time()
            once()
            times[name].append(1000 * (time.process_time() - start))
    return times


def passes_one(ratios: dict[int, float]) -> float:
    """The length at which the ratio becomes larger than 1, on a straight line between logarithms."""
    below = [length for length, ratio in ratios.items() if ratio <= 1]
    if not below:
        return min(ratios)
    last = max(below)
    above = [length for length in ratios if length > last]
    if not above:
        return math.inf
    low, high = math.log(ratios[last]), math.log(ratios[min(above)])
    return math.exp(math.log(last) + math.log(min(above) / last) * -low / (high - low))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2], help="rows of others stay in the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recurrent_crossover.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quadratic = "cpu" if cpu.build().problem is None else "tiled"
    environment = {
        "quadratic_form": quadratic,
        "device": f"{platform.machine()} CPU, {cpu.instruction_set()}",
        "threads": 1,
        "heads": HEADS,
        "dtype": "float32",
        "rounds": args.rounds,
        "torch": torch.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    rows, found = [], []
    cells = [cell for cell in LENGTHS if cell[0] in args.degrees]
    for (degree, dim), backward, is_causal in itertools.product(cells, (False, True), (True, False)):
        ratios = {}
        for length in LENGTHS[degree, dim]:
            forms = {form: build(degree, dim, length, is_causal, backward, form) for form in (quadratic, "recurrent")}
            times = measure(forms, args.rounds)
            low, median, high = statistics.quantiles(
                [slow / fast for slow, fast in zip(*times.values(), strict=True)], n=4
            )
            ratios[length] = median
            row = {
                "degree": degree,
                "head_dim": dim,
                "mask": "causal" if is_causal else "full",
                "pass": "forward and backward" if backward else "forward",
                "length": length,
                "quadratic_ms": round(statistics.median(times[quadratic]), 2),
                "recurrent_ms": round(statistics.median(times["recurrent"]), 2),
                "speed_ratio": round(median, 3),
                "ratio_quartiles": f"{low:.3f} to {high:.3f}",
            }
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            # the rest is clear
            if median > 1.6:
                break
        here = f"degree {degree} head_dim {dim} {row['mask']} {row['pass']}"
        found.append(
            f"{here}: {passes_one(ratios):.0f} (the table says {crossover(degree, dim, is_causal, backward)})"
        )
    rows = [{**row, **environment} for row in rows]
    if args.out.exists():
        with args.out.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if int(row["degree"]) not in args.degrees]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["degree"])))
    print("\n".join(found))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
