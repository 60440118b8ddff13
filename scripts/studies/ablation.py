"""Ablation: train ASR networks that differ in one choice: psi's start, the number of psi, or the blocks with ASR."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from stripe import asr
from stripe.data import load_images
from stripe.models import create_model
from stripe.recipe import Recipe
from studies.table import Row, Table, add_data, headed, publish, read
from studies.training import Images, train

LAST_NORM = {"bottleneck": "bn3", "basicblock": "bn2"}  # of each block: what ASR wraps
PSI_INITS = (0.1, 0.3, 0.5, "normal")
REPEATS = (1, 2, 3)
INSERTIONS = ("every", "second", "last stage")
SETTINGS = ("dataset", "depth", "block", "module", "epochs", "lr", "batch", "train_samples", "test_samples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    add_data(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order, crops, split")
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet")
    parser.add_argument("--block", choices=LAST_NORM, default="bottleneck", help="of the ResNet")
    parser.add_argument("--module", default="senet", help="attention module under ASR")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="of each training")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate, falling by a cosine")
    parser.add_argument("--train-samples", type=int, metavar="N", help="training images, a tenth held out")
    parser.add_argument("--test-samples", type=int, metavar="N", help="test images")
    parser.add_argument(
        "--psi-init", type=_psi, nargs="+", default=PSI_INITS, help="starts of psi; other cases use the first"
    )
    parser.add_argument("--repeats", type=int, nargs="+", default=REPEATS, help="learned vectors per layer")
    parser.add_argument("--insertion", nargs="+", choices=INSERTIONS, default=INSERTIONS, help="blocks that get ASR")


def run(arguments: argparse.Namespace) -> None:
    """Train every missing case and add its row."""
    table = Table(arguments.out / "ablation.csv", {name: getattr(arguments, name) for name in SETTINGS})
    images = load_images(arguments.dataset, "train", samples=arguments.train_samples, data_dir=arguments.data_dir)
    test = load_images(arguments.dataset, "test", samples=arguments.test_samples, data_dir=arguments.data_dir)
    choices = {"psi_init": arguments.psi_init, "repeats": arguments.repeats, "insertion": arguments.insertion}
    for case in tqdm(table.missing(cases_of(choices, arguments.seeds)), "ablation", disable=None):
        model = build_case(case, len(images.classes), arguments)
        layers = sum(isinstance(module, asr.ASRLayer) for module in model.modules())
        row = train(
            model,
            Images(*images.hold_out(len(images) // 10, case["seed"]), test),
            Recipe(epochs=arguments.epochs, lr=arguments.lr, scheduler="cosine", seed=case["seed"]),
            directory=arguments.out / "-".join(str(value).replace(" ", "-") for value in case.values()),
            description=case,
            batch=arguments.batch,
        )
        table.put(case, {"layers": layers} | row)
    publish(tables(arguments.out), arguments.out)


def cases_of(choices: dict[str, list[Any]], seeds: list[int]) -> Iterator[Row]:
    """Yield the first values of all choices, then each other value with the first values of the rest, for each seed."""
    first = {name: values[0] for name, values in choices.items()}
    others = ({name: value} for name, values in choices.items() for value in values[1:])
    for change, seed in itertools.product([{}, *others], seeds):
        yield first | change | {"seed": seed}


def build_case(case: Row, classes: int, arguments: argparse.Namespace) -> nn.Module:
    """Build a plain network and insert ASR as the case says; its plain weights depend only on the seed."""
    torch.manual_seed(case["seed"])
    model = create_model("resnet", depth=arguments.depth, block=arguments.block, num_classes=classes)
    norms = [name for name, _ in model.named_modules() if name.endswith(f".{LAST_NORM[arguments.block]}")]
    last_stage = norms[-1].split(".")[0]
    chosen = {
        "every": norms,
        "second": norms[::2],
        "last stage": [name for name in norms if name.split(".")[0] == last_stage],
    }[case["insertion"]]
    for name in chosen:
        options = {"psi_init": case["psi_init"], "repeats": case["repeats"]}
        asr.insert(model, arguments.module, where=name, inplace=True, **options)
    return model


def _psi(text: str) -> float | str:
    return text if text == "normal" else float(text)


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Return the table that follows from ablation.csv in a directory, by file name."""
    if not (out / "ablation.csv").exists():
        return {}
    choices = {"psi begins at": "psi_init", "vectors a layer": "repeats", "in blocks": "insertion", "layers": "layers"}
    cases = read(out / "ablation.csv").groupby(list(choices.values()), sort=False)
    found = cases.agg(seeds=("seed", "count"), mean=("accuracy_last", "mean"), sd=("accuracy_last", "std"))
    columns = choices | {"seeds": "seeds", "last epoch": "mean:.2f", "its sd": "sd:.2f"}
    return {"ablation-compared.csv": headed(found.reset_index(), columns)}
