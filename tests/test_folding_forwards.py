"""Folding in forwards of every kind: what they return and take, how often they run, what they do in train mode."""

import copy
import dataclasses
import pickle
from functools import partial
from typing import NamedTuple

import pytest
import torch
from timm.layers import SEModule
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from torch import nn
from torch.nn import functional as F

from stripe.folding import ChannelScale, compact, fold
from stripe.folding.constants import Scaled
from stripe.gates import find_gates
from tests.conftest import randomize, relative_error
from tests.folds import EXACT, Net, at_constants, constants_of, folded_exactly, small


class SE(nn.Module):
    """Squeeze and excitation whose attention is computed in `attend`."""

    def __init__(self, channels=8):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def attend(self, x):
        return torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]

    def forward(self, x):
        return x * self.attend(x)


def others(*shape):
    """Images that were not given to fold, of another size."""
    return torch.randn(2, 3, *(shape or (17, 25))).double()


def fold_and_compare(model, *, tensor=lambda output: output, images=None):
    """Fold all gates on some images, compare on others with constant gates; return what was folded and the table."""
    model = randomize(model).double().eval()
    images = small() if images is None else images
    gates = find_gates(model, images)
    constants = constants_of(gates)
    folded, report = fold(model, constants, images)
    assert gates
    assert find_gates(folded, images) == []
    for given in (images, others()):
        expected = tensor(at_constants(model, given, gates, constants))
        wrong = tensor(at_constants(model, given, gates, {name: c * 1.01 for name, c in constants.items()}))
        with torch.no_grad():
            assert relative_error(tensor(folded(given)), expected) < EXACT
            assert relative_error(tensor(folded(given)), wrong) > 1e-5
    return folded, report.table


# ---- maps wider than one product ----
class Residual(SE):
    def forward(self, x):
        return x + super().forward(x)


class ResidualInOneLine(SE):
    def forward(self, x):
        return x + x * self.attend(x)


class WithBias(nn.Module):
    """As in chess networks: a scale by a sigmoid, and a bias."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 16)

    def forward(self, x):
        scale, bias = self.fc(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return x * torch.sigmoid(scale) + bias


class InPlace(SE):
    def forward(self, x):
        g = self.attend(x)
        x *= g
        return x


class ByEinsum(SE):
    def forward(self, x):
        return torch.einsum("nc, nchw -> nchw", self.attend(x).flatten(1), x)


@pytest.mark.parametrize("attention", [Residual, ResidualInOneLine, WithBias, InPlace, ByEinsum])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_goes_back_with_what_is_added_to_it(attention, bias):
    layer = nn.Conv2d(3, 8, 3, bias=bias)
    folded, table = fold_and_compare(nn.Sequential(layer, attention(), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    assert set(table["direction"]) == {"back"}
    assert isinstance(folded[1], nn.Identity)
    folded, table = fold_and_compare(nn.Sequential(layer, nn.SiLU(), attention(), nn.Conv2d(8, 4, 3, bias=bias)))
    assert set(table["direction"]) == {"forward"}
    folded, table = fold_and_compare(nn.Sequential(layer, nn.SiLU(), attention(), nn.ReLU6()))
    assert set(table["direction"]) == {"kept"}
    assert isinstance(folded[2], ChannelScale)


# ---- sums of branches ----
class Branches(nn.Module):
    """A sum of branches, of which some end in a norm and some in a convolution, and a third that is wrong to scale."""

    def __init__(self, third=False):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.b, self.c, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), third
        self.se = SE()

    def forward(self, x):
        y = sum([self.a(x), self.b(x)])
        return F.relu(self.se(y - self.c(x).tanh() if self.third else y))


def test_a_constant_goes_into_every_branch_of_a_sum():
    table = fold_and_compare(Branches())[1]
    assert table["into"][0] == ("a.1.weight", "a.1.bias", "b.weight", "b.bias")
    assert table["through"][0] == ("add",)
    table = fold_and_compare(Branches(third=True))[1]
    assert "back: tanh is in between" in table["reason"][0]


@pytest.mark.parametrize("block", [MobileOneBlock, RepVggBlock])
def test_blocks_of_branches_fold_before_and_after_they_are_made_one(block):
    layers = LayerFn(attn=partial(SEModule, rd_channels=4))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), block(8, 8, layers=layers), nn.Tanh())
    net = randomize(net).double().eval()
    before, table = fold_and_compare(net)
    assert list(table["direction"]) == ["back"]
    one = copy.deepcopy(net)
    one[1].reparameterize()
    images = others()
    [gate] = find_gates(net, images)
    constants = constants_of([gate])
    folded, report = fold(one, constants, small())
    assert list(report.table["direction"]) == ["back"]
    both = fold(net, constants, small())[0]
    with torch.no_grad():
        assert relative_error(one(images), net(images)) < EXACT
        assert relative_error(folded(images), both(images)) < EXACT
        assert relative_error(folded(images), one(images)) > 1e-3


# ---- where products are ----
class Times(nn.Module):
    def forward(self, x, gate):
        return x * gate


class Converted(nn.Module):
    """Every operation is a module, as converters make them; one product module serves two gates."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.times = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Times()
        self.pool, self.fc, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()
        self.fc2, self.gate2, self.head = nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.conv(x))
        gate = self.gate(self.fc(self.pool(x)))
        x = F.silu(self.times(x, gate))
        return self.head(self.times(x, self.gate2(self.fc2(self.pool(x)))))


@pytest.mark.parametrize("traced", [False, True])
def test_products_that_are_modules_are_taken_out_where_they_are_called(traced):
    net = Converted().double().eval()
    if traced:
        net = torch.fx.symbolic_trace(net)
    folded, table = fold_and_compare(net)
    assert list(table["direction"]) == ["back", "forward"]
    left = {name for name, module in folded.named_children() if module is not None}
    assert left == {"conv", "norm", "head"}


class Written(nn.Module):
    """A product that is written into a tensor, or into a part of one."""

    def __init__(self):
        super().__init__()
        self.first, self.fc, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def maps(self, images):
        x = self.first(images)
        return x, torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class IntoSlice(Written):
    def forward(self, images):
        x, g = self.maps(images)
        y = torch.zeros_like(x)
        y[:, :4] = x[:, :4] * g[:, :4]
        y[:, 4:] = x[:, 4:]
        return self.last(y)


class SliceInPlace(Written):
    def forward(self, images):
        x, g = self.maps(images)
        x[:, :4] *= g[:, :4]
        return self.last(x)


class Copied(Written):
    def forward(self, images):
        x, g = self.maps(images)
        y = torch.empty_like(x)
        y[:, :8].copy_(x * g)
        return self.last(y)


class FusedResidual(Written):
    def forward(self, images):
        x, g = self.maps(images)
        return self.last(F.silu(torch.addcmul(x, x, g)))


class FusedResidualInPlace(Written):
    def forward(self, images):
        x, g = self.maps(images)
        x.addcmul_(x, g)
        return self.last(F.silu(x))


class InPlace(Written):
    def forward(self, images):
        x, g = self.maps(images)
        x = F.silu(x)
        x.mul_(g)
        return self.last(F.silu(x))


class AddedTo(Written):
    def forward(self, images):
        x, g = self.maps(images)
        return self.last(F.silu(torch.addcmul(images.mean(1, keepdim=True)[..., 1:-1, 1:-1], x, g)))


class Accumulated(Written):
    def forward(self, images):
        x, g = self.maps(images)
        y = torch.ones_like(x)
        y.addcmul_(x, g)
        return self.last(y)


class IntoOut(Written):
    def forward(self, images):
        x, g = self.maps(images)
        y = torch.empty_like(x)
        torch.mul(x, g, out=y)
        return self.last(y)


@pytest.mark.parametrize("network", [IntoSlice, SliceInPlace, Copied])
def test_a_product_that_is_written_into_a_part_of_a_tensor_is_folded(network):
    model, images = randomize(network()).double().eval(), others()
    [gate] = find_gates(model, images)
    constant = torch.linspace(0.2, 0.9, gate.channels).double()
    folded, _ = fold(model, {gate: constant}, small())
    scale = torch.cat([constant, torch.ones(8 - gate.channels)])[:, None, None].double()
    with torch.no_grad():
        assert relative_error(folded(images), model.last(model.first(images) * scale)) < EXACT
        assert relative_error(folded(images), model(images)) > 1e-3


@pytest.mark.parametrize(
    ("network", "error", "said"),
    [
        (IntoOut, ValueError, r"out=y\) writes its result into a tensor that is given; leave it out"),
        (AddedTo, ArithmeticError, r"differs by .* with nothing merged: a product that is .* added to another map"),
        (Accumulated, ArithmeticError, r"differs by .* with nothing merged: a product that is written into another"),
    ],
)
def test_a_product_that_is_written_into_another_tensor_is_refused(network, error, said):
    model = randomize(network()).double().eval()
    [gate] = find_gates(model, small())
    with pytest.raises(error, match=said):
        fold(model, {gate: torch.linspace(0.2, 0.9, 8)}, small())


@pytest.mark.parametrize("network", [FusedResidual, FusedResidualInPlace])
def test_a_residual_by_addcmul_is_one_more_than_its_gate(network):
    model, images = randomize(network()).double().eval(), others()
    gates = find_gates(model, images)
    pair = torch.stack([torch.linspace(0.2, 0.9, 8), torch.linspace(-1, 1, 8)]).double()
    folded, report = fold(model, {gates[0]: pair}, small())
    assert list(report.table["direction"]) == ["back"]
    with torch.no_grad():
        x = model.first(images)
        expected = model.last(F.silu(x * (1 + pair[0, :, None, None]) + pair[1, :, None, None]))
        assert relative_error(folded(images), expected) < EXACT
        assert relative_error(model.last(F.silu(x * pair[0, :, None, None] + pair[1, :, None, None])), expected) > 1e-3
    scaled = Scaled(model, gates, images)
    with torch.no_grad():
        wanted = at_constants(model, images, gates, {gates[0].name: pair[0]})
        assert relative_error(scaled.run(images, {gates[0].name: pair[0]}, {})[0], wanted) < EXACT
        assert relative_error(scaled.run(images, {gates[0].name: pair[0] - 1}, {})[0], wanted) > 1e-3
    with pytest.raises(ValueError, match="applied by addcmul; write"):
        compact(model, images, [(images,)], k=1)


class Loop(nn.Module):
    """One expression that applies every gate; the layers before them are their own, or the same one."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(1 if shared else 3))
        self.gates = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)) for _ in range(3))

    def forward(self, images):
        x = self.first(images)
        for i, gate in enumerate(self.gates):
            y = self.convs[i % len(self.convs)](x)
            x = F.silu(x + y * torch.sigmoid(gate(y)))
        return self.last(x)


def test_a_loop_loses_its_gates_together_or_is_refused():
    net = randomize(Loop(shared=False)).double().eval()
    folded, table = fold_and_compare(net)
    assert list(table["direction"]) == ["back"] * 3
    gates = find_gates(net, small())
    with pytest.raises(ValueError, match="that expression runs 3 times, and would lose its gate in each run"):
        fold(net, constants_of(gates[:2]), small())
    with pytest.raises(ArithmeticError, match="or run by a loop whose other gates stay"):
        fold(net, constants_of(gates[:1]), small())
    net = randomize(Loop(shared=True)).double().eval()
    with pytest.raises(ValueError, match="that expression runs 3 times, and each run would need its own scale"):
        fold(net, constants_of(find_gates(net, small())), small())


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_users_own_stay_where_a_module_loses_its_attention(kind):
    net = Net()
    getattr(net.se, kind)(lambda m, args, out=None: 2 * args[0] + 1 if out is None else 2 * out + 1)
    images, gates = others(), find_gates(net, small())
    constants = constants_of(gates)
    folded, _ = fold(net, constants, small())
    scale = constants["se"][:, None, None]
    with torch.no_grad():
        x = net.before(images)
        expected = net.after(2 * (x * scale) + 1 if kind == "register_forward_hook" else (2 * x + 1) * scale, images)
        assert relative_error(folded(images), expected) < EXACT
        assert relative_error(net.after(x * scale, images), expected) > 1e-2


def test_a_map_that_is_averaged_to_one_number_is_taken_by_something_else():
    class Averaged(Written):
        def forward(self, images):
            x, g = self.maps(images)
            x = x * g
            return self.last(x) + x.mean()

    folded, table = fold_and_compare(randomize(Averaged()).double().eval())
    assert list(table["direction"]) == ["back"]


def test_a_map_that_is_written_in_place_keeps_its_scale():
    folded, table = fold_and_compare(randomize(InPlace()).double().eval())
    assert list(table["direction"]) == ["kept"]


def test_numbers_that_are_not_finite_are_told_so():
    net = nn.Sequential(Net(), nn.ReLU())
    net[1].register_forward_hook(lambda m, args, out: args[0] * float("nan"))
    with pytest.raises(ValueError, match="gives numbers that are not finite"):
        fold(net, {"0.se": torch.ones(8)}, small())


def test_a_gate_in_the_block_of_another_gate_keeps_its_tensors():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv, self.fc = SE(), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

        def forward(self, x):
            y = self.conv(self.inner(F.silu(x)))
            return F.silu(y * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None])

    table = fold_and_compare(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1)))[1]
    assert list(table["direction"]) == ["forward", "back"]
    assert list(table["into"]) == [("1.conv.weight",), ("1.conv.weight", "1.conv.bias")]


def test_a_gate_that_only_attention_takes_is_unused():
    class Nested(SE):
        def __init__(self):
            super().__init__()
            self.inner = SE()

        def attend(self, x):
            return super().attend(self.inner(x))

    net = Net(gate=Nested())
    gates = find_gates(net, small())
    assert [gate.name for gate in gates] == ["se.inner", "se"]
    constants = constants_of(gates)
    folded, report = fold(net, constants, small())
    assert list(report.table["direction"]) == ["unused", "back"]
    with torch.no_grad():
        assert relative_error(folded(small()), at_constants(net, small(), gates, constants)) > 0.0
    images = others()
    expected = at_constants(net, images, gates, constants)
    with torch.no_grad():
        assert relative_error(folded(images), expected) < EXACT


# ---- sites called several times ----
class Twice(Net):
    def forward(self, images):
        return self.after(self.se(F.relu(self.se(self.before(images)))), images)


def test_each_call_of_a_shared_attention_gets_its_own_constant():
    folded, table = folded_exactly(Twice(), small())
    assert list(table["gate"]) == ["se#0", "se#1"]
    assert table["direction"][0] == "back"
    model, images = Twice(), small()
    first, second = find_gates(model, images)
    constants = constants_of([second])
    folded, report = fold(model, constants, images)
    assert [gate.site for gate in find_gates(folded, images)] == ["se"]
    with torch.no_grad():
        assert relative_error(folded(images), at_constants(model, images, [second], constants)) < EXACT
        assert relative_error(folded(images), model(images)) > 1e-3


class Unit(nn.Module):
    """A layer of its own, and an attention that several units share, which hands its state on."""

    def __init__(self, attention):
        super().__init__()
        self.conv, self.norm, self.attention = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), attention

    def forward(self, x, state):
        y, state = self.attention(self.norm(self.conv(x)), state)
        return F.relu(x + y), state


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x, state):
        state = self.cell(x.mean((2, 3)), state)
        return x * torch.sigmoid(state[0])[:, :, None, None], state


class Dense(nn.Module):
    """As DIANet: one recurrent attention along all units."""

    def __init__(self):
        super().__init__()
        attention = Recurrent()
        self.stem, self.units = nn.Conv2d(3, 8, 3), nn.ModuleList(Unit(attention) for _ in range(3))

    def forward(self, x):
        x, state = self.stem(x), None
        for unit in self.units:
            x, state = unit(x, state)
        return x


def test_an_attention_shared_by_several_units_goes_into_the_layers_of_each_or_is_refused():
    model, images = randomize(Dense()).double().eval(), small()
    gates = find_gates(model, images)
    constants = constants_of(gates)
    folded, report = fold(model, constants, images)
    assert list(report.table["into"]) == [(f"units.{i}.norm.weight", f"units.{i}.norm.bias") for i in range(3)]
    given = others()
    with torch.no_grad():
        assert relative_error(folded(given), at_constants(model, given, gates, constants)) < EXACT
        assert relative_error(folded(given), model(given)) > 1e-3
    with pytest.raises(
        ValueError, match=r"gate .*#1' cannot be taken out of Recurrent\.forward: the module is called several"
    ):
        fold(model, {gates[1].name: constants[gates[1].name]}, images)


# ---- what forwards return ----
@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    note: str = "kept"


class Detections:
    """Holds tensors as attributes, some in a list."""

    def __init__(self, boxes, scores):
        self.boxes, self.rest = boxes, [scores, self]


class Pair(NamedTuple):
    first: torch.Tensor
    second: object


@pytest.mark.parametrize("kind", [Output, lambda x: Detections(x, x), lambda x: {"a": [x]}, lambda x: Pair(x, None)])
def test_outputs_of_every_kind_are_looked_into(kind):
    class Boxed(Net):
        def forward(self, images):
            return kind(super().forward(images))

    def opened(output):
        if isinstance(output, Output):
            return output.logits
        return (
            output.boxes
            if isinstance(output, Detections)
            else output["a"][0]
            if isinstance(output, dict)
            else output[0]
        )

    net = Boxed(maps=nn.SiLU(), after=nn.Conv2d(8, 4, 1))
    assert fold_and_compare(net, tensor=opened)[1]["direction"][0] == "forward"


def test_an_output_without_a_tensor_is_refused():
    class Sealed(Net):
        def forward(self, images):
            output = super().forward(images)
            return lambda: output

    with pytest.raises(ValueError, match="no tensor is seen in the network's output, a function: expected a tensor"):
        fold(Sealed(), {"se": torch.ones(8)}, small())


class ReturnsBoth(SE):
    def forward(self, x):
        w = self.attend(x)
        return x * w, w


class ReturnsAttention(SE):
    kind = tuple

    def forward(self, x):
        w = self.attend(x)
        return Pair(w, None) if self.kind is Pair else self.kind([w, None])


@pytest.mark.parametrize("kind", [None, tuple, list, Pair])
def test_attention_may_come_in_tuples_lists_and_named_tuples(kind):
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.att = ReturnsAttention() if kind else ReturnsBoth()
            self.att.kind = kind

        def forward(self, x):
            if kind is None:
                return self.att(x)[0]
            w, _ = self.att(x)
            return x * w

    folded, table = fold_and_compare(Net(gate=Uses()))
    assert table["direction"][0] == "back"


# ---- what forwards take, and train mode ----
class Block(nn.Module):
    """As in mobile networks: a drop rate that is no tensor, a branch for train mode, a method, an attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc, self.rate = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8), 0.5

    def forward(self, x, mask=None, *, drop_rate=None):
        x = self.norm(self.conv(x))
        pooled = x.mean((2, 3)) if mask is None else (x * mask).mean((2, 3))
        x = x * torch.sigmoid(self.fc(pooled))[:, :, None, None]
        if drop_rate:
            x = F.dropout(x, drop_rate, self.training)
        if self.training:
            x = x + torch.rand_like(x) * self.rate
        return x

    def describe(self):
        return f"rate {self.rate}"


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.block(x, None, drop_rate=0.1))


def test_a_folded_block_keeps_its_arguments_methods_and_train_mode():
    net = Mobile()
    folded, table = fold_and_compare(net)
    assert table["direction"][0] == "back"
    assert isinstance(folded.block, Block)
    assert folded.block.fc is None
    assert folded.block.describe() == "rate 0.5"
    images = others()
    one, two = (folded.train()(images) for _ in range(2))
    assert not torch.equal(one, two)
    folded.block.rate = 0.0
    by_hand = copy.deepcopy(net)
    by_hand.block.rate = 0.0
    by_hand.block.conv, by_hand.block.norm = folded.block.conv, folded.block.norm
    by_hand.head = folded.head
    torch.nn.init.constant_(by_hand.block.fc.weight, 0.0)
    torch.nn.init.constant_(by_hand.block.fc.bias, 100.0)  # a gate of one
    torch.manual_seed(3)
    expected = by_hand.train()(images)
    torch.manual_seed(3)
    assert relative_error(folded(images), expected) < EXACT  # the same dropout
    for restored in (copy.deepcopy(folded.eval()), pickle.loads(pickle.dumps(folded.eval()))):
        assert relative_error(restored(images), folded(images)) < EXACT
    again = fold(nn.Sequential(folded, SE(4).double()).eval(), {"1": torch.rand(4)}, small())[0]
    assert isinstance(again[0].block, Block)


class Narrow(nn.Module):
    """Attention in single precision whatever the network's, with a constant made in the forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8).float()

    def forward(self, x):
        pooled = x.float().mean((2, 3)) @ torch.eye(8, dtype=torch.float32)
        gate = torch.sigmoid(self.fc(pooled))
        return x * gate[:, :, None, None].to(x.dtype)


def test_attention_in_single_precision_folds():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Narrow(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 14, 22)
    [gate] = find_gates(net, images)
    folded, report = fold(net, {gate.name: torch.rand(8)}, images)
    assert report.table["direction"][0] != "kept"
    assert report.error < EXACT
    assert folded(images).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("noise", [lambda x: F.dropout(x, 0.5, training=True), lambda x: x + torch.rand_like(x)])
def test_a_network_that_differs_from_itself_is_told_so(noise):
    class Noisy(Net):
        def forward(self, images):
            return noise(super().forward(images))

    with pytest.raises(ValueError, match=r"the network differs from itself by .* between two runs on the same images"):
        fold(Noisy(), {"se": torch.ones(8)}, small())


def scaled_second(gate, x):
    return x * gate


class ByFunction(nn.Module):
    """Its product is in a function, of which the map is not the first argument, or not by position."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())
        self.last, self.how = nn.Conv2d(6, 4, 1), how

    def forward(self, x):
        y = F.silu(self.norm(self.conv(x)))
        if self.how == "position":
            y = scaled_second(self.attention(y), y)
        elif self.how == "keyword":
            y = scaled_second(gate=self.attention(y), x=y)
        elif self.how == "lambda":
            y = (lambda gate: y * gate)(self.attention(y))
        else:
            y = torch.einsum(self.how, y, self.attention(y).flatten(1))
        return self.last(y)


@pytest.mark.parametrize("how", ["position", "keyword"])
def test_a_product_in_a_function_gives_back_the_argument_that_it_scales(how):
    assert list(fold_and_compare(ByFunction(how))[1]["direction"]) == ["forward"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("lambda", "which argument of .* is the map; leave it out"),
        ("nchw,nc->nchw", r"which operand of torch.einsum\(self.how, .* is the map: write x \* g; leave it out"),
    ],
)
def test_a_product_is_refused_where_its_map_cannot_be_told(how, said):
    network, x = ByFunction(how).eval(), torch.randn(2, 3, 15, 17)
    [gate] = find_gates(network, x)
    with pytest.raises(ValueError, match=said):
        fold(network, {gate: torch.ones(6)}, x)
