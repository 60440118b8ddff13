"""Fixtures shared by the rooms' tests: one thread, a fixed seed, networks with statistics that no fresh network has."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import ctypes

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from tests.forked import Forks

torch.set_num_threads(1)

shown_by_todays_matplotlib = pytest.mark.skipif(
    matplotlib.__version_info__ < (3, 9),
    reason="matplotlib 3.8 lays figures out otherwise, and shows none in the notebooks of today's Jupyter",
)


def pytest_addoption(parser):
    parser.addoption(
        "--jitter",
        type=int,
        default=0,
        metavar="UNITS",
        help="move every number that a convolution or linear layer returns up or down at random by so many units in "
        "the last place, as the rounding of another processor would; tests marked equal_bits are left out",
    )


def pytest_configure(config):
    if units := config.getoption("--jitter"):
        nn.modules.conv._ConvNd.__call__ = nn.Linear.__call__ = _jittered_call(units)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--jitter"):
        for item in items:
            if item.get_closest_marker("equal_bits"):
                item.add_marker(pytest.mark.skip(reason="asks for equal bits, which --jitter takes away"))


_ROUNDING = np.random.default_rng(0)
_NUMBERS = {torch.float32: (ctypes.c_int32, np.float32), torch.float64: (ctypes.c_int64, np.float64)}


def _jittered_call(units):
    def call(self, *args, **kwargs):
        output = nn.Module.__call__(self, *args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(output) is not torch.Tensor:
            return output
        if output.device.type == "cpu" and output.dtype in _NUMBERS and output.numel():
            _jitter(output, units)
        return output

    return call


def _jitter(output, units):
    """Change the memory of a tensor itself, so that neither a trace nor autograd meets an operation more."""
    memory, (word, number) = output.untyped_storage(), _NUMBERS[output.dtype]
    pointer, size = ctypes.cast(memory.data_ptr(), ctypes.POINTER(word)), memory.nbytes() // ctypes.sizeof(word)
    words = np.ctypeslib.as_array(pointer, (size,))
    numbers = words.view(number)
    moves = np.where(_ROUNDING.random(size, np.float32) < 0.5, -units, units)
    words += np.where(np.isfinite(numbers) & (numbers != 0), moves, 0).astype(words.dtype)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks():
    """Start processes that have every library loaded."""
    made = Forks()
    yield made
    made.close()


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
