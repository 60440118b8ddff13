"""ONNX operators translated into the operations that the rules know, and how NumPy runs those operations again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stripe.folding.fields import Array
from stripe.gates.graph import Op, Value
from stripe.graphs.file import FLOATS
from stripe.graphs.nodes import Node, contiguous

Translation = Callable[[Node], list[Value] | None]


# ---- layers ----
def _convolution(node: Node) -> list[Value]:
    weight, transposed = node.value(1), node.proto.op_type == "ConvTranspose"
    space = len(weight.shape) - 2
    padding = node.attribute("pads", [0] * 2 * space)
    if node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        padding = [int(any(n > 1 for n in weight.shape[2:]))] * 2 * space
    strides, dilations = (node.attribute(name, [1] * space) for name in ("strides", "dilations"))
    return node.emit(
        "convolution", node.value(0), weight, node.optional(2), strides, padding, dilations, transposed, [0] * space,
        node.attribute("group", 1),
    )  # fmt: skip


def _gemm(node: Node) -> list[Value]:
    x, weight, bias = node.value(0), node.value(1), node.optional(2)
    if node.attribute("transA", 0):
        x = node.inner("t", [x], x.shape[::-1], alias=x, strides=x.stride[::-1])
    if node.attribute("transB", 0):
        weight = node.inner("t", [weight], weight.shape[::-1], alias=weight, strides=weight.stride[::-1])
    weight = _times(node, weight, node.attribute("alpha", 1.0))
    if bias is None:
        return node.emit("mm", x, weight)
    return node.emit("addmm", _times(node, bias, node.attribute("beta", 1.0)), x, weight)


def _times(node: Node, value: Value, factor: float) -> Value:
    return value if factor == 1.0 else node.inner("mul", [value, factor], value.shape)


def _matmul(node: Node) -> list[Value]:
    x, weight = node.value(0), node.value(1)
    return node.emit("bmm" if weight.live or not x.live or len(weight.shape) != 2 else "mm", x, weight)


def _batch_norm(node: Node) -> list[Value]:
    training = bool(node.attribute("training_mode", 0))
    taken = [node.value(i) for i in range(5)]
    return node.emit("native_batch_norm", *taken, training, 0.0, node.attribute("epsilon", 1e-5))


def _layer_norm(node: Node) -> list[Value]:
    x = node.value(0)
    normalised = x.shape[node.attribute("axis", -1) :]
    return node.emit(
        "native_layer_norm", x, normalised, node.value(1), node.optional(2), node.attribute("epsilon", 1e-5)
    )


# ---- pooling ----
def _global_mean(node: Node) -> list[Value]:
    x = node.value(0)
    return node.emit("mean", x, [*range(2, len(x.shape))], True)


def _reduction(name: str) -> Translation:
    def translate(node: Node) -> list[Value]:
        x = node.value(0)
        dims = node.numbers(1, "axes")
        dims = ([] if node.attribute("noop_with_empty_axes", 0) else [*range(len(x.shape))]) if not dims else dims
        return node.emit(name, x, [d % len(x.shape) for d in dims], bool(node.attribute("keepdims", 1)))

    return translate


def _pool(kind: str) -> Translation:
    def translate(node: Node) -> list[Value]:
        x = node.value(0)
        dimensions = 3 if len(x.shape) == 5 else 2
        name = f"max_pool{dimensions}d_with_indices" if kind == "max" else f"avg_pool{dimensions}d"
        return node.emit(name, x, node.attribute("kernel_shape"))

    return translate


# ---- functions ----
def _plain(name: str) -> Translation:
    def translate(node: Node) -> list[Value]:
        return node.emit(name, *(node.value(i) for i in range(len(node.proto.input)) if node.has(i)))

    return translate


def _clip(node: Node) -> list[Value]:
    bounds = [node.static(i) if node.has(i) else node.attribute(name) for i, name in ((1, "min"), (2, "max"))]
    computed = [node.optional(i) for i in (1, 2)]
    numbers = [b if isinstance(b, float | None) else float(np.ravel(b)[0]) for b in bounds]
    return node.emit("clamp", node.value(0), *(c if n is None else n for n, c in zip(numbers, computed, strict=True)))


def _extremum(name: str, bound: str) -> Translation:
    def translate(node: Node) -> list[Value] | None:
        if len(node.proto.input) != 2:
            return None
        pair = sorted((node.value(0), node.value(1)), key=lambda value: not value.live)
        single = not pair[1].live and np.prod(pair[1].shape) == 1
        return node.emit(bound if single else name, *pair)

    return translate


def _sum(node: Node) -> list[Value] | None:
    return node.emit("add", node.value(0), node.value(1)) if len(node.proto.input) == 2 else None


# ---- moves ----
def _view(node: Node) -> list[Value]:
    x, shape = node.value(0), node.shapes[0]
    if x.stride == contiguous(x.shape):
        return node.view("view", x, shape)
    if 0 in x.stride:
        return node.emit("view", x, shape)
    kept = _restrided(x, shape)
    return node.emit("view", x, shape) if kept is None else node.view("view", x, shape, strides=kept)


def _restrided(x: Value, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides of `x` with only dimensions of size 1 added or removed; None if `shape` differs otherwise."""
    steps = [(n, s) for n, s in zip(x.shape, x.stride, strict=True) if n > 1]
    if [n for n, _ in steps] != [n for n in shape if n > 1]:
        return None
    following = iter(steps)
    return tuple(next(following)[1] if n > 1 else 1 for n in shape)


def _alias(node: Node) -> list[Value]:
    x = node.value(0)
    return node.builder.emit(node.call, "alias", [x], node.shapes[:1], alias=x, strides=x.stride)


def _cast(node: Node) -> list[Value] | None:
    return _alias(node) if node.attribute("to") in FLOATS else None


def _transpose(node: Node) -> list[Value]:
    x = node.value(0)
    order = node.attribute("perm") or [*range(len(x.shape))][::-1]
    return node.view("permute", x, list(order), strides=tuple(x.stride[d] for d in order))


def _expand(node: Node) -> list[Value]:
    x, shape = node.value(0), node.shapes[0]
    lead = len(shape) - len(x.shape)
    old = zip((1,) * lead + x.shape, (0,) * lead + x.stride, shape, strict=True)
    return node.view("expand", x, shape, strides=tuple(s if n == wide else 0 for n, s, wide in old))


def _tile(node: Node) -> list[Value] | None:
    times = node.numbers(1, "repeats")
    return None if times is None else node.emit("repeat", node.value(0), times)


def _concat(node: Node) -> list[Value]:
    parts = [node.value(i) for i in range(len(node.proto.input))]
    return node.emit("cat", parts, node.attribute("axis") % len(node.shapes[0]))


def _split(node: Node) -> list[Value]:
    x = node.value(0)
    dim = node.attribute("axis", 0) % len(x.shape)
    return node.emit("split", x, [shape[dim] for shape in node.shapes], dim)


def _slice(node: Node) -> list[Value] | None:
    x = node.value(0)
    late = node.opset >= 10
    starts, ends = (node.numbers(i if late else 99, name) for i, name in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        return None
    axes = node.numbers(3 if late else 99, "axes") or [*range(len(starts))]
    steps = node.numbers(4 if late else 99, "steps") or [1] * len(starts)
    taken = [slice(None)] * len(x.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        backwards = step < 0 and end < -x.shape[axis]
        taken[axis] = slice(start, None if backwards else end, step)
    return node.emit("slice", x, tuple(taken))


def _gather(node: Node) -> list[Value] | None:
    x, indices = node.value(0), node.static(1)
    if indices is None or not x.live:
        return None
    dim = node.attribute("axis", 0) % len(x.shape)
    return node.emit("index_select" if indices.ndim else "select", x, dim, indices)


def _pad(node: Node) -> list[Value] | None:
    x, pads = node.value(0), node.numbers(1, "pads")
    if pads is None or node.attribute("mode", "constant") != "constant" or node.has(3):
        return None
    fill = node.static(2)
    fill = node.attribute("value", 0.0) if fill is None else float(np.ravel(fill)[0])
    return node.emit("constant_pad_nd", x, pads, fill)


def _resize(node: Node) -> list[Value] | None:
    x, shape = node.value(0), node.shapes[0]
    whole = all(n and wide % n == 0 for n, wide in zip(x.shape, shape, strict=True))
    if not whole or node.attribute("mode", "nearest") != "nearest":
        return None
    return node.emit("upsample_nearest2d", x, [wide // n for n, wide in zip(x.shape, shape, strict=True)])


TRANSLATIONS: dict[str, Translation] = {
    "Conv": _convolution, "ConvTranspose": _convolution, "Gemm": _gemm, "MatMul": _matmul,
    "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm,
    "GlobalAveragePool": _global_mean, "GlobalMaxPool": _plain("adaptive_max_pool2d"), "ReduceMean": _reduction("mean"),
    "ReduceSum": _reduction("sum"), "ReduceMax": _reduction("amax"), "MaxPool": _pool("max"),
    "AveragePool": _pool("average"),
    "Relu": _plain("relu"), "LeakyRelu": _plain("leaky_relu"), "PRelu": _plain("prelu"), "Sigmoid": _plain("sigmoid"),
    "HardSigmoid": _plain("hardsigmoid"), "Softmax": _plain("_softmax"), "LogSoftmax": _plain("_log_softmax"),
    "Tanh": _plain("tanh"), "Clip": _clip, "HardSwish": _plain("hardswish"), "Add": _plain("add"), "Sub": _plain("sub"),
    "Mul": _plain("mul"), "Div": _plain("div"), "Neg": _plain("neg"), "Pow": _plain("pow"),
    "Reciprocal": _plain("reciprocal"), "Sum": _sum, "Max": _extremum("maximum", "clamp_min"),
    "Min": _extremum("minimum", "clamp_max"),
    "Reshape": _view, "Flatten": _view, "Squeeze": _view, "Unsqueeze": _view, "Identity": _alias, "Dropout": _alias,
    "Cast": _cast, "Transpose": _transpose, "Expand": _expand, "Tile": _tile, "Concat": _concat, "Split": _split,
    "Slice": _slice, "Gather": _gather, "Pad": _pad, "Resize": _resize, "Upsample": _resize,
}  # fmt: skip


# ---- running an operation again ----
def _padded(x: Array, pads: Sequence[int], fill: float) -> Array:
    half = len(pads) // 2
    return np.pad(x, [*zip(pads[:half], pads[half:], strict=True)], constant_values=fill)


def _enlarged(x: Array, times: Sequence[int]) -> Array:
    for dim, n in enumerate(times):
        x = x.repeat(n, dim)
    return x


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "pow": np.power,
    "reciprocal": np.reciprocal, "maximum": np.maximum, "minimum": np.minimum, "alias": lambda x: x, "t": np.transpose,
    "view": np.reshape, "permute": np.transpose, "expand": np.broadcast_to, "repeat": np.tile,
    "cat": lambda parts, dim: np.concatenate(parts, dim),
    "split": lambda x, sizes, dim: np.split(x, [*itertools.accumulate(sizes)][:-1], dim),
    "slice": lambda x, taken: x[taken], "select": lambda x, dim, i: np.take(x, i, dim),
    "index_select": lambda x, dim, i: np.take(x, i, dim), "constant_pad_nd": _padded, "upsample_nearest2d": _enlarged,
}  # fmt: skip


def run_again(op: Op, lookup: Callable[[Value], Array]) -> list[Array]:
    """Run an operation again in NumPy, in float64, on the arrays that `lookup` gives for its values."""
    made = _NUMPY[op.name](*(_looked_up(arg, lookup) for arg in op.args))
    return made if isinstance(made, list) else [np.asarray(made)]


def _looked_up(arg: Any, lookup: Callable[[Value], Array]) -> Any:
    if isinstance(arg, Value):
        return lookup(arg)
    if isinstance(arg, list) and any(isinstance(each, Value) for each in arg):
        return [lookup(each) for each in arg]
    return arg
