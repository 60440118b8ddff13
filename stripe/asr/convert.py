"""Conversions between a plain network, its ASR training form and its deployed form. Each returns a new model."""

import copy
from collections import Counter
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.fx import Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from stripe.asr.layers import asr_layers, channels_of, wrap
from stripe.attention import create_attention
from stripe.recipe import PSI_INIT

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def insert(
    model: nn.Module,
    attention: str = "senet",
    where: str = "bn3",
    *,
    psi_init: float | Literal["normal"] = PSI_INIT,
    repeats: int = 1,
    inplace: bool = False,
) -> nn.Module:
    """Wrap the layers that match `where` in ASR layers.

    Args:
        model: any network.
        attention: attention module's name (`stripe.attention`).
        where: pattern, as of file names, for the layer's path or for its last part: "bn3", "layer3.*.bn3".
        psi_init: the constant psi starts at, or "normal".
        repeats: how many learned vectors each layer gets, one over another.
        inplace: convert `model` itself.

    Returns:
        The network in training form.

    Raises:
        ValueError: nothing matches, or a name is unknown.
        TypeError: a layer that matches cannot carry a vector.
    """
    model = model if inplace else copy.deepcopy(model)
    names = [
        n for n, _ in model.named_modules() if n and (fnmatchcase(n, where) or fnmatchcase(n.rpartition(".")[2], where))
    ]
    if not names:
        norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm | nn.GroupNorm | nn.LayerNorm)]
        raise ValueError(
            f"no layer matches where='{where}'; expected a pattern such as one of {', '.join(norms[:5]) or 'none'}"
        )
    for name in names:
        layer = model.get_submodule(name)
        build = partial(create_attention, attention, channels_of(layer))
        model.set_submodule(name, wrap(layer, build, psi_init, repeats))
    return model


def deploy(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Merge every learned vector into its layer: plain torch modules, the plain network's keys; a no-op without any.

    Raises:
        ArithmeticError: a merged layer differs from its training form.
    """
    model = model if inplace else copy.deepcopy(model)
    switch_to_deploy(model, delete=True)
    return model


def switch_to_deploy(model: nn.Module, delete: bool = False) -> dict[str, float]:
    """Deploy every ASR layer of `model` in place; return the relative error of each merge by path."""
    return {name: layer.switch_to_deploy(delete) for name, layer in list(asr_layers(model))}


def switch_to_train(model: nn.Module) -> None:
    """Put every ASR layer of `model` that was deployed without delete back into training form, in place."""
    for _, layer in asr_layers(model):
        layer.switch_to_train()


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Merge each batch norm into the convolution whose output it alone takes, in float64; ASR is deployed first.

    The result is for inference: the merged norms become nn.Identity.

    Raises:
        ValueError: torch.fx, which finds the pairs, cannot trace the network's forward.
    """
    model = deploy(model, inplace=inplace).eval()
    for before, norm in _convolution_norm_pairs(model):
        convolution: Any = model.get_submodule(before)
        bn: Any = copy.deepcopy(model.get_submodule(norm))
        merged = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), bn.double())
        model.set_submodule(before, merged.to(convolution.weight))
        model.set_submodule(norm, nn.Identity())
    return model


def _convolution_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the paths of convolutions and of the batch norms that alone take their outputs, each called once."""
    try:
        nodes = [node for node in Tracer().trace(model).nodes if node.op == "call_module"]
    except Exception as error:  # tracing runs the network's own forward: anything may come
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx, so its norms cannot be fused: {error}"
        ) from error
    calls = Counter(node.target for node in nodes)
    pairs = []
    for node in nodes:
        before = node.args[0]
        if (
            isinstance(before, Node)
            and before.op == "call_module"
            and len(before.users) == calls[node.target] == calls[before.target] == 1
            and type(model.get_submodule(str(node.target))) in BATCH_NORMS
            and type(model.get_submodule(str(before.target))) in CONVOLUTIONS
        ):
            pairs.append((str(before.target), str(node.target)))
    return pairs
