"""One attention, alone: every form of the polynomial against torch's softmax, by pass, dtype, mask and length.

    python benchmarks/attention.py
    python benchmarks/attention.py --passes forward --dtypes float32 --lengths 512 2048 --seconds 2

The candidates of a cell run interleaved in one process, because timings on a shared machine drift: quote the ratio
column, the median of softmax's times over the median of the candidate's. Each candidate is compared with the
definition in float64 before it is timed. All of them get the same tensors, laid out as Transformers passes them
([B, T, H, D] in memory, seen as [B, H, T, D]). Writes a csv, a table of ratios (.md) and a figure (.png).
"""

import argparse
import csv
import datetime
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hf_polyattn
from hf_polyattn.ops import polynomial_attention
from hf_polyattn.ops.cpu import build

HEADS = 12
TOKENS = 1024
"""Of a batch: sequences of N tokens come TOKENS / N at a time, one at least."""
PASSES = ("forward", "forward+backward", "decode")
MASKS = ("causal", "full", "padded")
PHIS: dict[str, dict] = {
    "s^2": {"degree": 2},
    "s^3": {"degree": 3},
    "coefficients": {"coefficients": (0.5, 0.5, 0.5, 1 / 6)},
}
BASELINE = "softmax sdpa"


@dataclass(frozen=True)
class Cell:
    pass_: str
    dtype: str
    mask: str
    head_dim: int
    length: int
    device: str

    def __str__(self) -> str:
        return f"{self.pass_}, {self.dtype}, {self.mask}, d={self.head_dim}, N={self.length}"

    @property
    def queries(self) -> int:
        return 1 if self.pass_ == "decode" else self.length


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(cell: Cell, keep: torch.Tensor | None, backend: SDPBackend | None = None) -> Attention:
    causal = cell.mask == "causal" and cell.queries > 1

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)

    return run


def eager(cell: Cell, keep: torch.Tensor | None) -> Attention:
    """As Transformers' eager attention: scores, an additive mask, softmax in fp32."""
    rows = torch.arange(cell.queries, device=cell.device)[:, None] + cell.length - cell.queries
    seen = torch.arange(cell.length, device=cell.device) <= rows if cell.mask == "causal" else keep
    least = torch.finfo(getattr(torch, cell.dtype)).min
    bias = (
        None if seen is None else torch.zeros_like(seen, dtype=getattr(torch, cell.dtype)).masked_fill_(~seen, least)
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return run


def polynomial(cell: Cell, keep: torch.Tensor | None, phi: str, form: str) -> Attention:
    causal = cell.mask == "causal" and cell.queries > 1
    options = {**PHIS[phi], "normalization": "length", "is_causal": causal, "keep": keep, "backend": form}
    return lambda q, k, v: polynomial_attention(q, k, v, **options)


def candidates(cell: Cell, keep: torch.Tensor | None, phis: list[str], forms: list[str]) -> dict[str, Attention]:
    """Name -> attention, the baseline first. What a machine cannot run is left out, with a line that says why."""
    found = {BASELINE: sdpa(cell, keep), "softmax eager": eager(cell, keep)}
    if cell.device == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
        found |= {f"softmax {name}": sdpa(cell, keep, backend) for name, backend in backends.items()}
    for phi, form in itertools.product(phis, forms):
        found[f"{phi} {form}"] = polynomial(cell, keep, phi, form)
    return found


def tensors(cell: Cell) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k, v, and the keep mask of the padded cells: a quarter of the keys, on the left, is padding."""
    torch.manual_seed(0)
    batch, dtype = max(1, TOKENS // cell.length), getattr(torch, cell.dtype)
    qkv = []
    for rows in (cell.queries, cell.length, cell.length):
        x = torch.randn(batch, rows, HEADS, cell.head_dim, dtype=dtype, device=cell.device)
        qkv.append(x.transpose(1, 2).requires_grad_(cell.pass_ == "forward+backward"))
    keep = None
    if cell.mask == "padded":
        keep = torch.arange(cell.length, device=cell.device) >= cell.length // 4
        keep = keep.expand(batch, 1, cell.queries, cell.length)
    return qkv, keep


def step_of(cell: Cell, attention: Attention, qkv: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One timed call; returns the output."""
    grad = torch.ones((), dtype=qkv[0].dtype, device=cell.device).expand(*qkv[0].shape[:3], qkv[2].shape[3])

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(cell.pass_ == "forward+backward"):
            out = attention(*qkv)
        if cell.pass_ == "forward+backward":
            torch.autograd.grad(out, qkv, grad)
        return out.detach()

    return step


def relative_error(
    cell: Cell, name: str, out: torch.Tensor, qkv: list[torch.Tensor], keep: torch.Tensor | None
) -> float:
    """Against the definition in float64, on the first sequence and two heads."""
    q, k, v = (x.detach()[:1, :2].double() for x in qkv)
    keep = None if keep is None else keep[:1]
    phi = name.rsplit(" ", 1)[0]
    exact = polynomial(cell, keep, phi, "naive") if phi in PHIS else sdpa(cell, keep)
    expected = exact(q, k, v)
    rows = slice(None) if keep is None else keep[0, 0].any(-1)  # softmax is free in rows that see nothing
    got = out[:1, :2].double()
    return ((got - expected)[..., rows, :].norm() / expected[..., rows, :].norm()).item()


def measure(cell: Cell, phis: list[str], forms: list[str], seconds: float) -> list[dict[str, object]]:
    """The rows of one cell: medians of interleaved rounds, as many as fit into `seconds`, five at least."""
    qkv, keep = tensors(cell)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    errors: dict[str, float] = {}
    for name, attention in candidates(cell, keep, phis, forms).items():
        step = step_of(cell, attention, qkv)
        try:
            out = step()
        except (RuntimeError, ValueError) as error:
            tqdm.write(f"{cell}: no {name}: {str(error).splitlines()[0]}")
            continue
        steps[name], errors[name] = step, relative_error(cell, name, out, qkv, keep)
        most = 1e-5 if cell.dtype == "float32" else 2e-2
        if not errors[name] < most:
            sys.exit(f"{cell}: {name} is wrong by {errors[name]:.2g}: nothing is timed")
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[BASELINE]) < 5:
        for name, step in steps.items():
            times[name].append(timed(step, cell.device))
    baseline = statistics.median(times[BASELINE])
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                **{"pass": cell.pass_, "dtype": cell.dtype, "mask": cell.mask},
                **{"head_dim": cell.head_dim, "length": cell.length, "candidate": name},
                "milliseconds": round(median * 1e3, 4),
                "quartiles": f"{low * 1e3:.4g} to {high * 1e3:.4g}",
                "ratio_to_sdpa": round(baseline / median, 3),
                "relative_error": f"{errors[name]:.2g}",
                "rounds": len(values),
            }
        )
    return rows


def timed(step: Callable[[], torch.Tensor], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: ratio to SDPA of each candidate, a line a cell."""
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != BASELINE))
    lines = [
        "| pass | dtype | mask | d | N | " + " | ".join(map(str, names)) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    cells: dict[tuple[object, ...], dict[object, object]] = {}
    for row in rows:
        where = tuple(row[key] for key in ("pass", "dtype", "mask", "head_dim", "length"))
        cells.setdefault(where, {})[row["candidate"]] = row["ratio_to_sdpa"]
    for where, ratios in cells.items():
        shown = (f"{ratios[name]:.2f}" if name in ratios else "" for name in names)
        lines.append("| " + " | ".join(map(str, where)) + " | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, object]], path: Path, title: str) -> None:
    """Ratio against length: a panel for each pass and dtype, a line for each candidate, causal cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mask = str(rows[0]["mask"])
    head_dim = rows[0]["head_dim"]
    rows = [row for row in rows if (row["mask"], row["head_dim"]) == (mask, head_dim)]
    panels = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != BASELINE))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharey=True, layout="constrained"
    )
    for (pass_, dtype), panel in zip(panels, axes.flat, strict=False):
        panel.axhline(1, color="gray", linewidth=1, linestyle="--")
        for name in names:
            points = [row for row in rows if (row["pass"], row["dtype"], row["candidate"]) == (pass_, dtype, name)]
            panel.plot(
                [p["length"] for p in points], [p["ratio_to_sdpa"] for p in points], "o-", markersize=3, label=name
            )
        panel.set_xscale("log", base=2)
        panel.set_title(f"{pass_}, {dtype}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("speed, softmax SDPA = 1")
    for panel in axes[-1]:
        panel.set_xlabel("length N")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{title}; {mask}, head dimension {head_dim}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--phis", nargs="+", choices=PHIS, default=list(PHIS))
    parser.add_argument("--forms", nargs="+", default=["tiled", "fused"] if on_gpu else ["cpu", "tiled"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one cell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} {build().instruction_set}"
    )
    environment = {
        "device": where,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]).split(" --out")[0],
    }
    cells = [
        Cell(*values, args.device)
        for values in itertools.product(args.passes, args.dtypes, args.masks, args.head_dims, args.lengths)
    ]
    rows = []
    for cell in tqdm(cells, desc="cells"):
        rows += measure(cell, args.phis, args.forms, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment])
        writer.writeheader()
        writer.writerows({**row, **environment} for row in rows)
    args.out.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, args.out.with_suffix(".png"), f"Attention on {where}, {args.threads} threads")
    print(table(rows))


if __name__ == "__main__":
    main()
