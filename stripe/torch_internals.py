"""The private names of torch that stripe needs, each wrapped here and nowhere else.

A new release of torch may rename or remove any of them: `tests/test_torch_internals.py` then fails in the test that
describes what the name is used for.
"""

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "COMPILED", "BatchNorm", "Convolution", "DispatchMode", "at_most_graphs", "compiled_from", "compiler_is_loaded",
    "copy_all", "has_hooks", "is_composite", "is_in_place", "names_held", "run_as_parts", "tree_leaves", "tree_map",
    "uncompile", "unset_parameters", "write_positions",
]  # fmt: skip


COMPILED = "_orig_mod"
"""The attribute under which torch.compile keeps the module that it wraps, and so a part of every path in it."""


class DispatchMode(TorchDispatchMode):
    """A context in which `__torch_dispatch__` sees every ATen operation, without loading torch's compiler."""

    def __init__(self) -> None:
        """Prepare the mode; `with` enters it."""
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports torch._dynamo: 200 MB and seconds, even where nothing is compiled


@cache
def is_composite(func: Any) -> bool:
    """Return whether an ATen overload is made of other operations, which inference mode does not show."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def run_as_parts(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run a composite overload as the operations that it is made of."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


@cache
def write_positions(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of each argument that an ATen overload writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def is_in_place(func: Any) -> bool:
    """Return whether an ATen overload writes to any of its arguments."""
    return bool(func._schema.is_mutable)


def unset_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that are None, such as the bias of a layer without one."""
    return [name for name, parameter in module._parameters.items() if parameter is None]


def names_held(module: nn.Module) -> list[str]:
    """Return the names of a module's own submodules, parameters and buffers, including those that are None."""
    return [*module._modules, *module._parameters, *module._buffers]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module's forward has hooks, which may change its inputs or outputs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile wraps in `module`; None if `module` is no such wrapper."""
    inner = getattr(module, COMPILED, None)
    return inner if isinstance(inner, nn.Module) else None


def uncompile(module: nn.Module) -> None:
    """Undo `module.compile()`, which has no public way back."""
    module._compiled_call_impl = None


def compiler_is_loaded() -> bool:
    """Return whether torch's compiler was imported; if it was not, nothing is compiled."""
    return "torch._dynamo" in sys.modules


def at_most_graphs(count: int) -> AbstractContextManager[Any]:
    """Return a context in which torch.compile makes at most `count` graphs of one function; loads the compiler."""
    from torch._dynamo import config  # takes seconds and 200 MB

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the latter in torch 2.6
    patch: AbstractContextManager[Any] = config.patch({name: count})
    return patch


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into its target, which may have another dtype; on a CUDA device this takes few kernels."""
    targets = list(targets)
    if targets:  # torch refuses empty lists
        torch._foreach_copy_(targets, list(sources))
