"""The names of gates, and where a hook or a dispatch mode meets them; read off the graph, without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from stripe.gate import Form, Gate, Product, Tap, product_of
from stripe.gates.graph import FACTORS, Op, Port, Trace, Value, factors_of

_CHANNELS = "RGC"  # letters of a layout: radix, groups, channels
_SPACE = {1: "L", 2: "HW", 3: "DHW"}  # letters of space, by its number of dimensions


def is_alike(layout: str, copied: bool, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether a factor looks like a gate: several entries along channels, one along each spatial dimension."""
    dims = zip(layout[1:], shape[1:], stride[1:], strict=False)
    return len(shape) == len(layout) and (copied or all((n > 1 and s > 0) == (d in _CHANNELS) for d, n, s in dims))


def describe(graph: Trace, op: Op, operand: int, *, form: Form, dims: tuple[int, ...]) -> Gate:
    """Describe a gate except its name, given its operation, which factor it is, its form and its channel `dims`."""
    pair = [op.args[i] for i in FACTORS[op.name]]
    gate, scaled = pair[operand], pair[1 - operand]
    layout, copied = _layout(len(gate.shape), form, dims), gate.flat - {0} <= op.outputs[0].flat
    source = None if op.name == "div" else _port(graph, gate, dims)  # the divisor is the attention's inverse
    pooled = _average_port(graph, scaled, dims)
    squeeze = pooled or next((p for p in graph.ports[scaled.memory] if _is_map(p.value, scaled, layout)), None)
    earlier = [factors_of(o.name, o.args, Value) for o in graph.ops[op.call.start : op.index] if o.name == op.name]
    alike = [p for p in earlier if p and is_alike(layout, copied, p[operand].shape, p[operand].stride)]
    return Gate(
        name="",
        channels=math.prod(gate.shape[d] for d in dims),
        form=form,
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


def _layout(rank: int, form: Form, dims: tuple[int, ...]) -> str:
    """Return the dimensions' letters: N for batch, C for channels, R for radix or G for groups, the rest space."""
    space = iter(_SPACE.get(rank - 1 - len(dims), "S" * rank))
    leading = "R" if form == "radix" else "G"
    channels = dict(zip(dims, leading * (len(dims) - 1) + "C", strict=True))
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
    """Return where a hook meets a tensor that, flattened to (N, C), is `value` along `dims`; preferably an output."""
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
    """Return whether a port's tensor is the feature map, possibly with radix (or groups) and channels merged."""
    shape, stride = scaled.shape, scaled.stride
    if layout[2:3] == "C" and stride[1] == stride[2] * shape[2] and len(port.shape) == len(shape) - 1:
        shape, stride = (shape[0], shape[1] * shape[2], *shape[3:]), (stride[0], *stride[2:])
    return (port.shape, port.stride, port.offset) == (shape, stride, scaled.offset)


def _average_port(graph: Trace, scaled: Value, dims: tuple[int, ...]) -> Port | None:
    """Return where a hook meets the feature map's average over space, if the network itself computes it."""
    for op in graph.ops:
        if op.name == "mean" and op.inputs[0].memory == scaled.memory and op.args[1:]:
            taken, mean = op.inputs[0], op.outputs[0]
            kept = {*range(1, len(taken.shape))} - {d % len(taken.shape) for d in op.args[1]}
            if kept == {*dims} and _is_same_map(taken, scaled, merged=dims == (1,)):
                return _port(graph, mean, range(1, len(mean.shape)))
    return None


def _is_same_map(taken: Value, scaled: Value, *, merged: bool) -> bool:
    """Return whether two views show the same map; with `merged`, the dimensions after the channels may be flattened."""
    kept = 2 if merged else len(scaled.shape)
    views = [(v.memory, v.offset, math.prod(v.shape), v.shape[:kept], v.stride[:kept]) for v in (taken, scaled)]
    return views[0] == views[1]


def _hands_over(graph: Trace, source: Port | None, op: Op) -> bool:
    """Return whether the attention is a module's output, returned before the product and used by it alone."""
    given = source is not None and source.side == "output" and source.call.end <= op.index
    return source is not None and given and _leads_only_to(graph, source.value, op)


def _leads_only_to(graph: Trace, value: Value, op: Op) -> bool:
    """Return whether `value`, directly or through views, is used by `op` and by nothing else."""
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


def names_of(graph: Trace, gates: Sequence[Gate]) -> list[str]:
    """Name gates by site, or by source where a site has several; "#k" is the site's call, "@j" numbers duplicates."""
    calls = Counter(call.path for call in graph.calls)
    held = Counter((gate.site, product_of(gate).call) for gate in gates)
    names = []
    for gate in gates:
        path = (gate.source if held[gate.site, product_of(gate).call] > 1 else None) or gate.site or "model"
        names.append(f"{path}#{product_of(gate).call}" if calls[gate.site] > 1 else path)
    return [f"{name}@{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
