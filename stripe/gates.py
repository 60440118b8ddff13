"""Gate, find_gates(model, images): where a network scales channels by attention, and how to read it there.

A gate is found by what the network computes, never by the names of its classes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stripe.trace import FACTORS, Hooks, Images, Op, Trace, Value, at_ports, hookable, op_name, trace, unwrap

Form = Literal["multiplicative", "additive", "affine", "radix"]
Sink = Callable[["Gate", Literal["attention", "squeeze"], Tensor], None]

NORMALISERS = frozenset(
    {"sigmoid", "hardsigmoid", "_softmax", "tanh", "hardtanh", "relu6", "clamp", "lstm_cell", "_thnn_fused_lstm_cell"}
)
"""ATen operations of which one must lie between the pooling and the product; clamp needs both bounds."""

_MOVES = frozenset(
    "view _unsafe_view _reshape_alias expand permute transpose t squeeze unsqueeze clone _to_copy alias detach"
    " select slice split split_with_sizes unbind cat stack repeat index index_select copy lift_fresh"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d".split()
)
_ARITHMETIC = frozenset("add sub rsub mul div neg pow reciprocal addcmul maximum minimum".split())
_SHRINKING = frozenset("convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split())
_JOINS = frozenset({"cat", "stack", "split", "split_with_sizes"})
_SPACE = {0: "", 1: "L", 2: "HW", 3: "DHW"}


# ---- what a gate is ----
@dataclass(frozen=True)
class Tap:
    """Where a hook meets a tensor: an input or output (by position) of the k-th call of the module at `path`."""

    path: str
    call: int
    side: Literal["input", "output"]
    position: int


@dataclass(frozen=True)
class Product:
    """The operation that applies a gate, as a dispatch mode recognises it within one call of the gate's site.

    `operand` says which factor is the gate; `ordinal` counts the operations of this look before it;
    `copied` marks a gate that was copied to the full shape of its feature map.
    """

    call: int
    op: str
    operand: int
    ordinal: int
    copied: bool


@dataclass(frozen=True)
class Gate:
    """A place where a feature map is scaled (or shifted) by one input-dependent value per sample and channel.

    `site` is the path of the module in whose forward the product happens ("" is the network itself). `layout`
    names the product's dimensions: N, C, R (radix) or G (channel groups), the rest is space. `before` is the
    layer that made the feature map, `after` are the layers that take the product. `attention` and `squeeze`
    say where hooks can read the two, None where only a dispatch mode can; `pooled` that the network itself
    averages at `squeeze`; `exclusive` that nothing but the product uses the module output at `attention`.
    """

    name: str
    channels: int
    form: Form
    layout: str
    site: str
    before: str | None
    after: tuple[str, ...]
    product: Product
    attention: Tap | None
    squeeze: Tap | None
    pooled: bool
    exclusive: bool

    @property
    def source(self) -> str | None:
        """Path of the module whose output is the gate's tensor, None when it is computed functionally."""
        return self.attention.path if self.attention and self.attention.side == "output" else None


@dataclass(frozen=True)
class Candidate:
    """A product that was looked at: the gate it is, or the reason why it is none.

    `shape` is the supposed gate's, `scaled` that of what it scales. A `hidden` candidate may be a gate, but
    its feature map is a single pixel at this input size.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    scaled: tuple[int, ...]
    gate: Gate | None
    reason: str
    hidden: bool = False


# ---- finding ----
def find_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Gate]:
    """Return the gates of `model` in order of execution, [] when there is none.

    `images` is a batch as the network takes it, or a tuple or mapping of several inputs; it should be large
    and not square. `normalisers` adds ATen names (such as "softplus") to NORMALISERS. Raises ValueError when
    the input is so small that gates may hide.
    """
    candidates = explain_gates(model, images, normalisers=normalisers)
    if hidden := [candidate.site or "model" for candidate in candidates if candidate.hidden]:
        raise ValueError(
            f"input too small: feature maps shrink to one pixel, where a gate cannot be told, at {', '.join(hidden)};"
            " use images of at least twice the height and width"
        )
    return [candidate.gate for candidate in candidates if candidate.gate]


def explain_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product that could scale channels, in order of execution, accepted or with its reason."""
    graph = trace(unwrap(model), images)
    allowed = NORMALISERS | set(normalisers)
    found = [_examine(graph, op, allowed) for op in graph.ops if op.name in FACTORS]
    candidates = [candidate for candidate in found if candidate]
    names = iter(_names(graph, [candidate.gate for candidate in candidates if candidate.gate]))
    return [replace(c, gate=replace(c.gate, name=next(names))) if c.gate else c for c in candidates]


@dataclass(frozen=True)
class _Verdict:
    """What one operand of a product is: channel dimensions in order (radix before channels), or a reason."""

    reason: str = ""
    hidden: bool = False
    form: Form = "multiplicative"
    channel_dims: tuple[int, ...] = ()
    radix: int | None = None


def _examine(graph: Trace, op: Op, allowed: Collection[str]) -> Candidate | None:
    """Judge both operands of a product or sum as the gate; sums count only when one operand is broadcast."""
    factors = [op.args[i] for i in FACTORS[op.name]]
    if not all(isinstance(factor, Value) for factor in factors) or not any(factor.live for factor in factors):
        return None
    judged = []
    for operand, (gate, scaled) in enumerate((factors, factors[::-1])):
        verdict = _judge(graph, op, gate, scaled, allowed)
        made = _gate(graph, op, operand, gate, scaled, verdict) if not verdict.reason else None
        candidate = Candidate(op.call.path, op.name, gate.shape, scaled.shape, made, verdict.reason, verdict.hidden)
        judged.append((made is None, not verdict.hidden, gate.live, _size(gate), candidate))
    rejected, *_, candidate = min(judged, key=lambda item: item[:-1])
    return None if rejected and op.name == "add" else candidate


def _judge(graph: Trace, op: Op, gate: Value, scaled: Value, allowed: Collection[str]) -> _Verdict:
    """Decide whether `gate` gates the feature map `scaled`: first by its shape, then by what computed it."""
    shape = op.outputs[0].shape
    if not gate.live or (graph.batch > 1 and 0 in gate.flat and len(gate.shape) == len(shape)):
        return _Verdict("the same for every sample: it does not depend on the input")
    if len(gate.shape) != len(shape) or not gate.shape[0] == shape[0] == graph.batch:
        return _Verdict(f"its first dimension is not the batch of {graph.batch}")
    dims = range(1, len(shape))
    flat = (gate.flat - {0}) or gate.even
    varying = tuple(d for d in dims if d not in flat)
    wide = {d for d in flat if shape[d] > 1}
    if not varying:
        return _Verdict("one value per sample, none per channel")
    if len(varying) == len(dims):
        return _Verdict("it varies over space")
    if not wide:
        hidden = op.name == "mul" and _form(gate, allowed) is not None and _is_shrunk(gate, scaled)
        return _Verdict("its feature map is a single pixel at this input size", hidden=hidden)
    radix = _summed_dim(op, varying) if len(varying) == 2 else None
    if radix is not None:
        varying = (radix, *(d for d in varying if d != radix))
    elif not _are_channels(scaled, varying, wide):
        return _Verdict(f"it varies along dimensions {varying}, which are not the channels")
    if not scaled.live or any(d in scaled.flat for d in varying) or wide <= scaled.flat:
        return _Verdict("outer product: what it scales is no feature map")
    if gate.even and not gate.flat - {0} and not _is_expanded(gate, allowed):
        return _Verdict("it varies over space: constant here by its values only")
    form = _context(gate, scaled) if op.name == "add" else _form(gate, allowed)
    if form is None:
        return _Verdict("no normaliser (sigmoid, softmax, tanh, ...) between its pooling and the product")
    return _Verdict(form="radix" if radix is not None else form, channel_dims=varying, radix=radix)


def _are_channels(scaled: Value, varying: tuple[int, ...], wide: set[int]) -> bool:
    """Tell channels from positions: by place, and by the layer (convolution or norm) that made the map."""
    last = len(scaled.shape) - 1
    count = math.prod(scaled.shape[d] for d in varying)
    made = None
    for op in _chain(scaled):
        if op.name in _JOINS:
            break
        if op.parameters and ("norm" in op.name or op.name == "convolution"):
            made = op.outputs[0]
            channel = len(made.shape) - 1 if "layer_norm" in op.name or "rms" in op.name else 1
            break
    if made is None:
        return varying in ((1,), (last,))
    if made.shape == scaled.shape:
        return varying == (channel,)
    channels = made.shape[channel]
    if len(varying) == 1:
        known = channels == count or channels not in {scaled.shape[d] for d in wide}
        return varying[0] in (1, last) and known
    return channels == count and varying == tuple(range(varying[0], varying[-1] + 1))


def _form(gate: Value, allowed: Collection[str]) -> Form | None:
    """Return how the gate is normalised: by a bounded function, or (affine) by its mean over channels."""
    for op in _reached(gate, _MOVES | _ARITHMETIC):
        if op.name in allowed and (op.name != "clamp" or _has_both_bounds(op)):
            return "multiplicative"
        if op.name == "div" and _is_by_own_mean(op):
            return "affine"
    return None


def _has_both_bounds(op: Op) -> bool:
    bounds = (*op.args[1:], *op.kwargs.values())
    return sum(bound is not None for bound in bounds) == 2


def _is_by_own_mean(op: Op) -> bool:
    """Whether a division is by the numerator's own mean, as in global response normalisation."""
    whole, part = op.args[:2]
    if not isinstance(part, Value):
        return False
    means = [reached for reached in _reached(part, _ARITHMETIC | _MOVES) if reached.name == "mean"]
    return any(value.memory == whole.memory for mean in means for value in mean.inputs)


def _context(added: Value, scaled: Value) -> Form | None:
    """Return "additive" when a learned layer computes what is added from the map that it is added to."""
    if not any(op.parameters for op in _reached(added, _MOVES) if op.name not in _MOVES | _ARITHMETIC):
        return None
    above = {scaled.memory, *(v.memory for op in _reached(scaled, _MOVES | _ARITHMETIC) for v in op.live_inputs)}
    return "additive" if any(v.memory in above for op in _reached(added) for v in op.live_inputs) else None


def _is_expanded(gate: Value, allowed: Collection[str]) -> bool:
    """Whether a full-shaped gate was spread from something smaller, rather than equal by chance."""
    ops = _reached(gate, _MOVES | _ARITHMETIC | set(allowed))
    return any(_size(value) < _size(gate) for op in ops for value in op.live_inputs)


def _is_shrunk(gate: Value, scaled: Value) -> bool:
    """Whether strided layers, rather than a global pooling, left `scaled` as a single pixel."""
    if any(value is scaled for op in _reached(gate, _MOVES | _ARITHMETIC | NORMALISERS) for value in op.inputs):
        return False  # x * sigmoid(x): an activation
    for op in _chain(scaled):
        if sum(size > 1 for size in _main_input(op).shape[1:]) > 1:
            return op.name in _SHRINKING
    return True


def _summed_dim(op: Op, dims: tuple[int, ...]) -> int | None:
    """Return the one of `dims` that the product is summed over right away."""
    for consumer in op.outputs[0].consumers:
        if consumer.name == "sum" and len(consumer.args) > 1:
            summed = [d % len(op.outputs[0].shape) for d in consumer.args[1]]
            if len(summed) == 1 and summed[0] in dims:
                return int(summed[0])
    return None


# ---- walking the graph ----
def _reached(value: Value, passing: Collection[str] | None = None) -> Iterator[Op]:
    """Yield the live operations upstream of `value`, going through those named in `passing` (None: all)."""
    queue, seen = [value], set()
    while queue:
        op = queue.pop(0).producer
        if op is not None and op not in seen and op.live_inputs:
            seen.add(op)
            yield op
            if passing is None or op.name in passing:
                queue += op.live_inputs


def _chain(value: Value) -> Iterator[Op]:
    """Yield the operations that made `value`, following the largest live input."""
    op = value.producer
    while op is not None and op.live_inputs:
        yield op
        op = _main_input(op).producer


def _main_input(op: Op) -> Value:
    return max(op.live_inputs, key=_size)


def _size(value: Value) -> int:
    return math.prod(n for d, n in enumerate(value.shape) if d not in value.flat)


def _is_layer(op: Op) -> bool:
    return bool(op.parameters) and op.name not in _MOVES | _ARITHMETIC


def _layer_before(value: Value) -> str | None:
    return next((op.call.path for op in _chain(value) if _is_layer(op)), None)


def _layers_after(value: Value) -> tuple[str, ...]:
    queue, paths, seen = [value], [], set()
    while queue:
        for op in queue.pop(0).consumers:
            if op not in seen:
                seen.add(op)
                if _is_layer(op):
                    paths.append(op.call.path)
                else:
                    queue += op.outputs
    return tuple(dict.fromkeys(paths))


# ---- describing a gate ----
def _gate(graph: Trace, op: Op, operand: int, gate: Value, scaled: Value, verdict: _Verdict) -> Gate:
    dims = verdict.channel_dims
    layout = _layout(len(gate.shape), dims, verdict.radix)
    copied = not gate.flat - {0}
    ports = graph.ports[gate.memory]
    rows = _rows(gate, dims)
    fitting = [p for p in ports if p.value.shape[:1] == (graph.batch,) and _rows(p.value) == rows]
    attention = min(fitting, key=lambda port: port.side == "input", default=None)
    looks = [_looks(layout, copied, op.name, operand, other) for other in graph.ops[op.call.first : op.index]]
    squeeze, pooled = _squeeze_tap(graph, scaled, layout, dims)
    return Gate(
        name="",
        channels=math.prod(gate.shape[d] for d in dims),
        form=verdict.form,
        layout=layout,
        site=op.call.path,
        before=_layer_before(scaled),
        after=_layers_after(op.outputs[0]),
        product=Product(op.call.index, op.name, operand, sum(looks), copied),
        attention=attention and Tap(attention.call.path, attention.call.index, attention.side, attention.position),
        squeeze=squeeze,
        pooled=pooled,
        exclusive=attention is not None and attention.side == "output" and _leads_only_to(graph, attention.value, op),
    )
