"""A command as a process: how it reports errors and Ctrl-C, what reaches the terminal, how memory is kept.

The exit code is the one that the command returns; 2 for bad input, after one line on stderr; 1 for a bug, after its
traceback; 130 after Ctrl-C; 141, silently, when the reader of stdout has gone, as in `stripe stats RUN | head -1`.
"""

import _thread
import argparse
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dis import opmap
from types import FrameType, TracebackType
from typing import Any

from stripe.memory import keep_memory
from stripe.messages import SCREEN, one_line, printable, shortened

INTERRUPTED = "interrupted: what was finished is valid and kept"
REFUSALS = (ArithmeticError, ModuleNotFoundError, RuntimeError, TypeError, ValueError)
LONGEST_TRACEBACK = 20_000  # characters
LONGEST_IMPORT = 10.0  # seconds after Ctrl-C during which an import may still run to its end
BUG = (
    "this is a bug in stripe: it should have done what was asked, or said what is wrong with it; "
    "please report it with the lines above"
)


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """Add --traceback."""
    parser.add_argument("--traceback", action="store_true", help="after bad input, show where the error was raised")


def dispatch(
    parse: Callable[[], argparse.Namespace],
    run: Callable[[argparse.Namespace], int | None],
    *,
    packages: tuple[str, ...] = ("stripe",),
    interrupted: str = INTERRUPTED,
    interrupts: Sequence[float] = (),
) -> int:
    """Parse the command line and run the command; return the exit code, which the module's docstring explains.

    Args:
        parse: reads the command line; with `traceback` among its arguments, bad input gives a traceback too.
        run: does the work and returns the exit code; None counts as 0.
        packages: packages in which a `raise` statement means that the input is bad.
        interrupted: the message after Ctrl-C.
        interrupts: not empty after a Ctrl-C, even if a library swallowed it or turned it into another error.
    """
    arguments = argparse.Namespace()
    try:
        with redirect_stdout(_Printable(sys.stdout)):
            try:
                arguments = parse()
                code = run(arguments) or 0
            finally:
                sys.stdout.flush()
        if interrupts:
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, Exception) as error:
        if interrupts or not isinstance(error, Exception):
            print(interrupted, file=sys.stderr)
            return 130
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 141
        line = refusal(error, packages)
        if line is None or getattr(arguments, "traceback", False):
            text = printable("".join(traceback.format_exception(error)))
            print(shortened(text, LONGEST_TRACEBACK), end="", file=sys.stderr)
        print(BUG if line is None else f"error: {shortened(line, SCREEN)}", file=sys.stderr)
        return 1 if line is None else 2


def dispatch_process(*words: Any, **choices: Any) -> int:
    """Call `dispatch` as the whole work of this process; return the exit code.

    One of several processes (torch.distributed) does not return but exits here, without Python's shutdown. The end of a
    process group does not join the threads of gloo; if one of them needs Python during the shutdown, the process
    aborts, and a job whose work is done counts as failed.
    """
    interrupts: list[float] = []  # when, in seconds

    def interrupt(_: int, frame: FrameType | None) -> None:
        interrupts.append(time.monotonic())
        patient = interrupts[-1] - interrupts[0] < LONGEST_IMPORT
        if patient and _imports(frame):  # interrupting an import may abort the process
            _interrupt_soon()
        else:
            raise KeyboardInterrupt

    def not_raised(found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:  # Ctrl-C in a finaliser, where Python ignores errors
            _interrupt_soon()
        else:
            sys.__unraisablehook__(found)

    sys.unraisablehook = not_raised
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores Ctrl-C
            signal.signal(signal.SIGINT, interrupt)
        keep_memory()
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
        code = dispatch(*words, interrupts=interrupts, **choices)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: Ctrl-C has nothing left to interrupt
    except KeyboardInterrupt:  # outside `dispatch`, between two of the lines above
        print(choices.get("interrupted", INTERRUPTED), file=sys.stderr)
        code = 130
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _imports(frame: FrameType | None) -> bool:
    """Return whether a module is being imported in this frame or in one of its callers."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _interrupt_soon() -> None:
    threading.Timer(0.01, _thread.interrupt_main).start()


def refusal(error: Exception, packages: tuple[str, ...] = ("stripe",)) -> str | None:
    """Return the line that says what is wrong with the input, or what the machine lacks; None for a bug.

    The input is at fault, or the machine, if a `raise` statement in `packages` raised the error, if files, connections
    or memory failed, or if a neural network failed on its input. Any other error of the code in `packages` is a bug,
    and so is an error of a library that this code did not translate.
    """
    steps = list(_steps(error.__traceback__))
    innermost = _package(steps[-1])
    line = one_line(error, SCREEN)
    if isinstance(error, OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the last is torch's
        return line
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in packages:
        return line
    if innermost in packages:
        raised = steps[-1].tb_frame.f_code.co_code[steps[-1].tb_lasti] == opmap["RAISE_VARARGS"]
        return line if raised and isinstance(error, REFUSALS) else None
    if any(step.tb_frame.f_globals.get("__name__") == "torch.nn.modules.module" for step in steps):
        return f"the network fails on its input, {type(error).__name__}: {line} (--traceback shows where)"
    return None


def _steps(level: TracebackType | None) -> Iterator[TracebackType]:
    """Yield the levels of a traceback, the innermost last."""
    while level is not None:
        yield level
        level = level.tb_next


def _package(step: TracebackType) -> str:
    name: str = step.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


def _reader_has_gone() -> bool:
    """Return whether stdout is the broken pipe; if so, send it to /dev/null, or Python would complain on exit."""
    reader = select.poll()
    try:
        reader.register(sys.stdout, select.POLLOUT)
    except (OSError, ValueError):  # not a file: the stdout of a notebook or a test
        return False
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in reader.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


class _Printable:
    """A stream whose control characters are shown as escapes: names in files must not steer the terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
