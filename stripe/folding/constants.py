"""Find the constants of gates by running the network: averages, matrices, Fisher-weighted and learned ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.building import ChannelScale
from stripe.folding.divergence import CLASSES, Outputs, divergence, kind_of, sounding
from stripe.folding.exact import scaled_copy
from stripe.folding.learning import RATE, Learner
from stripe.folding.maps import can_mix
from stripe.folding.tensors import outputs_of
from stripe.folding.uses import Array, Constants, GateUse, Sums, weighted_mean
from stripe.gates import Gate, read_gates, replace_gates
from stripe.gates.trace import Images
from stripe.messages import Progress
from stripe.recipe import LEARNING_STEPS

RIDGE = 1e-4  # penalty of least squares, in units of the mean square of a map's channels
PIECE = 32  # samples whose gradients are computed at once, which bounds the memory


# ---- averages ----
def measure_gates(
    model: nn.Module, gates: Sequence[Gate], loader: Iterable[Sequence[Any]], *, progress: Progress = iter
) -> dict[str, GateUse]:
    """Run the network over batches (images, ...) and return what each gate did; memory stays at one batch.

    Raises:
        RuntimeError: the loader is empty.
    """
    sums = {gate.name: Sums(gate.form == "additive") for gate in gates}
    seen: dict[tuple[str, str], Tensor] = {}
    device = device_of(model)
    with torch.inference_mode(), read_gates(model, gates, partial(_keep, seen), energy=True):
        for images, *_ in progress(loader):
            outputs_of(model, images.to(device))
            for name, total in sums.items():
                total.add(*(seen[name, kind].double().cpu().numpy() for kind in ("attention", "energy")))
    return {name: total.use() for name, total in sums.items()}


def _keep(seen: dict[tuple[str, str], Tensor], gate: Gate, kind: str, values: Tensor) -> None:
    seen[gate.name, kind] = values


# ---- matrices ----
def fit_matrices(
    model: nn.Module,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    loader: Iterable[Sequence[Any]],
    *,
    progress: Progress = iter,
) -> dict[str, Array]:
    """Fit a matrix and a shift to each of some gates that are constant together; returns (C, C + 1) by gate.

    The gates are fitted one after another, by least squares over all positions of all samples: from the map that
    reaches the gate when those before it are already replaced, to what the gate gives in the original network. A ridge
    penalty draws the matrix a little towards a diagonal of the "energy" constants. Unlike a constant per channel, a
    matrix can treat samples differently, by what their channels hold. A gate that no matrix can replace, such as one
    that adds, gets its "energy" constant (C,).

    Args:
        model: the network, in eval mode; it is left as it is.
        gates: the gates that will be folded, in order of execution; all others stay as they are.
        uses: what these gates did, as `measure_gates` gives it.
        loader: batches (images, ...) with many more positions than a gate has channels; read once for each gate.
        progress: wraps the gates.
    """
    fitted: dict[str, Array] = {}
    values, shifts, mixes = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for gate in progress(gates):
        start = uses[gate.name].constant("energy")
        fitted[gate.name] = start
        values[gate.name] = torch.from_numpy(start)
        if can_mix(gate):
            sums = np.zeros((2 * gate.channels + 1, gate.channels + 1))
            before = {name: value for name, value in values.items() if name != gate.name}
            for images in (batch.to(device_of(model)) for batch, *_ in loader):
                given = _at_gate(model, gate, images)
                with replace_gates(model, gates, before, shifts, mixes):
                    x = _at_gate(model, gate, images)["map"]
                wanted = given["map"] * given["attention"][..., None]
                rows = torch.cat([x, torch.ones_like(x[:, :1]), wanted], 1).transpose(0, 1).flatten(1)
                sums += _array(rows @ rows[: gate.channels + 1].T)
            fitted[gate.name] = _least_squares(sums, start)
            mix = torch.from_numpy(fitted[gate.name])
            values[gate.name] = torch.ones(gate.channels)
            mixes[gate.name], shifts[gate.name] = mix[:, :-1], mix[:, -1]
    return fitted


def _at_gate(model: nn.Module, gate: Gate, images: Tensor) -> dict[str, Tensor]:
    """Return a gate's "attention" (N, C) and the "map" that it scales (N, C, positions), in float64."""
    seen: dict[tuple[str, str], Tensor] = {}
    with torch.inference_mode(), read_gates(model, [gate], partial(_keep, seen), maps=True):
        outputs_of(model, images)
    return {"attention": seen[gate.name, "attention"].double(), "map": seen[gate.name, "map"].double().flatten(2)}


def _least_squares(sums: Array, start: Array) -> Array:
    """Return matrix and shift (C, C + 1) from the products of (x, 1), and of the target, with (x, 1)."""
    c = len(start)
    gram, wanted = sums[: c + 1], sums[c + 1 :]
    at_start = np.hstack([np.diag(start), np.zeros((c, 1))])
    drawn = gram + RIDGE * (np.trace(gram[:c, :c]) / c or 1.0) * np.eye(c + 1)
    moved: Array = np.linalg.solve(drawn, (wanted - at_start @ gram).T).T
    return at_start + moved


# ---- the divergence's gradient ----
@dataclass(frozen=True, eq=False)
class Forecast:
    """The predicted divergence from the original for one gate, from a gradient v with respect to the attention g.

    Attributes:
        constant: the "fisher" constant (C,), E[v^2 g] / E[v^2], which leaves the least divergence if channels do not
            interact.
        divergence: E[(v . (g - c))^2] at the given constant c: to second order, the divergence with this gate alone
            constant, in nats; for values its root, the relative error.
    """

    constant: Array
    divergence: float


def foretell(
    model: nn.Module,
    gates: Sequence[Gate],
    constants: Constants,
    images: Images,
    loader: Iterable[Sequence[Any]],
    *,
    kind: str | None = None,
    normalisers: Collection[str] = (),
    seed: int = 0,
    progress: Progress = iter,
) -> dict[str, Forecast]:
    """Predict what each gate's constant costs from one pass over the batches, and find its Fisher constant.

    Args:
        model: the network, in eval mode; it is left as it is.
        gates: its gates, all of which can be folded.
        constants: the constant of every gate, (C,).
        images: a small batch as `find_gates` takes it.
        loader: batches (images, ...).
        kind: the kind of the network's output, "classes" or "values" (default: found by `kind_of`).
        normalisers: as `find_gates` takes them.
        seed: seed of the random signs.
        progress: wraps the batches.
    """
    kind = kind or kind_of(model, images)
    scaled = Scaled(model, gates, images, normalisers)
    generator = torch.Generator().manual_seed(seed)
    sums = {gate.name: Sums() for gate in gates}
    foretold = dict.fromkeys(sums, 0.0)
    for values, gradients in _gradients(model, scaled, loader, kind, generator, progress):
        for name, value in values.items():
            sums[name].add(value, gradients[name] ** 2)
            foretold[name] += float((((value - constants[name]) * gradients[name]).sum(1) ** 2).sum())
    uses = {name: total.use() for name, total in sums.items()}
    power = 1.0 if kind == CLASSES else 0.5  # the relative error is the root of what was summed
    return {
        name: Forecast(
            weighted_mean(use.energy, use.scaled, use.values.mean), (foretold[name] / use.values.count) ** power
        )
        for name, use in uses.items()
    }


def _gradients(
    model: nn.Module,
    scaled: Scaled,
    loader: Iterable[Sequence[Any]],
    kind: str,
    generator: torch.Generator,
    progress: Progress,
) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """Yield, per piece of a batch, every gate's values (n, C) and the gradient of `sounding` with respect to them."""
    device = device_of(model)
    for images in (piece for batch, *_ in progress(loader) for piece in batch.to(device).split(PIECE)):
        seen = dict[tuple[str, str], Tensor]()
        with torch.no_grad(), read_gates(model, scaled.gates, partial(_keep, seen)):
            outputs_of(model, images)
        values = {gate.name: seen[gate.name, "attention"].float().requires_grad_() for gate in scaled.gates}
        outputs = scaled.run(images, values, {})
        found = torch.autograd.grad(sounding(kind, outputs, generator), list(values.values()), allow_unused=True)
        gradients = {
            name: _array(torch.zeros_like(value) if gradient is None else gradient)
            for (name, value), gradient in zip(values.items(), found, strict=True)
        }
        yield {name: _array(value) for name, value in values.items()}, gradients


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().double().cpu().numpy()
    return found


class Scaled:
    """A copy of a network whose attention the caller gives, per channel or per sample and channel, with gradients."""

    def __init__(
        self, model: nn.Module, gates: Sequence[Gate], images: Images, normalisers: Collection[str] = ()
    ) -> None:
        """Take the gates out of a copy of the network; `images` and `normalisers` are as `find_gates` takes them.

        Raises:
            ValueError: a gate cannot be taken out.
        """
        start = {gate.name: np.stack([np.full(gate.channels, 0.5), np.ones(gate.channels)]) for gate in gates}
        self.model, self._scales = scaled_copy(model, start, images, normalisers)
        self._added = {  # 1 for addcmul(x, x, g), which is x * (1 + g)
            name: 0.0 if each.scale is None else each.scale.flatten()[0].item() - 0.5
            for name, each in self._scales.items()
        }
        self.gates = list(gates)
        self.model.requires_grad_(False)

    def run(self, images: Tensor, values: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> Outputs:
        """Run the copy with `values` in place of the attention and `shifts` added to the products, (C,) or (n, C)."""
        for gate in self.gates:
            if gate.name in self._scales:
                self._set(self._scales[gate.name], gate, values[gate.name], shifts.get(gate.name))
        return outputs_of(self.model, images)

    def _set(self, module: ChannelScale, gate: Gate, value: Tensor, shift: Tensor | None) -> None:
        if gate.form == "additive":
            module.scale, module.shift = None, _spread(gate, value if shift is None else value + shift, module.shift)
        else:
            module.shift = None if shift is None else _spread(gate, shift, module.scale)
            module.scale = _spread(gate, value, module.scale) + self._added[gate.name]


def _spread(gate: Gate, rows: Tensor, like: Any) -> Tensor:
    """Shape values (C,) or (n, C) to broadcast with the product, as `like` does for one sample."""
    rows = rows.reshape(-1, gate.channels).to(like)
    r, c = gate.layout.find("R"), gate.layout.find("C")
    if r > c:
        rows = rows.unflatten(1, (like.shape[r], like.shape[c])).transpose(1, 2)
    return rows.reshape(len(rows), *like.shape[1:])


# ---- learned ----
def learn_constants(
    model: nn.Module,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    images: Images,
    loader: Iterable[Sequence[Any]],
    *,
    steps: int = LEARNING_STEPS,
    rate: float = RATE,
    kind: str | None = None,
    normalisers: Collection[str] = (),
    progress: Progress = iter,
) -> dict[str, Array]:
    """Learn a scale and a shift per channel for gates that are constant together; returns (2, C) by gate, for `fold`.

    They start at the "energy" constants without a shift and are trained to minimise the divergence from the outputs of
    `model`, without labels, by Adam with a rate that falls linearly to 0. Nothing else is trained.

    Args:
        model: the network, in eval mode; it is left as it is.
        gates: the gates that will be folded; all others stay as they are.
        uses: what these gates did, as `measure_gates` gives it.
        images: a small batch as `find_gates` takes it.
        loader: batches (images, ...), read as often as the steps need.
        steps: number of training steps, of one batch each.
        rate: the initial learning rate, in units of the root mean square of a gate's constants and, for shifts, of
            its products.
        kind: the kind of the network's output, "classes" or "values" (default: found by `kind_of`).
        normalisers: as `find_gates` takes them.
        progress: wraps the steps.

    Raises:
        ValueError: a gate that cannot be taken out of the network, or no batches.
        FloatingPointError: the divergence is no longer finite.
    """
    kind = kind or kind_of(model, images)
    scaled = Scaled(model, gates, images, normalisers)
    device = device_of(model)
    learner = Learner(gates, uses, steps, rate)
    for step, batch in zip(progress(range(steps)), endless(loader), strict=False):
        now = {
            name: torch.tensor(pair, dtype=torch.float32, device=device).requires_grad_()
            for name, pair in learner.now().items()
        }
        values, shifts = ({name: pair[i] for name, pair in now.items()} for i in (0, 1))
        follow(kind, model, partial(scaled.run, values=values, shifts=shifts), batch.to(device), step)
        learner.step({name: _array(pair.grad) for name, pair in now.items() if pair.grad is not None})
    return learner.now()


def follow(kind: str, original: nn.Module, run: Callable[[Tensor], Outputs], batch: Tensor, step: int) -> None:
    """Accumulate the gradients of the divergence of the outputs of `run` from the original's, piece by piece.

    Raises:
        FloatingPointError: the divergence is no longer finite.
    """
    for piece in batch.split(PIECE):
        with torch.no_grad():
            wanted = outputs_of(original, piece)
        loss = divergence(kind, run(piece), wanted) * len(piece) / len(batch)
        if not loss.isfinite():
            raise FloatingPointError(f"the divergence is {loss.item()} in step {step} of learning: lower its rate")
        loss.backward()


def endless(loader: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """Yield images, epoch after epoch; a loader that has `set_epoch` is told the epoch.

    Raises:
        ValueError: the loader is empty.
    """
    for epoch in itertools.count(1):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        some = False
        for images, *_ in loader:
            some = True
            yield images
        if not some:
            raise ValueError("there are no batches to train on: expected at least one")
