"""Heatmaps small enough for a page: evenly chosen images, channels and epochs, with one byte per value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stripe import stats
from stripe.report.packing import Codes, Plain, Values, numbers, pack, quantise, spread
from stripe.store import KINDS, Run

MAX_EPOCHS = 20
SIZES = (
    (500, 512),
    (100, 512),
    (100, 64),
    (50, 64),
    (40, 64),
    (1, 1),
)  # images and channels; each step gives up more of them to make room

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Choice:
    """The part of a run that is shown: the epochs, the number of images, and the channels of each gate."""

    epochs: list[int]
    rows: int
    channels: dict[str, list[int]]

    def bytes(self, kinds: int) -> int:
        """Return an upper bound on the bytes that the panels of `kinds` kinds take, in base64."""
        width = sum(len(channels) for channels in self.channels.values())
        panels = len(self.epochs) * kinds
        ids = len(self.epochs) * self.rows * 36  # the worst case: every epoch has images of its own
        indices = sum(7 * len(channels) for channels in self.channels.values())
        return int(1.34 * panels * width * (self.rows + 1)) + len(self.channels) * (200 + 40 * panels) + ids + indices


def choose(run: Run, room: int, samples: int) -> Choice:
    """Choose as many of an epoch's `samples` and of the channels as fit into `room` bytes over all epochs."""
    epochs = [run.epochs[i] for i in spread(len(run.epochs), MAX_EPOCHS)]
    for size, smaller in pairwise(SIZES):
        for rows, width in np.geomspace(size, smaller, 50).round().astype(int).tolist():
            channels = {gate.name: spread(gate.channels, width) for gate in run.gates}
            choice = Choice(epochs, min(rows, samples), channels)
            if choice.bytes(_kinds(run)) <= room:
                return choice
    return choice


def sample_panels(
    run: Run, room: int, *, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, Any] | None:
    """Return the panels of every gate and kind in at most `room` bytes; None for a run without samples."""
    if not run.has_samples:
        return None
    samples, kinds = len(run.samples(run.epochs[-1])), KINDS[: _kinds(run)]
    choice = choose(run, room, samples)
    panels: dict[str, list[Codes]] = {gate: [] for gate in choice.channels}
    ranges: dict[str, list[list[float | None]]] = {gate: [] for gate in choice.channels}
    measured: dict[str, list[list[Plain]]] = {gate: [] for gate in choice.channels}
    images, images_of = [], []
    for epoch, rows, shown in _chosen_rows(run, choice, progress):
        if shown not in images:
            images.append(shown)
        images_of.append(images.index(shown))
        for kind in kinds:
            found, moments = _read(run, epoch, kind, rows, choice)
            for gate, values in found.items():
                codes, low, high = quantise(values)
                panels[gate].append(codes)
                ranges[gate].append([low, high])
                if gate in moments:
                    measured[gate].append(_measure(moments[gate]))
    return {
        "epochs": choice.epochs,
        "all_epochs": len(run.epochs),
        "kinds": kinds,
        "images": images,
        "images_of": images_of,
        "all_images": samples,
        "gates": [
            {
                "channels": choice.channels[gate],
                "ranges": ranges[gate],
                "panels": pack(panels[gate]),
                "squeeze": measured[gate],
            }
            for gate in choice.channels
        ],
    }


def _kinds(run: Run) -> int:
    return 2 if run.manifest.squeeze else 1


def _chosen_rows(
    run: Run, choice: Choice, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> Iterator[tuple[int, Indices, dict[str, list[Any]]]]:
    """Yield epochs, row numbers and the images in these rows: those chosen from the last epoch if all are there."""
    last = run.samples(choice.epochs[-1])
    wanted = last[spread(len(last), choice.rows)]
    for epoch in progress(choice.epochs):
        samples = run.samples(epoch)
        order = np.argsort(samples, kind="stable")
        rows = order[np.searchsorted(samples, wanted, sorter=order).clip(max=len(samples) - 1)]
        if not np.array_equal(samples[rows], wanted):
            rows = np.array(spread(len(samples), choice.rows), dtype=np.intp)
        ids = [number if abs(number) < 2**53 else str(number) for number in samples[rows].tolist()]
        yield epoch, rows, {"samples": ids, "labels": run.labels(epoch)[rows].tolist()}


def _read(
    run: Run, epoch: int, kind: str, rows: Indices, choice: Choice
) -> tuple[dict[str, Values], dict[str, stats.Moments]]:
    """Return the chosen values of every gate, (images, channels), and, for the squeeze, the moments of all values.

    Apart from these, one row group at a time is in memory.
    """
    found = {gate: np.empty((len(rows), len(channels)), np.float32) for gate, channels in choice.channels.items()}
    moments: dict[str, stats.Moments] = {}
    start = 0
    for batch in run.batches(epoch, kind=kind):
        size = len(next(iter(batch.values())))
        here = np.flatnonzero((rows >= start) & (rows < start + size))
        for gate, values in batch.items():
            found[gate][here] = values[rows[here] - start][:, choice.channels[gate]]
            if kind == "squeeze":  # the moments of the attention are kept beside the rows
                its = stats.Moments.of(values, sample_ids=np.arange(start, start + size))
                moments[gate] = moments[gate].merge(its) if gate in moments else its
        start += size
    return found, moments


def _measure(moments: stats.Moments) -> list[Plain]:
    """Return the strength and the CV."""
    return numbers([stats.stripe_strength(moments).strength, stats.coefficient_of_variation(moments)])
