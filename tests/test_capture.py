"""Weights that are cast together before a step give the step that autocast gives, bit for bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from stripe.capture import Casts
from stripe.models import create_model


class Standardised(nn.Conv2d):
    """A convolution that uses its weights otherwise than torch's own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Several(nn.Module):
    """Layers with tied, frozen, unused, standardised and normalised weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.standardised = Standardised(8, 8, 3, padding=1)
        self.normalised = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.frozen(self.normalised(self.standardised(self.first(x)).relu()).relu()))
        return self.two(self.one(x.mean((2, 3))).relu())


def resnet():
    return create_model("resnet", depth=11, module="senet")


def steps(model, casts=None):
    """Take four steps in bfloat16 and return the losses."""
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], 0.1, momentum=0.9)
    with casts.in_place() if casts else nullcontext():
        return [step(model, optimizer, casts, seed) for seed in range(4)]


def step(model, optimizer, casts, seed):
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(8, (8,), generator=generator)
    optimizer.zero_grad()
    if casts:
        casts.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), labels)
    loss.backward()
    if casts:
        casts.return_gradients()
    optimizer.step()
    return loss.item()


@pytest.mark.equal_bits
@pytest.mark.parametrize("build", [resnet, Several])
def test_steps_are_those_of_autocast_bit_for_bit(build):
    torch.manual_seed(0)
    model = build().train()
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    assert steps(model, Casts(model, torch.bfloat16)) == steps(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert not torch.equal(next(model.parameters()), next(start.parameters()))


@pytest.mark.parametrize("forget", ["refresh", "return_gradients"])
def test_either_half_is_needed(forget, monkeypatch):
    torch.manual_seed(0)
    model = Several().train()
    plain = copy.deepcopy(model)
    casts = Casts(model, torch.bfloat16)
    monkeypatch.setattr(casts, forget, lambda: None)
    assert steps(model, casts) != steps(plain)


def test_layers_hold_casts_within_the_block_alone():
    model = Several()
    before = dict(model.named_parameters(remove_duplicate=False))
    layers = ("first", "frozen", "one", "two", "unused")
    with Casts(model, torch.bfloat16).in_place():
        within = dict(model.named_parameters(remove_duplicate=False))
        assert model.two.weight is model.one.weight
        assert not model.frozen.weight.requires_grad
    halves = {name for name, weight in within.items() if weight.dtype != torch.float32}
    assert halves == {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is weight for name, weight in before.items())


def test_layers_have_their_weights_back_after_an_error():
    model = Several()
    before = list(model.parameters())
    with pytest.raises(RuntimeError, match="out of memory"), Casts(model, torch.bfloat16).in_place():
        raise RuntimeError("out of memory")
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_without_a_precision_nothing_is_cast():
    model = Several()
    before = list(model.parameters())
    with Casts(model, None).in_place():
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
