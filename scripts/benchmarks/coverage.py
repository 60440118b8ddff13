"""Find the gates of many networks and compare their numbers with those expected."""

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Result, Row

SIZE = 224  # of images for a network that does not tell its own
IMAGES = 3


@dataclass(frozen=True)
class Network:
    """A line of --models: what to load, and how many gates it has."""

    spec: str
    expected: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --models."""
    parser.add_argument(
        "--models", type=Path, required=True, metavar="FILE", help="lines of a network and its number of gates; # notes"
    )


def run(arguments: argparse.Namespace) -> Result:
    """Look at every network, whatever becomes of the others."""
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
    return Result(rows, wrong > 0)


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
    import torch

    import stripe

    found, seconds, verdict = None, None, "ok"
    try:
        checkpoint = stripe.models.read_checkpoint(network.spec)
        size = checkpoint.description.get("data", {}).get("size", SIZE)
        images = torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # find_gates says why a network has none
            found = len(stripe.find_gates(checkpoint.model, images))
        seconds = time.perf_counter() - start
        if found != network.expected:
            verdict = "mismatch"
    except Exception as error:  # a network that cannot be built or run must not hide the others
        verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row = {"case": network.spec, "seconds": seconds, "found": found, "expected": network.expected}
    return row | {"verdict": verdict}
