"""CSV tables that several processes extend row by row, or that are written whole with readable headings.

Also directories that one process claims. Both survive a process that is killed.
"""

import argparse
import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from benchmark import device, versions

from stripe.files import write_csv

Row = dict[str, Any]
PROVENANCE = ("config", "versions", "machine")
"""Columns that say how a row was made; pages omit them."""


class Table:
    """Rows of one configuration in a CSV, which is rewritten, by rename, whenever rows are added.

    A file may hold several configurations if `identity`, columns of every row, distinguishes them.
    """

    def __init__(self, path: Path, config: Row, **identity: Any) -> None:
        """Open the table at `path`.

        Raises:
            ValueError: the file holds rows of the same identity but of another configuration.
        """
        self.path = path
        self._identity = identity
        about = {"config": json.dumps(config), "versions": json.dumps(versions())}
        self._always = identity | about | {"machine": device()}
        others = [row for row in self._read() if _same(row, identity) and row["config"] != about["config"]]
        if others:
            raise ValueError(
                f"'{path}' holds rows of another configuration, {others[0]['config']}; expected {about['config']}: "
                f"name another {'setting' if identity else '--out'}"
            )

    def missing(self, cases: Iterable[Row]) -> list[Row]:
        """Return the cases that have no row yet."""
        rows = self._read()
        return [case for case in cases if not any(_same(row, self._identity | case) for row in rows)]

    def put(self, case: Row, *results: Row) -> None:
        """Write a row for each result to disk, in place of earlier rows of the case."""
        with alone(self.path.parent):
            rows = [row for row in self._read() if not _same(row, self._identity | case)]
            rows += [case | result | self._always for result in results]
            write_csv(self.path, pd.DataFrame(rows))

    def frame(self) -> pd.DataFrame:
        """Return the rows of this configuration; a frame without columns if there is no file."""
        rows = read(self.path) if self.path.exists() else pd.DataFrame()
        return rows[[_same(row, self._identity) for row in rows.to_dict("records")]]

    def _read(self) -> list[Row]:
        """Return the rows as text, so that no digit changes when they are written again."""
        if not self.path.exists():
            return []
        rows = read_text(self.path).to_dict("records")
        return [{str(name): value for name, value in row.items()} for row in rows]


def read(path: Path) -> pd.DataFrame:
    """Read a table; only an empty cell counts as a missing value, never a word such as "none"."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_text(path: Path) -> pd.DataFrame:
    """Read a table with every cell as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def publish(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write tables, by file name, to a directory, and print them."""
    for name, table in tables.items():
        write_csv(out / name, table)
        print(table.to_string(index=False))


def headed(table: pd.DataFrame, headings: Mapping[str, str]) -> pd.DataFrame:
    """Return columns of a table as text under readable headings, as a page shows them.

    Args:
        table: one row per case; a missing value becomes an empty cell.
        headings: for each heading, its column and format: `{"last epoch": "last_mean:.2f"}`.
    """

    def cells(column: str) -> list[str]:
        name, _, form = column.partition(":")
        return ["" if pd.isna(value) else format(value, form) for value in table[name].tolist()]

    return pd.DataFrame({heading: cells(column) for heading, column in headings.items()}, dtype=str)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes tables or figures into a folder, and make others wait during the `with`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", fcntl.LOCK_EX):
        yield


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Claim a directory during the `with`; yield False if another living process has claimed it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(directory.parent / f".{directory.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, how)
        yield


def _same(row: Mapping[Any, Any], case: Row) -> bool:
    """Return whether a row read from a file is that of a case; 0.1 and "0.1" count as equal."""
    return all(str(row.get(key)) == str(value) for key, value in case.items())


def add_data(
    parser: argparse.ArgumentParser, dataset: str = "digits", batch: int = 64, out: Path | None = None
) -> None:
    """Add --dataset, --data-dir, --batch and --out; --out is required where it has no default."""
    parser.add_argument("--dataset", default=dataset, metavar="URI", help="digits, cifar10, hf:NAME_OR_DIR, ...")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of torchvision's data sets"
    )
    parser.add_argument(
        "--out", type=Path, required=out is None, default=out, metavar="DIR", help="where tables go; continued"
    )
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help="images per batch")
