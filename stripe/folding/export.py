"""A network as files that need no Python class of it: safetensors, torch.export, ONNX checked against onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stripe.files import replaced
from stripe.folding.tensors import outputs_of, relative_error
from stripe.messages import one_line

ONNX_TOLERANCE = 1e-3
"""Largest relative error, in float32, between a network and its ONNX graph under onnxruntime."""


@dataclass(frozen=True)
class OnnxFile:
    """A network as ONNX: its operators by kind, and how far onnxruntime's output is from torch's."""

    path: Path
    operators: dict[str, int]
    max_abs_error: float
    relative_error: float

    @property
    def nodes(self) -> int:
        """Number of nodes in the graph."""
        return sum(self.operators.values())


def save_weights(model: nn.Module, path: Path) -> Path:
    """Write the state dict as safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    with replaced(path) as partial:
        try:
            save_model(model, str(partial))
        except SafetensorError as error:  # a failed write too comes as this, without its number
            raise OSError(one_line(error)) from error
    return path


def save_program(model: nn.Module, images: Tensor, path: Path) -> Path:
    """Write the network as a torch.export program of any batch size; `torch.export.load(path).module()` runs it."""
    with replaced(path) as partial:
        torch.export.save(exported(model, images), str(partial))
    return path


def save_onnx(model: nn.Module, images: Tensor, path: Path) -> OnnxFile:
    """Write the network as ONNX of any batch size, and compare every output of onnxruntime on `images` (N, ...).

    Raises:
        ModuleNotFoundError: without the extra `onnx`.
        ArithmeticError: onnxruntime's output is off by more than ONNX_TOLERANCE.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'stripe-observation[onnx]'")
    import onnx

    with replaced(path) as partial:
        with _quiet():
            program = torch.onnx.export(exported(model, images), (images,), dynamo=True, verbose=False)
        assert program is not None
        program.save(str(partial), external_data=False)
        graph = onnx.load(str(partial)).graph
        given = onnx_session(partial).run(None, {graph.input[0].name: images.numpy()})
        with torch.no_grad():
            wanted = outputs_of(model, images)
        found = [torch.from_numpy(array) for array in given]
        relative = relative_error(found, wanted)
        if not relative <= ONNX_TOLERANCE:
            raise ArithmeticError(f"'{path}' differs by {relative:.2g} in onnxruntime; expected {ONNX_TOLERANCE:.0e}")
    operators = Counter(node.op_type for node in graph.node)
    largest = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return OnnxFile(path, dict(operators.most_common()), largest, relative)


def exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Export for any batch size, where the network allows it."""
    with _quiet():
        return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def onnx_session(path: Path) -> Any:
    """Open an ONNX file under onnxruntime with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own notes off the screen."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
