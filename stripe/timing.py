"""Compare how long things take, in paired, interleaved runs: changes in machine speed affect every case equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

PAUSE = 0.1  # seconds before every run: until then the threads of the run before may still spin


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every case once a round, in reverse order every other round; one more round, the first, only warms up.

    Returns:
        The seconds of each case, one value for each of the `rounds`. Compare two cases by the ratios of their rounds.

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
