import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

from stripe import stats
from stripe.asr import insert
from stripe.asr import task as tasks
from stripe.asr.validation import validate
from stripe.cli import main
from stripe.data import Loader, load_images
from stripe.figures import draw_validation
from stripe.folding.exact import fuse_norms
from stripe.gates import find_gates, replace_gates
from stripe.models import create_model
from stripe.recorder import Recorder
from stripe.store import open_run
from tests.conftest import randomize


class Doubled(list):
    """A loader's batches with images in float64."""

    def __init__(self, loader):
        super().__init__((images.double(), *rest) for images, *rest in loader)


def recorded(path, depth=11, *, double=False, **options):
    """A network of random weights, the run of its attention, and the images of both."""
    torch.manual_seed(0)
    model = randomize(create_model("resnet", depth=depth, module="senet", **options)).eval()
    loader = Loader(load_images("digits", "test", samples=60), 30)
    if double:
        model, loader = model.double(), Doubled(loader)
    with Recorder(model, find_gates(model, next(iter(loader))[0][:2]), path) as recorder:
        recorder.record(loader, epoch=5)
    return model, open_run(path), loader


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("validation") / "run")


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("validation") / "double", double=True)


def rounded(*vectors):
    """What rounding in float64 may change a correlation with vectors by.

    An error e in every channel turns a vector by at most e over its standard deviation; e is what a thousand roundings
    of its largest value come to, twice as many as computing attention of a psi of a few hundred channels takes.
    """
    return max(1000 * np.finfo(float).eps * abs(vector).max() / vector.std() for vector in vectors)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("validation") / "both", asr=True, both=True)


def test_training_psi_moves_only_psi_and_lowers_the_loss(case):
    model, run, loader = case
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untrained, trained = (validate(model, run, loader, steps=steps) for steps in (0, 30))

    def loss(validation):
        images, labels, _ = next(iter(loader))
        values = {gate: torch.from_numpy(vector) for gate, vector in validation.learned.items()}
        with torch.no_grad(), replace_gates(model, run.gates, values):
            return torch.nn.functional.cross_entropy(model(images), labels).item()

    assert loss(trained) < loss(untrained)
    assert not np.allclose(trained.table["r"], trained.table["r_untrained"], atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert trained.epoch == 5
    assert trained.accuracies.keys() == {"attention", "learned", "stripe", "removed"}


def test_psi_without_a_step_of_training_is_the_untrained_one(double):
    found = validate(*double, steps=0)
    limit = rounded(*found.learned.values())
    assert limit < 1e-10
    np.testing.assert_allclose(found.table["r"], found.table["r_untrained"], rtol=0, atol=limit)


def test_the_best_psi_fits_the_stripe_better_than_the_untrained_one(case):
    model, run, loader = case
    table = validate(model, run, loader, steps=1).table
    assert (table["distance_best"] < table["distance_untrained"]).all()
    assert (table["distance_best"] <= table["distance"]).all()


def test_psi_that_nobody_trained_matches_nowhere_and_psi_fitted_to_the_stripe_does(case, monkeypatch):
    """The stripe is planted: attention of a psi that no random one comes near, and of hardly anything else."""
    model, run, loader = case
    model = copy.deepcopy(model)
    for path in ("layer1.0", "layer2.0", "layer3.0"):
        attention = model.get_submodule(path).attention_module
        attention.fc1.bias.data = 2 * torch.ones_like(attention.fc1.bias)
        attention.fc1.weight.data *= 1e-3  # images hardly matter, a psi of thousands does
    planted = copy.copy(run)
    psis = {gate.name: 3000 * torch.randn(gate.channels) for gate in run.gates}
    vectors = {g: model.get_submodule(g).attention_module(p.view(1, -1, 1, 1)).flatten() for g, p in psis.items()}
    planted.attention = lambda gate, epoch: vectors[gate.name].detach().numpy()[None].repeat(20, 0)
    untrained = validate(model, planted, loader, steps=0)
    assert set(untrained.table["verdict"]) <= {"no match", "related", "cannot match"}
    assert not untrained.matched
    monkeypatch.setattr(tasks.Task, "start", lambda task, gate: psis[gate.name].clone())
    trained = validate(model, planted, loader, steps=0)
    assert trained.matched
    assert (trained.table["verdict"] == "match").all()
    assert (trained.table["p_adjusted"] < 0.01).all()


def test_attention_that_its_bias_alone_decides_is_trivial(case):
    """Any psi gives the stripe: nothing is there to learn, and nothing counts as a match."""
    model, run, loader = case
    model = copy.deepcopy(model)
    biases = {}
    for gate in run.gates:
        attention = model.get_submodule(gate.name).attention_module
        attention.fc2.weight.data *= 1e-4
        biases[gate.name] = torch.sigmoid(attention.fc2.bias.detach()).numpy()
    still = copy.copy(run)
    still.attention = lambda gate, epoch: biases[gate.name][None].repeat(20, 0)
    found = validate(model, still, loader, steps=3)
    assert set(found.table["verdict"]) == {"trivial"}
    assert (found.table["r"] > 0.99).all()
    assert not found.matched
    assert "3 trivial" in found.conclusion()


def test_each_gates_divergence_is_that_of_the_outputs_with_this_gate_alone_at_a_constant(case):
    model, run, loader = case
    found = validate(model, run, loader, steps=1)
    images = torch.cat([images for images, *_ in loader])[:128]
    with torch.no_grad():
        own = model(images).double().softmax(1)
        for gate in run.gates:
            ones = torch.ones(gate.channels)
            with replace_gates(model, run.gates, {gate.name: ones}):
                other = model(images).double().softmax(1)
            row = found.table.set_index("gate").loc[gate.name]
            expected = (own * (own / other).log()).sum(1).mean().item()
            assert row["kl_removed"] == pytest.approx(expected, rel=1e-4)
            assert row["kl_stripe"] < row["kl_removed"]


def test_merging_the_norms_of_the_frozen_network_changes_nothing_of_what_is_found(case, monkeypatch):
    model, run, loader = case
    merged = []
    monkeypatch.setattr(tasks, "fuse_norms", lambda *words: merged.append(1) or fuse_norms(*words))
    quick = validate(model, run, loader, steps=3)
    assert merged
    monkeypatch.setattr(tasks, "_quicker", lambda model, *others: model)
    plain = validate(model, run, loader, steps=3)
    pd.testing.assert_series_equal(quick.table["verdict"], plain.table["verdict"])
    np.testing.assert_allclose(quick.table["distance"], plain.table["distance"], rtol=1e-2)
    assert quick.accuracies == pytest.approx(plain.accuracies, abs=2)


def test_bfloat16_is_used_where_it_is_asked_for_and_finds_the_same(case):
    model, run, loader = case
    seen = []
    handle = model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    exact, rounded = (validate(model, run, loader, steps=20, amp=amp) for amp in ("no", "bf16"))
    handle.remove()
    assert torch.bfloat16 in seen
    pd.testing.assert_series_equal(rounded.table["verdict"], exact.table["verdict"])
    np.testing.assert_allclose(rounded.table["distance"], exact.table["distance"], rtol=0.1)
    assert not rounded.table["distance"].equals(exact.table["distance"])
    for vector in rounded.learned.values():  # attention(psi) itself is computed in full precision
        assert (vector != torch.from_numpy(vector).bfloat16().double().numpy()).any()


def test_a_psi_that_leaves_the_stripe_which_it_began_at_is_told(case):
    found = validate(*case, steps=1)
    table = found.table.assign(distance_untrained=0.0, distance=1.0, limit=0.01, kl_learned=0.5, kl_stripe=0.001)
    table["kl_removed"] = 0.6
    moved = replace(found, table=table)
    assert "layer1.0, layer2.0, layer3.0 psi began at the stripe and drifted away" in moved.conclusion()
    assert "the outputs do change there" in moved.conclusion()
    assert "nearly flat" in replace(found, table=table.assign(kl_learned=0.001)).conclusion()
    assert "drifted" not in replace(found, table=table.assign(distance=0.001)).conclusion()


def test_every_column_of_the_summary_and_every_verdict_in_it_is_explained(case):
    found = validate(*case, steps=1)
    explained = [line.partition(":")[0] for line in found.legend()]
    verdicts = [f'verdict "{word}"' for word in found.table["verdict"]]
    assert set(explained) == set(found.summary()) - {"gate", "channels", "verdict"} | set(verdicts)


def test_json_holds_everything_but_the_samples(case):
    model, run, loader = case
    content = json.loads(json.dumps(validate(model, run, loader, steps=1).to_dict(), allow_nan=False))
    assert content["protocol"] == "same"
    assert [gate["gate"] for gate in content["gates"]] == [gate.name for gate in run.gates]
    assert len(content["learned"]["layer3.0"]) == 256


def test_wrong_requests_are_refused(case):
    model, run, loader = case
    with pytest.raises(ValueError, match="amp 'fp16': expected no or bf16"):
        validate(model, run, loader, amp="fp16")
    with pytest.raises(ValueError, match="unknown protocol 'equal'; expected one of same, both, separate"):
        validate(model, run, loader, protocol="equal")
    for words in ({"protocol": "separate"}, {"asr_model": model}):
        with pytest.raises(ValueError, match="'separate' takes one, others do not"):
            validate(model, run, loader, **words)
    with pytest.raises(ValueError, match="at least one batch"):
        validate(model, run, loader, protocol="separate", asr_model=model, steps=0)
    with pytest.raises(ValueError, match="'both' trains nothing"):
        validate(model, run, loader, protocol="both", train_attention=True)
    with pytest.raises(ValueError, match="gate 'layer1.0' has no ASR layer of 64 channels"):
        validate(model, run, loader, protocol="both")
    deeper = create_model("resnet", depth=20, module="senet", asr=True)
    with pytest.raises(ValueError, match="must be built as the one that the run recorded"):
        validate(model, run, loader, protocol="separate", asr_model=deeper)
    with pytest.raises(ValueError, match=r"this network has no gates layer1\.0"):
        validate(create_model("resnet", depth=11), run, loader, steps=1)
    with pytest.raises(ValueError, match="epoch 9"):
        validate(model, run, loader, epoch=9)


def test_gates_inside_a_hub_networks_modules(tmp_path):
    torch.manual_seed(0)
    model = create_model("torchvision:mobilenet_v3_small", num_classes=10).eval().double()
    loader = Doubled(Loader(load_images("digits", "test", samples=8, size=96), 4))
    gates = find_gates(model, next(iter(loader))[0][:2])
    with Recorder(model, gates, tmp_path / "run") as recorder:
        recorder.record(loader)
    validation = validate(model, open_run(tmp_path / "run"), loader, steps=2)
    assert len(validation.table) == len(gates) == 9
    psi = torch.full((1, gates[0].channels, 1, 1), 0.1, dtype=torch.float64)
    gate = []
    site = model.get_submodule(gates[0].site)
    handle = site.get_submodule(gates[0].source.removeprefix(gates[0].site + ".")).register_forward_hook(
        lambda m, i, o: gate.append(o.flatten())
    )
    site(psi)
    handle.remove()
    vector = gate[0].detach().numpy()
    untrained = stats.pearson(vector, validation.observed[gates[0].name].mean(0, dtype=float))
    assert validation.table["r_untrained"][0] == pytest.approx(untrained, rel=0, abs=rounded(vector))


def test_training_the_attention_too_fits_the_task_better_and_keeps_the_controls(double):
    model, run, loader = double
    alone, along = (validate(model, run, loader, steps=15, train_attention=along) for along in (False, True))
    limit = rounded(*alone.learned.values())
    np.testing.assert_allclose(alone.table["r_untrained"], along.table["r_untrained"], rtol=0, atol=limit)
    assert not np.allclose(alone.learned["layer1.0"], along.learned["layer1.0"])


# ---- gates and ASR in one network ------------------------------------------------------------------------


def merged(layer):
    """|gamma| v of an ASR layer around a batch norm."""
    norm = layer
    while hasattr(norm, "bn"):
        norm = norm.bn
    return (norm.weight.abs() * layer.learned_vector()).detach().numpy()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_both_takes_the_merged_scale_of_the_norm_before_each_gate(both):
    model, run, loader = both
    validation = validate(model, run, loader, protocol="both")
    for gate in run.gates:
        layer = model.get_submodule(f"{gate.name}.bn3")
        assert cosine(validation.learned[gate.name], merged(layer)) == pytest.approx(1, abs=1e-6)
        stripe = validation.observed[gate.name].mean(0)
        row = validation.table.set_index("gate").loc[gate.name]
        assert row["r"] == pytest.approx(stats.pearson(merged(layer), stripe), abs=1e-4)
    assert validation.accuracies.keys() == {"attention", "learned", "stripe", "removed"}


@torch.no_grad()
def with_stripes_as_vectors(model, observed, images):
    """The same network in other weights: each vector is the stripe itself, and its norm divided by as much."""
    other = copy.deepcopy(model)
    for gate, values in observed.items():
        layer, stripe = other.get_submodule(gate).bn3, torch.from_numpy(values.mean(0))
        old = layer.learned_vector().clone()
        layer.attention_module.fc2.bias += torch.logit(stripe) - torch.logit(old)
        for parameter in (layer.bn.weight, layer.bn.bias):
            parameter *= old / layer.learned_vector()
        assert stats.pearson(layer.learned_vector().numpy(), stripe.numpy()) > 0.999
    torch.testing.assert_close(other(images), model(images), rtol=1e-3, atol=1e-3)
    return other


def test_a_change_of_weights_that_changes_no_output_changes_no_verdict(both):
    model, run, loader = both
    before = validate(model, run, loader, protocol="both")
    other = with_stripes_as_vectors(model, before.observed, next(iter(loader))[0])
    after = validate(other, run, loader, protocol="both")
    pd.testing.assert_series_equal(after.table["verdict"], before.table["verdict"])
    np.testing.assert_allclose(after.table["distance"], before.table["distance"], rtol=1e-3)
    np.testing.assert_allclose(after.table["p"], before.table["p"], atol=0.002)


def test_both_takes_the_nearest_of_several_layers_and_the_product_of_repeated_ones(tmp_path):
    model, run, loader = recorded(tmp_path / "run", depth=20)
    model = insert(insert(model, where="bn3", repeats=2), where="*.downsample.1")
    learned = validate(model, run, loader, protocol="both").learned[
        "layer1.1"
    ]  # layer1.0.downsample.1 has as many channels
    outer = model.layer1[1].bn3
    inner = outer.bn
    parts = [layer.attention_module(layer.vector).detach().flatten().numpy() for layer in (outer, inner)]
    gamma = inner.bn.weight.detach().abs().numpy()
    assert cosine(learned, gamma * parts[0] * parts[1]) == pytest.approx(1, abs=1e-6)
    assert cosine(learned, gamma * parts[0]) < 0.9999


def test_a_planted_stripe_matches_and_a_shuffled_one_does_not(both, tmp_path):
    """The gates are made to give the merged scales, to a factor, whatever the image: the truth is known."""
    model, _, loader = both
    planted, shuffled = (copy.deepcopy(model) for _ in range(2))
    for network, order in ((planted, torch.arange), (shuffled, torch.randperm)):
        for block in (network.layer1[0], network.layer2[0], network.layer3[0]):
            vector = torch.from_numpy(merged(block.bn3))
            vector = vector / vector.max() * 0.9
            block.attention_module.fc2.weight.data *= 1e-3
            block.attention_module.fc2.bias.data = torch.logit(vector)[order(len(vector))]
    verdicts = []
    for name, network in (("planted", planted), ("shuffled", shuffled)):
        with Recorder(network, find_gates(network, next(iter(loader))[0][:2]), tmp_path / name) as recorder:
            recorder.record(loader)
        validation = validate(network, open_run(tmp_path / name), loader, protocol="both")
        verdicts.append((validation.matched, set(validation.table["verdict"])))
    assert verdicts[0] == (True, {"match"})
    assert not verdicts[1][0]
    assert "match" not in verdicts[1][1]


# ---- two networks ----------------------------------------------------------------------------------------


def as_asr(state):
    """Rename an SE network's weights to those of an ASR network."""
    return {k.replace(".bn3.", ".bn3.bn.").replace(".attention", ".bn3.attention"): v for k, v in state.items()}


@pytest.fixture(scope="module")
def asr_case(case):
    """An ASR network that makes the SE network's maps before its first gate, channels shuffled: with the order."""
    model, run, _ = case
    torch.manual_seed(3)
    asr_model = create_model("resnet", depth=11, module="senet", asr=True)
    asr_model.load_state_dict(asr_model.state_dict() | as_asr(model.state_dict()))  # psi is its own
    block, order = asr_model.layer1[0], torch.randperm(64)
    norm = block.bn3.bn
    with torch.no_grad():
        for tensor in (block.conv3.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order])
        stripe = torch.from_numpy(run.attention("layer1.0", 5).mean(0))
        block.bn3.attention_module.fc2.weight.mul_(0.05)
        block.bn3.attention_module.fc2.bias.copy_(torch.logit(stripe)[order])
    return asr_model.eval(), order


def test_separate_finds_the_channels_of_a_shuffled_network(case, asr_case):
    model, run, loader = case
    asr_model, order = asr_case
    validation = validate(model, run, loader, protocol="separate", asr_model=asr_model, steps=1)
    row = validation.table.set_index("gate").loc["layer1.0"]
    scale, own = merged(asr_model.layer1[0].bn3), model.layer1[0].bn3.weight.detach().abs().numpy()
    found = validation.learned["layer1.0"] * own
    assert cosine(found, scale[order.argsort()]) == pytest.approx(1, abs=1e-6)
    assert cosine(found, scale) < 0.99
    assert row["map_r"] == pytest.approx(1, abs=1e-4)
    assert row["r"] > 0.99
    assert row["verdict"] == "match"
    assert row["p_adjusted"] < 0.05 < row["p_wasserstein"]
    assert (validation.table["map_r"][1:] < 0.99).all()
    assert "match" not in set(validation.table["verdict"][1:])


def test_separate_gives_the_same_verdicts_in_weights_that_change_no_output(case, asr_case):
    model, run, loader = case
    observed = {gate.name: run.attention(gate, 5) for gate in run.gates}
    other = with_stripes_as_vectors(asr_case[0], observed, next(iter(loader))[0])
    before, after = (
        validate(model, run, loader, protocol="separate", asr_model=network, steps=1).table
        for network in (asr_case[0], other)
    )
    pd.testing.assert_series_equal(after["verdict"], before["verdict"])
    np.testing.assert_allclose(after["distance"], before["distance"], rtol=0.01)


def test_separate_compares_sorted_values_too_and_tests_the_deployed_network(case, asr_case):
    model, run, loader = case
    validation = validate(model, run, loader, protocol="separate", asr_model=asr_case[0], steps=1)
    table = validation.table.set_index("gate")
    for gate, stripe in ((gate, values.mean(0, dtype=float)) for gate, values in validation.observed.items()):
        own = model.get_submodule(gate).bn3.weight.detach().double().abs().numpy()
        expected = scipy.stats.wasserstein_distance(validation.learned[gate] * own, stripe * own)
        assert table["wasserstein"][gate] == pytest.approx(expected, rel=1e-4)
    assert validation.accuracies.keys() == {"attention", "learned", "stripe", "removed", "asr", "asr deployed"}
    assert validation.accuracies["asr"] == validation.accuracies["asr deployed"]
    assert asr_case[0].layer1[0].bn3.fused_bn is None


def test_the_command_takes_the_second_network_and_says_what_it_found(case, asr_case, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("se.pt", "asr.pt")]
    for model, path in zip((case[0], asr_case[0]), paths, strict=True):
        torch.save(model.state_dict(), path)
    words = ["validate", "--ckpt", paths[0], "--run", str(case[1].path), "--protocol", "separate", "--steps", "1"]
    words += ["--dataset", "digits"]
    words += ["--train-samples", "40", "--test-samples", "20", "--batch", "20", "--out", str(tmp_path)]
    assert main([*words, "--asr-ckpt", paths[1], "--require-match"]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("map r", "KL removed", "of it deployed", "Of 3 gates"))
    content = json.loads((tmp_path / "validation.json").read_text())
    assert content["protocol"] == "separate"
    assert content["gates"][0]["p_wasserstein"] > 0
    assert main(words) == 2
    assert "'separate' takes one" in capsys.readouterr().err


# ---- gates of every form and place -----------------------------------------------------------------------


class Radix(nn.Module):
    """Weighs a map and its mirror image by a softmax over the two, whose logits hardly depend on the image."""

    def __init__(self, channels):
        super().__init__()
        self.fc, self.softmax, self.same = nn.Linear(channels, 2 * channels), nn.Softmax(1), nn.Identity()

    def forward(self, x):
        maps = self.same(torch.stack([x, x.flip(3)], 1))
        weights = self.softmax(self.fc(maps.sum(1).mean((2, 3))).unflatten(1, (2, -1)))
        return (maps * weights[..., None, None]).sum(1)


class Context(nn.Module):
    """Adds a vector that hardly depends on the image."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.fc(x.mean((2, 3)))[..., None, None]


class Squeeze(nn.Module):
    """Scales, twice: by a module's output, and by the same once more, computed without a module."""

    def __init__(self, channels):
        super().__init__()
        self.fc, self.again, self.gate = nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Sigmoid()

    def forward(self, x):
        x = x * self.gate(self.fc(x.mean((2, 3))))[..., None, None]
        return x * torch.sigmoid(self.again(x.mean((2, 3))))[..., None, None]


class Shared(nn.Module):
    """Applies one attention module twice."""

    def __init__(self, channels):
        super().__init__()
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = x * self.se(x)
        x = self.conv(x).relu()
        return x * self.se(x)


def network_of(*blocks, channels=8):
    """A classifier of digits whose attention comes from its biases, all but a little."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *(block(channels) for block in blocks))
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("fc.", "again.", "fc2.")):
            nn.init.normal_(parameter, std=1e-4 if name.endswith("weight") else 1)
    return model.eval()


def recorded_on_digits(model, path, size=16):
    loader = Loader(load_images("digits", "test", samples=40, size=size), 20)
    with Recorder(model, find_gates(model, next(iter(loader))[0][:2]), path) as recorder:
        recorder.record(loader)
    return open_run(path), loader


def test_gates_of_every_form_learn_the_vector_that_their_biases_hold(tmp_path):
    model = network_of(Radix, Context, Squeeze)
    run, loader = recorded_on_digits(model, tmp_path)
    assert [gate.form for gate in run.gates] == ["radix", "additive", "multiplicative", "multiplicative"]
    found = validate(model, run, loader, steps=3)
    *learned, functional = [gate.name for gate in run.gates]
    truth = {
        learned[0]: model[2].fc.bias.view(2, -1).softmax(0).flatten(),
        learned[1]: model[3].fc.bias,
        learned[2]: model[4].fc.bias.sigmoid(),
    }
    assert list(found.learned) == learned
    for name, vector in truth.items():
        vector = vector.detach().numpy()
        np.testing.assert_allclose(found.learned[name], vector, atol=5e-3)
        assert not np.allclose(found.learned[name], np.roll(vector, 1), atol=5e-2)
    table = found.table.set_index("gate")
    assert table.loc[functional, ["verdict", "left_out"]].tolist() == ["left out", "no module returns its attention"]
    assert table.loc[learned, "left_out"].eq("").all()
    assert table.loc[functional].isna()["r":"p"].all()
    assert found.accuracies.keys() == {"attention", "learned", "stripe", "removed"}
    hits = []
    for images, labels, _ in loader:
        maps = model[:2](images)
        hits.append(model[5:]((maps + maps.flip(3)) / 2).argmax(1) == labels)
    assert found.accuracies["removed"] == pytest.approx(100 * torch.cat(hits).float().mean().item())
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["gates"][3]["left_out"] == "no module returns its attention"
    assert functional not in content["learned"]
    drawn = [path.name for path in draw_validation(found, tmp_path)]
    assert drawn == [*(f"learned-{name}.png" for name in learned), "learned-scatter.png"]


def test_a_gate_left_out_keeps_its_attention_and_no_verdict(tmp_path):
    model = network_of(Context, Squeeze)
    run, loader = recorded_on_digits(model, tmp_path)
    found = validate(model, run, loader, steps=1)
    table = found.table
    assert table["verdict"].eq("left out").tolist() == [False, False, True]
    table["verdict"] = table["verdict"].where(table["verdict"] == "left out", "match")
    assert found.matched
    found.table["verdict"] = "left out"
    assert not found.matched


def test_attention_that_is_used_elsewhere_too_is_left_out_of_training_but_has_its_controls(tmp_path):
    class Leaking(Squeeze):
        def forward(self, x):
            weights = self.gate(self.fc(x.mean((2, 3))))[..., None, None]
            return x * weights + weights.mean()

    model = network_of(Context, Leaking)
    run, loader = recorded_on_digits(model, tmp_path)
    row = validate(model, run, loader, steps=1).table.set_index("gate").loc[run.gates[1].name]
    assert row["left_out"].startswith("no gradient reaches it")
    assert np.isfinite(row[["r_untrained", "rmse_untrained", "r_best", "rmse_best"]].astype(float)).all()
    assert np.isnan(row["r"])


def test_a_module_called_twice_learns_a_vector_for_each_call(tmp_path):
    """Its vectors start equal, so one that was never trained, or the other's, shows."""
    model = network_of(Shared, channels=16)
    run, loader = recorded_on_digits(model, tmp_path)
    first, second = run.gates
    assert first.source == second.source
    untrained, trained = (validate(model, run, loader, steps=steps).learned for steps in (0, 25))
    np.testing.assert_array_equal(untrained[first.name], untrained[second.name])
    assert not any(np.allclose(trained[gate.name], untrained[gate.name], atol=1e-3) for gate in run.gates)
    assert not np.allclose(trained[first.name], trained[second.name], atol=1e-3)

    def loss(vectors):
        images, labels, _ = next(iter(loader))
        scales = [torch.tensor(vectors[gate.name]).float().view(1, -1, 1, 1) for gate in run.gates]
        maps = model[2].conv(model[:2](images) * scales[0]).relu() * scales[1]
        return torch.nn.functional.cross_entropy(model[3:](maps), labels).item()

    swapped = {first.name: trained[second.name], second.name: trained[first.name]}
    assert loss(trained) < min(loss(swapped), loss(untrained))


def test_gates_of_an_older_run_are_found_again_by_name(double):
    model, run, loader = double
    older = copy.copy(run)
    older.gates = [replace(gate, product=None, squeeze=None, exclusive=False) for gate in run.gates]
    pd.testing.assert_frame_equal(
        validate(model, older, loader, steps=1).table, validate(model, run, loader, steps=1).table
    )
    older.gates[0] = replace(older.gates[0], name="layer9.0")
    older.attention = lambda gate, epoch: run.attention(run.gates[0], epoch)
    with pytest.raises(ValueError, match=r"no gates layer9\.0: take the network that the run recorded"):
        validate(model, older, loader, steps=1)


def test_a_network_with_compiled_parts_gives_the_same_table(double):
    model, run, loader = double
    compiled = copy.deepcopy(model)
    compiled.layer2 = torch.compile(compiled.layer2, backend="eager")
    pd.testing.assert_frame_equal(
        validate(compiled, run, loader, steps=1).table, validate(model, run, loader, steps=1).table
    )
