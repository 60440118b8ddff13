"""Files that are replaced whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it is renamed to `path`, after an error removed.

    Folders that are missing are made. A link stays, and what it points to is replaced. What is no regular file, such
    as /dev/stdout or a named pipe, is written to directly.

    Raises:
        OSError: the file cannot be written; the message names it. Whatever else the block raises is raised as it is.

    Example:
        >>> with replaced("strength.csv") as partial:  # doctest: +SKIP
        ...     table.to_csv(partial)
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    partial = target.with_name(f".partial-{target.name}")  # the ending stays: some libraries choose a format by it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a killed process, or a link that leads elsewhere
        try:
            yield partial
            _sync(partial)
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


def write_csv(path: str | os.PathLike[str], table: pd.DataFrame) -> None:
    """Replace a file by a table as CSV, without its index."""
    with replaced(path) as partial:
        table.to_csv(partial, index=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    """Push a file to the disk, so that the rename cannot outlive what it names."""
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
