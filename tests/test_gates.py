"""Gates of real and handwritten networks: found by what is computed, read and replaced without trace."""

import copy
import dataclasses
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.distributed
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_in_torch_dispatch_mode

from stripe.folding import fold
from stripe.gate import Gate, Product, Tap
from stripe.gates import explain_gates, find_gates, isolate, read_gates, replace_gates
from stripe.gates.trace import trace
from stripe.models import create_model
from stripe.recorder import Recorder
from stripe.store import open_run
from tests.conftest import randomize, relative_error

# name, gates, form, layout, the module in a gate's site whose output is the gate; torchvision's begin with "tv:"
NETWORKS = [
    ("seresnet18", 8, "multiplicative", "NCHW", "gate"),
    ("tv:efficientnet_b0", 16, "multiplicative", "NCHW", "scale_activation"),
    ("tv:mobilenet_v3_small", 9, "multiplicative", "NCHW", "scale_activation"),
    ("lcnet_050", 2, "multiplicative", "NCHW", "gate"),
    ("regnety_002", 13, "multiplicative", "NCHW", "gate"),
    ("ghostnet_050", 7, "multiplicative", "NCHW", "gate"),
    ("ese_vovnet19b_slim_dw", 4, "multiplicative", "NCHW", "gate"),
    ("legacy_seresnet18", 8, "multiplicative", "NCHW", "sigmoid"),
    ("test_nfnet", 4, "multiplicative", "NCHW", "gate"),
    ("eca_resnext26ts", 8, "multiplicative", "NCHW", "gate"),
    ("resnest14d", 4, "radix", "NRCHW", "rsoftmax"),
    ("skresnet18", 8, "radix", "NRCHW", "attn"),
    ("convnextv2_atto", 12, "affine", "NCHW", None),
    ("gcresnet33ts", 10, "additive", "NCHW", "mlp_add.fc2"),
]
PLAIN = ["resnet10t", "test_convnext", "mobilenetv4_conv_small_035", "test_vit", "edgenext_xx_small", "mobilevitv2_050"]
PLAIN += ["efficientvit_b0", "starnet_s050", "focalnet_tiny_srf"]


def network(name, images):
    """A network of random weights, none of them zero, with batch-norm statistics of `images`: all gates matter."""
    model = torchvision.models.get_model(name[3:]) if name.startswith("tv:") else timm.create_model(name)
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, 0.3, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def collect(model, images, gates, **options):
    """What one forward hands to the sink, by kind and gate name."""
    values = {"attention": {}, "squeeze": {}}
    with torch.no_grad(), read_gates(model, gates, lambda g, kind, v: values[kind].update({g.name: v}), **options):
        model(images)
    return values


def replayed_error(model, images, gates, values):
    """How far the output is off when the products take `values`."""
    with torch.no_grad():
        expected = model(images)
        with replace_gates(model, gates, values):
            return relative_error(model(images), expected)


def assert_reproduces(model, images, gates):
    """In float64: in float32 two forwards of a deep network differ by more than a gate slightly wrong would."""
    model, images = model.double(), images.double()
    attention = collect(model, images, gates)["attention"]
    assert attention.keys() == {gate.name for gate in gates}
    assert all(attention[gate.name].shape == (len(images), gate.channels) for gate in gates)
    assert replayed_error(model, images, gates, attention) < 1e-10
    assert replayed_error(model, images, gates, {name: value * 1.5 for name, value in attention.items()}) > 1e-3
    model.float()  # the same weights again


def hooks_left(model):
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return own + len(every_module._global_forward_hooks) + len(every_module._global_forward_pre_hooks)


# ---- networks of others ----
@pytest.mark.parametrize(("name", "count", "form", "layout", "leaf"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_known_networks_have_their_gates_and_the_values_reproduce_them(name, count, form, layout, leaf):
    images = torch.randn(3, 3, 96, 128)
    model = network(name, images)
    gates = find_gates(model, images)
    assert [(gate.form, gate.layout) for gate in gates] == [(form, layout)] * count
    assert [gate.source for gate in gates] == [leaf and f"{gate.site}.{leaf}" for gate in gates]
    assert len({gate.name for gate in gates}) == count
    assert_reproduces(model, images, gates)
    if leaf:
        by_hand = []
        for gate in gates:
            hook = model.get_submodule(gate.source).register_forward_hook
            hook(lambda module, args, output: by_hand.append(output.flatten(1).clone()))
        values = collect(model, images, gates)["attention"]
        assert all(torch.equal(*pair) for pair in zip(values.values(), by_hand, strict=True))
        assert not torch.equal(values[gates[0].name], by_hand[0].flip(0))
    attentions, reasons = isolate(model, gates, images)
    assert list(attentions) == [gate.name for gate in gates if leaf]
    assert set(reasons.values()) == (set() if leaf else {"no module returns its attention"})
    for gate in gates if leaf else ():
        psi = torch.rand(gate.channels)
        with torch.no_grad():
            torch.testing.assert_close(attentions[gate.name](psi), attention_by_hand(model, name, gate, psi))
            assert not torch.allclose(attentions[gate.name](psi), attentions[gate.name](psi.flip(0)), rtol=1e-6)


def attention_by_hand(model, name, gate, psi):
    """What the gate's own layers, called by hand, make of a squeeze."""
    site, column = model.get_submodule(gate.site), psi[None, :, None, None]
    if name.startswith("tv:"):
        result = site.scale_activation(site.fc2(site.activation(site.fc1(column))))
    elif name == "eca_resnext26ts":
        result = site.gate(site.conv(psi[None, None]))
    elif name == "resnest14d":
        pooled = psi.view(2, -1).sum(0)[None, :, None, None]
        result = site.rsoftmax(site.fc2(site.act1(site.bn1(site.fc1(pooled)))))
    elif name == "skresnet18":
        pooled = psi.view(2, -1).sum(0)[None, :, None, None]
        attn = site.attn
        result = attn.fc_select(attn.act(attn.bn(attn.fc_reduce(pooled)))).view(2, -1).softmax(0)
    elif name == "gcresnet33ts":
        result = site.mlp_add(column)
    elif name == "ese_vovnet19b_slim_dw":
        result = site.gate(site.fc(column))
    elif name == "legacy_seresnet18":
        result = site.sigmoid(site.fc2(site.relu(site.fc1(column))))
    elif name in ("lcnet_050", "ghostnet_050"):
        result = site.gate(site.conv_expand(site.act1(site.conv_reduce(column))))
    else:
        result = site.gate(site.fc2(site.act(site.bn(site.fc1(column)))))
    return result.flatten()


@pytest.mark.parametrize("name", PLAIN)
def test_networks_without_channel_attention_have_no_gates(name):
    images = torch.randn(2, 3, *((160, 160) if name == "test_vit" else (96, 128)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no gates: of", UserWarning)
        assert find_gates(network(name, images), images) == []


def test_a_gate_is_named_after_its_site_and_knows_its_neighbours():
    images = torch.randn(3, 3, 96, 128)
    gates = find_gates(network("seresnet18", images), images)
    assert (gates[0].name, gates[0].site, gates[0].source) == ("layer1.0.se", "layer1.0.se", "layer1.0.se.gate")
    assert (gates[0].before, gates[0].after) == (
        "layer1.0.bn2",
        ("layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"),
    )
    own = find_gates(create_model("resnet", depth=11, module="senet"), torch.randn(3, 3, 32, 40))
    assert [(g.name, g.source) for g in own] == [(f"layer{i}.0", f"layer{i}.0.attention_module") for i in (1, 2, 3)]
    assert find_gates(create_model("resnet", depth=11), torch.randn(3, 3, 32, 40)) == []


# ---- networks of our own: a map, a block that may gate it, and a layer that takes the product ----
class Net(nn.Module):
    """conv, bn, relu, then `gate(self, x)`, then a layer; (N, 8, 12, 20) maps of (N, 3, 12, 20) images."""

    def __init__(self, gate, channels=8, last=None):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.same, self.sigmoid, self.softmax = nn.Identity(), nn.Sigmoid(), nn.Softmax(2)
        self.spatial = nn.Conv2d(channels, 1, 3, padding=1)
        self.scale, self.pair = nn.Parameter(torch.randn(channels, 1, 1)), nn.Linear(channels, 2 * channels)
        self.gate, self.last = gate, last or nn.Conv2d(channels, 5, 3)

    def forward(self, x):
        return self.last(self.gate(self, self.first(x)))

    def logits(self, x):
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


def column(z):
    return z[:, :, None, None]


def tokens(net, x):
    """A norm over tokens' channels, as transformers have: (N, L, 8)."""
    return F.layer_norm(x.flatten(2).transpose(1, 2), (8,), net.scale.flatten(), net.scale.flatten())


def radix(net, x, softmax_dim=1):
    both = torch.stack([x, x.flip(3)], softmax_dim)
    weights = net.pair(x.mean((2, 3))).view(-1, 2, 8).softmax(1)
    return (both * (weights[..., None, None] if softmax_dim == 1 else weights.transpose(1, 2)[..., None, None])).sum(
        softmax_dim
    )


def response_norm(net, x):
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    return net.scale * (x * (norm / (norm.mean(1, keepdim=True) + 1e-6))) + x


def mapped(function):
    """Make a gate on another arrangement of the map: `function(net, x)`, then back to a map for the last layer."""
    return lambda net, x: function(net, x).reshape(len(x), 8, -1)[:, :, :240].reshape(len(x), 8, 12, 20)


GATED = {
    "module": (lambda n, x: x * column(n.sigmoid(n.logits(x))), "multiplicative", "NCHW", "sigmoid"),
    "left": (lambda n, x: column(n.sigmoid(n.logits(x))) * x, "multiplicative", "NCHW", "sigmoid"),
    "functional": (lambda n, x: x * column(torch.sigmoid(n.logits(x))), "multiplicative", "NCHW", None),
    "handed through": (lambda n, x: x * column(n.same(torch.sigmoid(n.logits(x)))), "multiplicative", "NCHW", "same"),
    "in place": (lambda n, x: x.mul_(column(torch.sigmoid(n.logits(x)))), "multiplicative", "NCHW", None),
    "expanded": (lambda n, x: x * column(n.sigmoid(n.logits(x))).expand_as(x), "multiplicative", "NCHW", "sigmoid"),
    "repeated": (
        lambda n, x: x * column(n.sigmoid(n.logits(x))).repeat(1, 1, *x.shape[2:]), "multiplicative", "NCHW", None
    ),
    "copied, in place": (
        lambda n, x: column(n.sigmoid(n.logits(x))).expand_as(x).contiguous().mul_(x), "multiplicative", "NCHW", None
    ),
    "interpolated": (
        lambda n, x: x * torch.sigmoid(F.interpolate(column(n.logits(x)), size=x.shape[2:])),
        "multiplicative", "NCHW", None,
    ),
    "einsum": (
        lambda n, x: torch.einsum("nchw,nc->nchw", x, n.sigmoid(n.logits(x))), "multiplicative", "NCHW", "sigmoid"
    ),
    "relu6": (lambda n, x: x * column(F.relu6(n.logits(x) + 3) / 6), "multiplicative", "NCHW", None),
    "clamp": (lambda n, x: x * column((n.logits(x) / 6 + 0.5).clamp(0, 1)), "multiplicative", "NCHW", None),
    "tanh": (lambda n, x: x * (1 + column(torch.tanh(n.logits(x)))), "multiplicative", "NCHW", None),
    "residual": (lambda n, x: torch.addcmul(x, x, column(n.sigmoid(n.logits(x)))), "multiplicative", "NCHW", "sigmoid"),
    "max": (lambda n, x: x * column(n.sigmoid(n.fc2(n.fc1(x.amax((2, 3)))))), "multiplicative", "NCHW", "sigmoid"),
    "of another map": (
        lambda n, x: n.first[0](x[:, :3]) * column(n.sigmoid(n.logits(x))), "multiplicative", "NCHW", "sigmoid"
    ),
    "NHWC": (
        lambda n, x: (x.permute(0, 2, 3, 1) * n.sigmoid(n.logits(x))[:, None, None]).permute(0, 3, 1, 2),
        "multiplicative", "NHWC", "sigmoid",
    ),
    "tokens": (
        mapped(lambda n, x: (tokens(n, x) * n.sigmoid(n.logits(x))[:, None]).transpose(1, 2)),
        "multiplicative", "NLC", "sigmoid",
    ),
    "NCL": (mapped(lambda n, x: x.flatten(2) * n.sigmoid(n.logits(x))[..., None]), "multiplicative", "NCL", "sigmoid"),
    "NCDHW": (
        mapped(lambda n, x: x.unflatten(3, (4, 5)) * column(n.sigmoid(n.logits(x)))[..., None]),
        "multiplicative", "NCDHW", "sigmoid",
    ),
    "groups": (
        mapped(lambda n, x: x.unflatten(1, (2, 4)) * n.sigmoid(n.logits(x)).view(-1, 2, 4, 1, 1)),
        "multiplicative", "NGCHW", "sigmoid",
    ),
    "radix": (radix, "radix", "NRCHW", None),
    "radix transposed": (
        lambda n, x: (
            torch.stack([x, x.flip(3)], 1)
            * n.softmax(n.pair(x.mean((2, 3))).unflatten(1, (8, 2))).transpose(1, 2)[..., None, None]
        ).sum(1),
        "radix", "NRCHW", None,
    ),
    "radix last": (lambda n, x: radix(n, x, 2), "radix", "NCRHW", None),
    "response norm": (response_norm, "affine", "NCHW", None),
    "context": (lambda n, x: x + column(n.logits(x)), "additive", "NCHW", "fc2"),
}  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 20)


@pytest.mark.parametrize("kind", GATED)
def test_gates_are_found_read_and_replaced_in_every_form(kind, images):
    function, form, layout, source = GATED[kind]
    model = randomize(Net(function)).eval()
    (gate,) = find_gates(model, images)
    assert (gate.name, gate.site, gate.form, gate.layout, gate.source) == ("model", "", form, layout, source)
    assert (gate.channels, gate.after) == (16 if form == "radix" else 8, ("last",))
    assert_reproduces(model, images, [gate])
    with torch.no_grad(), replace_gates(model, [gate], {"model": torch.linspace(0.1, 2, gate.channels)}):
        same = model(images.flip(0))
        assert relative_error(same, model(images).flip(0)) < 1e-6
    assert hooks_left(model) == 0


@pytest.mark.parametrize("kind", GATED)
def test_the_squeeze_is_the_scaled_map_averaged_over_space(kind, images):
    function, form, layout, _ = GATED[kind]
    model = randomize(Net(function)).eval()
    (gate,) = find_gates(model, images)
    squeeze = collect(model, images, [gate], squeeze=True)["squeeze"]["model"]
    with torch.no_grad():
        scaled = model.first(images)
        if form == "radix":
            scaled = torch.cat([scaled, scaled.flip(3)], 1)
        elif kind == "tokens":
            scaled = tokens(model, scaled).transpose(1, 2)[..., None]
        elif kind == "of another map":
            scaled = model.first[0](scaled[:, :3])
    torch.testing.assert_close(squeeze, scaled.mean((2, 3)))
    assert relative_error(squeeze.flip(0), scaled.mean((2, 3))) > 1e-3


def windowed(x):
    return x * x.mean((2, 3), True).sigmoid()


@pytest.mark.equal_bits
def test_gates_are_the_same_after_a_run_was_written_and_opened(tmp_path, images):
    """Every form of gate goes through run.json, and a network of the same weights takes it from there."""
    for kind, (function, *_) in GATED.items():
        model = randomize(Net(function)).eval()
        gates = find_gates(model, images)
        with Recorder(model, gates, tmp_path / kind, squeeze=True) as recorder:
            recorder.record([(images, torch.zeros(3).long(), torch.arange(3))])
        run = open_run(tmp_path / kind)
        assert run.gates == gates
        again = copy.deepcopy(model)
        assert_reproduces(again, images, run.gates)
        with Recorder(again, run.gates, tmp_path / kind, squeeze=True) as recorder:
            recorder.record([(images, torch.zeros(3).long(), torch.arange(3))], epoch=1)
        for read in (run.attention, run.squeeze):
            again_read = getattr(open_run(tmp_path / kind), read.__name__)
            assert torch.equal(torch.tensor(read(gates[0], 0)), torch.tensor(again_read(gates[0], 1)))


def test_a_gate_that_says_too_little_is_refused_in_words(images):
    model = randomize(Net(GATED["module"][0])).eval()
    gates = [Gate("model", 8, attention=Tap("sigmoid", 0, "output", 0))]
    said = "'model' does not say where .*: take the gate of this name from find_gates"
    with pytest.raises(ValueError, match=said), read_gates(model, gates, print):
        model(images)
    with pytest.raises(ValueError, match=said), replace_gates(model, gates, {"model": torch.ones(8)}):
        model(images)


@pytest.mark.parametrize("changes", [
    {"attention": Tap("first", 0, "output", 0)}, {"attention": Tap("sigmoid", 0, "output", 7)},
    {"attention": Tap("no.such", 0, "output", 0)}, {"attention": Tap("sigmoid", 3, "output", 0)},
    {"attention": None, "product": Product(0, "mul", 0, 9, copied=False)}, {"layout": "NLC", "attention": None},
    {"squeeze": Tap("sigmoid", 0, "output", 0), "pooled": False}, {"channels": 5},
    {"site": "no.such", "attention": None},
])  # fmt: skip
def test_a_gate_of_another_network_is_refused_and_never_read_wrong(changes, images):
    model = randomize(Net(GATED["module"][0])).eval()
    (gate,) = find_gates(model, images)
    with pytest.raises((ValueError, RuntimeError), match="find_gates"):
        collect(model, images, [dataclasses.replace(gate, **changes)], squeeze=True)


@pytest.mark.parametrize(("kind", "reason"), [
    ("functional", "no module returns its attention"), ("NHWC", "no module takes or returns what it scales"),
    ("of another map", "its attention is not computed from what it scales"),
])  # fmt: skip
def test_attention_that_cannot_be_isolated_says_why(kind, reason, images):
    model = randomize(Net(GATED[kind][0])).eval()
    assert isolate(model, find_gates(model, images), images) == ({}, {"model": reason})


def test_what_is_computed_from_more_than_the_squeeze_is_not_isolated_where_it_shows(images):
    """The average is taken, and the largest value beside it, which no squeeze holds."""
    model = randomize(Net(lambda n, x: x * column(n.sigmoid(n.logits(x) + n.fc2(n.fc1(x.amax((2, 3)))))))).eval()
    gates = find_gates(model, images)
    assert gates[0].pooled
    assert isolate(model, gates, images)[1] == {"model": "its attention is not computed from the squeeze alone"}


def test_isolated_attention_leaves_the_network_as_it_was_and_is_differentiable(images):
    model = Stages().eval()
    gates = find_gates(model, images)
    attentions, _ = isolate(model, gates, images)
    assert list(attentions) == ["block.sigmoid#0", "block.sigmoid#1"]
    for attention in attentions.values():
        psi = torch.rand(6, requires_grad=True)
        expected = model.block.sigmoid(model.block.one(psi))
        torch.testing.assert_close(attention(psi), expected)
        gradients = torch.autograd.grad(attention(psi)[2], psi)[0], torch.autograd.grad(expected[2], psi)[0]
        torch.testing.assert_close(*gradients)
    assert hooks_left(model) == 0


class Scaling(Net):
    """The network of "module", its product in a method of its own class."""

    def forward(self, x):
        x = self.first(x)
        return self.last(x * column(self.sigmoid(self.logits(x))))


@pytest.mark.equal_bits
def test_values_may_be_keyed_by_gate(images):
    model = randomize(Scaling(GATED["module"][0])).eval()
    (gate,) = find_gates(model, images)
    outputs = []
    for key in (gate, gate.name):
        with torch.no_grad(), replace_gates(model, [gate], {key: torch.linspace(0.1, 2, 8)}):
            outputs.append(model(images))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(images))
    folded, _ = fold(model, {gate: torch.linspace(0.1, 2, 8)}, images)
    assert relative_error(folded(images), outputs[0]) < 1e-5


NOT_GATED = {
    "layer scale": (lambda n, x: x * n.scale, "the same for every sample"),
    "mean over the batch": (lambda n, x: x * column(n.logits(x).mean(0, True).sigmoid()), "the same for every"),
    "drop path": (lambda n, x: x * torch.sigmoid(x.mean((1, 2, 3), keepdim=True)), "one value per sample"),
    "spatial attention": (lambda n, x: x * n.sigmoid(n.spatial(x)), "dimensions 2, 3"),
    "along the rows": (lambda n, x: x * x.mean((1, 3), keepdim=True).sigmoid(), "dimensions 2, which"),
    "coordinate attention": (lambda n, x: x * x.mean(3, keepdim=True).sigmoid(), "dimensions 1, 2"),
    "activation": (lambda n, x: x * x.sigmoid(), "varies over space"),
    "filter response norm": (lambda n, x: x * x.square().mean((2, 3), keepdim=True).rsqrt(), "not normalised"),
    "rms norm": (lambda n, x: x * x.square().mean(1, keepdim=True).rsqrt(), "dimensions 2, 3"),
    "linear gate": (lambda n, x: x * column(n.logits(x)), "not normalised"),
    "half bounded": (lambda n, x: x * column(n.logits(x).clamp(min=0)), "not normalised"),
    "normaliser before pooling": (lambda n, x: x * (x.sigmoid() * x).mean((2, 3), keepdim=True), "not normalised"),
    "outer product": (lambda n, x: n.spatial(x) * column(n.sigmoid(n.logits(x))), "outer product"),
    "a score per token": (
        mapped(lambda n, x: (tokens(n, x) * n.fc1(tokens(n, x)).mean(2, keepdim=True).sigmoid()).transpose(1, 2)),
        "dimensions 1, which",
    ),
    "a score per hidden token": (
        mapped(lambda n, x: (n.fc2(n.fc1(tokens(n, x))) * n.fc1(tokens(n, x)).mean(2, True).sigmoid()).transpose(1, 2)),
        "dimensions 1, which",
    ),
    "attention pooling": (
        lambda n, x: x + column((tokens(n, x) * n.fc1(tokens(n, x))[..., :1].softmax(1)).sum(1)), "dimensions 1, which"
    ),
    "heads of attention pooling": (
        lambda n, x: x + column(
            (tokens(n, x).unflatten(2, (2, 4)) * n.fc1(tokens(n, x))[..., :2, None].softmax(1)).sum(1).flatten(1)
        ),
        "dimensions 1, 2",
    ),
    "windows": (lambda n, x: torch.cat(windowed(torch.cat(x.chunk(2, 3))).chunk(2), 3), "not the batch of 3"),
    "zero-initialised spatial": (lambda n, x: x * (x * 0 + n.scale).sigmoid(), "varies over space"),
    "timestep": (lambda n, x: x + column(n.fc2(torch.ones(len(x), 4) * 0.3)), None),
    "mean removed": (lambda n, x: x + -x.mean((2, 3), keepdim=True), "no learned layer"),
    "local and global": (lambda n, x: x * (n.first[0](x[:, :3]) + column(n.logits(x))).sigmoid(), "no learned layer"),
    "residual": (lambda n, x: x + x.flip(3), None),
}  # fmt: skip


SILENT = {"layer scale", "mean over the batch", "timestep", "mean removed", "residual"}  # no product is meant


@pytest.mark.parametrize("kind", NOT_GATED)
def test_false_friends_are_rejected_with_the_reason(kind, images):
    function, reason = NOT_GATED[kind]
    model = randomize(Net(function)).eval()
    with nullcontext() if kind in SILENT else pytest.warns(UserWarning, match="no gates: of .* explain_gates"):
        assert find_gates(model, images) == []
    reasons = [candidate.reason for candidate in explain_gates(model, images)]
    assert any(reason in given for given in reasons) if reason else not reasons


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(2, 9),
    st.integers(1, 9),
    st.integers(2, 9),
    st.sampled_from(["module", "NHWC", "repeated"]),
)
def test_a_gate_is_found_at_every_shape_also_where_sizes_coincide(batch, channels, height, width, kind):
    model, images = Net(GATED[kind][0], channels, last=nn.Identity()).eval(), torch.randn(batch, 3, height, width)
    (gate,) = find_gates(model, images)
    assert (gate.channels, gate.layout) == (channels, GATED[kind][2])
    values = collect(model, images, [gate], squeeze=True)
    with torch.no_grad():
        first = model.first(images)
        torch.testing.assert_close(values["attention"]["model"], model.sigmoid(model.logits(first)))
        torch.testing.assert_close(values["squeeze"]["model"], first.mean((2, 3)))


# ---- several gates, several calls ----
class Stages(nn.Module):
    """One block called twice, holding two products with one shared sigmoid, between wrappers of every kind."""

    def __init__(self, fail=False):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.block = Block()
        self.last = nn.Conv2d(6, 4, 3)
        self.fail = fail

    def forward(self, x):
        x = self.block(self.block(self.first(x)))
        if self.fail:
            raise RuntimeError("stages failed")
        return self.last(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.sigmoid = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sigmoid()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        if self.training:
            return x
        self.seen += 1
        self.last = self.last + 1
        y = x * self.sigmoid(self.one(x.mean((2, 3))))[..., None, None]
        return y * torch.sigmoid(self.two(y.mean((2, 3))))[..., None, None]


def test_every_call_and_product_has_a_name_of_its_own(images):
    model = Stages().eval()
    gates = find_gates(model, images)
    assert [gate.name for gate in gates] == ["block.sigmoid#0", "block#0", "block.sigmoid#1", "block#1"]
    assert [gate.source for gate in gates] == ["block.sigmoid", None] * 2
    values = collect(model, images, gates)["attention"]
    expected, x = [], model.first(images)
    for _ in range(2):
        for layer in (model.block.one, model.block.two):
            expected.append(layer(x.mean((2, 3))).sigmoid())
            x = x * expected[-1][..., None, None]
    for gate, value in zip(gates, expected, strict=True):
        torch.testing.assert_close(values[gate.name], value)
    assert not torch.allclose(values["block#0"], values["block#1"])
    assert_reproduces(model, images, gates)


def test_a_branch_of_a_softmax_is_a_gate_of_its_own(images):
    def selective(net, x):
        a, b = net.pair(x.mean((2, 3))).view(-1, 2, 8).softmax(1).unbind(1)
        return x * column(a) + x.flip(3) * column(b)

    model = randomize(Net(selective)).eval()
    gates = find_gates(model, images)
    assert [gate.name for gate in gates] == ["model@0", "model@1"]
    assert_reproduces(model, images, gates)
    assert len(find_gates(fx.symbolic_trace(model), images)) == 2


def test_the_average_of_another_part_of_the_map_is_not_its_squeeze(images):
    def halves(net, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a, b * column(net.sigmoid(net.fc2(a.mean((2, 3)))[:, :4]))], 1)

    model = randomize(Net(halves)).eval()
    (gate,) = find_gates(model, images)
    squeeze = collect(model, images, [gate], squeeze=True)["squeeze"]["model"]
    torch.testing.assert_close(squeeze, model.first(images)[:, 4:].mean((2, 3)))
    assert not gate.pooled


# ---- wrappers and modes ----
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_networks_are_read_without_paths(images):
    model = Stages().eval()
    scripted = torch.jit.script(model)
    gates = find_gates(scripted, images)
    assert [gate.name for gate in gates] == ["model@0", "model@1", "model@2", "model@3"]
    expected = collect(model, images, find_gates(model, images))["attention"]
    for _ in range(3):  # a scripted network is optimised on its second call
        values = collect(scripted, images, gates)["attention"]
        for ours, theirs in zip(values.values(), expected.values(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert_reproduces(scripted, images, gates)
    assert hooks_left(model) == 0
    inside = nn.Sequential(scripted, nn.ReLU()).eval()
    assert_reproduces(inside, images, find_gates(inside, images))
    assert len(find_gates(torch.jit.freeze(scripted), images)) == 4


def test_exported_networks_which_refuse_eval_are_read(images):
    model = randomize(Net(GATED["module"][0])).eval()
    exported = torch.export.export(model, (images,)).module()
    gates = find_gates(exported, images)
    assert [gate.name for gate in gates] == ["model"]
    assert_reproduces(exported, images, gates)


def test_compiled_networks_are_read_as_what_they_wrap(images):
    model = Stages().eval()
    compiled = torch.compile(model, backend="eager")
    gates = find_gates(compiled, images)
    assert gates == find_gates(model, images)
    with torch.no_grad():
        compiled(images)
    assert_reproduces(compiled, images, gates)
    assert hooks_left(model) == 0


@pytest.mark.equal_bits
@pytest.mark.parametrize("called_before", [False, True])
def test_networks_with_compiled_parts_have_the_names_of_those_without(called_before, images):
    model = randomize(create_model("resnet", depth=11, module="senet")).eval()
    gates = find_gates(model, images)
    expected = collect(model, images, gates)["attention"]
    constants = {gate: torch.rand(gate.channels) for gate in gates}
    folded, _ = fold(model, constants, images)
    model.layer2 = torch.compile(model.layer2, backend="eager")
    with torch.no_grad():
        if called_before:
            model(images)
        assert find_gates(model, images) == gates
        values = collect(model, images, gates)["attention"]
        assert all(torch.equal(values[name], expected[name]) for name in expected)
        assert_reproduces(model, images, gates)
        again, _ = fold(model, constants, images)
        assert torch.equal(again(images), folded(images))
    assert again.state_dict().keys() == folded.state_dict().keys()
    assert hasattr(model.layer2, "_orig_mod"), "the network itself stays compiled"
    model.layer1.compile(backend="eager")
    assert_reproduces(model, images, gates)


def test_distributed_networks_are_read_and_data_parallel_ones_refused(images, tmp_path):
    model = Stages().eval()
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        find_gates(nn.DataParallel(model), images)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        gates = find_gates(wrapped, images)
        assert gates == find_gates(model, images)
        assert len(collect(wrapped, images, gates)["attention"]) == 4
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["module", "einsum", "radix", "response norm"])
def test_gates_are_found_and_read_in_every_grad_mode(kind, images):
    model, images = randomize(Net(GATED[kind][0])).eval().double(), images.double()
    gates = find_gates(model, images)
    expected = collect(model, images, gates)["attention"]["model"]
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            values = {}
            assert find_gates(model, images) == gates
            with read_gates(model, gates, lambda gate, kind, v: values.update({kind: v})):  # noqa: B023
                model(images)
            assert relative_error(values["attention"], expected) < 1e-10
            assert not values["attention"].requires_grad


def test_several_inputs_come_as_tuple_or_mapping(images):
    class Two(Net):
        def forward(self, x, other):
            return self.last(GATED["module"][0](self, self.first(x)) + other["map"])

    model, other = Two(None).eval(), {"map": torch.zeros(3, 8, 12, 20)}
    assert len(find_gates(model, (images, other))) == 1
    assert find_gates(model, {"x": images, "other": other}) == find_gates(model, [images, other])
    with pytest.raises(ValueError, match="received str"):
        find_gates(model, "images")


def test_half_precision_and_channels_last_read_the_same(images):
    model = randomize(Net(GATED["module"][0])).eval()
    expected = collect(model, images, find_gates(model, images), squeeze=True)
    strided, halved = images.to(memory_format=torch.channels_last), images.bfloat16()
    for other, batch, tolerance in ((model, strided, 1e-6), (copy.deepcopy(model).bfloat16(), halved, 0.05)):
        found = collect(other, batch, find_gates(other, batch), squeeze=True)
        for kind, values in expected.items():
            assert relative_error(found[kind]["model"].float(), values["model"]) < tolerance


# ---- what the sink gets ----
def test_values_are_copies_that_later_writes_do_not_reach(images):
    def overwriting(net, x):
        gate = net.sigmoid(net.logits(x))
        y = x * column(gate)
        gate.zero_()
        return y

    model = randomize(Net(overwriting)).eval()
    gates = find_gates(model, images)
    value = collect(model, images, gates)["attention"]["model"]
    assert value.min() > 0
    assert not gates[0].exclusive
    assert_reproduces(model, images, gates)


def test_a_write_between_source_and_product_hides_the_source(images):
    model = Net(lambda n, x: x * column(n.sigmoid(n.logits(x)).mul_(2))).eval()
    (gate,) = find_gates(model, images)
    assert gate.source is None
    assert collect(model, images, [gate])["attention"]["model"].max() > 1


# ---- replacing ----
def test_gradients_reach_values_through_module_outputs_only(images):
    for kind, reaches in (("module", True), ("functional", False)):
        model = randomize(Net(GATED[kind][0])).eval()
        gates = find_gates(model, images)
        psi = torch.full((8,), 0.5, requires_grad=True)
        if reaches:
            with replace_gates(model, gates, {"model": psi}):
                model(images).square().mean().backward()
            assert psi.grad.abs().max() > 0
        else:
            with pytest.raises(ValueError, match="no gradient"), replace_gates(model, gates, {"model": psi}):
                pass


class Returns(Net):
    def forward(self, x):
        x = self.first(x)
        gate = self.sigmoid(self.logits(x))
        return x * column(gate), gate


def test_a_gate_used_twice_is_replaced_in_its_product_only(images):
    def twice(net, x):
        gate = net.sigmoid(net.logits(x))
        return x * column(gate).expand_as(x) + column(gate)

    model = randomize(Net(twice)).eval()
    (gate,) = find_gates(model, images)
    assert not gate.exclusive
    assert not find_gates(Returns(twice).eval(), images)[0].exclusive
    with torch.no_grad(), replace_gates(model, [gate], {"model": torch.zeros(8)}):
        left = model(images)
    expected = model.last(column(model.sigmoid(model.logits(model.first(images)))).expand(-1, -1, 12, 20))
    torch.testing.assert_close(left, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": torch.ones(6)}, "no gate is named 'block'; expected some of block.sigmoid#0"),
        ({"block#0": torch.ones(5)}, r"shape \(5,\); expected \(6,\) or \(samples, 6\)"),
        ({"block#0": torch.ones(2, 6)}, "are of 2 samples; the batch has 3"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message, images):
    model = Stages().eval()
    gates = find_gates(model, images)
    with torch.no_grad(), pytest.raises(ValueError, match=message), replace_gates(model, gates, values):
        model(images)


# ---- what goes wrong ----
def test_gates_on_a_single_pixel_are_left_out_by_name_and_the_others_found():
    model, names = timm.create_model("seresnet18").eval(), "layer4.0.se, layer4.1.se"
    with pytest.warns(UserWarning, match=f"{names} is a single pixel.* at least twice the size, 64x64; the other"):
        found = find_gates(model, torch.randn(2, 3, 32, 32))
    assert found == find_gates(model, torch.randn(1, 3, 64, 64))[:6]
    assert len(find_gates(model, torch.randn(1, 3, 64, 64))) == 8


@pytest.mark.filterwarnings("ignore:input too small:UserWarning")
def test_gates_beside_those_on_a_single_pixel_are_folded():
    model, images = randomize(timm.create_model("seresnet18")).eval().double(), torch.randn(2, 3, 32, 32).double()
    gates = find_gates(model, images)
    constants = {gate.name: torch.linspace(0.2, 0.9, gate.channels).double() for gate in gates}
    folded, report = fold(model, constants, images)
    assert set(report.table["direction"]) == {"back"}
    other = torch.randn(2, 3, 64, 96).double()
    with torch.no_grad(), replace_gates(model, gates, constants):
        expected = model(other)
    assert relative_error(folded(other), expected) < 1e-10
    assert relative_error(model(other), expected) > 1e-3
    with pytest.raises(ValueError, match="no gate is named 'layer4.0.se'; expected some of layer1.0.se"):
        fold(model, {"layer4.0.se": torch.ones(512)}, images)


def test_what_is_a_single_pixel_alone_is_refused_with_advice_that_fits_the_network():
    single = Net(GATED["module"][0], last=nn.Identity()).eval()
    with pytest.raises(ValueError, match="at model is a single pixel.* use images of at least twice the size, 2x2"):
        find_gates(single, torch.randn(2, 3, 1, 1))
    fixed = Net(GATED["module"][0], last=nn.Sequential(nn.Flatten(), nn.Linear(8, 5))).eval()
    with pytest.raises(ValueError, match="takes no larger input, so that these cannot be folded or recorded"):
        find_gates(fixed, torch.randn(2, 3, 1, 1))


@pytest.mark.filterwarnings("ignore:no gates:UserWarning")
def test_an_activation_on_a_single_pixel_is_no_gate():
    pooled = Net(lambda n, x: x, last=nn.Sequential(nn.AdaptiveAvgPool2d(1), SelfGate())).eval()
    assert find_gates(pooled, torch.randn(2, 3, 5, 6)) == []
    assert find_gates(Net(NOT_GATED["activation"][0], last=nn.Identity()).eval(), torch.randn(2, 3, 1, 1)) == []


class SelfGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(self.fc1(x).relu()))


def test_further_normalisers_are_taken_by_their_aten_name(images):
    model = Net(lambda n, x: x * column(F.softplus(n.logits(x)))).eval()
    with pytest.warns(UserWarning, match="not normalised"):
        assert find_gates(model, images) == []
    assert len(find_gates(model, images, normalisers=["softplus"])) == 1


class Elastic(nn.Module):
    """A gate whose channels, or whose very product, depend on the input."""

    def __init__(self, source):
        super().__init__()
        self.sigmoid = nn.Sigmoid() if source else torch.sigmoid

    def forward(self, x):
        if len(x) == 7:
            return x
        if len(x) == 5:
            raise RuntimeError("five")
        return x * column(self.sigmoid(x.mean((2, 3))))


def test_a_forward_that_fails_leaves_nothing_for_the_next(images):
    model, seen = Elastic(False).eval(), []
    with read_gates(model, find_gates(model, images), lambda gate, kind, values: seen.append(len(values))):
        with pytest.raises(RuntimeError, match="five"):
            model(torch.randn(5, 3, 4, 4))
        model(images)
    assert seen == [3]


@pytest.mark.parametrize("source", [True, False])
def test_gates_that_change_between_batches_are_refused_by_name(source, images):
    model = Elastic(source).eval()
    gates = find_gates(model, images)
    assert len(collect(model, images[:2, :, :5], gates)["attention"]["model"]) == 2
    with pytest.raises(ValueError, match=r"gate 'model' came .* \(3, 4.*expected 3 channels"):
        collect(model, torch.randn(3, 4, 12, 20), gates)
    with pytest.raises(RuntimeError, match="the forward did not pass model"):
        collect(model, torch.randn(7, 3, 12, 20), gates)
    with pytest.raises(RuntimeError, match="no forward ran"), read_gates(model, gates, print):
        pass
    with pytest.raises(ValueError, match="no gates block.sigmoid#0, block#0"):
        collect(model, images, find_gates(Stages(), images)[:2])
    assert hooks_left(model) == 0
    assert _get_current_dispatch_mode() is None


# ---- nothing is left ----
def test_a_network_in_training_is_looked_at_in_eval_mode(images):
    assert find_gates(Stages().train(), images) == find_gates(Stages().eval(), images) != []


def test_a_network_is_left_as_found_also_after_an_exception(images):
    for fail in (False, True):
        model = Stages(fail).train()
        model.block.eval()
        model.first.weight.requires_grad_(False)
        state = copy.deepcopy(model.state_dict())
        gates = find_gates(Stages(), images)
        for attempt in (lambda m=model: find_gates(m, images), lambda m=model, g=gates: collect(m, images, g)):
            if fail:
                with pytest.raises(RuntimeError, match="stages failed"):
                    attempt()
            else:
                attempt()
            assert [m.training for m in model.modules()] == [True, True, False, False, False, False, True]
            assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
            assert hooks_left(model) == 0
            assert _get_current_dispatch_mode() is None
            if attempt.__defaults__ == (model,):
                assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_an_interrupt_inside_a_product_leaves_no_mode_behind(images):
    def interrupted(gate, kind, values):
        raise KeyboardInterrupt

    model = Net(GATED["functional"][0]).eval()
    gates = find_gates(model, images)
    with pytest.raises(KeyboardInterrupt), read_gates(model, gates, interrupted):
        model(images)
    assert _get_current_dispatch_mode() is None
    assert hooks_left(model) == 0


def test_two_contexts_that_read_one_product_leave_their_modes_in_order(images):
    model = Net(GATED["functional"][0]).eval()
    [gate] = find_gates(model, images)
    outer, inner = [], []
    with (
        read_gates(model, [gate], lambda *found: outer.append(found[2]), squeeze=True),
        read_gates(model, [gate], lambda *found: inner.append(found[2])),
    ):
        model(images)
        assert not is_in_torch_dispatch_mode()  # as torch notes when a mode is left that was not entered last
    expected = collect(model, images, [gate])["attention"][gate.name]
    assert (len(outer), len(inner)) == (2, 1)
    assert relative_error(inner[0], expected) < 1e-5
    errors = sorted(relative_error(values, expected) for values in outer)
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


# ---- the graph ----
def test_the_trace_knows_parameters_aliases_and_what_depends_on_the_input(images):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.tied = self.conv.weight

        def forward(self, x):
            y = F.conv2d(x, self.conv.weight.data * 2)
            view = y[:, :2]
            y.relu_()
            return view + torch.zeros_like(y)[:, :2]

    graph = trace(Writes(), images)
    conv = next(op for op in graph.ops if op.name == "convolution")
    relu = next(op for op in graph.ops if op.name == "relu")
    add = graph.ops[-1]
    assert conv.parameters == {"conv.weight", "tied"}
    assert conv.is_layer
    assert not add.is_layer
    assert relu.inputs[0].producer is conv
    assert add.inputs[0].producer is relu  # the view sees the write
    assert relu.outputs[0].memory == add.inputs[0].memory != relu.inputs[0].memory
    assert [value.live for value in add.inputs] == [True, False]
    assert graph.outputs == add.outputs
    assert [op.name for op in add.outputs[0].chain()][-1] == "convolution"
    assert graph.batches == (3,)
