"""What the tests of folding share: a fold checked against constant gates, and a small network around an attention."""

import warnings

import torch
from timm.layers import SEModule
from torch import nn

from stripe.folding import fold
from stripe.gates import find_gates, replace_gates
from tests.conftest import randomize, relative_error

EXACT = 1e-12


def constants_of(gates):
    return {gate.name: torch.rand(gate.channels).double() * 1.2 + 0.1 for gate in gates}


def at_constants(model, images, gates, constants):
    with torch.no_grad(), replace_gates(model, gates, constants):
        return model(images)


def folded_exactly(model, images, *, constants=None):
    """Fold every gate; compare with constant gates, and see that the constants matter."""
    gates = find_gates(model, images)
    constants = constants or constants_of(gates)
    expected = at_constants(model, images, gates, constants)
    folded, report = fold(model, constants, images)
    with torch.no_grad():
        assert relative_error(folded(images), expected) < EXACT
        assert relative_error(model(images), expected) > 1e-4
    assert report.error < EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says why other products are no gates
        assert find_gates(folded, images) == []
    assert list(report.table["gate"]) == list(constants)
    return folded, report.table


def small():
    return torch.randn(3, 3, 14, 22).double()


class Shortcut(nn.Module):
    """Adds a branch of the same images, so that nothing goes forward."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(3, 8, 3)

    def forward(self, x, images):
        return x + self.branch(images)


class Net(nn.Module):
    def __init__(self, before=None, maps=None, gate=None, after=None):
        super().__init__()
        self.before = before or nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.maps = maps or nn.Identity()
        self.se = gate or SEModule(8)
        self.after = after or Shortcut()
        randomize(self).double().eval()

    def forward(self, images):
        x = self.se(self.maps(self.before(images)))
        return self.after(x, images) if isinstance(self.after, Shortcut) else self.after(x)
