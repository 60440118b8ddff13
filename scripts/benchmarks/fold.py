"""Time a network before and after its attention is folded into constants: eager, channels-last, under onnxruntime."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

import stripe
from benchmarks.networks import DEVICE, pixels, prepared_forward, prepared_session
from benchmarks.timing import Prepare, Result, Run, check, measure, report
from stripe.folding import FoldReport, save_onnx

CONSTANT = 0.3  # for every channel: speed does not depend on the value
AT_LEAST = 128  # images in one timing: small batches are repeated
TOLERANCE = 1e-9  # relative error of the folded network, in float64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network and its images."""
    parser.add_argument("--ckpt", default="torchvision:mobilenet_v3_small", metavar="SPEC", help="network to fold")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per batch")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds over all cases")


def run(arguments: argparse.Namespace) -> Result:
    """Time one batch through both networks in every way."""
    images = pixels(arguments.batch, arguments.size)
    network, (folded, folding) = _load(arguments.ckpt), _fold(arguments.ckpt, arguments.size)
    cases: dict[str, Prepare] = {}
    for layout in ("eager", "channels-last"):
        for name in ("attention", "folded"):
            cases[f"{name}, {layout}"] = partial(_prepare, name, layout, arguments)
    with tempfile.TemporaryDirectory() as folder:
        if DEVICE == "cpu":
            for name, each in (("attention", network), ("folded", folded)):
                save_onnx(each, pixels(2, arguments.size), Path(folder, f"{name}.onnx"))  # export needs 2 or more
                cases[f"{name}, onnxruntime"] = partial(prepared_session, Path(folder, f"{name}.onnx"), images)
        times = -(-AT_LEAST // arguments.batch)
        repeated = {name: partial(_prepare_repeated, prepare, times) for name, prepare in cases.items()}
        timings = measure(repeated, arguments.rounds)
    rows = []
    for baseline in (name for name in timings if name.startswith("attention")):
        pair = {name: timings[name] for name in (baseline, baseline.replace("attention", "folded"))}
        rows += report(pair, baseline, images=times * arguments.batch)
    kept = (folding.table["direction"] == "kept").sum()
    print(f"{len(folding.table)} gates, {kept} of them kept as a multiplication")
    return Result(rows, not check("relative error of the folded network", folding.error, TOLERANCE))


def _prepare_repeated(prepare: Prepare, times: int) -> Run:
    run = prepare()

    def repeat() -> None:
        for _ in range(times):
            run()

    return repeat


def _load(spec: str) -> nn.Module:
    torch.manual_seed(0)
    return stripe.models.load_checkpoint(spec)


def _fold(spec: str, size: int) -> tuple[nn.Module, FoldReport]:
    network, images = _load(spec), pixels(3, size)
    constants = {gate.name: torch.full((gate.channels,), CONSTANT) for gate in stripe.find_gates(network, images)}
    return stripe.fold(network, constants, images)


def _prepare(name: str, layout: str, arguments: argparse.Namespace) -> Run:
    network = _load(arguments.ckpt) if name == "attention" else _fold(arguments.ckpt, arguments.size)[0]
    images = pixels(arguments.batch, arguments.size)
    return prepared_forward(network, images, channels_last=layout == "channels-last")
