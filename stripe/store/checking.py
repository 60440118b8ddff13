"""Checking and repairing a run, epoch by epoch; a repair sets parts aside and deletes none that was published."""

from __future__ import annotations

import json
import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from stripe.messages import listing, one_line, require
from stripe.store.directory import ROOTS, Directory, out_of_reach
from stripe.store.manifest import (
    MANIFEST,
    NOTES,
    ORIGIN,
    PART_NAME,
    SCHEMA_VERSION,
    Epoch,
    Manifest,
    Part,
    epoch_number,
    rank_and_sequence,
    read_notes,
)
from stripe.store.parts import checksum, measure, measuring, parse_footer, read_footer, write_moments
from stripe.store.reading import measure_rows, read_epoch, read_moments, samples_of, to_block

if TYPE_CHECKING:
    from stripe.stats import Moments

DAMAGED = ".damaged"


@dataclass(frozen=True)
class EpochCheck:
    """The result of checking an epoch: if ``problem`` is None, all its values are readable and as they were written.

    ``moments`` describes the moments kept beside the rows: "whole" if they agree with the rows, "none" if there are
    none, as in runs of early versions, and otherwise what is wrong with them. They can be rebuilt from whole rows.
    """

    epoch: int
    parts: int
    rows: int
    bytes: int
    problem: str | None
    moments: str = "whole"

    @property
    def whole(self) -> bool:
        """Whether the rows, and the moments if there are any, can be relied on."""
        return self.problem is None and self.moments in ("whole", "none")


@dataclass(frozen=True)
class RunCheck:
    """The result of checking a run.

    Attributes:
        path: the run's directory or address.
        problem: what is wrong with run.json, or None; if it is damaged, ``epochs`` are those that can be rebuilt.
        epochs: the finished epochs, ascending.
        interrupted: epochs whose recording is under way or was interrupted; they are not part of the run.
        unnamed: parts that belong to no finished epoch.
    """

    path: str
    problem: str | None
    epochs: tuple[EpochCheck, ...]
    interrupted: tuple[int, ...]
    unnamed: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether run.json and every finished epoch are whole."""
        return self.problem is None and all(epoch.whole for epoch in self.epochs)


def check_run(path: str | os.PathLike[str]) -> RunCheck:
    """Check every byte of a run; FileNotFoundError if there is no run, ValueError if a newer version wrote it."""
    return _check(Directory(path))[0]


def repair_run(path: str | os.PathLike[str]) -> RunCheck:
    """Make a run whole again and return the check of what is left; repeating it, also after a crash, is safe.

    Damaged epochs are removed from the manifest, which is rebuilt from the parts if it cannot be read. Moments that
    are missing, damaged or at odds with the rows beside them are measured anew from the rows. Parts that no epoch
    names, and an unreadable run.json, are moved to ``.damaged/``; what an interrupted recording staged is deleted.
    Raises what ``check_run`` raises, BlockingIOError while the run is being written, and ValueError if run.json
    cannot be read and no part is readable either.
    """
    directory = Directory(path)
    _check(directory)  # raises before anything is created
    with directory.sole_writer():
        check, manifest = _check(directory)
        if manifest is None:
            raise ValueError(f"{check.problem}; it cannot be rebuilt either: no readable part is left")
        with directory.writing():
            if not check.whole or any(epoch.moments != "whole" for epoch in check.epochs):
                if check.problem and directory.holds(MANIFEST):
                    _set_aside(directory, MANIFEST, keep=True)
                manifest = _of_whole_epochs(directory, manifest, check)
                if check.problem:
                    manifest = _with_mixed_samples(directory, manifest)
                directory.write_manifest(manifest)
            for name in directory.unnamed(manifest):
                _set_aside(directory, name)
            directory.clear()
        return _check(directory)[0]


def _of_whole_epochs(directory: Directory, manifest: Manifest, check: RunCheck) -> Manifest:
    """Measure anew the moments that cannot be relied on, and return the manifest without the damaged epochs."""
    whole = {epoch.epoch: epoch.moments == "whole" for epoch in check.epochs if not epoch.problem}
    epochs = (each for each in manifest.epochs if each.epoch in whole)
    kept = (each if whole[each.epoch] else _with_moments(directory, manifest, each) for each in epochs)
    return replace(manifest, epochs=tuple(kept))


def _with_mixed_samples(directory: Directory, manifest: Manifest) -> Manifest:
    """Return a rebuilt manifest, marked as mixed if the rows show that its epochs are of different samples."""
    if not manifest.has_samples:
        return manifest
    samples = [np.sort(samples_of(directory, manifest, epoch)) for epoch in manifest.epochs]
    if all(np.array_equal(samples[0], others) for others in samples):
        return manifest
    return replace(manifest, mixed=tuple(sorted({*manifest.mixed, "samples"})))


def _check(directory: Directory) -> tuple[RunCheck, Manifest | None]:
    """Return the check and the manifest; one that cannot be read is rebuilt, or None if no part can be read."""
    problem, manifest = None, None
    try:
        manifest = directory.read_manifest()
    except (FileNotFoundError, ValueError) as error:
        _refuse_newer(directory)
        problem, manifest = one_line(error), _rebuilt(directory)
        if manifest is None and isinstance(error, FileNotFoundError):
            raise
    epochs, unnamed = [], []
    if manifest:
        epochs = [_check_epoch(directory, manifest, each) for each in sorted(manifest.epochs, key=lambda e: e.epoch)]
        unnamed = directory.unnamed(manifest)
    interrupted = tuple(sorted(directory.interrupted()))
    return RunCheck(directory.path, problem, tuple(epochs), interrupted, tuple(unnamed)), manifest


def _check_epoch(directory: Directory, manifest: Manifest, epoch: Epoch) -> EpochCheck:
    rows, size = (sum(getattr(part, field) for part in epoch.parts) for field in ("rows", "bytes"))
    found = EpochCheck(epoch.epoch, len(epoch.parts), rows, size, None)
    try:
        if not manifest.has_samples:
            read_moments(directory, manifest, epoch)
            return found
        samples, measured = [], measuring(manifest)
        for table in read_epoch(directory, manifest, epoch):
            samples.append(table["sample"].to_numpy())
            measure(measured, manifest, to_block(table, manifest))
        values, times = np.unique(np.concatenate(samples), return_counts=True)
        require((times == 1).all(), f"samples come twice: {listing(values[times > 1].tolist())}")
    except (FileNotFoundError, ValueError) as error:
        return replace(found, problem=one_line(error))
    return replace(found, moments=_compared(directory, manifest, epoch, measured.moments()))


def _compared(directory: Directory, manifest: Manifest, epoch: Epoch, measured: Mapping[str, Moments]) -> str:
    """Return `EpochCheck.moments` of an epoch by comparing its kept moments with those ``measured`` from its rows."""
    name = manifest.moments_file(epoch)
    try:
        kept = read_moments(directory, manifest, epoch)
    except ValueError as error:
        return one_line(error)
    if kept is None:
        lost = f"{name} is missing: rebuild it with `stripe check --repair`"
        return "none" if epoch.moments is None else lost
    other = next((gate for gate, its in measured.items() if not its.is_close(kept[gate])), None)
    return f"{name} is not of the rows of epoch {epoch.epoch}, as gate '{other}' shows" if other else "whole"


# ---- rebuilding -------------------------------------------------------------------------------------------


def _refuse_newer(directory: Directory) -> None:
    """Refuse a run that a newer version of stripe wrote (ValueError)."""
    try:
        with directory.files.open_input_file(MANIFEST) as stream:
            schema = json.loads(stream.read())["schema"]
    except (FileNotFoundError, ValueError, RecursionError, TypeError, LookupError):
        return
    newer = type(schema) is int and schema > SCHEMA_VERSION
    require(not newer, f"run '{directory.path}' has schema version {schema}; expected {SCHEMA_VERSION}: upgrade stripe")


def _rebuilt(directory: Directory) -> Manifest | None:
    """Rebuild the manifest from the parts of all epochs except the interrupted ones; None if no part can be read.

    It cannot be known whether an epoch had further parts of which no trace is left.
    """
    infos = [info for root in ROOTS for info in directory.files_in(root) if PART_NAME.fullmatch(info.base_name)]
    described = [(info, *_describe(directory, info)) for info in infos]
    origins = Counter(origin for _, origin, _, _ in described if origin)
    if not origins:
        return None
    [(common, _)] = origins.most_common(1)
    manifest, interrupted = Manifest.from_json(common), directory.interrupted()
    parts: dict[int, list[Part]] = {}
    steps: dict[int, int] = {}
    mixed: set[str] = set()
    for info, origin, part, notes in described:
        number = epoch_number(info.path)
        if origin in (None, common) and number is not None and info.path == f"{manifest.folder(number)}/{part.name}":
            parts.setdefault(number, []).append(part)
            steps |= {} if notes.get("step") is None else {number: notes["step"]}
            mixed.update(notes.get("mixed", ()))
    finished = sorted(parts.keys() - interrupted)
    whole = (Epoch(number, tuple(_with_gaps(parts[number])), steps.get(number)) for number in finished)
    epochs = [replace(epoch, moments=_moments_crc(directory, manifest, epoch)) for epoch in whole]
    created = min(info.mtime for info in infos).astimezone(UTC).isoformat(timespec="seconds")
    return replace(manifest, created=created, epochs=tuple(epochs), mixed=tuple(sorted(mixed)))


def _describe(directory: Directory, info: fs.FileInfo) -> tuple[str | None, Part, dict[str, Any]]:
    """Return the origin in a part's metadata, the part as a manifest describes it, and the notes in its metadata.

    The origin is None if the footer is unreadable; parts of early versions have no notes.
    """
    try:
        with directory.reading(), directory.files.open_input_file(info.path) as stream:
            footer = read_footer(stream)
        metadata = parse_footer(footer)
        carried = metadata.metadata or {}
        manifest = Manifest.from_json(carried[ORIGIN.encode()])
        part = Part(info.base_name, metadata.num_rows, info.size, zlib.crc32(footer))
        notes = read_notes(carried.get(NOTES.encode()))
        return manifest.origin(), part, notes
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        if out_of_reach(error):
            raise
        return None, Part(info.base_name, 1, max(1, info.size)), {}


def _moments_crc(directory: Directory, manifest: Manifest, epoch: Epoch) -> int | None:
    """Return the CRC-32 of the file of moments beside an epoch's rows; None if there is no such file."""
    if not manifest.has_samples:
        return None
    try:
        return checksum(directory, manifest.moments_file(epoch))
    except FileNotFoundError:
        return None


def _with_gaps(parts: Iterable[Part]) -> list[Part]:
    """Add the parts that are missing between the first and the last part of each rank."""
    known = {rank_and_sequence(part.name): part for part in parts}
    for rank in {rank for rank, _ in known}:
        sequences = [sequence for each, sequence in known if each == rank]
        for sequence in range(min(sequences), max(sequences)):
            known.setdefault((rank, sequence), Part(f"part-{rank:04d}-{sequence:03d}.parquet", 1, 1))
    return [known[key] for key in sorted(known)]


def _with_moments(directory: Directory, manifest: Manifest, epoch: Epoch) -> Epoch:
    """Measure the moments of an epoch's rows anew, and write them beside the rows by rename."""
    if not manifest.has_samples:
        return epoch
    moments = measure_rows(directory, manifest, epoch, [gate.name for gate in manifest.gates])
    return replace(epoch, moments=write_moments(directory, manifest.moments_file(epoch), moments))


def _set_aside(directory: Directory, name: str, keep: bool = False) -> None:
    """Move a file to ``.damaged/``, or copy it if ``keep``, under a name that Parquet readers do not pick up."""
    stem, number = f"{DAMAGED}/{name.removesuffix('.parquet')}", 0
    while directory.holds(target := f"{stem}.{number}"):
        number += 1
    directory.files.create_dir(posixpath.dirname(target), recursive=True)
    (directory.files.copy_file if keep else directory.files.move)(name, target)
