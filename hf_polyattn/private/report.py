"""What an encrypted evaluator must plan for: the range of every intermediate, and the depth of the graph."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch.export import export
from transformers import PreTrainedModel

from ..models import states
from ..observing import as_batches, run
from ..patchable import unwrap
from ..tables import format_table
from .compute import Inputs, computing_privately
from .fold import check_private, fold
from .graph import Depth, depth_of, operations
from .operation import PrivateAttention, Scheme

Range = tuple[float, float]


@dataclass(frozen=True)
class PrivateReport:
    """Ranges and depths of a private model's attention. Print it for two tables."""

    degree: int
    scheme: Scheme
    batches: int
    ranges: dict[str, dict[str, Range]]
    """Module -> intermediate -> its smallest and largest value, over all heads, rows and keys: padded ones are
    computed too, and overflow as well as others do."""
    depths: dict[str, Depth]
    """Scheme -> depth from query, key and value, behind their projections, to the output; the mask is in the clear."""
    counts: dict[str, int]
    """Scheme -> operations that are no movement of numbers."""

    @property
    def integer_bits(self) -> dict[str, int]:
        """Intermediate -> bits in front of the point that its values take, without the sign."""
        out: dict[str, int] = {}
        for ranges in self.ranges.values():
            for name, span in ranges.items():
                largest = max(map(abs, span))
                out[name] = max(out.get(name, 0), math.floor(math.log2(largest)) + 1 if largest >= 1 else 0)
        return out

    def __str__(self) -> str:
        names = list(self.integer_bits)
        rows = [
            [module, *(f"{low:.3g} to {high:.3g}" for low, high in ranges.values())]
            for module, ranges in self.ranges.items()
        ]
        rows.append(["integer bits", *(str(self.integer_bits[name]) for name in names)])
        what = (
            f"degree {self.degree}, {self.scheme}: smallest and largest values in {len(self.ranges)} attention "
            f"modules on {self.batches} batches, padding included"
        )
        depths = [
            [scheme, str(depth.products), str(depth.levels), str(self.counts[scheme])]
            for scheme, depth in self.depths.items()
        ]
        header = ["scheme", "products of ciphertexts", "levels, with products by numbers", "additions and products"]
        return (
            f"{what}\n{format_table(['module', *names], rows)}\n"
            f"depth of one module, from query, key and value to the output:\n{format_table(header, depths)}"
        )


@torch.no_grad()
def private_report(model: PreTrainedModel, batches: Iterable[Any], *, scheme: Scheme = "horner") -> PrivateReport:
    """Measures the private graph of a model on a few batches.

    Args:
        model: with a constant denominator: see `make_private`.
        batches: dictionaries of model inputs, or tensors of input ids, padded to the length that is evaluated.
        scheme: whose intermediates are measured; depths are those of all schemes that the coefficients allow.
    Returns:
        ranges by module and depths by scheme; print it.
    Raises:
        ValueError: as `computing_privately`, for no batches, and for values that are not finite.
    """
    batches = as_batches(batches)
    if not batches:
        raise ValueError("no batches to measure on: pass a few")
    ranges: dict[str, dict[str, Range]] = {}

    def note(module: str, operation: PrivateAttention, inputs: Inputs) -> None:
        seen = ranges.setdefault(module, {})
        for name, values in [*zip(("query", "key", "value"), inputs, strict=False), *operation.steps(*inputs)]:
            low, high = (end.item() for end in values.aminmax())
            if not math.isfinite(low + high):
                raise ValueError(f"{name} of {module} is not finite: the model or the batches hold NaN or inf")
            before = seen.get(name, (math.inf, -math.inf))
            seen[name] = (min(low, before[0]), max(high, before[1]))

    with computing_privately(model, scheme, note):
        run(unwrap(model), batches)
    settings = check_private(unwrap(model))
    coefficients = torch.cat([fold(state) for state in states(unwrap(model)).values()])
    depths, counts = {}, {}
    for each in get_args(Scheme):
        if each == "monic" and (coefficients[:, -1] == 0).any():
            continue
        depths[each], counts[each] = depth_of_scheme(settings.degree, each)
    return PrivateReport(settings.degree, scheme, len(batches), ranges, depths, counts)


def depth_of_scheme(degree: int, scheme: Scheme = "horner") -> tuple[Depth, int]:
    """Depth of the attention of a polynomial without zeros, and its additions and products, from its exported graph.

    >>> depth_of_scheme(2)
    (Depth(products=3, levels=4), 9)
    """
    operation = PrivateAttention(torch.ones(2, degree + 1), 2.0, scheme)
    tensors = (*(torch.ones(1, 2, 3, 4) for _ in range(3)), torch.ones(1, 3))
    program = export(operation, tensors, strict=False)
    names = [name for name in operations(program) if name in COUNTED]
    return depth_of(program, public=["mask"]), len(names)


def depth_table(degrees: Iterable[int]) -> str:
    """Markdown: products of ciphertexts and levels of each scheme, by degree."""
    schemes = get_args(Scheme)
    lines = [f"| degree | {' | '.join(f'{scheme}: products, levels' for scheme in schemes)} |", "|---" * 4 + "|"]
    for degree in degrees:
        depths = [depth_of_scheme(degree, scheme)[0] for scheme in schemes]
        lines.append(f"| {degree} | {' | '.join(f'{depth.products}, {depth.levels}' for depth in depths)} |")
    return "\n".join(lines)


COUNTED = ("add", "mul", "matmul")
"""What the graph of a `PrivateAttention` has besides movements of numbers."""
