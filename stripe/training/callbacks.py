"""What is done after each epoch of a training."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from torch import nn


class Callback(Protocol):
    """Something to do after each epoch, on every process."""

    def on_epoch_end(self, model: nn.Module, epoch: int, metrics: Mapping[str, float]) -> None:
        """Look at the model after `epoch` epochs, in eval mode and full precision, before it is saved.

        After a crash the epoch may be trained and reported again, with the same result.
        """
        ...


class TensorBoard:
    """A callback that writes the metrics as TensorBoard scalars, named as in metrics.csv; use it in a `with` block.

    Steps are epochs. Whatever is already there for the first new epoch and later ones is purged, so a resumed training
    shows every epoch once. Other code may write scalars and images through it, as through a SummaryWriter.
    """

    def __init__(self, directory: str | Path) -> None:
        """Write into `directory`; ModuleNotFoundError without the extra `tensorboard`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "TensorBoard's files need the package tensorboard: pip install 'stripe-observation[tensorboard]'"
            ) from error
        self._open = functools.partial(SummaryWriter, str(directory))
        self._writer: Any = None

    def on_epoch_end(self, model: nn.Module, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the epoch's finite metrics to the disk."""
        for name, value in metrics.items():
            if name != "epoch" and math.isfinite(value):
                self.add_scalar(name, value, epoch)
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number."""
        self._at(step).add_scalar(name, value, step)

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str = "CHW") -> None:
        """Write an image."""
        self._at(step).add_image(name, pixels, step, dataformats=dataformats)

    def flush(self) -> None:
        """Write what is still buffered to the disk."""
        if self._writer:
            self._writer.flush()

    def _at(self, step: int) -> Any:
        """Return the writer; when it is opened, it purges what is already there from `step` on."""
        self._writer = self._writer or self._open(purge_step=step)
        return self._writer

    def __enter__(self) -> Self:
        """Return the callback."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, if there is one."""
        if self._writer:
            self._writer.close()
