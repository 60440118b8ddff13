"""Tables as CSV: grown row by row by several processes, or written whole with headings for people.

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
"""Columns that say how a row was made; pages leave them out."""


class Table:
    """Rows of one configuration in a CSV, written anew, by rename, whenever some are added.

    A file may hold several configurations where `identity`, columns of every row, tells them apart.
    """

    def __init__(self, path: Path, config: Row, **identity: Any) -> None:
        """Open the table at `path`.

        Raises:
            ValueError: it holds rows of the same identity and of another configuration.
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
        """Return the cases without a row, by now."""
        rows = self._read()
        return [case for case in cases if not any(_same(row, self._identity | case) for row in rows)]

    def put(self, case: Row, *results: Row) -> None:
        """Add a row for each result, in place of what there is of the case; they are on disk afterwards."""
        with alone(self.path.parent):
            rows = [row for row in self._read() if not _same(row, self._identity | case)]
            rows += [case | result | self._always for result in results]
            write_csv(self.path, pd.DataFrame(rows))

    def frame(self) -> pd.DataFrame:
        """Return the rows of this configuration; no row, no columns."""
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
    """Read every cell of a table as the text that it is."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def publish(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write tables, by file name, to a directory, and print them."""
    for name, table in tables.items():
        write_csv(out / name, table)
        print(table.to_string(index=False))


def headed(table: pd.DataFrame, headings: Mapping[str, str]) -> pd.DataFrame:
    """Return columns of a table as text, under headings for people: what a page shows of it.

    Args:
        table: one row per case; a missing value becomes an empty cell.
        headings: by heading, the column that goes under it and its format: `{"last epoch": "last_mean:.2f"}`.
    """

    def cells(column: str) -> list[str]:
        name, _, form = column.partition(":")
        return ["" if pd.isna(value) else format(value, form) for value in table[name].tolist()]

    return pd.DataFrame({heading: cells(column) for heading, column in headings.items()}, dtype=str)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes tables or figures into a folder; those that come in the `with` wait too."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", fcntl.LOCK_EX):
        yield


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Hold a directory against other processes within the `with`; False where another holds it, the dead do not."""
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
    """Tell whether a row read from a file is that of a case: 0.1 and "0.1" are the same."""
    return all(str(row.get(key)) == str(value) for key, value in case.items())


def add_data(
    parser: argparse.ArgumentParser, dataset: str = "digits", batch: int = 64, out: Path | None = None
) -> None:
    """Add --dataset, --data-dir, --batch and --out, which must be given where it has no default."""
    parser.add_argument("--dataset", default=dataset, metavar="URI", help="digits, cifar10, hf:NAME_OR_DIR, ...")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="of torchvision's sets")
    parser.add_argument(
        "--out", type=Path, required=out is None, default=out, metavar="DIR", help="where tables go; continued"
    )
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help="images per batch")
