"""What a gate did over some samples, and the constants that follow from it. NumPy alone: no network is run here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stripe.stats import Moments, RecordedRun

Array = npt.NDArray[np.floating[Any]]
Constants = Mapping[str, Array]  # by gate, (C,), or (2, C) with a shift, or (C, C + 1), a matrix and a shift

AVERAGES = ("mean", "energy")
"""The constants that follow from what a gate did, without regard to the network's output."""


@dataclass(frozen=True, eq=False)
class GateUse:
    """What a gate g did over some samples, where e is the mean square of what it scales; arrays are (C,) float64.

    `values` are the moments of g; `energy` is E[e], `scaled` E[g e], `result` E[g^2 e]. Where a gate adds, e is 1.
    """

    values: Moments
    energy: Array
    scaled: Array
    result: Array

    def constant(self, kind: str) -> Array:
        """Return E[g], or E[g e] / E[e], which leaves the least error; a channel without energy gets its mean.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in AVERAGES:
            raise ValueError(f"no constant '{kind}'; expected one of {', '.join(AVERAGES)}")
        return self.values.mean if kind == "mean" else weighted_mean(self.energy, self.scaled, self.values.mean)

    def error(self, constant: Array) -> float:
        """Return the error at a constant, as a share of the result's energy: sum E[(g - c)^2 e] / sum E[g^2 e]."""
        wrong = self.result - 2 * constant * self.scaled + constant**2 * self.energy
        total = self.result.sum()
        return float(max(wrong.sum(), 0.0) / total) if total > 0 else 0.0


def weighted_mean(weight: Array, weighted: Array, otherwise: Array) -> Array:
    """Return E[g w] / E[w] per channel; a channel without any weight gets the value `otherwise`."""
    used = weight > 0
    return np.where(used, weighted / np.where(used, weight, 1.0), otherwise)


def mean_constants(run: RecordedRun, epoch: int | None = None) -> dict[str, Array]:
    """Return the observed stripe of every gate of a run, by default at its last epoch."""
    epoch = run.epochs[-1] if epoch is None else epoch
    names = [gate.name for gate in run.gates]
    return {name: moments.mean for (_, name), moments in run.moments([epoch], names).items()}


class Sums:
    """The sums behind a GateUse, over batches; for a gate that adds, nothing is weighted."""

    def __init__(self, adds: bool = False) -> None:
        """Start with no samples."""
        self.values: Moments | None = None
        self._adds = adds
        self._sums: Array = np.zeros(0)

    def add(self, values: Array, energies: Array) -> None:
        """Take the gate's values (n, C) and the energies of what it scaled (n, C)."""
        energies = np.ones_like(values) if self._adds else energies
        part = np.stack([energies.sum(0), (values * energies).sum(0), (values**2 * energies).sum(0)])
        moments = Moments.of(values)
        self._sums = part if self.values is None else self._sums + part
        self.values = moments if self.values is None else self.values.merge(moments)

    def use(self) -> GateUse:
        """Return the means."""
        assert self.values is not None
        return GateUse(self.values, *(self._sums / self.values.count))
