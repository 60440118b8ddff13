"""Find the gates of many networks and compare their numbers with those expected.

The list of networks gives the expected numbers, which were read in the authors' code. Where it names the authors'
attention classes too, the calls of their modules in one forward pass are counted as a check without stripe's rules.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.libraries import LIBRARIES, build, library_version
from benchmarks.timing import Result, Row


@dataclass(frozen=True)
class Network:
    """A line of --models: the network, how many gates it has, and the names of the classes whose calls are gates."""

    spec: str
    expected: int
    classes: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --models."""
    parser.add_argument(
        "--models",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with a line per network: its name, number of gates and attention classes; # begins a comment",
    )


def run(arguments: argparse.Namespace) -> Result:
    """Check every network, even if others fail; networks of libraries that are not installed are skipped."""
    networks = read_networks(arguments.models)
    width = max(len(network.spec) for network in networks)
    print(f"{'network':{width}}  found  expected  counted  verdict")
    rows = []
    for network in networks:
        rows.append(cover(network))
        found, counted, verdict = (
            "-" if rows[-1][key] is None else rows[-1][key] for key in ("found", "counted", "verdict")
        )
        print(f"{network.spec:{width}}  {found:>5}  {network.expected:>8}  {counted:>7}  {verdict}", flush=True)
    tried = [row for row in rows if not row["verdict"].startswith(SKIPPED)]
    wrong = sum(row["verdict"] != "ok" for row in tried)
    left_out = f", {len(rows) - len(tried)} skipped" if len(tried) < len(rows) else ""
    print(f"{len(tried) - wrong} of {len(tried)} networks as expected{left_out}")
    return Result(rows, wrong > 0)


SKIPPED = "skipped: "


def read_networks(path: Path) -> list[Network]:
    """Read lines such as `timm:seresnet50 16 SEModule  # note`; ValueError names the first line of another form."""
    networks = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        spec, count, *classes = [*line.partition("#")[0].split(), "", ""]
        if spec and (not count.isdecimal() or spec.partition(":")[0] not in LIBRARIES):
            raise ValueError(
                f"{path}, line {number}: '{line.strip()}'; expected a network, its number of gates and the classes "
                f"that have them, and the network to be of {', '.join(LIBRARIES)}"
            )
        if spec:
            networks.append(Network(spec, int(count), tuple(filter(None, classes))))
    if not networks:
        raise ValueError(f"{path} names no network; expected lines of a network and its number of gates")
    return networks


def cover(network: Network) -> Row:
    """Count the gates of one network; if this fails, the error is its verdict."""
    import stripe

    found, counted, seconds, verdict = None, None, None, "ok"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of old libraries, and of find_gates for a network without gates
            model, given = build(network.spec)
            start = time.perf_counter()
            found = len(stripe.find_gates(model, given))
            seconds = time.perf_counter() - start
            counted = calls(model, given, network.classes) if network.classes else None
        if found != network.expected or counted not in (None, network.expected):
            verdict = "mismatch"
    except ModuleNotFoundError as error:
        verdict = f"{SKIPPED}{error.name} is not installed"
    except Exception as error:  # a network that cannot be built or run must not hide the others
        verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row = {"case": network.spec, "seconds": seconds, "found": found, "expected": network.expected, "counted": counted}
    version = None if verdict.startswith(SKIPPED) else library_version(network.spec)
    return row | {"classes": " ".join(network.classes), "version": version, "verdict": verdict}


def calls(model: Any, given: Any, classes: Sequence[str]) -> int:
    """Count how often modules of these classes are called in one forward pass."""
    import torch

    made: list[None] = []
    with ExitStack() as hooks, torch.inference_mode():
        for module in model.modules():
            if type(module).__name__ in classes:
                hooks.callback(module.register_forward_pre_hook(lambda *_: made.append(None)).remove)
        if isinstance(given, dict):
            model(**given)
        else:
            model(*given) if isinstance(given, tuple) else model(given)
    return len(made)
