"""Eval or train mode for the length of a with block."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """`model` in eval mode, or in train mode; afterwards every module is in the mode that it was in.

    Module by module, because `model.train()` would wake parts that are kept in eval mode on purpose.
    """
    before = {module: module.training for module in model.modules()}
    model.train(train)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def training(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`model` in train mode, the same way."""
    return evaluating(model, train=True)
