"""What a statistic needs to know of a run, so that nothing here knows a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from stripe.stats.arithmetic import Array, Labels

if TYPE_CHECKING:
    from stripe.stats.moments import Moments

Batch = Mapping[str, Array]  # by gate, (samples, channels)


class NamedGate(Protocol):
    """What a statistic needs to know of a gate."""

    @property
    def name(self) -> str:
        """Module path of the gate."""
        ...


class ClassMeans(Protocol):
    """What a statistic needs to know of classes whose samples are gone."""

    @property
    def counts(self) -> Labels:
        """Number of samples, (classes,)."""
        ...

    @property
    def means(self) -> Array:
        """Mean attention vectors, (classes, channels)."""
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
        """Whether there are vectors, labels and batches; else there are moments and class means alone."""
        ...

    @property
    def has_label_means(self) -> bool:
        """Whether there are class means."""
        ...

    def attention(self, gate: str, epoch: int) -> Array:
        """Attention vectors, (samples, channels)."""
        ...

    def labels(self, epoch: int) -> Labels:
        """Class of every sample, (samples,); -1 where unknown."""
        ...

    def batches(self, epoch: int, gates: Sequence[str] | None = None) -> Iterator[Batch]:
        """Attention vectors of all the gates, a bounded number of samples at a time."""
        ...

    def moments(self, epochs: Sequence[int], gates: Sequence[str]) -> Mapping[tuple[int, str], Moments]:
        """Moments by epoch and gate."""
        ...

    def label_means(self, gate: str, epoch: int) -> ClassMeans:
        """Stripe of every class."""
        ...
