"""How scripts end, the recipes and the console script: a mistake of the user's is one line, a bug shows its traceback.

Run as a module, it is `accelerate launch` that leaves Ctrl-C to what it launches.

A module of its own beside the package, because importing anything below `hf_polyattn` imports torch.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

DEBUG = "HF_POLYATTN_DEBUG"
"""Set in the environment, it shows the traceback of an error that would be one line."""


class ExpectedError(RuntimeError):
    """Carries a message for the user, which scripts show as one line; other RuntimeErrors are bugs."""


class TrainingStoppedError(ExpectedError):
    """Training cannot go on, for its rates or its data; the message says where it stopped and what may help."""


_when_interrupted: Callable[[], str] | None = None


def when_interrupted(say: Callable[[], str]) -> None:
    """From now on a script that Ctrl-C ends says `say()` in its last line; nothing where that is empty."""
    global _when_interrupted
    _when_interrupted = say


def answer_interrupts() -> None:
    """In a script, above imports that take seconds: Ctrl-C is one line there too, and the exit status stays 130."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt) and not os.environ.get(DEBUG):
            print("interrupted", file=sys.stderr)
        else:
            show(kind, error, trace)

    sys.excepthook = hook


def exit_status(
    program: str,
    work: Callable[[], Any],
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ExpectedError),
    debug: bool = False,
) -> int:
    """Exit status of a script that does `work`: 0, 1 after an error of the user's, 130 after Ctrl-C.

    expected: errors that carry a message for the user; each becomes one line, unless `debug` or the environment asks
        for the traceback. Others keep theirs.
    """
    global _when_interrupted
    # of an earlier one in this process
    _when_interrupted = None
    try:
        with contextlib.nullcontext() if debug else quiet_neighbours():
            work()
    except KeyboardInterrupt:
        if line := _when_interrupted() if _when_interrupted else "interrupted":
            print(line, file=sys.stderr)
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


def launch() -> None:
    """`accelerate launch` with the words of the command line; the recipe answers Ctrl-C, which reaches it as well."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # a handler, for what is ignored here the recipe would ignore too
        signal.signal(signal.SIGINT, lambda *_: None)
    from accelerate.commands.accelerate_cli import main

    sys.argv.insert(1, "launch")
    main()


if __name__ == "__main__":
    launch()
