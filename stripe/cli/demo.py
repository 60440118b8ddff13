"""`demo`: every step on the embedded digits, in minutes: train and record, measure, draw, train ASR, validate."""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from stripe.cli import options
from stripe.cli.validate import print_validation

SUMMARY = "show everything on the embedded digits: train and record SE, draw its stripes, train ASR, validate"
EXAMPLE = "--epochs 10"
NETWORK: dict[str, Any] = {"depth": 20, "block": "bottleneck", "module": "senet"}
SHOWN = ["gate", "strength", "strength_low", "strength_high", "cv"]
LEGEND = """\
  strength: share of the variance that lies between channels, 1 for a perfect stripe
  strength_low, strength_high: its 95 % interval
  cv: how far the attention varies over the images, relative to its size"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--epochs", type=options.positive, default=10, metavar="N", help="epochs of the SE network")
    parser.add_argument("--asr-epochs", type=options.positive, default=3, metavar="N", help="epochs of ASR after it")
    parser.add_argument("--steps", type=options.positive, default=100, metavar="N", help="training steps of psi")
    parser.add_argument("--train-samples", type=options.positive, metavar="N", help="training images (default: all)")
    parser.add_argument(
        "--out", type=options.path, default=Path("runs/demo"), metavar="RUN", help="directory of the run; replaced"
    )
    parser.add_argument(
        "--figures", type=options.path, default=Path("figures/demo"), metavar="DIR", help="where figures go"
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run every step of the demo and print its tables."""
    import torch

    from stripe import asr, figures, stats
    from stripe.asr.validation import validate
    from stripe.data import Loader, load_images
    from stripe.folding import latencies
    from stripe.gates import find_gates
    from stripe.models import ResNet
    from stripe.recipe import Recipe
    from stripe.recorder import RecorderCallback
    from stripe.store import open_run
    from stripe.training import evaluate, fit

    started = time.perf_counter()
    asr_out = arguments.out.with_name(f"{arguments.out.name}-asr")
    _remove_trainings(arguments.out, asr_out)
    torch.manual_seed(0)
    train, test = load_images("digits", "train", samples=arguments.train_samples), load_images("digits", "test")
    training, held_out = train.hold_out(len(train) // 10, seed=0)
    batches, validation, probe = Loader(training, 64, train=True), Loader(held_out, 100), Loader(test, 100)
    images = next(iter(probe))[0]

    print("1. an SE network, its attention recorded after every epoch")
    se = ResNet(**NETWORK, num_classes=len(train.classes))
    recording = RecorderCallback(probe, find_gates(se, images[:2]), arguments.out, squeeze=True, data=test.describe())
    recipe = Recipe(epochs=arguments.epochs, scheduler="cosine")
    description = {"model": {"arch": "resnet", **se.config}, "data": train.describe()}
    fit(se, batches, validation, recipe, directory=arguments.out, description=description, callbacks=[recording])
    run = open_run(arguments.out)

    print("2. an ASR network, begun from the SE network's weights, trained on and deployed")
    asr_network = se.to_asr()
    recipe = Recipe(epochs=arguments.asr_epochs, scheduler="cosine", lr=0.05)
    description = {"model": {"arch": "resnet", **asr_network.config}, "data": train.describe()}
    fit(asr_network, batches, validation, recipe, directory=asr_out, description=description)
    deployed = asr.deploy(asr_network)

    print("3. a vector psi in the images' place, trained in the frozen SE network: is attention(psi) the stripe?")
    progress = options.progress("psi")
    match = validate(se, run, batches, steps=arguments.steps, test_loader=probe, progress=progress)
    figures.draw(run, arguments.figures)
    figures.draw_validation(match, arguments.figures)
    table = stats.summarize(run, epochs=[run.epochs[-1]]).merge(match.table, on=["gate", "channels"])
    print(table[SHOWN].to_string(index=False, float_format="{:.3g}".format), LEGEND, sep="\n", end="\n\n")
    print_validation(match)

    times = latencies({"SE": se, "ASR deployed": deployed}, images, backends=["eager"], batches=[len(images)])
    speeds = (1000 * times["batch"] / times["milliseconds"]).set_axis(times["network"]).to_dict()
    results = {
        "SE": match.accuracies["attention"],
        "ASR deployed": evaluate(deployed, probe).accuracy,
        "attention removed": match.accuracies["removed"],
    }
    _print_results(results, speeds, cv=table["cv"])
    print(f"{time.perf_counter() - started:.0f} s in all; run {arguments.out}, figures in {arguments.figures}")
    gates = options.plain(table)
    options.write_json(arguments.json, {"accuracy": results, "images_per_second": speeds, "gates": gates})
    return 0


def _print_results(accuracies: dict[str, float], speeds: dict[Any, float], cv: Any) -> None:
    """Print the accuracies, the speeds and a short conclusion."""
    print()
    for name, accuracy in accuracies.items():
        speed = f", {speeds[name]:.0f} images/s" if name in speeds else ""
        print(f"{name:18} {accuracy:6.2f} % test accuracy{speed}")
    print(
        f"In short: over the test images the attention of the SE network's gates varies by {100 * cv.min():.1f} to "
        f"{100 * cv.max():.1f} % of its size. The ASR network learned constants in its place and merged them into its "
        f"weights: it is {speeds['ASR deployed'] / speeds['SE']:.1f} times as fast as the SE network, with "
        f"{accuracies['ASR deployed']:.2f} % accuracy beside {accuracies['SE']:.2f} %."
    )


def _remove_trainings(*directories: Path) -> None:
    """Remove the directories of an earlier demo; a directory that holds no training is left alone."""
    for directory in directories:
        if (directory / "metrics.csv").is_file():
            shutil.rmtree(directory)
