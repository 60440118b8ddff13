"""The spectrum of a gate's attention over samples: in how few directions it varies, and which they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stripe.stats.arithmetic import Array, Counts, Labels, matrix
from stripe.stats.groups import BLOCKS, block_keys, coarse
from stripe.stats.intervals import CONFIDENCE, check_confidence, jackknife
from stripe.stats.measuring import centre
from stripe.stats.moments import Mask
from stripe.stats.rank import effective_rank, participation_ratio

DIRECTIONS = 8  # directions that are found by default
SHOWN_SAMPLES = 1000  # the most samples in which figures and pages find the directions


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The K directions in which attention (samples, channels) varies most, the widest first.

    A direction's sign makes its largest entry positive, so that the directions of two runs can be compared.

    Attributes:
        shares: the part of the variance over samples that lies in the first k directions, for k = 1 to K, (K,).
        low: lower ends of the shares' intervals, (K,).
        high: upper ends, (K,).
        rank: the effective rank, as `effective_rank` gives it.
        rank_low: lower end of its interval.
        rank_high: upper end.
        mean: the observed stripe, (channels,).
        directions: orthogonal vectors of length 1, (K, channels).
    """

    shares: Array
    low: Array
    high: Array
    rank: float
    rank_low: float
    rank_high: float
    mean: Array
    directions: Array

    def scores(self, attention: Array) -> Array:
        """Return how far each sample lies from the mean along each direction, (samples, K)."""
        scores: Array = (attention - self.mean) @ self.directions.T
        return scores

    def project(self, attention: Array, directions: int) -> Array:
        """Return the attention (samples, channels) reduced to its mean and its part along the first ``directions``."""
        kept = self.directions[:directions]
        projected: Array = self.mean + (attention - self.mean) @ kept.T @ kept
        return projected


def spectrum(
    attention: Array, *, directions: int = DIRECTIONS, sample_ids: Labels | None = None, confidence: float = CONFIDENCE
) -> Spectrum:
    """Find the directions in which attention varies over samples, and the share of its variance that the first k hold.

    The directions are the principal components: the eigenvectors of the covariance of (samples, channels). The largest
    estimated eigenvalues lie above the true ones, so the shares are corrected by the jackknife over blocks of samples
    (Quenouille 1956), on their logits; their intervals are computed as in `strength_interval`. Simulated at 0.95 (500
    samples, 16 to 256 channels, 1, 3 or 10 directions and a tenth of noise; ``tests/test_spectrum.py``) the intervals
    cover the share of all true directions in 0.91 to 1.0 of cases, and the shares of fewer directions in 0.85 to 0.95
    if these are hardly wider than the next ones.

    Args:
        attention: (samples, channels); a sample with a value that is not finite is left out.
        directions: how many, K; fewer are found if there are not as many channels, or samples less one.
        sample_ids: (samples,), by which samples are dealt into blocks; their positions by default.
        confidence: how often an interval should cover the true share, between 0 and 1.

    Returns:
        The spectrum; its shares are NaN where no channel varies.

    Raises:
        ValueError: the attention is not (samples, channels), fewer than three samples are finite, or the confidence
            is not between 0 and 1.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> one = rng.standard_normal((500, 1)) * np.linspace(0.1, 0.2, 16)  # every image along one direction
        >>> attention = 0.5 + one + 0.02 * rng.standard_normal((500, 16))
        >>> found = spectrum(attention, directions=2)
        >>> found.shares.round(2)
        array([0.98, 0.99])
    """
    values = matrix(attention)
    check_confidence(confidence)
    ids = np.arange(len(values)) if sample_ids is None else np.asarray(sample_ids)
    finite = np.isfinite(values).all(axis=1)
    values, ids = (values, ids) if finite.all() else (values[finite], ids[finite])
    if len(values) < 3:
        raise ValueError(f"{len(values)} samples are finite; a spectrum needs at least three")
    mean = centre(values)
    off = values.astype(np.float64) - mean
    _, lengths, vectors = np.linalg.svd(off, full_matrices=False)
    kept = min(directions, off.shape[1], len(off) - 1)
    vectors = vectors[:kept]
    vectors *= np.sign(vectors[np.arange(kept), np.abs(vectors).argmax(axis=1)])[:, None]
    return Spectrum(*_figures(off, lengths[:kept] ** 2, ids, confidence), mean, vectors)


def rank_table(spectra: Mapping[str, Spectrum]) -> pd.DataFrame:
    """Tabulate how much of the variance the first directions of some gates hold, as `stripe.plots.rank_curve` draws it.

    Returns a row per gate and number of directions, from 1: gate, directions, share, share_low, share_high.

    Example:
        >>> import stripe
        >>> attention = stripe.load_example().attention("layer3.1", 20)
        >>> rank_table({"layer3.1": spectrum(attention, directions=2)}).round(2)
               gate  directions  share  share_low  share_high
        0  layer3.1           1   0.79       0.75        0.82
        1  layer3.1           2   0.97       0.97        0.97
    """
    columns = ["gate", "directions", "share", "share_low", "share_high"]
    rows = [
        (gate, k, *shares)
        for gate, found in spectra.items()
        for k, shares in enumerate(zip(found.shares, found.low, found.high, strict=True), 1)
    ]
    return pd.DataFrame(rows, columns=columns)


def _figures(
    off: Array, variances: Array, ids: Labels, confidence: float
) -> tuple[Array, Array, Array, float, float, float]:
    """Return the corrected shares of the first directions, (K,), the effective rank, and their intervals."""
    total = float(np.vdot(off, off))
    if not total > 0:
        missing = np.full(len(variances), np.nan)
        return missing, missing, missing, np.nan, np.nan, np.nan
    keys = np.arange(len(ids)) if len(ids) <= BLOCKS else coarse(block_keys(ids))
    blocks, counts = np.unique(keys, return_counts=True)
    every = _logits(variances, total)
    left = list(_leave_one_out(off, [keys == b for b in blocks], len(variances)))
    without = np.stack([_logits(its, whole) for its, whole, _ in left])
    found = np.array([_corrected(counts, *pair, confidence) for pair in zip(every, without.T, strict=True)])
    shares, low, high = (1 / (1 + np.exp(-found))).T
    shares = np.maximum.accumulate(shares)
    rank, ranks = effective_rank(off), np.log([rank for *_, rank in left])
    ends = jackknife(counts, float(np.log(rank)), ranks, confidence)
    rank_low, rank_high = np.exp(ends) if np.isfinite(ranks).all() else (np.nan, np.nan)
    low = np.maximum.accumulate(np.minimum(low, shares))  # more directions never hold less
    return shares, low, np.maximum(high, shares), rank, max(float(rank_low), 1.0), float(rank_high)


def _leave_one_out(off: Array, blocks: list[Mask], kept: int) -> Iterator[tuple[Array, float, float]]:
    """Yield, without each block, the `kept` largest sums of squares along directions, the total and the rank."""
    samples, channels = off.shape
    wide = samples < channels
    gram = off @ off.T if wide else off.T @ off
    for block in blocks:
        if wide:
            left = gram[np.ix_(~block, ~block)]
            middle = left.mean(axis=0)
            left = left - middle - middle[:, None] + middle.mean()
            lengths = left.diagonal()
        else:
            part = off[block]
            shift = part.sum(axis=0)
            left = gram - part.T @ part - np.outer(shift, shift) / (samples - len(part))
            rest = off[~block] + shift / (samples - len(part))
            lengths = np.einsum("nc,nc->n", rest, rest)
        rank = participation_ratio(samples - int(block.sum()), left, float(np.square(lengths).sum()))
        yield np.linalg.eigvalsh(left)[::-1][:kept], float(np.trace(left)), rank


def _logits(variances: Array, total: float) -> Array:
    """Return the logits of the shares of the first k directions; a share of 1 is kept just under 1."""
    shares = np.clip(np.cumsum(variances) / total, 1e-300, 1 - 1e-15)
    logits: Array = np.log(shares) - np.log1p(-shares)
    return logits


def _corrected(counts: Counts, every: float, without: Array, confidence: float) -> tuple[float, float, float]:
    """Return a figure less its bias, and the ends of its interval, shifted by the same amount."""
    if not np.isfinite(every) or np.ptp(without) == 0:
        return every, every, every
    sizes = counts.sum() / counts
    bias = every - float(np.sum((sizes * every - (sizes - 1) * without) / sizes))
    low, high = jackknife(counts, every, without, confidence)
    return every - bias, low - bias, high - bias


def canonical_correlations(scores: Array, others: Array) -> Array:
    """Return the canonical correlations of two gates' scores of the same samples, the largest first (Hotelling 1936).

    The largest is the highest correlation between any weighted sum of one gate's scores and any of the other's.

    Args:
        scores: (samples, k), such as `Spectrum.scores` gives.
        others: (samples, j), of the same samples in the same order.

    Returns:
        (min(k, j),), between 0 and 1.

    Raises:
        ValueError: the numbers of samples differ, or are not larger than k and j.

    Example:
        >>> import numpy as np
        >>> one, two = np.random.default_rng(0).standard_normal((2, 500, 1))
        >>> canonical_correlations(np.hstack([one, two]), one - two).round(2)
        array([1.])
    """
    scores, others = matrix(scores), matrix(others)
    if len(scores) != len(others) or len(scores) <= max(scores.shape[1], others.shape[1]):
        raise ValueError(
            f"scores have shapes {scores.shape} and {others.shape}; expected the same number of samples, and more of"
            " them than scores"
        )
    bases = [np.linalg.qr(each - each.mean(axis=0))[0] for each in (scores, others)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1)
