"""Which products of a network scale channels by attention, decided on its graph; no torch.

A gate is a tensor that depends on the input, has one value per sample and channel and none per position,
went through a normaliser after its pooling, and multiplies a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from stripe.gate import Form, Gate
from stripe.gates.describing import describe, names_of
from stripe.gates.graph import ARITHMETIC, MOVES, Op, Trace, Value, factors_of

NORMALISERS = frozenset(
    "sigmoid hardsigmoid _softmax tanh hardtanh relu6 clamp lstm_cell _thnn_fused_lstm_cell".split()
)
"""ATen operations of which one must lie between the pooling and the product; clamp needs both bounds."""

_PASSING = MOVES | ARITHMETIC
_SHRINKING = frozenset("convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split())


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


def candidates_of(graph: Trace, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product of a graph that might scale channels, in order, accepted or with the reason why not."""
    judged = [_examine(graph, op, NORMALISERS | set(normalisers)) for op in graph.ops]
    candidates = [candidate for candidate in judged if candidate]
    names = iter(names_of(graph, [candidate.gate for candidate in candidates if candidate.gate]))
    return [replace(c, gate=replace(c.gate, name=next(names))) if c.gate else c for c in candidates]


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
        found = None if verdict.reason else describe(graph, op, operand, form=verdict.form, dims=verdict.dims)
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
