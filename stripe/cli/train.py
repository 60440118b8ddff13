"""`train`: train a CIFAR ResNet, plain, with attention or with ASR, and record its attention after every epoch."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe.cli import options
from stripe.files import own_path
from stripe.recipe import BATCH, PRECISIONS, PSI_INIT, SCHEDULES, TRAIN_BATCH, WORKERS, Recipe

if TYPE_CHECKING:
    from stripe.training import TensorBoard

SUMMARY = "train a network, plain, with attention or with ASR, and record its attention after every epoch"
QUICK = "stripe train --dataset digits --depth 20 --module senet --epochs 10 --record 100 -c runs/digits"
BLOCKS = ("bottleneck", "basicblock")
EXAMPLE = "--depth 20 --module senet --dataset hf:../shared/data/cifar10 --epochs 30 --record 1000 -c runs/se"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; those that the ASR reference code has too keep their names."""
    network = parser.add_argument_group("network")
    network.add_argument("--arch", default="resnet", help="resnet, timm:NAME or torchvision:NAME")
    network.add_argument("--depth", type=int, default=164, help="of the resnet: 9n+2 (bottleneck), 6n+2 (basicblock)")
    network.add_argument("--block-name", choices=BLOCKS, default=BLOCKS[0], help="residual block of the resnet")
    network.add_argument("--module", default="none", help="attention module: senet, eca, ..., timm:NAME, or none")
    network.add_argument(
        "--use-asr", action="store_true", help="attention of a trained input psi instead of the image (ASR)"
    )
    network.add_argument(
        "--asr-repeats", type=options.positive, default=1, metavar="N", help="learned vectors per block"
    )
    network.add_argument("--use-both", action="store_true", help="with --use-asr: keep attention of the image too")
    data = parser.add_argument_group("data")
    options.add_data(data, default="none; with --resume, the one that the checkpoint names")
    options.add_device(data)
    data.add_argument("--train-samples", type=options.positive, metavar="N", help="training images (default: all)")
    data.add_argument(
        "--val-samples", type=int, metavar="N", help="training images held out for validation (default: 1/10)"
    )
    data.add_argument(
        "--train-batch", type=options.positive, default=TRAIN_BATCH, metavar="N", help="images per batch of training"
    )
    data.add_argument(
        "--test-batch", type=options.positive, default=BATCH, metavar="N", help="images per batch of evaluation"
    )
    data.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help="processes that decode images from disk"
    )
    _add_recipe(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "-c", "--checkpoint", type=options.path, metavar="DIR", help="directory of the run (default: checkpoints/NAME)"
    )
    files.add_argument("--use-timestamp", action="store_true", help="append the time to the directory's name")
    files.add_argument(
        "--save-every", type=int, default=1, metavar="N", help="keep every N-th epoch's weights; 0: none"
    )
    files.add_argument(
        "--resume", type=options.path, metavar="PATH", help="continue from this checkpoint: RUN/checkpoints/last.pt"
    )
    files.add_argument(
        "--allow-changed",
        action="store_true",
        help="resume even with another network, seed, data set or split; images that are now held out may have been "
        "trained on before",
    )
    files.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help=f"only test the network of --resume, which may then also be {options.NETWORKS}",
    )
    files.add_argument(
        "--record", type=options.positive, metavar="N", help="record the attention of N images after every epoch"
    )
    files.add_argument("--record-split", default="test", help="split from which the images of --record come")
    files.add_argument("--squeeze", action="store_true", help="also record what the gates scale, averaged over space")
    files.add_argument("--tensorboard", action="store_true", help="also write metrics and attention for TensorBoard")
    options.add_json(files)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=options.positive, default=Recipe.epochs, metavar="N", help="epochs in all")
    recipe.add_argument(
        "--scheduler", choices=tuple(SCHEDULES), default=Recipe.scheduler, help="schedule of the learning rate"
    )
    recipe.add_argument(
        "--schedule",
        type=int,
        nargs="*",
        default=list(Recipe.milestones),
        metavar="E",
        help="epochs after which the step schedule multiplies the learning rate by --gamma",
    )
    recipe.add_argument("--gamma", type=float, default=Recipe.gamma, help="factor of the step schedule")
    recipe.add_argument(
        "--lr", type=float, default=Recipe.lr, help="learning rate (the highest, for cosine and onecycle)"
    )
    recipe.add_argument("--momentum", type=float, default=Recipe.momentum, help="SGD's momentum")
    recipe.add_argument("--weight-decay", type=float, default=Recipe.weight_decay, help="weight decay of all weights")
    recipe.add_argument("--psi-no-decay", action="store_true", help="no weight decay on ASR's psi")
    recipe.add_argument(
        "--psi-init", type=_psi, default=PSI_INIT, metavar="X", help="start of psi: a number, or normal (random)"
    )
    recipe.add_argument("--amp", choices=tuple(PRECISIONS), default=Recipe.amp, help="mixed precision")
    recipe.add_argument("--compile", action="store_true", help="torch.compile the training: slow start, faster epochs")
    recipe.add_argument(
        "--manualSeed", type=int, default=Recipe.seed, metavar="SEED", help="seed of weights, order, crops and split"
    )
    recipe.add_argument("--gpu-id", metavar="ID", help="CUDA device to use, as CUDA_VISIBLE_DEVICES takes it")


def run(arguments: argparse.Namespace) -> int:
    """Train the network, or only test it with -e."""
    if arguments.gpu_id is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpu_id
    if arguments.evaluate and arguments.resume is None:
        raise ValueError("-e tests a trained network: name its checkpoint with --resume PATH")
    arguments.dataset = _dataset(arguments)
    return _test(arguments) if arguments.evaluate else _train(arguments)


def _dataset(arguments: argparse.Namespace) -> str:
    """Return the data set to train or test on; where there is none, raise ValueError that shows a whole command."""
    if arguments.dataset is None and arguments.resume is None:
        raise ValueError(
            f"nothing to train on: name a data set with --dataset ({options.DATASETS}), and best the network and the "
            f"epochs too; for example, in minutes: {QUICK}"
        )
    if arguments.dataset is not None:
        return str(arguments.dataset)
    return options.dataset(arguments, arguments.resume, options.read_network(arguments.resume).description)


def _train(arguments: argparse.Namespace) -> int:
    import torch

    from stripe.data import Loader, load_images
    from stripe.models import create_model
    from stripe.training import evaluate, fit, processes

    device, process = options.device(arguments), processes()
    share: dict[str, Any] = {
        "rank": process.process_index,
        "world_size": process.num_processes,
        "workers": arguments.workers,
        "device": device,
    }
    recipe = _recipe(arguments)
    directory = _directory(arguments)
    images = load_images(arguments.dataset, "train", samples=arguments.train_samples, data_dir=arguments.data_dir)
    held_out = len(images) // 10 if arguments.val_samples is None else arguments.val_samples
    training, validation = images.hold_out(held_out, arguments.manualSeed) if held_out else (images, None)
    preprocessing: dict[str, Any] = {"mean": training.mean, "std": training.std}
    test = load_images(arguments.dataset, "test", data_dir=arguments.data_dir, **preprocessing)
    torch.manual_seed(arguments.manualSeed)
    network = _network(arguments, len(images.classes))
    model = create_model(**network)
    description = {
        "model": network,
        "data": training.describe(),
        "split": {"training": len(training), "validation": held_out},
        "seed": arguments.manualSeed,
        "batch": arguments.train_batch,
    }
    if arguments.resume and process.is_main_process:
        _tell_changes(arguments, recipe, description)
    with ExitStack() as closing:
        boards = _boards(arguments, directory, closing)
        callbacks: list[Any] = [*boards]
        if arguments.record:
            callbacks.append(_recording(arguments, directory, model, description, share, boards))
        if process.is_main_process:
            sets = [training, test] if validation is None else [training, validation, test]
            print(options.told(options.network_name(network), *sets), flush=True)
            callbacks.append(_EpochLine(recipe.epochs))
        fit(
            model,
            Loader(training, arguments.train_batch, train=True, seed=arguments.manualSeed, **share),
            None if validation is None else Loader(validation, arguments.test_batch, **share),
            recipe,
            directory=directory,
            description=description,
            callbacks=callbacks,
            resume=arguments.resume,
            allow_changed=arguments.allow_changed,
            save_every=arguments.save_every,
        )
    evaluation = evaluate(model, Loader(test, arguments.test_batch, **share))
    if process.is_main_process:
        print(f"{directory}: metrics.csv, checkpoints/")
        _report(arguments, evaluation)
    return 0


def _boards(arguments: argparse.Namespace, directory: Path, closing: ExitStack) -> list[TensorBoard]:
    """Open TensorBoard's files in the first process, if --tensorboard is given."""
    from stripe.training import TensorBoard, processes

    if not (arguments.tensorboard and processes().is_main_process):
        return []
    return [closing.enter_context(TensorBoard(own_path(directory, "tensorboard")))]


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        epochs=arguments.epochs,
        lr=arguments.lr,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        scheduler=arguments.scheduler,
        milestones=tuple(arguments.schedule),
        gamma=arguments.gamma,
        no_decay=("*.vector",) if arguments.psi_no_decay else (),
        amp=arguments.amp,
        compile=arguments.compile,
        seed=arguments.manualSeed,
    )


def _tell_changes(arguments: argparse.Namespace, recipe: Recipe, description: dict[str, Any]) -> None:
    """Print in one line what differs between the resumed training and the one that began, if anything does."""
    from stripe.resuming import changes, read_resumable

    found = changes(read_resumable(arguments.resume), recipe, description)
    told = [*found.how, *(found.what if arguments.allow_changed else ())]
    if told:
        print(f"{arguments.resume}: changed, as asked for: {'; '.join(told)}")


def _test(arguments: argparse.Namespace) -> int:
    from stripe.data import Loader, load_images
    from stripe.training import evaluate

    checkpoint = options.read_network(arguments.resume)
    preprocessing = options.preprocessing(checkpoint.description)
    images = load_images(arguments.dataset, "test", data_dir=arguments.data_dir, **preprocessing)
    device = options.device(arguments)
    loader = Loader(images, arguments.test_batch, workers=arguments.workers, device=device)
    checkpoint.model.to(device)
    print(options.told(arguments.resume, images))
    return _report(arguments, evaluate(checkpoint.model, loader, progress=True))


class _EpochLine:
    """A callback that prints loss and accuracy after every epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def on_epoch_end(self, model: Any, epoch: int, metrics: Mapping[str, float]) -> None:
        validated = metrics["val_accuracy"]
        held_out = "" if math.isnan(validated) else f", validation accuracy {validated:.2f} %"
        print(
            f"epoch {epoch}/{self._epochs}: training loss {metrics['train_loss']:.4f}, "
            f"accuracy {metrics['train_accuracy']:.2f} %{held_out}",
            flush=True,
        )


def _report(arguments: argparse.Namespace, evaluation: Any) -> int:
    print(f"test: accuracy {evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, {evaluation.samples} images")
    options.write_json(arguments.json, vars(evaluation))
    return 0


def _network(arguments: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Return create_model's arguments."""
    if arguments.arch != "resnet":
        return {"arch": arguments.arch, "num_classes": classes}
    return {
        "arch": "resnet",
        "depth": arguments.depth,
        "block": arguments.block_name,
        "module": None if arguments.module == "none" else arguments.module,
        "asr": arguments.use_asr,
        "both": arguments.use_both,
        "num_classes": classes,
        "psi_init": arguments.psi_init,
        "repeats": arguments.asr_repeats,
    }


def _directory(arguments: argparse.Namespace) -> Path:
    """Return the run's directory: the one of -c, else one named after data set and network."""
    data = re.split("[/:]", arguments.dataset.rstrip("/"))[-1]
    network = f"resnet{arguments.depth}" if arguments.arch == "resnet" else arguments.arch.replace(":", "-")
    module = "" if arguments.module == "none" else arguments.module.replace(":", "-")
    parts = [data, network, module, "asr" if arguments.use_asr else "", "both" if arguments.use_both else ""]
    directory: Path = arguments.checkpoint or Path("checkpoints", "-".join(filter(None, parts)))
    if arguments.use_timestamp:
        directory = directory.with_name(f"{directory.name}-{datetime.now():%Y%m%dT%H%M%S}")
    return directory


def _recording(
    arguments: argparse.Namespace,
    directory: Path,
    model: Any,
    description: dict[str, Any],
    share: dict[str, Any],
    boards: Sequence[TensorBoard],
) -> Any:
    """Return the callback that records this process's share of the probe set into the run after every epoch."""
    from stripe.data import Loader, load_images
    from stripe.gates import find_gates
    from stripe.recorder import RecorderCallback
    from stripe.tracking import Tracker

    images = load_images(
        arguments.dataset,
        arguments.record_split,
        samples=arguments.record,
        data_dir=arguments.data_dir,
        **options.preprocessing(description),
    )
    loader = Loader(images, arguments.test_batch, **share)
    model.to(share["device"])
    gates = find_gates(model, next(iter(loader))[0][:2])
    if not gates:
        raise ValueError("--record: the network has no gate; train one with --module senet, or do not record")
    return RecorderCallback(
        loader,
        gates,
        directory,
        recorded=Tracker(*boards),
        squeeze=arguments.squeeze,
        description=description["model"],
        data=images.describe(),
        files=images.files,
        seeds={"manualSeed": arguments.manualSeed},
        overwrite=arguments.resume is not None,
        allow_mixed=arguments.allow_changed,
        shared=True,
    )


def _psi(text: str) -> float | str:
    return text if text == "normal" else float(text)
