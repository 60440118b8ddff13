"""Measure batches of many gates at once, side by side as columns of one matrix, since gates are many and narrow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stripe.stats.arithmetic import BLOCK_VALUES, Array, Counts, Labels
from stripe.stats.groups import BLOCKS, Groups, block_keys, coarse

NEAR_BOUND = 1e-3  # a value this close to a bound of its gate counts as saturated
FEW = 4  # rows per group, from which summing them together is faster than one by one
BOUNDS = (0.0, 1.0, 2.0)  # possible bounds of gates; `flags` decides from a gate's form and values which it has


@dataclass(frozen=True, eq=False)
class Sums:
    """What was measured of one gate, all of it finite; the fields are those of `Moments`."""

    count: int
    mean: Array
    m2: Array
    low: Array
    high: Array
    near: Counts
    blocks: Groups
    classes: Groups | None


class Measuring:
    """Sums over the samples of gates side by side, of deviations from one vector that is close to all samples.

    Sums of squares about a vector near the mean do not cancel (Chan, Golub, LeVeque 1983), and sums about the same
    vector simply add up, batch after batch. Values must be finite.
    """

    def __init__(self, channels: Mapping[str, int], classes: int | None) -> None:
        """Measure gates, given their ``channels`` by name; keep at most ``classes`` classes, or all of them if None."""
        ends = np.cumsum(list(channels.values()))
        self._columns = {g: slice(e - c, e) for (g, c), e in zip(channels.items(), ends.tolist(), strict=True)}
        self._starts = [columns.start for columns in self._columns.values()]
        self._width = int(ends[-1])
        self._gate_of = np.repeat(np.arange(len(channels)), list(channels.values()))  # of each column, (width,)
        self._shift: Array | None = None
        self._m2 = np.zeros(self._width)  # about the shift
        self._low, self._high = np.full(self._width, np.inf), np.full(self._width, -np.inf)
        self._near = np.zeros((len(channels), len(BOUNDS)), np.int64)
        self._blocks, self._classes = (_GroupSums(self._width, len(channels)) for _ in range(2))
        self._most = classes
        self.count = 0

    def add(self, batch: Mapping[str, Array], sample_ids: Labels, labels: Labels) -> None:
        """Take finite values (n, channels) by gate, and the id and label of each sample, (n,)."""
        count = len(sample_ids)
        if not count:
            return
        if self._shift is None:
            self._shift = np.concatenate([centre(batch[gate][:16]) for gate in self._columns])
        keys, known = block_keys(sample_ids), np.maximum(labels, -1).tolist()
        if self.count <= BLOCKS < self.count + count:
            self._blocks.rekey(coarse)
        self.count += count
        dealt = (keys if self.count <= BLOCKS else coarse(keys)).tolist()
        step = min(count, max(16, BLOCK_VALUES // self._width))
        buffer, squared = np.empty((2, step, self._width))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            deviations, squares = (each[: rows.stop - start] for each in (buffer, squared))
            for gate, columns in self._columns.items():
                deviations[:, columns] = batch[gate][rows]  # cast first: subtracting in mixed precision is slower
            self._bound(deviations)
            deviations -= self._shift
            np.multiply(deviations, deviations, out=squares)
            self._m2 += squares.sum(axis=0)
            by_gate = [np.add.reduceat(each, self._starts, axis=1) for each in (squares, deviations)]
            self._blocks.add(dealt[rows], deviations, *by_gate)
            if self._most is None or self._most >= len(self._classes.places.keys() | known):
                self._classes.add(known[rows], deviations, *by_gate)
            else:
                self._most = -1

    def sums(self) -> dict[str, Sums]:
        """Return what has been measured of each gate; ValueError when there is no sample."""
        if self._shift is None:
            raise ValueError("no sample has been measured")
        total = self._blocks.total()
        mean = self._shift + total / self.count
        m2 = np.maximum(self._m2 - total**2 / self.count, 0.0)
        return {
            gate: Sums(
                self.count,
                mean[columns],
                m2[columns],
                self._low[columns],
                self._high[columns],
                self._near[place],
                self._blocks.groups(place, columns, self._shift),
                None if self._most == -1 else self._classes.groups(place, columns, self._shift),
            )
            for place, (gate, columns) in enumerate(self._columns.items())
        }

    def _bound(self, values: Array) -> None:
        """Update the least and the greatest values by ``values`` (n, width), and count those near each bound."""
        low, high = values.min(axis=0), values.max(axis=0)
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        for number, bound in enumerate(BOUNDS):
            near = np.flatnonzero((low <= bound + NEAR_BOUND) & (high >= bound - NEAR_BOUND))
            if near.size:
                counts = np.count_nonzero(np.abs(values[:, near] - bound) <= NEAR_BOUND, axis=0)
                np.add.at(self._near[:, number], self._gate_of[near], counts)


class _GroupSums:
    """Sums by group: of deviations from the shift, of their squares by gate, and of squared row sums by gate."""

    def __init__(self, width: int, gates: int) -> None:
        self.places: dict[int, int] = {}  # by key
        self._counts: list[int] = []
        self._deviations: list[Array] = []  # (width,) each
        self._squares: list[Array] = []  # (gates,) each, like _rows
        self._rows: list[Array] = []
        self._width, self._gates = width, gates

    def add(self, keys: list[int], deviations: Array, squares: Array, rows: Array) -> None:
        """Add deviations (n, width), and their squares and row sums by gate, (n, gates), to the groups of the keys."""
        table: list[Array] = [deviations, squares, np.square(rows)]
        counts = [1] * len(keys)
        if len(set(keys)) * FEW <= len(keys):  # put rows of a group together first: fewer, longer sums
            order = np.argsort(keys, kind="stable")
            found, firsts = np.unique(np.asarray(keys)[order], return_index=True)
            table = [np.add.reduceat(each[order], firsts, axis=0) for each in table]
            keys, counts = found.tolist(), np.diff(firsts, append=len(order)).tolist()
        for number, (key, count) in enumerate(zip(keys, counts, strict=True)):
            place = self._place(key)
            self._counts[place] += count
            for sums, each in zip((self._deviations, self._squares, self._rows), table, strict=True):
                np.add(sums[place], each[number], out=sums[place])

    def rekey(self, rename: object) -> None:
        """Rename the keys, and join the groups whose keys become equal."""
        old = _GroupSums(self._width, self._gates)
        old.__dict__, self.__dict__ = self.__dict__, old.__dict__
        for key, place in old.places.items():
            mine = self._place(int(rename(np.int64(key))))  # type: ignore[operator]
            self._counts[mine] += old._counts[place]
            for sums, others in (
                (self._deviations, old._deviations),
                (self._squares, old._squares),
                (self._rows, old._rows),
            ):
                sums[mine] += others[place]

    def total(self) -> Array:
        """Return the sum of all deviations, (width,)."""
        total: Array = np.sum(self._deviations, axis=0)
        return total

    def groups(self, place: int, columns: slice, shift: Array) -> Groups:
        """Return the groups of one gate."""
        keys = np.array(list(self.places), np.int64)
        order = np.argsort(keys)
        counts = np.array(self._counts, np.int64)[order]
        off = np.array([each[columns] for each in self._deviations])[order] / counts[:, None]
        channels, several = columns.stop - columns.start, counts > 1  # a single sample is its group's mean
        squares, rows = (np.array([each[place] for each in sums])[order] for sums in (self._squares, self._rows))
        return Groups(
            keys[order],
            counts,
            shift[columns] + off,
            several * np.maximum(squares - counts * np.square(off).sum(axis=1), 0.0),
            several * np.maximum(rows / channels**2 - counts * np.square(off.mean(axis=1)), 0.0),
        )

    def _place(self, key: int) -> int:
        if key not in self.places:
            self.places[key] = len(self.places)
            self._counts.append(0)
            self._deviations.append(np.zeros(self._width))
            self._squares.append(np.zeros(self._gates))
            self._rows.append(np.zeros(self._gates))
        return self.places[key]


def centre(values: npt.NDArray[np.floating]) -> Array:
    """Return the mean over samples, (channels,), which is exactly their value where they are equal."""
    mean: Array = values.mean(axis=0, dtype=np.float64)
    return np.where(values.min(axis=0) == values.max(axis=0), values[0], mean).astype(np.float64)
