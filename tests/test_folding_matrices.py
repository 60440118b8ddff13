"""Matrices in the places of gates: their fit, their merges, and a network for which nothing less will do."""

import copy

import numpy as np
import pytest
import torch
from timm.layers import SEModule
from torch import nn

import stripe
from stripe import folding
from tests.conftest import randomize, relative_error
from tests.folds import EXACT, Net


def mixing(channels, seed=0):
    """A matrix near a diagonal, and a shift."""
    rng = np.random.default_rng(seed)
    return np.hstack([np.diag(rng.uniform(0.2, 1.2, channels)), np.zeros((channels, 1))]) + 0.1 * rng.normal(
        size=(channels, channels + 1)
    )


def by_hand(model, images, site, mix):
    """The network with the module at `site` doing mix @ x + shift, without any of stripe's code."""
    matrix, shift = torch.from_numpy(mix[:, :-1]), torch.from_numpy(mix[:, -1])[:, None, None]
    model = copy.deepcopy(model)
    model.get_submodule(site).register_forward_hook(
        lambda m, args, out: torch.einsum("dc,nchw->ndhw", matrix, args[0]) + shift
    )
    with torch.no_grad():
        return model(images)


def unshifted(mix):
    return mix * np.array([*[1.0] * len(mix), 0.0])


CASES = {
    "a norm and a convolution": (Net, {}, mixing(8), "back", ("before.1.weight", "before.1.running_mean")),
    "a convolution with a bias": (Net, {"before": nn.Conv2d(3, 8, 3)}, mixing(8), "back", ("before.weight",)),
    "a convolution without one": (
        Net,
        {"before": nn.Conv2d(3, 8, 3, bias=False)},
        mixing(8),
        "back",
        ("before.weight", "before.bias"),
    ),
    "the convolution after": (
        Net,
        {"maps": nn.SiLU(), "after": nn.Conv2d(8, 5, 1)},
        mixing(8),
        "forward",
        ("after.weight", "after.bias"),
    ),
    "a padded convolution after, unshifted": (
        Net,
        {"maps": nn.SiLU(), "after": nn.Conv2d(8, 5, 3, padding=1)},
        unshifted(mixing(8)),
        "forward",
        ("after.weight",),
    ),
    "a padded convolution after": (
        Net,
        {"maps": nn.SiLU(), "after": nn.Conv2d(8, 5, 3, padding=1)},
        mixing(8),
        "kept",
        (),
    ),
    "groups on either side": (
        Net,
        {"before": nn.Conv2d(3, 8, 3), "maps": nn.Conv2d(8, 8, 3, groups=8), "after": nn.Conv2d(8, 8, 3, groups=2)},
        mixing(8),
        "kept",
        (),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_is_merged_exactly_or_kept(case):
    kind, parts, mix, direction, into = CASES[case]
    torch.manual_seed(0)
    net = kind(**copy.deepcopy(parts))
    images, others = torch.randn(3, 3, 14, 22).double(), torch.randn(2, 3, 19, 11).double()
    folded, report = folding.fold(net, {"se": mix}, images)
    [row] = report.table.itertuples()
    assert row.direction == direction, row.reason
    assert set(into) <= set(row.into)
    expected = by_hand(net, others, "se", mix)
    with torch.no_grad():
        assert relative_error(folded(others), expected) < EXACT
        assert relative_error(net(others), expected) > 1e-3
    assert relative_error(by_hand(net, others, "se", np.hstack([mix[:, :-1].T, mix[:, -1:]])), expected) > 1e-3
    assert len([m for m in folded.modules() if isinstance(m, folding.ChannelMix)]) == (direction == "kept")


def test_matrices_and_constants_are_merged_beside_each_other():
    """The convolution between takes the first gate's vector at its inputs, and the second's matrix at its outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), SEModule(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), SEModule(6), nn.SiLU()
    )
    randomize(net).double().eval()
    nn.init.zeros_(net[4].weight[2:3])  # a channel that its norm closes
    images, others = torch.randn(3, 3, 14, 22).double(), torch.randn(2, 3, 19, 11).double()
    vector, mix = np.linspace(0.2, 1.4, 8), mixing(6)
    folded, report = folding.fold(net, {"2": vector, "5": mix}, images)
    assert list(report.table["direction"]) == ["forward", "back"]
    matrix = np.hstack([np.diag(vector), np.zeros((8, 1))])
    constant = copy.deepcopy(net)
    constant[2].register_forward_hook(lambda m, args, out: args[0] * torch.from_numpy(vector)[:, None, None])
    expected = by_hand(constant, others, "5", mix)
    with torch.no_grad():
        assert relative_error(folded(others), expected) < EXACT
        also, _ = folding.fold(net, {"2": matrix, "5": mix}, images)
        assert relative_error(also(others), expected) < EXACT
        assert relative_error(constant(others), expected) > 1e-3


def test_a_matrix_that_is_kept_is_written_to_onnx(tmp_path):
    net = Net(maps=nn.SiLU(), after=nn.Conv2d(8, 5, 3, padding=1)).float()
    images = torch.randn(3, 3, 14, 22)
    folded, report = folding.fold(net, {"se": mixing(8)}, images)
    assert list(report.table["direction"]) == ["kept"]
    file = folding.save_onnx(folded, images, tmp_path / "folded.onnx")
    assert file.relative_error < 1e-5
    assert "GlobalAveragePool" not in file.operators
    assert "ReduceMean" not in file.operators


def test_a_gate_that_no_matrix_can_stand_for_is_refused_one():
    import timm

    net = timm.create_model("resnest14d").eval()
    gate = stripe.find_gates(net, torch.rand(2, 3, 64, 96))[0]
    with pytest.raises(ValueError, match=rf"expected \({gate.channels},\), or \(2, {gate.channels}\) with a shift$"):
        folding.fold(net, {gate: mixing(gate.channels)}, torch.rand(2, 3, 64, 96))


# ---- a gate that tells images apart by what its other channel holds ----
class Pair(nn.Module):
    """Of two channels, p passes where q is bright: q is p on some images and -p on others, so it is (p + q) / 2."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:2, :, None, None])
            self.fc.weight.copy_(torch.tensor([[0.0, 60.0], [0.0, 0.0]])[..., None, None])
            self.fc.bias.zero_()
            self.head.weight.copy_(torch.eye(2)[..., None, None])
            self.head.bias.zero_()

    def forward(self, x):
        x = self.conv(x)
        return self.head(x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True))))


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(count, 1, 6, 8, generator=generator) + 0.2
    sign = torch.tensor([1.0, -1.0]).repeat(count // 2)[:, None, None, None]
    return torch.cat([p, sign * p, torch.zeros_like(p)], 1)


TRUTH = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.0]])


def test_the_fit_finds_the_matrix_that_a_gate_is():
    net = Pair().eval()
    gates = stripe.find_gates(net, pairs(4, 0))
    batches = [(pairs(20, seed),) for seed in (1, 2)]
    uses = folding.measure_gates(net, gates, batches)
    [fitted] = folding.fit_matrices(net, gates, uses, batches).values()
    np.testing.assert_allclose(fitted, TRUTH, atol=1e-3)
    energy = uses[gates[0].name].constant("energy")
    assert np.abs(np.diag(energy) - TRUTH[:, :2]).max() > 0.4


def test_the_fit_leaves_the_least_error_over_all_positions():
    torch.manual_seed(0)
    net = Net()
    images = (torch.randn(24, 3, 14, 22) * torch.linspace(0.2, 2, 24).view(-1, 1, 1, 1)).double()
    nn.init.normal_(net.se.fc2.weight, 0, 2)
    gates, batches = stripe.find_gates(net, images[:3]), [(images[:10],), (images[10:],)]
    uses = folding.measure_gates(net, gates, batches)
    fitted = folding.fit_matrices(net, gates, uses, batches)["se"]
    with torch.no_grad():
        x = net.before(images)
        x, given = (each.transpose(0, 1).flatten(1).T.numpy() for each in (x, net.se(x)))
    rows = np.hstack([x, np.ones((len(x), 1))])
    best, *_ = np.linalg.lstsq(rows, given, rcond=None)
    wrong, least, energy = (
        np.square(given - rows @ mix).sum()
        for mix in (fitted.T, best, np.vstack([np.diag(uses["se"].constant("energy")), np.zeros(8)]))
    )
    assert least <= wrong < least * (1 + 1e-4)
    assert energy > 1.005 * least


def test_the_study_takes_matrices_where_they_are_nearer_than_all_else():
    net = Pair().eval()
    calibration, held_out = [(pairs(20, 1),), (pairs(20, 2),)], [(pairs(20, 3), torch.full((20,), -1))]
    found = folding.study(net, pairs(4, 0), calibration, held_out, None, recoveries={}, learning_steps=30)
    left = found.variants.set_index("weighting")["divergence"]
    assert found.chosen.weighting == "matrix"
    assert left["matrix"] < 0.01 < 0.3 < left.drop(["none", "matrix"]).min()
    assert found.variants["error"].max() < EXACT
    expected = by_hand(nn.Sequential(net.conv, nn.Identity(), net.head).double(), pairs(20, 3).double(), "1", TRUTH)
    with torch.no_grad():
        assert relative_error(found.chosen.network.double()(pairs(20, 3).double()), expected) < 0.01
