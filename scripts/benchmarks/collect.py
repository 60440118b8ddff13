"""Time recording beside the bare forward loop, torchlens and torchvision's feature extractor, all to Parquet."""

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stripe
from benchmarks.networks import DEVICE, add_network, build, pixels
from benchmarks.timing import Prepare, Result, check, measure_together, report, synchronize

TOLERANCE = 1e-5  # of recorded values, which lie in 0..1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's and the recording's arguments."""
    add_network(parser, rounds=3, batch=100)
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="images to record")
    parser.add_argument("--squeeze", action="store_true", help="record what the gates scale too, and run no peer")
    parser.add_argument("--torchlens", action="store_true", help="run it too: some six seconds a batch, take few")


def run(arguments: argparse.Namespace) -> Result:
    """Record the same gates of the same images every way, and compare what was recorded."""
    names = ["forward", "stripe, squeeze"] if arguments.squeeze else ["forward", "stripe", *PEERS]
    if not arguments.torchlens:
        names = [name for name in names if name != "torchlens"]
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: partial(_prepare, name, arguments, Path(folder, name)) for name in names}
        timings = measure_together(cases, arguments.rounds)
        rows = report(timings, "forward", images=arguments.samples)
        for name in names[1:]:
            more = timings[name].difference(timings["forward"])
            print(f"{name}: {1e3 * more / arguments.samples:+.3f} ms an image over forward")
        wanted = _recorded(names[1], Path(folder, names[1]))
        errors = [_difference(wanted, _recorded(name, Path(folder, name))) for name in names[2:]]
    if not errors:
        return Result(rows)
    return Result(rows, not check("difference of the recorded values", max(errors), TOLERANCE))


def _prepare(name: str, arguments: argparse.Namespace, path: Path) -> Prepare:
    network = _network(arguments.depth, arguments.module)
    images = pixels(arguments.samples).split(arguments.batch)
    if name == "forward":
        return partial(_forward, network, images)
    gates = stripe.find_gates(network, images[0][:2].to(DEVICE))
    if name.startswith("stripe"):
        return partial(_stripe, network, images, gates, path, squeeze="squeeze" in name)
    return PEERS[name](network, images, gates, path)


@cache
def _network(depth: int, module: str) -> nn.Module:
    """Build the network once for all cases of a process: two copies differ in speed."""
    return build("SE", depth, module)


def _forward(network: nn.Module, images: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        for batch in images:
            synchronize(network(batch.to(DEVICE)))


def _stripe(
    network: nn.Module, images: Sequence[Tensor], gates: Sequence[stripe.Gate], path: Path, squeeze: bool
) -> None:
    samples = torch.arange(sum(map(len, images))).split(len(images[0]))
    with stripe.Recorder(network, gates, path, squeeze=squeeze, overwrite=True) as recorder:
        recorder.record([(batch, ids, ids) for batch, ids in zip(images, samples, strict=True)], epoch=0)


def _extractor(
    network: nn.Module, images: Sequence[Tensor], gates: Sequence[stripe.Gate], path: Path
) -> Callable[[], None]:
    """Let torchvision rewrite the network so that it returns the gates, then hand all to pandas.to_parquet."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extract = create_feature_extractor(network, {gate.source: gate.name for gate in gates})

    def run() -> None:
        found: dict[str, list[NDArray[np.float32]]] = {gate.name: [] for gate in gates}
        with torch.inference_mode():
            for batch in images:
                for name, values in extract(batch.to(DEVICE)).items():
                    found[name].append(values.flatten(1).cpu().numpy())
        columns = {name: list(np.concatenate(values)) for name, values in found.items()}
        pd.DataFrame(columns).to_parquet(path)

    return run


def _torchlens(
    network: nn.Module, images: Sequence[Tensor], gates: Sequence[stripe.Gate], path: Path
) -> Callable[[], None]:
    """Let torchlens write the gates' outputs, as its own files, without a digest of the network."""
    import torchlens
    from torch import distributed

    # it captures in the first process, or in a member of a group
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    options = {"batch_size": len(images[0]), "progress": False, "model_identity": "none"}
    layers, samples = {gate.name: gate.source for gate in gates}, torch.cat(list(images)).to(DEVICE)

    warnings.filterwarnings("ignore", "torchlens could not arm distributed")  # there is nothing of the kind here

    def run() -> None:
        shutil.rmtree(path, ignore_errors=True)
        with torch.inference_mode():
            torchlens.extract_dataset(network, samples, layers, output_dir=path, **options)

    return run


PEERS = {"feature extractor + pandas": _extractor, "torchlens": _torchlens}


def _recorded(name: str, path: Path) -> dict[str, NDArray[Any]]:
    """Read back what a case wrote: (samples, channels) by gate."""
    if name.startswith("stripe"):
        run = stripe.open_run(path)
        return {gate.name: run.attention(gate.name, 0) for gate in run.gates}
    if name == "torchlens":
        import torchlens

        found = torchlens.load_extraction(path).activations
        return {gate: values.flatten(1).numpy() for gate, values in found.items()}
    table = pd.read_parquet(path)
    return {gate: np.stack(table[gate].tolist()) for gate in table}


def _difference(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> float:
    return max(float(np.abs(values - b[gate]).max()) for gate, values in a.items())
