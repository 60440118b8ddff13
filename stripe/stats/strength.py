"""How constant a gate is: stripe strength and its interval, shares of variance, effective rank, the class's share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stripe.stats.arithmetic import SEED, Array, Labels, deviation_blocks, matrix, mean_of, portions, ratio, read_ahead
from stripe.stats.moments import Moments

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Strength:
    """Stripe strength B / (B + W) with its between-channel part B and its within-channel part W."""

    strength: float
    between: float
    within: float


def stripe_strength(moments: Moments) -> Strength:
    """Share of variance that the channel alone explains: 1 is perfect stripes, NaN where nothing varies.

    W is the mean variance across samples; B the variance of the channel means less W / samples, floored at 0.
    """
    within = mean_of(moments.variance[moments.finite])
    between = _between(moments.mean[moments.finite], within, moments.count)
    return Strength(float(ratio(between, between + within)), float(between), within)


@dataclass(frozen=True)
class Shares:
    """Shares of variance explained by channel, by sample and by neither; they sum to 1."""

    channel: float
    sample: float
    rest: float


def two_way_shares(values: Array) -> Shares:
    """Split the variance of ``values`` (samples, channels) by a two-way layout without replication.

    The channel's share is the stripe strength. The sample's component is the variance of the row means less
    MS_rest / channels, floored at 0, and the rest's is MS_rest: together they are the within part W.
    """
    return shares_of(values, stripe_strength(Moments.of(values)))


def shares_of(values: Array, strength: Strength) -> Shares:
    """Split as `two_way_shares` does, where the stripe strength of ``values`` is known."""
    channels = values.shape[1]
    rows = float(_variance(values.mean(axis=1, dtype=np.float64)))
    rest = (strength.within - rows) * channels / (channels - 1) if channels > 1 else math.nan
    sample = float(np.clip(rows - rest / channels, 0.0, strength.within))
    total = strength.between + strength.within
    shares = ratio(np.array([sample, strength.within - sample]), total)
    return Shares(strength.strength, float(shares[0]), float(shares[1]))


@dataclass(frozen=True)
class Interval:
    """Two ends of a confidence interval."""

    low: float
    high: float


def bootstrap_strength(
    values: Array, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = SEED
) -> Interval:
    """Percentile bootstrap interval of the stripe strength of ``values`` (samples, channels) over samples.

    A resample is a row of how often each sample was drawn, so sums over all resamples are matrix products.
    Raises ValueError unless resamples >= 1 and 0 < confidence < 1.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples={resamples}, confidence={confidence}: expected resamples >= 1 and 0 < confidence < 1"
        )
    values = matrix(values)
    mean = Moments.of(values).mean
    drawn = read_ahead(_resampling_counts(resamples, len(values), seed))
    strengths = np.concatenate([_resampled_strengths(values, mean, counts) for counts in drawn])
    tail = (1 - confidence) / 2
    low, high = np.quantile(strengths, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampling_counts(resamples: int, count: int, seed: int) -> Iterator[Array]:
    """Yield rows of how often each of ``count`` samples was drawn, (n, count), of ``resamples`` in all."""
    rng = np.random.default_rng(seed)
    for rows in portions(resamples, count):
        counts = np.empty((rows, count))
        for drawn in counts:
            drawn[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        yield counts


def _resampled_strengths(values: Array, mean: Array, counts: Array) -> Array:
    count, channels = values.shape
    sums, squares = np.zeros((len(counts), channels)), np.zeros(len(counts))
    for rows, deviations in deviation_blocks(values, mean):
        sums += counts[:, rows] @ deviations
        squares += counts[:, rows] @ np.einsum("nc,nc->n", deviations, deviations)
    scatter = np.maximum(squares - np.einsum("rc,rc->r", sums, sums) / count, 0.0)
    within = ratio(scatter, np.float64((count - 1) * channels))
    between = _between(mean + sums / count, within, count)
    strengths: Array = ratio(between, between + within)
    return strengths


def effective_rank(values: Array) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of (samples, channels).

    Both sums are a trace, tr G and tr G^2, of whichever Gram matrix is smaller. NaN when no channel varies.
    """
    values = matrix(values)
    count, channels = values.shape
    mean = Moments.of(values).mean
    if count < channels:
        wide = values - mean
        gram = wide @ wide.T
    else:
        gram = np.zeros((channels, channels))
        for _, deviations in deviation_blocks(values, mean):
            gram += deviations.T @ deviations
    return float(ratio(np.trace(gram) ** 2, np.vdot(gram, gram)))


@dataclass(frozen=True)
class LabelShare:
    """Share of the variance across samples that the class explains, plain and bias-corrected."""

    eta_squared: float
    omega_squared: float


def label_share(values: Array, labels: Labels) -> LabelShare:
    """Explain the variance of ``values`` (samples, channels) by class: one-way ANOVA pooled over channels.

    omega^2 = (SSB - (k - 1) MSW) / (SST + MSW) (Hays 1963) can fall below 0 by chance. Samples with a label
    under 0 are left out; NaN with fewer than two classes. Raises ValueError unless every sample has a label.
    """
    values, labels = matrix(values), np.asarray(labels)
    if labels.shape != (len(values),):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(values)},), one for each sample")
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    if not len(order):
        return LabelShare(math.nan, math.nan)
    _, firsts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    values = values[order]
    sums = np.add.reduceat(values, firsts, axis=0, dtype=np.float64)
    return label_share_of_means(Moments.of(values), sums / counts[:, None], counts)


def label_share_of_means(whole: Moments, means: Array, counts: Labels) -> LabelShare:
    """Explain variance by class as `label_share` does, from what is left where samples are not kept.

    ``whole`` are the moments of all samples, each in one class; ``means`` (classes, channels) and ``counts``
    (classes,) are those of the classes.
    """
    if len(counts) < 2:
        return LabelShare(math.nan, math.nan)
    keep = whole.finite
    between = counts @ np.square(means[:, keep] - whole.mean[keep]).sum(axis=1)
    total, extra = whole.m2[keep].sum(), len(counts) - 1
    within = np.clip(total - between, 0.0, total)
    between, error = total - within, ratio(within, whole.count - len(counts))
    return LabelShare(float(ratio(between, total)), float(ratio(between - extra * error, total + error)))


def _between(means: Array, within: Any, count: int) -> Any:
    return np.maximum(_variance(means) - within / count, 0.0)


@np.errstate(invalid="ignore")
def _variance(values: Array) -> Any:
    """Variance (ddof=1) over the last axis, exactly 0 where all are equal, NaN where fewer than two."""
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.var(values - values[..., :1], axis=-1, ddof=1)
