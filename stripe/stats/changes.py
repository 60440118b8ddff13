"""Whether attention varies less over images at the end of training than at its beginning: changes, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from stripe.stats.intervals import CONFIDENCE, check_confidence, jackknife
from stripe.stats.moments import Moments
from stripe.stats.runs import RecordedRun
from stripe.stats.variance import Variance

MEASURES = ("cv", "within", "strength")
"""What can change: how far from constant (CV), the variance across samples, and the contrast of the stripes."""


@dataclass(frozen=True)
class Change:
    """How a measure of one gate differs between two epochs.

    Attributes:
        measure: one of MEASURES.
        before: its value in the first epoch.
        after: its value in the second.
        change: after / before for cv and within; after - before for strength, whose values lie in 0 to 1.
        low: the lower end of the interval of the change.
        high: the upper end.
        direction: "falls" or "rises" if the interval excludes no change, else "unsettled"; "unknown" without interval.
    """

    measure: str
    before: float
    after: float
    change: float
    low: float
    high: float
    direction: str


def change_between(before: Moments, after: Moments, measure: str = "cv", *, confidence: float = CONFIDENCE) -> Change:
    """Compare one gate in two epochs, with an interval over samples by the jackknife over blocks of samples.

    Epochs of the same samples are compared block by block, so that what an image does in both cancels. Epochs of
    different samples are treated as independent. cv and within are jackknifed as logarithms.

    Args:
        before: the gate's moments in the earlier epoch.
        after: the gate's moments in the later one.
        measure: "cv", "within" or "strength".
        confidence: between 0 and 1.

    Raises:
        ValueError: there is no such measure, or the confidence is not between 0 and 1.

    Example:
        >>> moments = run.moments([1, 90])
        >>> change_between(moments[1, "layer1.0.se"], moments[90, "layer1.0.se"], "cv").direction
    """
    if measure not in MEASURES:
        raise ValueError(f"no measure '{measure}'; expected one of {', '.join(MEASURES)}")
    check_confidence(confidence)
    take, back, nothing = _scales(measure)
    old, new = (float(getattr(each.split, measure)) for each in (before, after))
    first, last = (float(take(each.split)) for each in (before, after))
    change = last - first
    if not math.isfinite(change):
        return Change(measure, old, new, math.nan, math.nan, math.nan, "unknown")
    low, high = _interval(before, after, take, change, confidence)
    low, change, high = (float(back(each)) for each in (low, change, high))
    direction = "falls" if high < nothing else "rises" if low > nothing else "unsettled"
    return Change(measure, old, new, change, low, high, direction if math.isfinite(low + high) else "unknown")


def changes(
    run: RecordedRun,
    *,
    epochs: tuple[int, int] | None = None,
    gates: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Tabulate how a run's gates change from its first epoch to its last, or between the two of ``epochs``.

    Returns one row per gate and measure: epoch_before, epoch_after, gate and the fields of `Change`. Raises ValueError
    when the run has fewer than two epochs.
    """
    if epochs is None and len(run.epochs) < 2:
        raise ValueError(f"a change needs two epochs; the run has {len(run.epochs)}: record another one")
    first, last = (run.epochs[0], run.epochs[-1]) if epochs is None else epochs
    names = [gate.name for gate in run.gates] if gates is None else gates
    found = run.moments([first, last], names)
    rows = [
        {"epoch_before": first, "epoch_after": last, "gate": name}
        | asdict(change_between(found[first, name], found[last, name], measure, confidence=confidence))
        for name in names
        for measure in MEASURES
    ]
    return pd.DataFrame(rows)


Scale = Callable[[Variance], Any]


def _scales(measure: str) -> tuple[Scale, Callable[[float], Any], float]:
    """Return the figure that is jackknifed, how its differences are expressed, and the value that means no change."""
    if measure == "strength":
        return (lambda variance: variance.strength), float, 0.0

    def logarithm(variance: Variance) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(getattr(variance, measure))

    return logarithm, np.exp, 1.0


def _interval(before: Moments, after: Moments, take: Scale, change: float, confidence: float) -> tuple[float, float]:
    sides = [(each.blocks.counts, take(Variance.without_each(each.blocks))) for each in (before, after)]
    if min(before.count, after.count) < 3 or not all(np.isfinite(without).all() for _, without in sides):
        return math.nan, math.nan
    (first_counts, first), (last_counts, last) = sides
    same = np.array_equal(before.blocks.keys, after.blocks.keys) and np.array_equal(first_counts, last_counts)
    if same:
        return jackknife(first_counts, change, last - first, confidence)
    ends = []
    for each, (counts, without) in zip((before, after), sides, strict=True):
        every = float(take(each.split))
        ends.append(np.array(jackknife(counts, every, without, confidence)) - every)
    below = math.hypot(ends[1][0], ends[0][1])
    above = math.hypot(ends[1][1], ends[0][0])
    return change - below, change + above
