"""Time recording and statistics over the number of samples.

With moments kept beside the rows, the table should take the same time for any number of samples; measuring the rows,
and recording, should take time in proportion to it. Memory should not grow.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.runs import add_run, gate_channels, rows_alone, write_run
from benchmarks.timing import Prepare, Result, Row, Run, measure, report
from stripe.stats import summarize

IMAGE_SIZE = 8  # pixels a side of the recorded images: the network is fast, so that the time of recording shows
BATCH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 30_000, 100_000], metavar="N")
    add_run(parser, gates=54)
    parser.add_argument("--depth", type=int, default=11, help="depth of the bottleneck ResNet that is recorded")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds over all cases")


def run(arguments: argparse.Namespace) -> Result:
    """Measure every kind of work at every size; the slope is that of log time over log samples, 1 for linear."""
    sizes, channels = sorted(arguments.samples), gate_channels(arguments.gates)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {size: Path(folder, f"{size}") for size in sizes}
        for size, path in paths.items():
            write_run(path, 1, size, channels)
        rows += _over({f"stats, {size}": partial(_stats, path) for size, path in paths.items()}, sizes, arguments)
        alone = {size: rows_alone(path, Path(folder, f"{size}-rows")) for size, path in paths.items()}
        cases = {f"stats of rows, {size}": partial(_stats, path) for size, path in alone.items()}
        rows += _over(cases, sizes, arguments)
        recorded = Path(folder, "recorded")
        cases = {f"collect, {size}": partial(_record, arguments.depth, size, recorded) for size in sizes}
        rows += _over(cases, sizes, arguments)
    return Result(rows)


def _over(cases: Mapping[str, Prepare], sizes: list[int], arguments: argparse.Namespace) -> list[Row]:
    rows = report(measure(cases, arguments.rounds), next(iter(cases)))
    for (small, before), (large, after) in pairwise(zip(sizes, rows, strict=True)):
        after["slope"] = math.log(after["seconds"] / before["seconds"]) / math.log(large / small)
    return rows


def _stats(path: Path) -> Run:
    return partial(summarize, path)


def _record(depth: int, samples: int, path: Path) -> Run:
    import torch

    import stripe
    from benchmarks.networks import DEVICE, build

    network = build("SE", depth, "senet")
    images = torch.rand(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    gates = stripe.find_gates(build("SE", depth, "senet"), torch.rand(2, 3, 32, 32, device=DEVICE))
    batches = [(images[: len(ids)], ids, ids) for ids in torch.arange(samples).split(BATCH)]

    def run() -> None:
        with stripe.Recorder(network, gates, f"{path}-{samples}", overwrite=True) as recorder:
            recorder.record(batches, epoch=0)

    return run
