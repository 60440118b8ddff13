"""The analysis of variance of attention over samples and channels, for all samples or without each of many groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from stripe.stats.arithmetic import ratio
from stripe.stats.groups import Groups


@dataclass(frozen=True, eq=False)
class Variance:
    """The variance of (samples, channels), split by a two-way layout without replication, of one or of many sets.

    Attributes:
        samples: N.
        channels: C.
        spread: variance of the channels' means (ddof=1), V.
        within: mean variance across samples (ddof=1), W.
        rows: variance of the samples' means over channels (ddof=1).
        rest: residual mean square R, of what neither channel nor sample explains.
        energy: mean square of the channels' means.
    """

    samples: Any
    channels: int
    spread: Any
    within: Any
    rows: Any
    rest: Any
    energy: Any

    @classmethod
    def of_all(cls, groups: Groups, channels: int) -> Variance:
        """Split the variance of all samples together; the fields are floats, NaN where there is no sample."""
        if not len(groups.keys):
            return cls(math.nan, channels, *[math.nan] * 5)
        whole, (middle, off) = groups.pooled, groups.deviations.centred
        return cls.of_sums(
            int(whole.counts[0]),
            off.size,
            scatter=float(whole.scatter[0]),
            rows=float(whole.rows[0]),
            middle=middle,
            squares=float(off @ off),
        )

    @classmethod
    def without_each(cls, groups: Groups) -> Variance:
        """Split the variance of all samples but those of one group, for each group; the fields are (groups,)."""
        whole, about, counts = groups.pooled, groups.deviations, groups.counts
        middle, mean = about.centred
        left = whole.counts[0] - counts
        weight = counts / left  # how far the mean moves away from a group left out, as a share of their distance
        lost = weight * whole.counts[0]  # the factor of the squared distance between the group and the whole
        squares, own = mean @ mean, about.squares - mean.size * np.square(about.rows)  # of deviations from the middles
        moved = squares - 2 * weight * (about.off @ mean) + np.square(weight) * own
        moved[moved < 1e-13 * (squares + np.square(weight) * own)] = 0.0  # what rounding leaves of equal means
        return cls.of_sums(
            left,
            mean.size,
            scatter=np.maximum(whole.scatter[0] - groups.scatter - lost * about.squares, 0.0),
            rows=np.maximum(whole.rows[0] - groups.rows - lost * np.square(about.rows), 0.0),
            middle=middle - weight * about.rows,
            squares=moved,
        )

    @classmethod
    def of_sums(cls, samples: Any, channels: int, *, scatter: Any, rows: Any, middle: Any, squares: Any) -> Variance:
        """Split the variance, from sums as in `Groups` and the squares of the channels' means about their middle."""
        others = channels - 1 if channels > 1 else math.nan
        within, row = ratio(scatter, (samples - 1.0) * channels), ratio(rows, samples - 1.0)
        rest = np.maximum(within - row, 0.0) * (channels / others)
        return cls(samples, channels, squares / others, within, row, rest, squares / channels + middle * middle)

    @property
    def between(self) -> Any:
        """Component of variance between channels, B = V - R / N, not under 0.

        R / N is what the samples add to the variance of the channels' means; a shift of a whole row adds nothing to it,
        since it moves all of these means alike.
        """
        plain = self.spread - self.rest / self.samples
        return max(plain, 0.0) if isinstance(plain, float) else np.maximum(plain, 0.0)

    @property
    def strength(self) -> Any:
        """B / (B + W), NaN where nothing varies."""
        between = self.between
        return ratio(between, between + self.within)

    @property
    def cv(self) -> Any:
        """Square root of W over the mean square of the channels' means."""
        return ratio(self.within, self.energy) ** 0.5
