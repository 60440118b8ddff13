"""compact: a few numbers per image in place of a gate's attention, between folding it and keeping it whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.constants import endless, follow, learn_constants, measure_gates
from stripe.folding.divergence import kind_of
from stripe.folding.exact import fold, scaled_copy
from stripe.folding.tensors import outputs_of
from stripe.folding.uses import Array
from stripe.gate import Gate, Kind, product_of
from stripe.gates import find_gates, read_gates
from stripe.gates.trace import Images
from stripe.messages import Progress
from stripe.recipe import LEARNING_STEPS

RATE = 0.01  # learning rate, in units of the root mean square of what is learned
RIDGE = 1e-3  # penalty of least squares, in units of the mean square of a squeeze's channels
FORMS = ("multiplicative", "additive")


class Scores(nn.Module):
    """A few numbers for each image: a linear map of the average of a feature map over space.

    The last scores are kept until the next batch, for the later gates that take the same scores.
    """

    def __init__(self, weight: Tensor, bias: Tensor, channel: int) -> None:
        """Map (N, ..., C, ...) with its channels in dimension `channel` by `weight` (k, C) and `bias` (k,)."""
        super().__init__()
        self.weight, self.bias, self.channel = nn.Parameter(weight), nn.Parameter(bias), channel
        self._kept: list[Tensor] = []  # a list, which exporters do not take for a part of the network's state

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, k) of a feature map, and keep them."""
        space = [d for d in range(1, x.ndim) if d != self.channel]
        self._kept[:] = [nn.functional.linear(x.mean(space) if space else x, self.weight, self.bias)]
        return self._kept[0]

    @property
    def last(self) -> Tensor:
        """The scores that were computed last, (N, k)."""
        return self._kept[0]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last scores."""
        return {**self.__dict__, "_kept": []}


class CompactGate(nn.Module):
    """A gate whose attention is c + s U for k scores s of the image, clamped to two bounds.

    Attributes:
        constant: c, (C,).
        directions: U, (k, C).
        scores: the module that computes s, from the map that the gate scales or, with `takes`, an earlier gate's map.
        takes: whether the scores are an earlier gate's.
        gate: the gate's name.
    """

    def __init__(self, gate: Gate, fit: _Fit, scores: Scores, takes: bool, bounds: tuple[float, float]) -> None:
        """Initialise the gate from a least-squares fit."""
        super().__init__()
        like = scores.weight
        self.constant, self.directions = (
            nn.Parameter(torch.from_numpy(each).to(like)) for each in (fit.constant, fit.directions)
        )
        self.scores, self.takes, self.gate = scores, takes, gate.name
        self._adds, self._channel, (self._low, self._high) = gate.form == "additive", gate.layout.index("C"), bounds

    def forward(self, x: Tensor) -> Tensor:
        """Scale a feature map by the attention, or add the attention to it."""
        scores = self.scores.last if self.takes else self.scores(x)
        attention = (self.constant + scores @ self.directions).clamp(self._low, self._high)
        shape = [1] * x.ndim
        shape[0], shape[self._channel] = attention.shape
        attention = attention.reshape(shape)
        return x + attention if self._adds else x * attention

    def extra_repr(self) -> str:
        """Name the gate and say how many scores it takes."""
        return (
            f"gate={self.gate!r}, scores={len(self.directions)}, from={'an earlier gate' if self.takes else 'its own'}"
        )


@dataclass(frozen=True, eq=False)
class _Fit:
    """A least-squares fit of attention by k scores of a squeeze, which have variance 1 over the images.

    Attributes:
        constant: the attention where the scores are 0, (C,).
        directions: (k, C).
        weight: the weights of the squeeze's channels in the scores, (k, channels of the squeeze).
        bias: the bias of the scores, (k,).
        explained: the share of the attention's variance, weighted by what it scales, that the scores explain.
        wrong: the error left by the constant alone, as a share of the scaled map's energy.
    """

    constant: Array
    directions: Array
    weight: Array
    bias: Array
    explained: float
    wrong: float


@dataclass(frozen=True, eq=False)
class CompactReport:
    """What was done with each gate.

    Attributes:
        table: a row per gate: gate, channels, scores (k; 0: a constant, merged), source (the gate from whose map the
            scores come; empty for constants) and explained (the share of the attention's variance over images, weighted
            by what it scales, that the scores explained before they were refined).
        parameters: how many numbers the constants, directions and scores of the compact gates hold together.
    """

    table: pd.DataFrame
    parameters: int


def compact(
    model: nn.Module,
    images: Images,
    calibration: Iterable[Sequence[Any]],
    *,
    k: int | Mapping[str, int],
    source: str | None = None,
    steps: int = LEARNING_STEPS,
    rate: float = RATE,
    progress: Progress = iter,
) -> tuple[nn.Module, CompactReport]:
    """Replace the attention of a network's gates by k scores per image; no labels are used.

    A gate's attention becomes c + s U, clamped to the range of the original attention on `calibration`. The scores s
    are a linear map of the gate's own squeeze. Where `source` names a gate, they are a linear map of that gate's
    squeeze, for it and all gates after it, so that one pooling and one small map serve them all; gates before it become
    constants. Scores and directions start from the reduced-rank least-squares fit of the attention on the squeeze
    (Izenman 1975), weighted by what the gate scales; c, U and the scores are then trained together towards the
    original's outputs. Gates with k = 0 get learned constants, which are merged as in `fold`.

    Args:
        model: the network, in eval mode; it is left as it is.
        images: a small batch as `find_gates` takes it.
        calibration: batches (images, ...), read as often as the steps need; the squeezes of all images are held in
            memory, and the first fit says little unless there are more images than a gate has channels.
        k: scores per gate, or a mapping from the gates' names to their scores (0 for gates not named).
        source: the gate whose squeeze gives the scores of all gates (default: each gate has its own).
        steps: number of training steps, of one batch each; 0 keeps the least-squares fit.
        rate: initial learning rate, in units of the root mean square of what is learned; falls linearly to 0.
        progress: wraps the steps.

    Returns:
        The new network in eval mode, made of plain modules and `CompactGate`, and the report.

    Raises:
        ValueError: no gates, an unknown gate, a negative k, or a gate that is neither multiplicative nor additive.
        FloatingPointError: the divergence is no longer finite.

    Example:
        >>> import torch, stripe
        >>> model = stripe.models.create_model("resnet", depth=11, module="senet").eval()
        >>> batches = [(torch.randn(32, 3, 32, 32),) for _ in range(4)]
        >>> small, report = stripe.folding.compact(model, batches[0][0][:2], batches, k=2, steps=1)
        >>> report.table[["gate", "channels", "scores"]]
               gate  channels  scores
        0  layer1.0        64       2
        1  layer2.0       128       2
        2  layer3.0       256       2
    """
    gates = find_gates(model, images)
    counts = _counts(gates, k, source)
    constant = [gate for gate in gates if not counts[gate.name]]
    network, fits = model, dict[str, _Fit]()
    if constant:
        uses = measure_gates(model, gates, calibration)
        constants = learn_constants(model, constant, uses, images, calibration, steps=max(steps, 1), progress=progress)
        network, _ = fold(model, constants, images)
    if len(constant) < len(gates):
        left = [gate for gate in find_gates(network, images) if counts[gate.name]] if constant else gates
        network, fits = _compacted(network, left, counts, source, images, calibration)
        _refine(network, model, images, calibration, steps=steps, rate=rate, progress=progress)
    rows = [
        (gate.name, gate.channels, counts[gate.name], source or gate.name, fits[gate.name].explained)
        if gate.name in fits
        else (gate.name, gate.channels, 0, "", np.nan)
        for gate in gates
    ]
    table = pd.DataFrame(rows, columns=["gate", "channels", "scores", "source", "explained"])
    learned = {p for gate in network.modules() if isinstance(gate, CompactGate) for p in gate.parameters()}
    return network.eval(), CompactReport(table, sum(p.numel() for p in learned))


def choose_source(model: nn.Module, images: Images, calibration: Iterable[Sequence[Any]], *, k: int) -> str:
    """Return the gate whose squeeze, by k scores, best predicts the attention of all gates, as `source` for `compact`.

    A gate is judged by the sum of the errors that constants leave in the gates before it and that least squares on its
    scores leave in itself and the gates after it, each as a share of the scaled map's energy. Nothing is learned, and
    no labels are used.

    Raises:
        ValueError: no gates, or a gate that is neither multiplicative nor additive.
    """
    gates = find_gates(model, images)
    _counts(gates, k, None)
    seen = _seen(model, gates, calibration)
    alone: dict[str, float] = {}
    wrong: dict[str, float] = {}
    for i, gate in enumerate(gates):
        behind = gates[i:]
        fits = _fit_together([seen[each.name] for each in behind], seen[gate.name]["squeeze"], k, behind)
        wrong[gate.name] = sum(alone.values()) + sum(fit.wrong * (1 - fit.explained) for fit in fits.values())
        alone[gate.name] = fits[gate.name].wrong
    return min(wrong, key=wrong.__getitem__)


def _counts(gates: Sequence[Gate], k: int | Mapping[str, int], source: str | None) -> dict[str, int]:
    """Return how many scores each gate gets; gates before the source get none."""
    names = [gate.name for gate in gates]
    if not gates:
        raise ValueError("the network has no gates: see stripe.gates.explain_gates for what was looked at")
    for name in [*(k if isinstance(k, Mapping) else ()), *([source] if source else ())]:
        if name not in names:
            raise ValueError(f"no gate is named {name!r}; expected some of {', '.join(names)}")
    counts = {name: k.get(name, 0) for name in names} if isinstance(k, Mapping) else dict.fromkeys(names, k)
    if source:
        counts |= dict.fromkeys(names[: names.index(source)], 0)
    for gate in gates:
        if counts[gate.name] < 0:
            raise ValueError(f"k={counts[gate.name]} for gate {gate.name!r}; expected 0 or more")
        if counts[gate.name] and gate.form not in FORMS:
            raise ValueError(
                f"gate {gate.name!r} is {gate.form}; only {' and '.join(FORMS)} gates can be compact: give k by the"
                " gates' names, and 0 for this one, which makes it a constant"
            )
        if counts[gate.name] and product_of(gate).op == "addcmul":
            raise ValueError(f"gate {gate.name!r} is applied by addcmul; write x + x * g for it to be compact")
    if source and not counts[source]:
        raise ValueError(f"the source {source!r} has no scores: expected k above 0 for it")
    return counts


def _compacted(
    model: nn.Module,
    gates: Sequence[Gate],
    counts: Mapping[str, int],
    source: str | None,
    images: Images,
    calibration: Iterable[Sequence[Any]],
) -> tuple[nn.Module, dict[str, _Fit]]:
    """Return a copy of the network with compact gates at their least-squares fits, and the fits."""
    seen = _seen(model, gates, calibration)
    fits: dict[str, _Fit] = {}
    if source:
        fits = _fit_together([seen[gate.name] for gate in gates], seen[source]["squeeze"], counts[source], gates)
    else:
        for gate in gates:
            fits |= _fit_together([seen[gate.name]], seen[gate.name]["squeeze"], counts[gate.name], [gate])
    network, places = scaled_copy(model, {gate.name: fits[gate.name].constant for gate in gates}, images)
    like = next(tensor for tensor in network.parameters() if tensor.is_floating_point())
    common: Scores | None = None
    for gate in gates:
        fit, values = fits[gate.name], seen[gate.name]["attention"]
        takes = common is not None
        weight, bias = (torch.from_numpy(each).to(like) for each in (fit.weight, fit.bias))
        scores = common or Scores(weight, bias, gate.layout.index("C"))
        common = scores if source else None
        new = CompactGate(gate, fit, scores, takes, (float(values.min()), float(values.max())))
        old = places[gate.name]
        for path in [path for path, module in network.named_modules(remove_duplicate=False) if module is old]:
            network.set_submodule(path, new)
    return network, fits


def _seen(model: nn.Module, gates: Sequence[Gate], calibration: Iterable[Sequence[Any]]) -> dict[str, dict[str, Array]]:
    """Return, by gate, its attention, squeeze and energy over all images, (N, C) each."""
    parts: dict[str, dict[str, list[Array]]] = {gate.name: {} for gate in gates}

    def keep(gate: Gate, kind: Kind, values: Tensor) -> None:
        parts[gate.name].setdefault(kind, []).append(values.double().cpu().numpy())

    with torch.inference_mode(), read_gates(model, gates, keep, squeeze=True, energy=True):
        for batch, *_ in calibration:
            outputs_of(model, batch.to(device_of(model)))
    return {name: {kind: np.concatenate(each) for kind, each in kinds.items()} for name, kinds in parts.items()}


def _fit_together(
    seen: Sequence[Mapping[str, Array]], squeeze: Array, k: int, gates: Sequence[Gate]
) -> dict[str, _Fit]:
    """Fit the attention of some gates by the same k scores of a squeeze (N, channels)."""
    weights = [
        np.ones(each["energy"].shape[1]) if gate.form == "additive" else np.sqrt(each["energy"].mean(axis=0))
        for gate, each in zip(gates, seen, strict=True)
    ]
    scales = [
        w / (np.sqrt(np.mean(np.square(each["attention"] * w))) or 1.0) for w, each in zip(weights, seen, strict=True)
    ]
    means = [each["attention"].mean(axis=0) for each in seen]
    wanted = np.hstack([(each["attention"] - mean) * w for each, mean, w in zip(seen, means, scales, strict=True)])
    middle = squeeze.mean(axis=0)
    off = squeeze - middle
    gram = off.T @ off
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram) or 1.0
    slopes = np.linalg.solve(gram, off.T @ wanted)
    _, lengths, vectors = np.linalg.svd(off @ slopes, full_matrices=False)
    k = min(k, int((lengths > 1e-12 * max(lengths[0], 1e-300)).sum()) or 1)
    weight = vectors[:k] @ slopes.T  # (k, C) as torch lays it out: the transpose of the product would not be contiguous
    spread = (off @ weight.T).std(axis=0)
    weight /= np.where(spread > 0, spread, 1.0)[:, None]
    directions = vectors[:k] * np.where(spread > 0, spread, 1.0)[:, None]
    predicted = (off @ weight.T) @ directions
    found, start = {}, 0
    for gate, mean, scale in zip(gates, means, scales, strict=True):
        part = slice(start, start + gate.channels)
        start += gate.channels
        total = np.square(wanted[:, part]).sum()
        left = np.square(wanted[:, part] - predicted[:, part]).sum()
        own = np.divide(directions[:, part], scale, out=np.zeros((k, gate.channels)), where=scale > 0)
        explained = float(1 - left / total) if total > 0 else 1.0
        found[gate.name] = _Fit(mean, own, weight, -weight @ middle, explained, float(total / wanted[:, part].size))
    return found


def _refine(
    network: nn.Module,
    original: nn.Module,
    images: Images,
    calibration: Iterable[Sequence[Any]],
    *,
    steps: int,
    rate: float,
    progress: Progress,
) -> None:
    """Train only the compact gates, towards the original's outputs."""
    kind, device = kind_of(original, images), device_of(original)
    network.requires_grad_(False)
    gates = [module for module in network.modules() if isinstance(module, CompactGate)]
    learned = list(dict.fromkeys(p for gate in gates for p in gate.parameters()))
    groups = [
        {"params": [p.requires_grad_()], "unit": float(p.detach().square().mean().sqrt()) or 1.0} for p in learned
    ]
    optimizer = torch.optim.Adam(groups, lr=rate)
    for step, batch in zip(progress(range(steps)), endless(calibration), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["unit"] * (1 - step / steps)
        optimizer.zero_grad()
        follow(kind, original, partial(outputs_of, network), batch.to(device), step)
        optimizer.step()
    network.requires_grad_(False)
