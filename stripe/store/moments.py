"""Moments as a Parquet table: per gate a row for all samples, one for each block of samples, one for each class."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stripe.messages import require

if TYPE_CHECKING:
    from stripe.stats import Groups, Moments

Key = TypeVar("Key", bound=Hashable)

_VECTOR = pa.list_(pa.float64())
MOMENTS_SCHEMA = pa.schema(
    [
        pa.field("gate", pa.string(), nullable=False),
        pa.field("block", pa.int64()),  # block and label are null in the row of all samples
        pa.field("label", pa.int64()),  # -1: unknown
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", _VECTOR, nullable=False),
        *(pa.field(name, pa.float64()) for name in ("scatter", "rows")),  # null in the row of all samples
        *(pa.field(name, _VECTOR) for name in ("m2", "low", "high")),  # from here on null except in that row
        pa.field("broken", pa.list_(pa.bool_())),
        pa.field("near", pa.list_(pa.int64())),
        *(pa.field(name, pa.int64()) for name in ("nonfinite", "left_out", "blocks", "classes")),
    ]
)
"""Columns of a table of moments; `stripe.stats.Moments` and `Groups` say what they mean.

``blocks`` and ``classes`` count the rows of blocks and of classes that follow; ``classes`` is null if none were kept.
"""


def to_table(moments: Mapping[str, Moments], schema: pa.Schema = MOMENTS_SCHEMA) -> pa.Table:
    """Put the moments of several gates into one table, one gate after another."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for gate, each in moments.items():
        classes = None if each.classes is None else len(each.classes.keys)
        whole = {name: getattr(each, name) for name in ("count", "m2", "low", "high", "broken", "near", "nonfinite")}
        whole |= {"left_out": each.left_out, "blocks": len(each.blocks.keys), "classes": classes, "mean": each.mean}
        rows = [whole, *_rows("block", each.blocks)]
        if each.classes is not None:
            rows += _rows("label", each.classes)
        for row in rows:
            for name in columns:
                columns[name].append(gate if name == "gate" else row.get(name))
    return pa.table(columns, schema=schema)


def from_table(table: pa.Table, channels: Mapping[str, int]) -> dict[str, Moments]:
    """Read the moments of the gates in ``channels`` (name -> channels); ValueError if the table does not fit them."""
    table = table.combine_chunks()
    table.validate(full=True)
    mean, m2, low, high, broken, near = (_flat(table, name) for name in ("mean", "m2", "low", "high", "broken", "near"))
    count, scatter, rows = (_values(table, name) for name in ("count", "scatter", "rows"))
    block, label = (_values(table, name) for name in ("block", "label"))
    single = table.filter(table["blocks"].is_valid()).select(["gate", "nonfinite", "left_out", "blocks", "classes"])
    require(single["gate"].to_pylist() == list(channels), "other gates than the manifest's")
    sizes = _sizes(single)
    starts = np.flatnonzero(table["blocks"].is_valid().to_numpy())
    require(starts.tolist() == [0, *accumulate(sizes)][:-1] and sum(sizes) == len(count), "rows do not fit its counts")
    widths = list(channels.values())
    lengths = {len(each) for each in (m2, low, high, broken)} | {sum(widths)}
    told = sum(width * size for width, size in zip(widths, sizes, strict=True))
    require(len(lengths) == 1 and len(mean) == told and len(near) == 3 * len(sizes), "vectors of other lengths")
    require(not any((each < 0).any() for each in (count, scatter, rows, m2, near)), "negative sums or counts")

    def groups(keys: NDArray[np.int64], at: int, number: int, width: int, values: NDArray[np.float64]) -> Groups:
        from stripe.stats import Groups

        its = slice(at, at + number)
        return Groups(keys[its], count[its], values.reshape(-1, width), scatter[its], rows[its])

    def parts() -> Iterator[tuple[str, Moments]]:
        from stripe.stats import Moments

        row = vector = start = 0
        for number, each in enumerate(single.to_pylist()):
            width, blocks, classes = channels[each["gate"]], each["blocks"], each["classes"]
            its = slice(vector, vector + width)
            ends = list(accumulate([start, width, width * blocks, width * (classes or 0)]))
            yield (
                each["gate"],
                Moments(
                    count=int(count[row]),
                    mean=mean[ends[0] : ends[1]],
                    m2=m2[its],
                    low=low[its],
                    high=high[its],
                    near=near[3 * number : 3 * number + 3],
                    nonfinite=each["nonfinite"],
                    left_out=each["left_out"],
                    broken=broken[its],
                    blocks=groups(block, row + 1, blocks, width, mean[ends[1] : ends[2]]),
                    classes=None
                    if classes is None
                    else groups(label, row + 1 + blocks, classes, width, mean[ends[2] : ends[3]]),
                ),
            )
            row, vector, start = row + 1 + blocks + (classes or 0), vector + width, ends[-1]

    return dict(parts())


def merged(parts: Iterable[Mapping[Key, Moments]]) -> dict[Key, Moments]:
    """Merge the moments of several parts, each of which may hold many gates."""
    whole: dict[Key, Moments] = {}
    for part in parts:
        whole |= {key: whole[key].merge(its) if key in whole else its for key, its in part.items()}
    return whole


def _rows(key: str, groups: Groups) -> list[dict[str, Any]]:
    columns = (groups.keys, groups.counts, groups.means, groups.scatter, groups.rows)
    return [
        dict(zip((key, "count", "mean", "scatter", "rows"), values, strict=True))
        for values in zip(*columns, strict=True)
    ]


def _sizes(single: pa.Table) -> list[int]:
    """Return each gate's number of rows, from its row of all samples; ValueError for invalid counts."""
    counts = {name: single[name].to_pylist() for name in ("nonfinite", "left_out", "blocks")}
    counts["classes"] = [each or 0 for each in single["classes"].to_pylist()]
    for name, values in counts.items():
        require(all(each is not None and each >= 0 for each in values), f"{name} that are not counts")
    return [1 + blocks + classes for blocks, classes in zip(counts["blocks"], counts["classes"], strict=True)]


def _values(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of numbers, 0 where it is null."""
    column = table[name].combine_chunks()
    return (column.fill_null(0) if column.null_count else column).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _flat(table: pa.Table, name: str) -> NDArray[Any]:
    """Return the values of a column of vectors, concatenated; ValueError if any value is null."""
    values = table[name].combine_chunks().flatten()
    require(not values.null_count, f"vectors of {name} with nulls in them")
    return values.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
