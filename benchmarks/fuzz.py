"""Random calls of each form of the operation against the definition in float64: outputs and all gradients.

    python benchmarks/fuzz.py --cases 10000 --seed 0
    python benchmarks/fuzz.py --cases 1 --seed 0 --first 4711 --forms cpu        (what a failure prints)
    TRITON_INTERPRET=1 python benchmarks/fuzz.py --cases 300 --forms fused       (slow)
    HF_POLYATTN_CPU=avx2 python benchmarks/fuzz.py --cases 2000 --forms cpu      (another build of the compiled form)

Case i of a seed is the same whatever runs before it. Forms take turns. A case draws shapes (odd, T other than S,
grouped heads, one query), a mask (causal, padding on either side, window, packed, arbitrary, of rows that see nothing,
additive), a polynomial, a normalization, QK-norm, a soft cap, a bias, dtypes, strides and a number of threads. What a
form cannot compute must be refused with a reason; everything else must lie within the bound of `fuzz_bounds.py`,
element by element. The linear-cost form is also fed in pieces, through its past.

Adds a row for each form and dtype to a csv: cases, refusals, failures, the largest error over its bound, and the bound
itself against the size of what it bounds, which says how little would have been noticed. The file is written every 100
cases, so that a run that is stopped leaves what it has done; rows of the same command give way to the new ones.
"""

import argparse
import csv
import datetime
import math
import os
import platform
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz_bounds import TINY, Problem, Rounding, bounds
from fuzz_cases import DTYPES, FORMS, Case, draw
from tqdm import tqdm

import hf_polyattn
from hf_polyattn.ops import attend, cpu, polynomial_attention
from hf_polyattn.ops.crossover import SMALL
from hf_polyattn.ops.masks import build_keep, split_mask
from hf_polyattn.ops.recurrent import new_past

Found = dict[tuple[str, str], dict[str, Any]]
"""(form, dtype) -> counts."""


class Failure(Exception):
    pass


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides; "one head for all" makes all heads the first."""
    match layout:
        case "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "every second row":
            return torch.stack([x, torch.full_like(x, math.nan)], 3).flatten(2, 3)[:, :, ::2]
        case "every second column":
            return torch.stack([x, torch.full_like(x, math.nan)], 4).flatten(3, 4)[..., ::2]
        case "one head for all":
            return x[:, :1].expand_as(x)
    return x


class Tensors:
    """The tensors of a case, in its dtype: exact in float64 too, so that both computations start from the same."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(seed)
        batch, heads, key_heads, queries, keys, dim, value_dim = case.shape
        self.q = laid_out(self.normal(batch, heads, queries, dim).to(case.dtype), case.layout)
        self.k = laid_out(self.normal(batch, key_heads, keys, dim).to(case.dtype), case.layout)
        self.v = laid_out(self.normal(batch, key_heads, keys, value_dim).to(case.dtype), case.layout)
        probe = self.normal(batch, heads, queries, value_dim).to(case.dtype)
        if case.probe_layout == "one number":
            probe = probe.new_tensor(0.75).expand_as(probe)
        self.probe = laid_out(probe, case.probe_layout)
        # parameters stay wide, as what they are composed to does
        self.wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        self.parameters: dict[str, torch.Tensor] = {}
        if case.has_coefficients:
            self.parameters["coefficients"] = self.coefficients(heads)
        if case.is_affine:
            self.parameters["alpha"] = (0.5 + self.uniform(heads)).to(self.wide)
            self.parameters["beta"] = (0.5 * self.normal(heads)).to(self.wide)
        if case.has_gain:
            self.parameters["gain"] = self.normal(heads).to(self.wide)
        if case.has_bias:
            shape = [n if self.flip(0.7) else 1 for n in (batch, heads, queries, keys)]
            self.parameters["bias"] = self.normal(*shape).to(self.wide)
        self.masks = self.restrictions()
        self.keep = build_keep((queries, keys), torch.device("cpu"), **self.masks)
        self.keep = self.keep.expand(batch, heads, queries, keys)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def flip(self, probability: float) -> bool:
        return self.uniform(1).item() < probability

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def coefficients(self, heads: int) -> torch.Tensor:
        degree = self.case.degree
        out = self.normal(heads, degree + 1)
        if self.case.normalization == "sum":
            # odd powers stay below the even ones beside them: nowhere negative
            out = 0.5 + self.uniform(heads, degree + 1)
            out[:, 1::2] *= 0.4 * torch.sign(self.normal(1)).item()
        return out.to(self.wide)

    def restrictions(self) -> dict[str, Any]:
        batch, heads, _, queries, keys, _, _ = self.case.shape
        out: dict[str, Any] = {}
        columns = torch.arange(keys)
        for name in self.case.masks:
            match name:
                case "causal":
                    out["is_causal"] = True
                case "lengths":
                    out["key_lengths"] = self.integers(0, keys, batch)
                case "window":
                    out["sliding_window"] = int(self.integers(1, max(1, 6 * max(queries, keys) // 5), 1))
                case "left":
                    out["keep"] = columns >= self.integers(0, keys, batch, 1, 1, 1)
                case "right":
                    out["keep"] = (columns < self.integers(0, keys, batch, 1, 1, 1)).expand(batch, 1, queries, keys)
                case "keys":
                    out["keep"] = self.uniform(batch, 1, 1, keys) < 0.6
                case "packed":
                    cuts = [self.integers(1, max(1, n // 3), 1).item() for n in (queries, keys)]
                    out["keep"] = (torch.arange(queries) // cuts[0])[:, None] == columns // cuts[1]
                case "dead rows":
                    out["keep"] = (self.uniform(batch, 1, queries, 1) < 0.5).expand(batch, 1, queries, keys)
                case "view":  # the last columns of a larger mask, transposed in memory
                    wide = self.uniform(keys + 9, queries, batch) < 0.7
                    out["keep"] = wide.permute(2, 1, 0)[:, None, :, 9:]
                case "additive":
                    out["keep"] = self.additive(self.uniform(batch, 1, queries, keys) < 0.7)
                case _:
                    shape = [n if self.flip(0.7) else 1 for n in (batch, heads, queries, keys)]
                    out["keep"] = self.uniform(*shape) < {"sparse": 0.04, "dense": 0.97}.get(name, 0.5)
        return out

    def additive(self, keep: torch.Tensor) -> torch.Tensor:
        least = (-math.inf, torch.finfo(torch.float32).min, -1e4)[int(self.integers(0, 2, 1))]
        read, bias = split_mask(torch.zeros(keep.shape).masked_fill(~keep, least))
        if not torch.equal(read, keep) or bias is not None:
            raise Failure("split_mask reads an additive mask as another")
        return read

    def poisoned_keys(self) -> torch.Tensor:
        """The keys, those that no row attends to overwritten: what padding holds must not matter."""
        if self.case.poison is None or self.case.layout == "one head for all" or self.case.qk_norm:
            return self.k
        key_heads = self.k.shape[1]
        unseen = ~self.keep.any(2).unflatten(1, (key_heads, -1)).any(2)
        poison = self.case.poison
        if self.case.dtype == torch.float16 and math.isfinite(poison):
            poison = math.copysign(6e4, poison)
        return laid_out(self.k.masked_fill(unseen[..., None], poison), self.case.layout)

    def problem(self) -> Problem:
        case, heads = self.case, self.case.shape[1]
        wide = {name: x.double() for name, x in self.parameters.items()}
        one_hot = torch.zeros(heads, case.degree + 1, dtype=torch.float64)
        one_hot[:, case.degree] = 1
        return Problem(
            query=self.q.double(),
            key=self.k.double(),
            value=self.v.double(),
            keep=self.keep,
            coefficients=wide.get("coefficients", one_hot),
            alpha=wide.get("alpha", torch.ones(heads, dtype=torch.float64)),
            beta=wide.get("beta", torch.zeros(heads, dtype=torch.float64)),
            gain=wide.get("gain", torch.ones(heads, dtype=torch.float64)),
            bias=wide.get("bias", torch.zeros((), dtype=torch.float64)).expand(self.keep.shape),
            probe=self.probe.double(),
            normalization=case.normalization,
            scaling=case.shape[5] ** -0.5 if case.scaling is None else case.scaling,
            softcap=case.softcap,
            qk_norm=case.qk_norm,
        )

    def compute(self, form: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Output and gradients by name. dtype: of everything, for the definition."""
        case = self.case
        leaves = {"query": self.q, "key": self.k if dtype else self.poisoned_keys(), "value": self.v}
        parameters = dict(self.parameters)
        if dtype:
            leaves, parameters = ({n: x.to(dtype) for n, x in some.items()} for some in (leaves, parameters))
        leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
        if case.is_learned:
            parameters = {n: x.detach().requires_grad_() for n, x in parameters.items()}
            leaves |= parameters
        options: dict[str, Any] = {**self.masks, "normalization": case.normalization, "qk_norm": case.qk_norm}
        options |= {"softcap": case.softcap, "scaling": case.scaling, "backend": form}
        options |= {} if case.has_coefficients else {"degree": case.degree}
        out = polynomial_attention(leaves["query"], leaves["key"], leaves["value"], **parameters, **options)
        grads = torch.autograd.grad(
            out, list(leaves.values()), self.probe.to(out.dtype), allow_unused=True, materialize_grads=True
        )
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    @torch.no_grad()
    def in_pieces(self) -> dict[str, torch.Tensor]:
        """The output of the linear-cost form, fed some rows at a time."""
        case = self.case
        *_, keys, _, _ = case.shape
        parameters = dict(self.parameters)
        affine = (parameters.pop("alpha"), parameters.pop("beta")) if case.is_affine else None
        polynomial = {"degree": case.degree, "has_coefficients": case.has_coefficients or case.is_affine}
        k = self.poisoned_keys()
        past = new_past(k, self.v, normalization=case.normalization, **polynomial)
        _, kept = _product(self.masks, keys)
        outs, start = [], 0
        while start < keys:
            stop = min(keys, start + int(self.integers(1, 1 if self.flip(0.5) else 1 + keys // 2, 1)))
            here = slice(start, stop)
            outs.append(
                attend(
                    self.q[:, :, here],
                    k[:, :, here],
                    self.v[:, :, here],
                    degree=case.degree,
                    affine=affine,
                    keep=None if kept is None else kept[:, None, None, here],
                    is_causal=True,
                    normalization=case.normalization,
                    qk_norm=case.qk_norm,
                    scaling=case.scaling,
                    past=past,
                    **parameters,
                )
            )
            start = stop
        return {"out": torch.cat(outs, 2)}


def _product(masks: dict[str, Any], keys: int) -> tuple[bool, torch.Tensor | None]:
    """The keys that are kept under masks that the linear-cost form takes, [B or 1, S]."""
    kept = None
    if "keep" in masks:
        kept = masks["keep"][(None,) * (4 - masks["keep"].ndim)][:, 0, -1]
    if "key_lengths" in masks:
        there = torch.arange(keys) < masks["key_lengths"][:, None]
        kept = there if kept is None else kept & there
    return masks.get("is_causal", False), kept


def refusal(case: Case) -> str | None:
    """What an error must say where a form cannot compute a case."""
    *_, keys, dim, value_dim = case.shape
    if case.form in ("cpu", "fused", "recurrent"):
        extras = [n for n, used in (("softcap", case.softcap is not None), ("bias", case.has_bias)) if used]
        if case.form == "recurrent" and case.normalization in ("l1", "l2"):
            return f'it has no normalization "{case.normalization}"'
        if extras:
            return f"it has no {', '.join(extras)}"
        if 0 in case.shape:
            return "a dimension is 0"
    if case.form in ("cpu", "fused") and not (0 if case.form == "fused" else 1) <= case.degree <= 16:
        return "degrees"
    if case.form == "recurrent":
        powers = range(case.degree + 1) if case.has_coefficients or case.is_affine else (case.degree,)
        features = sum(math.comb(dim + k - 1, k) for k in powers)
        size = features * (value_dim + (case.normalization == "sum")) * max(4, case.dtype.itemsize)
        if size > SMALL and keys * (dim + value_dim + (case.normalization == "sum")) * case.dtype.itemsize < size:
            return "it breaks even at"
        if set(case.masks) - {"causal", "lengths", "left", "right", "keys"}:
            return "rows"  # may be taken all the same, where the values of the mask come to be a product
    return None


def check(case: Case, seed: int) -> tuple[str, float, float]:
    """("computed" or "refused", largest error over its bound, median of the bound over the size of the result).

    Raises:
        Failure: with what is wrong.
    """
    tensors = Tensors(case, seed)
    expected = refusal(case)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        got = tensors.in_pieces() if case.pieces and not expected else tensors.compute(case.form)
    except ValueError as error:
        if expected and "cannot compute this call" in str(error) and expected in str(error):
            return "refused", 0.0, math.nan
        if expected == "rows" and "differs between heads" in str(error):
            return "refused", 0.0, math.nan
        raise Failure(f"refused: {error}") from error
    except OverflowError as error:
        got, overflow = {}, str(error)
    finally:
        torch.set_num_threads(before)
    if expected and expected != "rows":
        raise Failure(f"computed what it must refuse: {expected}")
    exact = tensors.compute("naive", torch.float64)
    limits = bounds(tensors.problem(), Rounding.of(case.form if case.form != "auto" else "cpu", case.dtype))
    largest = torch.finfo(case.dtype).max
    if not got:
        if case.dtype == torch.float16 and bool((exact["out"].abs() + limits["out"] >= largest).any()):
            return "refused", 0.0, math.nan
        raise Failure(f"overflow without need: {overflow}")
    worst, tightness = 0.0, []
    for name, result in got.items():
        limit = limits[name]
        if name == "bias":
            # of no rows or no keys the sum is 0, exactly
            limit = limit.sum_to_size(exact[name].shape) + TINY
        error = (result.double() - exact[name]).abs()
        # what the dtype cannot hold, and rows whose Z is a rounding error, say nothing
        open_ = (exact[name].abs() + limit > largest) | limit.isinf()
        if name == "query" and case.poison is not None and not math.isfinite(case.poison):
            # 0 times what is not finite: in the definition too, gradients of rows beside such a key are lost
            open_ = open_ | ~result.isfinite()
        ratio = torch.where(open_, 0.0, error / limit)
        if ratio.numel() == 0:
            continue
        # NaN is no number that a maximum may pass over
        peak = math.inf if ratio.isnan().any() else ratio.max().item()
        if not peak <= 1:
            where = tuple(int(i) for i in torch.unravel_index(ratio.nan_to_num(math.inf).argmax(), ratio.shape))
            raise Failure(
                f"{name}{list(where)} is {result[where].item():.9g}, the definition says "
                f"{exact[name][where].item():.9g} +- {limit[where].item():.2g} "
                f"({int((~(ratio <= 1)).sum())} of {ratio.numel()} elements)"
            )
        worst = max(worst, peak)
        if (size := exact[name].square().mean().sqrt().item()) and not open_.all():
            tightness.append(limit[~open_].square().mean().sqrt().item() / size)
    return "computed", worst, statistics.median(tightness) if tightness else math.nan


def cases(forms: list[str], seed: int, first: int, count: int) -> Iterator[tuple[int, Case]]:
    for index in range(first, first + count):
        # the form depends on the index alone, so that one case can be run again by itself
        form = forms[index % len(forms)]
        yield index, draw(form, random.Random(f"{seed} {index}"))


def command(seed: int, index: int, form: str) -> str:
    build = os.environ.get("HF_POLYATTN_CPU")
    prefix = f"HF_POLYATTN_CPU={build} " if build else ""
    return f"{prefix}python benchmarks/fuzz.py --cases 1 --seed {seed} --first {index} --forms {form}"


def run(
    forms: list[str], seed: int, first: int, count: int, progress: bool = True, each: Callable[[Found], None] = len
) -> Found:
    """Counts by form and dtype; failures are printed as they come. each: called with the counts after 100 cases."""
    found: Found = defaultdict(lambda: {"computed": 0, "refused": 0, "failed": 0, "worst": 0.0, "tightness": []})
    for index, case in tqdm(cases(forms, seed, first, count), total=count, disable=not progress, mininterval=1):
        here = found[case.form, str(case.dtype).removeprefix("torch.")]
        try:
            outcome, worst, tightness = check(case, seed * 1_000_003 + index)
        except Exception as error:
            outcome, worst, tightness = "failed", 0.0, math.nan
            tqdm.write(f"{type(error).__name__}: {error}\n  {case}\n  {command(seed, index, case.form)}")
        here[outcome] += 1
        here["worst"] = max(here["worst"], worst)
        if not math.isnan(tightness):
            here["tightness"].append(tightness)
        if (index + 1 - first) % 100 == 0:
            each(found)
    return found


def rows_of(found: Found, environment: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for (form, dtype), counts in sorted(found.items()):
        bound = f"{statistics.median(counts['tightness']):.2g}" if counts["tightness"] else ""
        measured = {**counts, "worst": f"{counts['worst']:.3f}", "median_bound": bound}
        del measured["tightness"]
        rows.append({"form": form, "dtype": dtype, **measured, **environment})
    return rows


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    others = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([row for row in others if row["command"] != rows[0]["command"]] + rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="csv to add to; none by default")
    args = parser.parse_args()
    shown = [word for i, word in enumerate(sys.argv) if word != "--out" and sys.argv[i - 1] != "--out"]
    build, interpreter = os.environ.get("HF_POLYATTN_CPU"), ["python"] * sys.argv[0].endswith(".py")
    environment = {
        "seed": args.seed,
        "device": f"{platform.machine()} CPU",
        "build": cpu.build().instruction_set,
        "torch": torch.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join([*([f"HF_POLYATTN_CPU={build}"] if build else []), *interpreter, *shown]),
    }
    keep = (lambda found: save(args.out, rows_of(found, environment))) if args.out else len
    rows = rows_of(run(args.forms, args.seed, args.first, args.cases, each=keep), environment)
    for row in rows:
        print(
            f"{row['form']:9} {row['dtype']:8} computed {row['computed']:5}  refused {row['refused']:4}  "
            f"failed {row['failed']:3}  largest error {row['worst']} of its bound, "
            f"median bound {row['median_bound']} of the result"
        )
    if args.out:
        save(args.out, rows)
    if failed := sum(row["failed"] for row in rows):
        sys.exit(f"{failed} of {args.cases} cases failed")
    print(f"{args.cases} cases, none failed")


if __name__ == "__main__":
    main()
