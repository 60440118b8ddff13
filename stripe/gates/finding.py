"""find_gates: which products of a network scale channels by attention, decided on its graph.

A gate is a tensor that depends on the input, has one value per sample and channel and none per position,
went through a normaliser after its pooling, and multiplies a feature map.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from stripe.gate import Form, Gate, Gates, Product, Tap, product_of
from stripe.gates.graph import ARITHMETIC, FACTORS, MOVES, Op, Port, Trace, Value
from stripe.gates.hooks import uncompiled
from stripe.gates.trace import Images, trace

T = TypeVar("T")

NORMALISERS = frozenset(
    "sigmoid hardsigmoid _softmax tanh hardtanh relu6 clamp lstm_cell _thnn_fused_lstm_cell".split()
)
"""ATen operations of which one must lie between the pooling and the product; clamp needs both bounds."""

_PASSING = MOVES | ARITHMETIC
_SHRINKING = frozenset("convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split())
_CHANNELS = "RGC"  # letters of a layout: radix, groups, channels
_SPACE = {1: "L", 2: "HW", 3: "DHW"}  # and of space, by its number of dimensions


@dataclass(frozen=True)
class Candidate:
    """A product that was looked at: the gate it is, or the reason why it is none.

    `shape` is the supposed attention's, `scaled` that of what it scales. A `hidden` candidate may be a gate, but
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
def find_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> Gates:
    """Return the gates of `model` in order of execution: a list, empty when there is none, that prints as a table.

    `images` is a batch as the network takes it, or a tuple or mapping of several inputs; best large and not
    square. `normalisers` adds ATen names (such as "softplus") to NORMALISERS. Raises ValueError when the
    input is so small that gates may hide.
    """
    graph = trace(uncompiled(model), images)
    candidates = _candidates(graph, normalisers)
    if hidden := dict.fromkeys(candidate.site or "model" for candidate in candidates if candidate.hidden):
        size = "x".join(str(2 * n) for n in graph.inputs[0].shape[2:])
        raise ValueError(
            f"input too small: what is scaled at {', '.join(hidden)} is a single pixel, where a gate cannot be told;"
            f" use images of at least twice the size, {size}"
        )
    return Gates(candidate.gate for candidate in candidates if candidate.gate)


def explain_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product that might scale channels, in order of execution, accepted or with the reason why not."""
    return _candidates(trace(uncompiled(model), images), normalisers)


def _candidates(graph: Trace, normalisers: Collection[str]) -> list[Candidate]:
    judged = [_examine(graph, op, NORMALISERS | set(normalisers)) for op in graph.ops]
    candidates = [candidate for candidate in judged if candidate]
    names = iter(_names(graph, [candidate.gate for candidate in candidates if candidate.gate]))
    return [replace(c, gate=replace(c.gate, name=next(names))) if c.gate else c for c in candidates]


def factors_of(name: str, args: Sequence[Any], kind: type[T]) -> tuple[T, T] | None:
    """Return the two tensors (or values) that an operation multiplies or adds, None for any other operation."""
    pair = [args[i] for i in FACTORS.get(name, ()) if i < len(args) and isinstance(args[i], kind)]
    return (pair[0], pair[1]) if len(pair) == 2 else None


def is_alike(layout: str, copied: bool, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a factor has the look of a gate: entries along its channels, one along every dimension of space."""
    dims = zip(layout[1:], shape[1:], stride[1:], strict=False)
    return len(shape) == len(layout) and (copied or all((n > 1 and s > 0) == (d in _CHANNELS) for d, n, s in dims))


# ---- judging a product ----
@dataclass(frozen=True)
class _Verdict:
    """A factor is a gate of some form along `dims` (radix before channels), or none for a reason."""

    reason: str = ""
    hidden: bool = False
    form: Form = "multiplicative"
    dims: tuple[int, ...] = ()


def _examine(graph: Trace, op: Op, allowed: Collection[str]) -> Candidate | None:
    """Judge either factor of a product as the gate; of a sum, only where a live summand is spread over space."""
    factors = factors_of(op.name, op.args, Value)
    if factors is None or not any(factor.live for factor in factors):
        return None
    if op.name == "add" and not any(
        f.live and (f.flat - op.outputs[0].flat or _is_spread(f, allowed)) for f in factors
    ):
        return None
    judged = []
    for operand, (gate, scaled) in enumerate([factors, factors[::-1]]):
        verdict = _judge(graph, op, gate, scaled, allowed)
        found = None if verdict.reason else _describe(graph, op, operand, verdict)
        candidate = Candidate(op.call.path, op.name, gate.shape, scaled.shape, found, verdict.reason, verdict.hidden)
        judged.append((candidate, gate))
    return min(judged, key=lambda pair: (pair[0].gate is None, not pair[0].hidden, pair[1].live, pair[1].entries))[0]


def _judge(graph: Trace, op: Op, gate: Value, scaled: Value, allowed: Collection[str]) -> _Verdict:
    """Decide whether `gate` gates the feature map `scaled`: first by its shape, then by what computed it."""
    shape = op.outputs[0].shape
    if not gate.live or (len(gate.shape) == len(shape) and 0 in gate.flat and graph.batch > 1):
        return _Verdict("the same for every sample: it does not depend on the input")
    if len(gate.shape) != len(shape) or not gate.shape[0] == shape[0] == graph.batch:
        return _Verdict(f"its first dimension is not the batch of {graph.batch}")
    flat = gate.flat - {0}
    if flat <= op.outputs[0].flat and _is_spread(gate, allowed):
        flat |= gate.even
    dims = tuple(d for d in range(1, len(shape)) if d not in flat)
    wide = flat - op.outputs[0].flat
    if not dims:
        return _Verdict("one value per sample, none per channel")
    if not wide and len(dims) > 1:
        return _Verdict("it varies over space")
    if not wide:
        hidden = len(shape) > 2 and op.name == "mul" and bool(_form(gate, allowed)) and _is_shrunk(gate, scaled)
        return _Verdict("what it scales is a single pixel at this input size", hidden)
    radix = _summed_dim(op, dims)
    if not _are_channels(scaled, dims, wide, radix):
        return _Verdict(f"it varies along dimensions {', '.join(map(str, dims))}, which are not the channels")
    if not scaled.live or scaled.flat & {*dims} or wide <= scaled.flat:
        return _Verdict("outer product: what it scales is no feature map")
    if op.name == "add" and not _is_context(gate, scaled):
        return _Verdict("no learned layer computes it from the map that it is added to")
    form = "additive" if op.name == "add" else _form(gate, allowed)
    if form is None:
        return _Verdict("not normalised (sigmoid, softmax, tanh, ...) between its pooling and the product")
    return _Verdict(form=form, dims=dims) if radix is None else _Verdict(form="radix", dims=radix)


def _are_channels(scaled: Value, dims: tuple[int, ...], wide: frozenset[int], radix: tuple[int, ...] | None) -> bool:
    """Tell channels from positions, by the layer that made the map where one is known."""
    count = math.prod(scaled.shape[d] for d in dims)
    known = _known_channels(scaled, through_splits=radix is not None)
    if radix is not None:
        return known is None or known[0] in (count, scaled.shape[radix[1]])
    at_edge = dims in ((1,), (len(scaled.shape) - 1,))
    if known is None:
        return at_edge
    channels, dim = known
    if dim is not None:
        return dims == (dim,)
    among_wide = channels in {scaled.shape[d] for d in wide}
    if len(dims) == 1:
        return at_edge and (channels == count or not among_wide)
    return channels == count and not among_wide and dims == tuple(range(dims[0], dims[-1] + 1))


def _known_channels(scaled: Value, *, through_splits: bool) -> tuple[int, int | None] | None:
    """Return the channels of the layer that made a map, and their dimension where it kept its shape since.

    A linear layer counts only if nothing was permuted since: token mixing makes positions its channels.
    """
    permuted = False
    for op in scaled.chain():
        made = op.outputs[0]
        same = made.shape == scaled.shape and not permuted
        if op.name in {"cat", "stack"} or (op.name.startswith("split") and not through_splits):
            return None
        if op.parameters and (op.name == "convolution" or "batch_norm" in op.name or "group_norm" in op.name):
            return made.shape[1], 1 if same else None
        if (op.parameters and op.name.endswith(("layer_norm", "rms_norm")) and len(op.args[1]) == 1) or (
            op.is_layer and op.name in {"mm", "addmm"} and not op.args[-1].live and not permuted
        ):
            return made.shape[-1], len(made.shape) - 1 if same else None
        permuted |= op.name in {"permute", "transpose"}
    return None


def _form(gate: Value, allowed: Collection[str]) -> Form | None:
    """Return how a gate is normalised: by a bounded function, or (affine) by its own mean over channels."""
    for op in gate.upstream(_PASSING):
        if op.name in allowed and (op.name != "clamp" or _has_both_bounds(op)):
            return "multiplicative"
        if op.name == "div" and _is_by_own_mean(op):
            return "affine"
    return None


def _has_both_bounds(op: Op) -> bool:
    return sum(bound is not None for bound in (*op.args[1:], *op.kwargs.values())) == 2


def _is_by_own_mean(op: Op) -> bool:
    whole, part = op.args[:2]
    means = [o for o in part.upstream(_PASSING) if o.name == "mean"] if isinstance(part, Value) else []
    return any(value.memory == whole.memory for mean in means for value in mean.inputs)


def _is_context(added: Value, scaled: Value) -> bool:
    """Whether a learned layer computes what is added from the map that it is added to."""
    if not any(op.is_layer for op in added.upstream(_PASSING)):
        return False
    passed = [op for op in scaled.upstream(_PASSING) if op.name in _PASSING]
    above = {scaled.memory, *(value.memory for op in passed for value in op.live_inputs)}
    return any(value.memory in above for op in added.upstream() for value in op.live_inputs)


def _is_spread(value: Value, allowed: Collection[str]) -> bool:
    """Whether a full-shaped value, constant along some dimensions, was spread from a smaller one, not so by chance."""
    ops = value.upstream(_PASSING | set(allowed)) if value.even else ()
    return any(output.entries < value.entries for op in ops for output in op.outputs)


def _is_shrunk(gate: Value, scaled: Value) -> bool:
    """Whether strided layers, rather than a global pooling, left `scaled` as a single pixel."""
    if any(value is scaled for op in gate.upstream(_PASSING | NORMALISERS) for value in op.inputs):
        return False  # x * sigmoid(f(x)), nothing pooled: it would vary over a larger map
    for op in scaled.chain():
        if sum(size > 1 for size in op.main_input.shape[1:]) > 1:
            return op.name in _SHRINKING
    return True


def _summed_dim(op: Op, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return two channel dimensions with the one first over which the product is summed right away, if it is."""
    rank = len(op.outputs[0].shape)
    for consumer in op.outputs[0].consumers if len(dims) == 2 else ():
        if consumer.name == "sum" and consumer.args[1:]:
            summed = [d % rank for d in consumer.args[1]]
            if len(summed) == 1 and summed[0] in dims:
                return dims if summed[0] == dims[0] else dims[::-1]
    return None


# ---- describing a gate ----
def _describe(graph: Trace, op: Op, operand: int, verdict: _Verdict) -> Gate:
    """Describe the gate that `verdict` found, all but its name."""
    pair = [op.args[i] for i in FACTORS[op.name]]
    gate, scaled = pair[operand], pair[1 - operand]
    layout, copied = _layout(len(gate.shape), verdict), gate.flat - {0} <= op.outputs[0].flat
    source = _port(graph, gate, verdict.dims)
    pooled = _average_port(graph, scaled, verdict.dims)
    squeeze = pooled or next((p for p in graph.ports[scaled.memory] if _is_map(p.value, scaled, layout)), None)
    earlier = [factors_of(o.name, o.args, Value) for o in graph.ops[op.call.start : op.index] if o.name == op.name]
    alike = [p for p in earlier if p and is_alike(layout, copied, p[operand].shape, p[operand].stride)]
    return Gate(
        name="",
        channels=math.prod(gate.shape[d] for d in verdict.dims),
        form=verdict.form,
        layout=layout,
        site=op.call.path,
        before=next((o.call.path for o in scaled.chain() if o.is_layer), None),
        after=tuple(dict.fromkeys(_layers_after(op))),
        product=Product(op.call.index, op.name, operand, len(alike), copied),
        attention=_tap(source),
        squeeze=_tap(squeeze),
        pooled=pooled is not None,
        exclusive=_hands_over(graph, source, op),
    )


def _layout(rank: int, verdict: _Verdict) -> str:
    """Name dimensions: batch N, channels C, before them radix R or groups G, the rest space."""
    space = iter(_SPACE.get(rank - 1 - len(verdict.dims), "S" * rank))
    leading = "R" if verdict.form == "radix" else "G"
    channels = dict(zip(verdict.dims, leading * (len(verdict.dims) - 1) + "C", strict=True))
    return "N" + "".join(channels.get(d) or next(space) for d in range(1, rank))


def _layers_after(op: Op) -> Iterator[str]:
    queue, seen = [op], {op}
    while queue:
        consumers = [o for output in queue.pop(0).outputs for o in output.consumers if o not in seen]
        seen.update(consumers)
        yield from (o.call.path for o in consumers if o.is_layer)
        queue += [o for o in consumers if not o.is_layer]


def _tap(port: Port | None) -> Tap | None:
    return Tap(port.call.path, port.call.index, port.side, port.position) if port else None


def _port(graph: Trace, value: Value, dims: Sequence[int]) -> Port | None:
    """Return where a hook meets a tensor that, flattened to (N, C), is `value` along `dims`: an output if it can be."""
    rows = _rows(value, dims)
    ports = [
        p for p in graph.ports[value.memory] if p.value.shape and _rows(p.value, range(1, len(p.value.shape))) == rows
    ]
    return min(ports, key=lambda port: port.side == "input", default=None)


def _rows(value: Value, dims: Sequence[int]) -> tuple[object, ...]:
    """Describe in which order flattening `dims` reads memory: batch, offset, batch stride, runs of (length, step)."""
    runs: list[tuple[int, int]] = []
    for n, step in ((value.shape[d], value.stride[d]) for d in dims if value.shape[d] > 1):
        if runs and runs[-1][1] == n * step:
            runs[-1] = runs[-1][0] * n, step
        else:
            runs.append((n, step))
    return value.shape[0], value.offset, value.stride[0] if value.shape[0] > 1 else 0, runs


def _is_map(port: Value, scaled: Value, layout: str) -> bool:
    """Whether a port's tensor is the feature map, or the same with radix (or groups) and channels in one."""
    shape, stride = scaled.shape, scaled.stride
    if layout[2:3] == "C" and stride[1] == stride[2] * shape[2] and len(port.shape) == len(shape) - 1:
        shape, stride = (shape[0], shape[1] * shape[2], *shape[3:]), (stride[0], *stride[2:])
    return (port.shape, port.stride, port.offset) == (shape, stride, scaled.offset)


def _average_port(graph: Trace, scaled: Value, dims: tuple[int, ...]) -> Port | None:
    """Return where a hook meets the average of the feature map over space that the network itself computes."""
    for op in graph.ops:
        if op.name == "mean" and op.inputs[0].memory == scaled.memory and op.args[1:]:
            taken, mean = op.inputs[0], op.outputs[0]
            kept = {*range(1, len(taken.shape))} - {d % len(taken.shape) for d in op.args[1]}
            if kept == {*dims} and _is_same_map(taken, scaled, merged=dims == (1,)):
                return _port(graph, mean, range(1, len(mean.shape)))
    return None


def _is_same_map(taken: Value, scaled: Value, *, merged: bool) -> bool:
    """Whether two views show the same map; with `merged`, the dimensions behind the channels may be flattened."""
    kept = 2 if merged else len(scaled.shape)
    views = [(v.memory, v.offset, math.prod(v.shape), v.shape[:kept], v.stride[:kept]) for v in (taken, scaled)]
    return views[0] == views[1]


def _hands_over(graph: Trace, source: Port | None, op: Op) -> bool:
    """Whether the tensor is a module's output, given out before the product, which alone takes it."""
    given = source is not None and source.side == "output" and source.call.end <= op.index
    return source is not None and given and _leads_only_to(graph, source.value, op)


def _leads_only_to(graph: Trace, value: Value, op: Op) -> bool:
    """Whether `value`, through views, is used by `op` and by nothing else."""
    queue, reached = [value], False
    while queue:
        current = queue.pop()
        if current in graph.outputs:
            return False
        for consumer in current.consumers:
            if consumer is op:
                reached = True
            elif all(output.memory == value.memory for output in consumer.outputs):
                queue += consumer.outputs
            else:
                return False
    return reached


def _names(graph: Trace, gates: Sequence[Gate]) -> list[str]:
    """Name gates by site, or by source where a site holds several; "#k" is the site's call, "@j" tells the rest."""
    calls = Counter(call.path for call in graph.calls)
    held = Counter((gate.site, product_of(gate).call) for gate in gates)
    names = []
    for gate in gates:
        path = (gate.source if held[gate.site, product_of(gate).call] > 1 else None) or gate.site or "model"
        names.append(f"{path}#{product_of(gate).call}" if calls[gate.site] > 1 else path)
    return [f"{name}@{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
