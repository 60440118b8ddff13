"""Parquet parts: row groups are encoded into staged files of bounded size."""

from __future__ import annotations

import posixpath
from contextlib import suppress
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from stripe.messages import require
from stripe.store.directory import Directory

PART_BYTES = 2**30
MAX_FOOTER_BYTES = 64 * 2**20  # refuses a damaged or hostile length, far above any real one


class PartWriter:
    """Encodes row groups into staged parts of about ``PART_BYTES``; used by one thread at a time."""

    def __init__(self, directory: Directory, schema: pa.Schema, name: str) -> None:
        """Write parts with the columns of ``schema``, each staged as ``name`` and a sequence number."""
        self._directory, self._schema, self._prefix = directory, schema, name
        self._sequence = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Abandon a part that was not closed; its file is cleared with the epoch."""
        if self._writer:
            self._writer.is_open = False  # or it would write a footer, now or when collected
            with suppress(OSError):
                self._sink.close()

    def write(self, rows: pa.Table) -> None:
        """Write rows as a row group."""
        with self._directory.writing():
            writer = self._writer or self._open()
            writer.write_table(rows, row_group_size=len(rows))
        if self._sink.tell() >= PART_BYTES:
            self.close()

    def close(self) -> None:
        """Complete the open part, if there is one, and push it to the disk."""
        if self._writer:
            with self._directory.writing():
                self._writer.close()
                self._sink.close()
                self._directory.sync(self._name)
            self._writer, self._sequence = None, self._sequence + 1

    def _open(self) -> pq.ParquetWriter:
        self._name = f"{self._prefix}-{self._sequence:03d}"
        self._directory.files.create_dir(posixpath.dirname(self._name), recursive=True)
        self._sink = self._directory.files.open_output_stream(self._name)
        vectors = [field for field in self._schema if pa.types.is_fixed_size_list(field.type)]
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            # DuckDB does not read float16 in this encoding
            use_byte_stream_split=[f"{f.name}.list.element" for f in vectors if f.type.value_type == pa.float32()],
            write_statistics=["sample", "gate", "label"],
            write_page_checksum=True,
        )
        return self._writer


def read_footer(stream: pa.NativeFile) -> bytes:
    """Read a Parquet file's metadata with the eight bytes that end it; ValueError when the length makes no sense."""
    size = stream.size()
    require(size > 12, f"{size} bytes are no Parquet file")
    stream.seek(size - 8)
    length = int.from_bytes(stream.read(4), "little") + 8
    require(length < min(size, MAX_FOOTER_BYTES), f"a footer of {length} bytes")
    stream.seek(size - length)
    return bytes(stream.read(length))


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """Parse what ``read_footer`` returned."""
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
