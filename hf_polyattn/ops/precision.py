"""What is computed in which dtype: 16-bit tensors in fp32, inside autocast too, and no silent overflow at the end."""

import contextlib
from collections.abc import Sequence

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # entering costs as much as a small product: only where there is something to switch off
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def to_dtype(
    out: torch.Tensor, dtype: torch.dtype, inputs: Sequence[torch.Tensor], what: str = "output"
) -> torch.Tensor:
    """Casts [B, H, ., .], and reports what float16 cannot hold instead of returning inf in silence.

    inputs: what `out` was computed from. Where they are not finite themselves, nothing is reported here.
    Raises:
        OverflowError: for float16 outside torch.compile; names the heads.
    """
    if dtype == torch.float16 and not torch.compiler.is_compiling() and out.numel():
        limit = torch.finfo(dtype).max
        peak = out.detach().abs().amax(dim=(0, 2, 3))
        if (bad := (~(peak <= limit)).nonzero().flatten().tolist()) and all(x.isfinite().all() for x in inputs):
            raise OverflowError(
                f"attention {what} of {peak.max().item():.3g} in heads {bad} exceeds float16's range of {limit:.0f}: "
                "use bfloat16 or float32, lower the gain (calibrate the model), or switch qk_norm on"
            )
    return out.to(dtype)
