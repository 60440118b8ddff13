"""Time the last epoch of training SE and ASR, as `stripe train` trains them and by the reference recipe."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.networks import DEVICE, add_network, build
from benchmarks.reference import as_written, loader_as_written, train_as_written
from benchmarks.timing import Result, Run, Timing, measure, report
from stripe import keep_memory
from stripe.data import Loader, load_images
from stripe.recipe import Recipe
from stripe.training import fit, processes

FORMS = ("SE", "ASR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's and the training's arguments."""
    add_network(parser, rounds=2, batch=128)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="which networks to train")
    parser.add_argument("--dataset", default="hf:../shared/data/cifar10", metavar="URI", help="data set to train on")
    parser.add_argument("--samples", type=int, metavar="N", help="images per epoch (default: 4 batches)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="epochs per training; the last is timed")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="DataLoader processes of the reference")
    parser.add_argument("--amp", default="bf16", help="precision of stripe's training")
    parser.add_argument("--compile", action="store_true", help="time stripe's training with torch.compile as well")
    parser.add_argument("--plain", action="store_true", help="time the network without attention as well")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")


def run(arguments: argparse.Namespace) -> Result:
    """Time every form by both recipes."""
    cases = {}
    forms = [*arguments.forms, *(["plain"] if arguments.plain else [])]
    for form in forms:
        for recipe in ("reference", "stripe", *(["compiled"] if arguments.compile else [])):
            cases[f"{form}, {recipe}"] = partial(_prepare, recipe, form, arguments)
    timings = {
        name: Timing(timing.returned[1:], timing.peak_mb, None)  # the first run only warms up
        for name, timing in measure(cases, arguments.rounds).items()
    }
    rows = []
    for form in forms:
        its = {name: timing for name, timing in timings.items() if name.startswith(f"{form}, ")}
        rows += report(its, f"{form}, reference", images=_samples(arguments))
    return Result(rows)


def _samples(arguments: argparse.Namespace) -> int:
    samples: int = arguments.samples or 4 * arguments.batch
    return samples


class Timed:
    """Batches that note the seconds of every pass over them."""

    def __init__(self, loader: Any) -> None:
        """Wrap `loader`."""
        self._loader = loader
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of a pass, which is timed until the device is done with them."""
        start = time.perf_counter()
        yield from self._loader
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute from the loader."""
        return getattr(self._loader, name)


def _prepare(recipe: str, form: str, arguments: argparse.Namespace) -> Run:
    images = load_images(arguments.dataset, "train", samples=_samples(arguments))
    network = build(form, arguments.depth, arguments.module, len(images.classes))
    if recipe != "reference":
        if DEVICE == "cpu":
            keep_memory()
        batches = Timed(Loader(images, arguments.batch, train=True, device=processes().device))
        train = partial(_train_with_stripe, network, batches, arguments, compile=recipe == "compiled")
    else:
        batches = Timed(loader_as_written(images, arguments.batch, arguments.workers))
        train = partial(train_as_written, as_written(network), batches, arguments.epochs, arguments.lr, DEVICE)
    lasts: list[float] = []

    def run() -> list[float]:
        train()
        lasts.append(batches.seconds[-1])
        return lasts

    return run


def _train_with_stripe(network: nn.Module, batches: Timed, arguments: argparse.Namespace, *, compile: bool) -> None:
    recipe = Recipe(epochs=arguments.epochs, lr=arguments.lr, amp=arguments.amp, compile=compile)
    with tempfile.TemporaryDirectory() as folder:
        fit(network, batches, None, recipe, directory=Path(folder), description={}, save_every=0, progress=False)
