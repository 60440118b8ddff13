"""Measured latency of networks side by side: PyTorch eager, torch.compile, onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stripe.folding.export import onnx_session, save_onnx
from stripe.timing import interleave

ROUNDS = 15
BATCHES = (1, 64)
SHORTEST = 0.02  # seconds that one timing takes at least; forwards are repeated to reach it


def latencies(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    *,
    backends: Sequence[str] = ("eager", "compile", "onnxruntime"),
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
) -> pd.DataFrame:
    """Time the networks in turn on repetitions of `images` (N, ...), by backend and batch size.

    The columns are network, backend, batch, milliseconds (the median time of a forward), low, high (over the rounds)
    and speedup, the first network's median over this one's.

    Raises:
        ValueError: an unknown backend.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"no backend '{backend}'; expected some of {', '.join(BACKENDS)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            run = {name: BACKENDS[backend](model, images, Path(folder, "a.onnx")) for name, model in networks.items()}
            for batch in batches:
                inputs = images.repeat(-(-batch // len(images)), *[1] * (images.ndim - 1))[:batch]
                rows += _compare(run, inputs, rounds, {"backend": backend, "batch": batch})
    return pd.DataFrame(rows)


Forward = Callable[[Tensor], object]


def _compare(
    forwards: Mapping[str, Forward], inputs: Tensor, rounds: int, labels: Mapping[str, object]
) -> list[dict[str, object]]:
    once = interleave({name: partial(forward, inputs) for name, forward in forwards.items()}, 1)
    repeats = {name: max(1, round(SHORTEST / seconds[0])) for name, seconds in once.items()}
    cases = {name: partial(_repeat, forward, inputs, repeats[name]) for name, forward in forwards.items()}
    times = {name: 1000 * np.array(found) / repeats[name] for name, found in interleave(cases, rounds).items()}
    first = np.median(next(iter(times.values())))
    return [
        {"network": name, **labels, "milliseconds": np.median(found), "low": found.min(), "high": found.max()}
        | {"speedup": first / np.median(found)}
        for name, found in times.items()
    ]


def _repeat(forward: Forward, inputs: Tensor, times: int) -> None:
    for _ in range(times):
        forward(inputs)


def _eager(model: nn.Module, images: Tensor, path: Path) -> Forward:
    model = model.eval()

    def forward(inputs: Tensor) -> None:
        with torch.inference_mode():
            model(inputs)

    return forward


def _compiled(model: nn.Module, images: Tensor, path: Path) -> Forward:
    compiled: Any = torch.compile(model.eval(), dynamic=False)
    return _eager(compiled, images, path)


def _onnxruntime(model: nn.Module, images: Tensor, path: Path) -> Forward:
    session = onnx_session(save_onnx(model, images, path).path)
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs.numpy()})


BACKENDS: dict[str, Callable[[nn.Module, Tensor, Path], Forward]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
}
"""By name, a function that turns a network into a forward; it is given a path for a temporary file."""
