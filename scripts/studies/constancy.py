"""Constancy: does attention vary less over images at the end of a training than at its beginning?

A row for each gate and measure of a run that was recorded over its training: CV (how far from constant), the variance
across images, the stripe strength and, where rows were kept, the effective rank, at its first epoch and its last. The
change has an interval over images, the same ones in both epochs, by the jackknife over blocks of images; a gate falls
or rises where the interval leaves no change out. The intervals of the two ranks are taken as independent, which makes
that of their change too wide rather than too narrow.
"""

import argparse
import math
from pathlib import Path

import pandas as pd

import stripe
from stripe.files import write_csv
from stripe.stats import MEASURES, changes, spectrum

DIGITS = 4
RANK = "rank"
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
"""Of the columns of `stripe.stats.changes`: a change of strength is a difference, one of the others a ratio."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="recorded over a training, with rows or moments")
    parser.add_argument("--out", type=Path, default=Path("figures/study"), metavar="DIR", help="where tables go")


def run(arguments: argparse.Namespace) -> None:
    """Write constancy.csv, a row for each run, gate and measure, and print how many gates fall and rise."""
    tables = [compared(stripe.open_run(path)).assign(run=Path(path).name) for path in arguments.runs]
    table = pd.concat(tables, ignore_index=True)
    shown = table[list(HEADINGS)].map(lambda value: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)
    write_csv(arguments.out / "constancy.csv", shown.rename(columns=HEADINGS))
    print(count(table).to_string())


def compared(run: stripe.Run) -> pd.DataFrame:
    """Return `changes` of a run, and a row for the change of each gate's rank, a ratio, where rows were kept."""
    found = changes(run)
    if not run.has_samples:
        return found
    ranks = pd.DataFrame(rank_change(run, gate.name) for gate in run.gates)
    order = {gate.name: i for i, gate in enumerate(run.gates)}
    both = pd.concat([found, ranks], ignore_index=True)
    return both.sort_values("gate", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def rank_change(run: stripe.Run, gate: str) -> dict[str, object]:
    """Return how a gate's effective rank differs between a run's first and last epoch, in the columns of `changes`."""
    first, last = run.epochs[0], run.epochs[-1]
    before, after = (
        spectrum(run.attention(gate, epoch), directions=1, sample_ids=run.samples(epoch)) for epoch in (first, last)
    )
    ratio = after.rank / before.rank
    below = math.hypot(math.log(after.rank / after.rank_low), math.log(before.rank_high / before.rank))
    above = math.hypot(math.log(after.rank_high / after.rank), math.log(before.rank / before.rank_low))
    low, high = ratio * math.exp(-below), ratio * math.exp(above)
    direction = "falls" if high < 1 else "rises" if low > 1 else "unsettled"
    row = {"epoch_before": first, "epoch_after": last, "gate": gate, "measure": RANK}
    row |= {"before": before.rank, "after": after.rank, "change": ratio, "low": low, "high": high}
    return row | {"direction": direction if math.isfinite(low + high) else "unknown"}


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many gates of each run fall, rise and do neither, by measure."""
    counts = table.groupby(["run", "measure"], sort=False)["direction"].value_counts().unstack(fill_value=0)
    kinds = ["falls", "rises", "unsettled", "unknown"]
    order = [(name, measure) for name in table["run"].unique() for measure in (*MEASURES, RANK)]
    return counts.reindex(columns=kinds, fill_value=0).reindex(order)
