"""Learned constants of an ONNX network: its gates become inputs, and gradients come from the graph itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from stripe.folding.learning import RATE, Learner
from stripe.folding.maps import placed, placed_map
from stripe.folding.uses import Array, GateUse
from stripe.gate import Gate
from stripe.graphs.comparing import TINY, are_probabilities, divergences, probabilities
from stripe.graphs.file import FLOATS, GraphFile, Tensor, copied, prune, replace_node
from stripe.graphs.gradients import OLDEST_OPSET, Backward
from stripe.graphs.inputs import Batch, Inputs, first_of
from stripe.graphs.nodes import Shape
from stripe.graphs.recording import SEARCHED, Path, opened, operands, samples_of
from stripe.graphs.trace import run, shapes_of
from stripe.messages import Progress
from stripe.recipe import LEARNING_STEPS


def learn_constants(
    path: Path | GraphFile,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    inputs: Inputs | Iterable[Batch],
    *,
    steps: int = LEARNING_STEPS,
    rate: float = RATE,
    progress: Progress = iter,
) -> dict[str, Array]:
    """Learn a scale and a shift per channel for gates that become constant together; return (2, C) by gate, for `fold`.

    They start at the "energy" constants without a shift, and minimise the divergence from the network's own outputs,
    without any labels: the KL divergence of class probabilities where the network has one output (N, classes), else the
    squared error over the squared value, averaged over the outputs. onnxruntime computes the gradients, in nodes that
    are added to a copy of the network.

    Args:
        path: the ONNX file, whose weights are float32 or float64.
        gates: the gates that will be folded; the others stay as they are.
        uses: what these gates did, as `measure_gates` returns it.
        inputs: arrays of all samples, or batches, repeated as often as the steps need.
        steps: number of steps, one batch each.
        rate: the first learning rate, in units of a gate's root mean square constant for scales and of the size of what
            a channel gives for shifts.
        progress: wraps the steps.

    Raises:
        ValueError: the gradient of an operator after a gate is not known, not all weights are float32 or all float64,
            the opset is too old, no output is floating-point, or there are no samples.
        FloatingPointError: the divergence is no longer finite.
    """
    file = opened(path)
    samples = samples_of(file, inputs)
    samples = list(samples) if isinstance(samples, Iterator) else samples
    free = _Free.of(file, gates, first_of(file, samples, SEARCHED))
    learner = Learner(gates, uses, steps, rate)
    original, session = file.session(), free.file.session()
    for step, batch in zip(progress(range(steps)), _endless(samples), strict=False):
        wanted = run(original, batch.inputs, free.outputs)
        loss, gradients = free.gradients(session, batch, wanted, learner.now())
        if not np.isfinite(loss):
            raise FloatingPointError(f"the divergence is {loss} in step {step} of learning: lower its rate")
        learner.step(gradients)
    return learner.now()


def _endless(samples: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from samples


@dataclass(frozen=True, eq=False)
class _Free:
    """A network whose gates are inputs (scale and shift), and which gives out gradients besides its own outputs."""

    file: GraphFile
    gates: Sequence[Gate]
    outputs: list[str]
    shapes: Mapping[str, Shape]  # of every gate's product
    kind: np.dtype[Any]
    given: Literal["scores", "probabilities", "values"]

    @classmethod
    def of(cls, file: GraphFile, gates: Sequence[Gate], inputs: Mapping[str, Tensor]) -> _Free:
        """Build the network; `inputs` are a few samples."""
        kind, outputs, shapes = _kind(file), _floats(file), shapes_of(file, inputs)
        products = {gate.name: shapes[operands(file, gate)[0].output[0]] for gate in gates}
        given: Literal["scores", "probabilities", "values"] = "values"
        if len(outputs) == 1 and len(shapes[outputs[0]]) == 2 and shapes[outputs[0]][1] > 1:
            given = "probabilities" if are_probabilities(run(file.session(), inputs, outputs)[0]) else "scores"
        proto = copied(file.proto)
        for gate in gates:
            shapes |= _freed(proto.graph, file, gate, products[gate.name], kind)
        free = cls(file.with_proto(proto), gates, outputs, products, kind, given)
        free._add_gradients(shapes)
        return free

    def _add_gradients(self, shapes: Mapping[str, Shape]) -> None:
        graph = self.file.graph
        variables = [name for gate in self.gates for name in _variables(gate)]
        back = Backward(graph, self.file.opset, shapes, self.file.weight, self.kind, variables)
        for name in (given for output in self.outputs for given in _targets(output)):
            graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.kind), None))
        gradients = back.gradients(dict(self._seed(back, output) for output in self.outputs))
        del graph.output[:]
        wanted = [*self.outputs, *(gradients[name] for name in variables)]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        prune(graph)

    def _seed(self, back: Backward, output: str) -> tuple[str, str]:
        """Return an output, and the name of the divergence's gradient with respect to it."""
        wanted, weight = _targets(output)
        if self.given == "probabilities":
            compared = back.op("Neg", back.op("Div", wanted, back.op("Max", output, TINY)))
        else:
            scores = back.op("Softmax", output, axis=1) if self.given == "scores" else output
            compared = back.op("Sub", scores, wanted)
        return output, back.op("Mul", compared, weight)

    def gradients(
        self, session: Any, batch: Batch, wanted: Sequence[Tensor], constants: Mapping[str, Array]
    ) -> tuple[float, dict[str, Array]]:
        """Return the divergence of a batch's outputs from the wanted ones, and its gradients (2, C) by gate."""
        targets = [np.asarray(each, np.float64) for each in wanted]
        classes = self.given != "values"
        if classes:
            targets = [probabilities(each) for each in targets]
        squares = [max(float((each**2).sum()), 1e-30) for each in targets]
        feed: dict[str, Any] = {}
        for output, target, square in zip(self.outputs, targets, squares, strict=True):
            weight = 1 / len(target) if classes else 2 / (square * len(targets))
            feed |= dict(zip(_targets(output), (target, weight), strict=True))
        for gate in self.gates:
            pair = np.asarray(constants[gate.name], np.float64)
            feed |= zip(_variables(gate), placed_map(gate, pair, self.shapes[gate.name]), strict=True)
        given = {each.name for each in session.get_inputs()}
        feed = {name: np.asarray(value, self.kind) for name, value in feed.items() if name in given}
        found = run(session, {name: a for name, a in batch.inputs.items() if name in given} | feed)
        outputs = [np.asarray(each, np.float64) for each in found[: len(targets)]]
        if classes:
            loss = float(divergences(targets[0], outputs[0]).mean())
        else:
            pairs = zip(outputs, targets, squares, strict=True)
            loss = float(np.mean([((a - b) ** 2).sum() / square for a, b, square in pairs]))
        rest = iter(found[len(targets) :])
        return loss, {gate.name: _rows(gate, next(rest), next(rest)) for gate in self.gates}


def _kind(file: GraphFile) -> np.dtype[Any]:
    """Return the type of the weights."""
    if file.opset < OLDEST_OPSET:
        raise ValueError(
            f"'{file.path}' has opset {file.opset}; constants can be learned from opset {OLDEST_OPSET} on: convert it"
            " with onnx.version_converter.convert_version"
        )
    kinds = {tensor.data_type for tensor in file.graph.initializer} & FLOATS
    if len(kinds) != 1 or kinds - {TensorProto.FLOAT, TensorProto.DOUBLE}:
        raise ValueError(
            f"'{file.path}' is not in float32 (or float64) throughout: learn the constants from the file before its"
            " conversion, and use them to fold this one"
        )
    return np.dtype(helper.tensor_dtype_to_np_dtype(kinds.pop()))


def _floats(file: GraphFile) -> list[str]:
    kinds = (TensorProto.FLOAT, TensorProto.DOUBLE)
    outputs = [each.name for each in file.graph.output if each.type.tensor_type.elem_type in kinds]
    if not outputs:
        raise ValueError(f"'{file.path}' has no floating-point output from which constants could be learned")
    return outputs


def _variables(gate: Gate) -> tuple[str, str]:
    return f"{gate.name}, scale", f"{gate.name}, shift"


def _targets(output: str) -> tuple[str, str]:
    """Return the names of two inputs: what an output should be, and the weight of its difference from that."""
    return f"{output}, wanted", f"{output}, weight"


def _freed(graph: onnx.GraphProto, file: GraphFile, gate: Gate, shape: Shape, kind: np.dtype[Any]) -> dict[str, Shape]:
    """Replace a gate's product with a product and a sum with two inputs; return the shapes of the new tensors."""
    node, _, scaled = operands(file, gate)
    (scale, shift), between = _variables(gate), f"{gate.name}, scaled"
    product = helper.make_node("Mul", [scaled, scale], [between], name=between)
    replace_node(graph, node.output[0], [product, helper.make_node("Add", [between, shift], [node.output[0]])])
    small = placed(gate, np.zeros(gate.channels), shape).shape
    for name in (scale, shift):
        graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), small))
    return {scale: small, shift: small, between: shape}


def _rows(gate: Gate, scale: Tensor, shift: Tensor) -> Array:
    """Return the gradients (2, C) of a gate's constant and shift, from those of its scale and shift inputs."""
    fields = (shift, np.zeros_like(shift)) if gate.form == "additive" else (scale, shift)
    r, c = gate.layout.find("R"), gate.layout.find("C")
    return np.stack([(f.reshape(f.shape[c], f.shape[r]).T if r > c else f).ravel() for f in fields]).astype(np.float64)
