"""The effective rank: in how many directions attention varies, from products of channels summed over rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from stripe.stats.arithmetic import Array, matrix, ratio
from stripe.stats.measuring import centre
from stripe.stats.moments import Moments
from stripe.stats.runs import RecordedRun, ahead

MANY = 16  # samples per channel, from which products of float32 values are taken in float32
ROWS = 1024  # rows whose products are taken together
HELD_VALUES = 2**24  # values of products and rows held at once, 128 MB; gates that need more together take turns


def effective_rank(values: Array) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of (samples, channels).

    Both sums are estimated without bias, whatever the distribution: they are means over four samples x, y, z, w of
    |x - y|^2 |z - w|^2 / 4 and of ((x - y)(z - w))^2 / 4, the second the estimate of Himeno and Yamada (2014). The
    eigenvalues of the estimated covariance alone would give too few directions, since the sum of their squares is too
    large. The rank is 1 if all samples lie on a line, at most the number of channels, and NaN when no channel varies
    or with fewer than four samples. For float32 values with at least 16 samples per channel it is within 1e-5,
    relative, of what float64 gives.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> round(effective_rank(attention), 1)  # noise in every direction
        16.0
    """
    values = matrix(values)
    mean = centre(values)
    products = _Products(len(values), mean, values.min(axis=0), values.max(axis=0), values.dtype)
    products.add(values)
    return products.effective_rank()


def effective_ranks(run: RecordedRun, epoch: int, moments: Mapping[str, Moments]) -> dict[str, float]:
    """Return the effective rank in an epoch of every gate whose moments are given, reading its rows.

    Gates are spread over the processor's cores. The BLAS is limited to one core per gate: its own threads would stay
    awake between products as small as these, and take the cores from the threads that read and unpack the rows.
    """
    from threadpoolctl import threadpool_limits

    ranks = dict.fromkeys(moments, float("nan"))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        for gates in _turns(moments):
            products = [_products_of(moments[gate]) for gate in gates]
            for batch in ahead(run.batches(epoch, gates)):
                sound = (_sound(batch[gate], moments[gate]) for gate in gates)
                list(threads.map(_Products.add, products, sound))
            ranks |= zip(gates, threads.map(_Products.effective_rank, products), strict=True)
    return ranks


def _turns(moments: Mapping[str, Moments]) -> Iterator[list[str]]:
    """Yield the gates that have samples, as many at once as HELD_VALUES allows."""
    turn: list[str] = []
    held = 0
    for gate, each in moments.items():
        size = each.mean.size * min(each.mean.size + ROWS, each.count)
        if turn and held + size > HELD_VALUES:
            yield turn
            turn, held = [], 0
        if size:
            turn, held = [*turn, gate], held + size
    if turn:
        yield turn


def _products_of(moments: Moments) -> _Products:
    keep = moments.finite
    mean, low, high = (each[keep] for each in (moments.mean, moments.low, moments.high))
    return _Products(moments.count, mean, low, high, np.dtype(np.float32))


def _sound(values: Array, moments: Moments) -> Array:
    """Leave out the samples and channels that the moments leave out."""
    if not moments.nonfinite:
        return values
    values = values[:, moments.finite]
    return values[np.isfinite(values).all(axis=1)]


class _Products:
    """Products of channels about the mean, summed over samples; or of samples, if they are fewer than the channels.

    In float32, the products of a block's rows are off by about 1e-7, relative; blocks are added up in float64. What is
    subtracted for the bias is small beside the products if there are many samples.
    """

    def __init__(self, samples: int, mean: Array, low: Array, high: Array, dtype: npt.DTypeLike) -> None:
        """Expect ``samples`` rows of type ``dtype`` whose channels have this mean, lowest and highest value."""
        channels = mean.size
        many = samples >= MANY * channels
        self._dtype = np.float32 if dtype == np.float32 and many else np.float64
        reach = np.frexp(max((high - mean).max(), (mean - low).max()))[1]
        self._scale = 2.0 ** -int(np.clip(reach, -100, 100))  # makes the largest deviation about 1, without rounding
        self._near: Array = (mean * self._scale).astype(self._dtype)
        self._rest: Array = (mean * self._scale - self._near).astype(self._dtype)  # what rounding took off the mean
        self._samples, self._channels = samples, channels
        self._block, self._filled = np.empty((min(ROWS, samples), channels), self._dtype), 0
        self._gram: Array | None = None if samples < channels else np.zeros((channels, channels))
        self._rows: list[Array] = []  # kept if there is no gram
        self._fourth = 0.0

    def add(self, values: Array) -> None:
        """Take rows, (n, channels)."""
        while len(values):
            part = self._block[self._filled : self._filled + len(values)]
            np.multiply(values[: len(part)], self._scale, out=part)
            part -= self._near
            values, self._filled = values[len(part) :], self._filled + len(part)
            if self._filled == len(self._block):
                self._sum_up()

    def _sum_up(self) -> None:
        """Add the products of the rows in the block to the sums."""
        part, self._filled = self._block[: self._filled], 0
        part -= self._rest
        squares = np.einsum("nc,nc->n", part, part).astype(np.float64)
        self._fourth += float(squares @ squares)
        if self._gram is None:
            self._rows.append(part.copy())
        else:
            self._gram += part.T @ part

    def effective_rank(self) -> float:
        """Return the effective rank, once all rows have been added."""
        self._sum_up()
        gram = self._gram
        if gram is None:
            rows = np.concatenate(self._rows)
            gram = rows @ rows.T
        return min(participation_ratio(self._samples, gram, self._fourth), float(self._channels))


def participation_ratio(samples: int, products: Array, fourth: float) -> float:
    """Return the effective rank from products of deviations from the mean and the sum of their lengths' 4th powers.

    ``products`` are of channels, summed over samples, or of samples, summed over channels: the result is the same.
    """
    n = samples
    if n < 4:
        return float("nan")
    trace, squares = float(np.trace(products)) ** 2, float(np.vdot(products, products))
    of_trace = (n * n - 3 * n + 1) * trace - n * (n - 1) * fourth + 2 * squares
    of_squares = (n - 1) * (n - 2) * squares + trace - n * (n - 1) * fourth
    return float(ratio(of_trace, of_squares))
