"""fold for an ONNX file: put constants in place of gates, merge them into weights, check the result and write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from stripe.folding.fields import Array, Weights
from stripe.folding.maps import AffineMap, Constants, placed, require_fitting
from stripe.folding.merging import Merge, Network
from stripe.folding.report import FoldReport, report_of
from stripe.gate import Gate, name_of
from stripe.gates.rules import candidates_of
from stripe.graphs.checking import Reference
from stripe.graphs.file import FLOATS, GraphFile, Tensor, captured, copied, prune, referenced, rename, replace_node
from stripe.graphs.inputs import Batch, Inputs, first_of
from stripe.graphs.nodes import GraphTrace
from stripe.graphs.operators import run_again
from stripe.graphs.recording import SEARCHED, Path, opened, operands, samples_of
from stripe.graphs.trace import trace
from stripe.graphs.writing import save

TOLERANCES: dict[int, float] = {
    TensorProto.DOUBLE: 1e-10,
    TensorProto.FLOAT: 1e-4,
    TensorProto.FLOAT16: 3e-2,
    TensorProto.BFLOAT16: 0.2,
}
"""Largest relative error between a folded file and the network with constant gates, by the type of most weights."""


def fold(
    path: Path | GraphFile,
    constants: Mapping[Any, Array],
    folded_path: Path,
    inputs: Inputs | Iterable[Batch],
    *,
    normalisers: Sequence[str] = (),
) -> FoldReport:
    """Write an ONNX file in which the vectors of `constants` replace gates, merged into weights where that is exact.

    The keys of `constants` are gates or their names; a vector is (C,), or (2, C) with a shift that is added to what the
    gate gives, as `learn_constants` returns it. All samples of `inputs` are run through the folded file and through the
    network with constant gates; the report's `error` is their largest difference over the largest output. Weights keep
    their types, and opset, metadata and inputs stay as they were. A gate without an exact merge becomes a product with
    its constant.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no gates, an unknown gate, a vector that does not fit or is not finite, a file that is quantised,
            cannot be run or is not valid ONNX, or a network that gives different outputs in two runs.
        ArithmeticError: the folded file differs even after inexact merges were given up, or is not valid ONNX.

    Example:
        >>> gates = stripe.graphs.find_gates("model.onnx", images)  # doctest: +SKIP
        >>> uses = stripe.graphs.measure_gates("model.onnx", gates, images)  # doctest: +SKIP
        >>> vectors = {name: use.constant("mean") for name, use in uses.items()}  # doctest: +SKIP
        >>> report = stripe.graphs.fold("model.onnx", vectors, "folded.onnx", images)  # doctest: +SKIP
    """
    file = opened(path)
    samples = samples_of(file, inputs)
    samples = list(samples) if isinstance(samples, Iterator) else samples
    graph = trace(file, first_of(file, samples, SEARCHED))
    found = [candidate.gate for candidate in candidates_of(graph, normalisers) if candidate.gate]
    vectors = _checked(file, found, constants)
    gates = [gate for gate in found if gate.name in vectors]
    weights = _weights(file, graph)
    constant = Constants(graph, gates, vectors)
    network = Network(graph, weights, constant.needed, constant.scaling, is_final=True)
    original = _Original(file, graph, gates, vectors, samples)
    folded, merges, error = original.merged(network.plan(list(constant.maps(weights))))
    save(folded, folded_path)
    return report_of(merges, gates, error)


def _checked(file: GraphFile, gates: Sequence[Gate], constants: Mapping[Any, Array]) -> dict[str, Array]:
    """Return the constants in float64, by the names of their gates."""
    if not gates:
        raise ValueError(f"'{file.path}' has no gates to fold: see stripe.graphs.explain_gates for what was looked at")
    vectors = {name_of(gate): np.asarray(vector, np.float64) for gate, vector in constants.items()}
    require_fitting(gates, vectors, mixing=False)
    return vectors


# ---- weights ----
class _Doubles(Mapping[str, Array]):
    """The weights of a file in float64, each read when needed; the last two are kept."""

    def __init__(self, file: GraphFile) -> None:
        self._names = [tensor.name for tensor in file.graph.initializer]
        self._read = lru_cache(maxsize=2)(lambda name: np.asarray(file.weight(name), np.float64))

    def __getitem__(self, name: str) -> Array:
        found: Array = self._read(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
"""Operators that can take a bias, and its position among their inputs."""


def _weights(file: GraphFile, graph: GraphTrace) -> Weights:
    paths = [
        node.output[0]
        for node in file.graph.node
        if node.op_type in _BIASED and not any(node.input[_BIASED[node.op_type] :])
    ]
    return Weights(_Doubles(file), frozenset(f"{path}.bias" for path in paths), run_again)


# ---- building ----
@dataclass(eq=False)
class _Original:
    """A network with its graph; merges are made in copies of it, which are compared with it."""

    file: GraphFile
    graph: GraphTrace
    gates: Sequence[Gate]
    vectors: Mapping[str, Array]
    samples: Iterable[Batch]

    def merged(self, merges: list[Merge]) -> tuple[GraphFile, list[Merge], float]:
        """Return the network with all exact merges made, the merges as they were made, and its relative error."""
        reference = Reference(self._at_constants(), self.samples, TOLERANCES[self._usual])
        built = self._built(merges)
        error = reference.error(built)
        if not error <= reference.tolerance:
            kept = [merge.keep(merge.reason or "its neighbours' merges are not exact") for merge in merges]
            for i, merge in enumerate(merges):
                tried = self._built([*kept[:i], merge, *kept[i + 1 :]])
                alone = reference.error(tried, batches=1) if merge.edits else 0.0
                if not alone <= reference.tolerance:
                    merges[i] = merge.keep(f"{merge.direction} is not exact: relative error {alone:.2g}")
            built = self._built(merges)
            error = reference.error(built)
        if not error <= reference.tolerance:
            raise ArithmeticError(
                f"the folded network differs by {error:.2g}; expected at most {reference.tolerance:.0e}"
            )
        return built, merges, error

    def _at_constants(self) -> GraphFile:
        """Return the network with constants in place of its gates, and nothing else changed."""
        proto = copied(self.file.proto)
        added = {}
        for gate in self.gates:
            node, attention, _ = operands(self.file, gate)
            made, name = node.output[0], f"{gate.name}.constant"
            shape = next(value.shape for value, tensor in self.graph.names.items() if tensor == made)
            scale, *shift = np.atleast_2d(self.vectors[gate.name])
            added[name] = placed(gate, scale, shape).astype(self._type_of(attention))
            product = next(each for each in proto.graph.node if made in each.output)
            rename([product], attention, name)
            if shift:
                added[f"{name}.shift"] = placed(gate, shift[0], shape).astype(self._type_of(made))
                scaled = copied(product)
                scaled.output[0] = f"{made}.unshifted"
                sum_ = helper.make_node("Add", [scaled.output[0], f"{name}.shift"], [made])
                replace_node(proto.graph, made, [scaled, sum_])
        prune(proto.graph)
        return self.file.with_proto(proto, added)

    def _type_of(self, tensor: str) -> np.dtype[Any]:
        """Return the floating-point type of a tensor, by default that of most weights."""
        kind = self._types.get(tensor, self._usual)
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind if kind in FLOATS else self._usual))

    @cached_property
    def _types(self) -> dict[str, int]:
        try:
            inferred = onnx.shape_inference.infer_shapes(self.file.proto).graph
        except onnx.shape_inference.InferenceError:
            inferred = self.file.graph
        infos = [*inferred.value_info, *inferred.input, *inferred.output]
        return {info.name: info.type.tensor_type.elem_type for info in infos}

    @cached_property
    def _usual(self) -> int:
        kinds = [tensor.data_type for tensor in self.file.graph.initializer if tensor.data_type in FLOATS]
        return max(set(kinds), key=kinds.count, default=int(TensorProto.FLOAT))

    def _built(self, merges: Sequence[Merge]) -> GraphFile:
        """Return the network after `merges`: weights changed, and maps taken out or kept as constants."""
        proto = copied(self.file.proto)
        changed: dict[str, Tensor] = {}
        for merge in merges:
            for edit in merge.edits:
                if edit.new and edit.name not in changed:
                    node = next(each for each in proto.graph.node if edit.path in each.output)
                    kind = self._type_of(node.output[0])
                    changed[edit.name] = np.zeros(edit.factor.shape, kind)
                    node.input.extend([""] * (_BIASED[node.op_type] - len(node.input)))
                    del node.input[_BIASED[node.op_type] :]
                    node.input.append(edit.name)
                before = changed[edit.name] if edit.name in changed else self.file.weight(edit.name)
                changed[edit.name] = edit.applied(before.astype(np.float64)).astype(before.dtype)
        stands_for: dict[str, str] = {}
        for merge in (merge for merge in merges if merge.direction != "unused"):
            x, y = self.graph.names[merge.map.x], self.graph.names[merge.map.y]
            x = stands_for.get(x, x)
            if merge.direction == "kept":
                changed |= self._scaled(proto.graph, merge.map, x, y)
            else:
                _take_out(proto.graph, x, y)
                stands_for[y] = x
        prune(proto.graph)
        used = referenced(proto.graph)
        return self.file.with_proto(proto, {name: array for name, array in changed.items() if name in used})

    def _scaled(self, graph: onnx.GraphProto, map: AffineMap, x: str, y: str) -> dict[str, Tensor]:
        """Replace the node that made `y` with a product and a sum with constants; return the constants by name."""
        kind = self._type_of(x)
        fields = [("Mul", map.scale, 1.0), ("Add", map.shift, 0.0)]
        steps = [(op, field) for op, field, nothing in fields if (field != nothing).any()] or [("Mul", map.scale)]
        nodes, constants, taken = [], {}, x
        for i, (op, field) in enumerate(steps):
            made = y if i == len(steps) - 1 else f"{y}.scaled"
            constants[f"{y}.{op.lower()}"] = field.astype(kind)
            nodes.append(helper.make_node(op, [taken, f"{y}.{op.lower()}"], [made], name=made))
            taken = made
        replace_node(graph, y, nodes)
        return constants


def _take_out(graph: onnx.GraphProto, x: str, y: str) -> None:
    """Make whatever takes `y` take `x`; where the name `y` is still needed, make `y` a copy of `x`."""
    needed = any(output.name == y for output in graph.output) or any(y in captured(node) for node in graph.node)
    replace_node(graph, y, [helper.make_node("Identity", [x], [y], name=y)] if needed else [])
    rename((node for node in graph.node if y not in node.output), y, x)
