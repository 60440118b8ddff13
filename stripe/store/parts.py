"""Parquet parts: row groups are encoded into staged files of bounded size, with a file of all rows' moments beside."""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stripe.messages import require
from stripe.store.directory import Directory
from stripe.store.manifest import MOMENTS_SUFFIX, NOTES, Manifest
from stripe.store.moments import MOMENTS_SCHEMA, to_table

if TYPE_CHECKING:
    from stripe.stats import GateMoments, Moments

PART_BYTES = 2**30
MAX_FOOTER_BYTES = 64 * 2**20  # far above any real footer; a larger one is damaged or hostile

Block = Mapping[str, NDArray[Any]]  # column -> (rows,) or (rows, channels)


class PartWriter:
    """Encodes a rank's rows of an epoch into staged parts, and measures them.

    One thread may call ``write`` while another calls ``measure``; neither may run during ``close``.

    A part has about ``PART_BYTES``. The moments of all rows go into a file beside the parts, whose name has
    MOMENTS_SUFFIX instead of a sequence number; in a run of moments they are the only part.
    """

    def __init__(self, directory: Directory, manifest: Manifest, name: str, step: int | None = None) -> None:
        """Write parts of the run that ``manifest`` describes, each staged as ``name`` plus a sequence number.

        ``step`` is the step of the epoch that the parts belong to.
        """
        self._directory, self._manifest, self._prefix = directory, manifest, name
        schema = manifest.arrow_schema
        self._schema = schema.with_metadata({**schema.metadata, NOTES: manifest.notes(step)})
        self._sequence = 0
        self._writer: pq.ParquetWriter | None = None
        self._measured = measuring(manifest)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Abandon a part that was not closed; its file is deleted with the rest of the epoch."""
        if self._writer:
            self._writer.is_open = False  # otherwise it would write a footer, now or when garbage-collected
            with suppress(OSError):
                self._sink.close()

    def write(self, block: Block) -> None:
        """Write rows, given by column, as one row group."""
        columns = [_to_arrow(field, block[field.name]) for field in self._schema]
        rows = pa.Table.from_arrays(columns, schema=self._schema)
        with self._directory.writing():
            self._writer = self._writer or self._open(self._name, self._schema)
            self._writer.write_table(rows, row_group_size=len(rows))
            if self._sink.tell() >= PART_BYTES:
                self._complete(self._writer, self._name)
                self._sequence += 1

    def measure(self, block: Block) -> None:
        """Add rows, given by column, to the moments."""
        measure(self._measured, self._manifest, block)

    def close(self) -> None:
        """Complete the open part, if there is one, write the moments of all rows, and sync both to the disk."""
        if self._measured.empty:
            return
        beside = f"{self._prefix}{MOMENTS_SUFFIX}", MOMENTS_SCHEMA
        name, schema = beside if self._manifest.has_samples else (self._name, self._schema)
        with self._directory.writing():
            if self._writer:
                self._complete(self._writer, self._name)
            self._writer = self._open(name, schema)
            self._writer.write_table(to_table(self._measured.moments(), schema))
            self._complete(self._writer, name)

    @property
    def _name(self) -> str:
        return f"{self._prefix}-{self._sequence:03d}"

    def _complete(self, writer: pq.ParquetWriter, name: str) -> None:
        writer.close()
        self._sink.close()
        self._directory.sync(name)
        self._writer = None

    def _open(self, name: str, schema: pa.Schema) -> pq.ParquetWriter:
        self._directory.files.create_dir(posixpath.dirname(name), recursive=True)
        self._sink = self._directory.files.open_output_stream(name)
        return parquet_writer(self._sink, schema)


def parquet_writer(sink: pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer that encodes tables of ``schema`` into ``sink``; moments are small, so they stay uncompressed."""
    vectors = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd" if vectors else "none",
        compression_level=1 if vectors else None,
        use_dictionary=False,
        # DuckDB does not read float16 in this encoding
        use_byte_stream_split=[f"{f.name}.list.element" for f in vectors if f.type.value_type == pa.float32()],
        write_statistics=["sample", "gate", "label"],
        write_page_checksum=True,
    )


def write_moments(directory: Directory, name: str, moments: Mapping[str, Moments]) -> int:
    """Write, by rename, the moments of an epoch whose parts are in place; return the CRC-32 of the file."""
    with directory.writing():
        directory.files.create_dir(posixpath.dirname(name), recursive=True)
    with (
        directory.replacing(name, staged=f"{name}.new") as sink,
        parquet_writer(sink, MOMENTS_SCHEMA) as writer,
    ):
        writer.write_table(to_table(moments))
    return checksum(directory, name)


def checksum(directory: Directory, name: str) -> int:
    """Return the CRC-32 of a file."""
    with directory.files.open_input_file(name) as stream:
        return zlib.crc32(stream.read_buffer())


def measuring(manifest: Manifest) -> GateMoments:
    """Return an empty accumulator for an epoch's rows.

    It keeps the means of all classes for "label-moments", of at most ``CLASSES`` classes for "samples", and of none
    for "moments".
    """
    from stripe.stats import CLASSES, GateMoments  # imported here because reading a run does not need it

    channels = {gate.name: gate.channels for gate in manifest.gates}
    classes = {"samples": CLASSES, "moments": 0, "label-moments": None}
    return GateMoments(channels, classes=classes[manifest.contents])


def measure(measured: GateMoments, manifest: Manifest, block: Block) -> None:
    """Add rows, given by column, to the accumulator ``measured``."""
    batch = {gate.name: block[f"attention:{gate.name}"] for gate in manifest.gates}
    measured.add(batch, block["sample"], block["label"])


def _to_arrow(field: pa.Field, values: NDArray[Any]) -> pa.Array:
    """Wrap a column as an Arrow array without copying it; negative labels become null."""
    if pa.types.is_fixed_size_list(field.type):
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values)), type=field.type)
    return pa.array(values, mask=values < 0 if field.nullable else None)


def read_footer(stream: pa.NativeFile) -> bytes:
    """Read a Parquet file's metadata and the eight bytes after it; ValueError if the stated length is implausible."""
    size = stream.size()
    require(size > 12, f"{size} bytes are no Parquet file")
    stream.seek(size - 8)
    length = int.from_bytes(stream.read(4), "little") + 8
    require(length < min(size, MAX_FOOTER_BYTES), f"a footer of {length} bytes")
    stream.seek(size - length)
    return bytes(stream.read(length))


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """Parse the bytes that ``read_footer`` returned."""
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
