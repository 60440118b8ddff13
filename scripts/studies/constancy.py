"""Constancy: does attention vary less over images at the end of a training than at its beginning?

The table has a row for each gate and measure of a run that was recorded over its training: CV (how far from constant),
the variance across images, the stripe strength and, where rows were kept, the effective rank, at the first and the last
epoch. Each change has an interval by the jackknife over blocks of images, which are the same in both epochs; a gate
falls or rises if its interval excludes no change. The intervals of the two ranks are taken as independent, which makes
the interval of their change too wide rather than too narrow.

--every-epoch also shows where and when: the changes from the first epoch to every other one, and each epoch's drift.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

import stripe
from stripe.figures import save
from stripe.files import write_csv
from stripe.plots.drawing import draw_by_gate
from stripe.stats import MEASURES, Change, Interval, change_between, changes, drift, drift_interval, spectrum
from studies.drawing import finish
from studies.table import read

DIGITS = 4
RANK, DRIFT = "rank", "drift"
COURSES = "courses.csv"
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
"""Headings of the columns of `stripe.stats.changes`; a change of strength is a difference, all others are ratios."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run recorded over a training, with rows or moments")
    parser.add_argument("--every-epoch", action="store_true", help=f"write {COURSES} too, and draw it")
    parser.add_argument("--out", type=Path, default=Path("figures/study"), metavar="DIR", help="where tables go")


def run(arguments: argparse.Namespace) -> None:
    """Write constancy.csv, a row for each run, gate and measure, and print how many gates fall and rise."""
    runs = {Path(path).name: stripe.open_run(path) for path in arguments.runs}
    table = pd.concat([compared(run).assign(run=name) for name, run in runs.items()], ignore_index=True)
    write_csv(arguments.out / "constancy.csv", rounded(table[list(HEADINGS)]).rename(columns=HEADINGS))
    print(count(table).to_string())
    if arguments.every_epoch:
        every = pd.DataFrame({"run": name} | row for name, run in runs.items() for row in course(run))
        write_csv(arguments.out / COURSES, rounded(every))
        figures(arguments.out)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round each number to DIGITS significant digits."""
    return table.map(lambda value: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)


def course(run: stripe.Run) -> Iterator[dict[str, object]]:
    """Yield, for every epoch but the first, each gate's changes since the first and its drift since the previous one.

    The value of each measure is its change, as in `stripe.stats.changes`.
    """
    first, *others = run.epochs
    begun = before = run.moments([first])
    previous = first
    for epoch in others:
        now = run.moments([epoch])
        for gate in (each.name for each in run.gates):
            for measure in MEASURES:
                found = change_between(begun[first, gate], now[epoch, gate], measure)
                yield _row(epoch, gate, measure, found.change, found)
            two = before[previous, gate], now[epoch, gate]
            yield _row(epoch, gate, DRIFT, drift(*two), drift_interval(*two))
        before, previous = now, epoch


def _row(epoch: int, gate: str, measure: str, value: float, ends: Change | Interval) -> dict[str, object]:
    return {"epoch": epoch, "gate": gate, "measure": measure, "value": value, "low": ends.low, "high": ends.high}


def figures(out: Path) -> None:
    """Draw the courses.csv of a directory, where there is one."""
    if (out / COURSES).exists():
        print(*save(draw(read(out / COURSES)), out / "courses"))


def draw(courses: pd.DataFrame) -> Figure:
    """Draw, run by run, the CV of every gate over that of the first epoch, and its drift."""
    runs = courses["run"].unique()
    figure, axes = plt.subplots(
        2, len(runs), figsize=(6.9, 4.4), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    labels = {"cv": "CV over that of the first epoch", DRIFT: "drift from the epoch before"}
    for measure, row in zip(labels, axes, strict=True):
        for ax, name in zip(row, runs, strict=True):
            bars = set(figure.axes)
            own = courses[(courses["run"] == name) & (courses["measure"] == measure)]
            draw_by_gate(ax, own, "value", interval=("low", "high"))
            ax.set(xlabel="", ylabel="")
            for bar in set(figure.axes) - bars if ax is not row[-1] else ():
                bar.remove()  # where there are many gates, one colour bar per row is enough
        row[0].set_ylabel(labels[measure])
    for ax, name in zip(axes[0], runs, strict=True):
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.axhline(1, color="0.4", linewidth=0.6, zorder=0)
        ax.set_title(name, fontsize=6)
    for ax in axes[1]:
        ax.set(yscale="log", xlabel="epoch")
    return finish(figure)


def compared(run: stripe.Run) -> pd.DataFrame:
    """Return the `changes` of a run and, where rows were kept, a row for the ratio of each gate's ranks."""
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
    """Return how many gates of each run fall, rise or do neither, by measure."""
    counts = table.groupby(["run", "measure"], sort=False)["direction"].value_counts().unstack(fill_value=0)
    kinds = ["falls", "rises", "unsettled", "unknown"]
    order = [(name, measure) for name in table["run"].unique() for measure in (*MEASURES, RANK)]
    return counts.reindex(columns=kinds, fill_value=0).reindex(order)
