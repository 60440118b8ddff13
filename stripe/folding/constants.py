"""Which constant stands for a gate: its mean, or its mean weighted by the energy of what it scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.gates import Gate, read_gates
from stripe.messages import Progress
from stripe.stats import Moments, RecordedRun

Array = npt.NDArray[np.floating[Any]]
Constants = Mapping[str, Array]  # by gate, (C,)

WEIGHTINGS = ("mean", "energy")


@dataclass(frozen=True, eq=False)
class GateUse:
    """What a gate g did over some samples, where e is the mean square of what it scales; arrays are (C,) float64.

    `values` are the moments of g; `energy` is E[e], `scaled` E[g e], `result` E[g^2 e]. Where a gate adds, e is 1.
    """

    values: Moments
    energy: Array
    scaled: Array
    result: Array

    def constant(self, weighting: str) -> Array:
        """Return E[g], or E[g e] / E[e], which leaves the least error; a channel of no energy has its mean.

        Raises:
            ValueError: no such weighting.
        """
        if weighting not in WEIGHTINGS:
            raise ValueError(f"no weighting '{weighting}'; expected one of {', '.join(WEIGHTINGS)}")
        if weighting == "mean":
            return self.values.mean
        used = self.energy > 0
        return np.where(used, self.scaled / np.where(used, self.energy, 1.0), self.values.mean)

    def error(self, constant: Array) -> float:
        """Return the share of the result's energy that is wrong at a constant: sum E[(g - c)^2 e] / sum E[g^2 e]."""
        wrong = self.result - 2 * constant * self.scaled + constant**2 * self.energy
        total = self.result.sum()
        return float(max(wrong.sum(), 0.0) / total) if total > 0 else 0.0


def measure_gates(
    model: nn.Module, gates: Sequence[Gate], loader: Iterable[Sequence[Tensor]], *, progress: Progress = iter
) -> dict[str, GateUse]:
    """Run the network over batches (images, ...) and return what each gate did; memory stays at one batch.

    Raises:
        RuntimeError: the loader is empty.
    """
    sums: dict[str, _Sums] = {gate.name: _Sums(gate.form == "additive") for gate in gates}
    device = device_of(model)
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(gate: Gate, kind: str, values: Tensor) -> None:
        seen[gate.name, kind] = values

    with torch.inference_mode(), read_gates(model, gates, keep, energy=True):
        for images, *_ in progress(loader):
            model(images.to(device))
            for name, total in sums.items():
                total.add(*(seen[name, kind].double().cpu().numpy() for kind in ("attention", "energy")))
    return {name: total.use() for name, total in sums.items()}


def mean_constants(run: RecordedRun, epoch: int | None = None) -> dict[str, Array]:
    """Return the observed stripe of every gate of a run, by default at its last epoch."""
    epoch = run.epochs[-1] if epoch is None else epoch
    names = [gate.name for gate in run.gates]
    return {name: moments.mean for (_, name), moments in run.moments([epoch], names).items()}


class _Sums:
    """The sums behind a GateUse, over batches."""

    def __init__(self, adds: bool) -> None:
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
