"""Learn constants by Adam, in units of what each gate does. NumPy alone: the caller computes the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stripe.folding.uses import Array, GateUse
from stripe.gate import Gate

RATE = 0.01  # learning rate, in units of a gate's usual value and, for shifts, of its usual product
DECAYS = (0.9, 0.999)  # of Adam's two averages
TINY = 1e-8


class Learner:
    """The scale and shift per channel of some gates, which start at the "energy" constants without a shift.

    A scale moves in units of the root mean square of its gate's constants, a shift in units of its channel's usual
    product; the shift of a gate that adds stays 0, since its constant is a shift already. The rate falls linearly to 0
    over `steps`.
    """

    def __init__(self, gates: Sequence[Gate], uses: Mapping[str, GateUse], steps: int, rate: float = RATE) -> None:
        """Take the gates and what they did."""
        self._steps, self._rate, self._taken = steps, rate, 0
        self._start, self._units = {}, {}
        for gate in gates:
            use = uses[gate.name]
            start = use.constant("energy")
            unit = np.full_like(start, np.sqrt(np.mean(start**2)) or 1.0)
            given = np.zeros_like(start) if gate.form == "additive" else np.sqrt(use.result)
            self._start[gate.name] = np.stack([start, np.zeros_like(start)])
            self._units[gate.name] = np.stack([unit, given])
        self._moved, self._first, self._second = (
            {name: np.zeros_like(start) for name, start in self._start.items()} for _ in range(3)
        )

    def now(self) -> dict[str, Array]:
        """Return scale and shift of every gate as they are, (2, C) each."""
        return {name: start + self._units[name] * self._moved[name] for name, start in self._start.items()}

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Take one step of Adam (Kingma and Ba 2015) against the gradients (2, C) of the loss."""
        rate = self._rate * (1 - self._taken / self._steps)
        self._taken += 1
        for name, gradient in gradients.items():
            own = gradient * self._units[name]
            for average, decay, value in zip((self._first, self._second), DECAYS, (own, own**2), strict=True):
                average[name] = decay * average[name] + (1 - decay) * value
            first, second = (
                average[name] / (1 - decay**self._taken)
                for average, decay in zip((self._first, self._second), DECAYS, strict=True)
            )
            self._moved[name] -= rate * first / (np.sqrt(second) + TINY)
