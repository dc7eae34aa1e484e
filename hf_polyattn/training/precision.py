"""The precision that a run asks for is the one that it trains in."""

import os

from accelerate import PartialState
from accelerate.state import AcceleratorState


def settle_precision(asked: str | None) -> None:
    """Call it before a run's Accelerator is made; `asked`: no, bf16, fp16, or None for what accelerate launch says.

    accelerate keeps the precision, and whether to compile, of the first Accelerator for the whole process: a second
    run in it would be trained like the first. What it knows of processes and devices stays.

    Raises:
        ValueError: for fp16 on a CPU, where accelerate would train in fp32 without a word.
    """
    AcceleratorState._reset_state()
    wanted = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "fp16" and PartialState().device.type == "cpu":
        raise ValueError(
            "mixed_precision fp16 needs a GPU, and this run would be on a CPU: use --mixed_precision bf16, or no"
        )
