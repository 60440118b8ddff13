"""Forward hooks on networks of every kind: eager, scripted, compiled, distributed. They last for a `with` block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from stripe.torch_internals import COMPILED, compiled_from, compiler_is_loaded


class Hooks:
    """Forward hooks that end with the `with` block; scripted modules, which refuse hooks, get global ones."""

    def __init__(self) -> None:
        """Start without hooks."""
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Return the empty collection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, act: Callable[[tuple[Any, ...]], Any]) -> None:
        """Call `act(positional arguments)` before each forward of `module`."""
        hook = _Hook(module, act)
        scripted = isinstance(module, torch.jit.ScriptModule)
        register = register_module_forward_pre_hook if scripted else module.register_forward_pre_hook
        self._handles.append(register(hook))

    def after(self, module: nn.Module, act: Callable[[Any], Any], *, always: bool = False) -> None:
        """Call `act(output)` after each forward of `module`; with `always`, after an exception too."""
        hook = _Hook(module, act)
        scripted = isinstance(module, torch.jit.ScriptModule)
        register = register_module_forward_hook if scripted else module.register_forward_hook
        self._handles.append(register(hook, always_call=always))


class _Hook:
    """Calls `act` with the last argument that a hook of `module` is given: the positional arguments, or the output.

    It acts for that one module. A copy of a network that `copy.deepcopy`, pickle or `torch.save` makes while hooks are
    on it carries hooks that do nothing, because what the copy computes is not the watched network's.
    """

    def __init__(self, module: nn.Module | None = None, act: Callable[[Any], Any] | None = None) -> None:
        self._module, self._act = module, act

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        return self._act(given[-1]) if self._act and module is self._module else None

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def output_items(output: Any) -> tuple[Any, ...]:
    """Return a module's output as a tuple, even when it is one tensor."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the eager network inside torch.compile and DistributedDataParallel.

    Raises ValueError for DataParallel, whose replicas run in threads that hooks and modes do not follow.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("a DataParallel network cannot be read: pass its .module, or use DistributedDataParallel")
        wrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = wrapped or compiled_from(model)
        if inner is None:
            return model
        model = inner


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the eager network: unwrapped, and rebuilt without compiled modules where there are some inside.

    The paths of its modules have no `_orig_mod`, and its tensors are the original's.
    """
    model = unwrap(model)
    if all(compiled_from(module) is None for module in model.modules()):
        return model
    made: dict[nn.Module, nn.Module] = {}

    def eager(module: nn.Module) -> nn.Module:
        module = unwrap(module)
        if module not in made:
            made[module] = module
            children = {name: None if child is None else eager(child) for name, child in module._modules.items()}
            if any(children[name] is not child for name, child in module._modules.items()):
                made[module] = copy.copy(module)
                made[module]._modules = children
        return made[module]

    return eager(model)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, even of a network with weights computed from others, as by pruning and old weight norm."""
    made = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in made if value.grad_fn is not None})


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return a network's modules by their paths after `uncompiled`; a compiled module is left out for what it wraps."""
    modules = {path: module for path, module in model.named_modules() if compiled_from(module) is None}
    return {".".join(part for part in path.split(".") if part != COMPILED): modules[path] for path in modules}


def run_eagerly() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run uncompiled, so that hooks and modes see inside them."""
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded() else nullcontext()  # set_stance loads it
