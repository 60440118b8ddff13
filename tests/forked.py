"""Processes that begin with every library loaded, since they are forks of one that loaded them: the fixture `forks`.

Each is a process group of its own, is really killed by a signal, and ends with an exit code as any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from benchmarks.timing import start_server

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0  # seconds after which a process that does not end is killed


def run_stripe(*words: object) -> NoReturn:
    """Do what `stripe` does with these words."""
    from stripe.cli import main

    sys.argv = ["stripe", *map(str, words)]
    raise SystemExit(main())


class Forks:
    """Starts processes; `close` kills those that a failed test left."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._started: list[ForkServerProcess] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # where `tests` is found
            start_server(["tests.forked", "tests.loaded"])  # of which a process has one: benchmarks use it too

    def start(
        self,
        function: Callable[..., object],
        *arguments: object,
        said: Path,
        errors: Path | None = None,
        folder: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> ForkServerProcess:
        """Start a process that calls the function in ``folder``.

        What it prints is appended to the file ``said``, and what it prints to stderr, to ``errors`` if that is given.
        Return once the process has begun.
        """
        begun, begin = self._context.Pipe(duplex=False)
        streams = (str(said), str(errors or said))
        process = self._context.Process(
            target=_call, args=(function, arguments, streams, str(folder), environment or {}, begin)
        )
        process.start()
        self._started.append(process)
        begin.close()
        begun.recv()
        begun.close()
        return process

    def team(self, function: Callable[..., object], *arguments: object, **options: Any) -> list[ForkServerProcess]:
        """Start the two processes of a job, each told its rank as `torchrun` tells it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return [self.start(function, *arguments, environment=job | rank, **options) for rank in ranks]

    def close(self) -> None:
        for process in self._started:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)


def ended(*processes: ForkServerProcess) -> list[int | None]:
    """Wait until the processes end, or kill them after PATIENCE; return their exit codes."""
    for process in processes:
        process.join(PATIENCE)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in processes]


def _call(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    streams: tuple[str, str],
    folder: str,
    environment: dict[str, str],
    begin: Any,
) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # Python's default, not this process's own
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # to be found anew
    for stream, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        begin.send(None)
        begin.close()
        function(*arguments)
    except KeyboardInterrupt:  # ends as Python ends of itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
