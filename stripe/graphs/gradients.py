"""Gradients in an ONNX graph: nodes that carry them from its outputs back to tensors inside, run by onnxruntime."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stripe.graphs.file import Tensor
from stripe.graphs.nodes import Shape, attribute
from stripe.graphs.windows import Window

OLDEST_OPSET = 11
"""Before this opset, numbers that the nodes below pass as inputs were attributes."""


@dataclass(eq=False)
class Backward:
    """Appends nodes that compute gradients to a graph.

    `shapes` are those of its tensors in one run, `weight` gives the entries of an initialiser by its name, and `wanted`
    are the tensors whose gradients are needed.
    """

    graph: onnx.GraphProto
    opset: int
    shapes: Mapping[str, Shape]
    weight: Callable[[str], Tensor]
    dtype: np.dtype[Any]
    wanted: Sequence[str]
    _live: set[str] = field(default_factory=set)
    _count: int = 0

    def gradients(self, seeds: Mapping[str, str]) -> dict[str, str]:
        """Return the names of the wanted tensors' gradients, given the names of those of the outputs.

        Raises:
            ValueError: the gradient of an operator on the way is not known here.
        """
        self._live = set(self.wanted)
        nodes = list(self.graph.node)
        for node in nodes:
            if self._live.intersection(node.input):
                self._live.update(node.output)
        found = defaultdict[str, list[str]](list)
        for name, seed in seeds.items():
            found[name].append(seed)
        for node in reversed(nodes):
            if not self._live.intersection(node.input) or not any(found[name] for name in node.output):
                continue
            rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is None:
                raise ValueError(f"constants cannot be learned through {node.op_type} ({node.output[0]!r})")
            outputs = [self.total(found[name]) if found[name] else "" for name in node.output]
            for position, gradient in rule(Step(self, node, outputs)):
                if self.is_live(node.input[position]):
                    found[node.input[position]].append(gradient)
        return {name: self.total(found[name]) if found[name] else self.op("Mul", name, 0.0) for name in self.wanted}

    def is_live(self, name: str) -> bool:
        """Return whether a tensor depends on a wanted one."""
        return name in self._live

    def op(self, kind: str, *inputs: str | float | Sequence[int] | Tensor, **attributes: Any) -> str:
        """Append a node; numbers, lists of integers and arrays among its inputs become constants."""
        names = [each if isinstance(each, str) else self._constant(each) for each in inputs]
        name = self._name(kind)
        self.graph.node.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def total(self, names: Sequence[str]) -> str:
        """Return the sum of some tensors of one shape."""
        return names[0] if len(names) == 1 else self.op("Sum", *names)

    def summed(self, name: str, axes: Sequence[int]) -> str:
        """Sum a tensor over some axes, which stay as dimensions of size 1."""
        if not axes:
            return name
        if self.opset < 13:
            return self.op("ReduceSum", name, axes=[*axes], keepdims=1)
        return self.op("ReduceSum", name, [*axes], keepdims=1)

    def like(self, gradient: str, shape: Shape, name: str) -> str:
        """Sum a gradient of `shape` over the axes along which the tensor `name` was broadcast to it."""
        own = self.shapes[name]
        lead = len(shape) - len(own)
        axes = [d for d, n in enumerate(shape) if d < lead or own[d - lead] == 1 < n]
        summed = self.summed(gradient, axes)
        return self.op("Reshape", summed, self.op("Shape", name)) if lead else summed

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        name = self._name("constant")
        kept = array.astype(np.int64 if array.dtype.kind == "i" else self.dtype)
        self.graph.initializer.append(numpy_helper.from_array(kept, name))
        return name

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"gradient {self._count}, {kind.lower()}"


@dataclass(frozen=True, eq=False)
class Step:
    """A node to go back through, with the gradients of its outputs: "" for an output that nothing depends on."""

    back: Backward
    node: onnx.NodeProto
    gradients: Sequence[str]

    @property
    def g(self) -> str:
        """The gradient of the node's first output."""
        return self.gradients[0]

    @property
    def x(self) -> str:
        """The node's first input."""
        return str(self.node.input[0])

    @property
    def y(self) -> str:
        """The node's first output."""
        return str(self.node.output[0])

    def shape(self, name: str) -> Shape:
        """Return a tensor's shape."""
        return self.back.shapes[name]

    def live(self) -> list[tuple[int, str]]:
        """Return position and name of the inputs that need a gradient."""
        return [(i, name) for i, name in enumerate(self.node.input) if name and self.back.is_live(name)]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return attribute(self.node, name, default)

    def op(self, kind: str, *inputs: str | float | Sequence[int] | Tensor, **attributes: Any) -> str:
        """Append a node, as `Backward.op` does."""
        return self.back.op(kind, *inputs, **attributes)

    def equal(self, a: str, b: str) -> str:
        """Append nodes that give 1 where two tensors are equal, else 0."""
        return self.op("Sub", 1.0, self.op("Sign", self.op("Abs", self.op("Sub", a, b))))

    def require(self, fits: bool, what: str) -> None:
        """Raise ValueError if an operator has a form that is not known here."""
        if not fits:
            raise ValueError(f"constants cannot be learned through {self.node.op_type} with {what} ({self.y!r})")


Gradients = Iterator[tuple[int, str]]
Rule = Callable[[Step], Gradients]


# ---- functions of one tensor ----
def _pointwise(slope: Callable[[Step], str]) -> Rule:
    """Return the rule of a function of one tensor, whose slope has the shape of its input."""

    def rule(step: Step) -> Gradients:
        step.require(all(i == 0 for i, _ in step.live()), "parameters that depend on the input")
        yield 0, step.op("Mul", step.g, slope(step))

    return rule


def _leaky(step: Step) -> str:
    below = step.node.input[1] if step.node.op_type == "PRelu" else float(step.attribute("alpha", 0.01))
    positive = step.op("Sign", step.op("Relu", step.x))
    return step.op("Add", positive, step.op("Mul", step.op("Sub", 1.0, positive), below))


def _within(step: Step, y: str) -> str:
    """Return 1 where `y`, with values in [0, 1], is at neither end, else 0."""
    return step.op("Sign", step.op("Mul", y, step.op("Sub", 1.0, y)))


def _hard_swish(step: Step) -> str:
    gate = step.op("HardSigmoid", step.x, alpha=1 / 6, beta=0.5)
    return step.op("Add", gate, step.op("Mul", step.op("Mul", step.x, 1 / 6), _within(step, gate)))


def _erf(step: Step) -> str:
    return step.op("Mul", step.op("Exp", step.op("Neg", step.op("Mul", step.x, step.x))), 2 / np.sqrt(np.pi))


def _hard_sigmoid(step: Step) -> str:
    return step.op("Mul", _within(step, step.y), float(step.attribute("alpha", 0.2)))


def _softmax(step: Step) -> Gradients:
    dims = len(step.shape(step.x))
    axis = step.attribute("axis", 1 if step.back.opset < 13 else -1) % dims
    step.require(step.back.opset >= 13 or axis == dims - 1, "several axes")
    weighted = step.op("Mul", step.g, step.y)
    yield 0, step.op("Sub", weighted, step.op("Mul", step.y, step.back.summed(weighted, [axis])))


# ---- arithmetic ----
def _sum(step: Step) -> Gradients:
    for i, name in step.live():
        yield i, step.back.like(step.g, step.shape(step.y), name)


def _difference(step: Step) -> Gradients:
    for i, name in step.live():
        yield i, step.back.like(step.op("Neg", step.g) if i else step.g, step.shape(step.y), name)


def _negated(step: Step) -> Gradients:
    yield 0, step.op("Neg", step.g)


def _product(step: Step) -> Gradients:
    for i, name in step.live():
        yield i, step.back.like(step.op("Mul", step.g, step.node.input[1 - i]), step.shape(step.y), name)


def _quotient(step: Step) -> Gradients:
    for i, name in step.live():
        over = step.op("Div", step.g, step.node.input[1])
        yield i, step.back.like(step.op("Neg", step.op("Mul", over, step.y)) if i else over, step.shape(step.y), name)


def _power(step: Step) -> Gradients:
    exponent = step.node.input[1]
    step.require(not step.back.is_live(exponent), "an exponent that depends on the input")
    slope = step.op("Mul", exponent, step.op("Pow", step.x, step.op("Sub", exponent, 1.0)))
    yield 0, step.back.like(step.op("Mul", step.g, slope), step.shape(step.y), step.x)


def _bounded(step: Step) -> Gradients:
    """Yield the gradient of Min or Max of a tensor and numbers."""
    live = step.live()
    step.require(len(live) == 1 and step.shape(live[0][1]) == step.shape(step.y), "several that depend on the input")
    [(i, name)] = live
    yield i, step.op("Mul", step.g, step.equal(step.y, name))


# ---- layers ----
def _weighted(step: Step) -> tuple[str, Shape, int]:
    """Return a layer's weight, its shape and its groups; raise ValueError if its parameters need a gradient."""
    step.require(all(i == 0 for i, _ in step.live()), "weights that depend on the input")
    weight = step.node.input[1]
    return weight, step.shape(weight), step.attribute("group", 1)


def _convolution(step: Step) -> Gradients:
    weight, shape, group = _weighted(step)
    wide, narrow = step.shape(step.x)[2:], step.shape(step.y)[2:]
    window = Window.of(step.attribute, shape[2:], wide, narrow)
    yield 0, _spread(step, step.g, weight, window, group)


def _spread(step: Step, g: str, weight: str | Tensor, window: Window, group: int) -> str:
    """Spread a gradient over the entries that each window position was computed from."""
    rest = window.rest(step.shape(step.x)[2:], step.shape(step.y)[2:])
    return step.op("ConvTranspose", g, weight, group=group, output_padding=rest, **window.attributes)


def _transposed_convolution(step: Step) -> Gradients:
    weight, shape, group = _weighted(step)
    step.require(step.attribute("auto_pad", "NOTSET") == "NOTSET" and not step.attribute("output_shape"), "auto_pad")
    window = Window.of(step.attribute, shape[2:], step.shape(step.y)[2:], step.shape(step.x)[2:])
    yield 0, step.op("Conv", step.g, weight, group=group, **window.attributes)


def _norm(step: Step) -> Gradients:
    step.require(all(i == 0 for i, _ in step.live()) and not step.attribute("training_mode", 0), "batch statistics")
    weight, variance = (step.back.weight(step.node.input[i]).astype(np.float64) for i in (1, 4))
    scale = weight / np.sqrt(variance + step.attribute("epsilon", 1e-5))
    yield 0, step.op("Mul", step.g, scale.reshape(-1, *[1] * (len(step.shape(step.x)) - 2)))


def _gemm(step: Step) -> Gradients:
    step.require(not step.attribute("transA", 0), "transA")
    for i, name in step.live():
        step.require(i != 1, "weights that depend on the input")
        if i == 0:
            alpha, turned = step.attribute("alpha", 1.0), 1 - step.attribute("transB", 0)
            yield 0, step.op("Gemm", step.g, step.node.input[1], alpha=alpha, transB=turned)
        else:
            scaled = step.op("Mul", step.g, float(step.attribute("beta", 1.0)))
            yield 2, step.back.like(scaled, step.shape(step.y), name)


def _matmul(step: Step) -> Gradients:
    shapes = [step.shape(name) for name in step.node.input]
    step.require(min(map(len, shapes)) >= 2, "vectors")

    def turned(i: int) -> str:
        order = [*range(len(shapes[i]))]
        return step.op("Transpose", step.node.input[i], perm=[*order[:-2], order[-1], order[-2]])

    for i, name in step.live():
        made = step.op("MatMul", turned(0), step.g) if i else step.op("MatMul", step.g, turned(1))
        yield i, step.back.like(made, (*step.shape(step.y)[:-2], *shapes[i][-2:]), name)


# ---- pools ----
def _mean(step: Step) -> Gradients:
    """Yield the gradient of ReduceMean, ReduceSum or GlobalAveragePool."""
    x, dims = step.shape(step.x), len(step.shape(step.x))
    axes = [*range(2, dims)]
    if step.node.op_type != "GlobalAveragePool":
        given = step.attribute("axes") if len(step.node.input) < 2 else step.back.weight(step.node.input[1]).tolist()
        axes = [d % dims for d in given or range(dims)]
    kept = [1 if d in axes else n for d, n in enumerate(x)]
    g = step.g
    if len(step.shape(step.y)) < dims:
        g = step.op("Reshape", g, [-1 if d == 0 and n != 1 else n for d, n in enumerate(kept)])
    count = 1.0 if step.node.op_type == "ReduceSum" else float(np.prod([x[d] for d in axes]))
    yield 0, step.op("Expand", step.op("Mul", g, 1 / count), step.op("Shape", step.x))


def _max_pool(step: Step) -> Gradients:
    """Give the gradient to the largest entry of each window; entries that tie each get all of it."""
    x, y = step.shape(step.x), step.shape(step.y)
    step.require(not step.attribute("ceil_mode", 0), "ceil_mode")
    window = Window.of(step.attribute, step.attribute("kernel_shape"), x[2:], y[2:])
    size = int(np.prod(window.kernel))
    each = np.tile(np.eye(size).reshape(size, 1, *window.kernel), (x[1], 1, *[1] * len(window.kernel)))
    repeated = np.ones((x[1] * size, 1, *[1] * len(window.kernel)))
    entries = step.op("Conv", step.x, each, group=x[1], **window.attributes)
    largest, g = (step.op("Conv", name, repeated, group=x[1]) for name in (step.y, step.g))
    is_largest = step.equal(entries, largest)
    yield 0, _spread(step, step.op("Mul", g, is_largest), each, window, x[1])


def _average_pool(step: Step) -> Gradients:
    x, y = step.shape(step.x), step.shape(step.y)
    window = Window.of(step.attribute, step.attribute("kernel_shape"), x[2:], y[2:])
    whole = not step.attribute("ceil_mode", 0) and (step.attribute("count_include_pad", 0) or not any(window.pads))
    step.require(bool(whole), "windows of several sizes")
    yield 0, _spread(step, step.g, np.ones((x[1], 1, *window.kernel)) / np.prod(window.kernel), window, x[1])


def _resize(step: Step) -> Gradients:
    x, y = step.shape(step.x), step.shape(step.y)
    times = [wide // n for n, wide in zip(x, y, strict=True)]
    ways = step.attribute("coordinate_transformation_mode", "half_pixel"), step.attribute("nearest_mode", "")
    repeats = (
        step.attribute("mode", "nearest") == "nearest"
        and (ways[0] in ("half_pixel", "pytorch_half_pixel") or ways == ("asymmetric", "floor"))
        and times[:2] == [1, 1]
        and all(n * t == wide for n, t, wide in zip(x, times, y, strict=True))
    )
    step.require(repeats or step.node.op_type == "Upsample", "anything but whole repeats")
    pooled = step.op("AveragePool", step.g, kernel_shape=times[2:], strides=times[2:])
    yield 0, step.op("Mul", pooled, float(np.prod(times)))


# ---- moves ----
def _reshaped(step: Step) -> Gradients:
    yield 0, step.op("Reshape", step.g, step.op("Shape", step.x))


def _passed(step: Step) -> Gradients:
    yield 0, step.g


def _transpose(step: Step) -> Gradients:
    order = step.attribute("perm") or [*range(len(step.shape(step.x)))][::-1]
    yield 0, step.op("Transpose", step.g, perm=[int(d) for d in np.argsort(order)])


def _concat(step: Step) -> Gradients:
    axis = step.attribute("axis") % len(step.shape(step.y))
    ends = np.cumsum([step.shape(name)[axis] for name in step.node.input]).tolist()
    for i, name in step.live():
        yield i, step.op("Slice", step.g, [ends[i] - step.shape(name)[axis]], [ends[i]], [axis])


def _split(step: Step) -> Gradients:
    axis = step.attribute("axis", 0) % len(step.shape(step.x))
    pairs = zip(step.gradients, step.node.output, strict=True)
    parts = [gradient or step.op("Mul", output, 0.0) for gradient, output in pairs]
    yield 0, step.op("Concat", *parts, axis=axis)


RULES: dict[str, Rule] = {
    "Relu": _pointwise(lambda step: step.op("Sign", step.y)),
    "LeakyRelu": _pointwise(_leaky), "PRelu": _pointwise(_leaky),
    "Clip": _pointwise(lambda step: step.equal(step.y, step.x)),
    "Abs": _pointwise(lambda step: step.op("Sign", step.x)), "HardSwish": _pointwise(_hard_swish),
    "HardSigmoid": _pointwise(_hard_sigmoid),
    "Sigmoid": _pointwise(lambda step: step.op("Mul", step.y, step.op("Sub", 1.0, step.y))),
    "Tanh": _pointwise(lambda step: step.op("Sub", 1.0, step.op("Mul", step.y, step.y))),
    "Exp": _pointwise(lambda step: step.y), "Log": _pointwise(lambda step: step.op("Reciprocal", step.x)),
    "Sqrt": _pointwise(lambda step: step.op("Div", 0.5, step.y)), "Erf": _pointwise(_erf),
    "Softplus": _pointwise(lambda step: step.op("Sigmoid", step.x)),
    "Reciprocal": _pointwise(lambda step: step.op("Neg", step.op("Mul", step.y, step.y))),
    "Softmax": _softmax, "Add": _sum, "Sum": _sum, "Sub": _difference, "Neg": _negated, "Mul": _product,
    "Div": _quotient, "Pow": _power, "Max": _bounded, "Min": _bounded, "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "BatchNormalization": _norm, "Gemm": _gemm, "MatMul": _matmul, "GlobalAveragePool": _mean, "ReduceMean": _mean,
    "ReduceSum": _mean, "MaxPool": _max_pool, "AveragePool": _average_pool, "Resize": _resize, "Upsample": _resize,
    "Reshape": _reshaped, "Flatten": _reshaped, "Squeeze": _reshaped, "Unsqueeze": _reshaped, "Identity": _passed,
    "Dropout": _passed, "Cast": _passed, "Transpose": _transpose, "Concat": _concat, "Split": _split,
}  # fmt: skip
"""The rules for the gradients of an operator's inputs, by operator."""
