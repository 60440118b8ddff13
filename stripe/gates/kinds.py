"""Kinds of networks that cannot be traced or rewritten; each is refused with an error that says what to do instead."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def require_traceable(model: nn.Module) -> None:
    """Raise ValueError for a network sharded by `fully_shard`, whose parameters have no memory of their own."""
    if path := _first(model, "FSDPModule"):
        raise ValueError(
            f"the parameters of {path} are sharded by FSDP: find the gates before fully_shard, they are the same after"
        )


def require_foldable(model: nn.Module) -> None:
    """Raise ValueError for a network that cannot be copied and rewritten."""
    if path := _first(model, "FSDPModule", "FullyShardedDataParallel"):
        raise ValueError(
            f"{path} is sharded by FSDP: load its full state dict into a network of one process, and fold that"
        )
    if path := _first(model, "ScriptModule"):
        raise ValueError(
            f"{path} is scripted or traced, and has no source to change: fold the network before torch.jit"
        )
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    if meta := next((name for name, tensor in tensors.items() if tensor.is_meta), None):
        raise ValueError(f"{meta} is on the meta device and holds no numbers: load the weights first")
    quantised = any(type(module).__module__.startswith("torch.ao.nn.") for module in model.modules())
    if quantised or any(tensor.is_quantized or tensor.dtype == torch.int8 for tensor in tensors.values()):
        raise ValueError("the network's weights are quantised to int8: fold the network before it is quantised")


def _first(model: nn.Module, *kinds: str) -> str | None:
    """Return the path of the first module of one of these classes, which need not have been imported."""
    for path, module in model.named_modules():
        if any(base.__name__ in kinds and base.__module__.startswith("torch.") for base in type(module).__mro__):
            return path or "the network"
    return None
