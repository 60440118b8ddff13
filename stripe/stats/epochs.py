"""Every statistic over epochs: drift, the epoch that settles, and the table of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stripe.gate import Gate, name_of
from stripe.stats.arithmetic import SEED, Array, Labels, mean_of
from stripe.stats.moments import Moments, flags
from stripe.stats.runs import ClassMeans, RecordedRun
from stripe.stats.strength import (
    CONFIDENCE,
    RESAMPLES,
    Strength,
    bootstrap_strength,
    effective_rank,
    label_share,
    label_share_of_means,
    shares_of,
    stripe_strength,
)

SUMMARY = (
    "epoch gate channels samples strength strength_low strength_high std between within sample_share rest_share drift"
    " label_share label_omega rank flags"
).split()
"""Columns of `summarize`."""


def drift(before: Moments, after: Moments) -> float:
    """Mean absolute change of the observed stripe between two recorded epochs of one gate."""
    change = np.abs(after.mean - before.mean)
    return mean_of(change[np.isfinite(change)])


def settled_epoch(epochs: npt.ArrayLike, drifts: npt.ArrayLike, tolerance: float) -> int | None:
    """First epoch after which drift stays under the tolerance; None if it never does.

    ``drifts[i]`` leads from ``epochs[i - 1]`` to ``epochs[i]``, so ``drifts[0]`` is NaN; NaN is under no
    tolerance.
    """
    epochs = np.asarray(epochs)
    moving = np.flatnonzero(~(np.asarray(drifts, dtype=np.float64) < tolerance))
    last = int(moving[-1]) if moving.size else 0
    return int(epochs[last]) if last < len(epochs) - 1 else None


@dataclass(frozen=True, eq=False)
class Measured:
    """One gate in one epoch: its moments, and whatever of its row does not depend on other epochs."""

    epoch: int
    gate: str
    moments: Moments
    row: dict[str, Any]

    @classmethod
    def of_moments(cls, epoch: int, gate: str, moments: Moments) -> Measured:
        """Measure what moments alone tell."""
        return cls(epoch, gate, moments, _of_moments(moments))


def summarize(
    run: RecordedRun,
    *,
    epochs: Sequence[int] | None = None,
    gates: Sequence[Gate | str] | None = None,
    samples: bool = True,
    bootstrap: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> pd.DataFrame:
    """Tabulate every statistic, one row per epoch and gate, with one gate of one epoch in memory at a time.

    ``std`` is the mean over channels, ``drift`` is NaN at a gate's first epoch, ``flags`` joins its names by
    commas. ``bootstrap=0`` leaves the interval NaN; a run of moments alone leaves so whatever takes samples, and
    so does ``samples=False``, with one batch in memory at a time. Raises ValueError when the run holds no finished
    epoch.
    """
    epochs = run.epochs if epochs is None else epochs
    names = [gate.name for gate in run.gates] if gates is None else [name_of(gate) for gate in gates]
    one = partial(measure, run, gates=names, samples=samples, bootstrap=bootstrap, confidence=confidence, seed=seed)
    return tabulate(measured for epoch in epochs for measured in one(epoch))


def measure(
    run: RecordedRun,
    epoch: int,
    gates: Sequence[str],
    *,
    samples: bool = True,
    bootstrap: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Iterator[Measured]:
    """Measure gates of one epoch one after the other; see `summarize`, which tabulates them."""
    if not (samples and run.has_samples):
        for (_, gate), now in run.moments([epoch], gates).items():
            measured = Measured.of_moments(epoch, gate, now)
            if run.has_label_means:
                measured.row.update(_of_classes(now, run.label_means(gate, epoch)))
            yield measured
        return
    labels = run.labels(epoch)
    for gate in gates:
        values = run.attention(gate, epoch)
        now = Moments.of(values)
        if 0 < now.finite.sum() < now.finite.size:
            values = values[:, now.finite]
        row = _of_moments(now) | _of_samples(values, labels, stripe_strength(now))
        if bootstrap:
            interval = bootstrap_strength(values, resamples=bootstrap, confidence=confidence, seed=seed)
            row |= {"strength_low": interval.low, "strength_high": interval.high}
        yield Measured(epoch, gate, now, row)


def tabulate(measured: Iterable[Measured]) -> pd.DataFrame:
    """Put measured gates, epochs ascending, into a table with the drift from each gate's epoch before.

    Raises ValueError when there is none.
    """
    rows: list[dict[str, Any]] = []
    last: dict[str, Moments] = {}
    for each in measured:
        change = drift(last[each.gate], each.moments) if each.gate in last else math.nan
        rows.append({"epoch": each.epoch, "gate": each.gate, "drift": change} | each.row)
        last[each.gate] = each.moments
    if not rows:
        raise ValueError("nothing to summarize: the run holds no finished epoch; record one first")
    return pd.DataFrame(rows, columns=SUMMARY)


def _of_moments(moments: Moments) -> dict[str, Any]:
    strength = stripe_strength(moments)
    return {
        "channels": moments.mean.size,
        "samples": moments.count,
        "strength": strength.strength,
        "std": mean_of(moments.std[moments.finite]),
        "between": strength.between,
        "within": strength.within,
        "flags": ",".join(flags(moments)),
    }


def _of_samples(values: Array, labels: Labels, strength: Strength) -> dict[str, Any]:
    classes, shares = label_share(values, labels), shares_of(values, strength)
    return {
        "sample_share": shares.sample,
        "rest_share": shares.rest,
        "label_share": classes.eta_squared,
        "label_omega": classes.omega_squared,
        "rank": effective_rank(values),
    }


def _of_classes(moments: Moments, classes: ClassMeans) -> dict[str, Any]:
    share = label_share_of_means(moments, classes.means, classes.counts)
    return {"label_share": share.eta_squared, "label_omega": share.omega_squared}
