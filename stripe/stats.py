"""Statistics over samples: arrays of shape (samples, channels) in, frozen dataclasses or one DataFrame out.

Law: NumPy and pandas alone; nothing here knows a path or a network; moments of parts merge into those of the
whole. Non-finite values are never repaired: they are counted, make the moments of their own channel NaN and raise
the "nonfinite" flag, and the statistics of the gate are then those of its other channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
Batch = Mapping[str, Array]  # by gate, (samples, channels)

RESAMPLES = 1000
CONFIDENCE = 0.95
PERMUTATIONS = 10_000
SEED = 0

NEAR_BOUND = 1e-3  # a value this close to 0 or 1 counts as saturated
SATURATED_SHARE = 0.99  # more than this share of saturated values flags the gate
DEAD_RANGE = 1e-6  # a gate whose values span no more than this is dead
OBSERVED_RANGE = (0.05, 0.95)  # quantiles between which a learned value counts as inside the stripe
BLOCK_VALUES = 2**18  # float64 values worked on at once: fits a core's cache
SUMMARY = (
    "epoch gate channels samples strength strength_low strength_high std between within sample_share rest_share drift"
    " label_share label_omega rank flags"
).split()
"""Columns of `summarize`."""
COUNT_VALUES = 2**22  # resampling counts or permuted values held at once: 32 MB


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


# ---- moments: what merges --------------------------------------------------------------------------------


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
        found, near_bounds, nonfinite = _measure_channels(_matrix(values))
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
        for batch in _read_ahead(run.batches(epoch, gates)):
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


def _read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches while another thread reads the next one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


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
    for rows, deviations in _deviation_blocks(values, shift):
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


def flags(moments: Moments) -> tuple[str, ...]:
    """Name what is wrong with a gate, of "dead", "saturated" and "nonfinite"; a stripe is none of them."""
    low, high = moments.low[moments.finite], moments.high[moments.finite]
    found = {
        "dead": low.size > 0 and high.max() - low.min() <= DEAD_RANGE,
        "saturated": moments.near_bounds > SATURATED_SHARE * moments.count * moments.mean.size,
        "nonfinite": moments.nonfinite > 0,
    }
    return tuple(name for name, raised in found.items() if raised)


# ---- how constant: strength and its neighbours -----------------------------------------------------------


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
    within = _mean(moments.variance[moments.finite])
    between = _between(moments.mean[moments.finite], within, moments.count)
    return Strength(float(_ratio(between, between + within)), float(between), within)


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
    return _shares(values, stripe_strength(Moments.of(values)))


def _shares(values: Array, strength: Strength) -> Shares:
    channels = values.shape[1]
    rows = float(_variance(values.mean(axis=1, dtype=np.float64)))
    rest = (strength.within - rows) * channels / (channels - 1) if channels > 1 else math.nan
    sample = float(np.clip(rows - rest / channels, 0.0, strength.within))
    total = strength.between + strength.within
    shares = _ratio(np.array([sample, strength.within - sample]), total)
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
    values = _matrix(values)
    mean, rng = Moments.of(values).mean, np.random.default_rng(seed)
    portions = _portions(resamples, len(values))
    strengths = np.concatenate([_resampled_strengths(values, mean, portion, rng) for portion in portions])
    tail = (1 - confidence) / 2
    low, high = np.quantile(strengths, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled_strengths(values: Array, mean: Array, resamples: int, rng: np.random.Generator) -> Array:
    count, channels = values.shape
    counts = np.empty((resamples, count))
    for drawn in counts:
        drawn[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    sums, squares = np.zeros((resamples, channels)), np.zeros(resamples)
    for rows, deviations in _deviation_blocks(values, mean):
        sums += counts[:, rows] @ deviations
        squares += counts[:, rows] @ np.einsum("nc,nc->n", deviations, deviations)
    scatter = np.maximum(squares - np.einsum("rc,rc->r", sums, sums) / count, 0.0)
    within = _ratio(scatter, np.float64((count - 1) * channels))
    between = _between(mean + sums / count, within, count)
    strengths: Array = _ratio(between, between + within)
    return strengths


def effective_rank(values: Array) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of (samples, channels).

    Both sums are a trace, tr G and tr G^2, of whichever Gram matrix is smaller. NaN when no channel varies.
    """
    values = _matrix(values)
    count, channels = values.shape
    mean = Moments.of(values).mean
    if count < channels:
        wide = values - mean
        gram = wide @ wide.T
    else:
        gram = np.zeros((channels, channels))
        for _, deviations in _deviation_blocks(values, mean):
            gram += deviations.T @ deviations
    return float(_ratio(np.trace(gram) ** 2, np.vdot(gram, gram)))


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
    values, labels = _matrix(values), np.asarray(labels)
    if labels.shape != (len(values),):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(values)},), one for each sample")
    groups = [Moments.of(values[labels == label]) for label in np.unique(labels[labels >= 0])]
    if len(groups) < 2:
        return LabelShare(math.nan, math.nan)
    whole = reduce(Moments.merge, groups)
    return _label_share(whole, len(groups), within=sum(group.m2.sum() for group in groups))


def label_share_of_means(whole: Moments, means: Array, counts: Labels) -> LabelShare:
    """Explain variance by class as `label_share` does, from what is left where samples are not kept.

    ``whole`` are the moments of all samples, each in one class; ``means`` (classes, channels) and ``counts``
    (classes,) are those of the classes.
    """
    if len(counts) < 2:
        return LabelShare(math.nan, math.nan)
    keep = whole.finite
    between = counts @ np.square(means[:, keep] - whole.mean[keep]).sum(axis=1)
    return _label_share(whole, len(counts), within=whole.m2[keep].sum() - between)


def _label_share(whole: Moments, classes: int, within: Any) -> LabelShare:
    total = whole.m2[whole.finite].sum()
    within = np.clip(within, 0.0, total)
    between, extra = total - within, classes - 1
    error = _ratio(within, whole.count - classes)
    return LabelShare(float(_ratio(between, total)), float(_ratio(between - extra * error, total + error)))


# ---- over epochs -----------------------------------------------------------------------------------------


def drift(before: Moments, after: Moments) -> float:
    """Mean absolute change of the observed stripe between two recorded epochs of one gate."""
    change = np.abs(after.mean - before.mean)
    return _mean(change[np.isfinite(change)])


def settled_epoch(epochs: npt.ArrayLike, drifts: npt.ArrayLike, tolerance: float) -> int | None:
    """First epoch after which drift stays under the tolerance; None if it never does.

    ``drifts[i]`` leads from ``epochs[i - 1]`` to ``epochs[i]``, so ``drifts[0]`` is NaN; NaN is under no
    tolerance.
    """
    epochs = np.asarray(epochs)
    moving = np.flatnonzero(~(np.asarray(drifts, dtype=np.float64) < tolerance))
    last = int(moving[-1]) if moving.size else 0
    return int(epochs[last]) if last < len(epochs) - 1 else None


@dataclass(frozen=True, eq=False)
class Measured:
    """One gate in one epoch: its moments, and whatever of its row does not depend on other epochs."""

    epoch: int
    gate: str
    moments: Moments
    row: dict[str, Any]

    @classmethod
    def of_moments(cls, epoch: int, gate: str, moments: Moments) -> Measured:
        """Measure what moments alone tell."""
        return cls(epoch, gate, moments, _of_moments(moments))


def summarize(
    run: RecordedRun,
    *,
    epochs: Sequence[int] | None = None,
    gates: Sequence[str] | None = None,
    samples: bool = True,
    bootstrap: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> pd.DataFrame:
    """Tabulate every statistic, one row per epoch and gate, with one gate of one epoch in memory at a time.

    ``std`` is the mean over channels, ``drift`` is NaN at a gate's first epoch, ``flags`` joins its names by
    commas. ``bootstrap=0`` leaves the interval NaN; a run of moments alone leaves so whatever takes samples, and
    so does ``samples=False``, with one batch in memory at a time. Raises ValueError when the run holds no finished
    epoch.
    """
    epochs = run.epochs if epochs is None else epochs
    names = [gate.name for gate in run.gates] if gates is None else gates
    one = partial(measure, run, gates=names, samples=samples, bootstrap=bootstrap, confidence=confidence, seed=seed)
    return tabulate(measured for epoch in epochs for measured in one(epoch))


def measure(
    run: RecordedRun,
    epoch: int,
    gates: Sequence[str],
    *,
    samples: bool = True,
    bootstrap: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Iterator[Measured]:
    """Measure gates of one epoch one after the other; see `summarize`, which tabulates them."""
    if not (samples and run.has_samples):
        for (_, gate), now in run.moments([epoch], gates).items():
            measured = Measured.of_moments(epoch, gate, now)
            if run.has_label_means:
                measured.row.update(_of_classes(now, run.label_means(gate, epoch)))
            yield measured
        return
    labels = run.labels(epoch)
    for gate in gates:
        values = run.attention(gate, epoch)
        now = Moments.of(values)
        if 0 < now.finite.sum() < now.finite.size:
            values = values[:, now.finite]
        row = _of_moments(now) | _of_samples(values, labels, stripe_strength(now))
        if bootstrap:
            interval = bootstrap_strength(values, resamples=bootstrap, confidence=confidence, seed=seed)
            row |= {"strength_low": interval.low, "strength_high": interval.high}
        yield Measured(epoch, gate, now, row)


def tabulate(measured: Iterable[Measured]) -> pd.DataFrame:
    """Put measured gates, epochs ascending, into a table with the drift from each gate's epoch before.

    Raises ValueError when there is none.
    """
    rows: list[dict[str, Any]] = []
    last: dict[str, Moments] = {}
    for each in measured:
        change = drift(last[each.gate], each.moments) if each.gate in last else math.nan
        rows.append({"epoch": each.epoch, "gate": each.gate, "drift": change} | each.row)
        last[each.gate] = each.moments
    if not rows:
        raise ValueError("nothing to summarize: the run holds no finished epoch; record one first")
    return pd.DataFrame(rows, columns=SUMMARY)


def _of_moments(moments: Moments) -> dict[str, Any]:
    strength = stripe_strength(moments)
    return {
        "channels": moments.mean.size,
        "samples": moments.count,
        "strength": strength.strength,
        "std": _mean(moments.std[moments.finite]),
        "between": strength.between,
        "within": strength.within,
        "flags": ",".join(flags(moments)),
    }


def _of_samples(values: Array, labels: Labels, strength: Strength) -> dict[str, Any]:
    classes, shares = label_share(values, labels), _shares(values, strength)
    return {
        "sample_share": shares.sample,
        "rest_share": shares.rest,
        "label_share": classes.eta_squared,
        "label_omega": classes.omega_squared,
        "rank": effective_rank(values),
    }


def _of_classes(moments: Moments, classes: ClassMeans) -> dict[str, Any]:
    share = label_share_of_means(moments, classes.means, classes.counts)
    return {"label_share": share.eta_squared, "label_omega": share.omega_squared}


# ---- a learned vector against an observed stripe ---------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How well a learned vector fits an observed stripe, over the channels with finite observations."""

    r: float  # Pearson correlation with the stripe
    r2: float  # 1 - SS(stripe - learned) / SS(stripe): no slope or offset is fitted, so it can be negative
    rmse: float
    mean_abs_z: float  # mean |learned - stripe| / std, over the channels whose std is above 0
    inside: float  # share of channels inside the observed 5-95 % range
    p: float  # permutation_test of r


def match(learned: Array, observed: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> Match:
    """Compare a learned vector (channels,) with the observed attention vectors (samples, channels).

    Raises ValueError when their channels differ in number.
    """
    observed = _matrix(observed)
    learned = np.asarray(learned, dtype=np.float64)
    if learned.shape != observed.shape[1:]:
        raise ValueError(
            f"learned vector has shape {learned.shape}; expected {observed.shape[1:]}, one value a channel"
        )
    stripe = Moments.of(observed)
    keep = stripe.finite
    learned, mean, std = learned[keep], stripe.mean[keep], stripe.std[keep]
    low, high = np.quantile(observed[:, keep], OBSERVED_RANGE, axis=0)
    misfit = np.square(learned - mean)
    return Match(
        r=pearson(learned, mean),
        r2=float(1 - _ratio(misfit.sum(), np.square(_centred(mean)).sum())),
        rmse=math.sqrt(_mean(misfit)),
        mean_abs_z=_mean(np.abs(learned - mean)[std > 0] / std[std > 0]),
        inside=_mean((low <= learned) & (learned <= high)),
        p=permutation_test(learned, mean, permutations=permutations, seed=seed),
    )


def pearson(a: Array, b: Array) -> float:
    """Correlate two vectors (channels,); NaN when one of them is constant or not finite."""
    a, b = _centred(a), _centred(b)
    return float(np.clip(_ratio(a @ b, np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def permutation_test(learned: Array, observed: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> float:
    """One-sided p-value of the correlation of two vectors (channels,) when channels are shuffled.

    (count + 1) / (permutations + 1), where count shuffles correlate at least as well (Phipson, Smyth 2010);
    NaN when the correlation is.
    """
    a, b = _centred(learned), _centred(observed)
    reach = np.linalg.norm(a) * np.linalg.norm(b)
    if not reach > 0:
        return math.nan
    rng = np.random.default_rng(seed)
    needed = a @ b - 1e-12 * reach  # rounding must not part equal shuffles
    count = sum(
        np.count_nonzero(rng.permuted(np.broadcast_to(a, (portion, a.size)), axis=1) @ b >= needed)
        for portion in _portions(permutations, a.size)
    )
    return float((count + 1) / (permutations + 1))


def wasserstein(a: Array, b: Array) -> float:
    """Distance of two vectors (channels,) of one length as sets of values: mean difference of the sorted ones."""
    return float(_sorted_difference(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)))


def swap_test(a: Array, b: Array, *, permutations: int = PERMUTATIONS, seed: int = SEED) -> float:
    """One-sided p-value of the Wasserstein distance when the values of both vectors (channels,) are dealt anew.

    Small where they are not of one distribution; NaN when the distance is.
    """
    pooled, distance = np.concatenate([a, b]).astype(np.float64), wasserstein(a, b)
    if math.isnan(distance):
        return math.nan
    rng = np.random.default_rng(seed)
    needed = distance - 1e-12 * np.abs(pooled).max()  # rounding must not part equal deals
    count = 0
    for portion in _portions(permutations, pooled.size):
        dealt = rng.permuted(np.broadcast_to(pooled, (portion, pooled.size)), axis=1)
        count += int(np.count_nonzero(_sorted_difference(*np.split(dealt, 2, axis=1)) >= needed))
    return float((count + 1) / (permutations + 1))


def benjamini_hochberg(p: Array) -> Array:
    """Adjust p-values (tests,) for the false discovery rate (Benjamini, Hochberg 1995), NaN left out."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    scaled = p[order] * order.size / np.arange(1, order.size + 1)
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return adjusted


# ---- arithmetic ------------------------------------------------------------------------------------------


def _matrix(values: Array) -> Array:
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values have shape {values.shape}; expected (samples, channels) with at least one of each")
    return values


def _deviation_blocks(values: Array, centre: Array) -> Iterator[tuple[slice, Array]]:
    """Yield row slices and their float64 deviations, in a buffer that the next block overwrites."""
    count, channels = values.shape
    step = min(count, max(16, BLOCK_VALUES // channels))
    buffer = np.empty((step, channels))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        deviations = buffer[: rows.stop - start]
        np.copyto(deviations, values[rows])  # cast first: subtracting mixed precisions is slower than both
        deviations -= centre
        yield rows, deviations


def _count_near_bounds(values: Array) -> Counts:
    distance = values - 0.5  # then in place: | |x - 1/2| - 1/2 | is the distance to the nearer of 0 and 1
    np.abs(distance, out=distance)
    distance -= 0.5
    np.abs(distance, out=distance)
    counts: Counts = np.count_nonzero(distance <= NEAR_BOUND, axis=0)
    return counts


def _portions(total: int, width: int) -> Iterator[int]:
    """Yield numbers of rows of ``width`` values that sum to ``total``, each within the memory for counts."""
    step = max(1, COUNT_VALUES // width)
    for start in range(0, total, step):
        yield min(step, total - start)


def _between(means: Array, within: Any, count: int) -> Any:
    return np.maximum(_variance(means) - within / count, 0.0)


@np.errstate(invalid="ignore")
def _variance(values: Array) -> Any:
    """Variance (ddof=1) over the last axis, exactly 0 where all are equal, NaN where fewer than two."""
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.var(values - values[..., :1], axis=-1, ddof=1)


def _sorted_difference(a: Array, b: Array) -> Any:
    return np.abs(np.sort(a, axis=-1) - np.sort(b, axis=-1)).mean(axis=-1)


def _centred(vector: Array) -> Array:
    vector = np.asarray(vector, dtype=np.float64)
    vector = vector - vector[:1]  # equal values become exactly 0
    centred: Array = vector - _mean(vector)
    return centred


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if values.size else math.nan


def _ratio(part: Any, whole: Any) -> Any:
    """Divide, with NaN wherever the whole is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.greater(whole, 0), np.divide(part, whole), np.nan)
