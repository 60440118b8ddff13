"""Train a network, or finish its training, and test it in deployed form; every epoch's time is noted."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stripe import asr
from stripe.data import ImageSet, Loader
from stripe.training import Callback, Recipe, evaluate, fit
from studies.table import Row


class OutOfTime(Exception):
    """The slice of time is used up; what was trained is saved."""


@dataclass(frozen=True)
class Images:
    """Parts of a data set; validation chooses, test only reports."""

    training: ImageSet
    validation: ImageSet
    test: ImageSet


class TimedLoader(Loader):
    """Training batches that note the seconds of every epoch in a file, and begin none after `deadline` (monotonic)."""

    def __init__(self, images: ImageSet, batch_size: int, *, seed: int, notes: Path, deadline: float) -> None:
        """Read what the file notes already: a resumed training's earlier epochs."""
        super().__init__(images, batch_size, train=True, seed=seed)
        self._notes, self._deadline, self._now = notes, deadline, 0
        self.seconds: dict[str, Row] = json.loads(notes.read_text()) if notes.exists() else {}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; OutOfTime after the deadline, but one epoch is always made."""
        if self._now and time.monotonic() >= self._deadline:
            raise OutOfTime
        self._now = epoch
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the epoch's batches, then note its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield from super().__iter__()
        self.seconds[str(self._now)] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        partial = self._notes.with_suffix(".partial")
        partial.write_text(json.dumps(self.seconds))
        partial.replace(self._notes)

    def total(self, clock: str) -> float:
        """Return the seconds of all epochs by the "wall" clock or the "cpu" time of this process."""
        return float(sum(epoch[clock] for epoch in self.seconds.values()))


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    directory: Path,
    description: dict[str, Any],
    batch: int,
    callbacks: Sequence[Callback] = (),
    deadline: float = math.inf,
) -> Row:
    """Train, or go on where it stopped; return accuracies in percent of the last and the best validated epoch.

    Raises OutOfTime when `deadline` passes before the last epoch begins, the first of this call excepted.
    """
    last, best = (directory / "checkpoints" / name for name in ("last.pt", "best.pt"))
    if not last.exists():
        shutil.rmtree(directory, ignore_errors=True)  # stopped within its first epoch
    notes = directory / "seconds.json"
    loader = TimedLoader(images.training, batch, seed=recipe.seed, notes=notes, deadline=deadline)
    metrics = fit(
        model,
        loader,
        Loader(images.validation, batch),
        recipe,
        directory=directory,
        description=description,
        callbacks=callbacks,
        resume=last if last.exists() else None,
        save_every=0,
        progress=False,
    )
    validated, chosen = metrics["val_accuracy"], int(metrics["val_accuracy"].argmax())
    row: Row = {"best_epoch": chosen + 1}
    for name, path, epoch in (("last", last, recipe.epochs - 1), ("best", best, chosen)):
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        row[f"accuracy_{name}"] = evaluate(asr.deploy(model), Loader(images.test, batch)).accuracy
        row[f"val_accuracy_{name}"] = float(validated[epoch])
    speed = len(loader.seconds) * loader.samples / loader.total("wall")
    return row | {"seconds": loader.total("wall"), "cpu_seconds": loader.total("cpu"), "images_per_second": speed}
