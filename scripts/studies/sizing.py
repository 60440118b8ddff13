"""The README's table of sizes, from what `benchmark.py sizing --json` wrote, and what follows from it."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.timing import Row

EPOCHS, PROBE, IMAGENET, WORKERS = 300, 1000, 50_000, 16
Cases = Mapping[str, Row]


def table(file: Path) -> Iterator[list[str]]:
    """Yield a row of networks, then one a figure."""
    networks: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for row in json.loads(file.read_text())["rows"]:
        network, _, case = row["case"].partition(", ")
        networks[network][case] = row
    sizes = {network: next(iter(cases.values())) for network, cases in networks.items()}
    yield ["", *(f"{name} ({row['gates']} gates, {row['channels']:,} channels)" for name, row in sizes.items())]
    for what, figure in FIGURES.items():
        yield [what, *map(figure, networks.values())]


def _bytes(cases: Cases) -> str:
    return f"{cases['writing samples']['bytes']:,.0f}; {cases['writing moments']['bytes'] / 1e3:.0f} kB"


def _rates(*names: str) -> Callable[[Cases], str]:
    return lambda cases: "; ".join(f"{1 / cases[name]['seconds']:,.0f}" for name in names)


def _disk(samples: int) -> Callable[[Cases], str]:
    return lambda cases: f"{EPOCHS * samples * cases['writing samples']['bytes'] / 1e9:,.1f} GB"


def _hours(cases: Cases, name: str, workers: int = 1) -> str:
    return f"{EPOCHS * IMAGENET * cases[name]['seconds'] / 3600 / workers:.1f}"


def _imagenet(cases: Cases) -> str:
    return f"{_disk(IMAGENET)(cases)}; {_hours(cases, 'recording')}; {_hours(cases, 'stats')}"


FIGURES: dict[str, Callable[[Cases], str]] = {
    "bytes a sample; an epoch of moments": _bytes,
    "samples/s a core: forward and record; write alone": _rates("recording", "writing samples"),
    "samples/s a core: `stats`; `--rank`": _rates("stats", "stats --rank"),
    f"{EPOCHS} epochs, {PROBE:,} images each: disk": _disk(PROBE),
    f"{EPOCHS} epochs, ImageNet's {IMAGENET:,} validation images: disk; core hours: recording; `stats`": _imagenet,
    "the same with `--moments-only`: disk": lambda cases: f"{EPOCHS * cases['writing moments']['bytes'] / 1e6:.0f} MB",
    f"the same recording by {WORKERS} workers: hours": lambda cases: _hours(cases, "recording", WORKERS),
}
