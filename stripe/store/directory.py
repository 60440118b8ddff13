"""A run's directory, local or a prefix in an object store, behind one interface; the lock and the atomic manifest."""

from __future__ import annotations

import csv
import errno
import io
import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from stripe import locks
from stripe.files import MAX_TEXT_BYTES, UnsafePath, own_path, sync
from stripe.messages import listing, one_line, require, require_count
from stripe.store.local import LocalFiles
from stripe.store.manifest import FOLDERS, MANIFEST, MOMENTS_FOLDER, PART_NAME, Manifest, epoch_number

STAGING = ".unfinished"
FILES = "files.csv"  # the file of each sample, if samples are files
FILES_COLUMNS = ("sample", "file")
ROOTS = sorted({*FOLDERS.values()})


class Directory:
    """A run's directory, local or named by a URI, through Arrow's file systems; all paths are relative to it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Point at ``path``, a directory or a URI, which need not exist; a leading ~ is the user's home."""
        self.path = os.fspath(path)
        require("\0" not in self.path, f"path {self.path!r:.80} of a run: expected one without a null character")
        if "://" not in self.path:
            self.path = os.path.expanduser(self.path)
        base, root = None, os.path.abspath(self.path)
        if "://" in self.path:
            base, root = fs.FileSystem.from_uri(self.path)
        self._local_root = root if base is None or isinstance(base, fs.LocalFileSystem) else None
        self.files = fs.SubTreeFileSystem(root, base) if self._local_root is None else LocalFiles(root)

    def holds(self, name: str) -> bool:
        """Return whether there is a file or folder ``name``."""
        return bool(self.files.get_file_info(name).type != fs.FileType.NotFound)

    def sync(self, *names: str) -> None:
        """Sync local files or folders to the disk, so that they survive a power cut."""
        if self._local_root is None:
            return
        for name in names:
            sync(own_path(self._local_root, name))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failed write into a one-line OSError that names the run."""
        try:
            yield
        except UnsafePath as error:
            raise UnsafePath(f"run '{self.path}' is not written: {error}") from error
        except OSError as error:
            raise self._failure(error, "written", "make room or choose another directory") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn a failure of the storage, but not damaged content, into a one-line OSError that names the run."""
        try:
            yield
        except OSError as error:
            if not out_of_reach(error):
                raise
            raise self._failure(error, "read", "look at the connection and the permissions, then try again") from error

    def _failure(self, error: OSError, done: str, remedy: str) -> OSError:
        why = os.strerror(error.errno) if error.errno else one_line(error)
        return OSError(error.errno or errno.EIO, f"run '{self.path}' could not be {done} ({why}): {remedy}")

    @contextmanager
    def sole_writer(self) -> Iterator[locks.Confirm]:
        """Create the directory and keep other writers off it; see ``stripe.locks.sole_writer``."""
        what = f"run '{self.path}'"
        with self.writing():
            self.files.base_fs.create_dir(self.files.base_path, recursive=True)
        if self._local_root is None:
            with locks.claimed(_StoredClaims(self), what) as confirm:
                yield confirm
        else:
            with locks.sole_writer(Path(self._local_root), what) as confirm:
                yield confirm

    def read_manifest(self) -> Manifest:
        """Read run.json; FileNotFoundError if there is none, ValueError if it is damaged."""
        with self.reading():
            return self._read_manifest()

    def _read_manifest(self) -> Manifest:
        info = self.files.get_file_info(MANIFEST)
        if info.type != fs.FileType.File:
            why = f"it holds no {MANIFEST}" if self.holds("") else "no such directory"
            if self._local_root is not None and Path(self._local_root).is_file():
                why = "it is a file"
            raise FileNotFoundError(f"'{self.path}' is not a run ({why}): pass the directory of a recording")
        try:
            require_count(info.size, 0, MAX_TEXT_BYTES, f"bytes of {MANIFEST}")
            with self.files.open_input_file(MANIFEST) as stream:
                return Manifest.from_json(stream.read())
        except ValueError as error:
            raise ValueError(f"run '{self.path}': {error}") from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace run.json; call this once everything that it names is on the disk."""
        with self.replacing(MANIFEST, staged=f".{MANIFEST}") as stream:
            stream.write(manifest.to_json().encode())

    @contextmanager
    def replacing(self, name: str, *, staged: str) -> Iterator[pa.NativeFile]:
        """Yield a stream that writes the file ``staged``; at the end, one rename puts it in the place of ``name``."""
        with self.writing():
            stream = self.files.open_output_stream(staged)
            try:
                with stream:
                    yield stream
                self.sync(staged)
                self.files.move(staged, name)
                self.sync(posixpath.dirname(name))
            except BaseException:
                with suppress(OSError):
                    self.files.delete_file(staged)
                raise

    def read_text(self, name: str) -> str | None:
        """Return the text of a file beside the manifest; None if there is no such file, ValueError if it is too big."""
        if not self.holds(name):
            return None
        with self.files.open_input_file(name) as stream:
            require_count(stream.size(), 0, MAX_TEXT_BYTES, f"bytes of {name} of run '{self.path}'")
            return str(stream.read(), encoding="utf-8")

    def read_files(self) -> dict[int, str]:
        """Return the names in FILES by sample id, {} if there is no such file; ValueError if it is damaged."""
        text = self.read_text(FILES)
        try:
            heading, *rows = csv.reader(io.StringIO(text or ",".join(FILES_COLUMNS), newline=""), strict=True)
            require(tuple(heading) == FILES_COLUMNS, f"columns {listing(heading)}; expected {listing(FILES_COLUMNS)}")
            return {int(sample): name for sample, name in rows}
        except (csv.Error, ValueError) as error:
            raise ValueError(f"run '{self.path}': {FILES} is damaged ({one_line(error)}): remove it") from error

    def write_files(self, files: Mapping[int, str]) -> None:
        """Add file names by sample id to FILES; ValueError if a sample has a different name there."""
        files = {sample: name.encode(errors="backslashreplace").decode() for sample, name in files.items()}
        held = self.read_files()
        other = next((sample for sample, name in files.items() if held.get(sample, name) != name), None)
        require(
            other is None,
            f"run '{self.path}' says that sample {other} is '{held.get(other or 0, '')}', this recording that it is "
            f"'{files.get(other or 0, '')}': choose another run",
        )
        if held | files != held:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([FILES_COLUMNS, *sorted((held | files).items())])
            with self.replacing(FILES, staged=f".{FILES}") as stream:
                stream.write(text.getvalue().encode())

    def files_in(self, folder: str) -> list[fs.FileInfo]:
        """List the files under ``folder``, sorted by path; [] if there is no such folder."""
        if isinstance(self.files, LocalFiles):
            infos = self.files.get_file_info(list(self.files.walk(folder)))
        else:
            infos = self.files.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
        return sorted((info for info in infos if info.type == fs.FileType.File), key=lambda info: info.path)

    def interrupted(self) -> set[int]:
        """Return the epochs that are being recorded, or whose recording was interrupted."""
        if self.files.get_file_info(STAGING).type != fs.FileType.Directory:
            return set()
        infos = self.files.get_file_info(fs.FileSelector(STAGING))
        return {number for info in infos if (number := epoch_number(info.path)) is not None}

    def unnamed(self, manifest: Manifest) -> list[str]:
        """List the parts and the files of moments that the manifest does not name."""
        named = {f"{manifest.folder(found.epoch)}/{part.name}" for found in manifest.epochs for part in found.parts}
        named |= {manifest.moments_file(found) for found in manifest.epochs if found.moments is not None}
        found = [info.path for root in ROOTS for info in self.files_in(root) if PART_NAME.fullmatch(info.base_name)]
        found += [info.path for info in self.files_in(MOMENTS_FOLDER)]
        return [path for path in found if path not in named]

    def clear(self, *epochs: int) -> None:
        """Undo interrupted recordings and those of ``epochs``: delete their unnamed parts, then STAGING."""
        begun = self.interrupted().union(epochs)
        for path in self.unnamed(self.read_manifest()) if begun else ():
            if epoch_number(path) in begun:
                self.files.delete_file(path)
        if self.holds(STAGING):
            self.files.delete_dir(STAGING)


class _StoredClaims:
    """Claims of writers in an object store; see ``stripe.locks``."""

    def __init__(self, directory: Directory) -> None:
        self._directory, self._files = directory, directory.files

    def put(self, name: str, text: str) -> None:
        with self._directory.writing(), self._files.open_output_stream(name) as stream:
            stream.write(text.encode())

    def renewed(self) -> Mapping[str, float]:
        with self._directory.reading():
            infos = self._files.get_file_info(fs.FileSelector(""))
        return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in infos if info.base_name.startswith(locks.CLAIM)}

    def read(self, name: str) -> str:
        with self._files.open_input_file(name) as stream:
            return str(stream.read(10_000), encoding="utf-8")

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.delete_file(name)


def out_of_reach(error: BaseException) -> bool:
    """Return whether the storage failed; for damaged content Arrow raises OSError without a number."""
    return isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error))
