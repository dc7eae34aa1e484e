"""What a graph of torch.export computes on encrypted numbers: which operations, and how deep.

An encrypted evaluator adds and multiplies. Everything else (exp, max, comparisons, divisions, roots) costs a protocol
of its own or an approximation, so a graph passes only if it has none of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_SUMS = ("add", "sub", "rsub", "neg", "sum")
_PRODUCTS = ("mul", "matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "square", "pow")
_SHAPES = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
    *("transpose", "permute", "t", "numpy_T", "slice", "select", "split", "unbind", "cat", "stack"),
    *("clone", "contiguous", "alias", "repeat", "getitem"),
)
ALLOWED = frozenset((*_SUMS, *_PRODUCTS, *_SHAPES))
"""Names of the operations of ATen that an encrypted evaluator has, or that only move numbers."""


@dataclass(frozen=True)
class Depth:
    """Multiplications on the longest path through a graph."""

    products: int = 0
    """Of two ciphertexts each: what is expensive, and under BFV or in secret sharing all that counts."""
    levels: int = 0
    """Of a ciphertext with anything: levels that CKKS consumes, which rescales after products with numbers too."""


def operations(program: ExportedProgram | fx.GraphModule) -> list[str]:
    """The operations in their order, by their short ATen names: ["transpose", "matmul", ...]."""
    return [_name(node) for node in program.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def check_graph(program: ExportedProgram | fx.GraphModule) -> list[str]:
    """Makes sure that a graph has additions, multiplications and movements of numbers only.

    Args:
        program: of torch.export.export, or its graph module.
    Returns:
        the operations, see `operations`.
    Raises:
        ValueError: names every other operation, and the line of source that it comes from.

    Example:
        >>> class Square(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * x
        >>> check_graph(torch.export.export(Square(), (torch.ones(2),)))
        ['mul']
    """
    bad = [_describe(node) for node in _calls(program) if not _is_allowed(node)]
    if bad:
        raise ValueError(
            f"not for encrypted evaluation, which knows additions and multiplications only: {'; '.join(bad)}. "
            "Make the model private first (hf_polyattn.private.make_private), and export it with export_attention"
        )
    return operations(program)


def depth_of(program: ExportedProgram, public: Iterable[str] = ()) -> Depth:
    """The depth of the output of an exported graph.

    Args:
        program: one that `check_graph` accepts.
        public: names of inputs that are not encrypted, such as a mask; parameters and buffers are public anyway.
    Raises:
        ValueError: for an operation that `check_graph` refuses, or a name that is no input.
    """
    check_graph(program)
    inputs = set(program.graph_signature.user_inputs)
    if unknown := set(public) - inputs:
        raise ValueError(f"public names {sorted(unknown)}, but the inputs are {sorted(map(str, inputs))}")
    # None: a public number
    depths: dict[fx.Node, Depth | None] = {}
    last = Depth()
    for node in program.graph.nodes:
        given = [depths[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            depths[node] = Depth() if node.name in inputs - set(public) else None
        elif node.op == "output":
            last = _deepest(given) or Depth()
        elif node.op == "get_attr":
            depths[node] = None
        else:
            depths[node] = _depth(node, depths.__getitem__)
    return last


def _depth(node: fx.Node, depth: Callable[[fx.Node], Depth | None]) -> Depth | None:
    name = _name(node)
    sources = [argument for argument in node.args if isinstance(argument, fx.Node)]
    deepest = _deepest(depth(source) for source in node.all_input_nodes)
    if deepest is None or name not in _PRODUCTS:
        return deepest
    if name in ("pow", "square"):
        exponent = 2 if name == "square" else int(_exponent(node))
        doublings = (exponent - 1).bit_length()
        return Depth(deepest.products + doublings, deepest.levels + doublings)
    # addmm and linear add a third operand to the product of two
    factors, addend = sources[:2], sources[2:]
    if name in ("addmm", "baddbmm"):
        factors, addend = sources[1:], sources[:1]
    encrypted = [d for d in map(depth, factors) if d is not None]
    top = _deepest(encrypted)
    return _deepest([top and Depth(top.products + (len(encrypted) > 1), top.levels + 1), *map(depth, addend)])


def _deepest(depths: Iterable[Depth | None]) -> Depth | None:
    """Both numbers of their own: the path with most products need not be the one with most levels."""
    known = [depth for depth in depths if depth is not None]
    return Depth(max(d.products for d in known), max(d.levels for d in known)) if known else None


def _calls(program: ExportedProgram | fx.GraphModule) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def _is_allowed(node: fx.Node) -> bool:
    name = _name(node)
    if name == "pow":
        exponent = _exponent(node)
        return isinstance(exponent, (int, float)) and exponent >= 1 and float(exponent).is_integer()
    return name in ALLOWED


def _exponent(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent")


def _describe(node: fx.Node) -> str:
    """The operation and the last line of source behind it."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f"{_name(node)} ({lines[-1]})" if lines else _name(node)
