"""A node of an ONNX graph that is being translated, and the trace that its operations are appended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from stripe.folding.fields import values_in
from stripe.gates.graph import Call, Op, Trace, Value
from stripe.graphs.file import GraphFile, Tensor

Shape = tuple[int, ...]


@dataclass(eq=False)
class GraphTrace(Trace):
    """A trace of an ONNX network, with the name of each value's tensor; values inside a node have no name."""

    names: dict[Value, str] = field(default_factory=dict)


class Builder:
    """Appends operations to a trace, whose shapes are those of one run."""

    def __init__(
        self, file: GraphFile, inputs: Mapping[str, Tensor], shapes: Mapping[str, Shape], static: Mapping[str, Tensor]
    ) -> None:
        """Start an empty trace of a network on `inputs`; `static` holds tensors that configure operators."""
        self._file, self._inputs, self._shapes, self._static = file, inputs, shapes, static
        self._weights = {tensor.name: tensor for tensor in file.graph.initializer}
        self.values: dict[str, Value] = {}
        self._count = 0
        first = inputs[file.inputs[0].name]
        self.graph = GraphTrace(batches=(first.shape[0] if first.ndim else 1,))

    def value(self, name: str) -> Value:
        """Return the value of a tensor; that of a weight is made on first use."""
        if name not in self.values:
            parameters = frozenset({name} if name in self._weights else ())
            self.named(name, live=False, parameters=parameters)
        return self.values[name]

    def static(self, name: str) -> Tensor | None:
        """Return the entries of an input that only says how an operator works, None where they are not known."""
        if name in self._weights:
            return self._file.weight(name)
        return self._static.get(name)

    def emit(
        self,
        call: Call,
        name: str,
        args: Any,
        shapes: list[tuple[int, ...]],
        *,
        live: bool = True,
        alias: Value | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> list[Value]:
        """Append an operation and return its outputs; with `alias`, they are views of that value's memory."""
        args = tuple(args)
        inputs = tuple(dict.fromkeys(values_in(args)))
        op = Op(len(self.graph.ops), name, call, inputs, args, {})
        self.graph.ops.append(op)
        for value in inputs:
            value.consumers.append(op)
        live = live and bool(op.live_inputs)
        parameters = frozenset[str]() if live else op.parameters
        outputs = []
        for shape in shapes:
            made = self._make(shape, live=live, parameters=parameters)
            made.producer = op
            if alias is not None:
                made.memory, made.offset = alias.memory, alias.offset
                made.stride = made.stride if strides is None else strides
            outputs.append(made)
        op.outputs = tuple(outputs)
        return outputs

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the run."""
        return self._shapes[name]

    def named(self, name: str, *, live: bool, parameters: frozenset[str] = frozenset()) -> Value:
        """Make the value of an input, a weight, or a tensor that no node makes."""
        shape = self._inputs[name].shape if live else tuple(self._weights[name].dims) if name in self._weights else ()
        value = self._make(shape, live=live, parameters=parameters)
        self.values[name] = value
        self.graph.names[value] = name
        return value

    def _make(self, shape: tuple[int, ...], *, live: bool, parameters: frozenset[str]) -> Value:
        self._count += 1
        return Value(tuple(shape), contiguous(shape), 0, self._count, live, parameters)


@dataclass(frozen=True, eq=False)
class Node:
    """A node that is being translated."""

    proto: onnx.NodeProto
    builder: Builder
    call: Call
    opset: int

    def has(self, position: int) -> bool:
        """Return whether the node has this input."""
        return position < len(self.proto.input) and bool(self.proto.input[position])

    def value(self, position: int) -> Value:
        """Return an input's value."""
        return self.builder.value(self.proto.input[position])

    def optional(self, position: int) -> Value | None:
        """Return an input's value, None where there is no such input."""
        return self.value(position) if self.has(position) else None

    def static(self, position: int) -> Any:
        """Return the entries of an input that only says how the operator works; None where it is missing or unknown."""
        return self.builder.static(self.proto.input[position]) if self.has(position) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return attribute(self.proto, name, default)

    def numbers(self, position: int, name: str) -> list[int] | None:
        """Return integers that later versions of an operator take as an input, and earlier ones as an attribute."""
        given = self.static(position)
        given = self.attribute(name) if given is None else given.tolist()
        return None if given is None else [int(each) for each in np.atleast_1d(given)]

    @property
    def shapes(self) -> list[Shape]:
        """Shapes of the node's outputs."""
        return [self.builder.shape(name) if name else () for name in self.proto.output]

    def emit(self, name: str, *args: Any) -> list[Value]:
        """Append the operation that makes the node's outputs."""
        return self.builder.emit(self.call, name, args, self.shapes)

    def inner(self, name: str, args: Sequence[Any], shape: Shape, **how: Any) -> Value:
        """Append an operation that prepares an argument of the one in `emit` or `view`."""
        return self.builder.emit(self.call, name, args, [shape], **how)[0]

    def view(self, name: str, *args: Any, strides: Shape | None = None) -> list[Value]:
        """Append the operation whose outputs, those of the node, are views of its first argument's memory."""
        return self.builder.emit(self.call, name, args, self.shapes, alias=args[0], strides=strides)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute of a node."""
    found = next((each for each in node.attribute if each.name == name), None)
    value = default if found is None else helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of an array whose entries lie side by side."""
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))
