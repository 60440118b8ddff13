"""Numbers on a graph: its weights by name, values recomputed from others, and vectors spread over a map and back.

A field is an array in the shape of a value; it holds what every entry is multiplied by, or what is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stripe.gates.graph import ARITHMETIC, MOVES, Op, Value

Array = npt.NDArray[np.float64]
Run = Callable[[Op, Callable[[Value], Array]], list[Array]]
"""Runs an operation again, on arrays looked up in place of its values; returns its outputs."""


class Blocked(Exception):
    """There is no exact merge on this side; the message says what is in the way."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters and buffers of a network in float64, by name.

    `empty` names the parameters that a layer could have but lacks, such as the bias of a convolution without one.
    `tied` holds, by name, all the names of a tensor that has several.
    """

    tensors: Mapping[str, Array]
    empty: frozenset[str]
    run: Run
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def compute(
        self, value: Value, known: Mapping[Value, Array] | None = None, tensors: Mapping[str, Array] | None = None
    ) -> Array:
        """Recompute a value from `known` values and from `tensors`, by default the weights as they are.

        Raises:
            Blocked: it takes more than moving and arithmetic to get from these to the value.
        """
        known, tensors = known or {}, self.tensors if tensors is None else tensors
        if value in known:
            return known[value]
        op = value.producer
        if op is None and value.parameters:
            return tensors[min(value.parameters)]
        if op is None or op.live_inputs and op.name not in MOVES | ARITHMETIC:
            raise Blocked(f"{op.name if op else 'a tensor that is no parameter'} cannot be computed beforehand")
        return self.run(op, lambda v: self.compute(v, known, tensors))[op.outputs.index(value)]

    def pushed(self, op: Op, value: Value, field: Array, fill: float) -> list[Array]:
        """Move the field of `value` as `op` moves the value; the field of every other input is `fill`."""
        return self.run(op, lambda v: field if v is value else np.full(v.shape, fill))

    def pulled(self, op: Op, output: Value, field: Array, fill: float) -> dict[Value, Array]:
        """Return the fields of an operation's inputs that the operation moves to `field` at its output.

        Every entry of the inputs gets a number, and the operation is run on the numbers: the place where a number comes
        out gives the field of its entry. A second run, on the fields found in this way, checks that they do give
        `field`. Numbers in float64 are exact up to 2 ** 53 entries.

        Raises:
            Blocked: there are no such fields, or an entry that does not depend on the network's input would need one.
        """
        values = list(dict.fromkeys(values_in((op.args, op.kwargs))))
        sizes = [int(np.prod(value.shape)) for value in values]
        ends = np.cumsum(sizes)[:-1]
        parts = zip(values, np.split(np.arange(sum(sizes), dtype=np.float64), ends), strict=True)
        numbers = {value: part.reshape(value.shape) for value, part in parts}
        position = op.outputs.index(output)
        flat = np.full(sum(sizes), fill)
        flat[self.run(op, numbers.__getitem__)[position].astype(np.int64).ravel()] = field.ravel()
        fields = {v: part.reshape(v.shape) for v, part in zip(values, np.split(flat, ends), strict=True)}
        moved = self.run(op, fields.__getitem__)[position]
        if not np.array_equal(moved, field) or any((fields[v] != fill).any() for v in values if not v.live):
            raise Blocked(f"{op.name} is in between")
        return {v: fields[v] for v in values if v.live}


def values_in(item: Any) -> Iterator[Value]:
    """Yield the values among the arguments of an operation."""
    if isinstance(item, Value):
        yield item
    elif isinstance(item, dict | tuple | list):
        for part in item.values() if isinstance(item, dict) else item:
            yield from values_in(part)


def along(field: Array, dim: int) -> Array:
    """Return the vector that a field is made of, (C,) along `dim`.

    Raises:
        Blocked: the field differs along other dimensions too.
    """
    rows = np.moveaxis(field, dim, 0).reshape(field.shape[dim], -1)
    if (rows != rows[:, :1]).any():
        raise Blocked("the channels are spread over several dimensions")
    return rows[:, 0]


def spread_like(field: Array, value: Value) -> Array:
    """Reduce a field to the shape of a value that broadcasts to it, as an added parameter does.

    Raises:
        Blocked: the field differs along a dimension over which the value is broadcast.
    """
    lead = len(field.shape) - len(value.shape)
    if lead < 0:
        raise Blocked("a parameter has more dimensions than the map")
    small = field[tuple(slice(1) if d < lead or value.shape[d - lead] == 1 else slice(None) for d in range(field.ndim))]
    if not np.array_equal(np.broadcast_to(small, field.shape), field):
        raise Blocked("a parameter is the same for channels that are scaled differently")
    return small.reshape(small.shape[lead:]).copy()


def per_input(op: Op, weight: Value, vector: Array) -> Array:
    """Shape a vector over a layer's input channels to broadcast with its weight; each group has its own part."""
    if op.name != "convolution":
        return vector[:, None]
    outputs, per_group = weight.shape[:2]
    rows = vector.reshape(-1, per_group)
    rows = rows.repeat(outputs // len(rows), 0) if len(rows) > 1 else rows
    return rows.reshape(*rows.shape, *[1] * (len(weight.shape) - 2))
