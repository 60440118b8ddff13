"""Rules that decide, on a network's graph, which products scale channels by attention; they need no torch.

A product is a gate if one factor depends on the input, has one value per sample and channel rather than per position,
went through a bounded function after its pooling, and multiplies a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from stripe.gate import Form, Gate
from stripe.gates.bounds import ENTRYWISE, Interval, bounds_of, inverse, is_bounded
from stripe.gates.describing import describe, names_of
from stripe.gates.graph import ARITHMETIC, DIRECTED, MOVES, Op, Trace, Value, factors_of

CONSTANT = "the same for every sample: it does not depend on the input"
UNBOUNDED = "not normalised (sigmoid, softmax, tanh, ...) between its pooling and the product"

_LINEAR = MOVES | ARITHMETIC
_PASSING = _LINEAR | ENTRYWISE
_POOLS = frozenset("max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split())
_SHRINKING = _POOLS | {"convolution"}
_MATRIX_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}


@dataclass(frozen=True)
class Candidate:
    """A product that was examined: the gate that it is, or the reason why it is not one.

    `shape` is the shape of the supposed attention, `scaled` that of what it scales. A `hidden` candidate may be a gate,
    but its feature map is a single pixel at this input size.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    scaled: tuple[int, ...]
    gate: Gate | None
    reason: str
    hidden: bool = False


def candidates_of(graph: Trace, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product of a graph that might scale channels, in order, accepted or with a reason against it.

    Where the inputs allow several batch sizes, the one that gives the most gates is taken.
    """
    bounds, passing = bounds_of(graph, normalisers), _PASSING | set(normalisers)
    tried = []
    for batch in graph.batches:
        examined = (_examine(_Search(graph, batch, bounds, passing), op) for op in graph.ops)
        tried.append([candidate for candidate in examined if candidate])
    candidates = max(tried, key=lambda each: sum(candidate.gate is not None for candidate in each))
    names = iter(names_of(graph, [candidate.gate for candidate in candidates if candidate.gate]))
    return [replace(c, gate=replace(c.gate, name=next(names))) if c.gate else c for c in candidates]


# ---- judging a product ----
@dataclass(frozen=True)
class _Verdict:
    """The verdict on a factor: a gate of some form along `dims` (radix before channels), or a `reason` why not."""

    reason: str = ""
    hidden: bool = False
    form: Form = "multiplicative"
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class _Search:
    """What a product is judged by: the graph, the batch size, the values' bounds, and operations to look through."""

    graph: Trace
    batch: int
    bounds: Mapping[Value, Interval]
    passing: Collection[str]


def _examine(search: _Search, op: Op) -> Candidate | None:
    """Judge each factor of a product as a possible gate; judge a sum only where a live summand is spread over space."""
    factors = factors_of(op.name, op.args, Value)
    if factors is None or not any(factor.live for factor in factors):
        return _matrix_product(op)
    if op.name == "add" and not any(f.live and (f.flat - op.outputs[0].flat or _is_spread(search, f)) for f in factors):
        return None
    judged = []
    for operand in (1,) if op.name in DIRECTED else (0, 1):
        gate, scaled = factors[operand], factors[1 - operand]
        verdict = _judge(search, op, gate, scaled)
        found = None if verdict.reason else describe(search.graph, op, operand, form=verdict.form, dims=verdict.dims)
        candidate = Candidate(op.call.path, op.name, gate.shape, scaled.shape, found, verdict.reason, verdict.hidden)
        judged.append((candidate, gate))
    candidate, _ = min(
        judged,
        key=lambda each: (each[0].gate is None, not each[0].hidden, each[1].live, each[1].entries, not each[1].even),
    )
    return candidate


def _matrix_product(op: Op) -> Candidate | None:
    """Reject a matrix product or convolution of two tensors that both depend on the input; skip any other operation."""
    pair = [op.args[i] for i in _MATRIX_PRODUCTS.get(op.name, ())]
    if len(pair) != 2 or not all(value.live for value in pair):
        return None
    scaled, gate = pair if op.name == "convolution" else pair[::-1]
    reason = "a matrix product or convolution of two tensors that depend on the input: it mixes what it multiplies"
    return Candidate(op.call.path, op.name, gate.shape, scaled.shape, None, reason)


def _judge(search: _Search, op: Op, gate: Value, scaled: Value) -> _Verdict:
    """Decide whether `gate` gates the feature map `scaled`: first by its shape, then by what computed it."""
    shape = op.outputs[0].shape
    shared = len(gate.shape) == len(shape) and shape[0] == search.batch > 1 and 0 in gate.flat
    if not gate.live or shared:
        return _Verdict(CONSTANT)
    if op.name == "lerp" and op.args[0].number != 0:
        return _Verdict("lerp mixes two maps here: a gate would show in a product, as in x * g + y * (1 - g)")
    if len(gate.shape) != len(shape) or not gate.shape[0] == shape[0] == search.batch:
        return _Verdict(_not_the_batch(search.batch, gate, shape))
    flat = gate.flat - {0}
    if flat <= op.outputs[0].flat and _is_spread(search, gate):
        flat |= gate.even
    dims = tuple(d for d in range(1, len(shape)) if d not in flat)
    wide = flat - op.outputs[0].flat
    if not dims:
        return _Verdict("one value per sample, none per channel")
    if not wide and len(dims) > 1:
        return _Verdict("it varies over space")
    if not wide:
        hidden = (
            len(shape) > 2 and op.name == "mul" and bool(_form(search, op, gate)) and _is_shrunk(search, gate, scaled)
        )
        return _Verdict("what it scales is a single pixel at this input size", hidden)
    radix = _summed_dim(op, dims)
    if not _are_channels(scaled, dims, wide, radix):
        return _Verdict(f"it varies along dimensions {', '.join(map(str, dims))}, which are not the channels")
    if not scaled.live or scaled.flat & {*dims} or wide <= scaled.flat:
        return _Verdict("outer product: what it scales is no feature map")
    if window := _window(gate):
        return _Verdict(f"it is pooled over {window} of the map, not over all of it")
    if op.name == "add" and not _is_context(gate, scaled):
        return _Verdict("no learned layer computes it from the map that it is added to")
    form = "additive" if op.name == "add" else _form(search, op, gate)
    if form is None:
        return _Verdict(UNBOUNDED)
    return _Verdict(form=form, dims=dims) if radix is None else _Verdict(form="radix", dims=radix)


def _are_channels(scaled: Value, dims: tuple[int, ...], wide: frozenset[int], radix: tuple[int, ...] | None) -> bool:
    """Return whether `dims` are channels, not positions, judged by the layer that made the map if it is known."""
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
    """Return a map's channel count, by the layer that made it, and the channel dimension if it kept its shape since.

    A linear layer counts only if nothing was permuted after it: in token mixing, its channels are positions.
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


def _form(search: _Search, op: Op, gate: Value) -> Form | None:
    """Return how the gate of `op` is normalised: by a bounded function, or (affine) by its own mean over channels."""
    if op.name == "div":
        return "multiplicative" if is_bounded(inverse(search.bounds[gate])) else None
    for maker in gate.upstream(search.passing):
        if any(is_bounded(search.bounds[output]) for output in maker.outputs if output.live):
            return "multiplicative"
        if maker.name == "div" and _is_by_own_mean(search, maker):
            return "affine"
    return None


def _is_by_own_mean(search: _Search, op: Op) -> bool:
    whole, part = op.args[:2]
    if not (isinstance(whole, Value) and isinstance(part, Value)):
        return False
    means = [maker for maker in part.upstream(search.passing) if maker.name == "mean"]
    return any(value.memory == whole.memory for mean in means for value in mean.inputs)


def _is_context(added: Value, scaled: Value) -> bool:
    """Return whether a learned layer computes what is added from the map that it is added to."""
    if not any(op.is_layer for op in added.upstream(_LINEAR)):
        return False
    passed = [op for op in scaled.upstream(_LINEAR) if op.name in _LINEAR]
    above = {scaled.memory, *(value.memory for op in passed for value in op.live_inputs)}
    return any(value.memory in above for op in added.upstream() for value in op.live_inputs)


def _is_spread(search: _Search, value: Value) -> bool:
    """Return whether a full-shaped value that is constant along some dimensions was spread from smaller values."""
    queue, seen = [value] if value.even else [], set[Value]()
    while queue:
        current = queue.pop()
        if current.entries >= value.entries and current not in seen:
            op = current.producer
            if op is None or op.name not in search.passing or not op.live_inputs:
                return False
            seen.add(current)
            queue += op.live_inputs
    return bool(seen)


def _window(gate: Value) -> str | None:
    """Return which part of a map the layer that pools it for `gate` covers, as in "4x4 of 7x7"; None if all of it."""
    for op in gate.chain():
        space = op.main_input.shape[2:]
        if op.name in _SHRINKING and math.prod(op.outputs[0].shape[2:]) == 1 < math.prod(space):
            kernel = tuple(op.args[1].shape[2:] if op.name == "convolution" else op.args[1])
            kernel = kernel * len(space) if len(kernel) == 1 else kernel
            if any(size < n for size, n in zip(kernel, space, strict=True)):
                return " of ".join("x".join(map(str, sizes)) for sizes in (kernel, space))
        if math.prod(space) > 1 and op.name not in _PASSING:
            return None
    return None


def _not_the_batch(batch: int, gate: Value, shape: tuple[int, ...]) -> str:
    reason, rows = f"its first dimension is not the batch of {batch}", gate.shape[0] if gate.shape else 0
    if len(gate.shape) == len(shape) and rows == shape[0] > batch > 0 and rows % batch == 0:
        reason += (
            f" but {rows // batch} times it, as where frames, crops or windows are folded into the batch: a gate has"
            " one row per sample; look for gates in the part of the network that takes these as its batch"
        )
    elif len(gate.shape) == len(shape) and rows == 1 and shape[0] != batch:
        reason += (
            ", as where samples run one after another or stand along another dimension: a gate has one row per sample"
        )
    return reason


def _is_shrunk(search: _Search, gate: Value, scaled: Value) -> bool:
    """Return whether strided layers, rather than a global pooling, reduced `scaled` to a single pixel."""
    if any(value is scaled for op in gate.upstream(search.passing) for value in op.inputs):
        return False  # x * sigmoid(f(x)) without pooling: the factor would vary over a larger map
    for op in scaled.chain():
        if sum(size > 1 for size in op.main_input.shape[1:]) > 1:
            return op.name in _SHRINKING
    return True


def _summed_dim(op: Op, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return both channel dimensions, first the one over which the product is summed next; None if it is not summed."""
    rank = len(op.outputs[0].shape)
    for consumer in op.outputs[0].consumers if len(dims) == 2 else ():
        if consumer.name == "sum" and consumer.args[1:]:
            summed = [d % rank for d in consumer.args[1]]
            if len(summed) == 1 and summed[0] in dims:
                return dims if summed[0] == dims[0] else dims[::-1]
    return None
