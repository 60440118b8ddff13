"""Send a recorded epoch's attention to TensorBoard or Weights & Biases, beside whatever else is tracked there.

This module reads and draws a run and knows nothing of the training; it imports neither service before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stripe import figures, plots, stats
from stripe.gate import Gate, name_of
from stripe.plots.drawing import RESOLUTION
from stripe.store import Run, open_run

IMAGES = 100  # rows of a heatmap
PREFIX = "attention"

Pixels = npt.NDArray[np.uint8]


class Tracker:
    """Sends a recorded epoch to services: every gate's strength and CV, and the heatmaps of some gates as images.

    Call it with a run and an epoch, or pass it to `RecorderCallback` as `recorded`, whichever library trains:

        board = SummaryWriter("runs/a/tensorboard")  # or wandb.init(...), or a Lightning logger's `experiment`
        recording = RecorderCallback(None, gates, "runs/a", recorded=Tracker(board))

    In TensorBoard the step is the epoch's number. Weights & Biases counts its own steps, which may only increase, so
    the epoch's number is logged beside the values, as "attention/epoch", and is the x axis of their charts.
    """

    def __init__(self, *services: Any, gates: Sequence[Gate | str] | None = None) -> None:
        """Set the services that receive recorded epochs.

        Args:
            services: TensorBoard writers, with methods `add_scalar` and `add_image`, and runs of Weights & Biases.
            gates: the gates whose heatmaps are shown (default: up to 6, spread from the first to the last).

        Raises:
            TypeError: a service is neither a TensorBoard writer nor a run of Weights & Biases.
        """
        for service in services:
            if not (hasattr(service, "add_scalar") or hasattr(service, "define_metric")):
                raise TypeError(
                    f"cannot track with {type(service).__name__}: expected a TensorBoard writer or a run of wandb.init"
                )
        self._services = services
        self._gates = None if gates is None else [name_of(gate) for gate in gates]

    def __call__(self, run: Run | str | os.PathLike[str], epoch: int) -> None:
        """Send an epoch of a run (or of the run at a path) to every service; ValueError if there is no such epoch."""
        if not self._services:
            return
        run = run if isinstance(run, Run) else open_run(run)
        values = _values(run, epoch)
        images = {f"{PREFIX}/{gate}": _drawn(run, gate, epoch) for gate in self._shown(run)}
        for service in self._services:
            tell = _tell_tensorboard if hasattr(service, "add_scalar") else _tell_wandb
            tell(service, epoch, values, images)

    def _shown(self, run: Run) -> list[str]:
        """Return the gates whose heatmaps are shown; no gates for a run that holds moments alone."""
        if not run.has_samples:
            return []
        return self._gates or [gate.name for gate in figures.spread(run.gates, figures.GATES)]


def _values(run: Run, epoch: int) -> dict[str, float]:
    values = {}
    for (_, gate), moments in run.moments([epoch]).items():
        values[f"{PREFIX}/{gate}/strength"] = stats.stripe_strength(moments).strength
        values[f"{PREFIX}/{gate}/cv"] = stats.coefficient_of_variation(moments)
    return values


def _drawn(run: Run, gate: str, epoch: int) -> Pixels:
    """Return the heatmap of a gate's first images, by sample id, as pixels (height, width, 3)."""
    rows = run.attention(gate, epoch)[np.argsort(run.samples(epoch), kind="stable")[:IMAGES]]
    figure: Any = plots.stripe_heatmap(rows, title=f"{gate}, epoch {epoch}").figure
    plt.close(figure)
    figure.set_dpi(RESOLUTION)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _tell_tensorboard(writer: Any, epoch: int, values: Mapping[str, float], images: Mapping[str, Pixels]) -> None:
    for name, value in values.items():
        if np.isfinite(value):
            writer.add_scalar(name, value, epoch)
    for name, pixels in images.items():
        writer.add_image(name, pixels, epoch, dataformats="HWC")
    writer.flush()


def _tell_wandb(run: Any, epoch: int, values: Mapping[str, float], images: Mapping[str, Pixels]) -> None:
    wandb = import_module("wandb")
    run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/epoch")
    pictures = {name: wandb.Image(pixels) for name, pixels in images.items()}
    run.log({f"{PREFIX}/epoch": epoch, **values, **pictures})
