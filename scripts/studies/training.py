"""Train networks, or finish their trainings, and test them in deployed form; each epoch's time and energy are noted.

Several processes may run at once and share the trainings.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from stripe import asr
from stripe.data import ImageSet, Loader, load_images
from stripe.files import write_json
from stripe.recipe import Recipe
from stripe.training import Callback, evaluate, fit, processes
from studies.energy import joules
from studies.table import Row, Table, claimed


class OutOfTime(Exception):
    """The slice of time is used up; what was trained is saved."""


@dataclass(frozen=True)
class Images:
    """Parts of a data set: validation, if there is any, chooses the best epoch; test only reports."""

    training: ImageSet
    validation: ImageSet | None
    test: ImageSet


def load(arguments: argparse.Namespace, training: int | None, test: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Load `training` and `test` images (None: all), both normalised with the training images' mean and std."""
    images = load_images(arguments.dataset, "train", samples=training, data_dir=arguments.data_dir)
    as_trained = {"mean": images.mean, "std": images.std, "data_dir": arguments.data_dir}
    return images, load_images(arguments.dataset, "test", samples=test, **as_trained)


def pending(
    table: Table, cases: Sequence[Row], prefix: Path, minutes: float, at_least: int = 1
) -> Iterator[tuple[Row, Path, float]]:
    """Yield each case without a row, its directory, claimed against other processes, and the deadline (monotonic).

    After the deadline no case is begun except the first `at_least`; at the end the number of cases left is printed.
    """
    deadline = time.monotonic() + 60 * minutes
    for number, case in enumerate(table.missing(cases)):
        if number >= at_least and time.monotonic() >= deadline:
            break
        directory = prefix.with_name("-".join([prefix.name, *map(str, case.values())]))
        with claimed(directory) as mine:
            if mine and table.missing([case]):  # else another process is training it, or has trained it
                yield case, directory, deadline
    if left := len(table.missing(cases)):
        print(f"{left} of {len(cases)} trainings to go; run it again")


class TimedLoader(Loader):
    """Loads training batches, notes each epoch's time and energy in a file, and stops at `deadline` (monotonic)."""

    def __init__(self, images: ImageSet, batch_size: int, *, seed: int, notes: Path, deadline: float) -> None:
        """Read the notes of a resumed training's earlier epochs from the file."""
        super().__init__(images, batch_size, train=True, seed=seed, device=processes().device)
        self._notes, self._deadline, self._now = notes, deadline, 0
        self.seconds: dict[str, Row] = json.loads(notes.read_text()) if notes.exists() else {}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; OutOfTime after the deadline, except before the first epoch of this process."""
        if self._now and time.monotonic() >= self._deadline:
            raise OutOfTime
        self._now = epoch
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the epoch's batches, then note its time."""
        wall, cpu, energy = time.perf_counter(), time.process_time(), joules()
        yield from super().__iter__()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[str(self._now)] = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "joules": joules() - energy,
        }
        write_json(self._notes, self.seconds)

    def total(self, clock: str) -> float:
        """Return the sum over all epochs of seconds on the "wall" clock, of "cpu" seconds, or of "joules"."""
        return float(sum(math.nan if epoch[clock] is None else epoch[clock] for epoch in self.seconds.values()))


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
    """Train, or resume a training; return accuracies in percent at the last and the best validated epoch.

    Raises OutOfTime when `deadline` has passed before an epoch begins, except for the first epoch of this call.
    """
    last = directory / "checkpoints" / "last.pt"
    if not last.exists():
        shutil.rmtree(directory, ignore_errors=True)  # the training stopped within its first epoch
    notes = directory / "seconds.json"
    loader = TimedLoader(images.training, batch, seed=recipe.seed, notes=notes, deadline=deadline)
    metrics = fit(
        model,
        loader,
        None if images.validation is None else _batches(images.validation, batch),
        recipe,
        directory=directory,
        description=description,
        callbacks=callbacks,
        resume=last if last.exists() else None,
        save_every=0,
        progress=False,
    )
    row = _tested(model, metrics, images, directory / "checkpoints", batch)
    row |= {"seconds": loader.total("wall"), "cpu_seconds": loader.total("cpu"), "joules": loader.total("joules")}
    return row | {"images_per_second": len(loader.seconds) * loader.samples / row["seconds"]}


def _tested(model: nn.Module, metrics: pd.DataFrame, images: Images, checkpoints: Path, batch: int) -> Row:
    """Return the accuracies of the last epoch and, where there are validation images, of the epoch that they choose."""
    validated = metrics["val_accuracy"]
    epochs = {"last": len(metrics) - 1}
    if images.validation is not None:
        epochs["best"] = int(validated.argmax())
    row: Row = {"best_epoch": epochs["best"] + 1} if "best" in epochs else {}
    for name, epoch in epochs.items():
        model.load_state_dict(torch.load(checkpoints / f"{name}.pt", weights_only=True)["state_dict"])
        row[f"accuracy_{name}"] = evaluate(asr.deploy(model), _batches(images.test, batch)).accuracy
        row[f"val_accuracy_{name}"] = float(validated[epoch])
    return row


def _batches(images: ImageSet, batch: int) -> Loader:
    return Loader(images, batch, device=processes().device)
