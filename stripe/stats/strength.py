"""How constant a gate is: the figures that follow from the analysis of variance over samples and channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stripe.stats.arithmetic import Array, ratio
from stripe.stats.moments import Moments, moments_of


@dataclass(frozen=True)
class Strength:
    """Stripe strength B / (B + W) with its between-channel part B and its within-channel part W."""

    strength: float
    between: float
    within: float


def stripe_strength(attention: Array | Moments) -> Strength:
    """Share of variance that the channel alone explains: 1 is perfect stripes, NaN where nothing varies.

    W is the mean variance across samples. B is the variance of the channels' means less R / samples, floored at 0,
    where R is the residual mean square of the two-way layout. The ratio B / (B + W) is the intraclass correlation
    ICC(2,1) of samples as raters of channels (Shrout and Fleiss 1979); see `intraclass_correlations` for its relatives.
    It measures contrast: how much channels differ relative to how much samples differ. For constancy, see
    `coefficient_of_variation`.

    Args:
        attention: (samples, channels), or their moments.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> round(stripe_strength(attention).strength, 3)
        0.788
    """
    variance = moments_of(attention).split
    return Strength(float(variance.strength), float(variance.between), float(variance.within))


def coefficient_of_variation(attention: Array | Moments) -> float:
    """CV = sqrt(W / mean of squared channel means): how far a gate is from constant, whether or not channels differ.

    ``attention`` is (samples, channels), or their moments. 0: every sample gets the same vector. NaN when the mean
    vector is 0, or there are fewer than two samples.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> round(coefficient_of_variation(attention), 3)
        0.188
    """
    return float(moments_of(attention).split.cv)


@dataclass(frozen=True)
class IntraclassCorrelations:
    """Intraclass correlations of samples as raters of channels, for a single rater (Shrout and Fleiss 1979)."""

    icc_1_1: float  # one-way: (BMS - WMS) / (BMS + (N - 1) WMS)
    icc_2_1: float  # two-way random effects, absolute agreement: the stripe strength
    icc_3_1: float  # two-way mixed effects, consistency: (BMS - EMS) / (BMS + (N - 1) EMS), ignoring shifts of rows


def intraclass_correlations(attention: Array | Moments) -> IntraclassCorrelations:
    """Return the stripe strength and its relatives, floored at 0; NaN where nothing varies.

    With V the variance of the channels' means, W the mean variance across samples and R the residual mean square,
    ICC(1,1) is B / (B + W) with B = V - W / N, ICC(2,1) is B / (B + W) with B = V - R / N, and ICC(3,1) is B / (B + R)
    with the same B. ``attention`` is (samples, channels), or their moments.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> round(intraclass_correlations(attention).icc_2_1, 3)  # the strength
        0.788
    """
    v = moments_of(attention).split
    plain = np.maximum(v.spread - v.within / v.samples, 0.0)
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

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> shares = two_way_shares(attention)
        >>> [round(share, 3) for share in (shares.channel, shares.sample, shares.rest)]
        [0.788, 0.001, 0.211]
    """
    v = moments_of(attention).split
    sample = np.clip(v.rows - v.rest / v.channels, 0.0, v.within)
    shares = ratio(np.array([sample, v.within - sample]), v.between + v.within)
    return Shares(float(v.strength), float(shares[0]), float(shares[1]))
