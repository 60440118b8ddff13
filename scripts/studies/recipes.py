"""Recipes: does stripe's training reach the accuracy of the reference recipe as written? SE and ASR, seed by seed.

For each seed both recipes start from the same weights; stripe's has its own order, crops, precision and memory layout.
Several processes may run at once and share the work.
"""

import argparse
import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from benchmarks.networks import DEVICE
from benchmarks.reference import as_written, loader_as_written, train_as_written
from torch import nn

from stripe.data import ImageSet, Loader
from stripe.models import create_model
from stripe.recipe import Recipe
from stripe.training import evaluate, fit
from studies import comparison
from studies.table import Row, Table, add_data, alone, headed, publish, read
from studies.training import load, pending

FORMS = {"SE": {}, "ASR": {"asr": True}}
RECIPES = ("reference", "stripe")
SETTINGS = ("dataset", "depth", "module", "batch", "train_samples", "test_samples", "epochs", "lr", "amp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    add_data(parser, "hf:../shared/data/cifar10", 128, Path("figures/study"))
    parser.add_argument("--depth", type=int, default=164, help="of the bottleneck ResNet")
    parser.add_argument("--module", default="senet", help="attention module")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights, order, crops")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="of each training")
    parser.add_argument("--train-samples", type=int, default=10_000, metavar="N", help="training images")
    parser.add_argument("--test-samples", type=int, metavar="N", help="test images (default: all)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--amp", default="bf16", help="precision of stripe's training")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="begin no training after M minutes"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train every case without a row, then compare the recipes, paired by seed."""
    table = Table(arguments.out / "recipes.csv", {name: getattr(arguments, name) for name in SETTINGS})
    images = functools.cache(partial(load, arguments, arguments.train_samples, arguments.test_samples))
    cases = list(cases_of(arguments.seeds))
    for case, *_ in pending(table, cases, arguments.out / "recipes", arguments.minutes, at_least=0):
        table.put(case, train_case(case, *images(), arguments))
    rows = table.frame()
    if len(rows):
        print(rows.pivot_table("accuracy", "seed", ["form", "recipe"], sort=False).round(2).to_string())
    with alone(arguments.out):
        publish(tables(arguments.out), arguments.out)


def cases_of(seeds: list[int]) -> Iterator[Row]:
    """Yield both recipes and both forms of a seed before the next seed, so that every finished seed gives pairs."""
    for seed, form, recipe in itertools.product(seeds, FORMS, RECIPES):
        yield {"form": form, "recipe": recipe, "seed": seed}


def train_case(case: Row, images: ImageSet, test: ImageSet, arguments: argparse.Namespace) -> Row:
    """Train one network by one recipe; return its test accuracy in percent."""
    torch.manual_seed(case["seed"])
    network = create_model(
        "resnet", depth=arguments.depth, module=arguments.module, num_classes=len(test.classes), **FORMS[case["form"]]
    ).to(DEVICE)
    train = _as_written if case["recipe"] == "reference" else _with_stripe
    start = time.perf_counter()
    train(network, images, arguments, case["seed"])
    seconds = time.perf_counter() - start
    return {"accuracy": evaluate(network, Loader(test, 200)).accuracy, "seconds": seconds}


def _as_written(network: nn.Module, images: ImageSet, arguments: argparse.Namespace, seed: int) -> None:
    loader = loader_as_written(images, arguments.batch, workers=0)  # forked workers would hold the network's memory
    train_as_written(as_written(network), loader, arguments.epochs, arguments.lr, DEVICE)


def _with_stripe(network: nn.Module, images: ImageSet, arguments: argparse.Namespace, seed: int) -> None:
    recipe = Recipe(epochs=arguments.epochs, lr=arguments.lr, amp=arguments.amp, seed=seed)
    loader = Loader(images, arguments.batch, train=True, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        fit(network, loader, None, recipe, directory=folder, description={}, save_every=0, progress=False)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per form: stripe's accuracy minus the reference's, paired by seed, with its interval."""
    return pd.DataFrame(
        {"network": form}
        | comparison.difference(part.pivot(index="seed", columns="recipe", values="accuracy"), *reversed(RECIPES))
        for form, part in rows.groupby("form", sort=False)
        if set(part["recipe"]) == set(RECIPES)
    )


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Return the table that follows from recipes.csv in a directory, by file name."""
    if not (out / "recipes.csv").exists():
        return {}
    rows = read(out / "recipes.csv")
    pairs = differences(rows)
    both = rows.pivot(index=["form", "seed"], columns="recipe", values="accuracy").dropna()
    found = pairs.merge(both.groupby("form").mean(), left_on="network", right_index=True)
    columns = {"network": "network", "seeds": "seeds"} | {recipe: f"{recipe}:.2f" for recipe in RECIPES}
    columns |= {"difference": "difference:+.2f", "95 % interval from": "low:+.2f", "to": "high:+.2f"}
    return {"recipes-compared.csv": headed(found, columns)}
