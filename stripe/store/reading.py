"""Reading a run: finished epochs as arrays, a row group at a time; what is damaged is named."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stripe.gate import Gate, Gates, name_of
from stripe.messages import listing, one_line, require
from stripe.store.directory import Directory, out_of_reach
from stripe.store.display import run_html
from stripe.store.manifest import KINDS, UNKNOWN_LABEL, Manifest, Part
from stripe.store.parts import parse_footer, read_footer

if TYPE_CHECKING:
    from stripe.stats import Moments


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a recorded run for reading; FileNotFoundError when there is none, ValueError for a damaged one."""
    return Run(Directory(path))


@dataclass(frozen=True, eq=False)
class LabelMeans:
    """The classes of an epoch's samples, ascending, (K,), how often each came, (K,), and its stripe, (K, C)."""

    labels: NDArray[np.int64]
    counts: NDArray[np.int64]
    means: NDArray[np.float64]


class Run:
    """A recorded run, read-only: its manifest's fields, and the values of its finished epochs as arrays.

    One that was recorded as moments (``has_samples`` is False) has ``moments`` and ``label_means`` alone.
    """

    def __init__(self, directory: Directory) -> None:
        """Read the manifest in ``directory``; use ``open_run``."""
        self._directory = directory
        self.path = directory.path
        self.manifest = directory.read_manifest()
        self.model = self.manifest.model
        self.data = self.manifest.data
        self.gates = Gates(self.manifest.gates)
        self.has_samples = self.manifest.has_samples
        self.has_label_means = self.manifest.contents == "label-moments"
        self.epochs = sorted(epoch.epoch for epoch in self.manifest.epochs)

    def __repr__(self) -> str:
        """Summarise the run in one line."""
        channels = sum(gate.channels for gate in self.gates)
        recorded = " and ".join(KINDS if self.manifest.squeeze else KINDS[:1]) if self.has_samples else "moments"
        what = f"{recorded} of {len(self.gates)} gates, {channels} channels; epochs {listing(self.epochs)}"
        return f"Run('{self.path}': {what})"

    def _repr_html_(self) -> str:
        return run_html(self.path, self.manifest)

    def read_text(self, name: str) -> str | None:
        """Return a file beside the manifest, such as metrics.csv or validation.json; None where there is none."""
        if not self._directory.holds(name):
            return None
        with self._directory.files.open_input_file(name) as stream:
            return str(stream.read(), encoding="utf-8")

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids (N,) in the order recorded, rank after rank."""
        return np.concatenate([table["sample"].to_numpy() for table in self._sample_tables(epoch, ["sample"])])

    def labels(self, epoch: int) -> NDArray[np.int64]:
        """Return the labels (N,); -1 where a label is unknown."""
        tables = self._sample_tables(epoch, ["label"])
        known = [table["label"].fill_null(UNKNOWN_LABEL).to_numpy() for table in tables]
        return np.concatenate(known).astype(np.int64)

    def attention(self, gate: Gate | str, epoch: int) -> NDArray[np.float32]:
        """Return the attention vectors of a gate, (N, C)."""
        return np.concatenate([batch[name_of(gate)] for batch in self.batches(epoch, [gate])])

    def squeeze(self, gate: Gate | str, epoch: int) -> NDArray[np.float32]:
        """Return what a gate scales, averaged over space, (N, C); ValueError when it was not recorded."""
        return np.concatenate([batch[name_of(gate)] for batch in self.batches(epoch, [gate], kind="squeeze")])

    def batches(
        self, epoch: int, gates: Sequence[Gate | str] | None = None, kind: str = "attention"
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Iterate over row groups, each gate name -> (n, C), read-only; memory stays at one row group.

        ``kind`` is attention or squeeze, ``gates`` all by default. ValueError lists the right names.
        """
        chosen = self._channels(gates)
        require(kind in KINDS, f"no kind '{kind}'; expected one of {listing(KINDS)}")
        require(
            kind != "squeeze" or self.manifest.squeeze,
            f"run '{self.path}' holds no squeeze: record it with --squeeze (squeeze=True)",
        )
        tables = self._sample_tables(epoch, [f"{kind}:{gate}" for gate in chosen])
        return ({gate: _to_numpy(table[f"{kind}:{gate}"], n) for gate, n in chosen.items()} for table in tables)

    def to_pandas(self, gate: Gate | str, epoch: int) -> pd.DataFrame:
        """Return a tidy frame, one row per sample and channel.

        Columns: epoch, gate, sample, label (missing where unknown), channel, attention and, when recorded, squeeze.
        """
        attention = self.attention(gate, epoch)
        samples, channels = attention.shape
        labels = np.repeat(self.labels(epoch), channels)
        columns = {
            "epoch": epoch,
            "gate": name_of(gate),
            "sample": np.repeat(self.samples(epoch), channels),
            "label": pd.arrays.IntegerArray(labels, labels == UNKNOWN_LABEL),
            "channel": np.tile(np.arange(channels), samples),
            "attention": attention.reshape(-1),
        }
        if self.manifest.squeeze:
            columns["squeeze"] = self.squeeze(gate, epoch).reshape(-1)
        return pd.DataFrame(columns)

    def moments(
        self, epochs: Sequence[int] | None = None, gates: Sequence[Gate | str] | None = None
    ) -> dict[tuple[int, str], Moments]:
        """Return count, mean, M2 and range of each epoch and gate, streamed from the samples where they are held."""
        from stripe.stats import Moments, moments  # a run can be read without it

        if self.has_samples:
            return moments(self, epochs, None if gates is None else [name_of(gate) for gate in gates])
        chosen, columns = self._channels(gates), [field.name for field in fields(Moments)]
        found: dict[tuple[int, str], Moments] = {}
        for epoch in self.epochs if epochs is None else epochs:
            for gate, table in self._gate_tables(epoch, columns):
                if gate in chosen:
                    part = Moments(**{name: _to_python(table[name][0]) for name in columns})
                    found[epoch, gate] = found[epoch, gate].merge(part) if (epoch, gate) in found else part
        return found

    def label_means(self, gate: Gate | str, epoch: int) -> LabelMeans:
        """Return the mean of each class, from a run recorded as label-moments; ValueError for another one."""
        require(
            self.has_label_means,
            f"run '{self.path}' holds no means by label: record it with --moments-only --by-label",
        )
        [(wanted, channels)] = self._channels([gate]).items()
        tables = [
            table.slice(1) for name, table in self._gate_tables(epoch, ["label", "count", "mean"]) if name == wanted
        ]
        rows = pa.concat_tables(tables)  # a class comes once from each rank
        labels, places = np.unique(rows["label"].to_numpy(), return_inverse=True)
        counts, means = np.zeros(len(labels), np.int64), np.zeros((len(labels), channels))
        np.add.at(counts, places, rows["count"].to_numpy())
        shares = rows["count"].to_numpy() / counts[places]
        parts = rows["mean"].combine_chunks().flatten().to_numpy().reshape(-1, channels)
        np.add.at(means, places, shares[:, None] * parts)
        return LabelMeans(labels.astype(np.int64), counts, means)

    def _channels(self, gates: Sequence[Gate | str] | None) -> dict[str, int]:
        """Return the channels of the gates asked for, by name; all by default."""
        channels = {gate.name: gate.channels for gate in self.gates}
        names = channels if gates is None else [name_of(gate) for gate in gates]
        for name in names:
            require(name in channels, f"run '{self.path}' has no gate '{name:.80}'; it has {listing(channels)}")
        return {name: channels[name] for name in names}

    def _gate_tables(self, epoch: int, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Iterate over the gates of an epoch of moments: the row of all samples, then those of the classes."""
        for table in self._tables(epoch, ["gate", *columns]):
            yield table["gate"][0].as_py(), table

    def _sample_tables(self, epoch: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        require(
            self.has_samples,
            f"run '{self.path}' holds moments only, no rows of samples: use moments(), or record it whole",
        )
        return self._tables(epoch, columns)

    def _tables(self, epoch: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Iterate over the row groups of an epoch; ValueError for an epoch that was not recorded."""
        parts = {found.epoch: found.parts for found in self.manifest.epochs}
        require(epoch in parts, f"run '{self.path}' has no epoch {epoch}; it has {listing(self.epochs)}")
        return (
            table for part in parts[epoch] for table in read_part(self._directory, self.manifest, epoch, part, columns)
        )


def read_part(
    directory: Directory, manifest: Manifest, epoch: int, part: Part, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Iterate over a part's row groups, all columns by default.

    FileNotFoundError for a part that is missing; ValueError for one cut, damaged, or not what the manifest says.
    """
    name = f"{manifest.folder(epoch)}/{part.name}"
    try:
        with directory.reading(), directory.files.open_input_file(name) as stream:
            require(stream.size() == part.bytes, f"{stream.size()} bytes; expected {part.bytes}")
            footer = read_footer(stream)
            require(part.footer in (None, zlib.crc32(footer)), "its footer differs from what was written")
            metadata = parse_footer(footer)
            require(metadata.num_rows == part.rows, f"{metadata.num_rows} rows; expected {part.rows}")
            file = pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True)
            require(file.schema_arrow.equals(manifest.arrow_schema), "other columns than the manifest's")
            for index in range(file.num_row_groups):
                table = file.read_row_group(index, columns)
                rows = metadata.row_group(index).num_rows
                require(table.num_rows == rows, f"{table.num_rows} rows in row group {index}; expected {rows}")
                table.validate()  # columns of the same length, vectors within what was read
                yield table
    except FileNotFoundError as error:
        message = f"run '{directory.path}' lacks {name}: open the run again, or record epoch {epoch} again"
        raise FileNotFoundError(message) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if out_of_reach(error):
            raise
        message = f"{name} is damaged ({one_line(error)}): record epoch {epoch} again with --overwrite"
        raise ValueError(f"run '{directory.path}': {message}") from error


def _to_numpy(column: pa.ChunkedArray, channels: int) -> NDArray[Any]:
    """View a column of vectors of one size as (rows, channels), copying only what Arrow split or float16 stored."""
    chunks = [
        chunk.values.slice(chunk.offset * channels, len(chunk) * channels).to_numpy().reshape(-1, channels)
        for chunk in column.chunks  # flatten() would look at every vector
    ]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values.astype(np.float32, copy=False) if values.dtype == np.float16 else values


def _to_python(scalar: pa.Scalar) -> Any:
    """Return a vector as an array (C,), a number as it is."""
    return scalar.values.to_numpy() if isinstance(scalar, pa.ListScalar) else scalar.as_py()
