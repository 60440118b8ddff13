"""Measure what a recording costs by its gates: bytes a sample, and samples a second of one core's processor time."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stripe
from benchmarks.networks import DEVICE, build, pixels
from benchmarks.timing import Result, Row
from stripe.gate import Gate
from stripe.models import read_checkpoint
from stripe.stats import summarize
from stripe.store import RunWriter

Build = Callable[[], nn.Module]
Found = tuple[str, float, float | None]
"""What; processor seconds a sample; bytes, of a sample or of an epoch of moments."""
NETWORKS: dict[str, tuple[Build, int]] = {  # and the size of its images
    "SE-ResNet-164": (lambda: build("SE", 164, "senet"), 32),
    "SE-ResNet-50": (lambda: read_checkpoint("timm:seresnet50").model, 224),
}
CLASSES = 1000
SPREAD = 0.05  # of the values around their channel's, as in a trained gate
BATCH = 100
COMPARED = ("baseline", "ratio", "ratio_min", "ratio_max", "peak_mb")  # what a row has none of here
DISTINCT = 8  # batches before one comes again: far enough apart that compression does not see it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size and the networks."""
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="of which a multiple of 100 is taken")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="to run through the network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="what to record")


def run(arguments: argparse.Namespace) -> Result:
    """Write and measure a run for each network, as samples and as moments."""
    rows: list[Row] = []
    for name in arguments.networks:
        make, size = NETWORKS[name]
        network = make().eval().to(DEVICE)
        gates = stripe.find_gates(network, pixels(2, size).to(DEVICE))
        about = dict.fromkeys(COMPARED) | {"gates": len(gates), "channels": sum(gate.channels for gate in gates)}
        found: list[Found] = [("recording", _record(network, gates, pixels(arguments.images, size)), None)]
        found += _stored(gates, max(BATCH, arguments.samples // BATCH * BATCH))
        for case, seconds, size_of in found:
            row = {"case": f"{name}, {case}", "seconds": seconds, "min": seconds, "max": seconds, "bytes": size_of}
            rows.append(row | about)
    return Result(rows)


def _record(network: nn.Module, gates: list[stripe.Gate], images: Tensor) -> float:
    """Return the processor time that an image takes to pass the network and be recorded."""
    batches = [(images[ids], ids, ids) for ids in torch.arange(len(images)).split(BATCH)]
    with tempfile.TemporaryDirectory() as folder, stripe.Recorder(network, gates, Path(folder, "run")) as recorder:
        return _processor_time(lambda: recorder.record(batches)) / len(images)


def _stored(gates: list[stripe.Gate], samples: int) -> list[Found]:
    """Write synthetic values of the gates, read them and measure them."""
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for contents in ("samples", "moments"):
            path = Path(folder, contents)
            seconds = _write(path, contents, gates, samples)
            size = sum(file.stat().st_size for file in path.rglob("*.parquet"))
            found.append((f"writing {contents}", seconds / samples, size / (samples if contents == "samples" else 1)))
        recorded = stripe.open_run(Path(folder, "samples"))
        works: dict[str, Callable[[], object]] = {
            "stats": lambda: summarize(recorded),
            "stats --rank": lambda: summarize(recorded, rank=True),
        }
        for name, work in works.items():
            found.append((name, _processor_time(work) / samples, None))
    return found


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _write(path: Path, contents: str, gates: list[stripe.Gate], samples: int) -> float:
    """Write a run; return the processor time without that of making the values."""
    rng = np.random.default_rng(0)
    columns = [Gate(gate.name, gate.channels) for gate in gates]
    stripes = {gate.name: rng.beta(4, 4, gate.channels) for gate in gates}
    batches = [_batch(rng, stripes) for _ in range(DISTINCT)]
    labels = rng.integers(0, CLASSES, BATCH)
    start_time = time.process_time()
    with RunWriter(path, model={}, data={}, gates=columns, contents=contents) as writer, writer.epoch(0) as epoch:
        for start in range(0, samples, BATCH):
            epoch.append(np.arange(start, start + BATCH), labels, batches[start // BATCH % DISTINCT])
    return time.process_time() - start_time


def _batch(rng: np.random.Generator, stripes: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
    return {
        name: np.clip(stripe + SPREAD * rng.standard_normal((BATCH, stripe.size)), 0, 1).astype(np.float32)
        for name, stripe in stripes.items()
    }
