"""Compare how long things take: paired, interleaved runs, so that a machine's moods meet all cases alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

PAUSE = 0.1  # seconds before every run: until then the threads of the run before may still spin


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every case once a round, in turn and in reverse every other round; the first round only warms up.

    Returns the seconds of each case, one a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name in list(cases) if turn % 2 else reversed(list(cases)):
            time.sleep(PAUSE)
            start = time.perf_counter()
            cases[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds
