"""Build the network with merged maps: change weights, take operations out of forwards, and compare the outputs."""

from __future__ import annotations

import copy
import linecache
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from stripe.folding.maps import AffineMap
from stripe.folding.merging import TOLERANCE, Edit, Merge
from stripe.folding.source import Removal, Unremovable, arguments, left_argument, without
from stripe.folding.tensors import named_tensors, outputs_of, relative_error
from stripe.gates.graph import Call, Op, Place, Trace, Value
from stripe.gates.layouts import mixed
from stripe.gates.trace import Images, tensors_in

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Modules that do nothing but normalise: without their norm they are nn.Identity."""


class ChannelScale(nn.Module):
    """Multiply a feature map by a constant per channel and add another, in place of gates that no layer can take.

    `gates` names the gates that it replaces.
    """

    def __init__(self, scale: Tensor | None, shift: Tensor | None = None, gates: tuple[str, ...] = ()) -> None:
        """Keep `scale` and `shift`, broadcastable to the map, as buffers."""
        super().__init__()
        self.gates = gates
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map to one of the same shape."""
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x + self.shift


class ChannelMix(nn.Module):
    """Multiply the channels of a feature map (N, C, *space) by a matrix and add a constant, where no layer can.

    `gates` names the gate that it replaces.
    """

    def __init__(self, matrix: Tensor, shift: Tensor, gates: tuple[str, ...] = ()) -> None:
        """Keep `matrix` (C, C) and `shift`, broadcastable to the map, as buffers."""
        super().__init__()
        self.gates = gates
        self.matrix: Tensor
        self.shift: Tensor
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map to one of the same shape."""
        return mixed(self.matrix, x) + self.shift


class Original:
    """A network in float64 with its graph; merges are made in copies of it, which are compared with it."""

    def __init__(
        self, model: nn.Module, graph: Trace, images: Images, at_constants: AbstractContextManager[None]
    ) -> None:
        """Keep the network, its graph and the images that were traced; inside `at_constants` its gates are constant."""
        self.model = model
        self.graph = graph
        self._images = images
        self._at_constants = at_constants

    def merged(self, merges: list[Merge]) -> tuple[nn.Module, list[Merge], float]:
        """Return the network with all exact merges made, what became of each merge, and the network's relative error.

        Raises:
            ValueError: a map cannot be taken out of the module that applies it, the output holds no tensor or numbers
                that are not finite, or it differs between two runs.
            ArithmeticError: the new network differs even with nothing merged.
        """
        probes = self._probes(merges)
        with self._at_constants:
            expected, again = (self._observed(self.model, probes) for _ in range(2))
        if not all(bool(tensor.isfinite().all()) for tensor in expected[""] if tensor.is_floating_point()):
            raise ValueError("the network gives numbers that are not finite, so that nothing can be compared")
        if not (difference := _error(again, expected)) <= TOLERANCE:
            raise ValueError(
                f"the network differs from itself by {difference:.2g} between two runs on the same images, so that"
                " nothing can be compared: turn off what is random in it, such as noise, or dropout in eval mode"
            )

        def attempt(tried: list[Merge]) -> tuple[nn.Module, float]:
            built = self._built(tried)
            try:
                return built, _error(self._observed(built, probes), expected)
            except Exception:  # a forward changed on trial may raise anything
                return built, float("inf")

        built, error = attempt(merges)
        if not error <= TOLERANCE:
            kept = [merge.keep(merge.reason or "its neighbours' merges are not exact") for merge in merges]
            for i, merge in enumerate(merges):
                alone = attempt([*kept[:i], merge, *kept[i + 1 :]])[1] if merge.direction != "kept" else 0.0
                if not alone <= TOLERANCE:
                    merges[i] = merge.keep(f"{merge.direction} is not exact: relative error {alone:.2g}")
            built, error = attempt(merges)
        if not error <= TOLERANCE:
            raise ArithmeticError(
                f"the new network differs by {error:.2g}; expected at most {TOLERANCE:.0e}, with nothing merged: a"
                " product that is written into another tensor, added to another map by addcmul, or run by a loop whose"
                " other gates stay, cannot be taken out; leave the constant of its gate out"
            )
        return built.eval(), merges, error

    def _probes(self, merges: Sequence[Merge]) -> list[str]:
        """Return the modules whose outputs must be the same as before, once all merges are made."""
        touched = frozenset[Value]().union(*(merge.touched for merge in merges))
        ports = [port for ports in self.graph.ports.values() for port in ports if port.side == "output"]
        changed = {port.call.path for port in ports if port.value in touched}
        return list(dict.fromkeys(path for merge in merges for path in merge.probes if path not in changed))

    def _observed(self, model: nn.Module, paths: Iterable[str]) -> dict[str, list[Tensor]]:
        """Run a network; return the tensors of its output as "", and those of the modules that return a single tensor.

        Other outputs of modules may change, such as attention that is returned beside the product.
        """
        seen: dict[str, list[Tensor]] = {}

        def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[path] = [*seen.get(path, []), output.clone()]  # later operations may overwrite it

        modules = dict(model.named_modules(remove_duplicate=False))
        handles = [modules[path].register_forward_hook(partial(leave, path)) for path in paths if path in modules]
        try:
            outputs = outputs_of(model, self._images)
        finally:
            for handle in handles:
                handle.remove()
        return {**seen, "": outputs}

    # building
    def _built(self, merges: Sequence[Merge]) -> nn.Module:
        """Return a copy of the network with weights changed and maps taken out."""
        built = copy.deepcopy(self.model)
        for merge in merges:
            for edit in merge.edits:
                _make(edit, built)
        removals: defaultdict[str, list[Removal]] = defaultdict(list)
        owners: defaultdict[tuple[str, Place], list[Merge]] = defaultdict(list)
        norms = []
        for merge in merges:
            if merge.map.is_norm and type(self.model.get_submodule(merge.map.steps[0][0].call.path)) in BATCH_NORMS:
                norms += [merge.map.steps[0][0].call.path] if merge.edits else []
            elif merge.direction != "unused" and not (merge.map.is_norm and merge.direction == "kept"):
                for path, removal in self._removals(merge):
                    removals[path].append(removal)
                    owners[path, removal.place].append(merge)
        for (path, place), owned in owners.items():
            self._require_each_run(path, place, owned)
        for path in sorted(removals, key=lambda path: -path.count(".") - bool(path)):
            try:
                built = _replaced(built, path, self._without(built.get_submodule(path), path, removals[path]))
            except Unremovable as error:
                taken = next(owned[0] for (owner, _), owned in owners.items() if owner == path)
                raise self._cannot(taken.map, str(error)) from error
        for path in dict.fromkeys(norms):
            built = _replaced(built, path, nn.Identity())
        return built

    def _require_each_run(self, path: str, place: Place, owned: Sequence[Merge]) -> None:
        """Refuse to take out an expression that runs more often than gates are merged there, as in a loop."""
        first, calls = owned[0].map, self.graph.calls
        forwards = sum(call.path == path for call in calls) or 1
        within = [call for call in calls if call.place == place and call.caller and call.caller.path == path]
        name = first.steps[0][0].name
        looped = [op for op in self.graph.ops if op.place == place and op.call.path == path and op.name == name]
        if len(owned) not in (forwards, len(within), len(looped)):
            runs = max(forwards, len(within), len(looped))
            raise self._cannot(first, f"that expression runs {runs} times, and would lose its gate in each run")
        if len(owned) > 1 and any(merge.direction == "kept" for merge in owned):
            raise self._cannot(first, f"that expression runs {len(owned)} times, and each run would need its own scale")

    def _removals(self, merge: Merge) -> list[tuple[str, Removal]]:
        """Return the expressions to take out, with the paths of the modules that hold them."""
        kept = _as_module(merge.map, self._images) if merge.direction == "kept" else None
        try:
            return [
                self._removal(op, position, kept if i == 0 else None)
                for i, (op, position) in enumerate(merge.map.steps)
            ]
        except Unremovable as error:
            raise self._cannot(merge.map, str(error)) from error

    def _cannot(self, map: AffineMap, reason: str) -> ValueError:
        site = type(self.model.get_submodule(map.steps[0][0].call.path)).__name__
        return ValueError(
            f"gate {map.names[0]!r} cannot be taken out of {site}.forward: {reason}; leave it out of the constants, or"
            " give the attention a module of its own that maps x to x * g"
        )

    def _removal(self, op: Op, operand: int, scale: nn.Module | None) -> tuple[str, Removal]:
        """Find the expression that runs an operation or, where its module does nothing else, the call of the module."""
        call, place = op.call, op.place
        name: str | None = op.name
        while True:
            module = self.model.get_submodule(call.path)
            if place is None:
                raise Unremovable(f"{type(module).__name__} has no Python source")
            removal = Removal(place, operand, name, scale)
            several = self._calls(call) > 1
            if call.caller is None or isinstance(module, fx.GraphModule):
                return call.path, removal
            left = left_argument(module, removal)
            if left is None or not (several or arguments(module) > 1):
                if several and scale is not None:
                    raise Unremovable("the module is called several times, and each call would need its own scale")
                return call.path, removal
            call, place, operand, name = call.caller, call.place, left, None

    def _calls(self, call: Call) -> int:
        return sum(other.path == call.path for other in self.graph.calls)

    def _without(self, module: nn.Module, path: str, removals: Sequence[Removal]) -> nn.Module:
        """Take expressions out of a module of the copy."""
        original = self.model.get_submodule(path)
        unique = list({removal.place.span: removal for removal in removals}.values())
        if isinstance(module, fx.GraphModule):
            return _without_nodes(module, type(original).forward.__code__.co_filename, unique)
        return without(module, unique)


def _error(found: Mapping[str, list[Tensor]], expected: Mapping[str, list[Tensor]]) -> float:
    """Return the largest relative error, of the outputs and of those modules that still exist."""
    paths = [path for path in expected if path in found]
    return max(relative_error(found[path], expected[path]) for path in paths)


def _replaced(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return `model` with `module` in the place of the one at `path`, which may be the root or occur more than once."""
    old = model.get_submodule(path)
    for place in [name for name, each in model.named_modules(remove_duplicate=False) if each is old and name]:
        model.set_submodule(place, module)
    return model if path else module


def _as_module(map: AffineMap, images: Images) -> nn.Module:
    """Return an affine map as a module, on the device of the images."""
    like = next(tensor for tensor in tensors_in(images))
    scale, shift = (torch.as_tensor(field).to(like.device) for field in (map.scale, map.shift))
    if map.mix is not None:
        return ChannelMix(torch.as_tensor(map.mix).to(like.device), shift, map.names)
    scaling, shifting = scale if (scale != 1).any() or not shift.any() else None, shift if shift.any() else None
    return ChannelScale(scaling, shifting, map.names)


def _make(edit: Edit, model: nn.Module) -> None:
    """Make one change to the weights of `model`."""
    module, name = model.get_submodule(edit.path), edit.name.rpartition(".")[2]
    if edit.new and getattr(module, name) is None:
        like: Any = module.weight
        setattr(module, name, nn.Parameter(torch.zeros(edit.factor.shape).to(like), like.requires_grad))
    tensor = named_tensors(model)[edit.name]
    tensor.copy_(torch.as_tensor(edit.applied(tensor.detach().cpu().numpy())))


def _without_nodes(module: fx.GraphModule, file: str, removals: Iterable[Removal]) -> nn.Module:
    """Take nodes out of a graph module, whose generated source at `file` has a line for each."""
    nodes = {node.name: node for node in module.graph.nodes}
    for number, removal in enumerate(removals):
        name = linecache.getline(file, removal.place.span[0]).partition("=")[0].partition(":")[0].strip()
        node = nodes.get(name)
        operand = node.args[removal.operand] if node is not None and removal.operand < len(node.args) else None
        if not isinstance(node, fx.Node) or not isinstance(operand, fx.Node):
            raise Unremovable(f"no node of its graph is the product at line {removal.place.span[0]}")
        if removal.scale is not None:
            path = f"channel_scale_{len(list(module.children()))}_{number}"
            module.add_module(path, removal.scale)
            with module.graph.inserting_before(node):
                operand = module.graph.call_module(path, (operand,))
        node.replace_all_uses_with(operand)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    return module
