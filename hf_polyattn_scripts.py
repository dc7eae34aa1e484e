"""How scripts end, the recipes and the console script: a mistake of the user's is one line, a bug shows its traceback.

A module of its own beside the package, because importing anything below `hf_polyattn` imports torch.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEBUG = "HF_POLYATTN_DEBUG"
"""Set in the environment, it shows the traceback of an error that would be one line."""


class TrainingStoppedError(RuntimeError):
    """Training cannot go on, for its rates or its data; the message says where it stopped and what may help."""


def exit_status(
    program: str,
    work: Callable[[], Any],
    expected: tuple[type[Exception], ...] = (ValueError, OSError, TrainingStoppedError),
    debug: bool = False,
) -> int:
    """Exit status of a script that does `work`: 0, 1 after an error of the user's, 130 after Ctrl-C.

    expected: errors that carry a message for the user; each becomes one line, unless `debug` or the environment asks
        for the traceback. Others keep theirs.
    """
    try:
        with contextlib.nullcontext() if debug else quiet_neighbours():
            work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except expected as error:
        if debug or os.environ.get(DEBUG):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.strerror}: {error.filename}"
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def quiet_neighbours() -> Iterator[None]:
    """Leaves out what bitsandbytes says of kernels that it lacks: PEFT imports it, and nothing here asked for it."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_script(main: Callable[[], Any]) -> None:
    """Calls the main function of a recipe and exits, see `exit_status`; called from Python, `main` raises."""
    sys.exit(exit_status(Path(sys.argv[0]).name, main))
