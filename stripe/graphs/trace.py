"""The graph of an ONNX network in the terms that the rules of finding and merging know: ATen's names and arguments.

Shapes are those of one run in onnxruntime, so that no rule has to guess them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

from stripe.folding.fields import values_in
from stripe.gates.graph import FACTORS, Call, Op, Port, Trace, Value
from stripe.graphs.file import GraphFile, Tensor, captured
from stripe.graphs.operators import TRANSLATIONS, Node
from stripe.messages import one_line

_SHAPE_ONLY = frozenset(
    {"Shape", "Size", "ConstantOfShape", "Range", "RandomNormalLike", "RandomUniformLike", "EyeLike"}
)
"""Operators that take a tensor's shape, not its values."""

_STATIC = {  # operators and the positions of inputs that say how, not what
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Gather": (1,), "Pad": (1, 2, 3),
    "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Resize": (1, 2, 3), "Upsample": (1,), "ReduceMean": (1,),
    "ReduceSum": (1,), "ReduceMax": (1,), "TopK": (1,), "OneHot": (1, 2),
}  # fmt: skip


@dataclass(eq=False)
class GraphTrace(Trace):
    """A trace of an ONNX network, with the name of each value's tensor; what an operation has within has none."""

    names: dict[Value, str] = field(default_factory=dict)


def trace(file: GraphFile, inputs: Mapping[str, Tensor]) -> GraphTrace:
    """Run a network once on `inputs`, by name, and return its graph.

    Raises:
        ValueError: onnxruntime cannot run it on them.
    """
    return _Builder(file, inputs).build()


class _Builder:
    """Goes through the nodes in order and writes down what each computes."""

    def __init__(self, file: GraphFile, inputs: Mapping[str, Tensor]) -> None:
        self._file, self._inputs = file, inputs
        self._weights = {tensor.name: tensor for tensor in file.graph.initializer}
        self._shapes, self._static = _probe(file, inputs)
        self._values: dict[str, Value] = {}
        self._count = 0
        first = inputs[file.inputs[0].name]
        self.graph = GraphTrace(batches=(first.shape[0] if first.ndim else 1,))

    def build(self) -> GraphTrace:
        self.graph.inputs = tuple(self._named(each.name, live=True) for each in self._file.inputs)
        for node in self._file.graph.node:
            self._node(node)
        self.graph.outputs = tuple(self.value(output.name) for output in self._file.graph.output)
        self._compare()
        return self.graph

    def value(self, name: str) -> Value:
        """Return the value of a tensor; a weight's is made when it is first taken."""
        if name not in self._values:
            parameters = frozenset({name} if name in self._weights else ())
            self._named(name, live=False, parameters=parameters)
        return self._values[name]

    def static(self, name: str) -> Tensor | None:
        """Return what an input that only says how is, None where there is none."""
        if name in self._weights:
            return self._file.weight(name)
        return self._static.get(name)

    def _node(self, node: onnx.NodeProto) -> None:
        path = next((name for name in node.output if name), "")
        call = Call(path, 0, len(self.graph.ops))
        self.graph.calls.append(call)
        translate = TRANSLATIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        made: list[Value] | None = None
        if translate:
            made = translate(Node(node, self, call, self._file.opset))
        if made is None:
            taken = [self.value(name) for name in dict.fromkeys([*node.input, *captured(node)]) if self._is_known(name)]
            made = self.emit(
                call,
                _snake(node.op_type),
                taken,
                [self._shapes.get(name, ()) for name in node.output],
                live=node.op_type not in _SHAPE_ONLY,
            )
        for position, (name, value) in enumerate(zip(node.output, made, strict=False)):
            if name:
                self._values[name] = value
                self.graph.names[value] = name
                self.graph.ports[value.memory].append(Port(call, "output", position, value))
        call.end = len(self.graph.ops)

    def _is_known(self, name: str) -> bool:
        return name in self._values or name in self._weights

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
        """Append an operation and return what it makes; with `alias`, another view of that value's memory."""
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

    def _named(self, name: str, *, live: bool, parameters: frozenset[str] = frozenset()) -> Value:
        shape = self._inputs[name].shape if live else tuple(self._weights[name].dims) if name in self._weights else ()
        value = self._make(shape, live=live, parameters=parameters)
        self._values[name] = value
        self.graph.names[value] = name
        return value

    def _make(self, shape: tuple[int, ...], *, live: bool, parameters: frozenset[str]) -> Value:
        self._count += 1
        return Value(tuple(shape), contiguous(shape), 0, self._count, live, parameters)

    def _compare(self) -> None:
        """Note the dimensions along which live factors of one full shape are constant by value."""
        wanted: dict[str, Value] = {}
        for op in self.graph.ops:
            pair = [op.args[i] for i in FACTORS.get(op.name, ()) if i < len(op.args) and isinstance(op.args[i], Value)]
            if len(pair) == 2 and pair[0].shape == pair[1].shape and all(0 not in value.stride for value in pair):
                wanted |= {self.graph.names[v]: v for v in pair if v.live and v in self.graph.names}
        found = _evenness(self._file, self._inputs, {name: value.shape for name, value in wanted.items()})
        for name, dims in found.items():
            wanted[name].even = frozenset(dims)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of an array whose entries lie side by side."""
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


# ---- runs ----
def shapes_of(file: GraphFile, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Run the network and return the shapes of its inputs, its weights and whatever its nodes make, by name."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in file.graph.initializer}
    return weights | {name: array.shape for name, array in inputs.items()} | _probe(file, inputs)[0]


def _probe(file: GraphFile, inputs: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Run the network and return every tensor's shape, and the values of those that say how an operator works."""
    weights = {tensor.name for tensor in file.graph.initializer}
    static = {
        node.input[i]: None
        for node in file.graph.node
        for i in _STATIC.get(node.op_type, ())
        if i < len(node.input) and node.input[i] and node.input[i] not in weights
    }
    made = [name for node in file.graph.node if "Sequence" not in node.op_type for name in node.output if name]
    probe = onnx.ModelProto()
    probe.CopyFrom(file.proto)
    del probe.graph.output[:]
    probe.graph.node.extend(helper.make_node("Shape", [name], [f"shape of {name}"]) for name in made)
    wanted = [f"shape of {name}" for name in made] + list(static)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    found = dict(zip(wanted, run(file.with_proto(probe).session(plain=True), inputs, wanted), strict=True))
    shapes = {name: tuple(found[f"shape of {name}"].tolist()) for name in made}
    return shapes, {name: found[name] for name in static}


def _evenness(
    file: GraphFile, inputs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[int]]:
    """Return the dimensions along which tensors, by name, are constant in a run."""
    probe = onnx.ModelProto()
    probe.CopyFrom(file.proto)
    del probe.graph.output[:]
    probe.graph.initializer.append(helper.make_tensor("first entry", TensorProto.INT64, [1], [0]))
    outputs = {}
    for name, shape in shapes.items():
        nodes = [helper.make_node("Cast", [name], [f"wide {name}"], to=TensorProto.FLOAT)]
        for d in (d for d in range(1, len(shape)) if shape[d] > 1):
            parts = [f"{what} {d} of {name}" for what in ("first", "difference", "distance", "spread")]
            nodes += [
                helper.make_node("Gather", [f"wide {name}", "first entry"], parts[:1], axis=d),
                helper.make_node("Sub", [f"wide {name}", parts[0]], parts[1:2]),
                helper.make_node("Abs", parts[1:2], parts[2:3]),
                helper.make_node("ReduceMax", parts[2:3], parts[3:], keepdims=0),
            ]
            outputs[parts[3]] = name, d
        probe.graph.node.extend(nodes)
    if not outputs:
        return {name: [*range(1, len(shape))] for name, shape in shapes.items()}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    spreads = run(file.with_proto(probe).session(plain=True), inputs, list(outputs))
    even: dict[str, list[int]] = {
        name: [d for d in range(1, len(shape)) if shape[d] == 1] for name, shape in shapes.items()
    }
    for (name, d), spread in zip(outputs.values(), spreads, strict=True):
        if spread == 0:
            even[name].append(d)
    return even


def run(session: Any, inputs: Mapping[str, Tensor], outputs: list[str] | None = None) -> list[Tensor]:
    """Run a session on inputs by name.

    Raises:
        ValueError: it fails on them.
    """
    try:
        found: list[Tensor] = session.run(outputs, dict(inputs))
    except Exception as error:  # onnxruntime's errors have no common class of their own
        given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
        raise ValueError(f"the network fails on its inputs ({given}): {one_line(error)}") from error
    return found
