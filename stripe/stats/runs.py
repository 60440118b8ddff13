"""What a statistic needs to know of a run, so that nothing here knows a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from stripe.stats.arithmetic import Array, Labels

if TYPE_CHECKING:
    from stripe.stats.moments import Moments


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
        """Whether there are vectors and labels; else there are moments alone."""
        ...

    def attention(self, gate: str, epoch: int) -> Array:
        """Attention vectors, (samples, channels)."""
        ...

    def labels(self, epoch: int) -> Labels:
        """Class of every sample, (samples,); -1 where unknown."""
        ...

    def moments(self, epochs: Sequence[int], gates: Sequence[str]) -> Mapping[tuple[int, str], Moments]:
        """Moments by epoch and gate."""
        ...
