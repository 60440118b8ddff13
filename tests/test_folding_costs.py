"""What folding costs and how it is won back: constants, damage and order, recovery, variants."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from stripe import folding
from stripe.data import Loader, load_images
from stripe.gates import find_gates, replace_gates
from stripe.models import create_model
from stripe.recorder import Recorder
from stripe.stats import stripe_strength
from stripe.store import open_run
from tests.conftest import randomize, relative_error

IMAGES = torch.randn(12, 3, 40, 48, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, 12).view(
    -1, 1, 1, 1
)


@pytest.fixture(scope="module")
def network():
    """Its attention depends on the image, as that of fresh weights hardly does."""
    torch.manual_seed(0)
    model = randomize(create_model("resnet", depth=11, module="senet")).eval()
    for name, weight in model.named_parameters():
        if "attention_module.fc" in name:
            nn.init.normal_(weight, 0.2)
    return model


@pytest.fixture(scope="module")
def gates(network):
    return find_gates(network, IMAGES[:2])


@pytest.fixture(scope="module")
def exact_network(network):
    """In float64: float32 rounds a logit of -65 by 4e-6, which is the relative error of its sigmoid."""
    return copy.deepcopy(network).double()


@pytest.fixture(scope="module")
def uses(network, gates):
    return folding.measure_gates(network, gates, [(IMAGES[:5],), (IMAGES[5:],)])


def values_and_maps(network, gate):
    """A gate's values (N, C) and what it scales (N, C, H, W) in float64, by plain hooks on its block."""
    block, seen = network.get_submodule(gate.site), {}
    hooks = [
        block.attention_module.register_forward_hook(lambda m, i, out: seen.update(g=out.flatten(1))),
        block.bn3.register_forward_hook(lambda m, i, out: seen.update(x=out)),
    ]
    with torch.no_grad():
        network(IMAGES.double())
    for hook in hooks:
        hook.remove()
    return seen["g"], seen["x"]


# ---- constants ----
def test_the_energy_weighted_constant_leaves_the_least_error(exact_network, gates):
    images = IMAGES.double()
    uses = folding.measure_gates(exact_network, gates, [(images[:5],), (images[5:],)])
    for gate in gates:
        g, x = values_and_maps(exact_network, gate)
        energies = x.square().mean((2, 3))
        result = (g[:, :, None, None] * x).square().sum()
        best = ((g[:, :, None, None] * x * x).sum((0, 2, 3)) / x.square().sum((0, 2, 3))).numpy()
        use = uses[gate.name]
        np.testing.assert_allclose(use.constant("energy"), best, rtol=1e-10)
        np.testing.assert_allclose(use.constant("mean"), g.mean(0), rtol=1e-10)
        assert np.abs(use.constant("mean") - best).max() > 1e-4
        for weighting in folding.AVERAGES:
            c = torch.from_numpy(use.constant(weighting))[:, None, None]
            wrong = ((g[:, :, None, None] - c) * x).square().sum()
            assert use.error(use.constant(weighting)) == pytest.approx(float(wrong / result), rel=1e-10)
        assert use.error(use.constant("energy")) < use.error(use.constant("mean"))
        assert energies.shape == g.shape


def test_measuring_in_parts_changes_nothing(exact_network, gates):
    images = IMAGES.double()
    whole, parts, half = (
        folding.measure_gates(exact_network, gates, batches)
        for batches in ([(images,)], [(images[:5],), (images[5:],)], [(images[:5],)])
    )
    for name, use in parts.items():
        for field in ("energy", "scaled", "result"):
            np.testing.assert_allclose(getattr(use, field), getattr(whole[name], field), rtol=1e-10)
        np.testing.assert_allclose(use.values.mean, whole[name].values.mean, rtol=1e-10)
    assert np.abs(half["layer1.0"].energy / whole["layer1.0"].energy - 1).max() > 1e-3


def test_a_channel_without_energy_has_its_mean_and_no_error(gates, uses):
    use = uses[gates[0].name]
    silent = folding.GateUse(use.values, *(np.zeros_like(use.energy) for _ in range(3)))
    np.testing.assert_array_equal(silent.constant("energy"), use.values.mean)
    assert silent.error(silent.constant("mean")) == 0.0


def test_an_added_gate_is_weighted_by_nothing():
    import timm

    model = randomize(timm.create_model("gcresnet33ts")).eval()
    images = torch.rand(3, 3, 64, 96)
    gate = find_gates(model, images)[0]
    use = folding.measure_gates(model, [gate], [(images,)])[gate.name]
    assert gate.form == "additive"
    np.testing.assert_array_equal(use.energy, 1.0)
    np.testing.assert_allclose(use.constant("energy"), use.constant("mean"), rtol=1e-12)


def test_the_means_of_a_run_are_its_stripes(network, gates, tmp_path):
    loader = Loader(load_images("digits", "test", samples=10), 5)
    for epoch in (1, 2):
        with Recorder(network, gates, tmp_path / "run") as recorder:
            recorder.record(loader, epoch=epoch)
    run = open_run(tmp_path / "run")
    constants = folding.mean_constants(run)
    assert list(constants) == [gate.name for gate in gates]
    for name, vector in constants.items():
        np.testing.assert_allclose(vector, run.attention(name, 2).mean(0, dtype=np.float64), rtol=1e-12)


def test_constants_may_be_read_only(network, gates, uses):
    constants = {name: use.constant("mean").copy() for name, use in uses.items()}
    for vector in constants.values():
        vector.flags.writeable = False
    assert folding.fold(network, constants, IMAGES[:3])[1].error < 1e-12
    assert set(folding.sensitivity(network, gates, constants, closeness(network))) == set(constants)


def test_bad_weightings_and_empty_loaders_are_refused(network, gates, uses):
    with pytest.raises(ValueError, match="no constant 'median'; expected one of mean, energy"):
        uses[gates[0].name].constant("median")
    with pytest.raises(RuntimeError, match="no forward ran"):
        folding.measure_gates(network, gates, [])


# ---- constants that look at what comes of them ----
def test_what_is_foretold_is_what_a_gate_costs_that_hardly_leaves_its_mean(network, gates):
    """To second order, from gradients alone; the divergence is measured with the gate folded."""
    network, gate, images = copy.deepcopy(network).double(), gates[1], IMAGES.double()
    network.get_submodule(f"{gate.source}.fc2").weight.data *= 0.1
    use = folding.measure_gates(network, [gate], [(images,)])[gate.name]
    constants = {gate.name: use.values.mean}
    draws = [folding.foretell(network, [gate], constants, images[:3], [(images,)], seed=seed) for seed in range(8)]
    folded, _ = folding.fold(network, constants, images[:3])
    measured = folding.damage(folded, network, [(images,)]).divergence
    assert np.mean([draw[gate.name].divergence for draw in draws]) == pytest.approx(measured, rel=0.6)
    moved = {gate.name: use.values.mean + 10 * np.sqrt(use.values.m2 / use.values.count)}
    far = folding.foretell(network, [gate], moved, images[:3], [(images,)])[gate.name].divergence
    assert far > 10 * measured


def test_learned_constants_come_nearer_than_energy_on_images_that_they_have_not_seen(network, gates, uses):
    draw = torch.randn(24, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    images = draw * torch.linspace(0.2, 2, 12).repeat(2).view(-1, 1, 1, 1)
    uses = folding.measure_gates(network, gates, [(images,)])
    learned = folding.learn_constants(network, gates, uses, IMAGES[:3], [(images,)], steps=30)
    assert {name: vector.shape for name, vector in learned.items()} == {g.name: (2, g.channels) for g in gates}

    def away(constants):
        folded, report = folding.fold(network, constants, IMAGES[:3])
        assert report.error < 1e-12
        return folding.damage(folded, network, [(IMAGES,)]).divergence

    energy = {name: use.constant("energy") for name, use in uses.items()}
    assert away(learned) < 0.8 * away(energy)
    still = folding.learn_constants(network, gates, uses, IMAGES[:3], [(images,)], steps=0)
    assert away(still) == pytest.approx(away(energy), rel=1e-3)
    with pytest.raises(ValueError, match="no batches to train on"):
        folding.learn_constants(network, gates, uses, IMAGES[:3], [])
    with pytest.raises(FloatingPointError, match="lower its rate"):
        folding.learn_constants(network, gates, uses, IMAGES[:3], [(IMAGES[:2] * float("nan"),)])


def test_a_gate_by_a_normaliser_of_ones_own_is_foretold_and_learned():
    class Softplus(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            x = x * nn.functional.softplus(self.fc(x.mean((2, 3), keepdim=True)))
            return self.last(x.relu()).mean((2, 3))

    net, asked = randomize(Softplus()).eval(), {"normalisers": ["softplus"]}
    gates = find_gates(net, IMAGES[:3], **asked)
    uses = folding.measure_gates(net, gates, [(IMAGES,)])
    constants = {name: use.constant("energy") for name, use in uses.items()}
    foretold = folding.foretell(net, gates, constants, IMAGES[:3], [(IMAGES,)], **asked)
    learned = folding.learn_constants(net, gates, uses, IMAGES[:3], [(IMAGES,)], steps=3, **asked)
    for name, constant in constants.items():
        assert foretold[name].divergence > 0
        assert np.abs(learned[name][0] - constant).max() > 1e-4
    with pytest.warns(UserWarning, match="not normalised"), pytest.raises(ValueError, match="no gates to fold"):
        folding.learn_constants(net, gates, uses, IMAGES[:3], [(IMAGES,)], steps=3)


def test_the_fisher_constant_follows_the_samples_that_the_output_listens_to():
    """Half of the images have their gate's channel multiplied by zero afterwards, so only the others count."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            heard = x[:, 2:].mean((2, 3))
            x = x[:, :2]
            x = x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))
            return (x.mean((2, 3)) * heard).sum(1, keepdim=True)

    torch.manual_seed(0)
    net = Net().eval()
    images = torch.rand(20, 3, 6, 8) + 0.5
    images[::2] *= torch.tensor([3.0, 3.0, 0.0]).view(3, 1, 1)
    gate = find_gates(net, images[:3])[0]
    means = {gate.name: folding.measure_gates(net, [gate], [(images,)])[gate.name].values.mean}
    found = folding.foretell(net, [gate], means, images[:3], [(images,)], kind="values")[gate.name]
    with torch.no_grad():
        x = images[:, :2].mean((2, 3))
        g = torch.sigmoid(net.fc(x[..., None, None])).flatten(1).double()
        weight = (x * images[:, 2:].mean((2, 3))).square().double()
    np.testing.assert_allclose(found.constant, (weight * g).sum(0) / weight.sum(0), rtol=1e-5)
    assert np.abs(found.constant - means[gate.name]).max() > 1e-3


@pytest.mark.parametrize("name", ["gcresnet33ts", "efficientnet_b0", "resnest14d", "regnety_002"])
def test_a_shift_is_folded_exactly_on_other_images(name):
    import timm

    torch.manual_seed(0)
    model = randomize(timm.create_model(name)).double().eval()
    images, others = (torch.rand(2, 3, *size).double() for size in ((64, 96), (96, 64)))
    gates = find_gates(model, images)
    shifts = {gate.name: torch.randn(gate.channels).double() * 0.1 for gate in gates}
    constants = {gate.name: torch.rand(gate.channels).double() + 0.2 for gate in gates}
    both = {name: torch.stack([constants[name], shifts[name]]) for name in constants}
    folded, report = folding.fold(model, both, images)
    with torch.no_grad():
        with replace_gates(model, gates, constants, shifts):
            expected = model(others)
        with replace_gates(model, gates, constants):
            without = model(others)
        assert relative_error(folded(others), expected) < 1e-11
        assert relative_error(without, expected) > 1e-6
    assert find_gates(folded, images) == []
    assert report.error < 1e-12


# ---- damage and order ----
def closeness(network):
    """A metric: minus the squared distance of the logits from those of the network as it is."""
    with torch.no_grad():
        wanted = network(IMAGES)

        def metric(model):
            with torch.no_grad():
                return -float((model(IMAGES) - wanted).square().mean())

    return metric


def fixed(network, constants, names):
    """The network with the attention modules of some blocks replaced by constants, without any of stripe's hooks."""

    class Fixed(nn.Module):
        def __init__(self, vector):
            super().__init__()
            self.vector = torch.from_numpy(vector).float()

        def forward(self, x):
            return self.vector.view(1, -1, 1, 1).expand(len(x), -1, -1, -1)

    network = copy.deepcopy(network)
    for name in names:
        network.get_submodule(name).attention_module = Fixed(constants[name])
    return network


def test_damage_and_greedy_order_are_those_of_brute_force(network, gates, uses):
    constants = {name: use.constant("mean") + 0.3 for name, use in uses.items()}
    metric = closeness(network)
    damage = folding.sensitivity(network, gates, constants, metric)
    expected = {gate.name: -metric(fixed(network, constants, [gate.name])) for gate in gates}
    assert damage == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 0
    order, left = [], [gate.name for gate in gates]
    while left:
        best = max(left, key=lambda name: metric(fixed(network, constants, [*order, name])))
        order.append(best)
        left.remove(best)
    assert folding.greedy_order(network, gates, constants, metric, damage=damage) == order
    assert order != sorted(order, reverse=True)


def test_one_gate_is_an_order(network, gates, uses):
    def metric(model):
        raise AssertionError("nothing to compare")

    assert folding.greedy_order(network, gates[:1], {}, metric, damage={gates[0].name: 1.0}) == [gates[0].name]


def test_predictors_are_ranked_against_the_damage(gates, uses):
    errors = {name: use.error(use.constant("energy")) for name, use in uses.items()}
    table = folding.rank_correlations(uses, errors).set_index("predictor")
    assert table["rho"]["energy error"] == pytest.approx(1.0)
    backwards = folding.rank_correlations(uses, {name: -error for name, error in errors.items()})
    assert backwards.set_index("predictor")["rho"]["energy error"] == pytest.approx(-1.0)
    values = folding.predictors(uses)
    assert list(values.index) == [gate.name for gate in gates]
    strength = stripe_strength(uses[gates[0].name].values)
    assert values["1 - strength"].iloc[0] == 1 - strength.strength
    assert values["within"].iloc[0] == strength.within
    assert folding.rank_correlations(uses, dict.fromkeys(uses, 0.0))["rho"].isna().all()


# ---- recovery ----
class Batches:
    """Training batches of the same images, in another order each epoch."""

    samples = 12

    def __init__(self, images=IMAGES):
        self.images, self.epochs = images, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return 2

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epochs[-1]))
        yield from ((self.images[part], None) for part in order.split(6))


def test_reestimated_norms_hold_the_average_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.9)).eval()
    batches = [(IMAGES[:6], None), (3 * IMAGES[6:], None), (torch.full_like(IMAGES, 99.0), None)]
    again = folding.reestimate_norms(model, batches, batches=2)
    mean = (batches[0][0].mean((0, 2, 3)) + batches[1][0].mean((0, 2, 3))) / 2
    torch.testing.assert_close(again[1].running_mean, mean)
    assert again[1].momentum == 0.3
    assert not any(module.training for module in again.modules())
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    all_of_them = folding.reestimate_norms(model, batches)
    assert (all_of_them[1].running_mean - mean).abs().min() > 1


def test_distillation_brings_the_student_nearer_and_leaves_the_rest(network, gates, uses):
    student, _ = folding.fold(network, {name: use.constant("mean") + 0.5 for name, use in uses.items()}, IMAGES[:3])
    states = [copy.deepcopy(model.state_dict()) for model in (student, network)]

    def distance(model):
        with torch.no_grad():
            given, wanted = (m(IMAGES).log_softmax(1) for m in (model, network))
        return float(nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))

    batches = Batches()
    taught = folding.distill(student, network, batches, steps=40, lr=0.005)
    assert distance(taught) < 0.5 * distance(student)
    assert batches.epochs == list(range(1, 21))
    for model, state in zip((student, network), states, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    untaught = folding.distill(student, network, Batches(), steps=0)
    assert all(torch.equal(untaught.state_dict()[name], value) for name, value in student.state_dict().items())
    with pytest.raises(ValueError, match="amp 'fp8': expected no or bf16"):
        folding.distill(student, network, Batches(), steps=1, amp="fp8")
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        folding.distill(student, network, Batches(IMAGES * float("nan")), steps=1)


def test_variants_are_all_of_them(network, gates, uses):
    constants = {kind: {name: use.constant(kind) for name, use in uses.items()} for kind in folding.AVERAGES}
    order = [gate.name for gate in gates][::-1]
    scaled = {**folding.AS_FOLDED, "scaled": lambda model: nn.Sequential(model, nn.Identity())}
    found = list(folding.variants(network, IMAGES[:3], order, constants, counts=[0, 1, 3], recoveries=scaled))
    labels = [(variant.folded, variant.weighting, variant.recovery) for variant in found]
    both = ("none", "scaled")
    each = [(count, kind, recovery) for count in (1, 3) for kind in folding.AVERAGES for recovery in both]
    assert labels == [(0, "none", "none"), (0, "none", "scaled"), *each]
    assert found[0].network is network
    assert [gate.name for gate in find_gates(found[2].network, IMAGES[:3])] == order[:0:-1]
    wanted = {name: torch.from_numpy(constants["energy"][name]).float() for name in order}
    with torch.no_grad(), replace_gates(network, gates, wanted):
        expected = network(IMAGES)
    with torch.no_grad():
        by_labels = dict(zip(labels, found, strict=True))
        assert relative_error(by_labels[3, "energy", "none"].network(IMAGES), expected) < 1e-5
        assert relative_error(by_labels[3, "mean", "none"].network(IMAGES), expected) > 1e-5


# ---- taking it to its use ----
SMALL = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair():
    """A torchvision network with nine gates, and itself folded."""
    torch.manual_seed(0)
    model = randomize(torchvision.models.mobilenet_v3_small()).eval()
    gates = find_gates(model, SMALL)
    uses = folding.measure_gates(model, gates, [(SMALL,)])
    return model, folding.fold(model, {name: use.constant("mean") + 0.2 for name, use in uses.items()}, SMALL)[0]


def test_nothing_of_the_attention_is_left_in_onnx(pair, tmp_path):
    before, after = (folding.save_onnx(model, SMALL, tmp_path / f"{i}.onnx") for i, model in enumerate(pair))
    assert before.operators["HardSigmoid"] == 9
    assert before.operators["ReduceMean"] == 10
    assert before.operators["Conv"] - after.operators["Conv"] == 18
    assert "HardSigmoid" not in after.operators
    assert "Mul" not in after.operators
    assert after.operators["ReduceMean"] == 1
    assert after.nodes < before.nodes
    assert max(before.relative_error, after.relative_error) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.onnx", "1.onnx"]


def test_programs_and_weights_reload(pair, tmp_path):
    model, folded = pair
    program = torch.export.load(folding.save_program(folded, SMALL, tmp_path / "a.pt2")).module()
    with torch.no_grad():
        expected = folded(SMALL.repeat(3, 1, 1, 1))
        assert relative_error(program(SMALL.repeat(3, 1, 1, 1)), expected) < 1e-6
        assert relative_error(model(SMALL.repeat(3, 1, 1, 1)), expected) > 1e-4
    from safetensors.torch import load_file

    state = load_file(folding.save_weights(folded, tmp_path / "a.safetensors"))
    assert all(torch.equal(state[name], value) for name, value in folded.state_dict().items())


def test_an_onnx_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    from stripe.folding import export

    monkeypatch.setattr(export, "ONNX_TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match="in onnxruntime; expected"):
        folding.save_onnx(nn.Conv2d(3, 4, 3), SMALL, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


class Outputs(nn.Module):
    """A network around one attention, and how it gives out two tensors."""

    def __init__(self, given):
        super().__init__()
        from timm.layers import SEModule

        self.conv, self.se, self.given = nn.Conv2d(3, 8, 3), SEModule(8), given

    def forward(self, x):
        x = self.se(self.conv(x))
        return self.given(x.mean((2, 3)), x)


@dataclasses.dataclass
class Pair:
    scores: torch.Tensor
    map: torch.Tensor


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (Pair, ["scores", "map"]),
        (lambda a, b: {"a": a, "b": b}, ["a", "b"]),
        (lambda a, b: (a, [b]), ["output_0", "output_1"]),
    ],
)
def test_every_tensor_of_an_output_is_written_to_onnx(given, names, tmp_path):
    import onnx

    model = Outputs(given).eval()
    folded, _ = folding.fold(model, {"se": torch.rand(8)}, SMALL)
    opset = 18 if torch.__version__ < "2.7" else 19  # torch 2.6 writes no other
    folding.save_onnx(folded, SMALL, tmp_path / "a.onnx", opset=opset)
    file = onnx.load(tmp_path / "a.onnx")
    assert [output.name for output in file.graph.output] == names
    assert {each.domain: each.version for each in file.opset_import}[""] == opset
    session = folding.onnx_session(tmp_path / "a.onnx")
    feed = torch.rand(5, 3, 64, 96)
    assert [len(array) for array in session.run(None, {file.graph.input[0].name: feed.numpy()})] == [5, 5]


def test_a_fixed_batch_and_inputs_by_name_are_written(tmp_path):
    import onnx

    class Named(Outputs):
        def forward(self, pixels, scale):
            return super().forward(pixels * scale)

    model = Named(lambda a, b: a).eval()
    inputs = {"scale": torch.rand(2, 1, 1, 1), "pixels": SMALL}
    folding.save_onnx(model, inputs, tmp_path / "a.onnx", batch=3)
    shapes = [each.type.tensor_type.shape.dim[0].dim_value for each in onnx.load(tmp_path / "a.onnx").graph.input]
    assert shapes == [3, 3]


def test_the_operation_that_has_no_onnx_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x[:, 0, :4, :4]).abs()

    with pytest.raises(ValueError, match="no ONNX for the operation aten.linalg_eig"):
        folding.save_onnx(Odd().eval(), SMALL, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="opset 17; the exporter gives opset 18"):
        folding.save_onnx(Outputs(lambda a, b: a).eval(), SMALL, tmp_path / "a.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []


def test_latencies_have_a_row_per_network_backend_and_batch():
    networks = {"one": nn.Conv2d(3, 4, 3), "two": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())}
    backends = ["eager", "compile", "onnxruntime"]
    table = folding.latencies(networks, SMALL, backends=backends, batches=(1, 3), rounds=2)
    keys = [(row.backend, row.batch, row.network) for row in table.itertuples()]
    assert keys == [(b, n, name) for b in backends for n in (1, 3) for name in networks]
    assert (table["low"] <= table["milliseconds"]).all()
    assert (table["milliseconds"] <= table["high"]).all()
    assert (table["speedup"][::2] == 1.0).all()
    np.testing.assert_allclose(
        table["speedup"][1::2].to_numpy(),
        table["milliseconds"][::2].to_numpy() / table["milliseconds"][1::2].to_numpy(),
    )
    with pytest.raises(ValueError, match="no backend 'tflite'; expected some of eager, compile, onnxruntime"):
        folding.latencies(networks, SMALL, backends=["tflite"])
