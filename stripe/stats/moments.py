"""Moments per channel, which merge: of values, of a run as it is read, and what they say is wrong with a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stripe.stats.arithmetic import Array, Counts, deviation_blocks, matrix, read_ahead
from stripe.stats.runs import RecordedRun

NEAR_BOUND = 1e-3  # a value this close to 0 or 1 counts as saturated
SATURATED_SHARE = 0.99  # more than this share of saturated values flags the gate
DEAD_RANGE = 1e-6  # a gate whose values span no more than this is dead


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean, sum of squared deviations and range per channel; the arrays are (channels,) float64."""

    count: int
    mean: Array
    m2: Array
    low: Array
    high: Array
    near_bounds: int
    nonfinite: int

    @classmethod
    def of(cls, values: Array) -> Moments:
        """Measure ``values`` (samples, channels) in float64, in one pass; ValueError when a dimension is empty."""
        found, near_bounds, nonfinite = _measure_channels(matrix(values))
        return replace(found, near_bounds=int(near_bounds.sum()), nonfinite=int(nonfinite.sum()))

    def merge(self, other: Moments) -> Moments:
        """Combine with the moments of other samples of the same channels (Chan, Golub, LeVeque 1983).

        Exact but for the rounding of the means: m2 is within about 1e-16 mean / std of one pass over all samples.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {self.mean.size} and of {other.mean.size} channels cannot merge: merge per gate"
            )
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * (other.count / count)),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.near_bounds + other.near_bounds,
            self.nonfinite + other.nonfinite,
        )

    @property
    def variance(self) -> Array:
        """Variance across samples per channel (ddof=1); NaN for a single sample."""
        return self.m2 / (self.count - 1) if self.count > 1 else np.full_like(self.m2, np.nan)

    @property
    def std(self) -> Array:
        """Standard deviation across samples per channel (ddof=1)."""
        return np.sqrt(self.variance)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Mark the channels that hold finite values only, (channels,)."""
        return np.isfinite(self.mean)


def moments(
    run: RecordedRun, epochs: Sequence[int] | None = None, gates: Sequence[str] | None = None
) -> dict[tuple[int, str], Moments]:
    """Stream a run into the moments of every (epoch, gate name); a batch is measured while the next one is read.

    All gates of a batch are measured as one matrix: they are many and narrow, so a pass over each would cost more in
    calls than in arithmetic.
    """
    found: dict[tuple[int, str], Moments] = {}
    for epoch in run.epochs if epochs is None else epochs:
        whole: Moments | None = None
        memory: Array = np.empty((0, 0))
        for batch in read_ahead(run.batches(epoch, gates)):
            matrices = list(batch.values())
            rows, ends = len(matrices[0]), np.cumsum([matrix.shape[1] for matrix in matrices])
            if rows > len(memory):
                memory = np.empty((rows, ends[-1]), matrices[0].dtype)
            part, near_part, nonfinite_part = _measure_channels(np.concatenate(matrices, axis=1, out=memory[:rows]))
            if whole is None:
                whole, near_bounds, nonfinite = part, near_part, nonfinite_part
                columns = {gate: slice(end - batch[gate].shape[1], end) for gate, end in zip(batch, ends, strict=True)}
            else:
                whole = whole.merge(part)
                near_bounds += near_part
                nonfinite += nonfinite_part
        if whole is not None:
            for gate, its in columns.items():
                arrays = (getattr(whole, name)[its] for name in ("mean", "m2", "low", "high"))
                counts = (int(each[its].sum()) for each in (near_bounds, nonfinite))
                found[epoch, gate] = Moments(whole.count, *arrays, *counts)
    return found


@np.errstate(invalid="ignore", over="ignore")
def _measure_channels(values: Array) -> tuple[Moments, Counts, Counts]:
    """Return the moments of (samples, channels), and how many values of each channel are near a bound, not finite.

    Shifting by the mean of the first rows keeps the sum of squares from cancelling (Chan, Golub, LeVeque 1983); a
    constant channel gets its exact value and zero.
    """
    count, channels = values.shape
    shift = values[:16].mean(axis=0, dtype=np.float64)
    low, high = np.full_like(shift, np.inf), np.full_like(shift, -np.inf)
    total, squares = np.zeros_like(shift), np.zeros_like(shift)
    near_bounds, nonfinite = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for rows, deviations in deviation_blocks(values, shift):
        block = values[rows]
        lowest, highest = block.min(axis=0), block.max(axis=0)
        np.minimum(low, lowest, out=low)
        np.maximum(high, highest, out=high)
        if (near := (lowest <= NEAR_BOUND) | (highest >= 1 - NEAR_BOUND)).any():
            near_bounds[near] += _count_near_bounds(block[:, near])
        total += deviations.sum(axis=0)
        squares += np.einsum("nc,nc->c", deviations, deviations)
    mean = shift + total / count
    m2 = np.maximum(squares - total**2 / count, 0.0)
    if not (finite := np.isfinite(low) & np.isfinite(high)).all():
        mean[~finite] = m2[~finite] = np.nan
        nonfinite[~finite] = np.count_nonzero(~np.isfinite(values[:, ~finite]), axis=0)
    return Moments(count, mean, m2, low, high, 0, 0), near_bounds, nonfinite


def _count_near_bounds(values: Array) -> Counts:
    distance = values - 0.5  # then in place: | |x - 1/2| - 1/2 | is the distance to the nearer of 0 and 1
    np.abs(distance, out=distance)
    distance -= 0.5
    np.abs(distance, out=distance)
    counts: Counts = np.count_nonzero(distance <= NEAR_BOUND, axis=0)
    return counts


def flags(moments: Moments) -> tuple[str, ...]:
    """Name what is wrong with a gate, of "dead", "saturated" and "nonfinite"; a stripe is none of them."""
    low, high = moments.low[moments.finite], moments.high[moments.finite]
    found = {
        "dead": low.size > 0 and high.max() - low.min() <= DEAD_RANGE,
        "saturated": moments.near_bounds > SATURATED_SHARE * moments.count * moments.mean.size,
        "nonfinite": moments.nonfinite > 0,
    }
    return tuple(name for name, raised in found.items() if raised)
