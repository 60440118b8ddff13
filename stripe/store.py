"""Runs on disk: attention as Parquet beside a manifest; a file is visible once whole, an epoch once named.

A run is a directory, or an object-storage prefix such as ``s3://bucket/run``::

    run.json                                    the manifest, the only word on what is finished
    attention/epoch=0012/part-0000-000.parquet  a row per sample: sample, label, attention:<gate>, squeeze:<gate>
    moments/epoch=0012/part-0000-000.parquet    instead, in a run of moments: a row per gate, then one per class
    .unfinished/                                what is being written; readers never look here
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from pyarrow import fs

if TYPE_CHECKING:
    from stripe.stats import Moments

SCHEMA_VERSION = 1
ROW_GROUP_BYTES = 4 * 2**20  # of values: recording holds two row groups in memory, reading holds one
PART_BYTES = 2**30
UNKNOWN_LABEL = -1
VALUE_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
KINDS = ("attention", "squeeze")
CONTENTS = ("samples", "moments", "label-moments")
"""What a run holds: a row per sample, or moments over samples alone, or these with the mean of every class."""

_MANIFEST = "run.json"
_STAGING = ".unfinished"
_FOLDERS = {"samples": "attention", "moments": "moments", "label-moments": "moments"}  # by contents
_ROOTS = sorted({*_FOLDERS.values()})
_LOCK = ".lock"
_PART_NAME = re.compile(r"part-([0-9]{4})-([0-9]{3,9})\.parquet")
_DISTRIBUTIONS = ("stripe-observation", "torch", "torchvision", "timm", "numpy", "pyarrow")
_MAX_MANIFEST_BYTES = 64 * 2**20  # this and the next two refuse a hostile manifest, far above any real one
_MAX_CHANNELS = 2**20
_MAX_COUNT = 2**50

_Block = dict[str, NDArray[Any]]  # column -> (rows,) or (rows, channels)


# ---- the manifest -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateColumn:
    """A recorded gate: its unique name, its number of channels, and where the network computes it."""

    name: str
    channels: int
    layout: str = "NCHW"
    form: str = "multiplicative"
    source: str | None = None
    site: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot name or size a column (ValueError)."""
        for text in (self.name, self.layout, self.form, self.source or "", self.site or ""):
            _require(type(text) is str and text.isprintable(), f"gate text {text!r:.80}: expected printable text")
        _require(0 < len(self.name) <= 1000, f"gate name {self.name!r:.80}: expected 1 to 1000 characters")
        _require_count(self.channels, 1, _MAX_CHANNELS, f"channels of gate '{self.name:.80}'")


@dataclass(frozen=True)
class Part:
    """A finished Parquet file: its name inside the epoch's folder, its rows and its size."""

    name: str
    rows: int
    bytes: int

    def __post_init__(self) -> None:
        """Refuse a name that could lead out of the folder, and sizes that are none (ValueError)."""
        _require(type(self.name) is str and _PART_NAME.fullmatch(self.name), f"unsafe part name {self.name!r:.80}")
        _require_count(self.rows, 1, _MAX_COUNT, f"rows of {self.name}")
        _require_count(self.bytes, 1, _MAX_COUNT, f"bytes of {self.name}")


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number, and its parts in the order they are read."""

    epoch: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Refuse a number that is no epoch, an epoch without parts, and a part named twice (ValueError)."""
        _require_count(self.epoch, 0, _MAX_COUNT, "epoch")
        _require(self.parts, f"epoch {self.epoch} has no parts")
        _require_unique((part.name for part in self.parts), "part names must differ")


@dataclass(frozen=True)
class Manifest:
    """Everything run.json says, field by field."""

    schema: int
    created: str
    versions: dict[str, str]
    model: dict[str, Any]
    data: dict[str, Any]
    seeds: dict[str, Any]
    dtype: str
    squeeze: bool
    gates: tuple[GateColumn, ...]
    contents: str = CONTENTS[0]
    epochs: tuple[Epoch, ...] = ()

    def __post_init__(self) -> None:
        """Refuse fields of the wrong type, unknown or unfit choices and repeated names (ValueError)."""
        _require_count(self.schema, SCHEMA_VERSION, SCHEMA_VERSION, "schema version")
        for field, kind in {"created": str, "squeeze": bool, "dtype": str, "contents": str}.items():
            _require(type(getattr(self, field)) is kind, f"'{field}': expected {kind.__name__}")
        for field in ("versions", "model", "data", "seeds"):
            _require(type(getattr(self, field)) is dict, f"'{field}': expected an object")
        _require(self.dtype in VALUE_TYPES, f"dtype '{self.dtype:.80}'; expected one of {_listing(VALUE_TYPES)}")
        _require(self.contents in CONTENTS, f"contents '{self.contents:.80}'; expected one of {_listing(CONTENTS)}")
        _require(
            self.has_samples or (self.dtype, self.squeeze) == ("float32", False),
            "moments are of float32 attention alone: leave out squeeze and dtype float16",
        )
        _require(self.gates, "no gates; expected at least one")
        _require_unique((gate.name for gate in self.gates), "gate names must differ")
        _require_unique((epoch.epoch for epoch in self.epochs), "epochs must differ")

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse run.json strictly: anything but a manifest of this version is a ValueError of one line."""
        try:
            record = json.loads(text)
            _require_count(record["schema"], SCHEMA_VERSION, SCHEMA_VERSION, "schema version")
            gates = tuple(GateColumn(**gate) for gate in record["gates"])
            epochs = tuple(
                Epoch(**{**epoch, "parts": tuple(Part(**part) for part in epoch["parts"])})
                for epoch in record["epochs"]
            )
            return cls(**{**record, "gates": gates, "epochs": epochs})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else _one_line(error)
            raise ValueError(
                f"{_MANIFEST} is not usable ({why}): restore it, upgrade stripe, or record anew"
            ) from error

    def to_json(self) -> str:
        """Write run.json; TypeError or ValueError for a description that is not plain JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @property
    def has_samples(self) -> bool:
        """Whether there is a row per sample."""
        return self.contents == CONTENTS[0]

    def folder(self, epoch: int) -> str:
        """Return where the parts of ``epoch`` lie."""
        return f"{_FOLDERS[self.contents]}/{_epoch_name(epoch)}"

    def arrow_schema(self) -> pa.Schema:
        """Return the columns of every part; the label is null where it is unknown, or stands for all samples."""
        if not self.has_samples:
            return _MOMENTS_SCHEMA
        value = pa.field("element", VALUE_TYPES[self.dtype], nullable=False)
        columns = [pa.field("sample", pa.int64(), nullable=False), pa.field("label", pa.int32())]
        for kind in KINDS if self.squeeze else KINDS[:1]:
            for gate in self.gates:
                vectors = pa.list_(value, gate.channels)
                columns.append(pa.field(f"{kind}:{gate.name}", vectors, nullable=False))
        return pa.schema(columns)


_MOMENTS_SCHEMA = pa.schema(
    [
        pa.field("gate", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", pa.list_(pa.float64()), nullable=False),
        *(pa.field(name, pa.list_(pa.float64())) for name in ("m2", "low", "high")),  # these and the next: null
        *(pa.field(name, pa.int64()) for name in ("near_bounds", "nonfinite")),  # in the row of a class
    ]
)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_count(value: object, low: int, high: int, what: str) -> None:
    _require(type(value) is int and low <= value <= high, f"{what}: {value!r:.80}; expected {low} to {high}")


def _require_unique(values: Iterable[object], rule: str) -> None:
    repeated = [value for value, times in Counter(values).items() if times > 1]
    _require(not repeated, f"{rule}, given twice: {_listing(repeated)}")


def _listing(names: Iterable[object]) -> str:
    texts = [f"{name!s:.80}" for name in names]
    more = f", ... ({len(texts)} in all)" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more if texts else "none"


def _only(first: Iterable[str], second: Iterable[str]) -> str:
    """List what only the first holds."""
    known = set(second)
    return _listing(name for name in first if name not in known)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- the directory ----------------------------------------------------------------------------------------


class _Directory:
    """A run's directory behind Arrow's file systems: local, or what a URI names. All paths are inside it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if "://" in self.path:
            base, root = fs.FileSystem.from_uri(self.path)
        else:
            base, root = fs.LocalFileSystem(), os.path.abspath(self.path)
        self.files = fs.SubTreeFileSystem(root, base)
        self._local_root = root if isinstance(base, fs.LocalFileSystem) else None

    def holds(self, name: str) -> bool:
        return bool(self.files.get_file_info(name).type != fs.FileType.NotFound)

    def sync(self, *names: str) -> None:
        """Push local files or folders to the disk, so that they survive a power cut."""
        if self._local_root is None:
            return
        for name in names:
            handle = os.open(os.path.join(self._local_root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failed write into an OSError of one line that names the run."""
        try:
            yield
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else _one_line(error)
            message = f"run '{self.path}' could not be written ({why}): make room or choose another directory"
            raise OSError(error.errno or errno.EIO, message) from error

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Make the directory and keep other writers off it; the kernel drops the lock of a dead process."""
        self.files.base_fs.create_dir(self.files.base_path, recursive=True)
        if self._local_root is None:
            yield
            return
        import fcntl  # writing needs POSIX, reading does not

        with open(os.path.join(self._local_root, _LOCK), "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"run '{self.path}' is being written already: wait for it, or choose another directory"
                raise BlockingIOError(message) from error
            try:
                yield
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it with forked children

    def read_manifest(self) -> Manifest:
        info = self.files.get_file_info(_MANIFEST)
        if info.type != fs.FileType.File:
            why = f"it holds no {_MANIFEST}" if self.holds("") else "no such directory"
            raise FileNotFoundError(f"'{self.path}' is not a run ({why}): pass the directory of a recording")
        try:
            _require_count(info.size, 0, _MAX_MANIFEST_BYTES, f"bytes of {_MANIFEST}")
            with self.files.open_input_file(_MANIFEST) as stream:
                return Manifest.from_json(stream.read())
        except ValueError as error:
            raise ValueError(f"run '{self.path}': {error}") from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace run.json by one rename, after everything it names is on the disk."""
        staged = f".{_MANIFEST}"
        with self.writing():
            with self.files.open_output_stream(staged) as stream:
                stream.write(manifest.to_json().encode())
            self.sync(staged)
            self.files.move(staged, _MANIFEST)
            self.sync("")

    def staged(self) -> list[str]:
        """List what has been written and not yet published, by rank and sequence."""
        infos = self.files.get_file_info(fs.FileSelector(_STAGING, allow_not_found=True))
        return sorted((info.path for info in infos), key=_rank_and_sequence)

    def clear(self, epoch: int) -> None:
        """Delete whatever is staged, and every part of ``epoch`` that the manifest does not name."""
        if self.holds(_STAGING):
            self.files.delete_dir(_STAGING)
        manifest = self.read_manifest()
        named = {f"{manifest.folder(found.epoch)}/{part.name}" for found in manifest.epochs for part in found.parts}
        for root in _ROOTS:
            folder = fs.FileSelector(f"{root}/{_epoch_name(epoch)}", allow_not_found=True)
            for info in self.files.get_file_info(folder):
                if _PART_NAME.fullmatch(info.base_name) and info.path not in named:
                    self.files.delete_file(info.path)


def _epoch_name(epoch: int) -> str:
    return f"epoch={epoch:04d}"


def _rank_and_sequence(part: str) -> tuple[int, int]:
    rank, sequence = part.removesuffix(".parquet").split("-")[-2:]
    return int(rank), int(sequence)


# ---- writing ----------------------------------------------------------------------------------------------


class RunWriter:
    """Opens a new run or continues one; an epoch is recorded whole or not at all.

    Several processes write one run together when each passes its ``rank`` and a ``barrier`` that waits for
    all of them: rank 0 then publishes what every rank wrote.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        gates: Sequence[GateColumn],
        squeeze: bool = False,
        dtype: str = "float32",
        contents: str = CONTENTS[0],
        seeds: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        rank: int = 0,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """Create the run at ``path``, or continue one that has the same gates, dtype, squeeze, contents and data.

        ``contents`` is one of CONTENTS; ``model``, ``data`` and ``seeds`` are plain JSON values; ``overwrite``
        lets an epoch replace its earlier recording. Raises ValueError where the run on disk differs,
        FileExistsError for a foreign directory, BlockingIOError while another writer has the run.
        """
        wanted = Manifest(
            schema=SCHEMA_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            model=dict(model),
            data=dict(data),
            seeds=dict(seeds or {}),
            dtype=dtype,
            squeeze=squeeze,
            gates=tuple(gates),
            contents=contents,
        )
        wanted = Manifest.from_json(wanted.to_json())  # as a reader will see it
        self._directory = _Directory(path)
        self._overwrite, self._rank, self._barrier = overwrite, rank, barrier
        with ExitStack() as held:
            if rank == 0:
                held.enter_context(self._directory.sole_writer())
                self._begin(wanted)
            barrier()
            self._manifest = self._directory.read_manifest()
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the writer."""
        self.close()

    def close(self) -> None:
        """Let another process write the run."""
        self._held.close()

    @property
    def epochs(self) -> list[int]:
        """The finished epochs, ascending."""
        return sorted(epoch.epoch for epoch in self._manifest.epochs)

    @contextmanager
    def epoch(self, number: int) -> Iterator[Rows]:
        """Record epoch ``number``: published when the block ends, gone without a trace when it raises.

        The parts of an overwritten epoch get new names and one rename of the manifest switches from old to
        new, so a crash leaves either. Raises FileExistsError for a recorded epoch, OSError for a full disk.
        """
        if number in self.epochs and not self._overwrite:
            raise FileExistsError(
                f"run '{self._directory.path}' holds epoch {number} already: pass --overwrite (overwrite=True) "
                "to replace it, or choose another run"
            )
        try:
            if self._rank == 0:
                self._directory.clear(number)
            self._barrier()
            schema = self._manifest.arrow_schema()
            with _PartWriter(self._directory, schema, self._rank) as parts, ThreadPoolExecutor(1) as thread:
                rows: Rows
                if self._manifest.has_samples:
                    rows = EpochWriter(schema, parts, thread)
                else:
                    rows = MomentsWriter(self._manifest, parts)
                yield rows
                rows.finish()
            self._barrier()
            if self._rank == 0:
                self._publish(number)
            self._barrier()
            self._manifest = self._directory.read_manifest()
        except BaseException:
            if self._rank == 0:
                self._directory.clear(number)
            raise

    def _begin(self, wanted: Manifest) -> None:
        """Write the manifest of a new run, or check that the recording fits the run that is there."""
        found = self._directory.read_manifest() if self._directory.holds(_MANIFEST) else None
        if found and found.epochs:
            self._require_same(found, wanted)
        elif found or not (foreign := [name for name in _ROOTS if self._directory.holds(name)]):
            self._directory.write_manifest(wanted)
        else:
            raise FileExistsError(
                f"'{self._directory.path}' has a folder {foreign[0]} but no {_MANIFEST}, so it is no run: "
                "choose another directory"
            )

    def _require_same(self, found: Manifest, wanted: Manifest) -> None:
        run = f"run '{self._directory.path}'"
        for field in ("dtype", "squeeze", "contents", "data"):
            old, new = getattr(found, field), getattr(wanted, field)
            _require(old == new, f"{run} has {field} {old}, this recording {new}: choose another run")
        old, new = ([f"{gate.name} ({gate.channels})" for gate in each.gates] for each in (found, wanted))
        _require(
            set(old) == set(new),
            f"{run} has gates (channels) that this recording lacks: {_only(old, new)}; and lacks: {_only(new, old)}: "
            "choose another run",
        )

    def _publish(self, number: int) -> None:
        """Move the staged parts of all ranks into place, then name them in the manifest: the commit."""
        staged = self._directory.staged()
        _require(staged, f"epoch {number} of run '{self._directory.path}' got no samples: append at least one batch")
        self._require_samples_once(staged)
        epochs = {epoch.epoch: epoch for epoch in self._manifest.epochs}
        used = [_rank_and_sequence(part.name)[1] for part in epochs[number].parts] if number in epochs else [-1]
        with self._directory.writing():
            epochs[number] = Epoch(number, tuple(self._move_parts(staged, number, first=max(used) + 1)))
        ascending = tuple(epochs[key] for key in sorted(epochs))
        self._directory.write_manifest(replace(self._manifest, epochs=ascending))
        self._directory.clear(number)

    def _move_parts(self, staged: Sequence[str], number: int, first: int) -> Iterator[Part]:
        """Give staged parts their final names, numbered from ``first`` within each rank."""
        files, folder = self._directory.files, self._manifest.folder(number)
        files.create_dir(folder, recursive=True)
        for path in staged:
            rank, sequence = _rank_and_sequence(path)
            name = f"part-{rank:04d}-{first + sequence:03d}.parquet"
            with files.open_input_file(path) as stream:
                yield Part(name, pq.read_metadata(stream).num_rows, stream.size())
            files.move(path, f"{folder}/{name}")
        self._directory.sync(folder, folder.partition("/")[0])

    def _require_samples_once(self, staged: Sequence[str]) -> None:
        """Refuse samples that two ranks recorded; within a rank, ``append`` did. Moments cannot tell."""
        if not self._manifest.has_samples or len({_rank_and_sequence(path)[0] for path in staged}) == 1:
            return
        ids = []
        for path in staged:
            with self._directory.files.open_input_file(path) as stream:
                ids.append(pq.read_table(stream, columns=["sample"])["sample"].to_numpy())
        values, times = np.unique(np.concatenate(ids), return_counts=True)
        repeated = values[times > 1].tolist()
        _require(not repeated, f"two ranks recorded samples {_listing(repeated)}: give each sample to one rank")


class EpochWriter:
    """Takes the rows of an epoch; fills one row group while a background thread writes the one before."""

    def __init__(self, schema: pa.Schema, parts: _PartWriter, thread: ThreadPoolExecutor) -> None:
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
        _require_unique([*ids.tolist(), *repeated], rule)
        self._seen.update(ids.tolist())
        self._copy(batch, rows=len(ids))

    def finish(self) -> None:
        """Wait until every row is on the disk."""
        self._hand_over()
        self._submit(self._parts.close)
        self._wait()

    def _copy(self, batch: _Block, rows: int) -> None:
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

    def __init__(self, manifest: Manifest, parts: _PartWriter) -> None:
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
        _require(known or not self._by_label, "moments by label need a label for every sample: give labels from 0")
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
            self._parts.write(pa.Table.from_pylist(rows, schema=_MOMENTS_SCHEMA))
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
) -> _Block:
    """Return a batch by column name, refusing other columns than those of ``shapes``, and other shapes of a row."""
    ids = _integers(sample_ids, np.int64, "sample ids")
    unknown = np.full(len(ids), UNKNOWN_LABEL)
    batch: _Block = {"sample": ids, "label": _integers(unknown if labels is None else labels, np.int32, "labels")}
    for kind, vectors in zip(KINDS, (attention, squeeze or {}), strict=True):
        batch |= {f"{kind}:{gate}": np.asarray(values) for gate, values in vectors.items()}
    _require(
        batch.keys() == shapes.keys(),
        f"the batch lacks {_only(shapes, batch)} and brings unknown {_only(batch, shapes)}: append every "
        "gate of the run, and squeeze only where the run records it",
    )
    for name, values in batch.items():
        expected = (len(ids), *shapes[name])
        _require(
            values.shape == expected,
            f"'{name}' has shape {values.shape}; expected {expected}: give one row per sample id",
        )
    return batch


Rows = EpochWriter | MomentsWriter


class _PartWriter:
    """Encodes row groups into staged parts of about ``PART_BYTES``; used by one thread at a time."""

    def __init__(self, directory: _Directory, schema: pa.Schema, rank: int) -> None:
        self._directory, self._schema, self._rank = directory, schema, rank
        self._sequence = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
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
        self._name = f"{_STAGING}/part-{self._rank:04d}-{self._sequence:03d}"
        self._directory.files.create_dir(_STAGING, recursive=True)
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
    _require(
        array.ndim == 1 and array.dtype.kind in "iu",
        f"{what} have shape {array.shape} and type {array.dtype}; expected integers of shape (samples,)",
    )
    _require(
        not array.size or (limits.min <= array.min() and array.max() <= limits.max),
        f"{what} lie outside {limits.min} to {limits.max}",
    )
    return array.astype(dtype)


# ---- reading ----------------------------------------------------------------------------------------------


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a recorded run for reading; FileNotFoundError when there is none, ValueError for a damaged one."""
    return Run(_Directory(path))


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

    def __init__(self, directory: _Directory) -> None:
        """Read the manifest in ``directory``; use ``open_run``."""
        self._directory = directory
        self.path = directory.path
        self.manifest = directory.read_manifest()
        self.model = self.manifest.model
        self.data = self.manifest.data
        self.gates = list(self.manifest.gates)
        self.has_samples = self.manifest.has_samples
        self.has_label_means = self.manifest.contents == "label-moments"
        self.epochs = sorted(epoch.epoch for epoch in self.manifest.epochs)

    def __repr__(self) -> str:
        """Summarise the run in one line."""
        channels = sum(gate.channels for gate in self.gates)
        recorded = " and ".join(KINDS if self.manifest.squeeze else KINDS[:1]) if self.has_samples else "moments"
        what = f"{recorded} of {len(self.gates)} gates, {channels} channels; epochs {_listing(self.epochs)}"
        return f"Run('{self.path}': {what})"

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids (N,) in the order recorded, rank after rank."""
        return np.concatenate([table["sample"].to_numpy() for table in self._sample_tables(epoch, ["sample"])])

    def labels(self, epoch: int) -> NDArray[np.int64]:
        """Return the labels (N,); -1 where a label is unknown."""
        tables = self._sample_tables(epoch, ["label"])
        known = [table["label"].fill_null(UNKNOWN_LABEL).to_numpy() for table in tables]
        return np.concatenate(known).astype(np.int64)

    def attention(self, gate: str, epoch: int) -> NDArray[np.float32]:
        """Return the attention vectors of a gate, (N, C)."""
        return np.concatenate([batch[gate] for batch in self.batches(epoch, [gate])])

    def squeeze(self, gate: str, epoch: int) -> NDArray[np.float32]:
        """Return what a gate scales, averaged over space, (N, C); ValueError when it was not recorded."""
        return np.concatenate([batch[gate] for batch in self.batches(epoch, [gate], kind="squeeze")])

    def batches(
        self, epoch: int, gates: Sequence[str] | None = None, kind: str = "attention"
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Iterate over row groups, each gate name -> (n, C), read-only; memory stays at one row group.

        ``kind`` is attention or squeeze, ``gates`` all by default. ValueError lists the right names.
        """
        chosen = self._channels(gates)
        _require(kind in KINDS, f"no kind '{kind}'; expected one of {_listing(KINDS)}")
        _require(
            kind != "squeeze" or self.manifest.squeeze,
            f"run '{self.path}' holds no squeeze: record it with --squeeze (squeeze=True)",
        )
        tables = self._sample_tables(epoch, [f"{kind}:{gate}" for gate in chosen])
        return ({gate: _to_numpy(table[f"{kind}:{gate}"], n) for gate, n in chosen.items()} for table in tables)

    def to_pandas(self, gate: str, epoch: int) -> pd.DataFrame:
        """Return a tidy frame, one row per sample and channel.

        Columns: epoch, gate, sample, label (missing where unknown), channel, attention and, when recorded, squeeze.
        """
        attention = self.attention(gate, epoch)
        samples, channels = attention.shape
        labels = np.repeat(self.labels(epoch), channels)
        columns = {
            "epoch": epoch,
            "gate": gate,
            "sample": np.repeat(self.samples(epoch), channels),
            "label": pd.arrays.IntegerArray(labels, labels == UNKNOWN_LABEL),
            "channel": np.tile(np.arange(channels), samples),
            "attention": attention.reshape(-1),
        }
        if self.manifest.squeeze:
            columns["squeeze"] = self.squeeze(gate, epoch).reshape(-1)
        return pd.DataFrame(columns)

    def moments(
        self, epochs: Sequence[int] | None = None, gates: Sequence[str] | None = None
    ) -> dict[tuple[int, str], Moments]:
        """Return count, mean, M2 and range of each epoch and gate, streamed from the samples where they are held."""
        from stripe.stats import Moments, moments  # a run can be read without it

        if self.has_samples:
            return moments(self, epochs, gates)
        chosen, columns = self._channels(gates), [field.name for field in fields(Moments)]
        found: dict[tuple[int, str], Moments] = {}
        for epoch in self.epochs if epochs is None else epochs:
            for gate, table in self._gate_tables(epoch, columns):
                if gate in chosen:
                    part = Moments(**{name: _to_python(table[name][0]) for name in columns})
                    found[epoch, gate] = found[epoch, gate].merge(part) if (epoch, gate) in found else part
        return found

    def label_means(self, gate: str, epoch: int) -> LabelMeans:
        """Return the mean of each class, from a run recorded as label-moments; ValueError for another one."""
        _require(
            self.has_label_means,
            f"run '{self.path}' holds no means by label: record it with --moments-only --by-label",
        )
        [channels] = self._channels([gate]).values()
        tables = [
            table.slice(1) for name, table in self._gate_tables(epoch, ["label", "count", "mean"]) if name == gate
        ]
        rows = pa.concat_tables(tables)  # a class comes once from each rank
        labels, places = np.unique(rows["label"].to_numpy(), return_inverse=True)
        counts, means = np.zeros(len(labels), np.int64), np.zeros((len(labels), channels))
        np.add.at(counts, places, rows["count"].to_numpy())
        shares = rows["count"].to_numpy() / counts[places]
        np.add.at(means, places, shares[:, None] * _to_numpy(rows["mean"], channels))
        return LabelMeans(labels.astype(np.int64), counts, means)

    def _channels(self, gates: Sequence[str] | None) -> dict[str, int]:
        """Return the channels of the gates asked for, by name; all by default."""
        channels = {gate.name: gate.channels for gate in self.gates}
        for gate in gates or ():
            _require(gate in channels, f"run '{self.path}' has no gate '{gate}'; it has {_listing(channels)}")
        return channels if gates is None else {gate: channels[gate] for gate in gates}

    def _gate_tables(self, epoch: int, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Iterate over the gates of an epoch of moments: the row of all samples, then those of the classes."""
        for table in self._tables(epoch, ["gate", *columns]):
            yield table["gate"][0].as_py(), table

    def _sample_tables(self, epoch: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        _require(
            self.has_samples,
            f"run '{self.path}' holds moments only, no rows of samples: use moments(), or record it whole",
        )
        return self._tables(epoch, columns)

    def _tables(self, epoch: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Iterate over the row groups of an epoch; ValueError for an epoch that was not recorded."""
        parts = {found.epoch: found.parts for found in self.manifest.epochs}
        _require(epoch in parts, f"run '{self.path}' has no epoch {epoch}; it has {_listing(self.epochs)}")
        return (table for part in parts[epoch] for table in self._row_groups(epoch, part, columns))

    def _row_groups(self, epoch: int, part: Part, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Read a part, refusing one that is missing, cut, damaged, or not what the manifest says."""
        name = f"{self.manifest.folder(epoch)}/{part.name}"
        try:
            with self._directory.files.open_input_file(name) as stream:
                _require(stream.size() == part.bytes, f"{stream.size()} bytes; expected {part.bytes}")
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                _require(file.metadata.num_rows == part.rows, f"{file.metadata.num_rows} rows; expected {part.rows}")
                _require(file.schema_arrow.equals(self.manifest.arrow_schema()), "other columns than the manifest's")
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns)
        except FileNotFoundError as error:
            message = f"run '{self.path}' lacks {name}: open the run again, or record epoch {epoch} again"
            raise FileNotFoundError(message) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            message = f"{name} is damaged ({_one_line(error)}): record epoch {epoch} again with --overwrite"
            raise ValueError(f"run '{self.path}': {message}") from error


def _to_numpy(column: pa.ChunkedArray, channels: int) -> NDArray[Any]:
    """View a column of vectors as (rows, channels), copying only what Arrow split or float16 stored."""
    chunks = [chunk.flatten().to_numpy().reshape(-1, channels) for chunk in column.chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values.astype(np.float32, copy=False) if values.dtype == np.float16 else values


def _to_python(scalar: pa.Scalar) -> Any:
    """Return a vector as an array (C,), a number as it is."""
    return scalar.values.to_numpy() if isinstance(scalar, pa.ListScalar) else scalar.as_py()
