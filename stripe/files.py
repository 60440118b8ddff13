"""Files that are replaced whole or not at all, and paths that cannot lead out of their folder."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


MAX_TEXT_BYTES = 64 * 2**20  # of a table or JSON file that is read whole: far above any real one


class UnsafePath(OSError):
    """A path that would lead a write out of its folder, or a read into a pipe or device."""


def own_path(root: str | os.PathLike[str], name: str | os.PathLike[str]) -> Path:
    """Return `root`/`name` for writing, after checking that it is inside `root`, which may itself be a link.

    Raises:
        UnsafePath: there is a symbolic link on the way or at its end, or the end is a pipe, socket or device.

    Example:
        >>> own_path("runs/a", "checkpoints/last.pt")
        PosixPath('runs/a/checkpoints/last.pt')
    """
    path = Path(root)
    for step in Path(name).parts:
        path /= step
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            break
        if stat.S_ISLNK(mode):
            raise UnsafePath(f"'{path}' is a symbolic link, and nothing is written through one: replace it by a copy")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UnsafePath(f"'{path}' is a pipe, socket or device: expected a file, remove it")
    return Path(root, name)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise UnsafePath for a folder, or a pipe or device, whose reading may never end; FileNotFoundError if absent."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnsafePath(f"'{os.fspath(path)}' is no regular file: expected one")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a regular file of at most MAX_TEXT_BYTES as UTF-8; OSError or ValueError otherwise."""
    require_regular(path)
    if (size := os.path.getsize(path)) > MAX_TEXT_BYTES:
        raise ValueError(f"'{os.fspath(path)}' has {size} bytes; expected at most {MAX_TEXT_BYTES}")
    return Path(path).read_text(encoding="utf-8")


@contextmanager
def replaced(path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` at the end, or removed after an error.

    Missing folders are created. A link is kept, and its target is replaced. Anything but a regular file, such as
    /dev/stdout or a named pipe, is written to directly. With a `root`, `path` is a name inside that folder, and links
    and pipes are refused (see `own_path`).

    Raises:
        OSError: the file cannot be written; the message names it. Any other error of the block passes unchanged.

    Example:
        >>> with replaced("strength.csv") as partial:  # doctest: +SKIP
        ...     table.to_csv(partial)
    """
    target = Path(os.path.realpath(path)) if root is None else own_path(root, path)
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    partial = target.with_name(f".partial-{target.name}")  # the extension stays: some libraries choose the format by it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # left by a killed process, or a link that leads elsewhere
        try:
            yield partial
            sync(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:
        failure = _failure(error, {str(partial), str(target), str(target.parent)})
        if failure is None:
            raise
        why = os.strerror(failure.errno) if failure.errno else str(failure)
        message = f"'{path}' could not be written ({why}): make room, or choose another place"
        raise OSError(failure.errno or errno.EIO, message) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by `text`, in UTF-8."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Replace a file by `content` as JSON; numbers that JSON does not have (NaN, infinity) become null."""
    write_text(path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike[str], table: pd.DataFrame, *, root: str | os.PathLike[str] | None = None) -> None:
    """Replace a file by a table as CSV, without its index; `root` as in `replaced`."""
    with replaced(path, root=root) as partial:
        table.to_csv(partial, index=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a crash cannot keep a rename and lose the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(error: BaseException | None, own: set[str]) -> OSError | None:
    """Return the failed write that caused an error (some libraries wrap it in their own); None if no write failed."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error if error is not None and (error.filename is None or str(error.filename) in own) else None
