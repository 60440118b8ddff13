"""Time recording beside the bare forward loop, torchlens and torchvision's feature extractor, all to Parquet."""

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stripe
from benchmarks.networks import DEVICE, add_network, build, forward, pixels
from benchmarks.timing import Result, Run, Steps, Timing, check, measure, report, step_by_step

TOLERANCE = 1e-5  # of recorded values, which are between 0 and 1
CONTROL = "forward, again"  # the bare loop once more: its difference from "forward" is chance
WARM_UP = 2  # batches that every case runs before it is timed

Gates = Sequence[stripe.Gate]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's and the recording's arguments."""
    add_network(parser, rounds=3, batch=100)
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="images to record")
    parser.add_argument("--squeeze", action="store_true", help="also record the squeeze, and run no other library")
    parser.add_argument("--torchlens", action="store_true", help="also run torchlens: six seconds a batch, so take few")


def run(arguments: argparse.Namespace) -> Result:
    """Record the same gates of the same images in every way, and compare what was recorded."""
    names = ["stripe, squeeze"] if arguments.squeeze else ["stripe", *PEERS]
    if not arguments.torchlens:
        names = [name for name in names if name != "torchlens"]
    with tempfile.TemporaryDirectory() as folder:
        cases = [CONTROL, *names]
        peaks = measure({name: partial(_prepare_alone, name, arguments, folder) for name in cases}, 0)
        together = measure({"together": partial(_prepare_together, cases, arguments, folder)}, 0)["together"]
        peaks["forward"] = peaks[CONTROL]
        timings = {name: Timing(each, peaks[name].peak_mb, None) for name, each in together.returned.items()}
        rows = report(timings, "forward", images=arguments.samples)
        for name in names:
            more = timings[name].difference(timings["forward"])
            print(f"{name}: {1e3 * more / arguments.samples:+.3f} ms an image over forward")
        wanted = _recorded(names[0], Path(folder, names[0]))
        errors = [_difference(wanted, _recorded(name, Path(folder, name))) for name in names[1:]]
    if not errors:
        return Result(rows)
    return Result(rows, not check("difference of the recorded values", max(errors), TOLERANCE))


def _prepare_alone(name: str, arguments: argparse.Namespace, folder: str) -> Run:
    network, batches = _network(arguments), pixels(arguments.samples).split(arguments.batch)
    case = _case(name, network, batches, _gates(network, batches), folder)

    def run() -> None:
        for _ in case():
            pass

    return run


def _prepare_together(names: Sequence[str], arguments: argparse.Namespace, folder: str) -> Run:
    """Return a run that times all cases step by step; it returns the seconds of each, and of the bare loop, by round.

    Two copies of a network differ in speed, so each case takes another copy in every round.
    """
    networks = [_network(arguments) for _ in ["forward", *names]]
    batches = pixels(arguments.samples).split(arguments.batch)
    gates, loop = _gates(networks[0], batches), arguments.samples / len(batches[0])

    def run() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in ["forward", *names]}
        for turn in range(arguments.rounds + 1):
            networks.append(networks.pop(0))
            its = batches if turn else batches[:WARM_UP]
            cases = {name: _case(name, networks[place], its, gates, folder) for place, name in enumerate(names, 1)}
            once, spent = step_by_step(partial(_forward, networks[0], batches[0]), cases)
            for name, each in {"forward": loop * once, **spent}.items() if turn else ():
                seconds[name].append(each)
        return seconds

    return run


def _network(arguments: argparse.Namespace) -> nn.Module:
    return build("SE", arguments.depth, arguments.module)


def _gates(network: nn.Module, batches: Sequence[Tensor]) -> Gates:
    return stripe.find_gates(network, batches[0][:2].to(DEVICE))


def _case(name: str, network: nn.Module, batches: Sequence[Tensor], gates: Gates, folder: str) -> Steps:
    path = Path(folder, name)
    if name == CONTROL:
        return partial(_loop, network, batches)
    if name.startswith("stripe"):
        return partial(_stripe, network, batches, gates, path, squeeze="squeeze" in name)
    return PEERS[name](network, batches, gates, path)


def _forward(network: nn.Module, batch: Tensor) -> None:
    forward(network, batch.to(DEVICE))


def _loop(network: nn.Module, batches: Sequence[Tensor]) -> Iterator[None]:
    for batch in batches:
        _forward(network, batch)
        yield


def _stripe(network: nn.Module, batches: Sequence[Tensor], gates: Gates, path: Path, squeeze: bool) -> Iterator[None]:
    samples = torch.arange(sum(map(len, batches))).split(len(batches[0]))
    with stripe.Recorder(network, gates, path, squeeze=squeeze, overwrite=True) as recorder:
        for batch, ids in zip(batches, samples, strict=True):
            _forward(network, batch)
            recorder.commit(ids, ids)
            yield


def _extractor(network: nn.Module, batches: Sequence[Tensor], gates: Gates, path: Path) -> Steps:
    """Let torchvision rewrite the network so that it returns the gates; write all their values with pandas."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extract = create_feature_extractor(network, {gate.source: gate.name for gate in gates})

    def run() -> Iterator[None]:
        found: dict[str, list[NDArray[np.float32]]] = {gate.name: [] for gate in gates}
        for batch in batches:
            with torch.inference_mode():
                for name, values in extract(batch.to(DEVICE)).items():
                    found[name].append(values.flatten(1).cpu().numpy())
            yield
        columns = {name: list(np.concatenate(values)) for name, values in found.items()}
        pd.DataFrame(columns).to_parquet(path)

    return run


def _torchlens(network: nn.Module, batches: Sequence[Tensor], gates: Gates, path: Path) -> Steps:
    """Let torchlens write the gates' outputs to files of its own, without a digest of the network, all in one step."""
    import torchlens
    from torch import distributed

    if not distributed.is_initialized():  # torchlens captures only in the first process or in a member of a group
        distributed.init_process_group("gloo", init_method=f"file://{path}-{os.getpid()}", rank=0, world_size=1)
    options = {"batch_size": len(batches[0]), "progress": False, "model_identity": "none"}
    layers, samples = {gate.name: gate.source for gate in gates}, torch.cat(list(batches)).to(DEVICE)

    warnings.filterwarnings("ignore", "torchlens could not arm distributed")  # nothing is distributed here

    def run() -> Iterator[None]:
        shutil.rmtree(path, ignore_errors=True)
        with torch.inference_mode():
            torchlens.extract_dataset(network, samples, layers, output_dir=path, **options)
        yield

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
    return {str(gate): np.stack(table[gate].tolist()) for gate in table}


def _difference(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> float:
    return max(float(np.abs(values - b[gate]).max()) for gate, values in a.items())
