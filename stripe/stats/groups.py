"""Samples dealt into groups, by a hash of their ids or by class: counts, means and sums of squares that merge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from stripe.stats.arithmetic import Array, Counts, Labels

BLOCKS = 32
"""How many blocks samples are dealt into; if there are no more samples than that, each is a block of its own."""

COARSE_BITS = 63 - 5  # the five highest of a key's 63 bits are the number of its block, of 32


def block_keys(sample_ids: Labels) -> Counts:
    """Hash sample ids (N,) to keys from 0 to 2^63 - 1, (N,): the mixing function of SplitMix64 (Steele et al. 2014).

    Which block a sample belongs to depends on its id alone, so that parts of a run, ranks and machines agree on it.
    Neighbouring ids are scattered over the blocks.
    """
    key = np.asarray(sample_ids).astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((key ^ (key >> np.uint64(31))) >> np.uint64(1)).view(np.int64)


def coarse(keys: Counts) -> Counts:
    """Turn the keys of samples into the numbers of the 32 blocks that they belong to."""
    return keys >> COARSE_BITS


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of samples at one gate, ascending by key: what a statistic over samples needs to know of each group.

    Attributes:
        keys: what the samples of a group share, (groups,): a block's number, or a class (-1: unknown).
        counts: number of samples in each group, (groups,).
        means: mean vector of each group, (groups, channels).
        scatter: sum over samples and channels of squared deviations from the group's means, (groups,).
        rows: sum over samples of the squared deviation of a row's mean from the group's mean of these, (groups,).
    """

    keys: Counts
    counts: Counts
    means: Array
    scatter: Array
    rows: Array

    @classmethod
    def empty(cls, channels: int) -> Groups:
        """Return an empty set of groups."""
        none = np.empty(0, np.int64)
        return cls(none, none, np.empty((0, channels)), np.empty(0), np.empty(0))

    @cached_property
    def pooled(self) -> Groups:
        """Return all samples as a single group."""
        if not len(self.keys):
            return self
        weights, about = self.counts.astype(np.float64), self.deviations
        return Groups(
            np.zeros(1, np.int64),
            self.counts.sum(keepdims=True),
            about.mean[None],
            self.scatter.sum(keepdims=True) + weights @ about.squares,
            self.rows.sum(keepdims=True) + weights @ np.square(about.rows),
        )

    @cached_property
    def deviations(self) -> Deviations:
        """Return how far each group lies from the mean of all samples; there must be at least one group."""
        weights = self.counts.astype(np.float64)
        off = self.means - self.means[0]  # sums about one group's mean do not cancel
        mean = weights @ off / weights.sum()
        off -= mean
        off = _numbers(off)
        return Deviations(self.means[0] + mean, off, _squares(off), _mean(off))

    def is_close(self, other: Groups, *, rtol: float) -> bool:
        """Tell whether these are the same groups of the same samples, up to rounding."""
        if not (np.array_equal(self.keys, other.keys) and np.array_equal(self.counts, other.counts)):
            return False
        size = self.scatter + self.counts * np.nansum(np.square(self.means), axis=1)
        sums = ((self.scatter, other.scatter), (self.rows, other.rows))
        return bool(np.allclose(self.means, other.means, rtol=rtol, atol=0, equal_nan=True)) and all(
            bool((np.abs(mine - others) <= rtol * size).all()) for mine, others in sums
        )

    def merge(self, other: Groups) -> Groups:
        """Combine with groups of other samples; groups with the same key become one."""
        both = ((getattr(self, name), getattr(other, name)) for name in ("keys", "counts", "means", "scatter", "rows"))
        joined = Groups(*(np.concatenate(pair) for pair in both))
        return joined.regrouped(joined.keys)

    def chosen(self, keep: npt.NDArray[np.bool_]) -> Groups:
        """Return the groups that ``keep`` (groups,) marks."""
        if keep.all():
            return self
        return Groups(self.keys[keep], self.counts[keep], self.means[keep], self.scatter[keep], self.rows[keep])

    def regrouped(self, keys: Counts) -> Groups:
        """Join the groups to which ``keys`` (groups,) gives the same key (Chan, Golub, LeVeque 1983)."""
        if not len(keys):
            return self
        found, firsts, places = np.unique(keys, return_index=True, return_inverse=True)
        counts = _sums(places, self.counts).astype(np.int64)
        shift = self.means[firsts]  # sums about one member's mean do not cancel
        off: Array = self.means - shift[places]
        mean = np.zeros_like(shift)
        np.add.at(mean, places, off * self.counts[:, None])
        mean /= counts[:, None]
        off = _numbers(off - mean[places])
        return Groups(
            found,
            counts,
            shift + mean,
            _sums(places, self.scatter + self.counts * _squares(off)),
            _sums(places, self.rows + self.counts * np.square(_mean(off))),
        )

    def with_channels(self, keep: npt.NDArray[np.bool_]) -> Groups:
        """Place the channels of these groups where ``keep`` (channels,) is true; the means of the others are NaN."""
        means = np.full((len(self.keys), keep.size), np.nan)
        means[:, keep] = self.means
        return Groups(self.keys, self.counts, means, self.scatter, self.rows)


@dataclass(frozen=True, eq=False)
class Deviations:
    """How far groups lie from the mean of all samples.

    Attributes:
        mean: mean of all samples, (channels,).
        off: deviations of each group's means from ``mean``, (groups, channels whose mean is not NaN).
        squares: sum of the squares of ``off`` over these channels, (groups,).
        rows: mean of ``off`` over these channels, (groups,); 0 if there are none.
    """

    mean: Array
    off: Array
    squares: Array
    rows: Array

    @cached_property
    def centred(self) -> tuple[float, Array]:
        """Return the middle (average) of the channels' means that are not NaN, and how far each lies from it."""
        mean = self.mean[~np.isnan(self.mean)]
        off = mean - mean[:1]  # exactly 0 where all are equal
        middle = off.sum() / max(off.size, 1)
        return float(middle + mean[:1].sum()), off - middle


def _sums(places: npt.NDArray[np.intp], values: npt.NDArray[Any]) -> Array:
    """Add up values by place; every place occurs."""
    return np.bincount(places, values).astype(np.float64)


def _numbers(off: Array) -> Array:
    """Leave out the channels that are NaN; such a channel is NaN in every group."""
    missing = np.isnan(off[0])
    return off[:, ~missing] if missing.any() else off


def _squares(off: Array) -> Any:
    return np.einsum("gc,gc->g", off, off)


def _mean(off: Array) -> Any:
    return off @ np.ones(off.shape[1]) / max(off.shape[1], 1)
