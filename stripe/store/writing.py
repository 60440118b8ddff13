"""Writing a run: an epoch is published whole, by one rename of the manifest, or not at all."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stripe.gate import Gate
from stripe.messages import listing, only, require, require_count
from stripe.store.directory import ROOTS, STAGING, Directory
from stripe.store.manifest import (
    CONTENTS,
    MANIFEST,
    MAX_COUNT,
    MOMENTS_SUFFIX,
    SCHEMA_VERSION,
    Epoch,
    Manifest,
    Part,
    epoch_name,
    rank_and_sequence,
)
from stripe.store.moments import merged
from stripe.store.parts import PartWriter, checksum, parse_footer, read_footer, write_moments
from stripe.store.reading import read_moments_file, samples_of
from stripe.store.rows import EpochWriter

DISTRIBUTIONS = ("stripe-observation", "torch", "torchvision", "timm", "numpy", "pyarrow")


class RunWriter:
    """Creates a run or continues an existing one; an epoch is recorded whole or not at all.

    Several processes write one run together when each passes its ``rank`` and a ``barrier`` that waits for
    all of them: rank 0 then publishes what every rank wrote.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        gates: Sequence[Gate],
        squeeze: bool = False,
        dtype: str = "float32",
        contents: str = CONTENTS[0],
        seeds: Mapping[str, Any] | None = None,
        files: Mapping[int, str] | None = None,
        overwrite: bool = False,
        allow_mixed: bool = False,
        rank: int = 0,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """Create the run at ``path``, or continue one that has the same gates, dtype, squeeze, contents and data.

        ``contents`` is one of CONTENTS; ``model``, ``data`` and ``seeds`` are plain JSON values; ``files`` maps each
        sample id to the name of its file, if samples are files; ``overwrite`` lets an epoch replace its earlier
        recording; ``allow_mixed`` lets epochs come from different networks (judged by ``model`` and ``seeds``) or
        from different samples, and the manifest records permanently that they do. Raises ValueError if the run on
        disk does not match, FileExistsError if the directory holds something other than a run, and BlockingIOError
        while another writer holds the run.
        """
        wanted = Manifest(
            schema=SCHEMA_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions_of(DISTRIBUTIONS),
            model=dict(model),
            data=dict(data),
            seeds=dict(seeds or {}),
            dtype=dtype,
            squeeze=squeeze,
            gates=tuple(gates),
            contents=contents,
        )
        wanted = Manifest.from_json(wanted.to_json())  # as a reader will see it
        self._directory = Directory(path)
        self._overwrite, self._allow_mixed, self._rank, self._barrier = overwrite, allow_mixed, rank, barrier
        with ExitStack() as held:
            if rank == 0:
                self._confirm = held.enter_context(self._directory.sole_writer())
                self._begin(wanted)
                self._directory.write_files(files or {})
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
        """Release the run, so that another process can write it."""
        self._held.close()

    @property
    def epochs(self) -> list[int]:
        """The finished epochs, ascending."""
        return sorted(epoch.epoch for epoch in self._manifest.epochs)

    @contextmanager
    def epoch(self, number: int, *, step: int | None = None) -> Iterator[EpochWriter]:
        """Record epoch ``number``: it is published when the block ends, and discarded when the block raises.

        ``step`` is the number of weight updates that the network has had, if known. The parts that overwrite an
        epoch get new names, and one rename of the manifest switches from the old parts to the new ones, so a crash
        leaves one or the other complete. Raises FileExistsError if the epoch is recorded already and ``overwrite``
        is off, and OSError if the disk is full.
        """
        require_count(number, 0, MAX_COUNT, "epoch")
        require_count(0 if step is None else step, 0, MAX_COUNT, f"step of epoch {number}")
        if number in self.epochs and not self._overwrite:
            raise FileExistsError(
                f"run '{self._directory.path}' holds epoch {number} already: pass --overwrite (overwrite=True) "
                "to replace it, or choose another run"
            )
        try:
            if self._rank == 0:
                self._directory.clear(number)
            self._barrier()
            staged = f"{STAGING}/{epoch_name(number)}/part-{self._rank:04d}"
            with (
                PartWriter(self._directory, self._manifest, staged, step) as parts,
                _thread() as writing,
                _thread() as measuring,
            ):
                rows = EpochWriter(self._manifest, parts, writing, measuring)
                yield rows
                rows.finish()
            self._barrier()
            if self._rank == 0:
                self._publish(number, step)
            self._barrier()
            self._manifest = self._directory.read_manifest()
        except BaseException:
            with suppress(OSError, ValueError):  # leftovers are cleared when the run is next opened for writing
                if self._rank == 0:
                    self._confirm()  # if another writer has taken over, the staged files may be its own
                    self._directory.clear(number)
            raise

    def _begin(self, wanted: Manifest) -> None:
        """Write the manifest of a new run, or check that this recording fits the existing run."""
        found = self._directory.read_manifest() if self._directory.holds(MANIFEST) else None
        if found and found.epochs:
            self._require_same(found, wanted)
            self._require_network(found, wanted)
            self._directory.clear()
        elif found or not (foreign := [name for name in ROOTS if self._directory.holds(name)]):
            self._directory.write_manifest(wanted)
        else:
            raise FileExistsError(
                f"'{self._directory.path}' has a folder {foreign[0]} but no {MANIFEST}, so it is no run: "
                "choose another directory"
            )

    def _require_same(self, found: Manifest, wanted: Manifest) -> None:
        run = f"run '{self._directory.path}'"
        for field in ("dtype", "squeeze", "contents", "data"):
            old, new = getattr(found, field), getattr(wanted, field)
            require(old == new, f"{run} has {field} {old}, this recording {new}: choose another run")
        old, new = ([f"{gate.name} ({gate.channels})" for gate in each.gates] for each in (found, wanted))
        require(
            set(old) == set(new),
            f"{run} has gates (channels) that this recording lacks: {only(old, new)}; and lacks: {only(new, old)}: "
            "choose another run",
        )

    def _require_network(self, found: Manifest, wanted: Manifest) -> None:
        """Refuse a network other than the run's, or, if mixing is allowed, note that the run holds several."""
        for field in ("model", "seeds"):
            old, new = getattr(found, field), getattr(wanted, field)
            if old and new and old != new:
                mixed = self._mixed(found, "network", f"{field} {old!s:.150}, this recording {new!s:.150}")
                self._directory.write_manifest(replace(found, mixed=mixed))
                return

    def _mixed(self, found: Manifest, kind: str, difference: str) -> tuple[str, ...]:
        """Return what the run mixes once ``kind`` is among it; ValueError unless mixing is allowed."""
        require(
            self._allow_mixed or kind in found.mixed,
            f"run '{self._directory.path}' is of one {'network' if kind == 'network' else 'list of samples'}, with "
            f"{difference}: choose another run, or record it all the same with --allow-mixed (allow_mixed=True)",
        )
        return tuple(sorted({*found.mixed, kind}))

    def _require_samples(self, current: Manifest, number: int, staged: Sequence[str]) -> Manifest:
        """Refuse samples other than those of the run's first other epoch, or, if mixing is allowed, note that."""
        others = [epoch for epoch in current.epochs if epoch.epoch != number]
        if not others or not current.has_samples:
            return current
        first = others[0]
        try:
            old = np.sort(samples_of(self._directory, current, first))
        except FileNotFoundError:  # a missing part cannot be compared; `stripe check` reports it
            return current
        new = np.sort(self._samples(staged))
        if np.array_equal(old, new):
            return current
        missing, added = len(np.setdiff1d(old, new)), len(np.setdiff1d(new, old))
        told = (
            f"{len(old)} samples in epoch {first.epoch}; epoch {number} lacks {missing} of them and brings {added} more"
        )
        return replace(current, mixed=self._mixed(current, "samples", told))

    def _samples(self, staged: Sequence[str]) -> NDArray[np.int64]:
        """Return the sample ids that the staged parts hold."""
        ids = []
        for path in staged:
            with self._directory.files.open_input_file(path) as stream:
                ids.append(pq.read_table(stream, columns=["sample"])["sample"].to_numpy())
        return np.concatenate(ids)

    def _publish(self, number: int, step: int | None) -> None:
        """Move the staged parts of all ranks into place, then commit them by naming them in the manifest."""
        staged = self._staged(number)
        require(staged, f"epoch {number} of run '{self._directory.path}' got no samples: append at least one batch")
        self._require_samples_once(staged)
        self._confirm()
        current = self._directory.read_manifest()  # another writer may have published epochs in the meantime
        self._require_same(current, self._manifest)
        current = self._require_samples(current, number, staged)
        epochs = {epoch.epoch: epoch for epoch in current.epochs}
        used = [rank_and_sequence(part.name)[1] for part in epochs[number].parts] if number in epochs else [-1]
        with self._directory.writing():
            parts = tuple(self._move_parts(staged, number, first=max(used) + 1))
            epochs[number] = self._with_moments(Epoch(number, parts, step))
        ascending = tuple(epochs[key] for key in sorted(epochs))
        self._directory.write_manifest(replace(current, epochs=ascending))
        self._directory.clear(number)

    def _staged(self, number: int) -> list[str]:
        """List the parts of an epoch that are written but not yet published, by rank and sequence."""
        infos = self._directory.files_in(f"{STAGING}/{epoch_name(number)}")
        return sorted((info.path for info in infos if not info.path.endswith(MOMENTS_SUFFIX)), key=rank_and_sequence)

    def _move_parts(self, staged: Sequence[str], number: int, first: int) -> Iterator[Part]:
        """Give staged parts their final names, numbered from ``first`` within each rank."""
        files, folder = self._directory.files, self._manifest.folder(number)
        files.create_dir(folder, recursive=True)
        for path in staged:
            rank, sequence = rank_and_sequence(path)
            name = f"part-{rank:04d}-{first + sequence:03d}.parquet"
            footer, size = self._footer(path)
            yield Part(name, parse_footer(footer).num_rows, size, zlib.crc32(footer))
            files.move(path, f"{folder}/{name}")
        self._directory.sync(folder, folder.partition("/")[0])

    def _with_moments(self, epoch: Epoch) -> Epoch:
        """Move the staged moments of an epoch's rows to their final name, merging those of several ranks."""
        infos = self._directory.files_in(f"{STAGING}/{epoch_name(epoch.epoch)}")
        staged = [info.path for info in infos if info.path.endswith(MOMENTS_SUFFIX)]
        if not staged:  # in a run of moments, the moments are the parts themselves
            return epoch
        target = self._manifest.moments_file(epoch)
        if len(staged) > 1:
            ranks = (read_moments_file(self._directory, self._manifest, path) for path in staged)
            return replace(epoch, moments=write_moments(self._directory, target, merged(ranks)))
        crc = checksum(self._directory, staged[0])
        self._directory.files.create_dir(posixpath.dirname(target), recursive=True)
        self._directory.files.move(staged[0], target)
        self._directory.sync(posixpath.dirname(target))
        return replace(epoch, moments=crc)

    def _footer(self, path: str) -> tuple[bytes, int]:
        """Return the footer and the size of a file."""
        with self._directory.files.open_input_file(path) as stream:
            return read_footer(stream), stream.size()

    def _require_samples_once(self, staged: Sequence[str]) -> None:
        """Refuse samples that two ranks recorded.

        Within a rank, ``append`` has refused repeated samples already. A run of moments keeps no sample ids to compare.
        """
        if not self._manifest.has_samples or len({rank_and_sequence(path)[0] for path in staged}) == 1:
            return
        values, times = np.unique(self._samples(staged), return_counts=True)
        repeated = values[times > 1].tolist()
        require(not repeated, f"two ranks recorded samples {listing(repeated)}: give each sample to one rank")


@contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """Provide an executor of one thread, which is joined at the end."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(int).result()  # a thread that is interrupted while it starts would otherwise never be joined
        yield thread


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of the named distributions, without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
