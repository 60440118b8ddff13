"""Mergeable moments of a gate's attention: all that the statistics of a run need to know of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stripe.stats.arithmetic import Array, Labels, matrix
from stripe.stats.groups import BLOCKS, Groups, coarse
from stripe.stats.measuring import Measuring, Sums
from stripe.stats.variance import Variance

Mask = npt.NDArray[np.bool_]

CLASSES = 200
"""The most classes whose means are kept beside a recording's rows; with more, the label's share reads the rows."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is kept of the attention vectors of one gate in one epoch; arrays per channel are (channels,) float64.

    A sample with a value that is not finite is left out, with all its channels, and counted. Only a channel without
    a single finite value is left out as a channel; its mean and its other figures are NaN.

    Attributes:
        count: samples that were measured.
        mean: the observed stripe.
        m2: sum of squared deviations from the mean.
        low: least value.
        high: greatest value.
        near: how many values are within 0.001 of 0, of 1 and of 2, (3,).
        nonfinite: how many values are not finite.
        left_out: how many samples were left out for such a value.
        broken: marks the channels without a finite value.
        blocks: the samples dealt by their ids into 32 blocks, or a block per sample if there are no more than 32.
        classes: the samples by label, -1 where it is unknown; None if there were too many classes to keep.
    """

    count: int
    mean: Array
    m2: Array
    low: Array
    high: Array
    near: npt.NDArray[np.int64]
    nonfinite: int
    left_out: int
    broken: Mask
    blocks: Groups
    classes: Groups | None

    @classmethod
    def of(cls, values: Array, *, sample_ids: Labels | None = None, labels: Labels | None = None) -> Moments:
        """Measure ``values`` (samples, channels) in float64, in one pass.

        Args:
            values: attention vectors.
            sample_ids: (samples,), by which samples are dealt into blocks; their positions by default.
            labels: the class of each sample, (samples,); negative where it is unknown, as all are by default.

        Raises:
            ValueError: the values are not (samples, channels) with at least one of each, or there is not one id or
                label for each sample.

        Example:
            >>> import numpy as np
            >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
            >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
            >>> halves = Moments.of(attention[:250]), Moments.of(attention[250:])
            >>> bool(np.allclose(halves[0].merge(halves[1]).mean, Moments.of(attention).mean))
            True
        """
        values = matrix(values)
        ids = np.arange(len(values)) if sample_ids is None else np.asarray(sample_ids)
        labels = np.full(len(values), -1) if labels is None else np.asarray(labels)
        for what, given in {"sample_ids": ids, "labels": labels}.items():
            if given.shape != (len(values),):
                raise ValueError(f"{what} have shape {given.shape}; expected ({len(values)},), one for each sample")
        finite = np.isfinite(values)
        if finite.all():
            return _measured(values, ids, labels)
        broken: Mask = np.asarray(~finite.any(axis=0))
        nonfinite = int(np.count_nonzero(~finite))
        sound: Mask = np.asarray((finite | broken).all(axis=1) & (not broken.all()))
        found = _measured(values[sound][:, ~broken], ids[sound], labels[sound]) if sound.any() else None
        return _with_broken(found, broken, nonfinite=nonfinite, left_out=int(np.count_nonzero(~sound)))

    def merge(self, other: Moments) -> Moments:
        """Combine with the moments of other samples of the same gate (Chan, Golub, LeVeque 1983).

        Exact but for the rounding of the means: m2 is within about 1e-16 mean / std of one pass over all samples.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {self.mean.size} and of {other.mean.size} channels cannot merge: merge per gate"
            )
        broken = self.broken & other.broken
        a, b = (each if (each.broken == broken).all() else each._without_samples(broken) for each in (self, other))
        nonfinite, left_out = a.nonfinite + b.nonfinite, a.left_out + b.left_out
        if not (a.count and b.count):
            whole = a if a.count else b
            return replace(whole, broken=broken, nonfinite=nonfinite, left_out=left_out)
        count, delta = a.count + b.count, b.mean - a.mean
        both_kept = a.classes is not None and b.classes is not None
        return Moments(
            count,
            a.mean + delta * (b.count / count),
            a.m2 + b.m2 + delta**2 * (a.count * (b.count / count)),
            np.minimum(a.low, b.low),
            np.maximum(a.high, b.high),
            a.near + b.near,
            nonfinite,
            left_out,
            broken,
            _dealt(a, count).merge(_dealt(b, count)),
            a.classes.merge(b.classes) if both_kept else None,  # type: ignore[union-attr, arg-type]
        )

    def is_close(self, other: Moments, *, rtol: float = 1e-9) -> bool:
        """Tell whether these are the moments of the same samples, up to the rounding of another order of summation."""
        exact = ("count", "low", "high", "near", "nonfinite", "left_out", "broken")
        if not all(np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True) for name in exact):
            return False
        size = np.nan_to_num(np.maximum(np.abs(self.low), np.abs(self.high)))
        sides = ((self.blocks, other.blocks), (self.classes, other.classes))
        return (
            bool(np.allclose(self.mean, other.mean, rtol=rtol, atol=0, equal_nan=True))
            and bool((np.nan_to_num(np.abs(self.m2 - other.m2)) <= rtol * (self.m2 + self.count * size**2)).all())
            and all((a is None) == (b is None) and (a is None or a.is_close(b, rtol=rtol)) for a, b in sides)  # type: ignore[arg-type]
        )

    @cached_property
    def split(self) -> Variance:
        """The variance of all samples, split by a two-way layout; its fields are floats."""
        return Variance.of_all(self.blocks, self.mean.size)

    @property
    def variance(self) -> Array:
        """Variance across samples per channel (ddof=1); NaN for a single sample."""
        return self.m2 / (self.count - 1) if self.count > 1 else np.full_like(self.m2, np.nan)

    @property
    def std(self) -> Array:
        """Standard deviation across samples per channel (ddof=1)."""
        return np.sqrt(self.variance)

    @property
    def finite(self) -> Mask:
        """Mark the channels that were measured, (channels,)."""
        return np.isfinite(self.mean)

    def _without_samples(self, broken: Mask) -> Moments:
        """Leave out every sample, since each is not finite in a channel that has finite values elsewhere."""
        return _with_broken(None, broken, nonfinite=self.nonfinite, left_out=self.left_out + self.count)


def _dealt(moments: Moments, count: int) -> Groups:
    """Return a part's blocks for a whole of ``count`` samples: blocks of single samples are joined if it is larger."""
    blocks = moments.blocks
    return blocks.regrouped(coarse(blocks.keys)) if moments.count <= BLOCKS < count else blocks


def moments_of(attention: Array | Moments) -> Moments:
    """Return moments as they are, or measure those of an array (samples, channels)."""
    return attention if isinstance(attention, Moments) else Moments.of(attention)


class GateMoments:
    """The moments of many gates, measured batch by batch while samples are recorded or read."""

    def __init__(self, channels: Mapping[str, int], *, classes: int | None = CLASSES) -> None:
        """Measure gates, given their ``channels`` by name; keep at most ``classes`` classes, or all of them if None."""
        self._channels, self._limit = dict(channels), classes
        self._measuring = Measuring(channels, classes)
        self._others: dict[str, Moments] = {}  # of batches with values that are not finite

    def add(self, batch: Mapping[str, Array], sample_ids: Labels, labels: Labels) -> None:
        """Take values (n, channels) by gate, and the id and label of each sample, (n,)."""
        if all(np.isfinite(batch[gate]).all() for gate in self._channels):
            self._measuring.add(batch, sample_ids, labels)
            return
        for gate in self._channels:
            found = Moments.of(batch[gate], sample_ids=sample_ids, labels=labels)
            self._others[gate] = self._others[gate].merge(found) if gate in self._others else found

    @property
    def empty(self) -> bool:
        """Whether no sample has been added."""
        return not (self._measuring.count or self._others)

    def moments(self) -> dict[str, Moments]:
        """Return the moments of every gate so far; ValueError when no sample has been added."""
        if self.empty:
            raise ValueError("no sample has been measured")
        found = dict(self._others)
        if self._measuring.count:
            for gate, sums in self._measuring.sums().items():
                found[gate] = found[gate].merge(_from_sums(sums)) if gate in found else _from_sums(sums)
        return {gate: self._limited(each) for gate, each in found.items()}

    def _limited(self, moments: Moments) -> Moments:
        many = self._limit is not None and moments.classes is not None and len(moments.classes.keys) > self._limit
        return replace(moments, classes=None) if many else moments


def _measured(values: Array, ids: Labels, labels: Labels) -> Moments:
    measuring = Measuring({"": values.shape[1]}, classes=None)
    measuring.add({"": values}, ids, labels)
    return _from_sums(measuring.sums()[""])


def _from_sums(sums: Sums) -> Moments:
    return Moments(
        count=sums.count,
        mean=sums.mean,
        m2=sums.m2,
        low=sums.low,
        high=sums.high,
        near=sums.near,
        nonfinite=0,
        left_out=0,
        broken=np.zeros(sums.mean.size, np.bool_),
        blocks=sums.blocks,
        classes=sums.classes,
    )


def _with_broken(found: Moments | None, broken: Mask, *, nonfinite: int, left_out: int) -> Moments:
    """Put the moments of the sound channels among the broken ones; ``found`` is None if no sample is left."""
    channels = broken.size
    if found is None:
        nothing = np.full(channels, np.nan)
        none = Groups.empty(channels)
        near = np.zeros(3, np.int64)
        return Moments(0, nothing, nothing, nothing, nothing, near, nonfinite, left_out, broken, none, none)

    def spread(values: Array) -> Array:
        whole = np.full(channels, np.nan)
        whole[~broken] = values
        return whole

    return Moments(
        found.count,
        spread(found.mean),
        spread(found.m2),
        spread(found.low),
        spread(found.high),
        found.near,
        nonfinite,
        left_out,
        broken,
        found.blocks.with_channels(~broken),
        None if found.classes is None else found.classes.with_channels(~broken),
    )
