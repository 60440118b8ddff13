"""read_gates and replace_gates: read the values of a network's gates, or replace them, inside a `with` block.

Forward hooks meet a tensor where some module takes or returns it; otherwise a dispatch mode does, which is open only
while the gate's site runs. Every forward must pass every gate.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident, local
from typing import Any

from torch import Tensor, nn

from stripe.gate import Gate, Kind, Tap, name_of, product_of
from stripe.gates.describing import is_alike
from stripe.gates.graph import FACTORS, factors_of
from stripe.gates.hooks import Hooks, modules_by_path, output_items, run_eagerly, unwrap
from stripe.gates.layouts import (
    average,
    first_entries,
    flat,
    like_operand,
    like_output,
    like_position,
    mean_square,
    mixed,
    positions,
)
from stripe.gates.trace import in_parts, op_name
from stripe.torch_internals import DispatchMode, is_in_place

Sink = Callable[[Gate, Kind, Tensor], None]
Extract = Callable[[Gate, Tensor], Tensor]


@contextmanager
def read_gates(
    model: nn.Module,
    gates: Sequence[Gate],
    sink: Sink,
    *,
    squeeze: bool = False,
    energy: bool = False,
    maps: bool = False,
) -> Iterator[None]:
    """Inside the `with` block, pass every gate's values in every forward of `model` to `sink(gate, kind, values)`.

    `values` is a detached copy (N, C) on the network's device. Its kind is always the attention; `squeeze` adds the
    feature map averaged over space, `energy` its square averaged over space, and `maps` the feature map itself,
    (N, C, *space). Raises ValueError when a gate does not have the channels with which it was found, and RuntimeError
    when a forward did not pass every gate, or when no forward ran.
    """
    jobs = []
    for gate in gates:
        jobs.append(_reading(gate, "attention", gate.attention, flat if gate.attention else first_entries, sink))
        if squeeze:
            jobs.append(_reading(gate, "squeeze", gate.squeeze, flat if gate.pooled else average, sink))
        if energy:
            jobs.append(_reading(gate, "energy", None, mean_square, sink))
        if maps:
            jobs.append(_reading(gate, "map", None if gate.pooled else gate.squeeze, positions, sink))
    with _watching(model, jobs):
        yield


@contextmanager
def replace_gates(
    model: nn.Module,
    gates: Sequence[Gate],
    values: Mapping[Any, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
    mixes: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside the `with` block, make `model` use `values` instead of what its gates compute.

    `values` holds a tensor (C,) or (N, C) for each gate or gate name. `shifts`, (C,) by name, are added to what the
    gates give: where a gate multiplies, the network goes on with x * value + shift. `mixes`, (C, C) by name, multiply
    the channels of what a gate gives before the shift is added; its map must have the channels in dimension 1.

    Gates that are not named stay as they are. Gradients reach `values` only where the attention is a module's output
    that its product alone uses (`gate.exclusive`). Raises ValueError for an unknown name, a wrong shape or a gradient
    that cannot flow, and RuntimeError as read_gates does.
    """
    known = {gate.name: gate for gate in gates}
    jobs = []
    for name, given in ((name_of(gate), given) for gate, given in values.items()):
        if name not in known:
            raise ValueError(f"no gate is named {name!r}; expected some of {', '.join(known)}")
        gate = known[name]
        if given.ndim not in (1, 2) or given.shape[-1] != gate.channels:
            expected = f"({gate.channels},) or (samples, {gate.channels})"
            raise ValueError(f"values of gate {name!r} have shape {tuple(given.shape)}; expected {expected}")
        if given.requires_grad and not gate.exclusive:
            raise ValueError(
                f"no gradient can reach values of gate {name!r}, which is not a module's output: detach them"
            )
        shaped = like_output if gate.exclusive else like_operand
        jobs.append(_Job(gate, "attention", gate.attention if gate.exclusive else None, partial(shaped, gate, given)))
    for name, mix in (mixes or {}).items():
        jobs.append(_Job(known[name], "product", None, partial(_mixed, mix.detach())))
    for name, shift in (shifts or {}).items():
        jobs.append(_Job(known[name], "product", None, partial(_shifted, known[name], shift.detach())))
    with _watching(model, jobs):
        yield


def _shifted(gate: Gate, shift: Tensor, product: Tensor) -> None:
    product.add_(like_position(gate, shift, product))


def _mixed(mix: Tensor, product: Tensor) -> None:
    product.copy_(mixed(mix, product))


def _reading(gate: Gate, kind: Kind, tap: Tap | None, extract: Extract, sink: Sink) -> _Job:
    """Make the job that extracts values from a tensor and passes them to the sink."""
    least = 2 if extract is flat else 3

    def read(tensor: Tensor) -> None:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor.detach()
        values = extract(gate, tensor) if tensor.ndim >= least else None
        if values is None or values.shape[1] != gate.channels:
            raise ValueError(
                f"{kind} of gate {gate.name!r} came from a tensor of shape {tuple(tensor.shape)}; expected"
                f" {gate.channels} channels, as found: call find_gates again with images like these"
            )
        sink(gate, kind, values.clone() if values.is_floating_point() else values.float())

    return _Job(gate, kind, tap, read)


# ---- watching a network ----
@dataclass(frozen=True, eq=False)
class _Job:
    """What to do with one tensor of a gate, met at `tap` or else at the product; a result of `act` replaces it."""

    gate: Gate
    kind: Kind
    tap: Tap | None
    act: Callable[[Tensor], Tensor | None]


@contextmanager
def _watching(model: nn.Module, jobs: Sequence[_Job]) -> Iterator[None]:
    """Do the jobs in every forward of `model`; raise RuntimeError if one is left undone, or if no forward runs."""
    for job in jobs:
        product_of(job.gate)
    with run_eagerly(), Hooks() as hooks:
        watch = _Watch(jobs)
        watch.attach(unwrap(model), hooks)
        try:
            yield
        finally:
            watch.close()
    if not watch.forwards:
        raise RuntimeError("no forward ran through the network while its gates were watched: call it")


class _Watch:
    """Meets every job's tensor once per forward."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.forwards = 0
        self._jobs = jobs
        self._due: set[_Job] = set()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._modes: list[tuple[tuple[str, int], _Products]] = []  # by site and thread

    def attach(self, model: nn.Module, hooks: Hooks) -> None:
        """Hook the root, and the modules where the jobs' tensors are met."""
        places: defaultdict[tuple[str, str], list[_Job]] = defaultdict(list)
        for job in self._jobs:
            places[(job.tap.path, job.tap.side) if job.tap else (job.gate.site, "product")].append(job)
        modules = modules_by_path(model)
        if lost := {job.gate.name: None for (path, _), jobs in places.items() if path not in modules for job in jobs}:
            raise ValueError(f"this network has no gates {', '.join(lost)}: call find_gates on it")
        hooks.before(model, self._begin)
        for (path, side), jobs in places.items():
            if side == "input":
                hooks.before(modules[path], partial(self._at_input, path, jobs))
            elif side == "output":
                hooks.after(modules[path], partial(self._at_output, path, jobs))
            else:
                hooks.before(modules[path], partial(self._at_site, path, jobs))
                hooks.after(modules[path], partial(self._after_site, path), always=True)
        hooks.after(model, self._end)

    def close(self) -> None:
        """Leave modes that an interrupted forward left open."""
        while self._modes:
            self._modes.pop()[1].end()

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._calls.clear()
        self._due = set(self._jobs)

    def _end(self, output: Any) -> None:
        if missing := dict.fromkeys(job.gate.name for job in self._jobs if job in self._due):
            raise RuntimeError(
                f"the forward did not pass {', '.join(missing)}: call find_gates"
                " again when the network or the shape of its input has changed; where a part was compiled meanwhile,"
                ' call the network under torch.compiler.set_stance("force_eager")'
            )
        self.forwards += 1

    def _call(self, path: str, side: str) -> int:
        self._calls[path, side] += 1
        return self._calls[path, side] - 1

    def _at_input(self, path: str, jobs: list[_Job], args: tuple[Any, ...]) -> None:
        self._meet(self._call(path, "input"), jobs, args)

    def _at_output(self, path: str, jobs: list[_Job], output: Any) -> Any:
        items = self._meet(self._call(path, "output"), jobs, output_items(output))
        if items is not None:
            named = hasattr(output, "_make")  # the constructor of a named tuple takes its items one by one
            return items[0] if isinstance(output, Tensor) else output._make(items) if named else type(output)(items)
        return None

    def _meet(self, call: int, jobs: list[_Job], items: Sequence[Any]) -> list[Any] | None:
        """Do the jobs due at this call; return the items with the results in place, or None if no job has a result."""
        replaced = None
        for job in jobs:
            if job.tap and job.tap.call == call and isinstance(item := _item(items, job.tap.position), Tensor):
                result = job.act(item)
                self._due.discard(job)
                if result is not None:
                    replaced = replaced or [*items]
                    replaced[job.tap.position] = result
        return replaced

    def _at_site(self, path: str, jobs: list[_Job], args: tuple[Any, ...]) -> None:
        call = self._call(path, "product")
        if wanted := [job for job in jobs if product_of(job.gate).call == call]:
            self._modes.append(((path, get_ident()), _Products(wanted, self._due)))
            self._modes[-1][1].begin()

    def _after_site(self, path: str, output: Any) -> None:
        if self._modes and self._modes[-1][0] == (path, get_ident()):
            self._modes.pop()[1].end()


def _item(items: Sequence[Any], position: int) -> Any:
    return items[position] if position < len(items) else None


_begun = local()  # the modes of each thread, in the order in which they were entered


class _Products(DispatchMode):
    """Recognises the products of gates within one call of their site, and does the gates' jobs there."""

    def __init__(self, jobs: list[_Job], due: set[_Job]) -> None:
        super().__init__()
        self._jobs = jobs
        self._due = due
        self._seen: Counter[_Job] = Counter()
        self._over = False
        self._entered = ExitStack()

    def begin(self) -> None:
        """Enter the mode."""
        _begun.__dict__.setdefault("modes", []).append(self)
        self._entered.enter_context(self)

    def end(self) -> None:
        """Leave the mode, at once or as soon as all modes that were entered after it have ended.

        When two contexts read the same site, the hooks of the first run first after the site as well as before it; but
        torch can only leave the mode that was entered last.
        """
        self._over = True
        begun = _begun.__dict__.get("modes", [])
        while begun and begun[-1]._over:
            begun.pop()._entered.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op_name(func)
        if self._over:
            return func(*args, **kwargs)
        result = in_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        met: list[_Job] = []
        if factors := factors_of(name, args, Tensor):
            for job in self._jobs:
                if self._is_product(job, name, factors):
                    met.append(job)
                    args = self._meet(job, name, factors, func, args)
        result = func(*args, **kwargs)
        for job in met:
            if job.kind == "product":
                job.act(result)
        return result

    def _is_product(self, job: _Job, name: str, factors: tuple[Tensor, Tensor]) -> bool:
        """Return whether this is the operation that applies the job's gate."""
        product = product_of(job.gate)
        gate = factors[product.operand]
        if name != product.op or not is_alike(job.gate.layout, product.copied, gate.shape, gate.stride()):
            return False
        self._seen[job] += 1
        return self._seen[job] == product.ordinal + 1

    def _meet(self, job: _Job, name: str, factors: tuple[Tensor, Tensor], func: Any, args: Any) -> Any:
        """Do the job before its product; return the arguments, with the result in place if there is one."""
        self._due.discard(job)
        product = product_of(job.gate)
        inverted = name == "div" and job.kind == "attention"
        read = factors[product.operand if job.kind == "attention" else 1 - product.operand]
        result = None if job.kind == "product" else job.act(read.reciprocal() if inverted else read)
        if result is None:
            return args
        result = result.reciprocal() if inverted else result
        position = FACTORS[name][product.operand]
        if position == 0 and is_in_place(func):
            return (args[0].copy_(result), *args[1:])
        return (*args[:position], result, *args[position + 1 :])
