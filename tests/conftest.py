"""Fixtures shared by the rooms' tests: one thread, a fixed seed, networks with statistics that no fresh network has."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def randomize(model: nn.Module) -> nn.Module:
    """Give norms, affine parameters and psi random values: on fresh networks equality tests are vacuous."""
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if name == "vector":
                    value.normal_()
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if (
                isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
                and module.weight is not None
            ):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_()
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
