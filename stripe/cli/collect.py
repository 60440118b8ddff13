"""`collect`: record the attention of trained networks into a run; many checkpoints are its epochs."""

import argparse
import re
from pathlib import Path

from stripe.cli import options

SUMMARY = "record per-sample channel attention of trained networks into Parquet; many checkpoints become epochs"
EXAMPLE = "--ckpt runs/se/checkpoints/epoch=*.pt --dataset hf:../shared/data/cifar10 --samples 1000 --out runs/probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--ckpt", nargs="+", required=True, metavar="PATH", help="files, or timm:NAME[:pretrained], torchvision:NAME"
    )
    parser.add_argument("--arch", help="network of a file that does not tell: timm:NAME, torchvision:NAME")
    options.add_data(parser, split="test")
    parser.add_argument("--samples", type=options.positive, metavar="N", help="images to record (default: all)")
    options.add_loading(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="directory of the run")
    parser.add_argument("--squeeze", action="store_true", help="record what the gates scale as well")
    parser.add_argument("--dtype", default="float32", help="float32, or float16 at half the size")
    parser.add_argument("--overwrite", action="store_true", help="replace epochs that the run holds already")


def run(arguments: argparse.Namespace) -> int:
    """Record every checkpoint as an epoch of one run; all are read once before anything is written."""
    from stripe.data import Loader, load_images
    from stripe.gates import find_gates
    from stripe.models import read_checkpoint
    from stripe.recorder import Recorder

    loader, loaded = None, None
    for epoch, spec in sorted(_epochs(arguments).items()):
        checkpoint = read_checkpoint(spec, arguments.arch)
        constants = options.constants(checkpoint.description)
        if loader is None or constants != loaded:
            images = load_images(
                arguments.dataset, arguments.split, samples=arguments.samples, data_dir=arguments.data_dir, **constants
            )
            loader, loaded = Loader(images, arguments.batch, workers=arguments.workers), constants
        gates = find_gates(checkpoint.model, next(iter(loader))[0][:2])
        if not gates:
            raise ValueError(f"{spec} has no gate: expected a network with channel attention")
        with Recorder(
            checkpoint.model,
            gates,
            arguments.out,
            squeeze=arguments.squeeze,
            dtype=arguments.dtype,
            description=checkpoint.description.get("model", {"arch": arguments.arch or str(spec)}),
            data=loader.images.describe(),
            overwrite=arguments.overwrite,
        ) as recorder:
            recorder.record(loader, epoch=epoch, progress=options.progress(f"epoch {epoch}"))
        print(f"{arguments.out}: epoch {epoch}, {len(loader.images)} samples, {len(gates)} gates, from {spec}")
    return 0


def _epochs(arguments: argparse.Namespace) -> dict[int, str]:
    """Read every checkpoint's epoch: what the file says, else its name (epoch=0012), else its position."""
    from stripe.models import read_checkpoint

    epochs: dict[int, str] = {}
    for position, spec in enumerate(arguments.ckpt):
        recorded = read_checkpoint(spec, arguments.arch).epoch
        named = re.search(r"epoch=(\d+)", Path(spec).name)
        epoch = recorded if recorded is not None else int(named[1]) if named else position
        if epoch in epochs:
            raise ValueError(f"{spec} and {epochs[epoch]} are both epoch {epoch}: name one of them")
        epochs[epoch] = spec
    return epochs
