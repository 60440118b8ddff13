"""Save a network without pickling its class: as safetensors, torch.export program, or ONNX checked in onnxruntime."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stripe.files import replaced
from stripe.folding.tensors import outputs_of, relative_error
from stripe.gates.trace import Images, called, tensors_in
from stripe.messages import one_line
from stripe.torch_internals import tree_map

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
        except SafetensorError as error:  # a failed write is reported as this too, without its errno
            raise OSError(one_line(error)) from error
    return path


def save_program(model: nn.Module, images: Images, path: Path) -> Path:
    """Write the network as a torch.export program of any batch size; `torch.export.load(path).module()` runs it."""
    with replaced(path) as partial:
        torch.export.save(_exported(model, images), str(partial))
    return path


def save_onnx(
    model: nn.Module, images: Images, path: Path, *, opset: int | None = None, batch: int | None = None
) -> OnnxFile:
    """Write the network as ONNX, and compare every output of onnxruntime on `images` with the network's.

    Every tensor of the network's output becomes an output of the file, named by its key or field where the network
    returns a mapping or dataclass, else by its position.

    Args:
        model: the network, in eval mode.
        images: a small batch as the network takes it: a tensor, or several as a tuple or mapping.
        path: the file.
        opset: the version of ONNX's operators (default: the exporter's own).
        batch: how many images the file takes at a time (default: any number).

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ValueError: the exporter cannot translate an operation, which the message names, or cannot write this opset.
        ArithmeticError: onnxruntime's output is off by more than ONNX_TOLERANCE.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'stripe-observation[onnx]'")
    import onnx

    given = images if batch is None else tree_map(lambda item: _of_size(item, batch), images)
    with torch.no_grad():
        wanted = outputs_of(model, given)
        names = _names(called(model, given), len(wanted))
    with replaced(path) as partial:
        args, kwargs, tensors = _arguments(given)
        flat, inputs = _Flat(model, list(kwargs)), (*args, *kwargs.values())
        _write_onnx(lambda: _exported(flat, inputs, free=batch is None), partial, names, opset)
        graph = onnx.load(str(partial)).graph
        fed = dict(zip([each.name for each in graph.input], tensors, strict=True))
        found = [torch.from_numpy(array) for array in onnx_session(partial).run(None, _arrays(fed))]
        relative = relative_error(found, wanted)
        if not relative <= ONNX_TOLERANCE:
            raise ArithmeticError(f"'{path}' differs by {relative:.2g} in onnxruntime; expected {ONNX_TOLERANCE:.0e}")
    operators = Counter(node.op_type for node in graph.node)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True) if a.numel())
    return OnnxFile(path, dict(operators.most_common()), largest, relative)


def _write_onnx(
    export: Callable[[], torch.export.ExportedProgram], path: Path, names: Sequence[str], opset: int | None
) -> None:
    try:
        with _quiet():
            program = torch.onnx.export(
                export(),
                dynamo=True,
                optimize=True,  # the default from torch 2.7 on
                verbose=False,
                output_names=names,
                opset_version=opset,
            )
        assert program is not None
        program.save(str(path), external_data=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the exporter and its converters raise many kinds
        raise ValueError(f"this network cannot be written as ONNX: {_cause(error)}") from error
    if opset is not None and (found := _opset(path)) != opset:
        raise ValueError(f"this network cannot be written in ONNX's opset {opset}; the exporter gives opset {found}")


def _opset(path: Path) -> int:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return next(int(each.version) for each in model.opset_import if each.domain in ("", "ai.onnx"))


def _cause(error: BaseException) -> str:
    """Return which operation stopped an export, if the chain of errors names one, else the first error's message."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in reversed(chain):
        if found := re.search(r"OpOverload\(op='([^']+)'|No decompositions? registered for \S*?([\w:.]+)", str(each)):
            return f"there is no ONNX for the operation {found[1] or found[2]}"
    return one_line(chain[-1])


class _Flat(nn.Module):
    """A network that takes its arguments by position and returns every tensor of its output in one tuple."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = names  # of the last arguments, which the network takes by name

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        first = len(args) - len(self.names)
        return tuple(tensors_in(self.network(*args[:first], **dict(zip(self.names, args[first:], strict=True)))))


def _names(output: Any, count: int) -> list[str]:
    """Name the tensors of an output: by its keys or fields where each tensor has one, else by their positions."""
    fields = vars(output) if is_dataclass(output) and not isinstance(output, Mapping) else output
    if isinstance(fields, Mapping):
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        if len(tensors) == count:
            return [str(name) for name in tensors]
    return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]


def _of_size(item: Any, batch: int) -> Any:
    """Repeat or cut the samples of a tensor so that it has `batch` of them."""
    if not isinstance(item, Tensor) or not item.ndim:
        return item
    return item.repeat(-(-batch // len(item)), *[1] * (item.ndim - 1))[:batch]


def _arguments(images: Images) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Return the arguments by position and by name, and the tensors among them."""
    args = () if isinstance(images, Mapping) else tuple(images) if isinstance(images, tuple | list) else (images,)
    kwargs = dict(images) if isinstance(images, Mapping) else {}
    return args, kwargs, tensors_in((args, kwargs))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _exported(model: nn.Module, images: Images, *, free: bool = True) -> torch.export.ExportedProgram:
    """Export the network, with `free` for any batch size."""
    args, kwargs, _ = _arguments(images)
    shapes: Any = None
    if free:
        any_number = {0: torch.export.Dim.DYNAMIC}
        by_place, by_name = tree_map(
            lambda it: any_number if isinstance(it, Tensor) and it.ndim else None, (args, kwargs)
        )
        shapes = by_name or ((by_place,) if isinstance(model, _Flat) else by_place)
    with _quiet():
        # strict=False is the default from torch 2.7 on; with True, dynamo reads the code and cannot follow all of it.
        return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes, strict=False)


def onnx_session(path: Path, *, threads: int | None = None) -> Any:
    """Open an ONNX file in onnxruntime with this many threads (default: as many as torch uses)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' log messages and warnings."""
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
