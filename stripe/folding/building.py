"""The folded network: gates taken out of the forwards that apply them, weights changed, and the whole compared."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from stripe.folding.merging import TOLERANCE, ChannelScale, Merge
from stripe.folding.tensors import named_tensors, outputs_of, relative_error, tensors_in
from stripe.gate import Gate
from stripe.gates.reading import replace_gates
from stripe.gates.trace import Images


def verified(
    exact: nn.Module, images: Images, folds: list[Merge], vectors: Mapping[str, Tensor]
) -> tuple[nn.Module, list[Merge], float]:
    """Build the folded network; keep, with the reason, the gates whose merge is not exact."""
    gates = [f.gate for f in folds]
    probes = dict.fromkeys(path for f in folds for path in f.probes)
    with replace_gates(exact, gates, vectors):
        expected = _observed(exact, images, probes)

    def attempt(tried: list[Merge]) -> tuple[nn.Module, float]:
        folded = _built(exact, images, tried, vectors)
        return folded, relative_error(_observed(folded, images, probes), expected)

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
        outputs = outputs_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, *tensors_in([seen[path] for path in paths])]


def _built(exact: nn.Module, images: Images, folds: Sequence[Merge], vectors: Mapping[str, Tensor]) -> nn.Module:
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
    tensors = named_tensors(folded)
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
        return relative_error(tensors_in(output), tensors_in(self.output))


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
            outputs_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _without_gate(site: nn.Module, planned: Merge, call: _SiteCall) -> nn.Module:
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
