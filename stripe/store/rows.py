"""Rows of an epoch on their way to the disk: whole, or as their moments alone; memory stays flat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from stripe.messages import only, require, require_unique
from stripe.store.manifest import KINDS, MOMENTS_SCHEMA, UNKNOWN_LABEL, Manifest
from stripe.store.parts import PartWriter

if TYPE_CHECKING:
    from stripe.stats import Moments

ROW_GROUP_BYTES = 8 * 2**20  # of values: recording holds two row groups in memory, reading holds one

Block = dict[str, NDArray[Any]]  # column -> (rows,) or (rows, channels)


class EpochWriter:
    """Takes the rows of an epoch; fills one row group while a background thread writes the one before."""

    def __init__(self, schema: pa.Schema, parts: PartWriter, thread: ThreadPoolExecutor) -> None:
        """Start without rows; ``RunWriter.epoch`` makes and finishes it."""
        self._parts, self._thread, self._schema = parts, thread, schema
        values = [field.type for field in schema if pa.types.is_fixed_size_list(field.type)]
        row_bytes = sum(kind.list_size * kind.value_type.bit_width // 8 for kind in values)
        self._capacity, self._filled = max(1, ROW_GROUP_BYTES // row_bytes), 0
        self._block, self._spare = ({field.name: _empty(field, self._capacity) for field in schema} for _ in range(2))
        self._seen: set[int] = set()
        self._pending: Future[None] | None = None

    def append(
        self,
        sample_ids: ArrayLike,
        labels: ArrayLike | None,
        attention: Mapping[str, ArrayLike],
        squeeze: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Append n rows: ids (n,), labels (n,) or None (negative: unknown), and per gate name an array (n, C).

        The values are copied, so the arrays may be used again. Raises ValueError for missing or unknown
        gates, wrong shapes and repeated sample ids; OSError when rows appended before could not be written.
        """
        shapes = {name: column.shape[1:] for name, column in self._block.items()}
        batch = _as_columns(shapes, sample_ids, labels, attention, squeeze)
        ids = batch["sample"]
        repeated = self._seen.intersection(ids.tolist())
        rule = "sample ids must differ within an epoch (drop what a padding sampler repeats)"
        require_unique([*ids.tolist(), *repeated], rule)
        self._seen.update(ids.tolist())
        self._copy(batch, rows=len(ids))

    def finish(self) -> None:
        """Wait until every row is on the disk."""
        self._hand_over()
        self._submit(self._parts.close)
        self._wait()

    def _copy(self, batch: Block, rows: int) -> None:
        start = 0
        while start < rows:
            stop = min(rows, start + self._capacity - self._filled)
            for name, column in self._block.items():
                column[self._filled : self._filled + stop - start] = _cast(batch[name][start:stop], column.dtype, name)
            start, self._filled = stop, self._filled + stop - start
            if self._filled == self._capacity:
                self._hand_over()

    def _hand_over(self) -> None:
        """Give the filled block to the background thread, and go on in the other one."""
        if self._filled:
            arrays = [_to_arrow(field, self._block[field.name][: self._filled]) for field in self._schema]
            self._submit(self._parts.write, pa.Table.from_arrays(arrays, schema=self._schema))
            self._block, self._spare, self._filled = self._spare, self._block, 0

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        self._wait()
        self._pending = self._thread.submit(task, *arguments)

    def _wait(self) -> None:
        """Wait for the background thread; what failed there is raised here."""
        if self._pending:
            self._pending.result()


class MomentsWriter:
    """Takes the rows of an epoch and keeps their moments alone: memory does not grow with the samples."""

    def __init__(self, manifest: Manifest, parts: PartWriter) -> None:
        """Start without rows; ``RunWriter.epoch`` makes and finishes it."""
        self._parts, self._by_label = parts, manifest.contents == "label-moments"
        self._shapes: dict[str, tuple[int, ...]] = {"sample": (), "label": ()}
        self._shapes |= {f"attention:{gate.name}": (gate.channels,) for gate in manifest.gates}
        self._moments: dict[str, Moments] = {}  # by gate
        self._counts: Counter[int] = Counter()  # by label
        # by gate, then label
        self._sums: dict[str, dict[int, NDArray[np.float64]]] = {gate.name: {} for gate in manifest.gates}

    def append(
        self,
        sample_ids: ArrayLike,
        labels: ArrayLike | None,
        attention: Mapping[str, ArrayLike],
        squeeze: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Take n rows as ``EpochWriter.append`` does; a sample that comes again in a later batch is not noticed.

        Raises ValueError for missing or unknown gates, wrong shapes, and by label for a sample without one.
        """
        batch = _as_columns(self._shapes, sample_ids, labels, attention, squeeze)
        known = batch["label"].min(initial=0) >= 0
        require(known or not self._by_label, "moments by label need a label for every sample: give labels from 0")
        for name in self._sums if len(batch["sample"]) else ():
            self._add(name, _cast(batch[f"attention:{name}"], np.dtype(np.float32), name), batch["label"])
        self._counts.update(batch["label"].tolist())

    def finish(self) -> None:
        """Write a row group for each gate, and wait until it is on the disk."""
        for gate, moments in self._moments.items():
            rows = [{"gate": gate} | {field.name: getattr(moments, field.name) for field in fields(moments)}]
            rows += [
                {"gate": gate, "label": label, "count": self._counts[label], "mean": total / self._counts[label]}
                for label, total in sorted(self._sums[gate].items())
            ]
            self._parts.write(pa.Table.from_pylist(rows, schema=MOMENTS_SCHEMA))
        self._parts.close()

    @np.errstate(invalid="ignore")  # values that are not finite
    def _add(self, gate: str, values: NDArray[np.float32], labels: NDArray[Any]) -> None:
        from stripe.stats import Moments

        moments = Moments.of(values)
        self._moments[gate] = self._moments[gate].merge(moments) if gate in self._moments else moments
        if self._by_label:
            found, starts = np.unique(np.sort(labels), return_index=True)
            totals = np.add.reduceat(values[np.argsort(labels)], starts, dtype=np.float64)
            for label, total in zip(found.tolist(), totals, strict=True):
                self._sums[gate][label] = self._sums[gate].get(label, 0.0) + total


def _as_columns(
    shapes: Mapping[str, tuple[int, ...]],
    sample_ids: ArrayLike,
    labels: ArrayLike | None,
    attention: Mapping[str, ArrayLike],
    squeeze: Mapping[str, ArrayLike] | None,
) -> Block:
    """Return a batch by column name, refusing other columns than those of ``shapes``, and other shapes of a row."""
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


Rows = EpochWriter | MomentsWriter


def _empty(field: pa.Field, rows: int) -> NDArray[Any]:
    """Make room for ``rows`` values of a column: (rows,) or (rows, channels)."""
    if pa.types.is_fixed_size_list(field.type):
        return np.empty((rows, field.type.list_size), field.type.value_type.to_pandas_dtype())
    return np.empty(rows, field.type.to_pandas_dtype())


def _to_arrow(field: pa.Field, values: NDArray[Any]) -> pa.Array:
    """Wrap a column without copying it; negative labels become null."""
    if pa.types.is_fixed_size_list(field.type):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type)
    return pa.array(values, mask=values < 0 if field.nullable else None)


def _cast(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    try:
        with np.errstate(over="raise"):
            return values.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise ValueError(f"'{name}' holds values beyond {dtype}: record with dtype float32") from error


def _integers(values: ArrayLike, dtype: type[np.signedinteger[Any]], what: str) -> NDArray[Any]:
    """Convert to a vector of ``dtype``, refusing other shapes, fractions and numbers beyond its range."""
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
