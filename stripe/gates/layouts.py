"""Conversion of a network's tensors to rows, which hold one value per sample and channel, and back.

A gate's layout names the dimensions of its product. Rows are (N, C): for radix gates and groups, C counts the channels
of all maps, one map after the other.
"""

from __future__ import annotations

from torch import Tensor

from stripe.gate import Gate


def flat(gate: Gate, tensor: Tensor) -> Tensor:
    """Return the rows of a module's tensor that holds nothing else."""
    return tensor.flatten(1)


def first_entries(gate: Gate, operand: Tensor) -> Tensor:
    """Return the rows of the gate's operand: its first entry along every dimension of space."""
    return _rows(gate, operand[tuple(slice(None) if d in "NRGC" else 0 for d in gate.layout)])


def average(gate: Gate, scaled: Tensor) -> Tensor:
    """Return the rows of a feature map averaged over space; radix and channels may be one dimension already."""
    if scaled.ndim < len(gate.layout):
        return scaled.flatten(2).mean(2)
    return _rows(gate, scaled.mean([d for d, letter in enumerate(gate.layout) if letter not in "NRGC"]))


def mean_square(gate: Gate, scaled: Tensor) -> Tensor:
    """Return the rows of a feature map's squares averaged over space."""
    return average(gate, scaled.square())


def _rows(gate: Gate, picked: Tensor) -> Tensor:
    """Merge radix (or groups) and channels in this order, even where the layout has them the other way round."""
    return (picked.transpose(1, 2) if gate.layout.find("R") > gate.layout.find("C") else picked).flatten(1)


def positions(gate: Gate, scaled: Tensor) -> Tensor:
    """Return the feature map as (N, C, *space), with its channels in the order of rows."""
    if scaled.ndim < len(gate.layout):
        return scaled
    channels = [d for d, letter in enumerate(gate.layout) if letter in "RG"] + [gate.layout.index("C")]
    space = [d for d, letter in enumerate(gate.layout) if letter not in "NRGC"]
    return scaled.permute(0, *channels, *space).flatten(1, len(channels))


def mixed(matrix: Tensor, scaled: Tensor) -> Tensor:
    """Return a feature map (N, C, *space) with its channels multiplied by a matrix (C, C)."""
    return (matrix.to(scaled) @ scaled.flatten(2)).reshape(scaled.shape)


def like_output(gate: Gate, values: Tensor, output: Tensor) -> Tensor:
    """Return values in the shape of the module output that they replace."""
    return _samples(gate, values, output).reshape(output.shape)


def like_operand(gate: Gate, values: Tensor, operand: Tensor) -> Tensor:
    """Return values in the shape of the gate's operand, broadcast over space."""
    return like_position(gate, values, operand).expand(operand.shape)


def like_position(gate: Gate, values: Tensor, operand: Tensor) -> Tensor:
    """Return values in the shape of one position of the gate's operand, or of what it scales."""
    if operand.ndim < len(gate.layout):
        return _samples(gate, values, operand).reshape(len(operand), -1, *[1] * (operand.ndim - 2))
    picked = operand[tuple(slice(None) if d in "NRGC" else slice(1) for d in gate.layout)]
    rows = _samples(gate, values, operand)
    if gate.layout.find("R") > gate.layout.find("C"):
        c, r = gate.layout.index("C"), gate.layout.index("R")
        rows = rows.unflatten(1, (operand.shape[r], operand.shape[c])).transpose(1, 2)
    return rows.reshape(picked.shape)


def _samples(gate: Gate, values: Tensor, like: Tensor) -> Tensor:
    if values.ndim == 2 and len(values) != len(like):
        raise ValueError(f"values of gate {gate.name!r} are of {len(values)} samples; the batch has {len(like)}")
    dtype = like.dtype if like.is_floating_point() else values.dtype  # a boolean mask is replaced by numbers
    return values.to(like.device, dtype).expand(len(like), gate.channels)
