"""Fixtures shared by the rooms' tests: one thread, a fixed seed, networks with statistics that no fresh network has."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import ctypes

import numpy as np
import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--jitter",
        action="store_true",
        help="move what every convolution and linear layer returns by one unit in the last place, up or down at random, "
        "as another processor's rounding would; tests marked equal_bits are left out",
    )


def pytest_configure(config):
    if config.getoption("--jitter"):
        torch.nn.modules.module.register_module_forward_hook(_jitter)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--jitter"):
        for item in items:
            if item.get_closest_marker("equal_bits"):
                item.add_marker(pytest.mark.skip(reason="asks for equal bits, which --jitter takes away"))


_ROUNDING = np.random.default_rng(0)
_WORDS = {torch.float32: ctypes.c_int32, torch.float64: ctypes.c_int64}
_ROUNDED = (nn.modules.conv._ConvNd, nn.Linear)


def _jitter(module, _inputs, output):
    """Change the output's memory, of which neither a trace nor autograd takes notice: no operation is added."""
    if torch.compiler.is_compiling() or not isinstance(module, _ROUNDED) or type(output) is not torch.Tensor:
        return
    if output.device.type != "cpu" or output.dtype not in _WORDS or not output.numel():
        return
    memory, word = output.untyped_storage(), _WORDS[output.dtype]
    words = np.ctypeslib.as_array(
        ctypes.cast(memory.data_ptr(), ctypes.POINTER(word)), (memory.nbytes() // ctypes.sizeof(word),)
    )
    numbers = words.view(np.float32 if output.dtype == torch.float32 else np.float64)
    moves = np.where(_ROUNDING.random(len(words), np.float32) < 0.5, -1, 1)
    words += np.where(np.isfinite(numbers) & (numbers != 0), moves, 0).astype(words.dtype)


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
