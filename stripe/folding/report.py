"""What became of the gates or norms of a network. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from stripe.folding.merging import Merge
from stripe.gate import Gate


@dataclass(frozen=True, eq=False)
class FoldReport:
    """What became of each gate, and how far the folded network is from the original with its gates at their constants.

    `table` has one row per gate: gate, direction ("back", "forward", "kept", or "unused" where the output no longer
    needs the gate), into (names of the changed tensors), through (operations on the way), reason (why it was not
    merged) and weight_growth (the largest weight after the merge over the largest before). `error` is the largest
    difference over the largest output, in float64.
    """

    table: pd.DataFrame
    error: float

    def _repr_html_(self) -> str:
        """Show in a notebook how many gates were merged, how exactly, and the table."""
        merged = int((self.table["direction"] != "kept").sum())
        head = f"<p><b>{merged} of {len(self.table)}</b> gates merged, relative error {self.error:.1g}</p>"
        return head + self.table.to_html(index=False)


def report_of(merges: Iterable[Merge], gates: Iterable[Gate], error: float) -> FoldReport:
    """Return the report on some gates, in the order of `gates`."""
    order = [gate.name for gate in gates]
    table = table_of(merges, "gate")
    return FoldReport(table.sort_values("gate", key=lambda names: names.map(order.index), ignore_index=True), error)


def table_of(merges: Iterable[Merge], what: str) -> pd.DataFrame:
    """Return the table of a report: a row for each gate or norm, named in the column `what`."""
    rows = [
        (name, m.direction, tuple(dict.fromkeys(e.name for e in m.edits)), m.through, m.reason, m.growth)
        for m in merges
        for name in m.map.names
    ]
    return pd.DataFrame(rows, columns=[what, "direction", "into", "through", "reason", "weight_growth"])
