"""Learned constants of ONNX files: gradients by operator against differences, and learning against torch's."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import stripe
from stripe import folding, graphs
from stripe.graphs.gradients import RULES, Backward
from tests.test_graphs import Block, C, Graph, images, squeeze_by_convolution, trained_like

RNG = np.random.default_rng(0)
MAP = (2, 4, 6, 8)


def node(kind, *weights, shape=MAP, positive=False, at=0, opset=17, outputs=1, **attributes):
    """An operator on x (shape), with its other inputs; x is its input number `at`."""
    return kind, weights, shape, positive, at, opset, outputs, attributes


def drawn(*shape):
    return RNG.normal(size=shape).astype("f")


@pytest.fixture(autouse=True)
def _same_draws_in_any_order(monkeypatch):
    """Where a maximum changes hands within a step, differences are not the gradient: which draws come is no chance."""
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(1))


def ints(*numbers):
    return np.array(numbers)


STATISTICS = drawn(4), drawn(4), drawn(4), RNG.uniform(0.5, 2, 4).astype("f")
EACH = [
    *(node(kind) for kind in ("Relu", "LeakyRelu", "HardSigmoid", "Sigmoid", "Tanh", "Exp", "Erf", "Softplus", "Abs")),
    *(node(kind) for kind in ("Neg", "HardSwish", "Identity", "Dropout", "GlobalAveragePool", "Softmax", "Flatten")),
    *(node(kind, positive=True) for kind in ("Log", "Sqrt", "Reciprocal")),
    node("PRelu", np.array([[[0.1]], [[0.3]], [[-0.5]], [[0.7]]], "f")),
    node("Clip", np.float32(-0.5), np.float32(0.7)),
    node("LeakyRelu", alpha=0.3),
    node("HardSigmoid", alpha=0.3, beta=0.4),
    node("Softmax", axis=1),
    node("Softmax", opset=12, shape=(3, 7)),
    node("Add", drawn(4, 1, 1)),
    node("Add", drawn(2, 4, 6, 8), shape=(4, 1, 1)),
    node("Sub", drawn(4, 1, 1), at=1),
    node("Sum", drawn(4, 1, 1), drawn(8)),
    node("Mul", drawn(2, 4, 6, 8), shape=(1, 4, 1, 1)),
    node("Mul", drawn(4, 1, 1), at=1),
    node("Div", drawn(4, 1, 1)),
    node("Div", drawn(4, 1, 1), at=1, positive=True),
    node("Pow", np.float32(1.5), positive=True),
    node("Max", np.float32(0.2)),
    node("Min", np.float32(0.2)),
    node("Conv", drawn(5, 4, 3, 3), drawn(5), pads=[1, 1, 1, 1]),
    node("Conv", drawn(4, 1, 3, 2), group=4, strides=[2, 2], pads=[1, 0, 1, 1]),
    node("Conv", drawn(6, 2, 3, 3), group=2, strides=[2, 3], dilations=[2, 1], pads=[2, 1, 2, 1]),
    node("Conv", drawn(5, 4, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    node("Conv", drawn(5, 4, 2, 2), auto_pad="SAME_LOWER"),
    node("Conv", drawn(5, 4, 3), shape=(2, 4, 9), strides=[2]),
    node("ConvTranspose", drawn(4, 5, 2, 2), drawn(5), strides=[2, 2]),
    node("ConvTranspose", drawn(4, 3, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0]),
    node("BatchNormalization", *STATISTICS),
    node("Gemm", drawn(5, 7), drawn(7), shape=(3, 5), alpha=0.5),
    node("Gemm", drawn(7, 5), shape=(3, 5), transB=1),
    node("MatMul", drawn(8, 3)),
    node("MatMul", drawn(3, 6), at=1),
    node("MatMul", drawn(2, 1, 8, 3)),
    node("ReduceMean", axes=[2, 3]),
    node("ReduceMean", axes=[1], keepdims=0),
    node("ReduceSum", ints(2, 3), keepdims=0),
    node("ReduceSum", opset=12, axes=[-1]),
    node("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    node("AveragePool", kernel_shape=[3, 2], strides=[2, 1]),
    node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    node(
        "Resize",
        np.zeros(0, "f"),
        np.array([1, 1, 2, 3], "f"),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    node("Resize", np.zeros(0, "f"), np.array([1, 1, 4, 2], "f")),
    node("Upsample", np.array([1, 1, 2, 2], "f"), opset=9),
    node("Reshape", ints(2, -1)),
    node("Squeeze", ints(1), shape=(2, 1, 5)),
    node("Unsqueeze", ints(0)),
    node("Transpose", perm=[2, 0, 3, 1]),
    node("Transpose"),
    node("Cast", to=TensorProto.FLOAT),
    node("Concat", drawn(2, 3, 6, 8), axis=1),
    node("Concat", drawn(2, 3, 6, 8), axis=-3, at=1),
    node("Split", ints(1, 3), axis=1, outputs=2),
]


def described(case):
    return f"{case[0]} {' '.join(f'{k}={v}' for k, v in case[-1].items())}".strip().replace("[", "").replace("]", "")


def built(case):
    """The operator alone, as a network that gives out y and the gradient of sum(seed * y) with respect to x."""
    kind, weights, shape, _, at, opset, outputs, attributes = case
    tensors = [numpy_helper.from_array(np.asarray(w), f"w{i}") for i, w in enumerate(weights)]
    names = [tensor.name if np.size(w) else "" for tensor, w in zip(tensors, weights, strict=True)]
    names.insert(at, "x")
    made = [f"y{i}" for i in range(outputs)]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "seed")]
    given[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        [helper.make_node(kind, names, made, **attributes)],
        "g",
        given,
        [helper.make_tensor_value_info(made[-1], TensorProto.FLOAT, None)],
        [tensor for tensor, w in zip(tensors, weights, strict=True) if np.size(w)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", EACH, ids=described)
def test_a_gradient_is_what_differences_of_the_output_say(case):
    shape, positive = case[2:4]
    x = RNG.uniform(0.5, 2, shape).astype("f") if positive else drawn(*shape)
    model = built(case)
    last = model.graph.output[0].name
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in model.graph.node[0].output)
    made = dict(zip(model.graph.node[0].output, session(watched).run(None, {"x": x, "seed": x}), strict=True))
    shapes = {name: each.shape for name, each in ({"x": x} | weights | made).items()}
    back = Backward(model.graph, case[5], shapes, weights.__getitem__, np.dtype("f"), ["x"])
    gradient = back.gradients({last: "seed"})["x"]
    model.graph.output.append(helper.make_tensor_value_info(gradient, TensorProto.FLOAT, None))
    running = session(model)
    seed, towards = drawn(*made[last].shape), drawn(*shape)
    y, found = running.run(None, {"x": x, "seed": seed})
    assert found.shape == x.shape
    step = 1e-3
    ends = [running.run([last], {"x": x + sign * step * towards, "seed": seed})[0].astype(float) for sign in (1, -1)]
    wanted = (seed * (ends[0] - ends[1])).sum() / (2 * step)
    scale = float(np.abs(found * towards).sum())
    assert (found * towards).sum() == pytest.approx(wanted, abs=0.01 * scale)
    assert scale > 1e-3  # the gradient is not nothing


def test_every_rule_is_tried():
    assert {case[0] for case in EACH} == RULES.keys()


def test_an_operator_without_a_rule_is_named(tmp_path):
    g = Graph()
    x = g.conv("x", C, 3, into=3)
    gated = g.add("Mul", x, squeeze_by_convolution(g, x), output="gated")
    onnx.save(g.model(g.add("CumSum", gated, g.weight(np.array(1)))), tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="cannot be learned through CumSum"):
        learned(tmp_path / "n.onnx", images(4), 1)


def learned(path, x, steps):
    gates = graphs.find_gates(path, x)
    return graphs.learn_constants(path, gates, graphs.measure_gates(path, gates, x), x, steps=steps)


# ---- learning ----
HEADS = {
    "values": [],
    "scores": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)],
    "probabilities": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Softmax(1)],
}


@pytest.mark.parametrize("head", HEADS)
def test_a_file_learns_the_constants_that_its_module_learns(tmp_path, head):
    blocks = [Block(8, nn.Sigmoid, True), Block(8, nn.Hardsigmoid, False)]
    network = trained_like(nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *HEADS[head]))
    x = images(40)
    images_ = torch.from_numpy(x)
    folding.save_onnx(network, images_[:3], tmp_path / "n.onnx")
    own = stripe.find_gates(network, images_[:3])
    loader = [(images_[:32],), (images_[32:],)]
    uses = folding.measure_gates(network, own, loader)
    wanted = folding.learn_constants(network, own, uses, images_[:3], loader, steps=5)
    found = learned(tmp_path / "n.onnx", x, 5)
    for a, b, use in zip(wanted.values(), found.values(), uses.values(), strict=True):
        unit = np.abs(a - np.stack([use.constant("energy"), 0 * use.energy])).max(1, keepdims=True)
        assert unit.min() > 1e-3  # both scale and shift moved
        np.testing.assert_allclose(b / unit, a / unit, atol=0.02)


def test_learned_constants_fold_exactly_and_nearer_than_energy_on_samples_that_they_have_not_seen(tmp_path):
    g = Graph()
    x = g.add("HardSwish", g.norm(g.conv("x", C, 3, into=3, bias=False)))
    x = g.conv(g.add("Mul", x, squeeze_by_convolution(g, x), output="first"), C)
    x = g.add("Relu", g.add("Add", x, g.add("Mul", x, squeeze_by_convolution(g, x), output="second")))
    onnx.save(g.model(g.add("Softmax", g.add("Flatten", g.add("GlobalAveragePool", x)))), tmp_path / "n.onnx")
    loud = np.random.default_rng(0).uniform(0.2, 4, (200, 1, 1, 1)).astype("f")
    x, new = images(200) * loud, images(100, seed=1) * loud[:100]
    constants = learned(tmp_path / "n.onnx", x, 60)
    report = graphs.fold(tmp_path / "n.onnx", constants, tmp_path / "learned.onnx", new)
    assert set(report.table["direction"]) == {"back", "forward"}
    assert report.error < 1e-5
    uses = graphs.measure_gates(tmp_path / "n.onnx", graphs.find_gates(tmp_path / "n.onnx", x), x)
    energy = {name: use.constant("energy") for name, use in uses.items()}
    graphs.fold(tmp_path / "n.onnx", energy, tmp_path / "energy.onnx", new)
    near, far = (graphs.cost(tmp_path / "n.onnx", tmp_path / f"{name}.onnx", new) for name in ("learned", "energy"))
    assert near.divergence < 0.8 * far.divergence


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    g = Graph(opset=10)
    x = g.conv("x", C, 3, into=3)
    onnx.save(g.model(g.add("Mul", x, squeeze_by_convolution(g, x), output="gated")), tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="has opset 10; constants can be learned from opset 11 on"):
        learned(tmp_path / "n.onnx", images(4), 1)
    half = onnx.load(tmp_path / "n.onnx")
    half.opset_import[0].version = 17
    first = half.graph.initializer[0]
    half.graph.node.insert(0, helper.make_node("Cast", ["half"], [first.name], to=TensorProto.FLOAT))
    halved = numpy_helper.from_array(numpy_helper.to_array(first).astype(np.float16), "half")
    half.graph.initializer.remove(first)
    half.graph.initializer.append(halved)
    onnx.save(half, tmp_path / "half.onnx")
    with pytest.raises(ValueError, match="not in float32"):
        learned(tmp_path / "half.onnx", images(4), 1)
