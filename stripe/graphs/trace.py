"""The graph of an ONNX network in the terms that the rules for finding and merging know: ATen's names and arguments.

Shapes are those of one run in onnxruntime, so that no rule has to guess them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from stripe.gates.graph import FACTORS, Call, Port, Value
from stripe.graphs.file import GraphFile, Tensor, captured, copied
from stripe.graphs.nodes import Builder, GraphTrace, Node, Shape
from stripe.graphs.operators import TRANSLATIONS
from stripe.messages import one_line

_SHAPE_ONLY = frozenset(
    {"Shape", "Size", "ConstantOfShape", "Range", "RandomNormalLike", "RandomUniformLike", "EyeLike"}
)
"""Operators that take a tensor's shape, not its values."""

_STATIC = {  # by operator, the positions of inputs that configure it, such as shapes and axes
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Gather": (1,), "Pad": (1, 2, 3),
    "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Resize": (1, 2, 3), "Upsample": (1,), "ReduceMean": (1,),
    "ReduceSum": (1,), "ReduceMax": (1,), "TopK": (1,), "OneHot": (1, 2),
}  # fmt: skip


def trace(file: GraphFile, inputs: Mapping[str, Tensor]) -> GraphTrace:
    """Run a network once on `inputs`, by name, and return its graph.

    Raises:
        ValueError: onnxruntime cannot run the network on these inputs.
    """
    return _Walk(file, inputs, *_probe(file, inputs)).build()


class _Walk(Builder):
    """Goes through the nodes in order and writes down what each computes."""

    def build(self) -> GraphTrace:
        self.graph.inputs = tuple(self.named(each.name, live=True) for each in self._file.inputs)
        for node in self._file.graph.node:
            self._node(node)
        self.graph.outputs = tuple(self.value(output.name) for output in self._file.graph.output)
        self._compare()
        return self.graph

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
                self.values[name] = value
                self.graph.names[value] = name
                self.graph.ports[value.memory].append(Port(call, "output", position, value))
        call.end = len(self.graph.ops)

    def _is_known(self, name: str) -> bool:
        return name in self.values or name in self._weights

    def _compare(self) -> None:
        """Note the dimensions along which live factors of equal shape have constant entries."""
        wanted: dict[str, Value] = {}
        for op in self.graph.ops:
            pair = [op.args[i] for i in FACTORS.get(op.name, ()) if i < len(op.args) and isinstance(op.args[i], Value)]
            if len(pair) == 2 and pair[0].shape == pair[1].shape and all(0 not in value.stride for value in pair):
                wanted |= {self.graph.names[v]: v for v in pair if v.live and v in self.graph.names}
        found = _evenness(self._file, self._inputs, {name: value.shape for name, value in wanted.items()})
        for name, dims in found.items():
            wanted[name].even = frozenset(dims)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


# ---- runs ----
def shapes_of(file: GraphFile, inputs: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Run the network and return the shapes of its inputs, its weights and whatever its nodes make, by name."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in file.graph.initializer}
    return weights | {name: array.shape for name, array in inputs.items()} | _probe(file, inputs)[0]


def _probe(file: GraphFile, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Shape], dict[str, Tensor]]:
    """Run the network and return every tensor's shape, and the values of the tensors that configure operators."""
    weights = {tensor.name for tensor in file.graph.initializer}
    static = {
        node.input[i]: None
        for node in file.graph.node
        for i in _STATIC.get(node.op_type, ())
        if i < len(node.input) and node.input[i] and node.input[i] not in weights
    }
    made = [name for node in file.graph.node if "Sequence" not in node.op_type for name in node.output if name]
    probe = copied(file.proto)
    del probe.graph.output[:]
    probe.graph.node.extend(helper.make_node("Shape", [name], [f"shape of {name}"]) for name in made)
    wanted = [f"shape of {name}" for name in made] + list(static)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    found = dict(zip(wanted, run(file.with_proto(probe).session(plain=True), inputs, wanted), strict=True))
    shapes = {name: tuple(found[f"shape of {name}"].tolist()) for name in made}
    return shapes, {name: found[name] for name in static}


def _evenness(file: GraphFile, inputs: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Return the dimensions along which tensors, by name, are constant in a run."""
    probe = copied(file.proto)
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
        ValueError: the session fails on these inputs.
    """
    try:
        found: list[Tensor] = session.run(outputs, dict(inputs))
    except Exception as error:  # onnxruntime's errors have no common class of their own
        given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
        raise ValueError(f"the network fails on its inputs ({given}): {one_line(error)}") from error
    return found
