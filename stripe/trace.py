"""One forward pass as a graph: every ATen operation, the module call it ran in, and what flowed between.

The network runs exactly once, in eval mode and without gradients, and is left as it was found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

Images = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example input: a tensor, or several as positional (tuple, list) or keyword (mapping) arguments."""

FACTORS = {"mul": (0, 1), "add": (0, 1), "addcmul": (1, 2)}
"""Operations that multiply or add two tensors, with the positions of the two."""

# Outputs that take only shape, dtype or device from a tensor, never its values.
_SHAPE_ONLY = ("empty", "zeros", "ones", "full", "rand", "new_")


# ---- the graph ----
@dataclass(eq=False)
class Value:
    """A tensor as it was between two writes; `memory` is equal for values that alias each other unchanged.

    `live` values depend on the network's input; `parameters` names the parameters and buffers that flowed
    in without meeting a live value; `even` holds the dimensions found equal by comparison (factors only).
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    memory: int
    live: bool
    parameters: frozenset[str] = frozenset()
    even: frozenset[int] = frozenset()
    producer: Op | None = field(default=None, repr=False)
    consumers: list[Op] = field(default_factory=list, repr=False)

    @property
    def flat(self) -> frozenset[int]:
        """Dimensions along which all entries are one: size 1 or stride 0."""
        return frozenset(d for d, (n, s) in enumerate(zip(self.shape, self.stride, strict=True)) if n == 1 or s == 0)


@dataclass(eq=False)
class Call:
    """One call of a module: its path ("" is the root) and which call of that module it was, from 0."""

    path: str
    index: int
    first: int
    inputs: tuple[Value | None, ...] = ()
    outputs: tuple[Value | None, ...] = ()


@dataclass(eq=False)
class Op:
    """One ATen operation; `args` and `kwargs` are its arguments with every tensor replaced by its Value.

    A write in place outputs new values for the tensor written and for all its aliases, and takes the
    aliases' old values as further inputs. The name has neither overload nor trailing underscore.
    """

    index: int
    name: str
    call: Call
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()

    @property
    def live_inputs(self) -> tuple[Value, ...]:
        """Inputs that depend on the network's input."""
        return tuple(value for value in self.inputs if value.live)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters and buffers this operation uses, also through views of them."""
        return frozenset[str]().union(*(value.parameters for value in self.inputs if not value.live))


@dataclass(frozen=True)
class Port:
    """A place where a hook meets a value: an input or output of a module call, and its position there."""

    call: Call
    side: Literal["input", "output"]
    position: int
    value: Value


@dataclass(eq=False)
class Trace:
    """The graph of one forward pass: operations and module calls in order of start; ports by memory, in order
    of passing; `batch` is the size of the first input's first dimension.
    """

    batch: int
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ports: defaultdict[int, list[Port]] = field(default_factory=lambda: defaultdict(list))
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()


def trace(model: nn.Module, images: Images) -> Trace:
    """Run `model` once on `images` and return its graph; training flags and buffers are put back.

    Raises ValueError when `images` holds no tensor.
    """
    example = list(_tensors(images))
    if not example:
        raise ValueError(
            f"images must be a tensor, or a tuple or mapping with tensors; received {type(images).__name__}"
        )
    recorder = _Recorder(model, example)
    with ExitStack() as stack:
        stack.enter_context(_left_as_found(model))
        stack.enter_context(torch.no_grad())
        stack.callback(recorder.unhook)
        recorder.hook(model)
        with recorder:
            output = call(model, images)
    recorder.graph.outputs = tuple(recorder.value(tensor) for tensor in _tensors(output))
    return recorder.graph


def call(model: nn.Module, images: Images) -> Any:
    """Call `model` on example images: a tensor, positional arguments or keyword arguments."""
    if isinstance(images, Mapping):
        return model(**images)
    return model(*images) if isinstance(images, tuple | list) else model(images)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the eager network inside torch.compile and DistributedDataParallel wrappers.

    Raises ValueError for DataParallel, whose replicas run in threads where hooks and modes are lost.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("DataParallel networks cannot be read: pass model.module, or use DistributedDataParallel")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def op_name(func: Any) -> str:
    """Name an ATen overload: packet name without the underscore of its in-place form."""
    return str(func.overloadpacket.__name__).rstrip("_")


# ---- hooks, for scripted networks too ----
class Hooks:
    """Forward hooks that are removed together; a scripted root, which refuses hooks, is met by global ones."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, module: nn.Module, act: Callable[[tuple[Any, ...]], Any]) -> None:
        """Call `act(args)` before each forward of `module`."""
        if isinstance(module, torch.jit.ScriptModule):
            handle = register_module_forward_pre_hook(lambda m, args: act(args) if m is module else None)
        else:
            handle = module.register_forward_pre_hook(lambda _, args: act(args))
        self._handles.append(handle)

    def after(self, module: nn.Module, act: Callable[[Any], Any], *, always: bool = False) -> None:
        """Call `act(output)` after each forward of `module`, with `always` also after an exception."""
        if isinstance(module, torch.jit.ScriptModule):
            handle = register_module_forward_hook(
                lambda m, args, output: act(output) if m is module else None, always_call=always
            )
        else:
            handle = module.register_forward_hook(lambda _, args, output: act(output), always_call=always)
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module wherever a hook fires: the root, and every module that is not scripted."""
    for path, module in model.named_modules():
        if module is model or not isinstance(module, torch.jit.ScriptModule):
            yield path, module


# ---- recording ----
class _Recorder(TorchDispatchMode):
    """Builds the graph while the network runs; every tensor is kept alive, since allocators re-use memory."""

    def __init__(self, model: nn.Module, example: list[Tensor]) -> None:
        super().__init__()
        self.graph = Trace(batch=example[0].shape[0] if example[0].ndim else 1)
        self._hooks = Hooks()
        self._values: dict[int, Value] = {}
        self._aliases: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._memory: dict[int, int] = {}
        self._writes = 0
        self._stack = [Call("", 0, 0)]
        self._counts: defaultdict[str, int] = defaultdict(int)
        names: defaultdict[int, set[str]] = defaultdict(set)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            names[id(tensor)].add(name)
        for _, tensor in named:
            if id(tensor) not in self._values:
                self._new(tensor, live=False, parameters=frozenset(names[id(tensor)]))
        self.graph.inputs = tuple(self._new(tensor, live=True) for tensor in example)

    # values
    def value(self, tensor: Tensor) -> Value:
        """Return the current value of `tensor`; one that no operation made inherits from what it aliases."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known
        aliased = [self._values[id(other)] for other in self._aliases[_storage(tensor)]]
        return self._new(
            tensor,
            live=any(value.live for value in aliased),
            parameters=frozenset[str]().union(*(value.parameters for value in aliased)),
        )

    def _new(self, tensor: Tensor, **attributes: Any) -> Value:
        storage = _storage(tensor)
        memory = self._memory.setdefault(storage, storage)
        if id(tensor) not in self._values:
            self._aliases[storage].append(tensor)
        value = Value(tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), memory, **attributes)
        self._values[id(tensor)] = value
        return value

    def _written(self, tensor: Tensor) -> list[Tensor]:
        """Mark the memory of `tensor` as changed; return it and its aliases."""
        storage = _storage(tensor)
        self._writes += 1
        self._memory[storage] = -self._writes
        return [tensor, *(other for other in self._aliases[storage] if other is not tensor)]

    # operations
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode shows composite operations whole: record their parts
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name, tensors = op_name(func), list(_tensors((args, kwargs)))
        inputs = [self.value(tensor) for tensor in tensors]
        if name in FACTORS:
            _compare(tensors, inputs)
        values = _map_tensors((args, kwargs), self.value)
        result = func(*args, **kwargs)
        written = [alias for tensor in _written_arguments(func, args, kwargs) for alias in self._written(tensor)]
        inputs += [self._values[id(tensor)] for tensor in written if all(tensor is not t for t in tensors)]
        made = written + [tensor for tensor in _tensors(result) if id(tensor) not in self._values]
        op = Op(len(self.graph.ops), name, self._stack[-1], *values, tuple(inputs))
        self.graph.ops.append(op)
        for value in dict.fromkeys(inputs):
            value.consumers.append(op)
        live = bool(op.live_inputs) and not name.startswith(_SHAPE_ONLY)
        parameters = frozenset() if live else op.parameters
        op.outputs = tuple(self._new(tensor, live=live, parameters=parameters, producer=op) for tensor in made)
        return result

    # module calls
    def hook(self, model: nn.Module) -> None:
        """Follow every module call of `model`."""
        for path, module in hookable(model):
            self._hooks.before(module, lambda args, path=path: self._enter(path, args))  # type: ignore[misc]
            self._hooks.after(module, self._leave, always=True)

    def unhook(self) -> None:
        """Remove the hooks."""
        self._hooks.remove()

    def _enter(self, path: str, args: tuple[Any, ...]) -> None:
        call = Call(path, self._counts[path], len(self.graph.ops), self._ports(args))
        self._counts[path] += 1
        self._stack.append(call)
        self.graph.calls.append(call)
        self._pass(call, "input", call.inputs)

    def _leave(self, output: Any) -> None:
        call = self._stack.pop()
        call.outputs = self._ports(at_ports(output))
        self._pass(call, "output", call.outputs)

    def _pass(self, call: Call, side: Literal["input", "output"], values: tuple[Value | None, ...]) -> None:
        for position, value in enumerate(values):
            if value is not None:
                self.graph.ports[value.memory].append(Port(call, side, position, value))

    def _ports(self, items: Iterable[Any]) -> tuple[Value | None, ...]:
        return tuple(self.value(item) if isinstance(item, Tensor) else None for item in items)


def at_ports(output: Any) -> tuple[Any, ...]:
    """Return a module's output as the tuple whose positions Port.position counts."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Switch `model` to eval mode; afterwards restore each module's training flag and each buffer's values."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for buffer, found in buffers:
                if not torch.equal(buffer, found):
                    buffer.copy_(found)


def _compare(tensors: list[Tensor], values: list[Value]) -> None:
    """Note for full-shaped live factors the dimensions along which they are constant by value.

    Nothing to do where strides tell already: a factor that is flat where the other is not.
    """
    if len({value.shape for value in values}) > 1 or any(0 in v.stride for v in values):
        return
    for tensor, value in zip(tensors, values, strict=True):
        if value.live:
            value.even = frozenset(d for d in range(1, tensor.ndim) if _is_even(tensor, d))


def _is_even(tensor: Tensor, dim: int) -> bool:
    first, last = tensor.select(dim, 0), tensor.select(dim, -1)
    return torch.equal(first, last) and torch.equal(tensor, first.unsqueeze(dim).expand_as(tensor))


def _storage(tensor: Tensor) -> int:
    """Identify the memory of a tensor; empty tensors, which have none, identify themselves."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that `func` writes."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes(func)]
    return [item for item in found if isinstance(item, Tensor)]


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from _tensors(part)
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)


def _map_tensors(item: Any, function: Callable[[Tensor], Value]) -> Any:
    """Return nested tuples, lists and dicts with `function` applied to each tensor."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, dict):
        return {key: _map_tensors(part, function) for key, part in item.items()}
    if isinstance(item, tuple | list):
        return type(item)(_map_tensors(part, function) for part in item)
    return item
