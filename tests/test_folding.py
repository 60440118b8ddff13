"""Folding: the folded network equals the one whose gates are constant, and what is not exact is kept with a reason."""

import copy

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from timm.layers import GlobalContext, SEModule, StdConv2d
from timm.layers.cbam import CbamModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from stripe.folding import ChannelScale, FoldReport, building, fold, merging
from stripe.gates import find_gates
from stripe.models import create_model
from tests.conftest import randomize, relative_error
from tests.folds import EXACT, Net, Shortcut, at_constants, constants_of, folded_exactly, small

# name, gates, sides that they go to, the layer that the first gate goes into; torchvision's begin with "tv:"
NETWORKS = [
    ("seresnet18", 8, "back", "layer1.0.bn2"),
    ("legacy_seresnet18", 8, "back", "layer1.0.bn2"),
    ("eca_resnext26ts", 8, "forward", "stages.0.0.conv3_1x1.conv"),
    ("tv:efficientnet_b0", 16, "forward", "features.1.0.block.2.0"),
    ("tv:mobilenet_v3_small", 9, "back or forward", None),
    ("mobilenetv3_small_050", 9, "back or forward", None),
    ("lcnet_050", 2, "forward", "blocks.5.0.conv_pw"),
    ("regnety_002", 13, "back or forward", None),
    ("rexnet_100", 13, "back", "features.3.conv_dw.bn"),
    ("ese_vovnet19b_slim_dw", 4, "back", "stages.0.blocks.0.conv_concat.bn"),
    ("ghostnet_050", 7, "back or forward", "blocks.3.0.bn_dw"),
    ("test_nfnet", 4, "back", "stages.0.0.conv3"),
    ("nf_seresnet26", 8, "back", "stages.0.0.conv3"),
    ("resnest14d", 4, "back", "layer1.0.conv2.bn0"),
    ("skresnet18", 8, "back", "layer1.0.conv1.paths.0.bn"),
    ("convnextv2_atto", 12, "forward", "stages.0.blocks.0.mlp.fc2"),
    ("gcresnet33ts", 10, "forward", "stages.0.0.conv3_1x1.bn"),
]
LARGER = [  # the same neighbourhoods in the networks that people deploy
    ("seresnet50", 16, "back", "layer1.0.bn3"),
    ("ecaresnet26t", 8, "back", None),
    ("efficientnet_b0", 16, "forward", None),
    ("mobilenetv3_small_100", 9, "back or forward", None),
    ("tv:regnet_y_400mf", 16, "back or forward", None),
    ("ese_vovnet19b_dw", 4, "back or forward", None),
    ("ghostnet_100", 7, "back or forward", None),
]


def network(name):
    """A network in float64 whose statistics, affine parameters and gains are random."""
    model = torchvision.models.get_model(name[3:]) if name.startswith("tv:") else timm.create_model(name)
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, 0.3, 0.1)
    return randomize(model).double().eval()


# ---- networks of others, and this project's own ----
@pytest.mark.parametrize(
    ("name", "count", "sides", "first"),
    [*(pytest.param(*row, id=row[0]) for row in NETWORKS),
     *(pytest.param(*row, id=row[0], marks=pytest.mark.slow) for row in LARGER)],
)  # fmt: skip
def test_known_networks_fold_exactly_and_wholly(name, count, sides, first):
    images = torch.randn(2, 3, 64, 96).double()
    model = network(name)
    folded, table = folded_exactly(model, images)
    assert len(table) == count
    assert set(table["direction"]) <= set(sides.split(" or "))
    assert set(table["through"]) <= {(), ("relu",), ("max_pool2d_with_indices",)}
    assert not any(isinstance(module, ChannelScale) for module in folded.modules())
    assert len(list(folded.parameters())) < len(list(model.parameters()))
    assert first in (None, table["into"][0][0].rpartition(".")[0])


@pytest.mark.equal_bits
@pytest.mark.parametrize(("module", "block"), [("senet", "bottleneck"), ("eca", "basicblock"), ("srm", "basicblock")])
def test_own_networks_fold_to_the_plain_network(module, block):
    depth = 11 if block == "bottleneck" else 8
    images = torch.randn(2, 3, 32, 40)
    model = randomize(create_model("resnet", depth=depth, block=block, module=module)).eval()
    state = copy.deepcopy(model.state_dict())
    gates = find_gates(model, images)
    constants = {name: vector.float().numpy() for name, vector in constants_of(gates).items()}
    folded, report = fold(model, constants, images)
    plain = create_model("resnet", depth=depth, block=block).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        expected = at_constants(model, images, gates, {n: torch.from_numpy(v) for n, v in constants.items()})
        assert relative_error(plain(images), expected) < 1e-5
        assert torch.equal(plain(images), folded(images))
        assert relative_error(model(images), expected) > 1e-3
    assert set(report.table["direction"]) == {"back"}
    assert {value.dtype for value in folded.parameters()} == {torch.float32}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_report_shows_itself_with_names_escaped():
    row = ("<b>x</b>", "back", ("w",), (), "", 1.5)
    columns = ["gate", "direction", "into", "through", "reason", "weight_growth"]
    shown = FoldReport(pd.DataFrame([row], columns=columns), 2e-16)._repr_html_()
    assert "<b>1 of 1</b> gates merged, relative error 2e-16" in shown
    assert "&lt;b&gt;x&lt;/b&gt;" in shown
    assert "<b>x</b>" not in shown


@pytest.mark.equal_bits
def test_gates_that_are_not_named_stay_as_they_are():
    images = torch.randn(2, 3, 96, 128).double()
    model = network("lcnet_050")
    first, second = find_gates(model, images)
    constants = constants_of([first])
    folded, report = fold(model, constants, images)
    assert find_gates(folded, images) == [second]
    with torch.no_grad():
        assert relative_error(folded(images), at_constants(model, images, [first], constants)) < EXACT
    nothing, report = fold(model, {}, images)
    assert find_gates(nothing, images) == [first, second]
    assert report.error == 0.0
    assert report.table.empty


# ---- wrong merges ----
@pytest.mark.parametrize(
    ("name", "activation", "first"),
    [("tv:efficientnet_b0", "silu", 0), ("tv:mobilenet_v3_small", "hardswish", 4), ("eca_resnext26ts", "silu", 0)],
)
def test_the_check_catches_merges_through_activations_that_are_not_homogeneous(name, activation, first, monkeypatch):
    monkeypatch.setattr(merging, "POSITIVE", merging.POSITIVE | {activation})
    monkeypatch.setattr(merging, "_TAKEN_BY", {})
    images = torch.randn(2, 3, 64, 96).double()
    model = network(name)
    gates = find_gates(model, images)[first : first + 2]
    constants = constants_of(gates)
    folded, report = fold(model, constants, images)
    expected = at_constants(model, images, gates, constants)
    with torch.no_grad():
        assert relative_error(folded(images), expected) < EXACT
    assert report.table["reason"].str.match(r"back is not exact: relative error (0\.\d+|\de-0[1-3])").all()
    assert all(isinstance(folded.get_submodule(gate.site), ChannelScale) for gate in gates)


def test_a_standardised_weight_does_not_carry_a_scale():
    images = torch.randn(2, 3, 64, 96).double()
    model = network("nf_seresnet26")
    gates = find_gates(model, images)
    constants = constants_of(gates)
    wrong = fold(model, constants, images)[0]
    for gate in gates:
        given, changed = model.get_submodule(gate.before), wrong.get_submodule(gate.before)
        changed.gain.data = given.gain.data.clone()
        changed.weight.data *= constants[gate.name][:, None, None, None]
    with torch.no_grad():
        assert relative_error(wrong(images), at_constants(model, images, gates, constants)) > 1e-2
    table = folded_exactly(Net(before=StdConv2d(3, 8, 3, padding=0)), small())[1]
    assert table["reason"][0].startswith("back: no parameter of convolution carries a factor per channel; forward: ")


def test_the_radix_comes_before_the_channels():
    images = torch.randn(2, 3, 64, 96).double()
    model = network("resnest14d")
    gates = find_gates(model, images)
    constants = constants_of(gates)
    swapped = {gate.name: constants[gate.name].view(-1, 2).t().reshape(-1) for gate in gates}
    with torch.no_grad():
        wrong = fold(model, swapped, images)[0](images)
        assert relative_error(wrong, at_constants(model, images, gates, constants)) > 1e-2


# ---- networks of our own: a layer, maps, a gate, maps, what takes the product ----
class Both(nn.Module):
    """Takes the product twice, in a list of layers and side by side."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.wide, self.linear, self.norm = nn.Conv2d(16, 4, 1), nn.Linear(8, 5), nn.BatchNorm2d(8)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Tokens(nn.Module):
    """A layer norm and a linear layer over channels that come last."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))


BACK = {
    "convolution": (nn.Conv2d(3, 8, 3), None, ("before.weight", "before.bias"), ()),
    "no bias": (nn.Conv2d(3, 8, 3, bias=False), None, ("before.weight",), ()),
    "relu": (None, nn.ReLU(inplace=True), ("before.1.weight", "before.1.bias"), ("relu",)),
    "leaky": (None, nn.LeakyReLU(0.2), ("before.1.weight", "before.1.bias"), ("leaky_relu",)),
    "prelu": (None, nn.PReLU(8), ("before.1.weight", "before.1.bias"), ("_prelu_kernel",)),
    "pools": (
        None, nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)), ("before.1.weight", "before.1.bias"),
        ("avg_pool2d", "max_pool2d_with_indices"),
    ),
    "sync": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)), None, ("before.1.weight", "before.1.bias"), ()
    ),
    "group norm": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), None, ("before.1.weight", "before.1.bias"), ()
    ),
    "linear": (Tokens(), None, ("before.head.weight", "before.head.bias"), ()),
    "weight norm": (weight_normed(), None, ("before.parametrizations.weight.original0", "before.bias"), ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACK)
def test_a_constant_goes_back_into_the_layer_before(kind):
    before, maps, into, through = BACK[kind]
    model = Net(copy.deepcopy(before), copy.deepcopy(maps), after=Shortcut())
    row = folded_exactly(model, small())[1].iloc[0]
    assert (row["direction"], row["into"], row["through"]) == ("back", into, through)


def test_a_constant_goes_into_what_a_pruned_weight_is_made_of():
    pruned = prune.random_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5)
    model = Net(pruned, after=Shortcut())
    images = small()
    constants = constants_of(find_gates(model, images))
    model(images).sum().backward()  # the weight that a forward pass made last is no leaf
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    folded, report = fold(model, constants, images)
    assert report.table["into"][0] == ("before.weight_orig", "before.bias")
    with torch.no_grad():
        exactly = folded_exactly(model, images, constants=constants)[0](images)
        assert relative_error(folded(images), exactly) < EXACT
    assert set(folded.before.weight_mask.unique().tolist()) == {0.0, 1.0}


FORWARD = {
    "several": (lambda m, x: m.one(x).mean() + m.two(F.relu(x)), ("after.one.weight", "after.two.weight"), ("relu",)),
    "cat": (lambda m, x: m.wide(torch.cat([x * 3, x], 1)), ("after.wide.weight",), ("mul",)),
    "mean": (lambda m, x: m.linear(x.mean((2, 3))), ("after.linear.weight",), ("mean",)),
    "tokens": (
        lambda m, x: m.linear(F.pad(x, (1, 1)).flatten(2).transpose(1, 2)),
        ("after.linear.weight",), ("constant_pad_nd",),
    ),
    "pooled": (lambda m, x: m.linear(F.adaptive_avg_pool2d(x, 1).flatten(1)), ("after.linear.weight",), ("mean",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORWARD)
def test_a_constant_goes_forward_into_all_that_take_it(kind):
    function, into, through = FORWARD[kind]
    row = folded_exactly(Net(maps=nn.SiLU(), after=Both(function)), small())[1].iloc[0]
    assert (row["direction"], row["into"], row["through"]) == ("forward", into, through)


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_convolutions_take_each_group_its_own_channels(groups):
    row = folded_exactly(Net(maps=nn.SiLU(), after=nn.Conv2d(8, 16, 3, padding=1, groups=groups)), small())[1].iloc[0]
    assert row["into"] == ("after.weight",)


def context():
    return GlobalContext(8, fuse_add=True, fuse_scale=False)


BLOCKED = {
    "silu": ({"maps": nn.SiLU()}, "back: silu is in between; forward: add is in between"),
    "sigmoid after": ({"maps": nn.ReLU6(), "after": nn.Sigmoid()}, "back: hardtanh is in between; forward: sigmoid"),
    "output": ({"maps": nn.SiLU(), "after": nn.Identity()}, "forward: it is the network's output"),
    "affine": (
        {"before": nn.BatchNorm2d(3, affine=False), "gate": SEModule(3), "after": nn.Identity()},
        "has no weight per output channel",
    ),
    "frozen": (
        {"before": torchvision.ops.FrozenBatchNorm2d(3), "gate": SEModule(3), "after": nn.Identity()},
        "back: nothing before it has weights",
    ),
    "transposed": (
        {"before": nn.ConvTranspose2d(3, 8, 3), "after": nn.ConvTranspose2d(8, 3, 3)},
        "no weight per output channel; forward: convolution after it has no weight per input",
    ),
    "norm after": ({"maps": nn.SiLU(), "after": nn.BatchNorm2d(8)}, "forward: native_batch_norm is in between"),
    "context at the border": (
        {"maps": nn.SiLU(), "gate": context(), "after": nn.Conv2d(8, 4, 3, padding=1)},
        "back: silu is in between; forward: the zero padding of convolution makes a shift inexact",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKED)
def test_what_is_not_exact_is_kept_as_a_scale_and_says_why(kind):
    parts, reason = BLOCKED[kind]
    folded, table = folded_exactly(Net(**copy.deepcopy(parts)), small())
    assert isinstance(folded.se, ChannelScale)
    assert list(table["direction"]) == ["kept"]
    assert table["reason"].str.contains(reason)[0], table["reason"][0]
    assert (table["into"][0], table["weight_growth"][0]) == ((), 1.0)


def test_negative_constants_do_not_pass_a_relu():
    model, images = Net(maps=nn.ReLU()), small()
    constants = {"se": torch.linspace(-1, 1, 8).double()}
    assert "negative constants do not pass relu" in folded_exactly(model, images, constants=constants)[1]["reason"][0]
    assert folded_exactly(Net(), images, constants=constants)[1]["direction"][0] == "back"
    forward = Net(maps=nn.ReLU(), after=nn.Conv2d(8, 4, 3))
    assert folded_exactly(forward, images, constants=constants)[1]["direction"][0] == "forward"


def test_context_goes_into_a_bias_where_no_padding_is():
    for maps, after, into in (
        (nn.SiLU(), nn.Conv2d(8, 4, 3), ("after.bias",)),
        (None, Shortcut(), ("before.1.bias",)),
    ):
        assert folded_exactly(Net(maps=maps, gate=context(), after=after), small())[1]["into"][0] == into
    padded = nn.Conv2d(8, 4, 3, padding=1).double()
    x, a = torch.randn(1, 8, 6, 6).double(), torch.rand(8).double()
    wrong = padded(x) + (padded.weight.sum((2, 3)) @ a)[:, None, None]
    assert relative_error(wrong, padded(x + a[:, None, None])) > 1e-2


def test_parameters_of_another_path_are_not_scaled():
    shared = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    class Siamese(Net):
        def forward(self, images):
            return super().forward(images) + self.before(images.flip(3))

    tied = Net(after=Shortcut())
    tied.other = nn.BatchNorm2d(8).double().eval()
    tied.other.weight = tied.before[1].weight
    for model, reason in ((Siamese(shared), "shared with before"), (tied, "shared with other.weight")):
        assert f"before.1.weight is {reason}" in folded_exactly(model, small())[1]["reason"][0]

    class Second(Net):
        def forward(self, images):
            x = self.before(images)
            return self.se(x) + x.square()

    assert "the map before is also taken by pow" in folded_exactly(Second(), small())[1]["reason"][0]


# ---- taking the attention out of a forward ----
class Functional(nn.Module):
    """Attention without a module of its own, among other things."""

    def __init__(self, branch=False):
        super().__init__()
        self.fc1, self.fc2, self.branch = nn.Linear(8, 4), nn.Linear(4, 8), branch

    def forward(self, x):
        if self.branch and x.sum() > 1e9:
            return x
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return (gate[:, :, None, None] * x).abs()


def test_a_forward_is_rewritten_without_its_attention():
    for maps, direction, left in ((None, "back", []), (nn.SiLU(), "kept", [ChannelScale])):
        folded, table = folded_exactly(Net(maps=maps, gate=Functional()), small())
        assert table["direction"][0] == direction
        assert [type(module) for module in folded.se.children()] == left
        assert list(folded.se.parameters()) == []
    folded, table = folded_exactly(Net(gate=Functional(branch=True)), small())  # which torch.fx cannot trace
    assert table["direction"][0] == "back"
    assert torch.equal(folded.se(torch.full((1, 8, 40, 40), 1e6)), torch.full((1, 8, 40, 40), 1e6))


def test_a_response_norm_goes_with_the_map_that_it_is_added_to():
    class Response(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x):
            norm = x.norm(p=2, dim=(2, 3), keepdim=True)
            return F.silu(x + self.weight * (x * (norm / norm.mean(1, keepdim=True))))

    folded, table = folded_exactly(Net(gate=Response()), small())
    assert (table["direction"][0], table["into"][0]) == ("back", ("before.1.weight", "before.1.bias"))
    folded, table = folded_exactly(Net(maps=nn.SiLU(), gate=Response()), small())
    assert table["reason"][0] == "back: silu is in between; forward: silu is in between"
    assert [type(module) for module in folded.se.children()] == [ChannelScale]


def test_a_network_may_be_the_site_itself():
    class Whole(Functional):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, images):
            return self.last(super().forward(self.conv(images)))

    folded, table = folded_exactly(Whole().double().eval(), small())
    assert {name for name, _ in folded.named_parameters()} == {"conv.weight", "conv.bias", "last.weight", "last.bias"}


def test_several_gates_of_one_forward_go_one_after_another():
    both = GlobalContext(8, fuse_add=True, fuse_scale=True)
    folded, table = folded_exactly(Net(gate=both), small())
    assert list(table["direction"]) == ["back", "back"]  # as one scale and shift
    assert isinstance(folded.se, nn.Identity)
    folded, table = folded_exactly(Net(maps=nn.SiLU(), gate=both), small())
    assert list(table["direction"]) == ["kept", "kept"]
    assert isinstance(folded.se, ChannelScale)
    table = folded_exactly(Net(gate=CbamModule(8)), small())[1]
    assert list(table["gate"]) == ["se.channel"]
    assert list(table["direction"]) == ["back"]


# ---- refusals ----
def test_what_cannot_be_folded_is_refused_clearly():
    model, images = Net(), small()
    ones = torch.ones(8)
    with pytest.raises(ValueError, match="no gate is named 'sa'; expected some of se"):
        fold(model, {"sa": ones}, images)
    with pytest.raises(ValueError, match=r"gate 'se' has shape \(1, 8\); expected \(8,\)"):
        fold(model, {"se": ones[None]}, images)
    with pytest.raises(ValueError, match="constant of gate 'se' is not finite in 1 values"):
        fold(model, {"se": np.array([np.nan, *[1.0] * 7])}, images)
    with pytest.raises(ValueError, match="no gates to fold"):
        fold(Net(gate=nn.Identity()), {"se": ones}, images)


@pytest.mark.equal_bits
def test_train_mode_is_no_matter_and_stays_as_it_is():
    model, images = Net().train(), small()
    folded, _ = fold(model, {"se": torch.full((8,), 0.5)}, images)
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        expected = fold(model.eval(), {"se": torch.full((8,), 0.5)}, images)[0]
    assert relative_error(folded(images), expected(images)) == 0


def test_a_network_that_differs_even_with_nothing_merged_is_refused(monkeypatch):
    monkeypatch.setattr(building, "without", lambda module, removals: nn.Sigmoid())
    with pytest.raises(ArithmeticError, match=r"differs by .*; expected at most"):
        fold(Net(), {"se": torch.full((8,), 0.5)}, small())
