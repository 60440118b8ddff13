"""Constancy: does attention vary less over images at the end of a training than at its beginning?

A row for each gate and measure of a run that was recorded over its training: CV (how far from constant), the variance
across images, and the stripe strength, at its first epoch and its last. The change has an interval over images, the
same ones in both epochs, by the jackknife over blocks of images; a gate falls or rises where the interval leaves no
change out.
"""

import argparse
from pathlib import Path

import pandas as pd

import stripe
from stripe.stats import MEASURES, changes
from studies.table import write

DIGITS = 4
HEADINGS = {
    "run": "run",
    "gate": "gate",
    "measure": "measure",
    "epoch_before": "first epoch",
    "epoch_after": "last epoch",
    "before": "at the first",
    "after": "at the last",
    "change": "change",
    "low": "low end",
    "high": "high end",
    "direction": "direction",
}
"""Of the columns of `stripe.stats.changes`: a change of CV or variance is a ratio, one of strength a difference."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="recorded over a training, with rows or moments")
    parser.add_argument("--out", type=Path, default=Path("figures/study"), metavar="DIR", help="where tables go")


def run(arguments: argparse.Namespace) -> None:
    """Write constancy.csv, a row for each run, gate and measure, and print how many gates fall and rise."""
    tables = [changes(stripe.open_run(path)).assign(run=Path(path).name) for path in arguments.runs]
    table = pd.concat(tables, ignore_index=True)
    shown = table[list(HEADINGS)].map(lambda value: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)
    write(shown.rename(columns=HEADINGS), arguments.out / "constancy.csv")
    print(count(table).to_string())


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many gates of each run fall, rise and do neither, by measure."""
    counts = table.groupby(["run", "measure"], sort=False)["direction"].value_counts().unstack(fill_value=0)
    kinds = ["falls", "rises", "unsettled", "unknown"]
    order = [(name, measure) for name in table["run"].unique() for measure in MEASURES]
    return counts.reindex(columns=kinds, fill_value=0).reindex(order)
