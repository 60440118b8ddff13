"""Third-party data sets in Parquet, in the folder layout of the Hugging Face hub, read by column and row."""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stripe.messages import require

LARGEST_FOLDER = 2**30  # bytes of Parquet; columns are read into memory, so larger folders are left alone
_NAME = re.compile(r"(?P<split>\w+?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?")


class Table:
    """One split of a data set, whose rows are in one file or, in order, in several.

    Attributes:
        features: the hub's description of each column, such as ``{"_type": "ClassLabel", "names": ["cat", "dog"]}``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the column descriptions; ``pyarrow.ArrowException`` or OSError if the first file is not Parquet."""
        self._paths = list(paths)
        described = (pq.read_schema(self._paths[0]).metadata or {}).get(b"huggingface", b"{}")
        self.features: Mapping[str, Any] = json.loads(described).get("info", {}).get("features", {})

    def integers(self, column: str) -> NDArray[np.int64]:
        """Return a column of integers, shape (rows,); ValueError if it holds other values or missing ones."""
        found = [pq.read_table(path, columns=[column])[column] for path in self._paths]
        for path, values in zip(self._paths, found, strict=True):
            require(
                pa.types.is_integer(values.type) and not values.null_count,
                f"'{path}' holds {values.type} in column '{column}', {values.null_count} of them missing; expected "
                "an integer in every row",
            )
        return np.concatenate([values.to_numpy() for values in found]).astype(np.int64)

    def files(self, column: str, rows: Sequence[int]) -> list[tuple[bytes | None, str | None]]:
        """Return the content and the path, either of which may be None, of the file in each given row of a column."""
        contents, paths, starts = self._files(column)
        found = []
        for row in rows:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            place = row - int(starts[part])
            found.append((contents[part][place].as_py(), paths[part][place].as_py()))
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a table lives as long as its data set
    def _files(self, column: str) -> tuple[list[pa.Array], list[pa.Array], NDArray[np.int64]]:
        """Return a column's contents and paths chunk by chunk, and the first row of each chunk."""
        chunks = [chunk for path in self._paths for chunk in pq.read_table(path, columns=[column])[column].chunks]
        kinds = {str(chunk.type) for chunk in chunks} - {"struct<bytes: binary, path: string>"}
        require(
            not kinds,
            f"'{self._paths[0].parent}' holds {', '.join(sorted(kinds))} in column '{column}'; expected images as the "
            "hub stores them, struct<bytes: binary, path: string>",
        )
        starts = np.cumsum([0, *map(len, chunks)])[:-1]
        return [chunk.field("bytes") for chunk in chunks], [chunk.field("path") for chunk in chunks], starts


def find_tables(folder: Path) -> dict[str, Table]:
    """Return the splits that a folder holds as ``SPLIT.parquet`` or ``SPLIT-00000-of-00002.parquet`` files.

    Returns an empty dict for a folder that needs the package `datasets`: one with no Parquet files or with files named
    otherwise, one whose files do not describe their columns, one with several data sets, or one of more than
    LARGEST_FOLDER bytes.

    Raises:
        FileNotFoundError: a split lacks one of its files.
    """
    paths = sorted(folder.rglob("*.parquet"))
    matches = [_NAME.fullmatch(path.stem) for path in paths]
    several = len({path.parent for path in paths}) != 1
    if several or not all(matches) or sum(path.stat().st_size for path in paths) > LARGEST_FOLDER:
        return {}
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    expected: dict[str, int] = {}
    for path, match in zip(paths, matches, strict=True):
        assert match is not None
        splits[match["split"]].append(path)
        expected[match["split"]] = int(match["parts"] or 1)
    for split, found in splits.items():
        if len(found) != expected[split]:
            raise FileNotFoundError(
                f"'{folder}' holds {len(found)} of the {expected[split]} files of split '{split}': fetch the others"
            )
    order = sorted(splits, key=lambda split: (split != "train", split != "validation", split))
    tables = {split: Table(splits[split]) for split in order}
    return tables if all(table.features for table in tables.values()) else {}
