"""Rows of an epoch on their way to the disk; memory grows only by the sample ids, 8 bytes each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from stripe.messages import only, require, require_unique
from stripe.store.manifest import KINDS, UNKNOWN_LABEL, Manifest
from stripe.store.parts import PartWriter

ROW_GROUP_BYTES = 8 * 2**20  # of values; recording holds two row groups in memory, reading holds one

Block = dict[str, NDArray[Any]]  # column -> (rows,) or (rows, channels)


class EpochWriter:
    """Collects the rows of an epoch into row groups.

    While one row group fills, one thread writes the previous one and another measures it. In a run of moments, row
    groups are measured but not written, so that neither memory nor disk grows with the number of samples.
    """

    def __init__(
        self, manifest: Manifest, parts: PartWriter, writing: ThreadPoolExecutor, measuring: ThreadPoolExecutor
    ) -> None:
        """Start without rows; ``RunWriter.epoch`` creates and finishes the writer."""
        self._parts, self._writing, self._measuring, self._manifest = parts, writing, measuring, manifest
        schema = manifest.row_schema
        values = [field.type for field in schema if pa.types.is_fixed_size_list(field.type)]
        row_bytes = sum(kind.list_size * kind.value_type.bit_width // 8 for kind in values)
        self._capacity, self._filled = max(1, ROW_GROUP_BYTES // row_bytes), 0
        self._block, self._spare = ({field.name: _empty(field, self._capacity) for field in schema} for _ in range(2))
        self._seen = _Ids()
        self._rounding_told = False
        self._pending: list[Future[None]] = []

    def append(
        self,
        sample_ids: ArrayLike,
        labels: ArrayLike | None,
        attention: Mapping[str, ArrayLike],
        squeeze: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Append n rows: ids (n,), labels (n,) or None (negative: unknown), and per gate name an array (n, C).

        The values are copied, so the arrays may be reused. Raises ValueError for missing or unknown gates, wrong
        shapes, and, in a run of "label-moments", a sample without a label; OSError if rows appended earlier could not
        be written. Repeated sample ids also raise ValueError, except in a run of moments, which does not remember
        ids. A refused batch leaves nothing behind. Warns once if float16 rounds values to 0.
        """
        shapes = {name: column.shape[1:] for name, column in self._block.items()}
        batch = _as_columns(shapes, sample_ids, labels, attention, squeeze)
        known = self._manifest.contents != "label-moments" or batch["label"].min(initial=0) >= 0
        require(known, "moments by label need a label for every sample: give labels from 0")
        batch = {name: self._cast(values, self._block[name].dtype, name) for name, values in batch.items()}
        if self._manifest.has_samples:  # the last check, because it stores the ids of the batch
            self._remember(batch["sample"])
        self._copy(batch, rows=len(batch["sample"]))

    def finish(self) -> None:
        """Write and measure the remaining rows, and wait until all are on the disk."""
        self._hand_over()
        self._wait()
        self._writing.submit(self._parts.close).result()

    def _remember(self, ids: NDArray[np.int64]) -> None:
        rule = "sample ids must differ within an epoch (drop what a padding sampler repeats)"
        require_unique([*ids.tolist(), *self._seen.among(ids)], rule)
        self._seen.add(ids)

    def _cast(self, values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
        try:
            with np.errstate(over="raise"):
                stored = values.astype(dtype, copy=False)
        except FloatingPointError as error:
            raise ValueError(f"'{name}' holds values beyond {dtype}: record with dtype float32") from error
        if dtype == np.float16 and not self._rounding_told and ((stored == 0) & (values != 0)).any():
            self._rounding_told = True
            warnings.warn(f"'{name}' holds values that float16 rounds to 0: record with dtype float32", stacklevel=4)
        return stored

    def _copy(self, batch: Block, rows: int) -> None:
        start = 0
        while start < rows:
            stop = min(rows, start + self._capacity - self._filled)
            for name, column in self._block.items():
                column[self._filled : self._filled + stop - start] = batch[name][start:stop]
            start, self._filled = stop, self._filled + stop - start
            if self._filled == self._capacity:
                self._hand_over()

    def _hand_over(self) -> None:
        """Give the filled block to the background threads, and continue with the spare block."""
        if self._filled:
            self._wait()
            block = {name: column[: self._filled] for name, column in self._block.items()}
            self._pending.append(self._measuring.submit(self._parts.measure, block))
            if self._manifest.has_samples:
                self._pending.append(self._writing.submit(self._parts.write, block))
            self._block, self._spare, self._filled = self._spare, self._block, 0

    def _wait(self) -> None:
        """Wait for the background threads, and raise any exception of theirs."""
        for each in self._pending:
            each.result()
        self._pending.clear()


class _Ids:
    """A set of integers with fast look-up, kept as sorted arrays, each more than twice as long as the next."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.int64]] = []

    def among(self, ids: NDArray[np.int64]) -> list[int]:
        """Return those of `ids` that were added before."""
        places = ((held, np.minimum(np.searchsorted(held, ids), len(held) - 1)) for held in self._arrays)
        return [int(each) for held, at in places for each in ids[held[at] == ids]]

    def add(self, ids: NDArray[np.int64]) -> None:
        """Add integers that differ from each other and from those added before."""
        ids = np.sort(ids)
        while self._arrays and len(self._arrays[-1]) <= 2 * len(ids):
            ids = np.sort(np.concatenate([self._arrays.pop(), ids]), kind="stable")
        if len(ids):
            self._arrays.append(ids)


def _as_columns(
    shapes: Mapping[str, tuple[int, ...]],
    sample_ids: ArrayLike,
    labels: ArrayLike | None,
    attention: Mapping[str, ArrayLike],
    squeeze: Mapping[str, ArrayLike] | None,
) -> Block:
    """Return a batch by column name; ValueError unless its columns and their row shapes are those of ``shapes``."""
    ids = _integers(sample_ids, np.int64, "sample ids")
    unknown = np.full(len(ids), UNKNOWN_LABEL)
    batch: Block = {"sample": ids, "label": _integers(unknown if labels is None else labels, np.int32, "labels")}
    for kind, vectors in zip(KINDS, (attention, squeeze or {}), strict=True):
        batch |= {f"{kind}:{gate}": np.asarray(values) for gate, values in vectors.items()}
    require(
        batch.keys() == shapes.keys(),
        f"the batch lacks {only(shapes, batch)} and brings unknown {only(batch, shapes)}: append every "
        "gate of the run, and squeeze only where the run records it",
    )
    for name, values in batch.items():
        expected = (len(ids), *shapes[name])
        require(
            values.shape == expected,
            f"'{name}' has shape {values.shape}; expected {expected}: give one row per sample id",
        )
    return batch


def _empty(field: pa.Field, rows: int) -> NDArray[Any]:
    """Allocate ``rows`` values of a column: (rows,) or (rows, channels)."""
    if pa.types.is_fixed_size_list(field.type):
        return np.empty((rows, field.type.list_size), field.type.value_type.to_pandas_dtype())
    return np.empty(rows, field.type.to_pandas_dtype())


def _integers(values: ArrayLike, dtype: type[np.signedinteger[Any]], what: str) -> NDArray[Any]:
    """Convert to a vector of ``dtype``; ValueError for other shapes, non-integers and numbers out of its range."""
    array = np.asarray(values)
    limits = np.iinfo(dtype)
    require(
        array.ndim == 1 and array.dtype.kind in "iu",
        f"{what} have shape {array.shape} and type {array.dtype}; expected integers of shape (samples,)",
    )
    require(
        not array.size or (limits.min <= array.min() and array.max() <= limits.max),
        f"{what} lie outside {limits.min} to {limits.max}",
    )
    return array.astype(dtype)
