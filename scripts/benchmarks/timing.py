"""Cases timed side by side, their runs interleaved: each in a process of its own, or all in one.

One process serves cases whose ratios are near 1. For the smallest differences, the cases are interleaved step by step:
changes of the machine's speed from second to second then affect all cases alike.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stripe import interleave

Row = dict[str, Any]
Run = Callable[[], Any]
"""The timed part of a case."""
Prepare = Callable[[], Run]
"""A case, which can be pickled: it does the untimed preparation and returns the part to time."""
Steps = Callable[[], Iterator[object]]
"""A case step by step; the work after its last yield is a step too."""
STOPPING = 10  # seconds that a process may take to exit by itself
_ENDED = object()


@dataclass(frozen=True)
class Result:
    """Rows for the report; `failed` if a result that was measured is wrong."""

    rows: list[Row]
    failed: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, the process's peak memory in MB (None where unknown), the last run's return value."""

    seconds: list[float]
    peak_mb: float | None
    returned: Any

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratios(self, other: Timing) -> list[float]:
        """Return, for every round, the seconds over the other's in the same round; in increasing order."""
        return sorted(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def ratio(self, other: Timing) -> float:
        """Return the median of the rounds' ratios, which changes of the machine's speed between rounds do not move."""
        return statistics.median(self.ratios(other))

    def difference(self, other: Timing) -> float:
        """Return the median of the rounds' differences, in seconds."""
        return statistics.median(mine - its for mine, its in zip(self.seconds, other.seconds, strict=True))


def measure(cases: Mapping[str, Prepare], rounds: int) -> dict[str, Timing]:
    """Time every case `rounds` times, after one run to warm up; ChildProcessError for a case that fails."""
    start_server({getattr(prepare, "func", prepare).__module__ for prepare in cases.values()})
    with ExitStack() as running:
        pipes = {name: running.enter_context(_process(name, prepare)) for name, prepare in cases.items()}
        for name, pipe in pipes.items():
            _receive(name, pipe)
        last: dict[str, tuple[Any, float | None]] = {}

        def run(name: str) -> None:
            pipes[name].send(True)
            last[name] = _receive(name, pipes[name])

        seconds = interleave({name: partial(run, name) for name in pipes}, rounds)
    return {name: Timing(seconds[name], last[name][1], last[name][0]) for name in pipes}


def measure_together(cases: Mapping[str, Prepare], rounds: int) -> dict[str, Timing]:
    """Time all cases in one process, for ratios so near 1 that two processes would differ more.

    Each case's peak memory, and the value it returns, come from a run in a process of its own.
    """
    alone = measure(cases, 0)
    seconds = measure({"together": partial(_prepare_together, cases, rounds)}, 0)["together"].returned
    return {name: Timing(seconds[name], each.peak_mb, each.returned) for name, each in alone.items()}


def _prepare_together(cases: Mapping[str, Prepare], rounds: int) -> Run:
    runs = {name: prepare() for name, prepare in cases.items()}
    return partial(interleave, runs, rounds)


def step_by_step(bare: Callable[[], object], cases: Mapping[str, Steps]) -> tuple[float, dict[str, float]]:
    """Run every case once, a step of each in turn, and `bare` between any two steps.

    Returns the mean seconds of `bare` and the seconds of each case. These are the seconds of its steps, plus the time
    that `bare` took longer after a step than before it, since a case may leave work to a thread.
    """
    left = {name: steps() for name, steps in cases.items()}
    spent = dict.fromkeys(cases, 0.0)
    bare()
    bares = [_seconds(bare)]
    while left:
        for name, steps in list(left.items()):
            spent[name] += _seconds(partial(_advance, left, name, steps))
            bares.append(_seconds(bare))
            spent[name] += bares[-1] - bares[-2]
    return statistics.mean(bares), spent


def _advance(left: dict[str, Iterator[object]], name: str, steps: Iterator[object]) -> None:
    if next(steps, _ENDED) is _ENDED:
        del left[name]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def start_server(modules: Iterable[str]) -> None:
    """Start the fork server, unless it runs already; it imports `modules` once, for all processes of the cases."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise, checking for a GPU makes CUDA unusable in forks
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), before]))
    try:
        multiprocessing.set_forkserver_preload(sorted(modules))
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _process(name: str, prepare: Prepare) -> Iterator[Connection]:
    """Start a case's process; it ends with the `with` block."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, prepare), name=name)
    process.start()
    there.close()
    try:
        with here:
            yield here
    finally:
        process.join(STOPPING)
        process.kill()


def _serve(pipe: Connection, prepare: Prepare) -> None:
    """Prepare, then run whenever the pipe says so, until it closes."""
    multiprocessing.set_start_method(None, force=True)  # processes that a case starts itself use Python's default
    try:
        run = prepare()
        pipe.send((None, None))
        while pipe.recv():
            returned = run()
            pipe.send((returned, _peak_mb()))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(ChildProcessError(f"{type(error).__name__}: {error}"))


def _receive(name: str, pipe: Connection) -> tuple[Any, float | None]:
    try:
        received = pipe.recv()
    except EOFError:
        received = ChildProcessError("its process died, perhaps for want of memory")
    if isinstance(received, ChildProcessError):
        raise ChildProcessError(f"case '{name}' failed: {received}")
    returned, peak_mb = received
    return returned, peak_mb


def _peak_mb() -> float | None:
    """Return this process's peak memory in MB; only Linux reports it without the memory from before an exec."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def report(timings: Mapping[str, Timing], baseline: str, *, images: int | None = None) -> list[Row]:
    """Return a row per case: its seconds, their ratio to those of `baseline` in the same round, and peak memory.

    Seconds and ratios are given as median, least and greatest over the rounds.
    """
    rows = []
    for name, timing in timings.items():
        ratios, seconds = timing.ratios(timings[baseline]), timing.seconds
        row = {"case": name, "seconds": timing.median, "min": min(seconds), "max": max(seconds), "baseline": baseline}
        row |= {"ratio": timing.ratio(timings[baseline]), "ratio_min": ratios[0], "ratio_max": ratios[-1]}
        row |= {"peak_mb": timing.peak_mb, "rounds": seconds}
        rows.append(row | ({"images_per_second": images / timing.median} if images else {}))
    return rows


def synchronize(tensor: Any) -> None:
    """Wait for an accelerator that is computing `tensor`."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()


def check(what: str, error: float, tolerance: float) -> bool:
    """Print and return whether the error of a measured result is within the tolerance."""
    right = error <= tolerance
    print(f"{what}: {error:.2g}, expected at most {tolerance:.2g}{'' if right else ': WRONG'}")
    return right
