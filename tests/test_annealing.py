"""Annealed gates: unchanged at first, a blend in between, one constant for every image at the end, and then folded."""

import pytest
import torch
import torchvision
from torch import nn

import stripe
from stripe.asr import AnnealedAttention, anneal, annealed
from stripe.gates import find_gates, read_gates
from stripe.models import create_model

BEGIN, END = 3, 7


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model("resnet", depth=11, module="senet").double()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fresh(count):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def attention_of(network, images):
    """Read every gate's attention; the gates are those that the network has as it is."""
    found = {}
    gates = find_gates(network, images)
    with torch.no_grad(), read_gates(network, gates, lambda gate, kind, values: found.update({gate.name: values})):
        network(images)
    return found


def trained(network, images, steps):
    """Take training steps with no update, so that only the counters and the running means move."""
    network.train()
    with torch.no_grad():
        for _ in range(steps):
            network(images)
    return network.eval()


@pytest.mark.equal_bits
def test_up_to_the_first_step_the_network_computes_what_it_did(network, images):
    same = anneal(network, images, begin=BEGIN, end=END)
    network, same = trained(network, images, BEGIN), trained(same, images, BEGIN)
    assert torch.equal(network(images), same(images))
    trained(network, images, 1), trained(same, images, 1)
    assert not torch.equal(network(images), same(images))


def test_half_way_a_gate_gives_half_its_own_and_half_its_mean(network, images):
    half = trained(anneal(network, images, begin=0, end=4), images, 2)
    blended = attention_of(half, images)
    for module in half.modules():
        if isinstance(module, AnnealedAttention):
            module.steps.zero_()
    own = attention_of(half, images)
    first = "layer1.0"  # gates behind it see other maps
    mean = half.get_submodule(f"{first}.attention_module").running_mean.double()
    torch.testing.assert_close(blended[first], (own[first] + mean) / 2)
    assert not torch.allclose(blended[first], own[first], rtol=1e-3)


def test_the_running_mean_is_the_mean_over_all_images_seen(network, images):
    annealing = anneal(network, images, begin=50, end=60, momentum=0.01)
    gate = annealing.layer1[0].attention_module
    seen = []
    gate.attention.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    annealing.train()
    for batch in fresh(24).split(4):
        annealing(batch)
    expected = torch.cat(seen).flatten(1).mean(0)
    torch.testing.assert_close(gate.running_mean.double(), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(gate.running_mean.double(), seen[-1].flatten(1).mean(0), rtol=1e-6, atol=0)


def test_at_the_end_every_image_has_the_same_attention_and_folding_it_loses_nothing(network, images):
    done = trained(anneal(network, images, begin=BEGIN, end=END), images, END)
    for values in attention_of(done, fresh(8)).values():
        assert torch.equal(values, values[:1].expand_as(values))
    folded, report = stripe.fold(done, annealed(done), images)
    assert len(report.table) == 3
    torch.testing.assert_close(folded(fresh(8)), done(fresh(8)), rtol=1e-12, atol=1e-12)
    others, _ = stripe.fold(network.eval(), annealed(done), images)
    assert not torch.allclose(others(fresh(8)), network(fresh(8)), rtol=1e-4)


def test_the_end_does_not_move_while_training_goes_on(network, images):
    done = trained(anneal(network, images, begin=BEGIN, end=END), images, END)
    before = annealed(done)
    trained(done, fresh(4), 3)
    assert all(torch.equal(before[name], mean) for name, mean in annealed(done).items())


def test_networks_of_others_are_annealed_by_a_bare_loop():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.0)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    network = anneal(network, images, begin=2, end=6)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    constants = annealed(network)
    assert len(constants) == 9
    folded, _ = stripe.fold(network.double(), constants, images.double())
    assert not find_gates(folded, images.double())
    others = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(folded(others), network(others), rtol=1e-10, atol=1e-10)


@pytest.mark.equal_bits
def test_a_state_dict_takes_the_annealing_along(network, images):
    done = trained(anneal(network, images, begin=BEGIN, end=END), images, 5)
    again = anneal(network, images, begin=BEGIN, end=END)
    again.load_state_dict(done.state_dict())
    trained(done, images, 1), trained(again, images, 1)
    assert torch.equal(done(images), again(images))


def test_a_gate_that_still_depends_on_the_image_is_no_constant(network, images):
    with pytest.raises(ValueError, match="6 training steps, and is to be constant after 7"):
        annealed(trained(anneal(network, images, begin=BEGIN, end=END), images, 6))
    assert annealed(network) == {}


class Functional(nn.Module):
    """Attention that no module returns."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


def test_what_cannot_be_wrapped_is_refused(network, images):
    with pytest.raises(ValueError, match="cannot be annealed: no module returns its attention"):
        anneal(Functional().double(), images, begin=0, end=1)
    with pytest.raises(ValueError, match="expected 0 <= begin < end"):
        anneal(network, images, begin=7, end=7)
    with pytest.raises(ValueError, match="no gates to anneal"):
        anneal(create_model("resnet", depth=11).double(), images, begin=0, end=1)
