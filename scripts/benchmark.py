"""Measure stripe through its public API alone: `python scripts/benchmark.py coverage --models FILE`."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import stripe

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pyarrow")
SIZE = 224  # of images for a network that does not tell its own
IMAGES = 3

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; exit code 1 when it finds a fault, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (add_arguments, run) in BENCHMARKS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
        add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        rows, failed = arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if arguments.json:
        content = {"benchmark": arguments.benchmark, "device": _device(), "versions": _versions(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(failed)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "stripe": stripe.__version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- coverage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A line of --models: what to load, and how many gates it has."""

    spec: str
    expected: int


def add_coverage(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coverage`."""
    parser.add_argument(
        "--models", type=Path, required=True, metavar="FILE", help="lines of a network and its number of gates; # notes"
    )


def coverage(arguments: argparse.Namespace) -> tuple[list[Row], bool]:
    """Find the gates of many networks and compare their numbers with those expected."""
    networks = read_networks(arguments.models)
    width = max(len(network.spec) for network in networks)
    print(f"{'network':{width}}  found  expected  verdict")
    rows = []
    for network in networks:
        rows.append(cover(network))
        found, expected, verdict = (rows[-1][key] for key in ("found", "expected", "verdict"))
        print(f"{network.spec:{width}}  {'-' if found is None else found:>5}  {expected:>8}  {verdict}", flush=True)
    wrong = sum(row["verdict"] != "ok" for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} networks as expected")
    return rows, wrong > 0


def read_networks(path: Path) -> list[Network]:
    """Read lines such as `timm:seresnet50 16  # note`; ValueError names the line that is none."""
    networks = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words and (len(words) != 2 or not words[1].isdecimal()):
            raise ValueError(f"{path}, line {number}: '{line.strip()}'; expected a network and its number of gates")
        if words:
            networks.append(Network(words[0], int(words[1])))
    if not networks:
        raise ValueError(f"{path} names no network; expected lines of a network and its number of gates")
    return networks


def cover(network: Network) -> Row:
    """Count the gates of one network at its own input size; what fails is its verdict."""
    found, seconds, verdict = None, None, "ok"
    try:
        checkpoint = stripe.models.read_checkpoint(network.spec)
        size = checkpoint.description.get("data", {}).get("size", SIZE)
        images = torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        found = len(stripe.find_gates(checkpoint.model, images))
        seconds = time.perf_counter() - start
        if found != network.expected:
            verdict = "mismatch"
    except Exception as error:  # a network that cannot be built or run must not hide the others
        verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row = {"case": network.spec, "seconds": seconds, "found": found, "expected": network.expected}
    return row | {"verdict": verdict}


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], tuple[list[Row], bool]]]
BENCHMARKS: dict[str, Command] = {"coverage": (add_coverage, coverage)}

if __name__ == "__main__":
    raise SystemExit(main())
