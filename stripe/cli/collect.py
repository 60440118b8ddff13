"""`collect`: record the attention of trained networks into a run; many checkpoints are its epochs."""

import argparse
import re
from pathlib import Path
from typing import Any

from stripe.cli import options

SUMMARY = "record per-sample channel attention of trained networks into Parquet; many checkpoints become epochs"
EXAMPLE = "--ckpt runs/se/checkpoints/epoch=*.pt --dataset hf:../shared/data/cifar10 --samples 1000 --out runs/probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--ckpt", nargs="+", required=True, metavar="PATH", help="checkpoints, or timm:NAME[:pretrained], torchvision:NAME"
    )
    parser.add_argument("--arch", help="network of a file that does not tell: timm:NAME, torchvision:NAME")
    options.add_data(parser, split="test")
    parser.add_argument("--samples", type=options.positive, metavar="N", help="images to record (default: the whole split)")
    options.add_loading(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="directory of the run")
    parser.add_argument("--squeeze", action="store_true", help="record what the gates scale, averaged over space, as well")
    parser.add_argument("--dtype", default="float32", help="float32, or float16 at half the size")
    parser.add_argument("--overwrite", action="store_true", help="replace epochs that the run holds already")


def run(arguments: argparse.Namespace) -> int:
    """Record every checkpoint as an epoch of one run; all are read once before anything is written."""
    from stripe.gates import find_gates
    from stripe.models import read_checkpoint
    from stripe.recorder import Recorder

    images = loader = None
    for epoch, spec in sorted(_epochs(arguments).items()):
        checkpoint = read_checkpoint(spec, arguments.arch)
        constants = options.constants(checkpoint.description)
        if images is None or constants != used:
            images, used = _images(arguments, constants), constants
            loader = Loader(images, arguments.batch, workers=arguments.workers)
        gates = find_gates(checkpoint.model, next(iter(loader))[0][:2])
        if not gates:
            raise ValueError(f"{spec} has no gate: expected a network with channel attention")
        model = checkpoint.description.get("model", {"arch": arguments.arch or str(spec)})
        with Recorder(
            checkpoint.model,
            gates,
            arguments.out,
            squeeze=arguments.squeeze,
            dtype=arguments.dtype,
            model=model,
            data=images.describe(),
            overwrite=arguments.overwrite,
        ) as recorder:
            recorder.record(loader, epoch=epoch, progress=options.progress(f"epoch {epoch}"))
        print(f"{arguments.out}: epoch {epoch}, {len(images)} samples, {len(gates)} gates, from {spec}")
    return 0


def _epoch(spec: str, recorded: int | None, position: int) -> int:
    """Return a checkpoint's epoch: what the file says, else its name (epoch=0012), else its position."""
    named = re.search(r"epoch=(\d+)", Path(spec).name)
    return recorded if recorded is not None else int(named[1]) if named else position
