"""One attention, alone, timed: every form of the polynomial against torch's softmax, each checked before it is timed.

The candidates of a cell run interleaved, because timings on a shared machine drift: quote the ratio, the median of
softmax's times over the median of the candidate's. All of them get the same tensors, laid out as Transformers passes
them: [B, T, H, D] in memory, seen as [B, H, T, D], but for the keys and values of a decoding step, which a
DynamicCache holds as [B, H, S, D].
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_polyattn_scripts import ExpectedError

from .ops import polynomial_attention

HEADS = 12
TOKENS = 1024
"""Of a batch: sequences of N tokens come TOKENS / N at a time, one at least."""
PASSES = ("forward", "forward+backward", "decode")
TRANSPOSED = "decode transposed"
"""A pass more: a decoding step against keys and values that lie as [B, S, H, D], unlike in a DynamicCache."""
MASKS = ("causal", "full", "padded", "lengths")
"""padded: a quarter of the keys, on the left. lengths: key lengths from S / 2 to S over the batch, S alone at most."""
DTYPES = ("float32", "bfloat16", "float16")
CUBIC = (0.5, 0.5, 0.5, 1 / 6)
PHIS: dict[str, dict[str, Any]] = {
    "s^2": {"degree": 2, "normalization": "length"},
    "s^3": {"degree": 3, "normalization": "length"},
    "coefficients": {"coefficients": CUBIC, "normalization": "length"},
    "coefficients l1": {"coefficients": CUBIC, "normalization": "l1"},
}
BASELINE = "softmax sdpa"
CHECKED_ROWS = 512
"""Of the queries of a sequence at most, the last ones, are compared with the definition: it takes quadratic memory."""
EAGER_BYTES = 2**31
"""Of the scores, up to which eager softmax is tried."""


@dataclass(frozen=True)
class Cell:
    """What is timed: one of PASSES (or TRANSPOSED), DTYPES and MASKS; head dimension, number of keys, sequences.

    batch: None for TOKENS / N, one at least.
    """

    pass_: str
    dtype: str
    mask: str
    head_dim: int
    length: int
    device: str
    batch: int | None = None

    def __str__(self) -> str:
        return f"{self.pass_}, {self.dtype}, {self.mask}, d={self.head_dim}, N={self.length}, B={self.sequences}"

    @property
    def is_step(self) -> bool:
        return self.pass_ in ("decode", TRANSPOSED)

    @property
    def queries(self) -> int:
        return 1 if self.is_step else self.length

    @property
    def sequences(self) -> int:
        return self.batch or max(1, TOKENS // self.length)


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
    options: dict[str, Any] = {
        **PHIS[phi],
        "is_causal": causal,
        "keep": keep,
        "backend": form,
    }
    if keep is not None and cell.mask == "lengths":
        options |= {"keep": None, "key_lengths": keep[:, 0, 0].sum(-1)}
    return lambda q, k, v: polynomial_attention(q, k, v, **options)  # type: ignore[return-value]


def candidates(
    cell: Cell, keep: torch.Tensor | None, phis: Sequence[str], forms: Sequence[str]
) -> dict[str, Attention]:
    """Name -> attention, the baseline first."""
    found = {BASELINE: sdpa(cell, keep)}
    if 4 * cell.sequences * HEADS * cell.queries * cell.length <= EAGER_BYTES:
        found["softmax eager"] = eager(cell, keep)
    if cell.device == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
        found |= {f"softmax {name}": sdpa(cell, keep, backend) for name, backend in backends.items()}
    for phi, form in itertools.product(phis, forms):
        found[f"{phi} {form}"] = polynomial(cell, keep, phi, form)
    return found


def tensors(cell: Cell) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k, v, and the keep mask of the padded cells."""
    torch.manual_seed(0)
    batch, dtype = cell.sequences, getattr(torch, cell.dtype)
    qkv = []
    for rows in (cell.queries, cell.length, cell.length):
        x = torch.randn(batch, rows, HEADS, cell.head_dim, dtype=dtype, device=cell.device).transpose(1, 2)
        x = x.contiguous() if cell.pass_ == "decode" else x
        qkv.append(x.requires_grad_(cell.pass_ == "forward+backward"))
    keep = None
    columns = torch.arange(cell.length, device=cell.device)
    if cell.mask == "padded":
        keep = (columns >= cell.length // 4).expand(batch, 1, cell.queries, cell.length)
    elif cell.mask == "lengths":
        lengths = cell.length - torch.arange(batch, device=cell.device) * cell.length // (2 * batch)
        keep = (columns < lengths.view(-1, 1, 1, 1)).expand(batch, 1, cell.queries, cell.length)
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
    """Against the definition in float64, on the last sequence, two heads and the last CHECKED_ROWS rows."""
    first = max(0, cell.queries - CHECKED_ROWS)
    q, k, v = (x.detach()[-1:, :2].double() for x in qkv)
    q = q[:, :, first:]
    if keep is not None:
        seen = keep[-1:, :, first:]
    else:
        rows = torch.arange(first, cell.queries, device=cell.device)[:, None] + cell.length - cell.queries
        last = rows if cell.mask == "causal" else torch.full_like(rows, cell.length - 1)
        seen = (torch.arange(cell.length, device=cell.device) <= last)[None, None]
    phi = name.rsplit(" ", 1)[0]
    if phi in PHIS:
        out_of = polynomial_attention(q, k, v, **PHIS[phi], keep=seen, backend="naive")
        expected = cast(torch.Tensor, out_of)
    else:
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    free = ~seen[0, 0].any(-1)  # what softmax gives to rows that see nothing is its own affair
    got = out[-1:, :2, first:].double()
    return ((got - expected)[..., ~free, :].norm() / expected[..., ~free, :].norm()).item()


@dataclass(frozen=True)
class Timing:
    """One candidate in one cell.

    seconds: lower quartile, median and upper quartile of one call. ratio: its speed over the baseline's.
    """

    cell: Cell
    candidate: str
    seconds: tuple[float, float, float]
    ratio: float
    relative_error: float
    rounds: int


class WrongResultError(ExpectedError):
    """An attention that computes something else must not be timed."""


def measure(
    cell: Cell,
    phis: Sequence[str],
    forms: Sequence[str],
    seconds: float,
    say: Callable[[str], None],
    rounds: int = 5,
) -> list[Timing]:
    """Timings of one cell: medians of interleaved rounds, as many as fit into `seconds`, `rounds` at least.

    phis: some of PHIS. forms: names of forms of the operation. say: told what this machine cannot run, and why.
    Raises WrongResultError when a candidate's output is not that of the definition in float64.
    """
    qkv, keep = tensors(cell)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    errors: dict[str, float] = {}
    for name, attention in candidates(cell, keep, phis, forms).items():
        step = step_of(cell, attention, qkv)
        try:
            out = step()
        except (RuntimeError, ValueError) as error:
            say(f"{cell}: no {name}: {str(error).splitlines()[0]}")
            continue
        steps[name], errors[name] = step, relative_error(cell, name, out, qkv, keep)
        most = 1e-5 if cell.dtype == "float32" else 2e-2
        if not errors[name] < most:
            raise WrongResultError(f"{cell}: {name} is wrong by {errors[name]:.2g}: nothing is timed")
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[BASELINE]) < rounds:
        for name, step in steps.items():
            times[name].append(timed(step, cell.device))
    baseline = statistics.median(times[BASELINE])
    found = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        found.append(Timing(cell, name, (low, median, high), baseline / median, errors[name], len(values)))
    return found


def timed(step: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
