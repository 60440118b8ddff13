"""Conversions between a plain network, its ASR training form and its deployed form.

`insert`, `deploy` and `fuse` return a new model; `switch_to_deploy` and `switch_to_train` convert a model in place.
"""

from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

from torch import nn

from stripe.asr.layers import asr_layers, channels_of, wrap
from stripe.attention import create_attention
from stripe.folding.exact import fuse_norms
from stripe.gates.hooks import copied
from stripe.gates.trace import Images
from stripe.recipe import PSI_INIT
from stripe.torch_internals import BatchNorm


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
        where: pattern, as for file names, that a layer's path or the last part of it matches: "bn3", "layer3.*.bn3".
        psi_init: the constant psi starts at, or "normal".
        repeats: how many learned vectors each layer gets; their product scales the layer.
        inplace: convert `model` itself.

    Returns:
        The network in training form.

    Raises:
        ValueError: no layer matches, or a name is unknown.
        TypeError: a layer that matches cannot carry a vector.

    Example:
        >>> from torchvision.models import resnet18
        >>> asr = insert(resnet18(), attention="senet", where="bn2")
        >>> type(asr.layer1[0].bn2).__name__
        'ASRLayer'
    """
    model = model if inplace else copied(model)
    names = [
        n for n, _ in model.named_modules() if n and (fnmatchcase(n, where) or fnmatchcase(n.rpartition(".")[2], where))
    ]
    if not names:
        norms = [name for name, m in model.named_modules() if isinstance(m, BatchNorm | nn.GroupNorm | nn.LayerNorm)]
        raise ValueError(
            f"no layer matches where='{where}'; expected a pattern such as one of {', '.join(norms[:5]) or 'none'}"
        )
    for name in names:
        layer = model.get_submodule(name)
        build = partial(create_attention, attention, channels_of(layer))
        model.set_submodule(name, wrap(layer, build, psi_init, repeats))
    return model


def deploy(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Merge every learned vector into its layer, which leaves plain torch modules with the plain network's keys.

    A network without ASR layers stays as it is.

    Raises:
        ArithmeticError: a merged layer differs from its training form.

    Example:
        >>> from torchvision.models import resnet18
        >>> plain = deploy(insert(resnet18(), where="bn2"))
        >>> plain.state_dict().keys() == resnet18().state_dict().keys()
        True
    """
    model = model if inplace else copied(model)
    switch_to_deploy(model, delete=True)
    return model


def switch_to_deploy(model: nn.Module, delete: bool = False) -> dict[str, float]:
    """Deploy every ASR layer of `model` in place; return the relative error of each merge by path."""
    return {name: layer.switch_to_deploy(delete) for name, layer in list(asr_layers(model))}


def switch_to_train(model: nn.Module) -> None:
    """Put every ASR layer of `model` that was deployed without delete back into training form, in place."""
    for _, layer in asr_layers(model):
        layer.switch_to_train()


def fuse(model: nn.Module, images: Images | None = None, *, inplace: bool = False) -> nn.Module:
    """Merge each batch norm into the layer before or after it, in float64; ASR is deployed first.

    The result is for inference, in eval mode: the merged norms become nn.Identity. A norm that cannot be merged
    exactly stays. `stripe.folding.fuse_norms` does the same and reports what was merged, what was left and why.

    Args:
        model: any network.
        images: a small batch as the network takes it; without it, a batch is made that the first layer could take.
        inplace: convert `model` itself; its submodules are then replaced by new ones.

    Returns:
        The network without the norms that could be merged.

    Raises:
        ValueError: no `images` were given and none could be made, or two runs of the network differ.
        ArithmeticError: a merged layer differs from its training form, or the new network from the old.

    Example:
        >>> import torch
        >>> from stripe.asr import fuse
        >>> plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> fuse(plain)[1]
        Identity()
    """
    fused, _ = fuse_norms(deploy(model), images)
    if not inplace:
        return fused
    model.__dict__, model.__class__ = fused.__dict__, type(fused)
    return model
