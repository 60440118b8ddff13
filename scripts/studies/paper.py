"""Paper: the four rows of the paper's table (SE, ASR, plain, both) by its recipe, recorded after every epoch.

After every epoch the moments of attention over all test images, the attention of a probe set, and the test accuracy
are kept; the tables that follow from them are written to `paper` beside results.csv after every slice of time, whether
or not the training is finished. As in the paper, training uses all training images and no validation images, unless
--val-samples is given. The paper's "best" accuracy, that of the epoch best on the test set, is optimistic, and is
listed beside that of the last epoch. The setting is paper-DATA-resnetDEPTH.
"""

import argparse
import functools
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import stripe
from stripe.data import ImageSet, Loader
from stripe.files import write_csv, write_json
from stripe.stats import summarize
from stripe.training import processes
from studies.forms import add_trainings, build, cases_of, recipe_of
from studies.table import Row, Table
from studies.training import Images, OutOfTime, load, pending, train

ORDER = ("attention", "asr", "plain", "both")
RECIPE = ("epochs", "milestones", "lr", "weight_decay", "amp", "compile")
SETTINGS = ("dataset", "depth", "block", "module", "batch", "train_samples", "val_samples", *RECIPE)
PAPERS = {"epochs": 164, "scheduler": "step", "weight_decay": 1e-4, "amp": "bf16"}
EVALUATED = 1000  # images at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments; the defaults are the paper's."""
    add_trainings(parser, ORDER)
    parser.set_defaults(dataset="cifar100", depth=164, compile=torch.cuda.is_available(), **PAPERS)
    parser.set_defaults(seeds=[1], train_samples=None, val_samples=0, record=500)


def run(arguments: argparse.Namespace) -> None:
    """Train every case without a row, as far as time allows, and write the results so far of each."""
    config = {name: getattr(arguments, name) for name in SETTINGS}
    data = arguments.dataset.rstrip("/").split("/")[-1]
    setting = arguments.setting or f"paper-{data}-resnet{arguments.depth}"
    results = Table(arguments.out / "results.csv", config, setting=setting)
    images = functools.cache(partial(load, arguments, arguments.train_samples))  # loaded when first needed
    cases = list(cases_of(arguments.forms, arguments.module, arguments.seeds))
    for case, directory, deadline in pending(results, cases, arguments.runs / setting, arguments.minutes):
        observer, name = Observer(directory, arguments.record), directory.name
        with suppress(OutOfTime):
            try:
                row = train_case(case, images(), observer, arguments, config, deadline)
                results.put(case, row | {"accuracy_best_on_test": max(e["test_accuracy"] for e in observer.epochs)})
                print(f"{name}: {row['accuracy_last']:.2f} %, {row['images_per_second']:.0f} images/s", flush=True)
            finally:
                observer.report(arguments.out / "paper", name)


def train_case(
    case: Row,
    images: tuple[ImageSet, ImageSet],
    observer: "Observer",
    arguments: argparse.Namespace,
    config: Row,
    deadline: float,
) -> Row:
    """Train one case, or resume its training; return its row."""
    training, test = images
    parts = Images(training, None, test)
    if arguments.val_samples:
        parts = Images(*training.hold_out(arguments.val_samples, case["seed"]), test)
    same_config(observer.directory.with_suffix(".json"), config)
    model, description = build(case, parts, arguments)
    model.to(processes().device)
    observer.begin(model, test, description, gated=case["form"] in ("attention", "both"))
    return train(
        model,
        parts,
        recipe_of(arguments, case["seed"]),
        directory=observer.directory,
        description=description,
        batch=arguments.batch,
        callbacks=[observer],
        deadline=deadline,
    )


def same_config(path: Path, config: Row) -> None:
    """Save the options of a training, or compare them with those it began with; ValueError where they differ."""
    begun = json.loads(path.read_text()) if path.exists() else None
    if begun is None:
        path.write_text(json.dumps(config))
    elif begun != json.loads(json.dumps(config)):
        raise ValueError(f"'{path}' says that the training was begun with {begun}: name another --setting")


class Observer:
    """A callback that tests the network after every epoch and, where attention depends on the image, records it.

    The moments over all test images become the run `DIRECTORY/all`, the rows of the probe set the run `DIRECTORY`.
    """

    def __init__(self, directory: Path, probe: int) -> None:
        """Read the notes of the earlier epochs, if the training is resumed."""
        self.directory, self._probe = directory, probe
        self._notes = directory / "test.json"
        resumable = (directory / "checkpoints" / "last.pt").exists() and self._notes.exists()
        self.epochs: list[Row] = json.loads(self._notes.read_text()) if resumable else []

    def begin(self, model: nn.Module, test: ImageSet, description: Mapping[str, Any], *, gated: bool) -> None:
        """Prepare to observe a network on these test images."""
        device = processes().device
        self._test = Loader(test, EVALUATED, device=device)
        few = test.take(min(self._probe, len(test)))
        self._few = Loader(few, EVALUATED, device=device)
        self._gates = stripe.find_gates(model, next(iter(self._few))[0][:2]) if gated else []
        about = {"description": description["model"], "seeds": {"seed": description["seed"]}, "overwrite": True}
        self._all_of = about | {"data": test.describe(), "contents": "moments"}
        self._few_of = about | {"data": few.describe()}

    def on_epoch_end(self, model: nn.Module, epoch: int, metrics: Mapping[str, float]) -> None:
        """Test the network, record its attention, and note the test accuracy in percent and the mean loss."""
        start = time.perf_counter()
        totals = torch.zeros(3, dtype=torch.float64, device=processes().device)
        with self._recorder(model, self.directory / "all", self._all_of) as recorder, torch.inference_mode():
            for images, labels, sample_ids in self._test:
                logits = model(images)
                if recorder:
                    recorder.commit(sample_ids, labels, epoch=epoch)
                loss, correct = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
                totals += torch.stack([loss, correct, torch.ones_like(loss) * len(labels)])
        with self._recorder(model, self.directory, self._few_of) as recorder:
            if recorder:
                recorder.record(self._few, epoch=epoch)
        loss, correct, samples = totals.tolist()
        tested = {"test_loss": loss / samples, "test_accuracy": 100 * correct / samples}
        self.epochs = [row for row in self.epochs if row["epoch"] < epoch]
        self.epochs.append(dict(metrics) | tested | {"observing_seconds": time.perf_counter() - start})
        write_json(self._notes, self.epochs)

    def _recorder(self, model: nn.Module, path: Path, options: Mapping[str, Any]) -> Any:
        return stripe.Recorder(model, self._gates, path, **options) if self._gates else nullcontext()

    def report(self, out: Path, name: str) -> None:
        """Write as CSVs the epochs and, where attention was recorded, its statistics by epoch and gate."""
        notes = self.directory / "seconds.json"
        taken = json.loads(notes.read_text()) if notes.exists() else {}
        rows = [row | taken.get(str(int(row["epoch"])), {}) for row in self.epochs]
        if rows:
            write_csv(out / f"{name}-epochs.csv", pd.DataFrame(rows))
        if rows and self._gates:
            write_csv(out / f"{name}-stripes.csv", summarize(stripe.open_run(self.directory / "all")))
