"""A learned vector against an observed stripe: how well it fits, and how likely that is by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from stripe.stats.arithmetic import SEED, Array, matrix, mean_of, portions, ratio
from stripe.stats.moments import Moments

PERMUTATIONS = 10_000
OBSERVED_RANGE = (0.05, 0.95)  # quantiles between which a learned value counts as inside the stripe


@dataclass(frozen=True)
class Match:
    """How well a learned vector fits an observed stripe, over the samples whose values are all finite."""

    r: float  # Pearson correlation with the stripe
    r2: float  # 1 - SS(stripe - learned) / SS(stripe): no slope or offset is fitted, so it can be negative
    rmse: float
    mean_abs_z: float  # mean |learned - stripe| / std, over the channels whose std is above 0
    inside: float  # share of channels inside the observed 5-95 % range
    p: float  # permutation_test of r


def match(learned: Array, observed: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> Match:
    """Compare a learned vector (channels,) with the observed attention vectors (samples, channels).

    Raises ValueError when their channels differ in number.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> found = match(np.linspace(0.2, 0.8, 16), attention)
        >>> round(found.r, 3), round(found.rmse, 4)
        (1.0, 0.0052)
    """
    observed = matrix(observed)
    learned = np.asarray(learned, dtype=np.float64)
    if learned.shape != observed.shape[1:]:
        raise ValueError(
            f"learned vector has shape {learned.shape}; expected {observed.shape[1:]}, one value a channel"
        )
    stripe = Moments.of(observed)
    keep = stripe.finite
    learned, mean, std = learned[keep], stripe.mean[keep], stripe.std[keep]
    seen = observed[:, keep]
    if stripe.nonfinite:
        seen = seen[np.isfinite(seen).all(axis=1)]
    low, high = np.quantile(seen, OBSERVED_RANGE, axis=0)
    misfit = np.square(learned - mean)
    return Match(
        r=pearson(learned, mean),
        r2=float(1 - ratio(misfit.sum(), np.square(_centred(mean)).sum())),
        rmse=math.sqrt(mean_of(misfit)),
        mean_abs_z=mean_of(np.abs(learned - mean)[std > 0] / std[std > 0]),
        inside=mean_of((low <= learned) & (learned <= high)),
        p=permutation_test(learned, mean, permutations=permutations, seed=seed),
    )


def pearson(a: Array, b: Array) -> float:
    """Correlate two vectors (channels,); NaN when one of them is constant or not finite."""
    a, b = _centred(a), _centred(b)
    return float(np.clip(ratio(a @ b, np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def permutation_test(learned: Array, stripe: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> float:
    """One-sided p-value of the correlation of two vectors (channels,) when the channels of one are shuffled.

    (count + 1) / (permutations + 1), where count shuffles correlate at least as well (Phipson, Smyth 2010);
    NaN when the correlation is.
    """
    a, b = _centred(learned), _centred(stripe)
    reach = np.linalg.norm(a) * np.linalg.norm(b)
    if not reach > 0:
        return math.nan
    rng = np.random.default_rng(seed)
    needed = a @ b - 1e-12 * reach  # rounding must not tell equal shuffles apart
    count = sum(
        np.count_nonzero(rng.permuted(np.broadcast_to(a, (portion, a.size)), axis=1) @ b >= needed)
        for portion in portions(permutations, a.size)
    )
    return float((count + 1) / (permutations + 1))


def wasserstein(a: Array, b: Array) -> float:
    """Return the distance of two vectors (channels,) as sets of values: mean absolute difference, both sorted."""
    return float(_sorted_difference(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)))


def swap_test(a: Array, b: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> float:
    """One-sided p-value of the Wasserstein distance when the pooled values of both vectors (channels,) are shuffled.

    Small if the two are not from one distribution; NaN when the distance is.
    """
    pooled, distance = np.concatenate([a, b]).astype(np.float64), wasserstein(a, b)
    if math.isnan(distance):
        return math.nan
    rng = np.random.default_rng(seed)
    needed = distance - 1e-12 * np.abs(pooled).max()  # rounding must not tell equal shuffles apart
    count = 0
    for portion in portions(permutations, pooled.size):
        dealt = rng.permuted(np.broadcast_to(pooled, (portion, pooled.size)), axis=1)
        count += int(np.count_nonzero(_sorted_difference(*np.split(dealt, 2, axis=1)) >= needed))
    return float((count + 1) / (permutations + 1))


def benjamini_hochberg(p: Array) -> Array:
    """Adjust p-values (tests,) for the false discovery rate (Benjamini, Hochberg 1995); NaN is not counted."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    scaled = p[order] * order.size / np.arange(1, order.size + 1)
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return adjusted


def _sorted_difference(a: Array, b: Array) -> Any:
    return np.abs(np.sort(a, axis=-1) - np.sort(b, axis=-1)).mean(axis=-1)


def _centred(vector: Array) -> Array:
    vector = np.asarray(vector, dtype=np.float64)
    vector = vector - vector[:1]  # equal values become exactly 0
    centred: Array = vector - mean_of(vector)
    return centred
