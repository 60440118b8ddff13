"""The analysis of variance of attention over samples and channels, for all samples or for each of many groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from stripe.stats.arithmetic import Array, ratio
from stripe.stats.groups import Groups


@dataclass(frozen=True, eq=False)
class Variance:
    """The variance of (samples, channels), split by a two-way layout without replication; fields are alike in shape.

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
    def of(cls, groups: Groups) -> Variance:
        """Split each group's variance; the fields are (groups,)."""
        keep = ~np.isnan(groups.means).any(axis=0)
        means = groups.means if keep.all() else groups.means[:, keep]
        return cls.of_sums(groups.counts, means, groups.scatter, groups.rows)

    @classmethod
    def of_sums(cls, counts: Any, means: Array, scatter: Array, rows: Array) -> Variance:
        """Split what has these counts (k,), channel means (k, channels) and sums of squares as in `Groups`, (k,)."""
        channels = means.shape[1]
        freedom = np.where(counts > 1, counts - 1, np.nan)
        others = channels - 1 if channels > 1 else math.nan
        within, row = scatter / (freedom * channels), rows / freedom
        off = means - means[:, :1]  # exactly 0 where all are equal
        off -= off.mean(axis=1, keepdims=True)
        spread = np.einsum("kc,kc->k", off, off) / others
        rest = np.maximum(within - row, 0.0) * (channels / others)
        energy = np.einsum("kc,kc->k", means, means) / channels
        return cls(counts, channels, spread, within, row, rest, energy)

    @classmethod
    def of_all(cls, groups: Groups, channels: int) -> Variance:
        """Split the variance of all samples together; the fields are floats, NaN where there is no sample."""
        if not len(groups.keys):
            return cls(math.nan, channels, *[math.nan] * 5)
        one = cls.of(groups.pooled)
        fields = (one.spread, one.within, one.rows, one.rest, one.energy)
        return cls(int(one.samples[0]), one.channels, *(float(each[0]) for each in fields))

    @property
    def between(self) -> Any:
        """Component of variance between channels, B = V - R / N, not under 0.

        R / N is how much the samples left in the channels' means; what shifts a row as a whole shifts all of them.
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
