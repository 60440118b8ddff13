"""A run's folder on a local disk, which may be untrusted: no write leaves the folder, and no pipe is opened."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs

from stripe.files import own_path, require_regular


class LocalFiles(fs.SubTreeFileSystem):  # type: ignore[misc]
    """Arrow's local file system below a folder, guarded.

    Writing, renaming and removing refuse a path with a link, pipe or device on it. Reading follows links, because
    download caches consist of them, but opens only regular files. Anything else raises UnsafePath.
    """

    def __init__(self, root: str) -> None:
        """Guard the files below ``root``, which need not exist and may itself be a link."""
        super().__init__(root, fs.LocalFileSystem())
        self._root = root

    def walk(self, folder: str) -> Iterator[str]:
        """Yield the regular files under ``folder``; links are skipped, wherever they lead."""
        try:
            top = own_path(self._root, folder)
        except OSError:
            return
        for place, _, names in os.walk(top):
            for name in names:
                path = os.path.join(place, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    yield os.path.relpath(path, self._root)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open a regular file."""
        require_regular(os.path.join(self._root, path))
        return super().open_input_file(path)

    def open_output_stream(self, path: str, *arguments: Any, **options: Any) -> pa.NativeFile:
        """Write a new file; an existing one is unlinked first, since it may have a hard link elsewhere."""
        own_path(self._root, path).unlink(missing_ok=True)
        return super().open_output_stream(path, *arguments, **options)

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Make a folder."""
        own_path(self._root, path)
        super().create_dir(path, recursive=recursive)

    def move(self, src: str, dest: str) -> None:
        """Rename a file or folder."""
        own_path(self._root, src), own_path(self._root, dest)
        super().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a regular file."""
        require_regular(os.path.join(self._root, src))
        own_path(self._root, dest).unlink(missing_ok=True)
        super().copy_file(src, dest)

    def delete_file(self, path: str) -> None:
        """Remove a file; of a link, the link itself."""
        own_path(self._root, posixpath.dirname(path))
        super().delete_file(path)

    def delete_dir(self, path: str) -> None:
        """Remove a folder and its content; links inside it are removed, not followed."""
        own_path(self._root, path)
        super().delete_dir(path)
