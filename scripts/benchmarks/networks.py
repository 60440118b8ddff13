"""The networks that several benchmarks run, and the arguments that choose them."""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import Run, synchronize
from stripe.folding import onnx_session
from stripe.models import create_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def add_network(parser: argparse.ArgumentParser, *, rounds: int, batch: int) -> None:
    """Add --depth, --module, --batch and --rounds."""
    parser.add_argument("--depth", type=int, default=164, help="depth of the bottleneck ResNet")
    parser.add_argument("--module", default="senet", help="attention module")
    parser.add_argument("--batch", type=int, default=batch, help="images of 32x32 per batch")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds over all cases")


def build(form: str, depth: int, module: str, classes: int = 10) -> nn.Module:
    """Build the "plain", "SE", "ASR" or "ASR + SE" form of one network on the device, in eval mode."""
    forms = {"plain": {}, "SE": {}, "ASR": {"asr": True}, "ASR + SE": {"asr": True, "both": True}}
    torch.manual_seed(0)
    options = forms[form] | {"module": None if form == "plain" else module}
    return create_model("resnet", depth=depth, num_classes=classes, **options).to(DEVICE).eval()


def pixels(samples: int, size: int = 32) -> Tensor:
    """Return images (samples, 3, size, size), the same on every call."""
    return torch.rand(samples, 3, size, size, generator=torch.Generator().manual_seed(0))


def forward(network: nn.Module, images: Tensor) -> None:
    """Run the network once."""
    with torch.inference_mode():
        synchronize(network(images))


def prepared_forward(network: nn.Module, images: Tensor, *, channels_last: bool = False) -> Run:
    """Return a run, as `timing` takes it, of the network on a batch, on the device."""
    network, images = network.to(DEVICE), images.to(DEVICE)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    return partial(forward, network, images)


def prepared_session(path: Path, images: Tensor) -> Run:
    """Return a run, as `timing` takes it, of an ONNX file on a batch under onnxruntime."""
    session = onnx_session(path)
    return partial(session.run, None, {session.get_inputs()[0].name: images.numpy()})
