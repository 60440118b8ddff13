"""Time an epoch of SE and ASR as `stripe train` trains them and by the reference recipe."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.networks import DEVICE, add_network, build
from benchmarks.reference import as_written, loader_as_written, train_as_written
from benchmarks.timing import Result, Run, measure, report
from stripe import keep_memory
from stripe.data import ImageSet, Loader, load_images
from stripe.training import Recipe, fit

FORMS = ("SE", "ASR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's and the training's arguments."""
    add_network(parser, rounds=2, batch=128)
    parser.add_argument("--dataset", default="hf:../shared/data/cifar10", metavar="URI", help="what to train on")
    parser.add_argument("--samples", type=int, metavar="N", help="images an epoch (default: 4 batches)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="DataLoader processes of the reference")
    parser.add_argument("--amp", default="bf16", help="precision of stripe's training")
    parser.add_argument("--compile", action="store_true", help="torch.compile stripe's training: minutes to prepare")
    parser.add_argument("--plain", action="store_true", help="time the network without attention as well")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")


def run(arguments: argparse.Namespace) -> Result:
    """Time every form by both recipes."""
    cases = {}
    forms = (*FORMS, "plain") if arguments.plain else FORMS
    for form in forms:
        cases[f"{form}, reference"] = partial(_prepare, _train_as_written, form, arguments)
        cases[f"{form}, stripe"] = partial(_prepare, _train_with_stripe, form, arguments)
    timings = measure(cases, arguments.rounds)
    rows = []
    for form in forms:
        pair = {name: timings[name] for name in (f"{form}, reference", f"{form}, stripe")}
        rows += report(pair, f"{form}, reference", images=_samples(arguments))
    return Result(rows)


def _samples(arguments: argparse.Namespace) -> int:
    samples: int = arguments.samples or 4 * arguments.batch
    return samples


def _prepare(train: Callable[..., None], form: str, arguments: argparse.Namespace) -> Run:
    if train is _train_with_stripe:
        keep_memory()
    network = build(form, arguments.depth, arguments.module)
    images = load_images(arguments.dataset, "train", samples=_samples(arguments))
    return partial(train, network if train is _train_with_stripe else as_written(network), images, arguments)


def _train_as_written(network: nn.Module, images: ImageSet, arguments: argparse.Namespace) -> None:
    loader = loader_as_written(images, arguments.batch, arguments.workers)
    train_as_written(network, loader, 1, arguments.lr, DEVICE)


def _train_with_stripe(network: nn.Module, images: ImageSet, arguments: argparse.Namespace) -> None:
    recipe = Recipe(epochs=1, lr=arguments.lr, amp=arguments.amp, compile=arguments.compile)
    loader = Loader(images, arguments.batch, train=True)
    with tempfile.TemporaryDirectory() as folder:
        fit(network, loader, None, recipe, directory=Path(folder), description={}, save_every=0, progress=False)
