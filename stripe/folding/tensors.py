"""Tensors of networks and of their outputs: named, in float64, and compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stripe.folding.fields import Array, Weights
from stripe.gates.graph import Op, Value
from stripe.gates.trace import Images, called, tensors_in
from stripe.torch_internals import DispatchMode, tree_leaves, tree_map, unset_parameters

_NARROW = frozenset({torch.float16, torch.bfloat16, torch.float32})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def weights_of(model: nn.Module) -> Weights:
    """Return the weights in the form in which merges are planned; integers among them become floating point."""
    named = named_tensors(model)
    arrays = {id(tensor): _array(tensor) for tensor in named.values()}
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in named.items():
        names[id(tensor)].append(name)
    empty = [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in unset_parameters(module)
    ]
    tied = {name: tuple(same) for same in names.values() if len(same) > 1 for name in same}
    return Weights({name: arrays[id(tensor)] for name, tensor in named.items()}, frozenset(empty), _run, tied)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().double().numpy()
    return array


def _run(op: Op, lookup: Callable[[Value], Array]) -> list[Array]:
    """Run an ATen operation again on arrays, in float64 and on the CPU."""

    def given(item: Any) -> Any:
        if isinstance(item, Value):
            return torch.tensor(lookup(item))
        if isinstance(item, torch.device):
            return torch.device("cpu")
        return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item

    args, kwargs = tree_map(given, (op.args, op.kwargs))
    return [np.asarray(result) for result in tree_leaves(getattr(torch.ops.aten, op.name)(*args, **kwargs))]


# ---- float64 ----
def doubled(item: Any) -> Any:
    """Return a floating-point tensor in float64, anything else as it is."""
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


@contextmanager
def in_double() -> Iterator[None]:
    """While open, forwards compute in float64 even where they ask for less, as by `.float()` or `torch.eye(3)`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(usual)


class _Doubles(DispatchMode):
    """Gives float64 where an operation names a narrower floating-point type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._wide, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _wide(self, item: Any) -> Any:
        return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item


# ---- outputs ----
def outputs_of(model: nn.Module, images: Images) -> list[Tensor]:
    """Run the network; return every tensor of its output.

    Raises:
        ValueError: no tensor is found in the output, so that nothing could be compared.
    """
    output = called(model, images)
    tensors = tensors_in(output)
    if not tensors:
        raise ValueError(
            f"no tensor is seen in the network's output, a {type(output).__name__}: expected a tensor, or tuples,"
            " lists, mappings or objects that hold some; wrap the network in a module that returns them"
        )
    return tensors


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest value, of the worst pair; infinite if their shapes differ."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    pairs = [(a * 1.0, b * 1.0) for a, b in zip(found, expected, strict=True) if a.numel()]  # * 1.0 for integers
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in pairs]
    return float(torch.stack(errors).max()) if errors else 0.0  # NaN if any error is
