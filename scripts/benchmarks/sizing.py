"""Measure what a recording costs by its gates: bytes a sample, and samples a second of one core's processor time."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Result, Row
from stripe import open_run
from stripe.stats import summarize
from stripe.store import GateColumn, RunWriter

GATES = {
    "SE-ResNet-164": [64] * 18 + [128] * 18 + [256] * 18,
    "SE-ResNet-50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3,
}
CLASSES = 1000
SPREAD = 0.05  # of the values around their channel's, as in a trained gate
BATCH = 100
COMPARED = ("baseline", "ratio", "ratio_min", "ratio_max", "peak_mb")  # what a row has none of here
DISTINCT = 8  # batches before one comes again: far enough apart that compression does not see it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size and the networks."""
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="of which a multiple of 100 is taken")
    parser.add_argument("--networks", nargs="+", choices=GATES, default=list(GATES), help="whose gates")


def run(arguments: argparse.Namespace) -> Result:
    """Write and measure a run for each network, as samples and as moments."""
    rows: list[Row] = []
    for network in arguments.networks:
        for case, seconds, size in _cases(GATES[network], max(BATCH, arguments.samples // BATCH * BATCH)):
            row = {"case": f"{network}, {case}", "seconds": seconds, "min": seconds, "max": seconds}
            rows.append(row | dict.fromkeys(COMPARED) | {"bytes": size})
            print(f"{rows[-1]['case']:45} {1 / seconds:9.0f} samples/s" + (f" {size:9.0f} bytes" if size else ""))
    return Result(rows)


def _cases(channels: list[int], samples: int) -> list[tuple[str, float, float | None]]:
    """Return (what, processor seconds a sample, bytes: of a sample, or of an epoch of moments)."""
    found: list[tuple[str, float, float | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        for contents in ("samples", "moments"):
            path = Path(folder, contents)
            seconds = _write(path, contents, channels, samples)
            size = sum(file.stat().st_size for file in path.rglob("*.parquet"))
            found.append((f"writing {contents}", seconds / samples, size / (samples if contents == "samples" else 1)))
        recorded = open_run(Path(folder, "samples"))
        for name, work in {
            "stats": lambda: summarize(recorded),
            "stats --bootstrap 0": lambda: summarize(recorded, bootstrap=0),
            "stats --moments-only": recorded.moments,
        }.items():
            found.append((name, _processor_time(work) / samples, None))
    return found


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _write(path: Path, contents: str, channels: list[int], samples: int) -> float:
    """Write a run; return the processor time without that of making the values."""
    rng = np.random.default_rng(0)
    gates = [GateColumn(f"gate{position}", count) for position, count in enumerate(channels)]
    stripes = {gate.name: rng.beta(4, 4, gate.channels) for gate in gates}
    batches = [_batch(rng, stripes) for _ in range(DISTINCT)]
    labels = rng.integers(0, CLASSES, BATCH)
    start_time = time.process_time()
    with RunWriter(path, model={}, data={}, gates=gates, contents=contents) as writer, writer.epoch(0) as epoch:
        for start in range(0, samples, BATCH):
            epoch.append(np.arange(start, start + BATCH), labels, batches[start // BATCH % DISTINCT])
    return time.process_time() - start_time


def _batch(rng: np.random.Generator, stripes: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
    return {
        name: np.clip(stripe + SPREAD * rng.standard_normal((BATCH, stripe.size)), 0, 1).astype(np.float32)
        for name, stripe in stripes.items()
    }
