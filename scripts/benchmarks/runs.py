"""Synthetic runs of any size, and the argument that sets it."""

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stripe.gate import Gate
from stripe.store import RunWriter

WIDTHS = (64, 128, 256)  # of a bottleneck ResNet's three stages
AT_ONCE = 500  # samples appended together
DISTINCT = 8  # batches after which the noise repeats: too far apart for compression to notice


def gate_channels(gates: int) -> list[int]:
    """Return the channels of each gate, a third of the gates in each stage; 54 gates give ResNet-164's 8,064."""
    if gates < 3 or gates % 3:
        raise ValueError(f"--gates {gates}: expected a multiple of three, a third for each width of {WIDTHS}")
    return [width for width in WIDTHS for _ in range(gates // 3)]


def write_run(path: Path, epochs: int, samples: int, channels: list[int]) -> list[str]:
    """Write a run of stripes and noise; return its files in the order of epochs."""
    gates = [Gate(f"gate{number}", width) for number, width in enumerate(channels)]
    with RunWriter(path, model={}, data={}, gates=gates) as writer:
        for epoch in range(epochs):
            with writer.epoch(epoch) as rows:
                for ids, values in _batches(epoch, samples, sum(channels)):
                    parts = np.split(values, np.cumsum(channels)[:-1], axis=1)
                    rows.append(ids, ids % 10, {gate.name: part for gate, part in zip(gates, parts, strict=True)})
    return sorted(str(part) for part in path.rglob("*.parquet"))


def rows_alone(run: Path, path: Path) -> Path:
    """Copy a run without the moments beside its rows, by links to its files; return the path of the copy."""
    shutil.copytree(run, path, ignore=shutil.ignore_patterns(".moments"), copy_function=os.link)
    return path


def _batches(epoch: int, samples: int, channels: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    rng = np.random.default_rng(epoch)
    stripe = 0.2 + 0.6 * rng.random(channels, np.float32)
    noise = [np.float32(0.05) * rng.standard_normal((AT_ONCE, channels), np.float32) for _ in range(DISTINCT)]
    for number, start in enumerate(range(0, samples, AT_ONCE)):
        ids = np.arange(start, min(start + AT_ONCE, samples))
        yield ids, stripe + noise[number % DISTINCT][: len(ids)]


def add_run(parser: argparse.ArgumentParser, *, gates: int) -> None:
    """Add --gates."""
    parser.add_argument("--gates", type=int, default=gates, help="gates: a third each of 64, 128 and 256 channels")
