"""Measure what recording a network's gates costs: bytes per sample, and processor time per sample."""

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
"""The kind of work; its processor seconds per sample; bytes per sample, or per epoch of moments."""
NETWORKS: dict[str, tuple[Build, int]] = {  # the size is that of its images
    "SE-ResNet-164": (lambda: build("SE", 164, "senet"), 32),
    "SE-ResNet-50": (lambda: read_checkpoint("timm:seresnet50").model, 224),
}
CLASSES = 1000
SPREAD = 0.05  # standard deviation of the values around their channel's mean, as in a trained gate
BATCH = 100
COMPARED = ("baseline", "ratio", "ratio_min", "ratio_max", "peak_mb")  # columns that stay empty here
DISTINCT = 8  # batches after which the values repeat: too far apart for compression to notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size and the networks."""
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="samples to store, in batches of 100")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="images to run through the network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to record")


def run(arguments: argparse.Namespace) -> Result:
    """Measure recording each network, and writing and reading a run of its gates as samples and as moments."""
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
    """Return the processor time per image of the forward pass and its recording."""
    batches = [(images[ids], ids, ids) for ids in torch.arange(len(images)).split(BATCH)]
    with tempfile.TemporaryDirectory() as folder, stripe.Recorder(network, gates, Path(folder, "run")) as recorder:
        return _processor_time(lambda: recorder.record(batches)) / len(images)


def _stored(gates: list[stripe.Gate], samples: int) -> list[Found]:
    """Write synthetic values of the gates as samples and as moments, and measure the statistics of the samples."""
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
    """Write a run; return the processor time, not counting the making of the values."""
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
