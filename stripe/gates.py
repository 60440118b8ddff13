"""Gate, find_gates(model, images): where a network scales channels by attention, and how to read it there.

A gate is found by what the network computes, never by the names of its classes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stripe.trace import FACTORS, Hooks, Images, Op, Port, Trace, Value, at_ports, hookable, op_name, trace, unwrap

Form = Literal["multiplicative", "additive", "affine", "radix"]
Kind = Literal["attention", "squeeze"]
Sink = Callable[["Gate", Kind, Tensor], None]
T = TypeVar("T")

NORMALISERS = frozenset(
    "sigmoid hardsigmoid _softmax tanh hardtanh relu6 clamp lstm_cell _thnn_fused_lstm_cell".split()
)
"""ATen operations of which one must lie between the pooling and the product; clamp needs both bounds."""

_MOVES = frozenset(
    "view _unsafe_view _reshape_alias expand permute transpose t squeeze unsqueeze clone _to_copy alias detach"
    " select slice split split_with_sizes unbind cat stack repeat index index_select copy lift_fresh"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d".split()
)
_ARITHMETIC = frozenset("add sub rsub mul div neg pow reciprocal addcmul maximum minimum".split())
_PASSING = _MOVES | _ARITHMETIC
_SHRINKING = frozenset("convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split())
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

    `operand` says which factor is the gate; `ordinal` counts the operations of the same look before it;
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
    averages at `squeeze`; `exclusive` that only the product uses the module output at `attention`.
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

    `images` is a batch as the network takes it, or a tuple or mapping of several inputs; best large and not
    square. `normalisers` adds ATen names (such as "softplus") to NORMALISERS. Raises ValueError when the
    input is so small that gates may hide.
    """
    candidates = explain_gates(model, images, normalisers=normalisers)
    if hidden := [candidate.site or "model" for candidate in candidates if candidate.hidden]:
        raise ValueError(
            f"input too small: feature maps shrink to one pixel, where a gate cannot be told, at {', '.join(hidden)};"
            " use images of at least twice the height and width"
        )
    return [candidate.gate for candidate in candidates if candidate.gate]


def explain_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product that might scale channels, in order of execution, accepted or with its reason."""
    graph = trace(unwrap(model), images)
    judged = [_examine(graph, op, NORMALISERS | set(normalisers)) for op in graph.ops]
    candidates = [candidate for candidate in judged if candidate]
    names = iter(_names(graph, [candidate.gate for candidate in candidates if candidate.gate]))
    return [replace(c, gate=replace(c.gate, name=next(names))) if c.gate else c for c in candidates]


@dataclass(frozen=True)
class _Verdict:
    """What one factor of a product is: a gate along `channel_dims` (radix before channels), or none for a reason."""

    reason: str = ""
    hidden: bool = False
    form: Form = "multiplicative"
    channel_dims: tuple[int, ...] = ()


def _examine(graph: Trace, op: Op, allowed: Collection[str]) -> Candidate | None:
    """Judge each factor of a product as the gate; a sum counts only when one live summand is spread over space."""
    factors = _factors(op.name, op.args, Value)
    if factors is None or not any(factor.live for factor in factors):
        return None
    if op.name == "add" and not any(f.flat - {0} or _is_spread(f, allowed) for f in factors if f.live):
        return None
    judged = []
    for operand, (gate, scaled) in enumerate((factors, factors[::-1])):
        verdict = _judge(graph, op, gate, scaled, allowed)
        found = None if verdict.reason else _gate(graph, op, operand, scaled, verdict)
        candidate = Candidate(op.call.path, op.name, gate.shape, scaled.shape, found, verdict.reason, verdict.hidden)
        judged.append((bool(verdict.reason), not verdict.hidden, gate.live, _size(gate), operand, candidate))
    return min(judged)[-1]


def _judge(graph: Trace, op: Op, gate: Value, scaled: Value, allowed: Collection[str]) -> _Verdict:
    """Decide whether `gate` gates the feature map `scaled`: first by its shape, then by what computed it."""
    shape = op.outputs[0].shape
    if not gate.live or (len(gate.shape) == len(shape) and 0 in gate.flat and graph.batch > 1):
        return _Verdict("the same for every sample: it does not depend on the input")
    if len(gate.shape) != len(shape) or not gate.shape[0] == shape[0] == graph.batch:
        return _Verdict(f"its first dimension is not the batch of {graph.batch}")
    flat = (gate.flat - {0}) or (gate.even if _is_spread(gate, allowed) else frozenset())
    varying = tuple(d for d in range(1, len(shape)) if d not in flat)
    wide = frozenset(d for d in flat if shape[d] > 1)
    if not flat:
        return _Verdict("it varies over space")
    if not varying:
        return _Verdict("one value per sample, none per channel")
    if not wide:
        hidden = op.name == "mul" and _form(gate, allowed) is not None and _is_shrunk(gate, scaled)
        return _Verdict("its feature map is a single pixel at this input size", hidden)
    radix = _summed_dim(op, varying)
    if not _are_channels(scaled, varying, wide, radix):
        return _Verdict(f"it varies along dimensions {varying}, which are not the channels")
    if not scaled.live or scaled.flat & set(varying) or wide <= scaled.flat:
        return _Verdict("outer product: what it scales is no feature map")
    form = _context(gate, scaled) if op.name == "add" else _form(gate, allowed)
    if form is None:
        return _Verdict("not normalised (sigmoid, softmax, tanh, ...) between its pooling and the product")
    if radix is None:
        return _Verdict(form=form, channel_dims=varying)
    return _Verdict(form="radix", channel_dims=(radix, *(d for d in varying if d != radix)))


def _are_channels(scaled: Value, varying: tuple[int, ...], wide: frozenset[int], radix: int | None) -> bool:
    """Tell channels from positions by the convolution or norm that made the map, where one is known."""
    last = len(scaled.shape) - 1
    made, channel = _channels_known(scaled, through_splits=radix is not None)
    count = math.prod(scaled.shape[d] for d in varying)
    if radix is not None:
        return made is None or made.shape[channel] in (count, count // scaled.shape[radix])
    if made is not None and made.shape == scaled.shape:
        return varying == (channel,)
    if len(varying) == 1:
        sizes = {scaled.shape[d] for d in wide}
        return varying[0] in (1, last) and (
            made is None or made.shape[channel] == count or made.shape[channel] not in sizes
        )
    adjacent = varying == tuple(range(varying[0], varying[-1] + 1))
    return adjacent and made is not None and made.shape[channel] == count != math.prod(scaled.shape[d] for d in wide)


def _channels_known(scaled: Value, *, through_splits: bool) -> tuple[Value | None, int]:
    """Return the output of the convolution or norm that made a map, and which of its dimensions is channels."""
    for op in _chain(scaled):
        if op.name in {"cat", "stack"} or (op.name in {"split", "split_with_sizes"} and not through_splits):
            break
        if op.parameters and (op.name == "convolution" or "batch_norm" in op.name or "group_norm" in op.name):
            return op.outputs[0], 1
        if op.parameters and op.name.endswith(("layer_norm", "rms_norm")) and len(op.args[1]) == 1:
            return op.outputs[0], len(op.outputs[0].shape) - 1
    return None, 0


def _form(gate: Value, allowed: Collection[str]) -> Form | None:
    """Return how a gate is normalised: by a bounded function, or (affine) by its own mean over channels."""
    for op in _upstream(gate, _PASSING):
        if op.name in allowed and (op.name != "clamp" or _has_both_bounds(op)):
            return "multiplicative"
        if op.name == "div" and _is_by_own_mean(op):
            return "affine"
    return None


def _has_both_bounds(op: Op) -> bool:
    return sum(bound is not None for bound in (*op.args[1:], *op.kwargs.values())) == 2


def _is_by_own_mean(op: Op) -> bool:
    whole, part = op.args[:2]
    means = [o for o in _upstream(part, _PASSING) if o.name == "mean"] if isinstance(part, Value) else []
    return any(value.memory == whole.memory for mean in means for value in mean.inputs)


def _context(added: Value, scaled: Value) -> Form | None:
    """Return "additive" when a learned layer computes what is added from the map that it is added to."""
    if not any(_is_layer(op) for op in _upstream(added, _PASSING)):
        return None
    above = {scaled.memory, *(v.memory for op in _upstream(scaled, _PASSING) for v in op.live_inputs)}
    return "additive" if any(v.memory in above for op in _upstream(added) for v in op.live_inputs) else None


def _is_spread(value: Value, allowed: Collection[str]) -> bool:
    """Whether a full-shaped value that is constant along some dimensions was made by spreading a smaller one."""
    ops = _upstream(value, _PASSING | set(allowed)) if value.even else ()
    return any(_size(output) < _size(value) for op in ops for output in op.outputs)


def _is_shrunk(gate: Value, scaled: Value) -> bool:
    """Whether strided layers, rather than a global pooling, left `scaled` as a single pixel."""
    if any(value is scaled for op in _upstream(gate, _PASSING | NORMALISERS) for value in op.inputs):
        return False  # x * sigmoid(x) is an activation
    for op in _chain(scaled):
        if sum(size > 1 for size in _main_input(op).shape[1:]) > 1:
            return op.name in _SHRINKING
    return True


def _summed_dim(op: Op, dims: tuple[int, ...]) -> int | None:
    """Return the one of two channel dimensions over which the product is summed right away."""
    rank = len(op.outputs[0].shape)
    sums = [consumer.args[1] for consumer in op.outputs[0].consumers if consumer.name == "sum" and consumer.args[1:]]
    summed = [[d % rank for d in dims] for dims in sums]
    return next((one for one, *more in summed if not more and one in dims and len(dims) == 2), None)


# ---- walking the graph ----
def _factors(name: str, args: tuple[Any, ...], kind: type[T]) -> tuple[T, T] | None:
    """Return the two tensors (or values) that an operation multiplies or adds, None for other operations."""
    pair = [args[i] for i in FACTORS.get(name, ()) if i < len(args) and isinstance(args[i], kind)]
    return (pair[0], pair[1]) if len(pair) == 2 else None


def _upstream(value: Value, passing: Collection[str] | None = None) -> Iterator[Op]:
    """Yield the live operations that made `value`, going on through those named in `passing` (None: all)."""
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
    return bool(op.parameters) and op.name not in _PASSING


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
def _gate(graph: Trace, op: Op, operand: int, scaled: Value, verdict: _Verdict) -> Gate:
    """Describe the gate that `verdict` found, all but its name."""
    gate, dims = op.args[FACTORS[op.name][operand]], verdict.channel_dims
    layout, copied = _layout(len(gate.shape), dims, verdict.form), not gate.flat - {0}
    ports = [port for port in graph.ports[gate.memory] if _same_rows(port.value, gate, dims)]
    source = min(ports, key=lambda port: port.side == "input", default=None)
    pooled = _average_port(graph, scaled, dims)
    squeeze = pooled or next((p for p in graph.ports[scaled.memory] if _same_map(p.value, scaled, layout)), None)
    product = Product(op.call.index, op.name, operand, 0, copied)
    earlier = [
        _factors(other.name, other.args, Value)
        for other in graph.ops[op.call.first : op.index]
        if other.name == op.name
    ]
    alike = [pair for pair in earlier if pair and _is_alike(layout, product, pair[operand].shape, pair[operand].stride)]
    return Gate(
        name="",
        channels=math.prod(gate.shape[d] for d in dims),
        form=verdict.form,
        layout=layout,
        site=op.call.path,
        before=next((o.call.path for o in _chain(scaled) if _is_layer(o)), None),
        after=_layers_after(op.outputs[0]),
        product=replace(product, ordinal=len(alike)),
        attention=_tap(source),
        squeeze=_tap(squeeze),
        pooled=pooled is not None,
        exclusive=source is not None and source.side == "output" and _leads_only_to(graph, source.value, op),
    )


def _layout(rank: int, dims: tuple[int, ...], form: Form) -> str:
    """Name dimensions: batch N, channels C, before them radix R or groups G, the rest space."""
    space = iter(_SPACE.get(rank - 1 - len(dims), "S" * rank))
    channels = dict(zip(dims, ("R" if form == "radix" else "G") * (len(dims) - 1) + "C", strict=True))
    return "N" + "".join(channels.get(d) or next(space) for d in range(1, rank))


def _tap(port: Port | None) -> Tap | None:
    return port and Tap(port.call.path, port.call.index, port.side, port.position)


def _same_rows(port: Value, gate: Value, dims: Sequence[int]) -> bool:
    """Whether a port's tensor, flattened to (N, C), is the gate's vector of each sample in place."""
    rows = _rows(gate, dims)
    return rows is not None and rows == _rows(port, range(1, len(port.shape)))


def _rows(value: Value, dims: Sequence[int]) -> tuple[int, int, int, int, int] | None:
    """Describe the memory of `dims` as rows: batch, columns, offset and both strides; None if not uniform."""
    columns, step = 1, 1
    for d in reversed(dims):
        if value.shape[d] > 1:
            if columns > 1 and value.stride[d] != step * columns:
                return None
            step = value.stride[d] if columns == 1 else step
            columns *= value.shape[d]
    batch = value.shape[0] if value.shape else 0
    return batch, columns, value.offset, value.stride[0] if batch > 1 else 0, step


def _same_map(port: Value, scaled: Value, layout: str) -> bool:
    """Whether a port's tensor is the feature map itself, or the same with radix (or groups) and channels in one."""
    shape, stride = scaled.shape, scaled.stride
    if layout[2:3] == "C" and stride[1] == stride[2] * shape[2] and len(port.shape) == len(shape) - 1:
        shape, stride = (shape[0], shape[1] * shape[2], *shape[3:]), (stride[0], *stride[2:])
    return (port.shape, port.stride, port.offset) == (shape, stride, scaled.offset)


def _average_port(graph: Trace, scaled: Value, dims: tuple[int, ...]) -> Port | None:
    """Return where a hook can read the average of the feature map over space that the network itself computes."""
    space = set(range(1, len(scaled.shape))) - set(dims)
    for op in graph.ops:
        if op.name == "mean" and op.inputs[0].memory == scaled.memory and len(op.args) > 1:
            taken, mean = op.inputs[0], op.outputs[0]
            reduced = {d % len(taken.shape) for d in op.args[1]}
            whole = taken.shape == scaled.shape and taken.stride == scaled.stride and reduced == space
            merged = dims == (1,) and taken.shape[:2] == scaled.shape[:2] and reduced == set(range(2, len(taken.shape)))
            if whole or (merged and math.prod(taken.shape) == math.prod(scaled.shape)):
                rows = _rows(mean, range(1, len(mean.shape)))
                ports = (p for p in graph.ports[mean.memory] if _rows(p.value, range(1, len(p.value.shape))) == rows)
                return next(ports, None)
    return None


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
    """Name gates by site, or by source where a site holds several; "#k" is the site's call, "@j" the rest."""
    calls = Counter(call.path for call in graph.calls)
    held = Counter((gate.site, gate.product.call) for gate in gates)
    names = []
    for gate in gates:
        shares = held[gate.site, gate.product.call] > 1
        path = (gate.source if shares else None) or gate.site or "model"
        names.append(f"{path}#{gate.product.call}" if calls[gate.site] > 1 else path)
    counts, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        if counts[name] > 1:
            names[i] = f"{name}@{seen[name]}"
            seen[name] += 1
    return names


# ---- reading and replacing ----
@contextmanager
def read_gates(model: nn.Module, gates: Sequence[Gate], sink: Sink, *, squeeze: bool = False) -> Iterator[None]:
    """While open, hand every gate's values in every forward of `model` to `sink(gate, kind, values)`.

    `values` is a detached copy (N, C) on the network's device: the attention and, with `squeeze`, the feature
    map averaged over space. Raises ValueError when a gate's shape is not the one found, and RuntimeError
    when a forward did not pass every gate, or none ran.
    """
    jobs = []
    for gate in gates:
        rows = _flat if gate.attention else _vector
        jobs.append(_Job(gate, "attention", gate.attention, partial(_deliver, sink, gate, "attention", rows)))
        if squeeze:
            rows = _flat if gate.pooled else _average
            jobs.append(_Job(gate, "squeeze", gate.squeeze, partial(_deliver, sink, gate, "squeeze", rows)))
    with _Watch(unwrap(model), jobs):
        yield


@contextmanager
def replace_gates(model: nn.Module, gates: Sequence[Gate], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, let `model` multiply by `values[gate.name]`, (C,) or (N, C), instead of what its gates compute.

    Gates not named stay as they are. Gradients reach `values` where the gate is a module's output used by
    nothing but its product (`gate.exclusive`). Raises ValueError for an unknown name, a wrong shape or a
    gradient that cannot flow, and RuntimeError as read_gates does.
    """
    known = {gate.name: gate for gate in gates}
    jobs = []
    for name, tensor in values.items():
        if name not in known:
            raise ValueError(f"no gate is named {name!r}; the gates are {', '.join(known) or 'none'}")
        gate = known[name]
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != gate.channels:
            raise ValueError(
                f"values of gate {name!r} have shape {tuple(tensor.shape)}; expected ({gate.channels},) or"
                f" (samples, {gate.channels})"
            )
        if tensor.requires_grad and not gate.exclusive:
            raise ValueError(f"gate {name!r} is no module's output, so no gradient reaches its values: detach them")
        shaped = _reshaped if gate.exclusive else _spread
        jobs.append(_Job(gate, "attention", gate.attention if gate.exclusive else None, partial(shaped, gate, tensor)))
    with _Watch(unwrap(model), jobs):
        yield


def _deliver(sink: Sink, gate: Gate, kind: Kind, rows: Callable[[Gate, Tensor], Tensor], tensor: Tensor) -> None:
    values = rows(gate, tensor.detach())
    if values.shape[1:] != (gate.channels,):
        raise ValueError(
            f"gate {gate.name!r} gave {kind} from a tensor of shape {tuple(tensor.shape)}; expected {gate.channels}"
            " channels, as found: call find_gates again with images like these"
        )
    sink(gate, kind, values.clone())


def _flat(gate: Gate, tensor: Tensor) -> Tensor:
    """(N, C) of a module's tensor that holds nothing else."""
    return tensor.flatten(1)


def _vector(gate: Gate, operand: Tensor) -> Tensor:
    """(N, C) of the gate's operand in the product."""
    picked = operand[tuple(slice(None) if letter in "NRGC" else 0 for letter in gate.layout)]
    return (picked.transpose(1, 2) if "CR" in _channel_letters(gate) else picked).flatten(1)


def _average(gate: Gate, scaled: Tensor) -> Tensor:
    """(N, C) of the feature map averaged over space; radix and channels may already be one dimension."""
    if scaled.ndim < len(gate.layout):
        return scaled.flatten(2).mean(2)
    mean = scaled.mean([d for d, letter in enumerate(gate.layout) if letter not in "NRGC"])
    return (mean.transpose(1, 2) if "CR" in _channel_letters(gate) else mean).flatten(1)


def _reshaped(gate: Gate, values: Tensor, output: Tensor) -> Tensor:
    """Values in the shape of the module output that they replace."""
    return _samples(gate, values, output).reshape(output.shape)


def _spread(gate: Gate, values: Tensor, operand: Tensor) -> Tensor:
    """Values in the shape of the gate's operand in the product, space broadcast."""
    rows = _samples(gate, values, operand)
    sizes = [operand.shape[d] for d, letter in enumerate(gate.layout) if letter in "NRGC"]
    if "CR" in _channel_letters(gate):
        rows = rows.reshape(sizes[0], sizes[2], sizes[1]).transpose(1, 2)
    rows = rows.reshape([n if letter in "NRGC" else 1 for n, letter in zip(operand.shape, gate.layout, strict=True)])
    return rows.expand(operand.shape)


def _samples(gate: Gate, values: Tensor, like: Tensor) -> Tensor:
    if values.ndim == 2 and len(values) != len(like):
        raise ValueError(f"values of gate {gate.name!r} are of {len(values)} samples; the batch has {len(like)}")
    return values.to(like).expand(len(like), gate.channels)


def _channel_letters(gate: Gate) -> str:
    return "".join(letter for letter in gate.layout if letter in "RGC")


def _is_alike(layout: str, product: Product, shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a factor looks like the gate of a product: channels where it has them, flat over space."""
    return len(shape) == len(layout) and (
        product.copied
        or all(
            letter == "N" or (n == 1 or s == 0) != (letter in "RGC")
            for letter, n, s in zip(layout, shape, stride, strict=True)
        )
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """What to do with one tensor of a gate, met at `tap` or else at the product; a result takes its place."""

    gate: Gate
    kind: Kind
    tap: Tap | None
    act: Callable[[Tensor], Tensor | None]


class _Watch:
    """Does jobs in every forward of a network, and sees that all of them were done."""

    def __init__(self, model: nn.Module, jobs: Sequence[_Job]) -> None:
        self._jobs = jobs
        self._hooks = Hooks()
        self._forwards = 0
        self._due: set[_Job] = set()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._modes: list[tuple[str, _Products]] = []
        modules = dict(hookable(model))
        places: defaultdict[tuple[str, str], list[_Job]] = defaultdict(list)
        for job in jobs:
            places[(job.tap.path, job.tap.side) if job.tap else (job.gate.site, "product")].append(job)
        if lost := [job.gate.name for (path, _), found in places.items() if path not in modules for job in found]:
            raise ValueError(f"this network has no gates {', '.join(lost)}: call find_gates on it")
        self._hooks.before(model, self._begin)
        for (path, side), found in places.items():
            if side == "input":
                self._hooks.before(modules[path], partial(self._at_input, path, found))
            elif side == "output":
                self._hooks.after(modules[path], partial(self._at_output, path, found))
            else:
                self._hooks.before(modules[path], partial(self._open, path, found))
                self._hooks.after(modules[path], partial(self._close, path), always=True)
        self._hooks.after(model, self._end)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hooks.remove()
        while self._modes:
            self._modes.pop()[1].__exit__(None, None, None)
        if kind is None and not self._forwards:
            raise RuntimeError("no forward ran through the network while its gates were watched")

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._calls.clear()
        self._due = set(self._jobs)

    def _end(self, output: Any) -> None:
        if self._due:
            missing = dict.fromkeys(job.gate.name for job in self._jobs if job in self._due)
            raise RuntimeError(
                f"the forward did not pass {', '.join(missing)}: read a compiled network uncompiled, and call"
                " find_gates again when the network or the shape of its input has changed"
            )
        self._forwards += 1

    def _count(self, path: str, side: str) -> int:
        self._calls[path, side] += 1
        return self._calls[path, side] - 1

    def _at_input(self, path: str, jobs: list[_Job], args: tuple[Any, ...]) -> None:
        self._do(self._count(path, "input"), jobs, args)

    def _at_output(self, path: str, jobs: list[_Job], output: Any) -> Any:
        replaced = self._do(self._count(path, "output"), jobs, at_ports(output))
        return replaced and (replaced[0] if isinstance(output, Tensor) else type(output)(replaced))

    def _do(self, call: int, jobs: list[_Job], items: Sequence[Any]) -> list[Any] | None:
        replaced = None
        for job in jobs:
            if job.tap and job.tap.call == call and job.tap.position < len(items):
                made = job.act(items[job.tap.position])
                self._due.discard(job)
                if made is not None:
                    replaced = [*(replaced or items)]
                    replaced[job.tap.position] = made
        return replaced

    def _open(self, path: str, jobs: list[_Job], args: tuple[Any, ...]) -> None:
        call = self._count(path, "product")
        if wanted := [job for job in jobs if job.gate.product.call == call]:
            self._modes.append((path, _Products(wanted, self._due)))
            self._modes[-1][1].__enter__()

    def _close(self, path: str, output: Any) -> None:
        if self._modes and self._modes[-1][0] == path:
            self._modes.pop()[1].__exit__(None, None, None)


class _Products(TorchDispatchMode):
    """Recognises products within one call of their site."""

    def __init__(self, jobs: list[_Job], due: set[_Job]) -> None:
        super().__init__()
        self._jobs = jobs
        self._due = due
        self._seen: Counter[_Job] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op_name(func)
        with self:  # inference mode shows composite operations whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if factors := _factors(name, args, Tensor):
            for job in self._jobs:
                args = self._do(job, name, func, args, factors)
        return func(*args, **kwargs)

    def _do(self, job: _Job, name: str, func: Any, args: tuple[Any, ...], factors: tuple[Tensor, Tensor]) -> Any:
        gate, product = factors[job.gate.product.operand], job.gate.product
        if name != product.op or not _is_alike(job.gate.layout, product, gate.shape, gate.stride()):
            return args
        self._seen[job] += 1
        if self._seen[job] != product.ordinal + 1:
            return args
        self._due.discard(job)
        made = job.act(gate if job.kind == "attention" else factors[1 - product.operand])
        if made is None:
            return args
        position = FACTORS[name][product.operand]
        if position == 0 and func._schema.is_mutable:
            return (args[0].copy_(made), *args[1:])
        return (*args[:position], made, *args[position + 1 :])
