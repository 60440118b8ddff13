"""A process that forks children which work on a run, and has them killed at a chosen operation or after a chosen time.

One JSON request per line of stdin, {"task", "path", "operation" or "seconds"}; one answer per line of stdout,
{"killed", "finished", "operations"}. The parent touches no Arrow file itself, so that forking stays safe.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from stripe.store import repair_run
from stripe.store.directory import Directory
from stripe.store.parts import PartWriter
from stripe.store.rows import EpochWriter
from tests.runs import record, sizes_of, writer

EPOCHS = (1, 2, 3)
SAMPLES = 20
COUNTED = ("create_dir", "open_output_stream", "move", "copy_file", "delete_file", "delete_dir")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def record_rest(path: str) -> None:
    """Record the epochs that the run lacks; say each once it is finished."""
    with writer(path) as run:
        finished = run.epochs
    for number in EPOCHS:
        if number not in finished:
            record(path, number, samples=SAMPLES)
            say(f"finished {number}")


def record_moments(path: str) -> None:
    record(path, 1, 2, samples=SAMPLES, contents="moments", overwrite=True)


def overwrite(path: str) -> None:
    record(path, 1, 2, samples=SAMPLES, seed=50, overwrite=True)


def repair(path: str) -> None:
    repair_run(path)


TASKS: dict[str, Callable[[str], None]] = {
    "record": record_rest,
    "moments": record_moments,
    "overwrite": overwrite,
    "repair": repair,
}


class Files:
    """Arrow's file system, with a step before every operation that writes."""

    def __init__(self, files: Any, step: Callable[..., Any]) -> None:
        self._files, self._step = files, step

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._files, name)
        return self._step(name, value) if name in COUNTED else value


def count_operations(deadly: int | None) -> None:
    """Say every operation that writes before it is done; instead of the deadly one, die."""
    numbers = itertools.count()

    def step(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(numbers) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            paths = [each for each in arguments if isinstance(each, str)]
            say(f"operation {name} {' '.join(paths)}")
            return operation(*arguments, **options)

        return call

    prepare = Directory.__init__

    def init(self: Directory, path: str) -> None:
        prepare(self, path)
        self.files = Files(self.files, step)

    Directory.__init__ = init
    os.fsync = step("fsync", os.fsync)
    PartWriter.write = step("write", PartWriter.write)
    PartWriter.close = step("close", PartWriter.close)
    EpochWriter.append = step("append", EpochWriter.append)


def work(task: str, path: str, operation: int | None, outlet: int) -> None:
    os.dup2(outlet, 1)
    count_operations(operation)
    with sizes_of(28 * 4, 2000):  # several row groups and parts an epoch
        TASKS[task](path)


def answer(task: str, path: str, operation: int | None = None, seconds: float | None = None) -> dict[str, Any]:
    """Let a child work until it ends or is killed."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(task, path, operation, outlet)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    os.close(outlet)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(inlet) as said:
        lines = said.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child failed: {lines}")
    operations = [line.removeprefix("operation ") for line in lines if line.startswith("operation ")]
    finished = [int(line.removeprefix("finished ")) for line in lines if line.startswith("finished ")]
    return {"killed": status != 0, "finished": finished, "operations": operations}


if __name__ == "__main__":
    for request in sys.stdin:
        say(json.dumps(answer(**json.loads(request))))
