"""Compare how long things take, in paired, interleaved runs: changes in machine speed affect every case equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

PAUSE = 0.1  # seconds before every run, since the previous run's threads may still spin for a while


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every case once per round, in reverse order every other round, after one extra round to warm up.

    Returns:
        The seconds of each case, one value per round. Compare two cases by their ratio in each round.

    Example:
        >>> seconds = interleave({"add": lambda: 1 + 1, "join": lambda: "".join("ab")}, rounds=3)
        >>> [len(each) for each in seconds.values()]
        [3, 3]
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
