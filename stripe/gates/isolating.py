"""isolate: the attention of a gate as a function of the squeeze, taken out of the network that computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stripe.gate import Gate, Tap
from stripe.gates.hooks import Hooks, modules_by_path, output_items, run_eagerly, unwrap
from stripe.gates.layouts import like_position
from stripe.gates.reading import read_gates

TOLERANCE = 1e-3
"""Largest relative difference accepted between an image's attention and that computed from its squeeze alone."""


class IsolatedAttention(nn.Module):
    """Maps a squeeze (C,) differentiably to the attention (C,) that the network computes from it.

    The squeeze stands in for the feature map that the gate scales, with equal values at every position. `module` is the
    network's own module, not a copy: the smallest one in which both the feature map (or its average) and the attention
    appear. It runs on the arguments that it received for one sample, and stops once it has the attention.
    """

    def __init__(self, gate: Gate, module: nn.Module, args: tuple[Any, ...], ends: tuple[Tap, Tap]) -> None:
        """Keep the module and its arguments; `ends` are where the squeeze enters and the attention leaves it."""
        super().__init__()
        self.gate, self.module = gate, module
        self._args, (self._entrance, self._exit) = args, ends

    def forward(self, squeeze: Tensor) -> Tensor:
        """Return the attention (C,) for a squeeze (C,)."""
        calls: Counter[Tap] = Counter()
        modules = modules_by_path(self.module)

        def is_due(tap: Tap) -> bool:
            calls[tap] += 1
            return calls[tap] - 1 == tap.call

        def enter(items: Sequence[Any]) -> Any:
            if not is_due(self._entrance):
                return None
            taken = items[self._entrance.position]
            value = squeeze.to(taken).reshape(taken.shape) if self.gate.pooled else self._map(squeeze, taken)
            replaced = [*items]
            replaced[self._entrance.position] = value
            return value if self._entrance.side == "output" and len(items) == 1 else tuple(replaced)

        def leave(output: Any) -> None:
            if is_due(self._exit):
                raise _Left(output_items(output)[self._exit.position])

        with run_eagerly(), Hooks() as hooks:
            if self._entrance.side == "input":
                hooks.before(modules[self._entrance.path], enter)
            else:
                hooks.after(modules[self._entrance.path], lambda output: enter(output_items(output)))
            hooks.after(modules[self._exit.path], leave)
            try:
                self.module(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in self._args))
            except _Left as left:
                return left.attention.flatten()
        raise RuntimeError(f"gate {self.gate.name!r} was not passed")

    def _map(self, squeeze: Tensor, taken: Tensor) -> Tensor:
        """Return the squeeze as a single position if it is an input of `module`, else expanded to a whole map."""
        value = like_position(self.gate, squeeze, taken)
        return (
            value if self._entrance.path == "" and self._entrance.side == "input" else value.expand(taken.shape).clone()
        )


class _Left(Exception):  # noqa: N818
    """Ends a forward early once the attention is known; it is not an error."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = attention


def isolate(
    model: nn.Module, gates: Sequence[Gate], images: Tensor
) -> tuple[dict[str, IsolatedAttention], dict[str, str]]:
    """Return, by gate name, the attention as a function of the squeeze, and for other gates why there is none.

    `images` are two or more images, as `find_gates` takes them: modules run on the arguments that they received for the
    first image, and must reproduce the last image's attention from its squeeze. The network runs on the images twice,
    in the mode that it is in, so it should be in eval mode.

    Raises:
        ValueError: the network does not have these gates.
    """
    model, found, reasons = unwrap(model), dict[str, IsolatedAttention](), dict[str, str]()
    values: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad(), read_gates(model, gates, lambda g, kind, v: values.update({(g.name, kind): v}), squeeze=True):
        model(images)
    frames = _run_once(model, [gate for gate in gates if gate.source is not None and gate.squeeze], images)
    for gate in gates:
        reason = (
            "no module returns its attention" if gate.source is None else "no module takes or returns what it scales"
        )
        for attention in frames[gate.name].attentions(modules_by_path(model)) if gate.name in frames else ():
            squeeze, expected = values[gate.name, "squeeze"][-1], values[gate.name, "attention"][-1]
            if not (reason := _fault(attention, squeeze, expected)):
                found[gate.name] = attention
                break
        if gate.name not in found:
            reasons[gate.name] = reason
    return found, reasons


def _fault(attention: IsolatedAttention, squeeze: Tensor, expected: Tensor) -> str:
    """Return why this is not a function of the squeeze, or an empty string if it is one."""
    squeeze = squeeze.clone().requires_grad_()
    try:
        with torch.enable_grad():
            values = attention(squeeze)
            gradient = values.requires_grad and torch.autograd.grad(values.sum(), squeeze, allow_unused=True)[0]
    except Exception as error:  # the call is a trial on inputs that the module was not made for: any error may come
        return f"its attention cannot be computed from a squeeze ({' '.join(str(error).split())[:100]})"
    if not isinstance(gradient, Tensor) or values.shape != expected.shape:
        return "its attention is not computed from what it scales"
    far = (values - expected).abs().max() > TOLERANCE * expected.abs().max()
    return "its attention is not computed from the squeeze alone" if attention.gate.pooled and far else ""


# ---- where a gate's attention is computed ----
@dataclass(frozen=True, eq=False)
class _Entry:
    """A call of a module: its arguments for one sample, all modules' counts of earlier calls, its input identities."""

    args: tuple[Any, ...]
    calls: Counter[str]
    inputs: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, eq=False)
class _Frame:
    """The modules that were running, by path, when a gate's attention was returned; the identity of what it scales."""

    gate: Gate
    entries: Mapping[str, _Entry]
    scaled: tuple[Any, ...]

    def attentions(self, modules: Mapping[str, nn.Module]) -> Iterator[IsolatedAttention]:
        """Yield the modules that may compute the attention from the squeeze, the smallest first."""
        for path in sorted(self.entries, key=len, reverse=True):
            if (entrance := self._entrance(path)) and (leave := self._within(path, self.gate.attention)):
                yield IsolatedAttention(self.gate, modules[path], self.entries[path].args, (entrance, leave))

    def _entrance(self, path: str) -> Tap | None:
        """Return where the module at `path` takes what the gate scales, or where the squeeze appears inside it."""
        if not self.gate.pooled and self.scaled in self.entries[path].inputs:
            return Tap("", 0, "input", self.entries[path].inputs.index(self.scaled))
        return self._within(path, self.gate.squeeze)

    def _within(self, path: str, tap: Tap | None) -> Tap | None:
        """Return a place in the network relative to the running call of the module at `path`; None if it is outside."""
        if tap is None or not is_inside(tap.path, path):
            return None
        if tap.path == path:
            return replace(tap, path="", call=0)
        call = tap.call - self.entries[path].calls[tap.path]
        return replace(tap, path=tap.path[len(path) + bool(path) :], call=call) if call >= 0 else None


def is_inside(path: str, outer: str) -> bool:
    """Return whether the module at `path` is the one at `outer` or inside it."""
    return path == outer or not outer or path.startswith(f"{outer}.")


def _run_once(model: nn.Module, gates: Sequence[Gate], images: Tensor) -> dict[str, _Frame]:
    """Run the network; return, by gate name, what was running when the gate's attention was returned."""
    running: dict[str, _Entry] = {}
    calls: Counter[str] = Counter()
    scaled: dict[str, tuple[Any, ...]] = {}
    frames: dict[str, _Frame] = {}

    def begin(path: str, args: tuple[Any, ...]) -> None:
        one = tuple(a[:1] if isinstance(a, Tensor) and a.ndim and len(a) == len(images) else a for a in args)
        running[path] = _Entry(one, Counter(calls), tuple(map(_identity, args)))
        calls[path] += 1
        meet(path, "input", args)

    def end(path: str, output: Any) -> None:
        meet(path, "output", output_items(output))
        for gate in gates:
            tap = gate.attention
            if tap and (tap.path, tap.call) == (path, calls[path] - 1) and gate.name in scaled:
                around = {outer: entry for outer, entry in running.items() if is_inside(path, outer)}
                frames[gate.name] = _Frame(gate, around, scaled[gate.name])
        del running[path]

    def meet(path: str, side: str, items: Sequence[Any]) -> None:
        for gate in gates:
            tap = gate.squeeze
            if tap and (tap.path, tap.call, tap.side) == (path, calls[path] - 1, side) and tap.position < len(items):
                scaled[gate.name] = _identity(items[tap.position])

    with torch.no_grad(), run_eagerly(), Hooks() as hooks:
        for path, module in modules_by_path(model).items():
            hooks.before(module, partial(begin, path))
            hooks.after(module, partial(end, path))
        model(images)
    return frames


def _identity(item: Any) -> tuple[Any, ...]:
    """Return what identifies a tensor's memory, view and version; any other object is identified by its id."""
    if not isinstance(item, Tensor):
        return (id(item), None)
    return item.data_ptr(), tuple(item.shape), item.stride(), item._version
