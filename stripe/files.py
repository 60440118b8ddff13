"""Files that are replaced whole or not at all, and paths that lead nowhere else."""

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
    """Return `root`/`name` for writing, once it is known to lie in `root` itself, which may be a link.

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
    """Refuse to open a pipe, socket or device, which may never end (UnsafePath); FileNotFoundError for no file."""
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
    """Give a temporary path beside `path` to write to; at the end it is renamed to `path`, after an error removed.

    Folders that are missing are made. A link stays, and what it points to is replaced. What is no regular file, such
    as /dev/stdout or a named pipe, is written to directly. With a `root`, `path` is a name inside that folder, and
    links and pipes are refused, see `own_path`.

    Raises:
        OSError: the file cannot be written; the message names it. Whatever else the block raises is raised as it is.

    Example:
        >>> with replaced("strength.csv") as partial:  # doctest: +SKIP
        ...     table.to_csv(partial)
    """
    target = Path(os.path.realpath(path)) if root is None else own_path(root, path)
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    partial = target.with_name(f".partial-{target.name}")  # the ending stays: some libraries choose a format by it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a killed process, or a link that leads elsewhere
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
    """Push a file or folder to the disk, so that a rename cannot outlive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(error: BaseException | None, own: set[str]) -> OSError | None:
    """Return the failed write behind an error, which some libraries hide behind one of their own; None without one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error if error is not None and (error.filename is None or str(error.filename) in own) else None
