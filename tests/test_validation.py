import json

import numpy as np
import pytest
import torch

from stripe import stats
from stripe.asr.validation import MATCH_P, MATCH_R, Fit, compare, validate, with_constants
from stripe.data import Loader, load_images
from stripe.gates import find_gates
from stripe.models import create_model
from stripe.recorder import Recorder
from stripe.store import open_run
from tests.conftest import randomize


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    model = randomize(create_model("resnet", depth=11, module="senet")).eval()
    images = load_images("digits", "test", samples=60)
    loader = Loader(images, 30)
    gates = find_gates(model, next(iter(loader))[0][:2])
    path = tmp_path_factory.mktemp("validation") / "run"
    with Recorder(model, gates, path) as recorder:
        recorder.record(loader, epoch=5)
    return model, open_run(path), loader


def test_constants_replace_each_gate_for_every_image(case):
    model, run, loader = case
    images = next(iter(loader))[0]
    vectors = {gate.name: run.attention(gate.name, 5).mean(0, dtype=np.float64) for gate in run.gates}
    constant = with_constants(model, run.gates, vectors)

    def by_hand(images):
        handles = [
            model.get_submodule(gate.source).register_forward_hook(
                lambda m, i, o, v=vectors[gate.name]: torch.from_numpy(v).float().view(1, -1, 1, 1).expand_as(o)
            )
            for gate in run.gates
        ]
        output = model(images)
        for handle in handles:
            handle.remove()
        return output

    torch.testing.assert_close(constant(images), by_hand(images))
    assert not torch.allclose(constant(images), model(images), rtol=1e-3)


def test_training_psi_moves_only_psi_and_lowers_the_loss(case):
    model, run, loader = case
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untrained, trained = (validate(model, run, loader, steps=steps) for steps in (0, 30))

    def loss(validation):
        network = with_constants(model, run.gates, validation.learned).eval()
        images, labels, _ = next(iter(loader))
        return torch.nn.functional.cross_entropy(network(images), labels).item()

    assert loss(trained) < loss(untrained)
    assert (untrained.table["r"] == untrained.table["r_untrained"]).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert trained.epoch == 5
    assert trained.accuracies.keys() == {"attention", "learned", "stripe", "removed"}


def test_the_best_psi_fits_the_stripe_better_than_the_untrained_one(case):
    model, run, loader = case
    table = validate(model, run, loader, steps=1).table
    assert (table["rmse_best"] < table["rmse_untrained"]).all()
    assert (table["r_best"] > table["r_untrained"]).all()


def test_the_verdict_follows_its_rule():
    rng = np.random.default_rng(0)
    stripe = rng.uniform(0.2, 0.8, 64)
    observed = {name: stripe + rng.normal(0, 0.02, (100, 64)) for name in ("same", "shuffled", "no better")}
    learned = {"same": stripe, "shuffled": rng.permutation(stripe), "no better": stripe + 0.1}
    untrained = {"same": np.full(64, 0.5), "shuffled": np.full(64, 0.5), "no better": stripe + 0.05}
    table = compare(Fit(learned, untrained, learned), observed).set_index("gate")
    assert table["verdict"].to_dict() == {"same": "match", "shuffled": "no match", "no better": "no match"}
    assert table.loc["same", "p_adjusted"] < MATCH_P < table.loc["shuffled", "p_adjusted"]
    assert table.loc["same", "r"] > 0.99 > MATCH_R
    assert table.loc["no better", "mean_abs_z"] == pytest.approx(0.1 / 0.02, rel=0.1)
    assert table.loc["same", "inside"] == 1
    assert np.isnan(table.loc["same", "r_untrained"])


def test_json_holds_everything_but_the_samples(case):
    model, run, loader = case
    content = json.loads(json.dumps(validate(model, run, loader, steps=1).to_dict(), allow_nan=False))
    assert content["protocol"] == "same"
    assert [gate["gate"] for gate in content["gates"]] == [gate.name for gate in run.gates]
    assert len(content["learned"]["layer3.0"]) == 256


def test_wrong_requests_are_refused(case):
    model, run, loader = case
    with pytest.raises(ValueError, match="unknown protocol 'equal'; expected one of same"):
        validate(model, run, loader, protocol="equal")
    with pytest.raises(ValueError, match="the network has no gate 'layer1.0'"):
        validate(create_model("resnet", depth=11), run, loader, steps=1)
    with pytest.raises(ValueError, match="epoch 9"):
        validate(model, run, loader, epoch=9)


def test_gates_inside_a_hub_networks_modules(tmp_path):
    torch.manual_seed(0)
    model = create_model("torchvision:mobilenet_v3_small", num_classes=10).eval()
    loader = Loader(load_images("digits", "test", samples=8, size=96), 4)
    gates = find_gates(model, next(iter(loader))[0][:2])
    with Recorder(model, gates, tmp_path / "run") as recorder:
        recorder.record(loader)
    validation = validate(model, open_run(tmp_path / "run"), loader, steps=2)
    assert len(validation.table) == len(gates) == 9
    psi = torch.full((1, gates[0].channels, 1, 1), 0.1)
    gate = []
    site = model.get_submodule(gates[0].site)
    handle = site.get_submodule(gates[0].source.removeprefix(gates[0].site + ".")).register_forward_hook(
        lambda m, i, o: gate.append(o.flatten())
    )
    site(psi)
    handle.remove()
    untrained = stats.pearson(gate[0].detach().numpy(), validation.observed[gates[0].name].mean(0))
    assert validation.table["r_untrained"][0] == pytest.approx(untrained, abs=1e-4)
