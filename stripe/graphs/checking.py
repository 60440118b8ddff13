"""Comparison of networks' outputs with those of a reference, which runs once and whose outputs are kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stripe.graphs.file import GraphFile, Tensor
from stripe.graphs.inputs import Batch
from stripe.graphs.trace import run

ROUNDINGS = 10.0
"""How many times as much rounding along the way may change the outputs as a change of the inputs' last bits does."""


class Reference:
    """The outputs of a network on some samples."""

    def __init__(self, file: GraphFile, samples: Iterable[Batch], tolerance: float) -> None:
        """Run the network; `tolerance` is the largest relative error allowed, unless rounding may cause more.

        Raises:
            ValueError: there are no samples, or two runs of the network differ.
        """
        self._samples = samples
        self._paths: list[Path] = []
        session = file.session(plain=True)
        for batch in samples:
            path = file.spool.folder / f"expected-{len(self._paths)}.npz"
            np.savez(path, *run(session, batch.inputs))
            self._paths.append(path)
        first = next(iter(samples), None)
        if first is None:
            raise ValueError("there are no inputs to compare on: give at least one sample")
        difference = _worst([(run(session, first.inputs), self._expected(0))])
        if not difference <= tolerance:
            raise ValueError(
                f"the network differs from itself by {difference:.2g} between two runs on the same inputs, so that"
                " nothing can be compared: take out what is random in it"
            )
        moved = replace(first, inputs={name: _moved(array) for name, array in first.inputs.items()})
        self.tolerance = max(tolerance, ROUNDINGS * _worst([(run(session, moved.inputs), self._expected(0))]))

    def error(self, file: GraphFile, batches: int | None = None) -> float:
        """Return another network's largest difference in an output over its largest value, for the worst output.

        The error is infinite where an output has another shape. With `batches`, only the first so many batches count.
        """
        session = file.session(plain=True)
        found = (run(session, batch.inputs) for batch in islice(self._samples, batches))
        return _worst((each, self._expected(i)) for i, each in enumerate(found))

    def _expected(self, position: int) -> list[Tensor]:
        with np.load(self._paths[position]) as held:
            return [held[name] for name in held.files]


def _worst(pairs: Iterator[Any] | list[Any]) -> float:
    """Compare outputs batch by batch; integer outputs count only where the network has no others."""
    differences: dict[int, float] = {}
    largest: dict[int, float] = {}
    for found, expected in pairs:
        compared = [i for i, each in enumerate(expected) if each.dtype.kind == "f"] or [*range(len(expected))]
        for i in compared:
            if found[i].shape != expected[i].shape:
                return float("inf")
            a, b = np.asarray(found[i], np.float64), np.asarray(expected[i], np.float64)
            gap = float(np.abs(a - b).max(initial=0.0))
            differences[i] = float("inf") if np.isnan(gap) else max(gap, differences.get(i, 0.0))
            largest[i] = max(float(np.abs(b).max(initial=0.0)), largest.get(i, 0.0))
    return max((gap / max(largest[i], 1e-300) if gap else 0.0 for i, gap in differences.items()), default=0.0)


def _moved(array: Tensor) -> Tensor:
    """Change the last bit of every number of a floating-point input."""
    return np.nextafter(array, np.inf, dtype=array.dtype) if array.dtype.kind == "f" else array
