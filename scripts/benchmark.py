"""Measure stripe through its public API alone: `python scripts/benchmark.py deploy`."""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import stripe
from stripe import asr
from stripe.asr.layers import asr_layers
from stripe.models import create_model

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


# ---- timing ------------------------------------------------------------------------------------------------


def interleave(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every case once a round, in turn and in reverse every other round; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name in list(cases) if turn % 2 else reversed(list(cases)):
            start = time.perf_counter()
            cases[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], baseline: str, images: int) -> list[Row]:
    """Print and return a row a case: median, least and most seconds, images/s, ratio of medians to `baseline`."""
    width = max(len(name) for name in seconds)
    print(f"{'case':{width}}   seconds      min      max  images/s  x {baseline}")
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = median / statistics.median(seconds[baseline])
        row = {
            "case": name,
            "seconds": median,
            "min": min(times),
            "max": max(times),
            "baseline": baseline,
            "ratio": ratio,
        }
        rows.append(row | {"images_per_second": images / median, "peak_mb": None})
        print(f"{name:{width}}  {median:8.4f} {min(times):8.4f} {max(times):8.4f}  {images / median:8.1f}  {ratio:.3f}")
    return rows


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `deploy` and `train`."""
    parser.add_argument("--depth", type=int, default=56, help="of the bottleneck ResNet")
    parser.add_argument("--module", default="senet", help="attention module")
    parser.add_argument("--batch", type=int, default=128, help="images of 32x32")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds over all cases")
    parser.add_argument("--amp", default="no", choices=("no", "bf16"), help="precision of `train`")


def _networks(arguments: argparse.Namespace) -> dict[str, torch.nn.Module]:
    forms = {"plain": {}, "SE": {"module": arguments.module}, "ASR": {"module": arguments.module, "asr": True}}
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: create_model("resnet", depth=arguments.depth, **form).to(device) for name, form in forms.items()}


# ---- deploy ------------------------------------------------------------------------------------------------


def deploy(arguments: argparse.Namespace) -> tuple[list[Row], bool]:
    """Time inference: plain, SE, ASR in training form, deployed, deployed as the reference does, fused."""
    networks = {name: network.eval() for name, network in _networks(arguments).items()}
    kept = copy.deepcopy(networks["ASR"])
    asr.switch_to_deploy(kept)
    networks |= {"deployed": asr.deploy(networks["ASR"]), "deployed, norm kept (reference)": kept}
    networks["fused"] = asr.fuse(networks["ASR"])
    networks["fused, channels-last"] = copy.deepcopy(networks["fused"]).to(memory_format=torch.channels_last)
    images = torch.rand(arguments.batch, 3, 32, 32, device=next(kept.parameters()).device)
    last = images.to(memory_format=torch.channels_last)
    cases = {name: partial(_forward, network, last if "last" in name else images) for name, network in networks.items()}
    return report(interleave(cases, arguments.rounds), "plain", arguments.batch), False


def _forward(network: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        network(images)
    if images.is_cuda:
        torch.cuda.synchronize()


# ---- train -------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """bn(x) * v as the formula reads: what the ASR layer avoids."""

    def __init__(self, layer: asr.ASRLayer) -> None:
        """Take over an ASR layer's parts."""
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return bn(x) * v."""
        return self.layer.bn(x) * self.layer.learned_vector().view(1, -1, 1, 1)


def train(arguments: argparse.Namespace) -> tuple[list[Row], bool]:
    """Time a training step, forward, backward and SGD: plain, SE, ASR, and ASR as bn(x) * v."""
    networks = _networks(arguments)
    networks["ASR as bn(x) * v"] = copy.deepcopy(networks["ASR"])
    for name, layer in list(asr_layers(networks["ASR as bn(x) * v"])):
        networks["ASR as bn(x) * v"].set_submodule(name, Scaled(layer))
    device = next(networks["plain"].parameters()).device
    images = torch.rand(arguments.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (arguments.batch,), device=device)
    cases = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
        cases[name] = partial(_step, network, optimizer, images, labels, arguments.amp == "bf16")
    return report(interleave(cases, arguments.rounds), "plain", arguments.batch), False


def _step(
    network: torch.nn.Module, optimizer: torch.optim.SGD, images: torch.Tensor, labels: torch.Tensor, bf16: bool
) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], tuple[list[Row], bool]]]
BENCHMARKS: dict[str, Command] = {
    "coverage": (add_coverage, coverage),
    "deploy": (add_network, deploy),
    "train": (add_network, train),
}

if __name__ == "__main__":
    raise SystemExit(main())
