"""Put constants in place of a trained network's gates, and those into its weights. What is not exact is not merged.

A gate at a constant is a map y = scale * x + shift per channel. It goes back into the layer that made x, or forward
into every layer that takes y; both are decided on the traced graph, and the result is compared with the network
whose gates are constant.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from stripe.gates.finding import factors_of, find_gates, is_alike
from stripe.gates.gate import Gate
from stripe.gates.hooks import unwrap
from stripe.gates.reading import replace_gates
from stripe.gates.trace import ARITHMETIC, MOVES, Images, Op, Trace, Value, trace

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
class FoldReport:
    """What became of each gate, and how far the folded network is from the one whose gates are constant.

    `table` has one row per gate: gate, direction ("back", "forward" or "kept"), into (names of the tensors that
    changed), through (maps between), reason (why it was kept) and weight_growth (largest weight after over before).
    `error` is the largest difference over the largest output, in float64.
    """

    table: pd.DataFrame
    error: float


@dataclass(frozen=True, eq=False)
class _Edit:
    """A change of what the module at `path` uses: `name` times `factor`, plus `delta`, which weights have not."""

    path: str
    name: str
    factor: Tensor
    delta: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Fold:
    """What is to become of one gate: `direction` and the rest as in a report; `module` is the gate at its constant.

    `probes` are modules beyond the merge: their outputs must not differ.
    """

    gate: Gate
    module: ChannelScale
    direction: str = "kept"
    edits: tuple[_Edit, ...] = ()
    through: tuple[str, ...] = ()
    reason: str = ""
    growth: float = 1.0
    probes: tuple[str, ...] = ()

    def keep(self, reason: str) -> _Fold:
        return _Fold(self.gate, self.module, reason=reason)


class _Blocked(Exception):
    """No exact merge on this side; the message says what is in the way."""


def fold(
    model: nn.Module, constants: Mapping[str, Tensor | np.ndarray[Any, Any]], images: Images
) -> tuple[nn.Module, FoldReport]:
    """Replace the gates named in `constants` by these vectors (C,) and merge them into the network's weights.

    `images` is a small batch as `find_gates` takes it. Returns a new network and the report. A gate without an exact
    merge becomes a ChannelScale.

    Raises:
        ValueError: train mode, no gates, an unknown gate, a vector that does not fit or is not finite, or a gate
            that cannot be taken out of the module that applies it.
        ArithmeticError: the folded network differs, even with nothing merged.
    """
    model = unwrap(model)
    if training := [path or "model" for path, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in train mode, where statistics change: call model.eval() before fold")
    usual = _leaves(images)[0].dtype
    exact, images = copy.deepcopy(model).double(), tree_map(_double, images)
    gates = find_gates(exact, images)
    vectors = _checked(gates, constants, _leaves(images)[0])
    gates = [gate for gate in gates if gate.name in vectors]
    with torch.no_grad():
        folds = _Network(exact, trace(exact, images), gates, vectors).plan()
        folded, folds, error = _verified(exact, images, folds, vectors)
    _cast_like(folded, model, usual)
    return folded, FoldReport(_table(folds), error)


def _checked(
    gates: Sequence[Gate], constants: Mapping[str, Tensor | np.ndarray[Any, Any]], like: Tensor
) -> dict[str, Tensor]:
    """Return the constants on the device and of the type of `like`."""
    if not gates:
        raise ValueError("the network has no gates to fold: see stripe.gates.explain_gates for what was looked at")
    channels = {gate.name: gate.channels for gate in gates}
    vectors = {name: torch.as_tensor(vector).detach().to(like) for name, vector in constants.items()}
    for name, vector in vectors.items():
        if name not in channels:
            raise ValueError(f"no gate is named {name!r}; expected some of {', '.join(channels)}")
        if vector.shape != (channels[name],):
            raise ValueError(
                f"the constant of gate {name!r} has shape {tuple(vector.shape)}; expected ({channels[name]},)"
            )
        if not vector.isfinite().all():
            raise ValueError(f"the constant of gate {name!r} is not finite in {(~vector.isfinite()).sum()} channels")
    return vectors


def _table(folds: Iterable[_Fold]) -> pd.DataFrame:
    rows = [
        (f.gate.name, f.direction, tuple(dict.fromkeys(e.name for e in f.edits)), f.through, f.reason, f.growth)
        for f in folds
    ]
    return pd.DataFrame(rows, columns=["gate", "direction", "into", "through", "reason", "weight_growth"])


# ---- deciding where a constant goes ----
class _Network:
    """The graph of a network without the gates that become constant, and its tensors by name."""

    def __init__(self, model: nn.Module, graph: Trace, gates: Sequence[Gate], vectors: Mapping[str, Tensor]) -> None:
        self._graph = graph
        self._gates = gates
        self._vectors = vectors
        self._tensors = _named_tensors(model)
        self._products = {gate.name: _product(graph, gate) for gate in gates}
        self._constants = {op: op.args[i] for op, i, _ in self._products.values()}
        self._needed = self._reached()

    def plan(self) -> list[_Fold]:
        """Decide for every gate, in order of execution."""
        calls = Counter(call.path for call in self._graph.calls)
        if shared := [gate.name for gate in self._gates if calls[gate.site] > 1]:
            raise ValueError(f"gates {', '.join(shared)} are in a module called several times: its weights are shared")
        return [self._decide(gate) for gate in self._gates]

    def _decide(self, gate: Gate) -> _Fold:
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
            except _Blocked as blocked:
                reasons.append(f"{direction}: {blocked}")
            else:
                maps = tuple(dict.fromkeys(through))
                probes = (gate.site,) if direction == "back" else tuple(edit.path for edit in edits)
                found.append(_Fold(gate, fixed, direction, edits, maps, "", self._growth(edits), probes))
        return min(found, key=lambda f: f.growth) if found else _Fold(gate, fixed, reason="; ".join(reasons))

    def _growth(self, edits: Iterable[_Edit]) -> float:
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
            raise _Blocked(f"{op.name if op else 'a tensor that is no parameter'} cannot be computed beforehand")
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
        except _Blocked:
            return None
        corner = tuple(slice(None) if letter in "RGC" else slice(1) for letter in gate.layout)
        ops = {op for op in self._needed if op.call.path == gate.site}
        return outputs[0], ops, ChannelScale((one - zero)[corner].clone(), zero[corner].clone())

    # backward
    def _back(
        self, value: Value, scale: Tensor, shift: Tensor, users: Collection[Op], through: list[str]
    ) -> Iterator[_Edit]:
        """Yield the edits by which the layers that made `value` make scale * value + shift."""
        op = value.producer
        if op is None or not op.live_inputs:
            raise _Blocked("nothing before it has weights")
        others = [user for output in op.outputs for user in self._users(output) if user not in users]
        if others or any(made is output for made in op.outputs for output in self._graph.outputs):
            raise _Blocked(f"the map before is also taken by {others[0].name if others else 'the output'}")
        if op.name in _MADE_BY:
            yield from self._into_output(op, scale, shift)
        elif op.name in MOVES:
            scales, shifts = _pulled(op, value, scale, 1.0), _pulled(op, value, shift, 0.0)
            for source, moved in scales.items():
                yield from self._back(source, moved, shifts[source], {op}, through)
        else:
            source = self._scaled_input(op)
            yield from self._back(source, *self._across(op, scale, shift, source, through), {op}, through)

    def _into_output(self, op: Op, scale: Tensor, shift: Tensor) -> Iterator[_Edit]:
        dim, *positions = _MADE_BY[op.name]
        weight, bias = (None if i is None else op.args[i] for i in positions)
        factor, delta = _along(scale, dim), _along(shift, dim)
        if weight is None or op.name == "convolution" and op.args[6]:
            raise _Blocked(f"{op.name} before it has no weight per output channel")
        if bias is None and delta.any():
            raise _Blocked(f"{op.name} before it has no bias to take a shift")
        if (factor != 1).any():
            yield self._edit(op, weight, factor.reshape(-1, *[1] * (len(weight.shape) - 1)) if dim == 1 else factor)
        if bias is not None:
            yield replace(self._edit(op, bias, factor, bool(delta.any())), delta=delta)

    # forward
    def _forward(self, value: Value, scale: Tensor, shift: Tensor, through: list[str]) -> Iterator[_Edit]:
        """Yield the edits by which the layers that take `value` take it for scale * value + shift."""
        if any(output is value for output in self._graph.outputs):
            raise _Blocked("it is the network's output")
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
                raise _Blocked(f"{op.name} takes it as something other than its map")

    def _into_input(self, op: Op, value: Value, scale: Tensor, shift: Tensor) -> Iterator[_Edit]:
        at, weight_at, bias_at = _TAKEN_BY[op.name]
        inputs, weight, bias = op.args[at], op.args[weight_at], None if bias_at is None else op.args[bias_at]
        if inputs is not value or weight.live or op.name == "convolution" and op.args[6]:
            raise _Blocked(f"{op.name} after it has no weight per input channel")
        dim = 1 if op.name == "convolution" else -1
        factor, offset = (_per_input(op, weight, _along(field, dim)) for field in (scale, shift))
        if (factor != 1).any():
            yield self._edit(op, weight, factor)
        if offset.any():
            if op.name == "convolution" and any(op.args[4]):
                raise _Blocked("the zero padding of convolution makes a shift inexact at the borders")
            added = self._evaluate(weight, {}, self._tensors) * offset
            yield self._added(op, bias, added.flatten(1).sum(1) if op.name == "convolution" else added.sum(0))

    def _added(self, op: Op, bias: Value | None, delta: Tensor) -> _Edit:
        """Add to a layer's output: at its bias, or at the running mean of the batch norm that takes it."""
        if bias is not None:
            return replace(self._edit(op, bias, torch.ones_like(delta), True), delta=delta)
        users = self._users(op.outputs[0])
        if len(users) != 1 or "batch_norm" not in users[0].name or users[0].args[3] is None:
            raise _Blocked(f"{op.name} after it has neither bias nor batch norm to take a shift")
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
        raise _Blocked(f"{op.name} is in between")

    def _across(self, op: Op, scale: Tensor, shift: Tensor, beyond: Value, through: list[str]) -> tuple[Tensor, Tensor]:
        """Return scale and shift on the other side of a map, at `beyond`."""
        if shift.any():
            raise _Blocked(f"a shift does not pass {op.name}")
        if op.name in POSITIVE and (scale < 0).any():
            raise _Blocked(f"negative constants do not pass {op.name}")
        through.append(op.name)
        if scale.shape != beyond.shape:
            dim = 1 if op.name != "mean" or beyond.shape[1] == scale.shape[1] else -1
            vector = _along(scale, dim)
            if beyond.shape[dim] != len(vector):
                raise _Blocked(f"{op.name} mixes channels")
            scale = vector.reshape(-1, *[1] * (len(beyond.shape) - 2) if dim == 1 else []).expand(beyond.shape)
        return scale, torch.zeros_like(scale)

    def _edit(self, op: Op, used: Value, factor: Tensor, direct: bool = False) -> _Edit:
        """Return the change of one parameter that multiplies by `factor` what `op` uses, and nothing else."""
        if used.live:
            raise _Blocked(f"the weight of {op.name} depends on the input")
        found = self._carrier(op.call.path, used, factor)
        if found is None or direct and used.producer is not None:
            raise _Blocked(f"no parameter of {op.name} carries a factor per channel")
        same = [name for name, tensor in self._tensors.items() if tensor is self._tensors[found.name]]
        others = [o for o in self._needed if o is not op and o.live_inputs and found.name in o.parameters]
        if len(same) > 1 or others:
            raise _Blocked(f"{found.name} is shared with {same[1] if len(same) > 1 else others[0].call.path}")
        return found

    def _carrier(self, path: str, used: Value, factor: Tensor) -> _Edit | None:
        """Find the parameter to change: what is used itself, or what it is computed from, by trying."""
        if used.producer is None:
            return _Edit(path, min(used.parameters), factor) if used.parameters else None
        wanted = self._evaluate(used, {}, self._tensors) * factor
        for name in sorted(used.parameters):
            tensor = self._tensors[name]
            for dim in [d for d, size in enumerate(tensor.shape) if size == factor.numel()]:
                shaped = factor.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
                changed = {**self._tensors, name: tensor * shaped}
                if _error([self._evaluate(used, {}, changed)], [wanted]) <= TOLERANCE:
                    return _Edit(path, name, shaped)
        return None


def _product(graph: Trace, gate: Gate) -> tuple[Op, int, int]:
    """Return a gate's product, with the positions of gate and feature map among its arguments."""
    product = gate.product
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
        raise _Blocked("the channels are spread over several dimensions")
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
        raise _Blocked(f"{op.name} is in between")
    return {v: fields[v] for v in values if v.live}


# ---- building the folded network, and comparing ----
def _verified(
    exact: nn.Module, images: Images, folds: list[_Fold], vectors: Mapping[str, Tensor]
) -> tuple[nn.Module, list[_Fold], float]:
    """Build the folded network; keep, with the reason, the gates whose merge is not exact."""
    gates = [f.gate for f in folds]
    probes = dict.fromkeys(path for f in folds for path in f.probes)
    with replace_gates(exact, gates, vectors):
        expected = _observed(exact, images, probes)

    def attempt(tried: list[_Fold]) -> tuple[nn.Module, float]:
        folded = _built(exact, images, tried, vectors)
        return folded, _error(_observed(folded, images, probes), expected)

    folded, error = attempt(folds)
    if not error <= TOLERANCE:
        kept = [f.keep(f.reason or "its neighbours' merges are not exact") for f in folds]
        for i, f in enumerate(folds):
            alone = attempt([*kept[:i], f, *kept[i + 1 :]])[1] if f.direction != "kept" else 0.0
            if not alone <= TOLERANCE:
                folds[i] = f.keep(f"{f.direction} is not exact: relative error {alone:.2g}")
        folded, error = attempt(folds)
    if not error <= TOLERANCE:
        raise ArithmeticError(f"the folded network differs by {error:.2g}; expected at most {TOLERANCE:.0e}")
    return folded, folds, error


def _observed(model: nn.Module, images: Images, paths: Iterable[str]) -> list[Tensor]:
    """Run the network; return the tensors of its output and of the outputs of modules."""
    seen: dict[str, Any] = {}

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[path] = copy.deepcopy(output)  # what comes next may write it

    handles = [model.get_submodule(path).register_forward_hook(partial(leave, path)) for path in paths]
    try:
        outputs = _outputs(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, *_leaves([seen[path] for path in paths])]


def _built(exact: nn.Module, images: Images, folds: Sequence[_Fold], vectors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the network with the weights changed and the gates taken out."""
    calls: list[dict[str, _SiteCall]] = []
    seen: Counter[str] = Counter()
    turns = []
    for f in folds:  # the k-th gate of a site is taken out once those before it are
        turns.append(seen[f.gate.site])
        seen[f.gate.site] += 1
    for turn in range(max(turns, default=-1) + 1):
        values = {
            f.gate.name: vectors[f.gate.name] if t == turn or f.direction == "kept" else _neutral(f.gate, vectors)
            for f, t in zip(folds, turns, strict=True)
            if t <= turn
        }
        calls.append(_site_calls(exact, images, [f.gate for f in folds], values))
    folded = copy.deepcopy(exact)
    for turn, f in sorted(zip(turns, folds, strict=True), key=lambda pair: pair[0]):
        path = f.gate.site
        new = _without_gate(folded.get_submodule(path), f, calls[turn][path])
        if path:
            folded.set_submodule(path, new)
        else:
            folded = new
    tensors = _named_tensors(folded)
    for edit in (edit for f in folds for edit in f.edits):
        tensor = tensors[edit.name]
        tensor.copy_(tensor * edit.factor + (0.0 if edit.delta is None else edit.delta))
    return folded


def _neutral(gate: Gate, vectors: Mapping[str, Tensor]) -> Tensor:
    """Return the constant at which a gate changes nothing."""
    return vectors[gate.name].new_full((gate.channels,), 0.0 if gate.form == "additive" else 1.0)


@dataclass(eq=False)
class _SiteCall:
    """What a module was called with, and returned, while its gates were constant."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    def error(self, module: nn.Module) -> float:
        """Return how far another module's output is off, infinite where it cannot run."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        try:
            output = module.forward(*args, **kwargs)  # not the call: a GraphModule prints what fails in it
        except Exception:  # a module changed by trial: anything may come
            return float("inf")
        return _error(_leaves(output), _leaves(self.output))


def _site_calls(
    model: nn.Module, images: Images, gates: Sequence[Gate], vectors: Mapping[str, Tensor]
) -> dict[str, _SiteCall]:
    """Run the network with gates constant; return the calls of their sites."""
    calls: dict[str, _SiteCall] = {}

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[path] = _SiteCall(*copy.deepcopy((args, kwargs)))

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[path].output = copy.deepcopy(output)

    handles = []
    try:
        for path in {gate.site for gate in gates}:
            site = model.get_submodule(path)
            handles.append(site.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
            handles.append(site.register_forward_hook(partial(leave, path)))
        with replace_gates(model, gates, vectors):
            _outputs(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _without_gate(site: nn.Module, planned: _Fold, call: _SiteCall) -> nn.Module:
    """Return what takes the place of a gate's site: nothing, itself without its attention, or its forward rewritten."""
    merged = planned.direction != "kept"
    if len(call.args) == 1 and not call.kwargs and call.error(planned.module) <= TOLERANCE:
        return nn.Identity() if merged else planned.module
    if merged and planned.gate.form == "multiplicative" and (bare := _without_child(site, planned.gate, call)):
        return bare
    if rewritten := _rewritten(site, planned.module, call, merged):
        return rewritten
    raise ValueError(
        f"gate {planned.gate.name!r} cannot be taken out of {type(site).__name__}.forward: leave it out of the"
        " constants, or give the attention a module of its own that maps x to x * g"
    )


def _without_child(site: nn.Module, gate: Gate, call: _SiteCall) -> nn.Module | None:
    """Set the attention module of a site to None, if its forward provides for that."""
    if gate.source is None:
        return None
    child = gate.source.removeprefix(f"{gate.site}.").partition(".")[0]
    bare = copy.copy(site)
    bare._modules = {**site._modules, child: None}
    handle = site.get_submodule(child).register_forward_hook(lambda module, args, output: torch.ones_like(output))
    try:
        neutral = replace(call, output=site(*copy.deepcopy(call.args), **copy.deepcopy(call.kwargs)))
    finally:
        handle.remove()
    return bare if neutral.error(bare) <= TOLERANCE else None


class _OwnForward(fx.Tracer):
    """Traces one module's forward; its submodules stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _rewritten(site: nn.Module, fixed: ChannelScale, call: _SiteCall, merged: bool) -> fx.GraphModule | None:
    """Rewrite a forward without its gate: try each product for the one that `fixed` can stand in for."""
    try:
        nodes = list(_OwnForward().trace(site).nodes)
    except Exception:  # tracing runs the site's own forward: anything may come
        return None
    name = f"channel_scale_{len(list(site.children()))}"
    for index, node in enumerate(nodes):
        operation = getattr(node.target, "__name__", str(node.target))
        if not node.op.startswith("call_") or operation.strip("_") not in {"mul", "imul", "add", "iadd"}:
            continue
        for position in range(2):
            kept = _with_module_at(site, index, position, name, fixed)
            if kept is not None and call.error(kept) <= TOLERANCE:
                return _with_module_at(site, index, position, name, None) if merged else kept
    return None


def _with_module_at(
    site: nn.Module, index: int, position: int, name: str, module: nn.Module | None
) -> fx.GraphModule | None:
    """Trace a forward and replace one node by `module` applied to one of its arguments, or by that argument."""
    graph = _OwnForward().trace(site)
    node = list(graph.nodes)[index]
    source = node.args[position] if position < len(node.args) else None
    if not isinstance(source, fx.Node):
        return None
    root = copy.copy(site)
    taken = source
    if module is not None:
        root._modules = {**site._modules, name: module}
        with graph.inserting_before(node):
            taken = graph.call_module(name, (source,))
    node.replace_all_uses_with(taken)
    graph.erase_node(node)
    rewritten = fx.GraphModule(root, graph, type(site).__name__)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    rewritten.delete_all_unused_submodules()
    return rewritten


# ---- tensors ----
def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _cast_like(folded: nn.Module, model: nn.Module, usual: torch.dtype) -> None:
    """Give the folded network's tensors the types of the original's; what is new takes the usual one."""
    types = {name: tensor.dtype for name, tensor in _named_tensors(model).items()}
    for name, tensor in _named_tensors(folded).items():
        tensor.data = tensor.data.to(types.get(name, usual))


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def _outputs(model: nn.Module, images: Images) -> list[Tensor]:
    """Run the network; return every tensor of its output."""
    if isinstance(images, Mapping):
        output = model(**images)
    else:
        output = model(*images) if isinstance(images, tuple | list) else model(images)
    return _leaves(output)


def _leaves(item: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest value, the worst of all pairs; infinite if they do not fit."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())  # not a number if any is
