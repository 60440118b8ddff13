"""The affine maps per channel in a network: gates at constants, with what is added to them, and batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stripe.folding.fields import Array, Blocked, Weights, values_in
from stripe.gate import Gate, product_of
from stripe.gates.describing import is_alike
from stripe.gates.graph import ARITHMETIC, FACTORS, Op, Trace, Value, factors_of

NORMS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
"""ATen operations on input, weight, bias, running mean, running variance, training, momentum, epsilon."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """The operations `ops`, which map `x` to y = scale * x + shift; `names` are their gates, or the norm's name.

    To take the map out, each operation in `steps`, from y towards x, is replaced by its argument at the position given
    with it. `scale` and `shift` broadcast to y. With `mix` (C, C), y = mix @ x + shift instead, along dimension 1.
    """

    names: tuple[str, ...]
    x: Value
    y: Value
    scale: Array
    shift: Array
    ops: frozenset[Op]
    steps: tuple[tuple[Op, int], ...]
    is_norm: bool = False
    mix: Array | None = None


# ---- gates at their constants ----
class Constants:
    """The products of some gates in a graph, and the values that become constant there."""

    def __init__(self, graph: Trace, gates: Sequence[Gate], vectors: Mapping[str, Array]) -> None:
        """Take the graph, gates found in it and their constants, of any shape that `fold` takes."""
        self._graph = graph
        self._products = {product_op(graph, gate): gate for gate in gates}
        self.operands = {op: op.args[FACTORS[op.name][product_of(g).operand]] for op, g in self._products.items()}
        self._mixes = {op: vectors[g.name] for op, g in self._products.items() if is_mix(g, vectors[g.name].shape)}
        self._placed = {
            op: self._at_constant(op, g, vectors[g.name]) for op, g in self._products.items() if op not in self._mixes
        }
        self.scaling = {op: value for op, value in self.operands.items() if op not in self._mixes}
        self.needed = self._reached()

    def maps(self, weights: Weights) -> Iterator[AffineMap]:
        """Yield the affine map of every gate, in order of execution; one map may hold several gates."""
        taken = set[Op]()
        for op in self._products:
            if op not in taken:
                found = self._map(op, weights)
                taken |= found.ops
                yield found

    def alone(self) -> Iterator[AffineMap]:
        """Yield the affine map of every gate by itself, in order of execution, whatever is done with its product."""
        for op in self._products:
            yield self._alone(op, self._scaled(op))

    def _at_constant(self, op: Op, gate: Gate, vector: Array) -> tuple[Array, Array]:
        """Return scale and shift of a product; addcmul(x, x, g) is x + x * g."""
        scale, shift = placed_map(gate, vector, op.outputs[0].shape)
        adds = op.name == "addcmul" and op.args[0] is self._scaled(op) and op.kwargs.get("value", 1) == 1
        return (1 + scale if adds else scale), shift

    def _reached(self) -> set[Op]:
        """Return the operations that the output needs once the gates are constant."""
        queue, needed = [value.producer for value in self._graph.outputs], set[Op]()
        while queue:
            op = queue.pop()
            if op is not None and op not in needed:
                needed.add(op)
                queue += [value.producer for value in op.inputs if value is not self.operands.get(op)]
        return needed

    def _map(self, product: Op, weights: Weights) -> AffineMap:
        """Return the widest affine map that begins with a product: x * g, x + x * g, x * g + b, ..."""
        x = self._scaled(product)
        if product in self._mixes:
            return self._alone(product, x)
        inside = {product.outputs[0]}
        ends = [product]
        for op in self._graph.ops[product.index + 1 :]:
            taken = [value for value in op.live_inputs if value is not self.operands.get(op)]
            within = [value for value in taken if value in inside]
            if op in self.needed and op.name in ARITHMETIC and within and all(v in inside or v is x for v in taken):
                inside.update(op.outputs)
                if len(list(values_in(op.args))) > 1 and (len(taken) > 1 or op in self.operands):
                    ends.append(op)
        for end in reversed(ends[1:]):
            if found := self._ending(product, x, end, weights):
                return found
        return self._alone(product, x)

    def _alone(self, product: Op, x: Value) -> AffineMap:
        gate, y = self._products[product], product.outputs[0]
        steps = ((product, FACTORS[product.name][1 - product_of(gate).operand]),)
        if product in self._mixes:
            mix, shift = self._mixes[product][:, :-1], placed(gate, self._mixes[product][:, -1], y.shape)
            return AffineMap((gate.name,), x, y, np.ones_like(shift), shift, frozenset({product}), steps, mix=mix)
        return AffineMap((gate.name,), x, y, *self._placed[product], frozenset({product}), steps)

    def _scaled(self, product: Op) -> Value:
        """Return what a gate scales, or is added to."""
        x: Value = product.args[FACTORS[product.name][1 - product_of(self._products[product]).operand]]
        return x

    def _ending(self, product: Op, x: Value, end: Op, weights: Weights) -> AffineMap | None:
        """Return the map from `x` to the output of `end`, if it is affine and nothing else takes a value in between."""
        ops = self._between(x, end)
        y, gate = end.outputs[0], self._products[product]
        users = {
            user for op in ops - {end} for output in op.outputs for user in output.consumers if user in self.needed
        }
        if not users <= ops or y.shape != x.shape or self._graph_gives({v for op in ops - {end} for v in op.outputs}):
            return None
        products = [op for op in self._products if op in ops]
        if any(op in self._mixes for op in products):
            return None
        try:
            zero, one, some = (
                self._computed(y, {x: at}, products, weights)
                for at in (np.zeros(x.shape), np.ones(x.shape), _waves(x.shape))
            )
        except Blocked:
            return None
        scale, shift = (corner(gate, field) for field in (one - zero, zero))
        if not np.allclose(some, scale * _waves(x.shape) + shift, rtol=1e-12, atol=1e-12 * np.abs(some).max()):
            return None
        names = tuple(self._products[op].name for op in products)
        return AffineMap(names, x, y, scale, shift, frozenset(ops), self._steps(x, end))

    def _computed(self, y: Value, known: dict[Value, Array], products: Sequence[Op], weights: Weights) -> Array:
        """Compute `y` from `known` values, with `products`, which are in order of execution, at their constants."""
        for op in products:
            scale, shift = self._placed[op]
            known[op.outputs[0]] = scale * weights.compute(self._scaled(op), known) + shift
        return weights.compute(y, known)

    def _graph_gives(self, values: set[Value]) -> bool:
        return any(output in values for output in self._graph.outputs)

    def _between(self, x: Value, end: Op) -> set[Op]:
        """Return the operations that `end` needs to make its output from `x`, given the constants."""
        queue, found = [end], set[Op]()
        while queue:
            op = queue.pop()
            found.add(op)
            taken = [v for v in op.live_inputs if v is not x and v is not self.operands.get(op)]
            queue += [v.producer for v in taken if v.producer is not None and v.producer not in found]
        return found

    def _steps(self, x: Value, end: Op) -> tuple[tuple[Op, int], ...]:
        """Return a path from `end` to `x`: its operations, each with the position of the argument to go on with."""
        steps, op = [], end
        while True:
            live = {i: v for i, v in enumerate(op.args) if isinstance(v, Value) and v.live}
            live = {i: v for i, v in live.items() if v is not self.operands.get(op) or v is x}
            position = min(live, key=lambda i: live[i] is not x)
            steps.append((op, position))
            producer = live[position].producer
            if live[position] is x or producer is None:
                return tuple(steps)
            op = producer


def _waves(shape: Sequence[int]) -> Array:
    """Return numbers of both signs that differ from entry to entry."""
    return np.cos(np.arange(int(np.prod(shape)), dtype=np.float64)).reshape(shape)


def product_op(graph: Trace, gate: Gate) -> Op:
    """Return the operation that applies a gate."""
    product = product_of(gate)
    call = next(c for c in graph.calls if (c.path, c.index) == (gate.site, product.call))
    alike = []
    for op in graph.ops[call.start :]:
        factors = factors_of(op.name, op.args, Value) if op.name == product.op else None
        if factors:
            value = factors[product.operand]
            if is_alike(gate.layout, product.copied, value.shape, value.stride):
                alike.append(op)
    return alike[product.ordinal]


def require_fitting(gates: Sequence[Gate], constants: Mapping[str, Array], *, mixing: bool) -> None:
    """Raise ValueError for constants that `fold` cannot take; with `mixing`, gates that can mix may have matrices."""
    known = {gate.name: gate for gate in gates}
    for name, constant in constants.items():
        if name not in known:
            raise ValueError(f"no gate is named {name!r}; expected some of {', '.join(known)}")
        channels, mixes = known[name].channels, mixing and can_mix(known[name])
        if constant.shape not in ((channels,), (2, channels), *([(channels, channels + 1)] if mixes else [])):
            raise ValueError(
                f"the constant of gate {name!r} has shape {constant.shape}; expected ({channels},), or"
                f" (2, {channels}) with a shift" + (f", or ({channels}, {channels + 1}), a matrix" if mixes else "")
            )
        if not np.isfinite(constant).all():
            raise ValueError(f"the constant of gate {name!r} is not finite in {(~np.isfinite(constant)).sum()} values")


def is_mix(gate: Gate, shape: Sequence[int]) -> bool:
    """Return whether a constant of this shape is a matrix and a shift, (C, C + 1)."""
    return tuple(shape) == (gate.channels, gate.channels + 1)


def can_mix(gate: Gate) -> bool:
    """Return whether a matrix can replace a gate: it must multiply a map whose channels are in dimension 1."""
    plain = gate.form == "multiplicative" and product_of(gate).op != "addcmul"
    return plain and gate.layout.index("C") == 1 and not {*gate.layout} & {*"RG"}


def placed_map(gate: Gate, constant: Array, shape: Sequence[int]) -> tuple[Array, Array]:
    """Return scale and shift of a product of `shape` at a constant (C,), or (2, C) with a shift."""
    vector, shift = constant if constant.ndim == 2 else (constant, np.zeros_like(constant))
    scale, shift = (np.ones_like(vector), vector + shift) if gate.form == "additive" else (vector, shift)
    return placed(gate, scale, shape), placed(gate, shift, shape)


def placed(gate: Gate, vector: Array, shape: Sequence[int]) -> Array:
    """Shape a constant (C,) to broadcast with a product of `shape`."""
    sizes = [n if letter in "RGC" else 1 for n, letter in zip(shape, gate.layout, strict=True)]
    c, r = gate.layout.find("C"), gate.layout.find("R")
    if r > c:
        vector = vector.reshape(shape[r], shape[c]).T
    return vector.reshape(sizes)


def corner(gate: Gate, field: Array) -> Array:
    """Return one entry of a field for each channel, shaped to broadcast with it."""
    return field[tuple(slice(None) if letter in "RGC" else slice(1) for letter in gate.layout)].copy()


# ---- batch norms ----
def norm_maps(graph: Trace, weights: Weights) -> tuple[list[AffineMap], dict[str, str]]:
    """Return the batch norms that are affine maps, in order of execution, and why others are not, by name."""
    found: list[AffineMap] = []
    left: dict[str, str] = {}
    for op in graph.ops:
        if op.name not in NORMS:
            continue
        name = op.call.path or "model"
        name = f"{name}#{op.call.index}" if sum(call.path == op.call.path for call in graph.calls) > 1 else name
        if op.args[5] or op.args[3] is None or op.args[4] is None:
            left[name] = "it has no running statistics, so that it depends on the batch"
            continue
        try:
            scale, shift = _norm_scale(op, weights)
        except Blocked as blocked:
            left[name] = str(blocked)
            continue
        ops, steps = frozenset({op}), ((op, 0),)
        found.append(AffineMap((name,), op.args[0], op.outputs[0], scale, shift, ops, steps, is_norm=True))
    return found, left


def _norm_scale(op: Op, weights: Weights) -> tuple[Array, Array]:
    """Return weight / sqrt(variance + epsilon) and bias - mean * that, shaped to broadcast with the output."""
    x, weight, bias, mean, variance = op.args[:5]
    scale = 1.0 / np.sqrt(weights.compute(variance) + op.args[7])
    scale = scale if weight is None else weights.compute(weight) * scale
    shift = -weights.compute(mean) * scale
    shift = shift if bias is None else weights.compute(bias) + shift
    shape = (-1, *[1] * (len(x.shape) - 2))
    return scale.reshape(shape)[None], shift.reshape(shape)[None]
