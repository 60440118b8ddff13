"""A command as a process: what its errors and Ctrl-C become, what reaches the terminal, how memory is kept.

Exit codes: what the command returns; 2 for bad input, after one line on stderr; 1 for a bug, after its traceback; 130
after Ctrl-C; 141, silently, when the reader of stdout has gone, as in `stripe stats RUN | head -1`.
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
LONGEST_IMPORT = 10.0  # seconds after Ctrl-C in which modules are still imported to their end
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
    """Parse the command line and run the command; return the exit code, see above.

    Args:
        parse: reads the command line; `traceback` among its arguments asks for tracebacks of bad input too.
        run: does the work and returns the exit code; None is 0.
        packages: whose `raise` statements refuse bad input.
        interrupted: what to say after Ctrl-C.
        interrupts: holds something once there was a Ctrl-C, which libraries may lose or turn into an error of theirs.
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
    """`dispatch` as all that this process does; one process of several ends here, with the exit code.

    Threads of gloo, which a group's end does not join, now and then need Python while it shuts down: the process
    aborts, and the job, whose work is done, counts as failed.
    """
    interrupts: list[float] = []  # when, in seconds

    def interrupt(_: int, frame: FrameType | None) -> None:
        interrupts.append(time.monotonic())
        patient = interrupts[-1] - interrupts[0] < LONGEST_IMPORT
        if patient and _imports(frame):  # which, where it is interrupted, may abort the process
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
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not of a job in the background
            signal.signal(signal.SIGINT, interrupt)
        keep_memory()
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
        code = dispatch(*words, interrupts=interrupts, **choices)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: Ctrl-C has nothing left to interrupt
    except KeyboardInterrupt:  # between two of these lines
        print(choices.get("interrupted", INTERRUPTED), file=sys.stderr)
        code = 130
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _imports(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _interrupt_soon() -> None:
    threading.Timer(0.01, _thread.interrupt_main).start()


def refusal(error: Exception, packages: tuple[str, ...] = ("stripe",)) -> str | None:
    """Return the line that says what is wrong with the input, or what the machine lacks; None for a bug.

    Bad input is refused by a `raise` statement in `packages`, by files, network and memory, or by a network that fails
    on what it is given. An error that an expression in `packages` runs into is a bug, and so is one that a library
    raised and nobody translated.
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
    """Tell whether it is stdout that broke; if so, let it write to nowhere, or Python would complain at its end."""
    reader = select.poll()
    try:
        reader.register(sys.stdout, select.POLLOUT)
    except (OSError, ValueError):  # no file: a notebook's, or a test's
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
