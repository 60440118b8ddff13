"""`collect`: record the attention of trained networks into a run, an epoch per checkpoint; or list gates."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stripe.cli import graphs, options

if TYPE_CHECKING:
    from torch import Tensor

    from stripe.data import ImageSet
    from stripe.gates import Candidate, Gate
    from stripe.models import Checkpoint
    from stripe.store import Run

SUMMARY = "record the channel attention of trained networks for every sample into Parquet, an epoch per checkpoint"
EXAMPLE = "--ckpt runs/se/checkpoints/epoch=*.pt --dataset hf:../shared/data/cifar10 --samples 1000 --out runs/probe"

SEARCHED = 3  # images on which gates are searched
SIZE = 224  # pixels: side of the images for listing gates where neither a data set nor the network says it
DTYPES = ("float32", "float16")
REASONS = 5  # number of the most frequent reasons reported for a network without gates
COLUMNS = ("name", "channels", "form", "layout", "source", "before", "after")  # of --list-gates
REJECTED = ("site", "op", "shape", "scaled", "reason")  # of --explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"checkpoint or ONNX files, or {options.NETWORKS}",
    )
    network.add_argument(
        "--arch", help="network of a file that does not name it: timm:NAME, torchvision:NAME, ...:FACTORY"
    )
    options.add_gates(network, "all")
    network.add_argument("--list-gates", action="store_true", help="print the gates and record nothing")
    network.add_argument("--explain", action="store_true", help="like --list-gates, with what was rejected and why")
    options.add_normalisers(network)
    data = parser.add_argument_group("data")
    options.add_data(data, split="test")
    data.add_argument("--size", type=options.positive, metavar="N", help="pixels a side (default: the network's own)")
    data.add_argument("--samples", type=options.positive, metavar="N", help="images to record (default: all)")
    data.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded, and say so")
    options.add_loading(data)
    options.add_device(data)
    graphs.add_arguments(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--out", metavar="RUN", help="directory of the run, or s3://BUCKET/RUN")
    files.add_argument("--squeeze", action="store_true", help="also record what the gates scale, averaged over space")
    files.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="float16 halves the size of the run")
    files.add_argument(
        "--moments-only",
        action="store_true",
        help="store moments, which every statistic but the rank needs, and no row per sample",
    )
    files.add_argument("--by-label", action="store_true", help="with --moments-only: also store the mean of each class")
    files.add_argument(
        "--allow-mixed",
        action="store_true",
        help="allow epochs of different networks or images in one run, which then says so",
    )
    held = files.add_mutually_exclusive_group()
    held.add_argument("--overwrite", action="store_true", help="replace epochs that the run holds already")
    held.add_argument("--resume", action="store_true", help="skip these epochs, to continue an interrupted recording")


def run(arguments: argparse.Namespace) -> int:
    """Record each checkpoint as an epoch of one run; under torchrun, each process records its share of the images."""
    if arguments.list_gates or arguments.explain:
        return _list(arguments)
    if arguments.out is None:
        raise ValueError("no place to record to: name a directory with --out RUN, or list gates with --list-gates")
    if graphs.are_graphs(arguments.ckpt):
        return graphs.collect(arguments, _contents(arguments), _gates)
    from stripe.data import Loader
    from stripe.recorder import Recorder
    from stripe.training import processes

    device = options.device(arguments)
    process, contents = processes(), _contents(arguments)
    share: dict[str, Any] = {"rank": process.process_index, "world_size": process.num_processes, "device": device}
    share["workers"] = arguments.workers
    begun, loader, loaded = _begun(arguments), None, None
    for epoch, spec in _unrecorded(arguments, begun, tell=process.is_main_process):
        checkpoint = options.read_network(spec, arguments.arch)
        preprocessing = _preprocessing(arguments, checkpoint)
        uri = options.dataset(arguments, spec, checkpoint.description)
        if loader is None or (uri, preprocessing) != loaded:
            images = _images(arguments, uri, arguments.samples, preprocessing)
            if begun:
                _require_samples(arguments, begun, len(images))
            loader, loaded = Loader(images, arguments.batch, **share), (uri, preprocessing)
        searched = next(iter(Loader(loader.images, SEARCHED)))[0]
        gates = _gates(arguments, spec, _candidates(arguments, checkpoint, searched))
        with Recorder(
            checkpoint.model.to(device),
            gates,
            arguments.out,
            squeeze=arguments.squeeze,
            dtype=arguments.dtype,
            contents=contents,
            description=_described(checkpoint, arguments.arch),
            data=loader.images.describe(),
            files=loader.images.files,
            seeds={"manualSeed": seed} if type(seed := checkpoint.description.get("seed")) is int else {},
            overwrite=arguments.overwrite,
            allow_mixed=arguments.allow_mixed,
            shared=True,
        ) as recorder:
            progress = options.progress(f"epoch {epoch}") if process.is_main_process else iter
            recorder.record(loader, epoch=epoch, progress=progress)
        if process.is_main_process:
            print(f"{arguments.out}: epoch {epoch}, {len(gates)} gates; {options.told(spec, loader.images)}")
    return 0


def _described(checkpoint: Checkpoint, arch: str | None) -> Mapping[str, Any]:
    """Return a description of the network that is the same for all checkpoints of a training."""
    from stripe.models import ResNet

    if "model" in checkpoint.description:
        described: dict[str, Any] = checkpoint.description["model"]
        return described
    if isinstance(checkpoint.model, ResNet):
        return {"arch": "resnet"} | checkpoint.model.config
    return {"arch": arch or type(checkpoint.model).__qualname__}


def _begun(arguments: argparse.Namespace) -> Run | None:
    """Return the run that --resume continues, or None if nothing has been recorded yet."""
    from stripe.store import open_run

    with suppress(FileNotFoundError):
        return open_run(arguments.out) if arguments.resume else None
    return None


def _require_samples(arguments: argparse.Namespace, begun: Run, samples: int) -> None:
    """Raise ValueError if the epochs that the run holds have another number of images than this recording."""
    for epoch in begun.manifest.epochs if begun.has_samples else ():  # a row of moments is a gate, not a sample
        rows = sum(part.rows for part in epoch.parts)
        if rows != samples:
            raise ValueError(
                f"epoch {epoch.epoch} of {arguments.out} holds {rows} samples, this recording would hold {samples}: "
                f"go on with --samples {rows}, or choose another run"
            )


def _unrecorded(arguments: argparse.Namespace, begun: Run | None, *, tell: bool) -> list[tuple[int, str]]:
    """Return the epochs that the run does not hold yet, ascending, with their checkpoints."""
    held = begun.epochs if begun else []
    epochs = sorted(_epochs(arguments).items())
    for epoch, spec in epochs:
        if tell and epoch in held:
            print(f"{arguments.out}: epoch {epoch} is there, {spec} is skipped")
    return [(epoch, spec) for epoch, spec in epochs if epoch not in held]


def _contents(arguments: argparse.Namespace) -> str:
    if arguments.by_label and not arguments.moments_only:
        raise ValueError("--by-label adds class means to --moments-only: give both, or neither (rows hold labels)")
    return ("label-moments" if arguments.by_label else "moments") if arguments.moments_only else "samples"


def _epochs(arguments: argparse.Namespace) -> dict[int, str]:
    """Return every checkpoint by its epoch: the one that the file or its name gives, else its position."""
    from stripe.models import read_epoch

    epochs: dict[int, str] = {}
    for position, spec in enumerate(arguments.ckpt):
        recorded = read_epoch(spec)
        epoch = position if recorded is None else recorded
        if epoch in epochs:
            raise ValueError(f"{spec} and {epochs[epoch]} are both epoch {epoch}: name one of them")
        epochs[epoch] = spec
    return epochs


# ---- images ----
def _preprocessing(arguments: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the preprocessing of the network's images, with --size in place of the network's own size."""
    return options.preprocessing(checkpoint.description) | ({"size": arguments.size} if arguments.size else {})


def _images(arguments: argparse.Namespace, uri: str, samples: int | None, preprocessing: Mapping[str, Any]) -> ImageSet:
    from stripe.data import load_images

    return load_images(
        uri,
        arguments.split,
        samples=samples,
        data_dir=arguments.data_dir,
        skip_broken=arguments.skip_broken,
        **preprocessing,
    )


def _searched(arguments: argparse.Namespace, spec: str, checkpoint: Checkpoint) -> Tensor:
    """Return the images on which gates are listed: from the data set, or noise of the network's size without one.

    The gates of a network do not depend on what the images show.
    """
    import torch

    from stripe.data import Loader

    preprocessing = _preprocessing(arguments, checkpoint)
    if arguments.dataset or options.named_dataset(checkpoint.description):
        uri = options.dataset(arguments, spec, checkpoint.description)
        return next(iter(Loader(_images(arguments, uri, SEARCHED, preprocessing), SEARCHED)))[0]
    size, channels = preprocessing.get("size", SIZE), preprocessing.get("channels", 3)
    return torch.randn(SEARCHED, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---- gates ----
def _candidates(arguments: argparse.Namespace, checkpoint: Checkpoint, batch: Tensor) -> list[Candidate]:
    """Search for gates on a few images; warn of gates for which these are too small, ValueError if that is all."""
    from stripe.gates import explain_gates, find_gates

    candidates = explain_gates(checkpoint.model, batch, normalisers=arguments.normaliser)
    if any(candidate.hidden for candidate in candidates):
        find_gates(checkpoint.model, batch, normalisers=arguments.normaliser)  # its warning or error says what to do
    return candidates


def _gates(arguments: argparse.Namespace, spec: str, candidates: Sequence[Candidate]) -> list[Gate]:
    """Return the gates that --gates chooses; ValueError, with what was rejected, for a network without gates."""
    gates = [candidate.gate for candidate in candidates if candidate.gate]
    if not gates:
        reasons = Counter(candidate.reason for candidate in candidates).most_common(REASONS)
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "nothing"
        raise ValueError(
            f"{spec} has no gate: expected a network with channel attention; of {len(candidates)} products"
            f" and sums looked at, rejected were {told}"
        )
    return options.chosen_gates(gates, arguments.gates or ["*"], spec)


def _list(arguments: argparse.Namespace) -> int:
    """Print the gates of every checkpoint and, with --explain, what was rejected."""
    for spec in arguments.ckpt:
        candidates = graphs.candidates(arguments, spec) if graphs.is_graph(spec) else _read_candidates(arguments, spec)
        if arguments.explain:
            rejected = [candidate for candidate in candidates if not candidate.gate]
            print(f"{spec}: {len(rejected)} products and sums rejected")
            _print(rejected, REJECTED)
        gates = _gates(arguments, spec, candidates)
        print(f"{spec}: {len(gates)} gates")
        _print(gates, COLUMNS)
    return 0


def _read_candidates(arguments: argparse.Namespace, spec: str) -> list[Candidate]:
    checkpoint = options.read_network(spec, arguments.arch)
    return _candidates(arguments, checkpoint, _searched(arguments, spec, checkpoint))


def _print(items: Sequence[object], columns: Sequence[str]) -> None:
    """Print a table of attributes."""
    import pandas as pd

    rows = [[_text(getattr(item, column)) for column in columns] for item in items]
    if rows:
        print(pd.DataFrame(rows, columns=list(columns)).to_string(index=False))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else str(value)
