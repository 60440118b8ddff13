"""Time inference of plain, SE and ASR networks: ASR as trained, deployed, deployed as by the reference, and fused.

On a CPU, the fused network runs under onnxruntime too.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.networks import DEVICE, add_network, build, pixels, prepared_forward, prepared_session
from benchmarks.timing import Result, Run, check, measure_together, report
from stripe import asr
from stripe.folding import save_onnx

REFERENCE = "deployed, norm kept (reference)"
TOLERANCE = 1e-3  # of logits, float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's arguments."""
    add_network(parser, rounds=15, batch=128)


def run(arguments: argparse.Namespace) -> Result:
    """Time one batch through every form in one process, and compare the outputs of the forms of ASR."""
    sizes = (arguments.depth, arguments.module)
    cases = {name: partial(_prepare, name, *sizes, arguments.batch) for name in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        if DEVICE == "cpu":
            path = Path(folder, "fused.onnx")
            save_onnx(_fused(*sizes), pixels(arguments.batch), path)
            cases["fused, onnxruntime"] = partial(prepared_session, path, pixels(arguments.batch))
        timings = measure_together(cases, arguments.rounds)
    rows = report(timings, "plain", images=arguments.batch)
    forms = [FORMS[name](*sizes) for name in ("ASR", "deployed", REFERENCE, "fused")]
    with torch.inference_mode():
        wanted, *others = (form(pixels(arguments.batch).to(DEVICE)) for form in forms)
    error = max(float((wanted - other).abs().max() / wanted.abs().max()) for other in others)
    return Result(rows, not check("relative difference between the forms of ASR", error, TOLERANCE))


def _kept(depth: int, module: str) -> nn.Module:
    network = build("ASR", depth, module)
    asr.switch_to_deploy(network)
    return network


def _deployed(depth: int, module: str, form: str = "ASR") -> nn.Module:
    return asr.deploy(build(form, depth, module))


def _fused(depth: int, module: str) -> nn.Module:
    return asr.fuse(build("ASR", depth, module))


FORMS: dict[str, Callable[[int, str], nn.Module]] = {
    "plain": partial(build, "plain"),
    "SE": partial(build, "SE"),
    "ASR": partial(build, "ASR"),
    "deployed": _deployed,
    "ASR + SE, deployed": partial(_deployed, form="ASR + SE"),
    REFERENCE: _kept,
    "fused": _fused,
    "fused, channels-last": _fused,
}


def _prepare(name: str, depth: int, module: str, batch: int) -> Run:
    return prepared_forward(FORMS[name](depth, module), pixels(batch), channels_last="channels-last" in name)
