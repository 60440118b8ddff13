"""One forward pass as a graph: every ATen operation, the module call it ran in, and what flowed between.

The network runs exactly once, in eval mode and without gradients, and is left as it was found.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stripe.gates.graph import FACTORS, Call, Op, Place, Port, Trace, Value
from stripe.gates.hooks import Hooks, output_items, run_eagerly
from stripe.gates.kinds import require_traceable
from stripe.torch_internals import DispatchMode, is_composite, run_as_parts, write_positions

Images = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example input: a tensor, or several as positional (tuple, list) or keyword (mapping) arguments."""

_SHAPE_ONLY = ("empty", "zeros", "ones", "full", "rand", "new_")  # they use a tensor's shape, not its values


def trace(model: nn.Module, images: Images) -> Trace:
    """Run `model` once on `images` and return its graph; training flags and buffers are restored.

    Raises ValueError when `images` holds no batch, or the network is sharded.
    """
    require_traceable(model)
    example = list(_tensors(images))
    if not (batches := _batches(images, example)):
        raise ValueError(f"images must be a batch, or a tuple or mapping with one; received {type(images).__name__}")
    recorder = _Recorder(model, example, batches)
    with _left_as_found(model), torch.no_grad(), run_eagerly(), Hooks() as hooks:
        recorder.follow(model, hooks)
        with recorder:
            output = called(model, images)
    recorder.graph.outputs = tuple(recorder.value(tensor) for tensor in tensors_in(output))
    return recorder.graph


def called(model: nn.Module, images: Images) -> Any:
    """Call a network on its example input."""
    if isinstance(images, Mapping):
        return model(**images)
    return model(*images) if isinstance(images, tuple | list) and not _is_image_list(images) else model(images)


def _is_image_list(item: Any) -> bool:
    """Return whether `item` is a list of single images (channels, H, W), of any sizes, as for detectors."""
    images = item if isinstance(item, list) else []
    return bool(images) and all(isinstance(i, Tensor) and i.ndim == 3 and i.shape[0] in (1, 3, 4) for i in images)


def _batches(images: Images, example: Iterable[Tensor]) -> tuple[int, ...]:
    """Return the possible batch sizes: lengths of lists of single images, and first dimensions of other tensors."""
    parts = [
        images,
        *(images.values() if isinstance(images, Mapping) else images if isinstance(images, tuple | list) else ()),
    ]
    lists = [part for part in parts if _is_image_list(part)]
    within = {id(image) for part in lists for image in part}
    sizes = [len(part) for part in lists] + [t.shape[0] for t in example if t.ndim and id(t) not in within]
    return tuple(dict.fromkeys(sizes))


def tensors_in(item: Any) -> list[Tensor]:
    """List the tensors in nested tuples, lists, sets, mappings, dataclasses and objects with attributes, each once."""
    found: list[Tensor] = []
    queue, seen = [item], set[int]()
    while queue:
        part = queue.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, Mapping):
            queue[:0] = list(part.values())
        elif isinstance(part, tuple | list | set | frozenset):
            queue[:0] = list(part)
        elif not isinstance(part, nn.Module | type) and not callable(part):
            slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
            queue[:0] = [*getattr(part, "__dict__", {}).values(), *(getattr(part, n, None) for n in slots)]
    return found


def op_name(func: Any) -> str:
    """Name an ATen overload: its packet's name, without the underscore of the in-place form."""
    return str(func.overloadpacket.__name__).rstrip("_")


def in_parts(mode: DispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a composite operation, which inference mode shows whole, in parts in `mode`; else return NotImplemented."""
    if not is_composite(func):
        return NotImplemented
    with mode:
        return run_as_parts(func, args, kwargs)


# ---- recording ----
class _Recorder(DispatchMode):
    """Builds the graph while the network runs; keeps every tensor alive, since allocators re-use memory."""

    def __init__(self, model: nn.Module, example: list[Tensor], batches: tuple[int, ...]) -> None:
        super().__init__()
        self.graph = Trace(batches)
        self._modules = dict(model.named_modules())
        self._values: dict[int, Value] = {}
        self._aliases: defaultdict[int, list[Tensor]] = defaultdict(list)  # by storage
        self._memory: dict[int, int] = {}  # by storage
        self._writes = 0
        self._stack = [Call("", 0, 0)]
        self._calls: defaultdict[str, int] = defaultdict(int)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name, tensor in named:
            names[id(tensor)].append(name)
        for tensor in {id(tensor): tensor for _, tensor in named}.values():
            self._make(tensor, live=False, parameters=frozenset(names[id(tensor)]))
        self.graph.inputs = tuple(self._make(tensor, live=True) for tensor in example)

    # values
    def value(self, tensor: Tensor) -> Value:
        """Return the current value of `tensor`; a tensor that no operation made inherits from what it aliases."""
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        aliased = [self._values[id(other)] for other in self._aliases[_storage(tensor)]]
        parameters = frozenset[str]().union(*(value.parameters for value in aliased))
        return self._make(tensor, live=any(value.live for value in aliased), parameters=parameters)

    def _make(self, tensor: Tensor, **attributes: Any) -> Value:
        storage = _storage(tensor)
        if id(tensor) not in self._values:
            self._aliases[storage].append(tensor)
        memory = self._memory.setdefault(storage, storage)
        stride, offset = tuple(map(int, tensor.stride())), int(tensor.storage_offset())
        value = Value(tuple(tensor.shape), stride, offset, memory, **attributes)
        self._values[id(tensor)] = value
        return value

    def _write(self, tensor: Tensor) -> list[Tensor]:
        """Note that `tensor` was written; return it and its aliases, which all get new values."""
        storage = _storage(tensor)
        self._writes += 1
        self._memory[storage] = -self._writes
        return [tensor, *(alias for alias in self._aliases[storage] if alias is not tensor)]

    # operations
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = in_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        name, tensors = op_name(func), list(_tensors((args, kwargs)))
        inputs = [self.value(tensor) for tensor in tensors]
        if name in FACTORS:
            _compare(tensors, inputs)
        if any(value.live for value in inputs):
            _count(name, tensors, inputs)
        taken = _replaced((args, kwargs), self.value)
        result = func(*args, **kwargs)
        written = [alias for tensor in _written(func, args, kwargs) for alias in self._write(tensor)]
        inputs += [self._values[id(alias)] for alias in written if all(alias is not tensor for tensor in tensors)]
        made = [*written, *(tensor for tensor in _tensors(result) if id(tensor) not in self._values)]
        op = Op(len(self.graph.ops), name, self._stack[-1], tuple(inputs), taken[0], taken[1], place=self._place())
        self.graph.ops.append(op)
        for value in dict.fromkeys(inputs):
            value.consumers.append(op)
        live = bool(op.live_inputs) and not name.startswith(_SHAPE_ONLY)
        parameters = frozenset() if live else op.parameters
        op.outputs = tuple(self._make(tensor, live=live, parameters=parameters, producer=op) for tensor in made)
        return result

    # module calls
    def follow(self, model: nn.Module, hooks: Hooks) -> None:
        """Record every module call of `model`, with the tensors that pass in and out."""
        for path, module in model.named_modules():
            hooks.before(module, partial(self._enter, path))
            hooks.after(module, self._leave)

    def _enter(self, path: str, args: tuple[Any, ...]) -> None:
        caller = self._stack[-1] if self.graph.calls else None
        place = self._place() if caller else None
        self._stack.append(Call(path, self._calls[path], len(self.graph.ops), caller, place))
        self.graph.calls.append(self._stack[-1])
        self._calls[path] += 1
        self._pass("input", args)

    def _leave(self, output: Any) -> None:
        self._pass("output", output_items(output))
        self._stack.pop().end = len(self.graph.ops)

    def _place(self) -> Place | None:
        """Return where in the source the running module's innermost method now is."""
        module = self._modules[self._stack[-1].path]
        methods, frame = _methods(type(module)), sys._getframe(2)  # type: ignore[arg-type]
        while frame is not None:
            code = frame.f_code
            if code in methods and frame.f_locals.get(code.co_varnames[0]) is module:
                line, last, column, end = next(islice(code.co_positions(), frame.f_lasti // 2, None))
                spanned = None not in (line, last, column, end)
                return Place(*methods[code], (line, last, column, end)) if spanned else None  # type: ignore[arg-type]
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def _pass(self, side: Literal["input", "output"], items: Iterable[Any]) -> None:
        for position, item in enumerate(items):
            if isinstance(item, Tensor):
                value = self.value(item)
                self.graph.ports[value.memory].append(Port(self._stack[-1], side, position, value))


@cache
def _methods(kind: type) -> dict[CodeType, tuple[int, str]]:
    """Return, by code object, owner and name of the Python methods of a class and its bases before `nn.Module`."""
    found = {}
    for owner, each in enumerate(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        for name, member in vars(each).items():
            code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
            if code is not None and code.co_argcount:
                found[code] = owner, name
    return found


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode by setting only its flag; afterwards restore the flags and the buffers."""
    training = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, _ in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, found in buffers:
                if not torch.equal(buffer, found):
                    buffer.copy_(found)
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)


def _compare(tensors: list[Tensor], values: list[Value]) -> None:
    """Note the dimensions along which live factors of equal shape have constant entries; elsewhere strides show it."""
    if len({value.shape for value in values}) == 1 and all(0 not in value.stride for value in values):
        for tensor, value in zip(tensors, values, strict=True):
            if value.live:
                value.even = frozenset(d for d in range(1, tensor.ndim) if _is_even(tensor, d))


def _count(name: str, tensors: list[Tensor], values: list[Value]) -> None:
    """Note the number of each one-entry constant that a live value meets; for lerp, also note a tensor of zeros."""
    for tensor, value in zip(tensors, values, strict=True):
        if not value.live and not value.parameters and value.number is None and tensor.device.type != "meta":
            if tensor.numel() == 1 and not tensor.is_complex():
                value.number = float(tensor)
            elif name == "lerp" and not tensor.any():
                value.number = 0.0


def _is_even(tensor: Tensor, dim: int) -> bool:
    """Return whether a tensor is constant along a dimension, up to the rounding of interpolation."""
    first, last = tensor.select(dim, 0), tensor.select(dim, -1)
    return _is_close(first, last) and _is_close(tensor, first.unsqueeze(dim).expand_as(tensor))


def _is_close(a: Tensor, b: Tensor) -> bool:
    rounding = 4 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    return torch.allclose(a, b, rtol=rounding, atol=0.0)


def _storage(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; an empty tensor, which has none, has its own id."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments that `func` writes to."""
    return list(_tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in write_positions(func)]))


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping | tuple | list):
        for part in item.values() if isinstance(item, Mapping) else item:
            yield from _tensors(part)


def _replaced(item: Any, function: Callable[[Tensor], Value]) -> Any:
    """Return nested arguments with `function` applied to each tensor."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, dict):
        return {key: _replaced(part, function) for key, part in item.items()}
    return type(item)(_replaced(part, function) for part in item) if isinstance(item, tuple | list) else item
