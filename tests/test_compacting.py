"""Compact gates: a few scores per image in place of attention, equal to their formula, and better than constants."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn

import stripe
from stripe.folding import (
    CompactGate,
    Tradeoff,
    choose_source,
    compact,
    damage,
    fold,
    measure_gates,
    onnx_session,
    save_onnx,
    tradeoff,
)
from stripe.gates import find_gates, read_gates, replace_gates
from stripe.models import create_model

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def network():
    """A network whose attention depends on the image a good deal."""
    torch.manual_seed(0)
    model = create_model("resnet", depth=11, module="senet").eval()
    with torch.no_grad():
        for gate in find_gates(model, torch.randn(2, *SHAPE)):
            for parameter in model.get_submodule(str(gate.source)).parameters():
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(batch,) for batch in (torch.randn(512, *SHAPE, generator=generator) * brightness()).split(64)]


def brightness(seed=3, count=512):
    """Factors that make images differ as a whole, or their squeezes would be all alike."""
    return torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2 + 0.2


def fresh(count=32):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9)) * brightness(9, count)


def squeezes_of(model, gates, images):
    """Return every gate's squeeze of the images, by name."""
    seen = {}

    def keep(gate, kind, values):
        if kind == "squeeze":
            seen[gate.name] = values.numpy()

    with read_gates(model, gates, keep, squeeze=True):
        model(images)
    return seen


def by_formula(model, network, images):
    """Run the original with every gate, one after the other, at what its scores, in NumPy, make of its squeeze."""
    gates = find_gates(model, images[:2])
    compacts = {module.gate: module for module in network.modules() if isinstance(module, CompactGate)}
    values, squeezes = {}, {}
    for gate in gates:
        with torch.no_grad(), replace_gates(model, gates, values):
            seen = squeezes_of(model, gates, images)
        squeezes[gate.name] = seen[gate.name]
        module = compacts[gate.name]
        source = next(name for name in squeezes if compacts[name].scores is module.scores)
        weight, bias = (each.detach().numpy() for each in (module.scores.weight, module.scores.bias))
        scores = squeezes[source] @ weight.T + bias
        attention = module.constant.detach().numpy() + scores @ module.directions.detach().numpy()
        values[gate.name] = torch.from_numpy(np.clip(attention, module._low, module._high))
    with torch.no_grad(), replace_gates(model, gates, values):
        return model(images)


@pytest.mark.parametrize("source", [None, "layer1.0"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_compact_network_equals_its_formula_on_fresh_images(network, batches, source, steps):
    double = copy.deepcopy(network).double()
    images = [(batch.double(),) for (batch,) in batches]
    small, report = compact(double, images[0][0][:2], images, k=2, source=source, steps=steps)
    x = fresh().double()
    expected = by_formula(double, small, x)
    assert (small(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (small(x) - double(x)).abs().max() > 1e-6 * expected.abs().max()
    assert list(report.table["source"]) == [source or name for name in report.table["gate"]]
    modules = {module for module in small.modules() if type(module).__module__.startswith("stripe.attention")}
    assert not modules


def test_scores_come_nearer_to_the_original_than_constants_and_more_of_them_nearer(network, batches):
    probe = batches[0][0][:2]
    held_out = [(fresh(128),)]
    uses = measure_gates(network, find_gates(network, probe), batches)
    folded, _ = fold(network, {name: use.constant("energy") for name, use in uses.items()}, probe)
    constant = damage(folded, network, held_out).divergence
    one, four = (
        damage(compact(network, probe, batches, k=k, steps=0)[0], network, held_out).divergence for k in (1, 4)
    )
    assert four < one < constant / 2


def test_learning_brings_the_outputs_nearer(network, batches):
    probe, held_out = batches[0][0][:2], [(fresh(128),)]
    before, after = (
        damage(compact(network, probe, batches, k=1, source="layer2.0", steps=steps)[0], network, held_out).divergence
        for steps in (0, 12)
    )
    assert after < before


def test_gates_without_scores_are_folded_and_those_before_the_source_too(network, batches):
    probe = batches[0][0][:2]
    small, report = compact(network, probe, batches, k={"layer3.0": 1}, steps=1)
    assert list(report.table["scores"]) == [0, 0, 1]
    assert [module.gate for module in small.modules() if isinstance(module, CompactGate)] == ["layer3.0"]
    assert report.parameters == 3 * 256 + 1  # c, U and the scores' weights, and one bias
    _, report = compact(network, probe, batches, k=2, source="layer2.0", steps=1)
    assert list(report.table["scores"]) == [0, 2, 2]
    assert list(report.table["source"]) == ["", "layer2.0", "layer2.0"]
    folded, report = compact(network, probe, batches, k=0, steps=1)
    assert not find_gates(folded, probe)
    assert report.parameters == 0


def test_a_gate_that_is_linear_in_its_squeeze_is_held_whole_by_as_many_scores():
    """Attention of known rank: two directions, linear in the squeeze, far from the bounds."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.mix = nn.Linear(8, 2)
            self.spread = nn.Linear(2, 8)

        def forward(self, x):
            x = self.conv(x)
            return (x * self.gate(x)).mean((2, 3))

        def gate(self, x):
            return self.spread(self.mix(x.mean((2, 3)))).clamp(-5, 5)[:, :, None, None]

    torch.manual_seed(0)
    model = Linear().double().eval()
    images = [(torch.randn(64, 3, 12, 12, dtype=torch.float64) * brightness(1, 64),) for _ in range(2)]
    x = torch.randn(16, 3, 12, 12, dtype=torch.float64) * 0.5
    found = {}
    for k in (1, 2):
        small, report = compact(model, images[0][0][:2], images, k=k, steps=0)
        with torch.no_grad():
            error = (small(x) - model(x)).abs().max() / model(x).abs().max()
        found[k] = float(error), report.table["explained"][0]
    assert found[2][0] < 5e-3  # what the ridge takes off
    assert found[2][1] > 0.999
    assert found[1][0] > 5 * found[2][0]


@pytest.mark.equal_bits
@pytest.mark.parametrize("source", [None, "layer1.0"])
def test_compact_networks_are_copied_pickled_and_exported(network, batches, tmp_path, source):
    small, _ = compact(network, batches[0][0][:2], batches, k=2, source=source, steps=0)
    x = fresh(4)
    expected = small(x)
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    assert all(parameter.is_contiguous() for parameter in small.parameters())  # or torch.export.save warns
    file = save_onnx(small, x[:2], tmp_path / "small.onnx")
    session = onnx_session(file.path if hasattr(file, "path") else tmp_path / "small.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    np.testing.assert_allclose(found, expected[:2].detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_source_is_the_gate_whose_scores_tell_of_the_others():
    """Of three gates the second one's squeeze holds the number that drives it and the third; the first is constant."""

    class Driven(nn.Module):
        def __init__(self, places):
            super().__init__()
            self.lift, self.places = nn.Conv2d(3, 8, 1), places

        def forward(self, x):
            driver, x = x[:, :1].mean((2, 3)), self.lift(x * torch.tensor([0.0, 1.0, 1.0])[:, None, None])
            for i, place in enumerate(self.places):
                x = torch.cat([x[:, :7], driver[:, :, None, None] + 0 * x[:, :1]], 1) if i == 1 else x
                gate = torch.sigmoid((driver if place else 0 * driver) + torch.linspace(-1, 1, 8))
                x = x * gate[:, :, None, None] + (0.1 if i < 2 else 0)
            return x.mean((2, 3))

    torch.manual_seed(0)
    model = Driven([0, 1, 1]).eval()
    batches = [(torch.randn(64, 3, 12, 12) + 3 * torch.randn(64, 3, 1, 1),) for _ in range(4)]
    gates = [gate.name for gate in find_gates(model, batches[0][0][:3])]
    assert choose_source(model, batches[0][0][:3], batches, k=1) == gates[1]


@pytest.fixture(scope="module")
def curve(network, batches):
    labels = network(fresh(96)).argmax(1)
    labels[:48] = torch.arange(48) % 10
    held_out = [(images, its) for images, its in zip(fresh(96).split(32), labels.split(32), strict=True)]
    asked = {"ranks": [0, 1, 4], "sources": [None, "layer1.0"], "steps": 1, "held_out": held_out[:1]}
    return tradeoff(network, batches[0][0][:2], batches, held_out, **asked), held_out


def test_a_tradeoff_is_what_each_network_costs(network, curve):
    found, held_out = curve
    table = found.table.set_index("network")
    assert list(table.index) == ["original", "k0", "k1", "k1-layer1.0", "k4", "k4-layer1.0"]
    assert list(table["numbers"]) == [448, 0, 3, 1, 12, 4]
    assert found.measure == "accuracy"
    for name, row in table.iterrows():
        measured = damage(found.networks[name], network, held_out)
        assert row["divergence"] == pytest.approx(measured.divergence, abs=1e-9)
        assert row["worth"] == pytest.approx(measured.accuracy)
        assert row["drop"] == pytest.approx(table["worth"]["original"] - measured.accuracy)
        assert row["divergence_low"] <= row["divergence"] <= row["divergence_high"]
    assert table["divergence"]["k1"] < table["divergence"]["k0"] / 2
    assert table["parameters"]["k0"] < table["parameters"]["k1-layer1.0"] < table["parameters"]["k1"]
    assert table["parameters"]["k1"] < table["parameters"]["original"]


def test_networks_are_compared_image_by_image(network, curve):
    """The interval is of differences on the same images: none where all answers are the same, as those of a copy."""
    found, held_out = curve
    original = found.table.iloc[0]
    assert (original["drop_low"], original["drop_high"], original["divergence_high"]) == (0, 0, 0)
    alone = tradeoff(network, held_out[0][0][:2], held_out, [(images,) for images, _ in held_out], ranks=[0], steps=1)
    assert alone.measure == "agreement"
    with torch.no_grad():
        found, wanted = (net(fresh(96)).double().softmax(1).numpy() for net in (alone.networks["k0"], network))
    away = scipy.special.rel_entr(wanted, found).sum(1)
    low, high = scipy.stats.t.interval(0.95, 95, away.mean(), scipy.stats.sem(away))
    assert alone.table["divergence_low"][1] == pytest.approx(low, rel=1e-3)
    assert alone.table["divergence_high"][1] == pytest.approx(high, rel=1e-3)


def test_the_fewest_numbers_that_cost_little_enough_are_chosen(curve):
    rows = [("original", 9, 0.0, 0.0), ("k0", 0, 0.3, 2.0), ("k1", 3, 0.2, 0.4), ("k4", 4, 0.1, 0.1)]
    table = pd.DataFrame(rows, columns=["network", "numbers", "divergence", "drop"])
    found = Tradeoff(table, "accuracy", {})
    assert [found.chosen(drop) for drop in (5.0, 0.5, 0.2, 0.0)] == ["k0", "k1", "k4", "k4"]
    held_out = Tradeoff(table.assign(validation_drop=[0, 0, 0, 0]), "accuracy", {})
    assert held_out.chosen(0.5) == "k0"


def test_the_original_is_left_as_it_is(network, batches):
    before = copy.deepcopy(network.state_dict())
    compact(network, batches[0][0][:2], batches, k=1, steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_cannot_be_compact_is_refused(network, batches):
    probe = batches[0][0][:2]
    with pytest.raises(ValueError, match="no gate is named 'layer9'"):
        compact(network, probe, batches, k={"layer9": 1})
    with pytest.raises(ValueError, match="no gate is named 'layer9'"):
        compact(network, probe, batches, k=1, source="layer9")
    with pytest.raises(ValueError, match="expected 0 or more"):
        compact(network, probe, batches, k=-1)
    with pytest.raises(ValueError, match="expected k above 0"):
        compact(network, probe, batches, k=0, source="layer1.0")
    with pytest.raises(ValueError, match="no gates"):
        compact(create_model("resnet", depth=11).eval(), probe, batches, k=1)
    splits = stripe.models.load_checkpoint("timm:resnest14d")
    with pytest.raises(ValueError, match="radix; only multiplicative and additive"):
        compact(splits, torch.randn(2, 3, 64, 64), batches, k=1)
