"""Decide where an affine map is merged, on the graph of a forward pass: exactly or not at all. No torch.

A gate at a constant, or a batch norm in eval mode, is a map y = scale * x + shift per channel. It is merged back into
the layers that make x, or forward into every layer that takes y, through operations that commute with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from stripe.folding.fields import Array, Blocked, Weights, along, per_input, spread_like
from stripe.folding.maps import NORMS, AffineMap
from stripe.gates.graph import MOVES, Op, Trace, Value

TOLERANCE = 1e-10
"""Largest relative error, in float64, between a network with merged maps and the one it was made from."""

POSITIVE = frozenset(
    "relu leaky_relu prelu _prelu_kernel max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d".split()
)
"""ATen operations f with f(c x) = c f(x) for c >= 0 alone."""

LINEAR = frozenset("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean neg".split())
"""ATen operations that commute with a scale per channel, whatever its sign."""

_MADE_BY = {  # by layer: channel dimension of its output, positions of weight and bias among the arguments
    "convolution": (1, 1, 2),
    **dict.fromkeys(NORMS, (1, 1, 2)),
    "native_group_norm": (1, 1, 2),
    "native_layer_norm": (-1, 2, 3),
    "mm": (-1, 1, None),
    "addmm": (-1, 2, 0),
}
# by layer: positions of input, weight and bias among the arguments
_TAKEN_BY: dict[str, tuple[int, int, int | None]] = {"convolution": (0, 1, 2), "mm": (0, 1, None), "addmm": (1, 2, 0)}


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a tensor that the module at `path` uses: `name` is multiplied by `factor`, and `delta` is added.

    With `new` the network does not have this tensor yet: it starts as zeros. A matrix `mix`, if there is one, is
    applied first, along the dimension `dim`.
    """

    path: str
    name: str
    factor: Array
    delta: Array | None = None
    new: bool = False
    mix: Array | None = None
    dim: int = 0

    def applied(self, tensor: Array) -> Array:
        """Return the tensor after this change."""
        if self.mix is not None:
            tensor = np.moveaxis(np.tensordot(self.mix, tensor, (1, self.dim)), 0, self.dim)
        changed: Array = tensor * self.factor
        return changed if self.delta is None else changed + self.delta


@dataclass(frozen=True, eq=False)
class Merge:
    """The decision about one map; `direction`, `through`, `reason` and `growth` are as in a report.

    `probes` are modules whose outputs must stay the same; `touched` are the values on the map's way, which change.
    """

    map: AffineMap
    direction: str = "kept"
    edits: tuple[Edit, ...] = ()
    through: tuple[str, ...] = ()
    reason: str = ""
    growth: float = 1.0
    probes: tuple[str, ...] = ()
    touched: frozenset[Value] = frozenset()

    def keep(self, reason: str) -> Merge:
        """Return the decision not to merge the same map."""
        return Merge(self.map, reason=reason)


class Network:
    """The graph of a network, the operations that its output needs once some values are constant, and its weights."""

    def __init__(
        self,
        graph: Trace,
        weights: Weights,
        needed: set[Op],
        constants: Mapping[Op, Value],
        *,
        is_final: bool = False,
    ) -> None:
        """Take a graph, the network's weights, the needed operations and, by operation, the operand that is constant.

        A network that `is_final` is never trained again, so that its batch norms can be changed like other layers.
        """
        self._is_final = is_final
        self._graph = graph
        self._weights = weights
        self._needed = needed
        self._constants = constants
        self._gone: dict[Value, AffineMap] = {}  # maps merged back, by their outputs
        self._made: set[str] = set()  # names of tensors that merges created
        self._touched: set[Value] = set()  # values that the current walk has passed
        self._has_norms = False

    def plan(self, maps: Sequence[AffineMap]) -> list[Merge]:
        """Decide about every map, in order of execution; the edits must be made in this order."""
        self._has_norms = any(each.is_norm for each in maps)
        merges = []
        for each in maps:
            merge = self._decide(each)
            merges.append(merge)
            self._made |= {edit.name for edit in merge.edits if edit.new}
            if merge.direction == "back":
                self._gone[each.y] = each
        return merges

    def _decide(self, map: AffineMap) -> Merge:
        """Merge where the weights grow less, but a norm back if possible; keep the map where neither side is exact."""
        if not map.ops & self._needed:
            return Merge(map, "unused", reason="only the attention of other gates takes it")
        x, y = map.x, map.y
        scale, shift = (np.broadcast_to(field, y.shape) for field in (map.scale, map.shift))
        found, reasons = [], []
        through: list[str] = []
        walks = {
            "back": partial(self._back, x, scale, shift, map.ops, through),
            "forward": partial(self._forward, y, scale, shift, through),
        }
        if map.mix is not None:
            walks = {
                "back": partial(self._mix_back, x, map.mix, along(shift, 1), map.ops),
                "forward": partial(self._mix_forward, y, map.mix, along(shift, 1)),
            }
        for direction, walk in walks.items():
            through.clear()
            self._touched = set()
            try:
                edits = tuple(walk())
            except Blocked as blocked:
                reasons.append(f"{direction}: {blocked}")
            else:
                ways = tuple(dict.fromkeys(through))
                probes = (map.steps[0][0].call.path,) if direction == "back" else tuple(edit.path for edit in edits)
                found.append(
                    Merge(map, direction, edits, ways, "", self._growth(edits), probes, frozenset(self._touched))
                )
        if not found:
            return Merge(map, reason="; ".join(reasons))
        return found[0] if map.is_norm else min(found, key=lambda merge: merge.growth)

    def _growth(self, edits: Iterable[Edit]) -> float:
        ratios = []
        for edit in edits:
            if edit.delta is None:
                before = self._weights.tensors[edit.name]
                ratios.append(float(np.abs(edit.applied(before)).max() / np.abs(before).max()) if before.any() else 1.0)
        return max(ratios, default=1.0)

    def _users(self, value: Value) -> list[Op]:
        return [op for op in value.consumers if op in self._needed]

    # backward
    def _back(
        self, value: Value, scale: Array, shift: Array, users: Collection[Op], through: list[str]
    ) -> Iterator[Edit]:
        """Yield the edits after which the layers that make `value` make scale * value + shift instead."""
        op = self._maker(value, users)
        if value in self._gone:
            yield from self._back(self._gone[value].x, scale, shift, self._gone[value].ops, through)
        elif op.name in _MADE_BY:
            yield from self._into_output(op, scale, shift)
        elif op.name in MOVES:
            scales = self._weights.pulled(op, value, scale, 1.0)
            shifts = self._weights.pulled(op, value, shift, 0.0)
            for source, moved in scales.items():
                yield from self._back(source, moved, shifts[source], {op}, through)
        elif op.name in ("add", "sub"):
            yield from self._into_summands(op, scale, shift, through)
        else:
            source = self._scaled_input(op)
            yield from self._back(source, *self._across(op, scale, shift, source, through), {op}, through)

    def _maker(self, value: Value, users: Collection[Op]) -> Op:
        """Return the operation that makes a value, if only `users` take the value."""
        op = value.producer
        self._touched.add(value)
        if op is None or not op.live_inputs:
            raise Blocked("nothing before it has weights")
        others = [user for output in op.outputs for user in self._users(output) if user not in users]
        if others or any(made is output for made in op.outputs for output in self._graph.outputs):
            raise Blocked(f"the map before is also taken by {others[0].name if others else 'the output'}")
        return op

    def _into_summands(self, op: Op, scale: Array, shift: Array, through: list[str]) -> Iterator[Edit]:
        """Scale every branch of a sum, and shift the first; an added zero, as in Python's sum(), is not a branch.

        A parameter that is added is scaled too, and takes the shift in place of the first branch.
        """
        first, second = op.args[:2]
        branches = [first] if second is first or not isinstance(second, Value) and second == 0 else [first, second]
        added = [v for v in branches if isinstance(v, Value) and v.parameters]
        branches = [v for v in branches if v not in added]
        if not all(isinstance(v, Value) and v.live and v.shape == scale.shape for v in branches) or not branches:
            raise Blocked(f"{op.name} is in between")
        if second is first and shift.any():
            raise Blocked("a shift does not pass the sum of a map and itself")
        for parameter in added:
            yield self._into_parameter(op, parameter, scale, shift)
            shift = np.zeros_like(shift)
        through.append(op.name)
        for branch in branches:
            yield from self._back(branch, scale, shift, {op}, through)
            shift = np.zeros_like(shift)

    def _into_parameter(self, op: Op, parameter: Value, scale: Array, shift: Array) -> Edit:
        """Scale and shift what is added to, or subtracted from, a map."""
        if shift.any() and op.kwargs:
            raise Blocked(f"{op.name} weights what it adds")
        factor, delta = spread_like(scale, parameter), spread_like(shift, parameter)
        delta = -delta if op.name == "sub" and parameter is op.args[1] else delta
        found = self._edit(op, parameter, factor, bool(delta.any()))
        return replace(found, delta=delta) if delta.any() else found

    def _into_output(self, op: Op, scale: Array, shift: Array) -> Iterator[Edit]:
        dim, *positions = _MADE_BY[op.name]
        weight, bias = (None if i is None else op.args[i] for i in positions)
        factor, delta = along(scale, dim), along(shift, dim)
        if weight is None or op.name == "convolution" and op.args[6]:
            raise Blocked(f"{op.name} before it has no weight per output channel")
        changed = self._edit(op, weight, factor.reshape(-1, *[1] * (len(weight.shape) - 1)) if dim == 1 else factor)
        if (factor != 1).any():
            yield changed
        if bias is not None:
            yield replace(self._edit(op, bias, factor, bool(delta.any())), delta=delta)
        elif delta.any() or self._bias(op) in self._made:
            yield self._new_bias(op, factor, delta, "before")

    def _bias(self, op: Op) -> str:
        return f"{op.call.path}.bias".removeprefix(".")

    def _new_bias(self, op: Op, factor: Array, delta: Array, where: str) -> Edit:
        """Give a layer the bias that its module lacks but could have; `factor` scales what earlier merges put there."""
        if self._bias(op) not in self._weights.empty:
            raise Blocked(f"{op.name} {where} it has no bias to take a shift")
        return Edit(op.call.path, self._bias(op), factor, delta, new=True)

    # forward
    def _forward(self, value: Value, scale: Array, shift: Array, through: list[str]) -> Iterator[Edit]:
        """Yield the edits after which the layers that take `value` treat it as scale * value + shift."""
        for op in self._takers(value):
            if op.name in _TAKEN_BY:
                yield from self._into_input(op, value, scale, shift)
            elif op.name in NORMS and self._is_final and not self._has_norms:
                yield from self._into_norm(op, value, scale, shift)
            elif op.name in MOVES:
                moved = (self._weights.pushed(op, value, *each) for each in ((scale, 1.0), (shift, 0.0)))
                for output, its_scale, its_shift in zip(op.outputs, *moved, strict=False):
                    yield from self._forward(output, its_scale, its_shift, through)
            elif self._scaled_input(op) is value:
                output = op.outputs[0]
                yield from self._forward(output, *self._across(op, scale, shift, output, through), through)
            else:
                raise Blocked(f"{op.name} takes it as something other than its map")

    def _takers(self, value: Value) -> list[Op]:
        if any(output is value for output in self._graph.outputs):
            raise Blocked("it is the network's output")
        self._touched.add(value)
        return self._users(value)

    def _into_input(self, op: Op, value: Value, scale: Array, shift: Array) -> Iterator[Edit]:
        at, weight_at, bias_at = _TAKEN_BY[op.name]
        inputs, weight, bias = op.args[at], op.args[weight_at], None if bias_at is None else op.args[bias_at]
        if inputs is not value or weight.live or op.name == "convolution" and op.args[6]:
            raise Blocked(f"{op.name} after it has no weight per input channel")
        dim = 1 if op.name == "convolution" else -1
        factor, offset = (per_input(op, weight, along(field, dim)) for field in (scale, shift))
        if (factor != 1).any():
            yield self._edit(op, weight, factor)
        if offset.any():
            yield self._shifted(op, weight, bias, offset)

    def _shifted(self, op: Op, weight: Value, bias: Value | None, offset: Array) -> Edit:
        """Turn an offset of a layer's input, broadcastable to its weight, into an offset of its output."""
        if op.name == "convolution" and any(op.args[4]):
            raise Blocked("the zero padding of convolution makes a shift inexact at the borders")
        added = self._weights.compute(weight) * offset
        summed = added.reshape(len(added), -1).sum(1) if op.name == "convolution" else added.sum(0)
        return self._added(op, bias, summed)

    def _into_norm(self, op: Op, value: Value, scale: Array, shift: Array) -> Iterator[Edit]:
        """Change a batch norm's weight and bias to make of x what it made of scale * x + shift, for any scale."""
        if op.args[0] is not value:
            raise Blocked(f"{op.name} takes it as something other than its map")
        factor, offset = along(scale, 1), along(shift, 1)
        weight, mean, deviation = self._norm(op, "after")
        delta = weight * (mean * (factor - 1) + offset) / deviation
        yield self._edit(op, op.args[1], factor)
        yield replace(self._edit(op, op.args[2], np.ones_like(delta), True), delta=delta)

    def _norm(self, op: Op, where: str) -> tuple[Array, Array, Array]:
        """Return a batch norm's weight, running mean and running standard deviation."""
        weight, bias, mean, variance, training = op.args[1:6]
        if training or any(v is None or v.live for v in (weight, bias, mean, variance)):
            raise Blocked(f"{op.name} {where} it has no weight, bias and running statistics")
        weights, means, variances = (self._weights.compute(each) for each in (weight, mean, variance))
        return weights, means, np.sqrt(variances + op.args[7])

    def _added(self, op: Op, bias: Value | None, delta: Array) -> Edit:
        """Offset a layer's output: in its bias, in what the next operation adds or subtracts, or in a new bias."""
        if bias is not None:
            return replace(self._edit(op, bias, np.ones_like(delta), True), delta=delta)
        output = op.outputs[0]
        users = self._users(output)
        user = users[0] if len(users) == 1 else None
        if user and user.name == "add" and not user.kwargs:
            for parameter in (v for v in user.args[:2] if isinstance(v, Value) and v.parameters and not v.producer):
                shape = [1] * len(output.shape)
                shape[1 if op.name == "convolution" else -1] = -1
                moved = spread_like(np.broadcast_to(delta.reshape(shape), output.shape), parameter)
                return replace(self._edit(user, parameter, np.ones_like(moved), True), delta=moved)
        if self._has_norms or user is None or user.name not in NORMS or user.args[3] is None:
            return self._new_bias(op, np.ones_like(delta), delta, "after")
        return replace(self._edit(user, user.args[3], np.ones_like(delta), True), delta=-delta)

    # maps that mix channels
    def _mix_back(self, value: Value, mix: Array, shift: Array, users: Collection[Op]) -> Iterator[Edit]:
        """Yield the edits after which the convolution before, perhaps with a norm after it, makes mix @ value + shift.

        The norm's scale, which may be 0, moves into the convolution; the norm is left with a scale of 1.
        """
        op = self._maker(value, users)
        if value in self._gone:
            raise Blocked("the constant of another gate is in between")
        if op.name in NORMS:
            weight, _, deviation = self._norm(op, "before")
            inner = mix * (weight / deviation)
            yield replace(self._edit(op, op.args[1], np.zeros_like(weight), True), delta=deviation)
            yield self._mixed(op, op.args[3], inner)
            yield self._mixed(op, op.args[2], mix, delta=shift)
            mix, shift, op = inner, np.zeros_like(shift), self._maker(op.args[0], {op})
        self._require_mixing(op, "before")
        yield self._mixed(op, op.args[1], mix)
        if op.args[2] is not None:
            yield self._mixed(op, op.args[2], mix, delta=shift)
        elif shift.any() or self._bias(op) in self._made:
            yield replace(self._new_bias(op, np.ones_like(shift), shift, "before"), mix=mix)

    def _mix_forward(self, value: Value, mix: Array, shift: Array) -> Iterator[Edit]:
        """Yield the edits after which every convolution that takes `value` treats it as mix @ value + shift."""
        for op in self._takers(value):
            self._require_mixing(op, "after")
            yield self._mixed(op, op.args[1], mix.T, dim=1)
            if shift.any():
                yield self._shifted(op, op.args[1], op.args[2], per_input(op, op.args[1], shift))

    def _require_mixing(self, op: Op, where: str) -> None:
        if op.name != "convolution" or op.args[6] or op.args[8] != 1:
            raise Blocked(f"{op.name} {where} it is no convolution over all channels, which a matrix needs")

    def _mixed(self, op: Op, used: Value, mix: Array, *, dim: int = 0, delta: Array | None = None) -> Edit:
        return replace(self._edit(op, used, np.ones(()), True), mix=mix, dim=dim, delta=delta)

    # operations on the way, and tensors to change
    def _scaled_input(self, op: Op) -> Value:
        """Return the input of an operation that commutes with a scale."""
        if op.name in POSITIVE | LINEAR:
            return op.args[0]  # type: ignore[no-any-return]
        if op.name == "constant_pad_nd" and not any(op.args[2:]):
            return op.args[0]  # type: ignore[no-any-return]
        if op.name in ("mul", "div"):
            pair = [v for v in op.args[:2] if isinstance(v, Value) and v.live and v is not self._constants.get(op)]
            if len(pair) == 1 and (op.name == "mul" or pair[0] is op.args[0]):
                return pair[0]
        raise Blocked(f"{op.name} is in between")

    def _across(self, op: Op, scale: Array, shift: Array, beyond: Value, through: list[str]) -> tuple[Array, Array]:
        """Return scale and shift on the other side of an operation, at `beyond`."""
        if shift.any():
            raise Blocked(f"a shift does not pass {op.name}")
        if op.name in POSITIVE and (scale < 0).any():
            raise Blocked(f"negative constants do not pass {op.name}")
        through.append(op.name)
        if scale.shape != beyond.shape:
            if len(beyond.shape) < 2:
                raise Blocked(f"{op.name} mixes channels")
            dim = 1 if op.name != "mean" or beyond.shape[1] == scale.shape[1] else -1
            vector = along(scale, dim)
            if beyond.shape[dim] != len(vector):
                raise Blocked(f"{op.name} mixes channels")
            shape = (-1, *[1] * (len(beyond.shape) - 2 if dim == 1 else 0))
            scale = np.broadcast_to(vector.reshape(shape), beyond.shape)
        return scale, np.zeros_like(scale)

    def _edit(self, op: Op, used: Value, factor: Array, direct: bool = False) -> Edit:
        """Return the change of one parameter that multiplies what `op` uses by `factor` and affects nothing else."""
        if used.live:
            raise Blocked(f"the weight of {op.name} depends on the input")
        found = self._carrier(op.call.path, used, factor)
        if found is None or direct and used.producer is not None:
            raise Blocked(f"no parameter of {op.name} carries a factor per channel")
        same = self._weights.tied.get(found.name, (found.name,))
        others = [o for o in self._needed if o is not op and o.live_inputs and found.name in o.parameters]
        if len(same) > 1 or others:
            raise Blocked(f"{found.name} is shared with {same[1] if len(same) > 1 else others[0].call.path}")
        return found

    def _carrier(self, path: str, used: Value, factor: Array) -> Edit | None:
        """Find the parameter to change: the used value itself or, by trial, one that it is computed from."""
        if used.producer is None:
            return Edit(path, min(used.parameters), factor) if used.parameters else None
        wanted = self._weights.compute(used) * factor
        for name in sorted(used.parameters, key=lambda name: (name.endswith("_mask"), name)):  # pruning masks last
            tensor = self._weights.tensors[name]
            for dim in [d for d, size in enumerate(tensor.shape) if size == factor.size]:
                shaped = factor.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
                changed = self._weights.compute(used, {}, {**self._weights.tensors, name: tensor * shaped})
                if np.abs(changed - wanted).max() <= TOLERANCE * np.abs(wanted).max():
                    return Edit(path, name, shaped)
        return None
