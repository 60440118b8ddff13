"""Time an epoch of SE and ASR as stripe trains them and by the reference recipe; or compare the accuracies of both."""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.networks import DEVICE, add_network, build
from benchmarks.reference import as_written, loader_as_written, train_as_written
from benchmarks.timing import Prepare, Result, Row, measure, report
from stripe.data import ImageSet, Loader, load_images
from stripe.training import Recipe, evaluate, fit

FORMS = ("SE", "ASR")
SEED_ERRORS = 3.0  # standard errors of a difference of means that are still noise
LEAST_SPREAD = 0.5  # points; few seeds can agree by chance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's and the training's arguments."""
    add_network(parser, rounds=2, batch=128)
    parser.add_argument("--dataset", default="hf:../shared/data/cifar10", metavar="URI", help="what to train on")
    parser.add_argument("--samples", type=int, metavar="N", help="images an epoch (default: 512; --accuracy: 10000)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="DataLoader processes of the reference")
    parser.add_argument("--amp", default="bf16", help="precision of stripe's training")
    parser.add_argument("--compile", action="store_true", help="torch.compile stripe's training: minutes to prepare")
    parser.add_argument("--plain", action="store_true", help="time the network without attention as well")
    parser.add_argument("--accuracy", action="store_true", help="instead: test accuracies after --epochs")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="for --accuracy")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="for --accuracy")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")


def run(arguments: argparse.Namespace) -> Result:
    """Time, or compare accuracies."""
    if arguments.accuracy:
        return _compare_accuracies(arguments)
    cases = {}
    for form in (*FORMS, "plain") if arguments.plain else FORMS:
        cases[f"{form}, reference"] = partial(_prepare, _train_as_written, form, arguments)
        cases[f"{form}, stripe"] = partial(_prepare, _train_with_stripe, form, arguments)
    timings = measure(cases, arguments.rounds)
    rows = report(timings, "SE, reference", images=_samples(arguments))
    for form in FORMS:
        ratio = timings[f"{form}, reference"].median / timings[f"{form}, stripe"].median
        print(f"{form}: {ratio:.2f} times the images/s of the reference recipe")
    return Result(rows)


def _samples(arguments: argparse.Namespace) -> int:
    samples: int = arguments.samples or (10_000 if arguments.accuracy else 4 * arguments.batch)
    return samples


def _images(arguments: argparse.Namespace, split: str, samples: int | None = None) -> ImageSet:
    return load_images(arguments.dataset, split, samples=samples)


Training = Callable[[nn.Module, ImageSet, argparse.Namespace, int, int], None]


def _prepare(train: Training, form: str, arguments: argparse.Namespace) -> Prepare:
    network = _network(train, form, arguments)
    return partial(train, network, _images(arguments, "train", _samples(arguments)), arguments, 1, 0)


def _network(train: Training, form: str, arguments: argparse.Namespace) -> nn.Module:
    network = build(form, arguments.depth, arguments.module)
    return as_written(network) if train is _train_as_written else network


def _train_as_written(
    network: nn.Module, images: ImageSet, arguments: argparse.Namespace, epochs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    loader = loader_as_written(images, arguments.batch, arguments.workers)
    train_as_written(network, loader, epochs, arguments.lr, DEVICE)


def _train_with_stripe(
    network: nn.Module, images: ImageSet, arguments: argparse.Namespace, epochs: int, seed: int
) -> None:
    recipe = Recipe(epochs=epochs, lr=arguments.lr, amp=arguments.amp, compile=arguments.compile, seed=seed)
    loader = Loader(images, arguments.batch, train=True, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        fit(network, loader, None, recipe, directory=Path(folder), description={}, save_every=0, progress=False)


# ---- accuracy ----------------------------------------------------------------------------------------------


def _compare_accuracies(arguments: argparse.Namespace) -> Result:
    """Train every form by both recipes with several seeds; wrong where stripe's mean is lower by more than noise."""
    images, test = _images(arguments, "train", _samples(arguments)), _images(arguments, "test")
    rows: list[Row] = []
    worse = False
    for form in FORMS:
        scores = {
            name: [_accuracy(train, form, images, test, arguments, seed) for seed in range(arguments.seeds)]
            for name, train in (("reference", _train_as_written), ("stripe", _train_with_stripe))
        }
        means = {name: statistics.mean(found) for name, found in scores.items()}
        spreads = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in scores.values()]
        noise = SEED_ERRORS * max(LEAST_SPREAD, *spreads) * (2 / arguments.seeds) ** 0.5
        worse |= means["stripe"] < means["reference"] - noise
        for name, found in scores.items():
            rows.append({"case": f"{form}, {name}", "accuracies": found, "mean": means[name], "noise": noise})
            print(f"{form}, {name}: {means[name]:.2f} %, {', '.join(f'{each:.2f}' for each in found)}", flush=True)
        print(f"{form}: difference {means['stripe'] - means['reference']:+.2f} points, noise {noise:.2f}", flush=True)
    return Result(rows, worse)


def _accuracy(
    train: Training, form: str, images: ImageSet, test: ImageSet, arguments: argparse.Namespace, seed: int
) -> float:
    network = _network(train, form, arguments)
    train(network, images, arguments, arguments.epochs, seed)
    return evaluate(network, Loader(test, 200)).accuracy
