"""What a statistic needs to know of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, TypeVar

from stripe.gate import Gate, name_of
from stripe.messages import listing
from stripe.stats.arithmetic import Array, Labels

if TYPE_CHECKING:
    from stripe.stats.moments import Moments


Item = TypeVar("Item")


class NamedGate(Protocol):
    """What a table needs to know of a gate."""

    @property
    def name(self) -> str:
        """Module path of the gate."""
        ...

    @property
    def form(self) -> str:
        """What the gate does to the map: "multiplicative", "additive", "affine" or "radix"."""
        ...


class RecordedRun(Protocol):
    """What a statistic needs to know of a run; ``stripe.open_run`` gives one."""

    @property
    def epochs(self) -> Sequence[int]:
        """Recorded epochs, ascending."""
        ...

    @property
    def gates(self) -> Sequence[NamedGate]:
        """Recorded gates, in order of execution."""
        ...

    @property
    def has_samples(self) -> bool:
        """Whether the run holds vectors and labels; otherwise it holds moments alone."""
        ...

    @property
    def keeps_moments(self) -> bool:
        """Whether the moments of all samples are available without reading a row."""
        ...

    def attention(self, gate: str, epoch: int) -> Array:
        """Attention vectors, (samples, channels)."""
        ...

    def batches(self, epoch: int, gates: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        """Attention vectors of several gates by name, in batches of samples."""
        ...

    def labels(self, epoch: int) -> Labels:
        """Class of every sample, (samples,); -1 where unknown."""
        ...

    def moments(self, epochs: Sequence[int], gates: Sequence[str]) -> Mapping[tuple[int, str], Moments]:
        """Moments by epoch and gate."""
        ...


def opened(run: RecordedRun | str | os.PathLike[str]) -> RecordedRun:
    """Return a run, given as itself or as its path.

    A path is opened by the package's own `open_run`, looked up by name: the store builds on the statistics, so they
    cannot import it.
    """
    if not isinstance(run, str | os.PathLike):
        return run
    found: RecordedRun = import_module("stripe").open_run(run)
    return found


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items while a thread makes the next one."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]


def gates_of(run: RecordedRun, gates: Sequence[Gate | str] | None) -> list[NamedGate]:
    """Return the given gates of a run (gates or names, None: all); ValueError for a gate that it does not have."""
    known = {gate.name: gate for gate in run.gates}
    names = list(known) if gates is None else [name_of(gate) for gate in gates]
    for name in names:
        if name not in known:
            raise ValueError(f"the run has no gate '{name:.80}'; it has {listing(known)}")
    return [known[name] for name in names]
