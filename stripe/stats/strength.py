"""How constant a gate is: the analysis of variance over samples and channels, and what is read off it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stripe.stats.arithmetic import Array, deviation_blocks, matrix, ratio
from stripe.stats.groups import Groups
from stripe.stats.moments import Moments, moments_of


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
        within = ratio(scatter, (counts - 1) * channels)
        row = ratio(rows, counts - 1)
        centred = means - means[:, :1]  # exactly 0 where all are equal
        spread = np.var(centred, axis=1, ddof=1) if channels > 1 else np.full(len(means), np.nan)
        rest = np.maximum(within - row, 0.0) * channels / (channels - 1) if channels > 1 else np.full_like(row, np.nan)
        energy = np.einsum("kc,kc->k", means, means) / max(channels, 1)
        return cls(counts, channels, spread, within, row, rest, energy)

    @property
    def between(self) -> Any:
        """Component of variance between channels, B = V - R / N, not under 0.

        R / N is how much the samples left in the channels' means; what shifts a row as a whole shifts all of them.
        """
        return np.maximum(self.spread - self.rest / self.samples, 0.0)

    @property
    def strength(self) -> Any:
        """B / (B + W), NaN where nothing varies."""
        return ratio(self.between, self.between + self.within)

    @property
    def cv(self) -> Any:
        """Square root of W over the mean square of the channels' means."""
        return np.sqrt(ratio(self.within, self.energy))


def variance_of(attention: Array | Moments) -> Variance:
    """Split the variance of all samples; the fields are scalars, NaN where no sample is left."""
    moments = moments_of(attention)
    if not moments.count:
        return Variance(0, moments.mean.size, *[np.float64(np.nan)] * 5)
    one = Variance.of(moments.blocks.pooled)
    fields = (one.spread, one.within, one.rows, one.rest, one.energy)
    return Variance(moments.count, one.channels, *(np.float64(each[0]) for each in fields))


@dataclass(frozen=True)
class Strength:
    """Stripe strength B / (B + W) with its between-channel part B and its within-channel part W."""

    strength: float
    between: float
    within: float


def stripe_strength(attention: Array | Moments) -> Strength:
    """Share of variance that the channel alone explains: 1 is perfect stripes, NaN where nothing varies.

    W is the mean variance across samples. B is the variance of the channels' means less R / samples, floored at 0,
    where R is the residual mean square of the two-way layout. The ratio is the intraclass correlation ICC(2,1) of
    samples as raters of channels (Shrout and Fleiss 1979); see `intraclass_correlations` for its relatives. It says
    how much channels differ for what samples differ, contrast: see `coefficient_of_variation` for constancy.

    Args:
        attention: (samples, channels), or their moments.

    Example:
        >>> stripe_strength(run.attention("layer1.0.se", epoch=10)).strength
    """
    variance = variance_of(attention)
    return Strength(float(variance.strength), float(variance.between), float(variance.within))


def coefficient_of_variation(attention: Array | Moments) -> float:
    """CV = sqrt(W / mean of squared channel means): how far a gate is from constant, whatever its channels are.

    ``attention`` is (samples, channels), or their moments. 0: every sample gets the same vector. NaN when the mean
    vector is 0, or there are fewer than two samples.
    """
    return float(variance_of(attention).cv)


@dataclass(frozen=True)
class IntraclassCorrelations:
    """Correlations of two samples as raters of channels, for one sample each (Shrout and Fleiss 1979)."""

    icc_1_1: float  # one-way: (BMS - WMS) / (BMS + (N - 1) WMS)
    icc_2_1: float  # two-way random effects, absolute agreement: the stripe strength
    icc_3_1: float  # two-way mixed effects, consistency: (BMS - EMS) / (BMS + (N - 1) EMS), rows' shifts left aside


def intraclass_correlations(attention: Array | Moments) -> IntraclassCorrelations:
    """Name the stripe strength and its relatives; floored at 0, NaN where nothing varies.

    With V the variance of the channels' means, W the mean variance across samples and R the residual mean square,
    ICC(1,1) takes V - W / N for the channels' component over all, ICC(2,1) V - R / N over all, and ICC(3,1)
    V - R / N over itself and R. ``attention`` is (samples, channels), or their moments.
    """
    v = variance_of(attention)
    plain = np.maximum(v.spread - v.within / max(v.samples, 1), 0.0)
    return IntraclassCorrelations(
        float(ratio(plain, plain + v.within)), float(v.strength), float(ratio(v.between, v.between + v.rest))
    )


@dataclass(frozen=True)
class Shares:
    """Shares of variance explained by channel, by sample and by neither; they sum to 1."""

    channel: float
    sample: float
    rest: float


def two_way_shares(attention: Array | Moments) -> Shares:
    """Split the variance of (samples, channels), or of their moments, by a two-way layout without replication.

    The channel's share is the stripe strength. The sample's component is the variance of the row means less
    R / channels, floored at 0, and the rest's is R: together they are the within part W.
    """
    v = variance_of(attention)
    sample = np.clip(v.rows - v.rest / v.channels, 0.0, v.within)
    shares = ratio(np.array([sample, v.within - sample]), v.between + v.within)
    return Shares(float(v.strength), float(shares[0]), float(shares[1]))


def effective_rank(values: Array) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of (samples, channels).

    Both sums are a trace, tr G and tr G^2, of whichever Gram matrix is smaller. NaN when no channel varies.
    """
    values = matrix(values)
    count, channels = values.shape
    mean = values.mean(axis=0, dtype=np.float64)
    if count < channels:
        wide = values - mean
        gram = wide @ wide.T
    else:
        gram = np.zeros((channels, channels))
        for _, deviations in deviation_blocks(values, mean):
            gram += deviations.T @ deviations
    return float(ratio(np.trace(gram) ** 2, np.vdot(gram, gram)))
