"""Where a constant goes: decided on the traced graph, exactly or not at all.

A gate at a constant is a map y = scale * x + shift per channel. It goes back into the layer that made x, or forward
into every layer that takes y, through maps that commute with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stripe.folding.tensors import named_tensors, relative_error
from stripe.gate import Gate, product_of
from stripe.gates.finding import factors_of, is_alike
from stripe.gates.trace import ARITHMETIC, MOVES, Op, Trace, Value

TOLERANCE = 1e-10
"""Largest relative error, in float64, between a folded network and the one whose gates are constant."""

POSITIVE = frozenset(
    "relu leaky_relu prelu _prelu_kernel max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d".split()
)
"""ATen operations f with f(c x) = c f(x) for c >= 0 alone."""

LINEAR = frozenset("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean neg".split())
"""ATen operations that a scale per channel passes whatever its sign."""

_MADE_BY = {  # layers: dimension of their output's channels, positions of weight and bias among the arguments
    "convolution": (1, 1, 2),
    "native_batch_norm": (1, 1, 2),
    "cudnn_batch_norm": (1, 1, 2),
    "native_group_norm": (1, 1, 2),
    "native_layer_norm": (-1, 2, 3),
    "mm": (-1, 1, None),
    "addmm": (-1, 2, 0),
}
# of layers: positions of input, weight and bias among the arguments
_TAKEN_BY: dict[str, tuple[int, int, int | None]] = {"convolution": (0, 1, 2), "mm": (0, 1, None), "addmm": (1, 2, 0)}


class ChannelScale(nn.Module):
    """Multiply a feature map by a constant per channel, add another: what a gate comes to that no layer can take."""

    def __init__(self, scale: Tensor | None, shift: Tensor | None = None) -> None:
        """Keep `scale` and `shift`, broadcastable to the map, as buffers."""
        super().__init__()
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map to one of the same shape."""
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x + self.shift


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of what the module at `path` uses: `name` times `factor`, plus `delta`, which weights have not."""

    path: str
    name: str
    factor: Tensor
    delta: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Merge:
    """What is to become of one gate: `direction` and the rest as in a report; `module` is the gate at its constant.

    `probes` are modules beyond the merge: their outputs must not differ.
    """

    gate: Gate
    module: ChannelScale
    direction: str = "kept"
    edits: tuple[Edit, ...] = ()
    through: tuple[str, ...] = ()
    reason: str = ""
    growth: float = 1.0
    probes: tuple[str, ...] = ()

    def keep(self, reason: str) -> Merge:
        """Return the same gate without a merge."""
        return Merge(self.gate, self.module, reason=reason)


class Blocked(Exception):
    """No exact merge on this side; the message says what is in the way."""


# ---- deciding where a constant goes ----
class Network:
    """The graph of a network without the gates that become constant, and its tensors by name."""

    def __init__(self, model: nn.Module, graph: Trace, gates: Sequence[Gate], vectors: Mapping[str, Tensor]) -> None:
        """Take a trace of `model`, the gates to become constant and their constants (C,)."""
        self._graph = graph
        self._gates = gates
        self._vectors = vectors
        self._tensors = named_tensors(model)
        self._products = {gate.name: _product(graph, gate) for gate in gates}
        self._constants = {op: op.args[i] for op, i, _ in self._products.values()}
        self._needed = self._reached()

    def plan(self) -> list[Merge]:
        """Decide for every gate, in order of execution."""
        calls = Counter(call.path for call in self._graph.calls)
        if shared := [gate.name for gate in self._gates if calls[gate.site] > 1]:
            raise ValueError(f"gates {', '.join(shared)} are in a module called several times: its weights are shared")
        return [self._decide(gate) for gate in self._gates]

    def _decide(self, gate: Gate) -> Merge:
        """Merge on the side where weights grow less; keep where neither is exact."""
        op, position, x_position = self._products[gate.name]
        x, y, ops = op.args[x_position], op.outputs[0], {op}
        value = _placed(gate, self._vectors[gate.name], y.shape)
        fixed = ChannelScale(None, value) if gate.form == "additive" else ChannelScale(value)
        if gate.form == "affine" and (whole := self._whole_site(gate, x, op.args[position], value)):
            y, ops, fixed = whole
        scale = (torch.ones_like(value) if fixed.scale is None else fixed.scale).expand(x.shape)
        shift = (torch.zeros_like(value) if fixed.shift is None else fixed.shift).expand(x.shape)
        found, reasons = [], []
        for direction, walk in (("back", partial(self._back, x, users=ops)), ("forward", partial(self._forward, y))):
            through: list[str] = []
            try:
                edits = tuple(walk(scale=scale, shift=shift, through=through))
            except Blocked as blocked:
                reasons.append(f"{direction}: {blocked}")
            else:
                maps = tuple(dict.fromkeys(through))
                probes = (gate.site,) if direction == "back" else tuple(edit.path for edit in edits)
                found.append(Merge(gate, fixed, direction, edits, maps, "", self._growth(edits), probes))
        return min(found, key=lambda f: f.growth) if found else Merge(gate, fixed, reason="; ".join(reasons))

    def _growth(self, edits: Iterable[Edit]) -> float:
        ratios = []
        for edit in edits:
            before = self._tensors[edit.name].abs().max()
            if edit.delta is None and before > 0:
                ratios.append(float((self._tensors[edit.name] * edit.factor).abs().max() / before))
        return max(ratios, default=1.0)

    # what is computed
    def _reached(self) -> set[Op]:
        """Return the operations that the output needs when the gates are constant."""
        queue, needed = [value.producer for value in self._graph.outputs], set[Op]()
        while queue:
            op = queue.pop()
            if op is not None and op not in needed:
                needed.add(op)
                queue += [value.producer for value in op.inputs if value is not self._constants.get(op)]
        return needed

    def _users(self, value: Value) -> list[Op]:
        return [op for op in value.consumers if op in self._needed]

    def _evaluate(self, value: Value, known: Mapping[Value, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute a value again from `known` ones and parameters."""
        if value in known:
            return known[value]
        op = value.producer
        if op is None and value.parameters:
            return tensors[min(value.parameters)]
        if op is None or op.live_inputs and op.name not in MOVES | ARITHMETIC:
            raise Blocked(f"{op.name if op else 'a tensor that is no parameter'} cannot be computed beforehand")
        return _run(op, lambda v: self._evaluate(v, known, tensors))[op.outputs.index(value)]

    def _whole_site(
        self, gate: Gate, x: Value, constant: Value, value: Tensor
    ) -> tuple[Value, set[Op], ChannelScale] | None:
        """Return the output of a site that as a whole is scale * x + shift, its operations, and that map."""
        ports = [port for ports in self._graph.ports.values() for port in ports if port.call.path == gate.site]
        outputs = [port.value for port in ports if port.side == "output"]
        if len(outputs) != 1:
            return None
        like = torch.ones_like(value).expand(x.shape)
        at = {n: {x: like * n, constant: value.expand(constant.shape)} for n in (0, 1)}
        try:
            zero, one = (self._evaluate(outputs[0], at[n], self._tensors) for n in (0, 1))
        except Blocked:
            return None
        corner = tuple(slice(None) if letter in "RGC" else slice(1) for letter in gate.layout)
        ops = {op for op in self._needed if op.call.path == gate.site}
        return outputs[0], ops, ChannelScale((one - zero)[corner].clone(), zero[corner].clone())

    # backward
    def _back(
        self, value: Value, scale: Tensor, shift: Tensor, users: Collection[Op], through: list[str]
    ) -> Iterator[Edit]:
        """Yield the edits by which the layers that made `value` make scale * value + shift."""
        op = value.producer
        if op is None or not op.live_inputs:
            raise Blocked("nothing before it has weights")
        others = [user for output in op.outputs for user in self._users(output) if user not in users]
        if others or any(made is output for made in op.outputs for output in self._graph.outputs):
            raise Blocked(f"the map before is also taken by {others[0].name if others else 'the output'}")
        if op.name in _MADE_BY:
            yield from self._into_output(op, scale, shift)
        elif op.name in MOVES:
            scales, shifts = _pulled(op, value, scale, 1.0), _pulled(op, value, shift, 0.0)
            for source, moved in scales.items():
                yield from self._back(source, moved, shifts[source], {op}, through)
        else:
            source = self._scaled_input(op)
            yield from self._back(source, *self._across(op, scale, shift, source, through), {op}, through)

    def _into_output(self, op: Op, scale: Tensor, shift: Tensor) -> Iterator[Edit]:
        dim, *positions = _MADE_BY[op.name]
        weight, bias = (None if i is None else op.args[i] for i in positions)
        factor, delta = _along(scale, dim), _along(shift, dim)
        if weight is None or op.name == "convolution" and op.args[6]:
            raise Blocked(f"{op.name} before it has no weight per output channel")
        if bias is None and delta.any():
            raise Blocked(f"{op.name} before it has no bias to take a shift")
        if (factor != 1).any():
            yield self._edit(op, weight, factor.reshape(-1, *[1] * (len(weight.shape) - 1)) if dim == 1 else factor)
        if bias is not None:
            yield replace(self._edit(op, bias, factor, bool(delta.any())), delta=delta)

    # forward
    def _forward(self, value: Value, scale: Tensor, shift: Tensor, through: list[str]) -> Iterator[Edit]:
        """Yield the edits by which the layers that take `value` take it for scale * value + shift."""
        if any(output is value for output in self._graph.outputs):
            raise Blocked("it is the network's output")
        for op in self._users(value):
            if op.name in _TAKEN_BY:
                yield from self._into_input(op, value, scale, shift)
            elif op.name in MOVES:
                scales, shifts = _pushed(op, value, scale, 1.0), _pushed(op, value, shift, 0.0)
                for output, moved, added in zip(op.outputs, scales, shifts, strict=False):
                    yield from self._forward(output, moved, added, through)
            elif self._scaled_input(op) is value:
                output = op.outputs[0]
                yield from self._forward(output, *self._across(op, scale, shift, output, through), through)
            else:
                raise Blocked(f"{op.name} takes it as something other than its map")

    def _into_input(self, op: Op, value: Value, scale: Tensor, shift: Tensor) -> Iterator[Edit]:
        at, weight_at, bias_at = _TAKEN_BY[op.name]
        inputs, weight, bias = op.args[at], op.args[weight_at], None if bias_at is None else op.args[bias_at]
        if inputs is not value or weight.live or op.name == "convolution" and op.args[6]:
            raise Blocked(f"{op.name} after it has no weight per input channel")
        dim = 1 if op.name == "convolution" else -1
        factor, offset = (_per_input(op, weight, _along(field, dim)) for field in (scale, shift))
        if (factor != 1).any():
            yield self._edit(op, weight, factor)
        if offset.any():
            if op.name == "convolution" and any(op.args[4]):
                raise Blocked("the zero padding of convolution makes a shift inexact at the borders")
            added = self._evaluate(weight, {}, self._tensors) * offset
            yield self._added(op, bias, added.flatten(1).sum(1) if op.name == "convolution" else added.sum(0))

    def _added(self, op: Op, bias: Value | None, delta: Tensor) -> Edit:
        """Add to a layer's output: at its bias, or at the running mean of the batch norm that takes it."""
        if bias is not None:
            return replace(self._edit(op, bias, torch.ones_like(delta), True), delta=delta)
        users = self._users(op.outputs[0])
        if len(users) != 1 or "batch_norm" not in users[0].name or users[0].args[3] is None:
            raise Blocked(f"{op.name} after it has neither bias nor batch norm to take a shift")
        return replace(self._edit(users[0], users[0].args[3], torch.ones_like(delta), True), delta=-delta)

    # maps between, and tensors to change
    def _scaled_input(self, op: Op) -> Value:
        """Return the input that a map commuting with a scale is applied to."""
        if op.name in POSITIVE | LINEAR:
            return op.args[0]  # type: ignore[no-any-return]
        if op.name == "constant_pad_nd" and not any(op.args[2:]):
            return op.args[0]  # type: ignore[no-any-return]
        if op.name in ("mul", "div"):
            pair = [v for v in op.args[:2] if isinstance(v, Value) and v.live and v is not self._constants.get(op)]
            if len(pair) == 1 and (op.name == "mul" or pair[0] is op.args[0]):
                return pair[0]
        raise Blocked(f"{op.name} is in between")

    def _across(self, op: Op, scale: Tensor, shift: Tensor, beyond: Value, through: list[str]) -> tuple[Tensor, Tensor]:
        """Return scale and shift on the other side of a map, at `beyond`."""
        if shift.any():
            raise Blocked(f"a shift does not pass {op.name}")
        if op.name in POSITIVE and (scale < 0).any():
            raise Blocked(f"negative constants do not pass {op.name}")
        through.append(op.name)
        if scale.shape != beyond.shape:
            dim = 1 if op.name != "mean" or beyond.shape[1] == scale.shape[1] else -1
            vector = _along(scale, dim)
            if beyond.shape[dim] != len(vector):
                raise Blocked(f"{op.name} mixes channels")
            scale = vector.reshape(-1, *[1] * (len(beyond.shape) - 2) if dim == 1 else []).expand(beyond.shape)
        return scale, torch.zeros_like(scale)

    def _edit(self, op: Op, used: Value, factor: Tensor, direct: bool = False) -> Edit:
        """Return the change of one parameter that multiplies by `factor` what `op` uses, and nothing else."""
        if used.live:
            raise Blocked(f"the weight of {op.name} depends on the input")
        found = self._carrier(op.call.path, used, factor)
        if found is None or direct and used.producer is not None:
            raise Blocked(f"no parameter of {op.name} carries a factor per channel")
        same = [name for name, tensor in self._tensors.items() if tensor is self._tensors[found.name]]
        others = [o for o in self._needed if o is not op and o.live_inputs and found.name in o.parameters]
        if len(same) > 1 or others:
            raise Blocked(f"{found.name} is shared with {same[1] if len(same) > 1 else others[0].call.path}")
        return found

    def _carrier(self, path: str, used: Value, factor: Tensor) -> Edit | None:
        """Find the parameter to change: what is used itself, or what it is computed from, by trying."""
        if used.producer is None:
            return Edit(path, min(used.parameters), factor) if used.parameters else None
        wanted = self._evaluate(used, {}, self._tensors) * factor
        for name in sorted(used.parameters):
            tensor = self._tensors[name]
            for dim in [d for d, size in enumerate(tensor.shape) if size == factor.numel()]:
                shaped = factor.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
                changed = {**self._tensors, name: tensor * shaped}
                if relative_error([self._evaluate(used, {}, changed)], [wanted]) <= TOLERANCE:
                    return Edit(path, name, shaped)
        return None


def _product(graph: Trace, gate: Gate) -> tuple[Op, int, int]:
    """Return a gate's product, with the positions of gate and feature map among its arguments."""
    product = product_of(gate)
    call = next(c for c in graph.calls if (c.path, c.index) == (gate.site, product.call))
    alike = []
    for op in graph.ops[call.start :]:
        factors = factors_of(op.name, op.args, Value) if op.name == product.op else None
        if factors:
            value = factors[product.operand]
            if is_alike(gate.layout, product.copied, value.shape, value.stride):
                alike.append(op)
    op = alike[product.ordinal]
    positions = [i for i, argument in enumerate(op.args) if isinstance(argument, Value)][-2:]
    return op, positions[product.operand], positions[1 - product.operand]


def _placed(gate: Gate, vector: Tensor, shape: Sequence[int]) -> Tensor:
    """Shape a constant (C,) to broadcast with a product of `shape`."""
    sizes = [n if letter in "RGC" else 1 for n, letter in zip(shape, gate.layout, strict=True)]
    c, r = gate.layout.find("C"), gate.layout.find("R")
    if r > c:
        vector = vector.reshape(shape[r], shape[c]).t()
    return vector.reshape(sizes)


def _along(field: Tensor, dim: int) -> Tensor:
    """Return the vector that a field is made of, (C,) along `dim`."""
    rows = field.movedim(dim, 0).flatten(1)
    if (rows != rows[:, :1]).any():
        raise Blocked("the channels are spread over several dimensions")
    return rows[:, 0]


def _per_input(op: Op, weight: Value, vector: Tensor) -> Tensor:
    """Shape a vector over a layer's input channels to broadcast with its weight; each group has its own."""
    if op.name != "convolution":
        return vector[:, None]
    outputs, per_group = weight.shape[:2]
    rows = vector.reshape(-1, per_group)
    rows = rows.repeat_interleave(outputs // len(rows), 0) if len(rows) > 1 else rows
    return rows.reshape(*rows.shape, *[1] * (len(weight.shape) - 2))


def _run(op: Op, lookup: Callable[[Value], Tensor]) -> list[Tensor]:
    """Run an operation again on other tensors."""
    args, kwargs = tree_map(lambda item: lookup(item) if isinstance(item, Value) else item, (op.args, op.kwargs))
    results: list[Tensor] = tree_leaves(getattr(torch.ops.aten, op.name)(*args, **kwargs))
    return results


def _pushed(op: Op, value: Value, field: Tensor, fill: float) -> list[Tensor]:
    """Move a field as `op` moves what it is for; `fill` is that of everything else."""
    return _run(op, lambda v: field if v is value else field.new_full(v.shape, fill))


def _pulled(op: Op, output: Value, field: Tensor, fill: float) -> dict[Value, Tensor]:
    """Return the fields of an operation's inputs that it moves to `field`."""
    values = list(dict.fromkeys(leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Value)))
    sizes = [int(np.prod(value.shape)) for value in values]
    numbers = torch.arange(sum(sizes), dtype=field.dtype, device=field.device).split(sizes)
    places = {value: part.reshape(value.shape) for value, part in zip(values, numbers, strict=True)}
    position = op.outputs.index(output)
    flat = field.new_full((sum(sizes),), fill)
    flat[_run(op, places.__getitem__)[position].long().flatten()] = field.flatten()
    fields = {v: part.reshape(v.shape) for v, part in zip(values, flat.split(sizes), strict=True)}
    if not torch.equal(_run(op, fields.__getitem__)[position], field) or any(
        (fields[v] != fill).any() for v in values if not v.live
    ):
        raise Blocked(f"{op.name} is in between")
    return {v: fields[v] for v in values if v.live}
