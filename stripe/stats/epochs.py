"""Every statistic over epochs: drift, the epoch that settles, and the table of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stripe.gate import Gate
from stripe.stats.arithmetic import mean_of
from stripe.stats.flags import flags
from stripe.stats.intervals import CONFIDENCE, strength_interval
from stripe.stats.labels import label_share
from stripe.stats.moments import Moments
from stripe.stats.rank import effective_ranks
from stripe.stats.runs import NamedGate, RecordedRun, ahead, gates_of, opened
from stripe.stats.strength import stripe_strength, two_way_shares

COLUMNS = {
    "epoch": "the recorded epoch",
    "gate": "the name of the gate",
    "channels": "how many channels it has",
    "samples": "how many samples were measured",
    "left_out": "how many samples were left out, because a value of theirs is not finite",
    "strength": "stripe strength, the share of variance that the channel alone explains; 1: perfect stripes",
    "strength_low": "lower end of its confidence interval, 95 % unless another level was requested",
    "strength_high": "upper end of that interval",
    "cv": "how far the gate is from constant, relative to its mean vector; 0: every sample gets the same vector",
    "std": "standard deviation over samples, the mean over channels",
    "between": "variance between channels, the part of the variance that is stripes",
    "within": "variance over samples, the mean over channels; strength = between / (between + within)",
    "sample_share": "share of variance that shifts all channels of a sample together",
    "rest_share": "share of variance that neither channel nor sample explains",
    "drift": "mean absolute change of the mean vector since the previous recorded epoch; NaN at the first",
    "label_share": "share of the within part that the class explains (eta squared); NaN without labels",
    "label_omega": "the same, corrected for what chance alone would explain (omega squared)",
    "rank": "how many directions the samples vary in (participation ratio); NaN unless requested",
    "flags": "dead (all values equal), constant (no sample differs), saturated (at a bound), nonfinite",
}
"""Columns of `summarize` and what they mean."""

SUMMARY = list(COLUMNS)
"""Names of the columns of `summarize`."""


def drift(before: Moments, after: Moments) -> float:
    """Mean absolute change of the observed stripe between two recorded epochs of one gate.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> from stripe.stats import Moments
        >>> round(drift(Moments.of(attention), Moments.of(attention + 0.05)), 3)
        0.05
    """
    change = np.abs(after.mean - before.mean)
    return mean_of(change[np.isfinite(change)])


def settled_epoch(epochs: npt.ArrayLike, drifts: npt.ArrayLike, tolerance: float) -> int | None:
    """First epoch after which drift stays under the tolerance; None if it never does.

    ``drifts[i]`` leads from ``epochs[i - 1]`` to ``epochs[i]``, so ``drifts[0]`` is NaN. A NaN never counts as under
    the tolerance.
    """
    epochs = np.asarray(epochs)
    moving = np.flatnonzero(~(np.asarray(drifts, dtype=np.float64) < tolerance))
    last = int(moving[-1]) if moving.size else 0
    return int(epochs[last]) if last < len(epochs) - 1 else None


@dataclass(frozen=True, eq=False)
class Measured:
    """One gate in one epoch: its moments, and the part of its row that does not depend on other epochs."""

    epoch: int
    gate: str
    moments: Moments
    row: dict[str, Any]


def summarize(
    run: RecordedRun | str | os.PathLike[str],
    *,
    epochs: Sequence[int] | None = None,
    gates: Sequence[Gate | str] | None = None,
    rank: bool = False,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Tabulate every statistic, one row per epoch and gate, from the moments that a run keeps beside its rows.

    Rows are read only if the run has no moments, for the label's share if there are too many classes to keep their
    means, and for the rank.

    Args:
        run: what `stripe.open_run` returns, or the path of a run.
        epochs: epochs of the run; all finished ones by default.
        gates: gates of the run, or their names; all by default.
        rank: compute the effective rank as well, which reads the rows; otherwise it is NaN.
        confidence: confidence level of the strength's interval.

    Returns:
        A table with the columns of `COLUMNS`:

        {columns}

    Raises:
        FileNotFoundError: there is no run at the path.
        ValueError: the run holds no finished epoch, or not the epoch or gate requested, or the confidence is not
            between 0 and 1.

    Example:
        >>> import stripe
        >>> run = stripe.load_example("cifar10-se-resnet20")
        >>> table = stripe.stats.summarize(run, epochs=[20], gates=["layer1.0", "layer3.1"])
        >>> table[["epoch", "gate", "strength", "cv"]].round(2)
           epoch      gate  strength    cv
        0     20  layer1.0      0.92  0.01
        1     20  layer3.1      0.40  0.11
    """
    run = opened(run)
    chosen = gates_of(run, gates)
    epochs = run.epochs if epochs is None else epochs
    return tabulate(measure(run, epochs, chosen, rank=rank, confidence=confidence))


if summarize.__doc__:  # None under python -OO
    summarize.__doc__ = summarize.__doc__.replace(
        "{columns}", "\n        ".join(f"- ``{name}``: {meaning}." for name, meaning in COLUMNS.items())
    )


def measure(
    run: RecordedRun,
    epochs: Sequence[int],
    gates: Sequence[NamedGate],
    *,
    rank: bool = False,
    confidence: float = CONFIDENCE,
) -> Iterator[Measured]:
    """Measure the gates of each epoch one after the other; see `summarize`, which tabulates them."""
    for epoch, found in _moments(run, epochs, [gate.name for gate in gates]):
        ranks = effective_ranks(run, epoch, found) if rank and run.has_samples else {}
        for gate in gates:
            moments = found[gate.name]
            row = row_of(moments, gate.form, confidence=confidence) | {"rank": ranks.get(gate.name, math.nan)}
            if moments.classes is None and run.has_samples:
                share = label_share(run.attention(gate.name, epoch), run.labels(epoch))
                row |= {"label_share": share.eta_squared, "label_omega": share.omega_squared}
            yield Measured(epoch, gate.name, moments, row)


def _moments(run: RecordedRun, epochs: Sequence[int], gates: Sequence[str]) -> Iterator[tuple[int, dict[str, Moments]]]:
    """Yield each epoch and its moments by gate; if the run keeps moments, the next epoch's are read meanwhile."""

    def read(epoch: int) -> dict[str, Moments]:
        return {gate: moments for (_, gate), moments in run.moments([epoch], gates).items()}

    found = ((epoch, read(epoch)) for epoch in epochs)
    return ahead(found) if run.keeps_moments else found  # measuring rows is too long for an uninterruptible thread


def tabulate(measured: Iterable[Measured]) -> pd.DataFrame:
    """Put measured gates, epochs ascending, into a table with the drift from each gate's previous epoch.

    Raises ValueError when ``measured`` is empty.
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


def row_of(moments: Moments, form: str = "multiplicative", *, confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Return the statistics of `summarize` that follow from a gate's moments and form: all but the drift and rank."""
    strength, interval = stripe_strength(moments), strength_interval(moments, confidence=confidence)
    shares, classes = two_way_shares(moments), label_share(moments)
    return {
        "channels": moments.mean.size,
        "samples": moments.count,
        "left_out": moments.left_out,
        "strength": strength.strength,
        "strength_low": interval.low,
        "strength_high": interval.high,
        "cv": float(moments.split.cv),
        "std": mean_of(moments.std[moments.finite]),
        "between": strength.between,
        "within": strength.within,
        "sample_share": shares.sample,
        "rest_share": shares.rest,
        "label_share": classes.eta_squared,
        "label_omega": classes.omega_squared,
        "flags": ",".join(flags(moments, form)),
    }
