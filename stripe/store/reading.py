"""Reading a run: finished epochs as arrays, one row group at a time; errors name the damaged file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from stripe.store.manifest import KINDS, UNKNOWN_LABEL, Epoch, Manifest, Part
from stripe.store.moments import MOMENTS_SCHEMA, from_table, merged
from stripe.store.parts import Block, measure, measuring, parse_footer, read_footer

if TYPE_CHECKING:
    from stripe.stats import Moments


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a recorded run for reading: a directory (~ is the user's home) or an address such as s3://BUCKET/RUN.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: the run's manifest is damaged.

    Example:
        >>> import stripe
        >>> run = stripe.open_run(stripe.load_example().path)
        >>> run.epochs
        [1, 2, 4, 8, 14, 20]
        >>> run.attention("layer1.0", epoch=20).shape
        (500, 64)
    """
    return Run(Directory(path))


class Run:
    """A recorded run, read-only: its manifest's fields, and the values of its finished epochs as arrays.

    A run that was recorded as moments (``has_samples`` is False) offers only ``moments``.

    Attributes:
        path: the run's directory or address.
        epochs: numbers of the finished epochs, ascending.
        gates: the recorded gates, in order of execution; they show themselves as a table.
        model: description of the network, such as create_model's arguments.
        data: description of the images: uri, split, size, mean, std.
        has_samples: whether the run holds a row for each sample.
        manifest: everything that run.json holds.
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
        self.epochs = sorted(epoch.epoch for epoch in self.manifest.epochs)

    @property
    def steps(self) -> dict[int, int]:
        """By epoch, the number of weight updates that the network had had, if the recording knew it."""
        return {epoch.epoch: epoch.step for epoch in self.manifest.epochs if epoch.step is not None}

    @property
    def keeps_moments(self) -> bool:
        """Whether the moments of all samples can be had without reading any rows."""
        return not self.has_samples or all(epoch.moments is not None for epoch in self.manifest.epochs)

    @property
    def mixed(self) -> str:
        """A sentence that says in what the epochs of a mixed run differ; "" for a run that is not mixed."""
        kinds = " and ".join({"network": "networks"}.get(kind, kind) for kind in self.manifest.mixed)
        return (
            f"Epochs of this run are of different {kinds}: do not read change over epochs as training." if kinds else ""
        )

    def __repr__(self) -> str:
        """Summarise the run in one line."""
        channels = sum(gate.channels for gate in self.gates)
        recorded = " and ".join(KINDS if self.manifest.squeeze else KINDS[:1]) if self.has_samples else "moments"
        what = f"{recorded} of {len(self.gates)} gates, {channels} channels; epochs {listing(self.epochs)}"
        return f"Run('{self.path}': {what})"

    def _repr_html_(self) -> str:
        return run_html(self.path, self.manifest)

    def read_text(self, name: str) -> str | None:
        """Return the text of a file beside the manifest, such as metrics.csv; None if there is no such file."""
        return self._directory.read_text(name)

    @property
    def files(self) -> dict[int, str]:
        """By sample id, the name of the sample's file, relative to the folder in `data`; empty if none were named.

        It leads from rows to their images: ``[run.files[sample] for sample in run.samples(epoch)[rows]]``.
        """
        return self._directory.read_files()

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids (N,) in the order they were recorded, one rank after another."""
        self._require_rows()
        return samples_of(self._directory, self.manifest, self._epoch(epoch))

    def labels(self, epoch: int) -> NDArray[np.int64]:
        """Return the labels (N,); -1 where a label is unknown."""
        tables = self._tables(epoch, ["label"])
        known = [table["label"].fill_null(UNKNOWN_LABEL).to_numpy() for table in tables]
        return np.concatenate(known).astype(np.int64)

    def attention(self, gate: Gate | str, epoch: int) -> NDArray[np.float32]:
        """Return the attention vectors of a gate, (N, C)."""
        return np.concatenate([batch[name_of(gate)] for batch in self.batches(epoch, [gate])])

    def squeeze(self, gate: Gate | str, epoch: int) -> NDArray[np.float32]:
        """Return what a gate scales, averaged over space, (N, C); ValueError if the run has no squeeze."""
        return np.concatenate([batch[name_of(gate)] for batch in self.batches(epoch, [gate], kind="squeeze")])

    def batches(
        self, epoch: int, gates: Sequence[Gate | str] | None = None, kind: str = "attention"
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Iterate over row groups, each a dict of gate name -> (n, C), read-only; one row group is in memory at a time.

        ``kind`` is "attention" or "squeeze"; ``gates`` are all by default. The ValueError for an unknown name lists
        the valid ones.
        """
        chosen = self._channels(gates)
        require(kind in KINDS, f"no kind '{kind}'; expected one of {listing(KINDS)}")
        require(
            kind != "squeeze" or self.manifest.squeeze,
            f"run '{self.path}' holds no squeeze: record it with --squeeze (squeeze=True)",
        )
        tables = self._tables(epoch, [f"{kind}:{gate}" for gate in chosen])
        return ({gate: _to_numpy(table[f"{kind}:{gate}"], n) for gate, n in chosen.items()} for table in tables)

    def to_pandas(self, gate: Gate | str, epoch: int) -> pd.DataFrame:
        """Return a tidy frame, one row per sample and channel.

        Columns: epoch, gate, sample, label (missing where unknown), channel, attention and, if recorded, squeeze.
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
        """Return the moments of each epoch and gate: those kept in the run, else measured from the rows."""
        chosen = self._channels(gates)
        found: dict[tuple[int, str], Moments] = {}
        for number in self.epochs if epochs is None else epochs:
            epoch = self._epoch(number)
            its = read_moments(self._directory, self.manifest, epoch)
            if its is None:
                its = measure_rows(self._directory, self.manifest, epoch, list(chosen))
            found |= {(number, gate): its[gate] for gate in chosen}
        return found

    def _channels(self, gates: Sequence[Gate | str] | None) -> dict[str, int]:
        """Return the number of channels of the given gates, by name; of all gates by default."""
        channels = {gate.name: gate.channels for gate in self.gates}
        names = channels if gates is None else [name_of(gate) for gate in gates]
        unknown = [name for name in names if name not in channels]
        require(not unknown, f"run '{self.path}' has no gate '{''.join(unknown[:1]):.80}'; it has {listing(channels)}")
        return {name: channels[name] for name in names}

    def _tables(self, epoch: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Iterate over the row groups of an epoch; ValueError if the run has no rows."""
        self._require_rows()
        return read_epoch(self._directory, self.manifest, self._epoch(epoch), columns)

    def _require_rows(self) -> None:
        require(
            self.has_samples,
            f"run '{self.path}' holds moments only, no rows of samples: use moments(), or record it whole",
        )

    def _epoch(self, number: int) -> Epoch:
        """Return the manifest's entry for an epoch; ValueError if the epoch was not recorded."""
        epochs = {epoch.epoch: epoch for epoch in self.manifest.epochs}
        require(number in epochs, f"run '{self.path}' has no epoch {number}; it has {listing(self.epochs)}")
        return epochs[number]


def read_part(
    directory: Directory, manifest: Manifest, epoch: int, part: Part, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Iterate over a part's row groups, all columns by default.

    Raises FileNotFoundError if the part is missing, and ValueError if it is truncated, damaged, or not as the manifest
    describes it.
    """
    name = f"{manifest.folder(epoch)}/{part.name}"
    with _damage_named(directory, name, f"record epoch {epoch} again with --overwrite"):
        with directory.reading(), directory.files.open_input_file(name) as stream:
            require(stream.size() == part.bytes, f"{stream.size()} bytes; expected {part.bytes}")
            metadata = _metadata(stream, part.footer)
            require(metadata.num_rows == part.rows, f"{metadata.num_rows} rows; expected {part.rows}")
            yield from _row_groups(stream, metadata, manifest.arrow_schema, columns)


def read_epoch(
    directory: Directory, manifest: Manifest, epoch: Epoch, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Iterate over the row groups of all parts of an epoch, as `read_part` does."""
    return (table for part in epoch.parts for table in read_part(directory, manifest, epoch.epoch, part, columns))


def samples_of(directory: Directory, manifest: Manifest, epoch: Epoch) -> NDArray[np.int64]:
    """Return the sample ids of an epoch, in the order they were recorded."""
    tables = read_epoch(directory, manifest, epoch, ["sample"])
    return np.concatenate([table["sample"].to_numpy() for table in tables])


def read_moments(directory: Directory, manifest: Manifest, epoch: Epoch) -> dict[str, Moments] | None:
    """Return the moments of an epoch's rows by gate; None if they were not kept or their file is gone.

    Raises ValueError if the file is truncated, damaged, or not as the manifest describes it.
    """
    if not manifest.has_samples:
        parts = (pa.concat_tables(read_part(directory, manifest, epoch.epoch, part)) for part in epoch.parts)
        return merged(from_table(part, _channels(manifest)) for part in parts)
    name = manifest.moments_file(epoch)
    if epoch.moments is None or not directory.holds(name):
        return None
    with _damage_named(directory, name, "rebuild it with `stripe check --repair`"):
        return read_moments_file(directory, manifest, name, epoch.moments)


def read_moments_file(
    directory: Directory, manifest: Manifest, name: str, crc: int | None = None
) -> dict[str, Moments]:
    """Return the moments in a file beside the rows, by gate; ValueError if its CRC-32 is not ``crc``."""
    with directory.reading(), directory.files.open_input_file(name) as stream:
        content = stream.read_buffer()
    require(crc in (None, zlib.crc32(content)), "it differs from what was written")
    file = pq.ParquetFile(pa.BufferReader(content))
    require(file.schema_arrow.equals(MOMENTS_SCHEMA), "other columns than those of moments")
    return from_table(file.read(), _channels(manifest))


def measure_rows(directory: Directory, manifest: Manifest, epoch: Epoch, gates: Sequence[str]) -> dict[str, Moments]:
    """Measure the moments of ``gates`` from an epoch's rows."""
    chosen = replace(manifest, gates=tuple(gate for gate in manifest.gates if gate.name in gates))
    measured = measuring(chosen)
    columns = ["sample", "label", *(f"attention:{gate.name}" for gate in chosen.gates)]
    for table in read_epoch(directory, manifest, epoch, columns):
        measure(measured, chosen, to_block(table, chosen))
    return measured.moments()


def _channels(manifest: Manifest) -> dict[str, int]:
    return {gate.name: gate.channels for gate in manifest.gates}


def to_block(table: pa.Table, manifest: Manifest) -> Block:
    """View a row group's samples, labels and attention as arrays."""
    block = {"sample": table["sample"].to_numpy(), "label": table["label"].fill_null(UNKNOWN_LABEL).to_numpy()}
    attention = {f"attention:{gate.name}": gate.channels for gate in manifest.gates}
    return block | {name: _to_numpy(table[name], channels) for name, channels in attention.items()}


def _metadata(stream: pa.NativeFile, footer_crc: int | None) -> pq.FileMetaData:
    footer = read_footer(stream)
    require(footer_crc in (None, zlib.crc32(footer)), "its footer differs from what was written")
    return parse_footer(footer)


def _row_groups(
    stream: pa.NativeFile, metadata: pq.FileMetaData, schema: pa.Schema, columns: Sequence[str] | None
) -> Iterator[pa.Table]:
    file = pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True)
    require(file.schema_arrow.equals(schema), "other columns than the manifest's")
    for index in range(file.num_row_groups):
        table = file.read_row_group(index, columns)
        rows = metadata.row_group(index).num_rows
        require(table.num_rows == rows, f"{table.num_rows} rows in row group {index}; expected {rows}")
        table.validate()  # checks that columns have one length and that vectors lie within the buffers read
        yield table


@contextmanager
def _damage_named(directory: Directory, name: str, remedy: str) -> Iterator[None]:
    """Turn the errors that a damaged file causes into a one-line ValueError that names the file and the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        message = f"run '{directory.path}' lacks {name}: open the run again, or {remedy}"
        raise FileNotFoundError(message) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if out_of_reach(error):
            raise
        raise ValueError(f"run '{directory.path}': {name} is damaged ({one_line(error)}): {remedy}") from error


def _to_numpy(column: pa.ChunkedArray, channels: int) -> NDArray[Any]:
    """View a column of fixed-size vectors as (rows, channels); it is copied only if Arrow split it or it is float16."""
    chunks = [
        chunk.values.slice(chunk.offset * channels, len(chunk) * channels).to_numpy().reshape(-1, channels)
        for chunk in column.chunks  # flatten() would visit every vector
    ]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values.astype(np.float32, copy=False) if values.dtype == np.float16 else values
