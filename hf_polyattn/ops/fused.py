"""The fused form: Triton kernels for GPUs, called as operators of torch.

Triton is imported when the first call on a GPU asks for it, never before; without a GPU only Triton's interpreter
runs the kernels (`TRITON_INTERPRET=1` in the environment before Python starts), which is how they are tested.

The backward pass gives the same bits in every run. `HF_POLYATTN_FUSED_BACKWARD=atomic` adds dQ up by atomics
instead: two products less a tile, sums in any order; torch.use_deterministic_algorithms overrides it.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cpu import CONSTANT, NORMALIZATIONS
from .fused_launch import Launch, architecture, fp32_precision, interpreted, launch, padded, run, splits
from .fused_masks import Masks
from .normalization import NORMALIZED
from .results import ONCE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_DEGREE = 16
OLDEST_TRITON = (3, 7)
DECODE_ROWS = 16
"""Up to so many queries, the keys are shared out to programs as a cache of a decoding step is."""

logger = logging.getLogger(__name__)

# made by hand, for torch.library.custom_op and register_fake look for the source of their caller in every module that
# is loaded: a third of what importing this package took
_operators = torch.library.Library("hf_polyattn", "FRAGMENT")
# torch's compiler is imported by the first call, and not before
_untraced = functools.cache(torch.compiler.disable)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of tensors, which changes none of them, the operator torch.ops.hf_polyattn.<its name>."""

    def kernel(*arguments: Any) -> Any:
        return _untraced(function)(*arguments)

    schema = torch.library.infer_schema(function, mutates_args=())
    _operators.define(function.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _operators.impl(function.__name__, kernel, "CompositeExplicitAutograd")
    return function


def problem(device: str) -> str | None:
    """Why this machine cannot run the kernels on that kind of device; None where it can."""
    if device == "cpu" and not interpreted():
        return "it runs on GPUs; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device not in ("cuda", "cpu"):
        return f"it runs on CUDA devices, not on {device}"
    return _problem(device)


@functools.cache
def _problem(device: str) -> str | None:
    if device == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        capability = torch.cuda.get_device_capability()
        if torch.version.hip is None and capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"
    try:
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < OLDEST_TRITON:
            return f"it was tested with Triton {'.'.join(map(str, OLDEST_TRITON))} and newer, not {triton.__version__}"
        _try(device)
    except Exception as error:  # no Triton, no C compiler for its launcher, no driver: plain torch still works
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("fused attention is not available, using plain torch: %s", first)
        return first
    return None


# a graph that is being compiled asks too, and must take the answer instead of tracing how it is found
_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _try(device: str) -> None:
    """One tiny call: what is missing for compiling or launching any kernel is missing here."""
    x = torch.ones(1, 1, 32, 16, device=device)
    out = fused_attention(x, x, x, degree=2, coefficients=None, gain=None, normalization="length", scaling=1.0)
    if not torch.allclose(out, torch.full_like(out, 16.0**2), rtol=1e-2):
        raise RuntimeError(f"a trial run of the kernels gave {out.flatten()[0].item()} instead of 256")


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    coefficients: Tensor | None,
    gain: Tensor | None,
    normalization: str | float,
    scaling: float,
    keep: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """As `tiled_attention`, with a gain [H] that carries no gradient; bf16, fp16 and fp32, one dtype for all three.

    query [B, H, T, D], key [B, Hk, S, D], value [B, Hk, S, Dv] with any strides but 1 in the last dimension; D and Dv
    up to 256, none of the sizes 0.

    Returns:
        [B, H, T, Dv] in the query's dtype; in fp32 for fp16, for the caller to check its range.
    Raises:
        RuntimeError: in the backward pass of the backward pass.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if coefficients is not None:
        coefficients = coefficients.float().contiguous()
        degree = coefficients.shape[1] - 1
    is_named = isinstance(normalization, str) and normalization != "none"
    out, _ = torch.ops.hf_polyattn.fused_forward(
        query,
        key,
        value,
        coefficients,
        None if gain is None else gain.detach().float().contiguous(),
        degree,
        NORMALIZATIONS[normalization] if is_named else CONSTANT,  # type: ignore[index]
        1.0 if isinstance(normalization, str) else float(normalization),
        scaling,
        is_causal,
        sliding_window or 0,
        None if key_lengths is None else key_lengths.to(query.device, torch.int64).contiguous(),
        None if keep is None else keep[(None,) * (4 - keep.ndim)],
    )
    return out


def _constants(query: Tensor, value: Tensor, coefficients: Tensor | None, degree: int, masks: Masks) -> dict[str, Any]:
    """What the kernels are compiled for, the normalization and the sizes of tiles left out."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        **masks.constants,
        "DEGREE": degree,
        "COUNT": 0 if coefficients is None else coefficients.shape[1],
        "D": dim,
        "DV": value_dim,
        "DP": padded(dim),
        "DVP": padded(value_dim),
        "PRECISION": "tf32" if query.dtype == torch.float16 and not torch.version.hip else fp32_precision(),
        "WIDE": query.dtype == torch.float16,
    }


def _launch(query: Tensor, value: Tensor) -> Launch:
    width = max(padded(query.shape[-1]), padded(value.shape[-1]))
    return launch(architecture(query.device), width, 16 if query.dtype == torch.bfloat16 else 32)


def _of_heads(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _empty_output(query: Tensor, width: int) -> Tensor:
    """[B, H, T, width], laid out in memory as the query is."""
    batch, heads, rows, _ = query.shape
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    return query.new_empty(batch, heads, rows, width, dtype=dtype)


@_operator
def fused_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor | None,
    gain: Tensor | None,
    degree: int,
    normalization: int,
    constant: float,
    scaling: float,
    is_causal: bool,
    sliding_window: int,
    key_lengths: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the divisors z [B, H, T], fp32. normalization: a code of `cpu.NORMALIZATIONS`."""
    batch, heads, queries, _ = query.shape
    out = _empty_output(query, value.shape[-1])
    divisors = query.new_empty(batch, heads, queries, dtype=torch.float32)
    masks = Masks(batch, queries, key.shape[2], is_causal, sliding_window, key_lengths, keep)
    constants = _constants(query, value, coefficients, degree, masks) | {"NORMALIZATION": normalization}
    attend = _decode if queries <= DECODE_ROWS else _prefill
    with _on(query):
        attend(query, key, value, out, divisors, coefficients, gain, masks, scaling, constant, constants)
    return out, divisors


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    divisors: Tensor,
    coefficients: Tensor | None,
    gain: Tensor | None,
    masks: Masks,
    scaling: float,
    constant: float,
    constants: dict[str, Any],
) -> None:
    """Fills out and divisors, one program for each block of queries."""
    from .fused_kernels import forward_kernel

    batch, heads, queries, _ = query.shape
    tile = _launch(query, value).forward
    blocks = -(-queries // tile.rows)
    lists, list_strides = masks.lists(tile)
    pointers = (query, key, value, out, divisors, coefficients, gain, masks.key_lengths, masks.seen, lists)
    steps = [*_of_heads(query, key, value, out), *masks.strides, *list_strides]
    sizes = (heads, heads // key.shape[1], queries, masks.keys, blocks, scaling, constant)
    shape = {"BM": tile.rows, "BN": tile.keys}
    run(forward_kernel, blocks * batch * heads, tile, *pointers, *steps, *sizes, **constants, **shape)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    divisors: Tensor,
    coefficients: Tensor | None,
    gain: Tensor | None,
    masks: Masks,
    scaling: float,
    constant: float,
    constants: dict[str, Any],
) -> None:
    """Fills out and divisors, several programs for each key head, which share its keys out."""
    from .fused_kernels import decode_kernel, reduce_kernel

    batch, heads, queries, _ = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    tile = _launch(query, value).decode
    rows = min(padded(groups * queries), 4 * tile.rows)
    row_blocks = -(-groups * queries // rows)
    programs = row_blocks * batch * key_heads
    shares, tiles = splits(programs, masks.keys, tile.keys, query.device)
    parts = query.new_empty(shares, batch, heads, queries, value.shape[-1], dtype=torch.float32)
    totals = query.new_empty(shares, batch, heads, queries, dtype=torch.float32)
    pointers = (query, key, value, parts, totals, coefficients, masks.key_lengths, masks.seen)
    steps = [*_of_heads(query, key, value), *masks.strides]
    sizes = (key_heads, groups, queries, masks.keys, row_blocks, shares, tiles, scaling)
    run(decode_kernel, programs * shares, tile, *pointers, *steps, *sizes, **constants, BM=rows, BN=tile.keys)
    every = batch * heads * queries
    reduced = {name: constants[name] for name in ("NORMALIZATION", "DV", "DVP")}
    steps = [*_of_heads(out), heads, queries, shares, every]
    run(reduce_kernel, every, None, parts, totals, out, divisors, gain, *steps, constant, **reduced)


@_operator
def fused_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    divisors: Tensor,
    wants_coefficients: bool,
    coefficients: Tensor | None,
    gain: Tensor | None,
    degree: int,
    normalization: int,
    constant: float,
    scaling: float,
    is_causal: bool,
    sliding_window: int,
    key_lengths: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV and dc [H, p + 1], the last empty if not wanted."""
    from .fused_backward import key_gradients_kernel, query_gradients_kernel

    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    configuration = _launch(query, value)
    masks = Masks(batch, queries, keys, is_causal, sliding_window, key_lengths, keep)
    constants = _constants(query, value, coefficients, degree, masks) | {"NORMALIZATION": normalization}
    constants["CP"] = 1 << max(constants["COUNT"] - 1, 0).bit_length()
    factors = divisors.reciprocal()
    if gain is not None:
        factors = factors * gain.view(-1, 1)
    pulls = None
    if normalization in [NORMALIZATIONS[name] for name in NORMALIZED]:
        delta = (grad.float() * out.float()).sum(-1)
        pulls = delta / (divisors.square() if normalization == NORMALIZATIONS["l2"] else divisors)
    atomic = adds_by_atomics()
    dk, dv = torch.empty_like(key), torch.empty_like(value)
    dq = torch.zeros_like(query, dtype=torch.float32) if atomic else torch.empty_like(query)
    key_tile, query_tile = configuration.key_gradients, configuration.query_gradients
    key_blocks, query_blocks = -(-keys // key_tile.keys), -(-queries // query_tile.rows)
    dc = None
    if wants_coefficients:
        # what each program leaves; summed in fixed order below
        blocks = key_blocks if atomic else query_blocks
        dc = query.new_empty(batch, heads, blocks, constants["COUNT"], dtype=torch.float32)

    inputs = (query, key, value, grad)
    shared = (factors, pulls, coefficients, key_lengths, masks.seen)
    steps = [*_of_heads(*inputs, dq, dk, dv), *masks.strides]
    with _on(query):
        lists, list_strides = masks.lists(key_tile, by_key=True)
        run(
            key_gradients_kernel,
            key_blocks * batch * key_heads,
            key_tile,
            *(*inputs, dq if atomic else None, dk, dv, dc if atomic else None, *shared, lists),
            *(*steps, *list_strides, heads, key_heads, heads // key_heads, queries, keys, key_blocks, scaling),
            **constants,
            BM=key_tile.rows,
            BN=key_tile.keys,
        )
        if not atomic:
            lists, list_strides = masks.lists(query_tile)
            steps = [*_of_heads(*inputs, dq), *masks.strides]
            run(
                query_gradients_kernel,
                query_blocks * batch * heads,
                query_tile,
                *(*inputs, dq, dc, *shared, lists),
                *(*steps, *list_strides, heads, heads // key_heads, queries, keys, query_blocks, scaling),
                **constants,
                BM=query_tile.rows,
                BN=query_tile.keys,
            )
    # operators may not return None
    dc = query.new_empty(0, dtype=torch.float32) if dc is None else dc.sum((0, 2))
    return dq.to(query.dtype), dk, dv, dc


def adds_by_atomics() -> bool:
    """Whether dQ is added up by atomics, in any order."""
    wanted = os.environ.get("HF_POLYATTN_FUSED_BACKWARD") == "atomic"
    return wanted and not torch.are_deterministic_algorithms_enabled()


def _forward_shapes(query: Any, key: Any, value: Any, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value.shape[-1]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_shapes(
    grad: Any, query: Any, key: Any, value: Any, out: Any, divisors: Any, wants: bool, coefficients: Any, *rest: Any
) -> tuple[Tensor, ...]:
    dc = torch.empty_like(coefficients) if wants else query.new_empty(0, dtype=torch.float32)
    return (*(torch.empty_like(x) for x in (query, key, value)), dc)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, coefficients, gain, *options, key_lengths, keep = inputs
    ctx.save_for_backward(query, key, value, *output, coefficients, gain, key_lengths, keep)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, divisors, coefficients, gain, key_lengths, keep = ctx.saved_tensors
    wants = coefficients is not None and ctx.needs_input_grad[3]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv, dc = torch.ops.hf_polyattn.fused_backward(
        grad, query, key, value, out, divisors, wants, coefficients, gain, *ctx.options, key_lengths, keep
    )
    return (dq, dk, dv, dc if wants else None, *[None] * (len(ctx.options) + 3))


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(ONCE.format(form="fused"))


# what a graph that is being compiled asks: shapes, of tensors that hold nothing
_operators.impl("fused_forward", _forward_shapes, "Meta")
_operators.impl("fused_backward", _backward_shapes, "Meta")
torch.library.register_autograd("hf_polyattn::fused_forward", _differentiate, setup_context=_save, lib=_operators)
torch.library.register_autograd("hf_polyattn::fused_backward", _refuse, lib=_operators)
