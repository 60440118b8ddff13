"""Tensors of networks and of their outputs: by name, in float64, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stripe.gates.trace import Images


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def doubled(item: Any) -> Any:
    """Return a floating-point tensor in float64, anything else as it is."""
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def outputs_of(model: nn.Module, images: Images) -> list[Tensor]:
    """Run the network; return every tensor of its output."""
    if isinstance(images, Mapping):
        output = model(**images)
    else:
        output = model(*images) if isinstance(images, tuple | list) else model(images)
    return tensors_in(output)


def tensors_in(item: Any) -> list[Tensor]:
    """List the tensors of a nest of lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest value, the worst of all pairs; infinite if they do not fit."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())  # not a number if any is
