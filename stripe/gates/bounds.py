"""Bounds of the values of a graph, as far as they follow from the operations that made the values; without torch.

This is interval arithmetic in one pass, in order of execution: sigmoid(z) lies between 0 and 1 whatever z is, and so
does 1 / (1 + exp(-z)), because exp is positive. A layer's output may be anything, and so may an average over space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from stripe.gates.graph import MOVES, Op, Trace, Value

Interval = tuple[float, float]

ANY: Interval = (-math.inf, math.inf)
PARAMETER: Interval = (-1e6, 1e6)  # finite, of either sign
GUARD = 0.1
"""Size from which a divisor is bounded away from 0; the tiny number that guards a division by 0 is below it."""

NORMALISERS = frozenset(
    "sigmoid hardsigmoid _softmax tanh hardtanh relu6 erf atan gt ge lt le lstm_cell _thnn_fused_lstm_cell".split()
)
"""ATen operations whose output is bounded whatever their input is."""

QUANTISED = frozenset(
    "fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
    " fake_quantize_per_channel_affine_cachemask _fused_moving_avg_obs_fq_helper".split()
)
"""Operations that round their first input to the steps of a quantised type, whose limits do not count as bounds."""

_UNIT = frozenset("sigmoid hardsigmoid _softmax gt ge lt le".split())  # from 0 to 1
_LARGEST = 6.0  # largest magnitude that the other normalisers give


def bounds_of(graph: Trace, normalisers: Collection[str] = ()) -> dict[Value, Interval]:
    """Return the interval of every live value, (-inf, inf) where nothing is known; `normalisers` count as bounded."""
    known: dict[Value, Interval] = {}
    for op in graph.ops:
        interval = _interval(op, known, NORMALISERS | set(normalisers)) if op.live_inputs else ANY
        known |= dict.fromkeys((output for output in op.outputs if output.live), interval)
    return known


def is_bounded(interval: Interval) -> bool:
    """Return whether an interval is finite at both ends."""
    return all(map(math.isfinite, interval))


def inverse(interval: Interval) -> Interval:
    """Return the interval of 1 / x, which is unbounded where x may come close to 0."""
    low, high = interval
    return (1 / high, 1 / low) if low >= GUARD or high <= -GUARD else (0.0, math.inf) if low >= 0 else ANY


def _interval(op: Op, known: Mapping[Value, Interval], normalisers: Collection[str]) -> Interval:
    def of(item: Any) -> Interval:
        if isinstance(item, Value):
            if item.live:
                return known.get(item, ANY)
            return PARAMETER if item.number is None else (item.number, item.number)
        return ANY if item is None else (float(item), float(item))

    if op.name in normalisers:
        return (0.0, 1.0) if op.name in _UNIT else (-_LARGEST, _LARGEST)
    if op.name in QUANTISED:
        return of(op.inputs[0])
    if op.name in MOVES:
        parts = [of(value) for value in op.live_inputs]
        return min(low for low, _ in parts), max(high for _, high in parts)
    if op.name == "mul" and _is_square(op):
        return 0.0, math.inf
    if op.name == "div" and _is_fraction(op, of):
        return -1.0, 1.0
    if op.name not in _FUNCTIONS:
        return ANY
    interval = _FUNCTIONS[op.name](op, *(of(item) for item in op.args if isinstance(item, Value | int | float)))
    return ANY if any(map(math.isnan, interval)) else interval


def _is_square(op: Op) -> bool:
    a, b = op.args[:2]
    return isinstance(a, Value) and isinstance(b, Value) and (a is b or a.memory == b.memory and a.shape == b.shape)


def _is_fraction(op: Op, of: Callable[[Any], Interval]) -> bool:
    """Return whether non-negative numbers are divided by their sum, or a number by 1 + its own magnitude."""
    part, whole = op.args[:2]
    if not (isinstance(part, Value) and isinstance(whole, Value)):
        return False
    for maker in whole.upstream(MOVES | {"add"}):
        own = any(value.memory == part.memory for value in maker.live_inputs)
        if own and (maker.name == "sum" and of(part)[0] >= 0 or maker.name == "abs" and of(whole)[0] >= GUARD):
            return True
    return False


# ---- the interval of an operation's result, from those of its arguments ----
def _times(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if 0 in (x, y) else x * y for x in a for y in b]
    return min(ends), max(ends)


def _plus(op: Op, a: Interval, b: Interval, *_: Interval) -> Interval:
    low, high = _times(b, (op.kwargs.get("alpha", 1),) * 2)
    return a[0] + low, a[1] + high


def _minus(op: Op, a: Interval, b: Interval, *_: Interval) -> Interval:
    return _plus(op, a, (-b[1], -b[0]))


def _lerp(op: Op, a: Interval, b: Interval, weight: Interval, *_: Interval) -> Interval:
    return _plus(op, a, _times(weight, _minus(op, b, a)))


def _power(op: Op, base: Interval, exponent: Interval, *_: Interval) -> Interval:
    even = exponent[0] == exponent[1] and exponent[0] > 0 and exponent[0] % 2 == 0
    return (0.0, math.inf) if even else inverse(base) if exponent == (-1.0, -1.0) else ANY


def _exp(op: Op, a: Interval, *_: Interval) -> Interval:
    return tuple(math.exp(end) if end < 700 else math.inf for end in a)  # type: ignore[return-value]


def _absolute(op: Op, a: Interval, *_: Interval) -> Interval:
    return (0.0 if a[0] <= 0 <= a[1] else min(map(abs, a))), max(map(abs, a))


def _clamp(op: Op, a: Interval, *_: Interval) -> Interval:
    bounds = [*op.args[1:3], None, None]
    low, high = op.kwargs.get("min", bounds[0]), op.kwargs.get("max", bounds[1])
    low, high = (None if end is None else _number(end) for end in (low, high))
    return _within(a, (-math.inf if low is None else low, math.inf if high is None else high))


def _number(end: Any) -> float | None:
    return end.number if isinstance(end, Value) else float(end)


def _within(a: Interval, limits: Interval) -> Interval:
    low, high = (min(max(end, limits[0]), limits[1]) for end in a)
    return low, high


_FUNCTIONS: dict[str, Callable[..., Interval]] = {
    "add": _plus,
    "sub": _minus,
    "rsub": lambda op, a, b, *_: _minus(op, b, a),
    "mul": lambda op, a, b, *_: _times(a, b),
    "div": lambda op, a, b, *_: _times(a, inverse(b)),
    "reciprocal": lambda op, a, *_: inverse(a),
    "neg": lambda op, a, *_: (-a[1], -a[0]),
    "pow": _power,
    "lerp": _lerp,
    "square": lambda op, a, *_: (0.0, math.inf),
    "exp": _exp,
    "log_softmax": lambda op, a, *_: (-math.inf, 0.0),
    "log_sigmoid_forward": lambda op, a, *_: (-math.inf, 0.0),
    "_log_softmax": lambda op, a, *_: (-math.inf, 0.0),
    "abs": _absolute,
    "relu": lambda op, a, *_: _within(a, (0.0, math.inf)),
    "softplus": lambda op, a, *_: (0.0, math.inf),
    "clamp": _clamp,
    "clamp_min": lambda op, a, b, *_: (max(a[0], b[0]), max(a[1], b[0])),
    "clamp_max": lambda op, a, b, *_: (min(a[0], b[1]), min(a[1], b[1])),
    "maximum": lambda op, a, b, *_: (max(a[0], b[0]), max(a[1], b[1])),
    "minimum": lambda op, a, b, *_: (min(a[0], b[0]), min(a[1], b[1])),
    "where": lambda op, _, a, b, *__: (min(a[0], b[0]), max(a[1], b[1])),
}

ENTRYWISE = NORMALISERS | QUANTISED | set(_FUNCTIONS)
"""Operations that work entry by entry, as arithmetic does."""
