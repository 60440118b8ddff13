"""Arithmetic that the statistics share: the shape of arrays, work in portions, means and ratios with NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]

SEED = 0
BLOCK_VALUES = 2**18  # float64 values worked on at once: fits a core's cache
COUNT_VALUES = 2**21  # permuted values in a portion: 16 MB


def matrix(values: Array) -> Array:
    """Return values that are (samples, channels); ValueError for any other shape and for an empty dimension."""
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values have shape {values.shape}; expected (samples, channels) with at least one of each")
    return values


def portions(total: int, width: int) -> Iterator[int]:
    """Yield numbers of rows that sum to ``total``, each of at most COUNT_VALUES values at ``width`` values a row."""
    step = max(1, COUNT_VALUES // width)
    for start in range(0, total, step):
        yield min(step, total - start)


def mean_of(values: npt.NDArray[Any]) -> float:
    """Return the mean of all values, NaN if there are none."""
    return float(values.mean()) if values.size else math.nan


def ratio(part: Any, whole: Any) -> Any:
    """Divide, with NaN wherever the whole is not above 0."""
    if isinstance(whole, float):
        return part / whole if whole > 0 else part * math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.greater(whole, 0), np.divide(part, whole), np.nan)
