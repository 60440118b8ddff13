"""The three ways to learn a constant for each gate: in the same network, beside its gates, or in a separate network.

All give gates their values through `gates.replace_gates`; what is learned is compared in `asr.validation`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from stripe.asr.layers import ASRLayer, asr_layers
from stripe.devices import device_of
from stripe.gate import Gate
from stripe.gates import IsolatedAttention, find_gates, isolate, read_gates, replace_gates
from stripe.gates.hooks import modules_by_path, uncompiled
from stripe.messages import Progress
from stripe.recipe import PSI_INIT
from stripe.training import Batches, evaluate

Array = npt.NDArray[np.float64]
Data = Batches
Vectors = dict[str, Array]  # by gate, (channels,)
PSI_RATE = 0.05  # Adam's learning rate for psi
ATTENTION_RATE = 1e-3  # and for the attention's weights, where they are trained too
FIT_STEPS = 100  # at most, of fitting psi to the stripe itself
GRID = 4  # channels are matched on their maps, averaged over GRID fields along each dimension of space


@dataclass(frozen=True)
class Fit:
    """What a protocol learned, by gate: the vector, the untrained psi's, and the best that any psi can reach.

    `notes` are further columns of the table; `left_out` says of a gate why nothing was learned for it.
    """

    learned: Vectors
    untrained: Vectors
    best: Vectors
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a protocol works on: frozen copies of the networks, which it leaves as they are, and data.

    `asr_model` is `model` itself but for "separate".
    """

    model: nn.Module
    asr_model: nn.Module
    gates: Sequence[Gate]
    stripes: Vectors
    loader: Data
    steps: int
    train_attention: bool
    progress: Progress

    @classmethod
    def of(
        cls, model: nn.Module, asr_model: nn.Module | None, *, gates: Sequence[Gate], loader: Data, **options: Any
    ) -> Task:
        """Copy the networks, and take a run's `gates` as the network can be read by them.

        Gates of older runs do not say where they are applied; the ones of their names are found again.

        Raises:
            ValueError: the network has no gate of a name and number of channels.
        """
        model = _frozen(model)
        asr_model = _frozen(asr_model) if asr_model else model
        task = cls(model=model, asr_model=asr_model, gates=gates, loader=loader, **options)
        if all(gate.product for gate in gates):
            return task
        found = {(gate.name, gate.channels): gate for gate in find_gates(model, task.probe)}
        if lost := [gate.name for gate in gates if (gate.name, gate.channels) not in found]:
            raise ValueError(f"this network has no gates {', '.join(lost)}: take the network that the run recorded")
        return replace(task, gates=[found[gate.name, gate.channels] for gate in gates])

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return device_of(self.model)

    @property
    def probe(self) -> Tensor:
        """The first two images, on the network's device."""
        return next(iter(self.loader))[0][:2].to(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` batches of images and labels on the network's device."""
        endless = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for _, (images, labels, *_) in zip(self.progress(range(self.steps)), endless, strict=False):
            yield images.to(self.device), labels.to(self.device)

    def accuracies(self, learned: Vectors, data: Data) -> dict[str, float]:
        """Return accuracies in percent by what the gates give; gates without a learned vector keep their attention."""
        constants = {"attention": {}, "learned": learned, "stripe": self.stripes, "removed": self._removed}
        found = {}
        for name, vectors in constants.items():
            values = {gate: torch.from_numpy(vector) for gate, vector in vectors.items()}
            with replace_gates(self.model, self.gates, values):
                found[name] = evaluate(self.model, data).accuracy
        if self.asr_model is not self.model:
            for name, network in (("asr", self.asr_model), ("asr deployed", _deployed(self.asr_model))):
                found[name] = evaluate(network, data).accuracy
        return found

    @property
    def _removed(self) -> Vectors:
        """By gate, what does nothing: 1 where it scales, 0 where it adds, equal weights where it weighs maps."""
        neutral = {"additive": 0.0, "multiplicative": 1.0, "affine": 1.0}
        stripes = {gate: self.stripes[gate.name] for gate in self.gates}
        return {gate.name: np.full_like(s, neutral.get(gate.form, s.mean())) for gate, s in stripes.items()}


def _frozen(model: nn.Module) -> nn.Module:
    return uncompiled(copy.deepcopy(model)).eval().requires_grad_(False)


def _deployed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for _, layer in list(asr_layers(model)):
        layer.switch_to_deploy(delete=True)
    return model


# ---- same ------------------------------------------------------------------------------------------------


def same(task: Task) -> Fit:
    """Freeze the network, give each gate attention(psi) for every image, and train psi on the task's loss."""
    network = copy.deepcopy(task.model) if task.train_attention else task.model
    attentions, left_out = isolate(network, task.gates, task.probe)
    learners = {name: Psi(attention, task.device) for name, attention in attentions.items()}
    untrained, best = _controls(learners, task.stripes)
    for gate in task.gates:
        if gate.name in learners and not gate.exclusive:
            left_out[gate.name] = "no gradient reaches it, since its attention is used elsewhere too"
    trained = {name: learner for name, learner in learners.items() if name not in left_out}
    weights = _attention_weights(trained) if task.train_attention else []
    if trained:
        psis = {"params": [learner.vector for learner in trained.values()], "lr": PSI_RATE}
        optimizer = torch.optim.Adam([psis, {"params": weights, "lr": ATTENTION_RATE}])
        for images, labels in task.batches():
            values = {name: learner.learned_vector() for name, learner in trained.items()}
            with replace_gates(network, task.gates, values):
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Fit(_values(trained), untrained, best, left_out=left_out)


class Psi(nn.Module):
    """A gate's psi, and the trained attention that makes a vector of it."""

    def __init__(self, attention: IsolatedAttention, device: torch.device) -> None:
        """Start psi (C,) at PSI_INIT."""
        super().__init__()
        psi = torch.full((attention.gate.channels,), PSI_INIT, device=device)
        self.attention_module, self.vector = attention, nn.Parameter(psi)

    def learned_vector(self) -> Tensor:
        """Return attention(psi), shape (C,)."""
        vector: Tensor = self.attention_module(self.vector)
        return vector


def _attention_weights(learners: Mapping[str, Psi]) -> list[nn.Parameter]:
    """Let the weights that attention(psi) is computed with be trained, and return them."""
    weights = list({id(p): p for psi in learners.values() for p in psi.attention_module.parameters()}.values())
    for weight in weights:
        weight.requires_grad_()
    total = torch.stack([learner.learned_vector().sum() for learner in learners.values()]).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    return [weight for weight in weights if weight.requires_grad]


# ---- both ------------------------------------------------------------------------------------------------


def both(task: Task) -> Fit:
    """Take the vector of the ASR layer before each gate of the same network."""
    layers = _asr_before(task)
    return Fit(_values(layers), *_controls(layers, task.stripes))


@torch.no_grad()
def _asr_before(task: Task) -> dict[str, ASRLayer]:
    """Return, by gate, the last ASR layer of as many channels that runs between the gate before and this one."""
    layers, modules = dict(asr_layers(task.asr_model)), modules_by_path(task.model)
    if lost := [path for path in layers if path not in modules]:
        raise ValueError(
            f"the network has no {lost[0]}: the ASR network must be built as the one that the run recorded"
        )
    found: dict[str, ASRLayer] = {}
    passed: list[str] = []

    def meet(gate: Gate, kind: str, values: Tensor) -> None:
        fitting = [layers[path] for path in passed if layers[path].vector.numel() == gate.channels]
        if fitting:
            found[gate.name] = fitting[-1]
        passed.clear()

    with ExitStack() as hooks:
        for path in layers:
            handle = modules[path].register_forward_pre_hook(lambda module, args, path=path: passed.append(path))
            hooks.callback(handle.remove)
        hooks.enter_context(read_gates(task.model, task.gates, meet))
        task.model(task.probe)
    for gate in task.gates:
        if gate.name not in found:
            raise ValueError(
                f"gate '{gate.name}' has no ASR layer of {gate.channels} channels before it: expected one before each "
                "gate, in training form (deploying with delete drops the vectors)"
            )
    return found


# ---- separate --------------------------------------------------------------------------------------------


def separate(task: Task) -> Fit:
    """Take the vectors of another network, its channels matched to the gated one's by how their maps correlate."""
    layers = _asr_before(task)
    to_gated: dict[str, npt.NDArray[np.int64]] = {}  # by gate: for each of its channels, the ASR network's
    notes = {}
    for gate, correlations in _map_correlations(task, layers).items():
        rows, to_gated[gate] = linear_sum_assignment(correlations, maximize=True)
        notes[gate] = {"map_r": float(correlations[rows, to_gated[gate]].mean())}
    theirs = {gate: stripe[np.argsort(to_gated[gate])] for gate, stripe in task.stripes.items()}
    learned, untrained, best = (
        {gate: vector[to_gated[gate]] for gate, vector in vectors.items()}
        for vectors in (_values(layers), *_controls(layers, theirs))
    )
    return Fit(learned, untrained, best, notes)


@torch.no_grad()
def _map_correlations(task: Task, layers: Mapping[str, ASRLayer]) -> Vectors:
    """Correlate, by gate, what it scales with the ASR layer's map over images and fields: (C, C), rows the gate's."""
    ours: Vectors = {}
    theirs: Vectors = {}
    sums = {gate.name: np.zeros((1 + 2 * gate.channels,) * 2) for gate in task.gates}

    def note(gate: Gate, kind: str, values: Tensor) -> None:
        if kind == "map":
            ours[gate.name] = _fields(values)

    def note_output(gate: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        theirs[gate] = _fields(output)

    with ExitStack() as hooks:
        for gate, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(note_output, gate)).remove)
        hooks.enter_context(read_gates(task.model, task.gates, note, maps=True))
        for images, _ in task.batches():
            task.model(images), task.asr_model(images)
            for name, products in sums.items():
                rows = np.hstack([np.ones((len(ours[name]), 1)), ours[name], theirs[name]])
                products += rows.T @ rows
    return {name: _correlations(products) for name, products in sums.items()}


def _fields(maps: Tensor) -> Array:
    """Average (N, C, *space) over GRID fields along each dimension of space: (N * fields, C)."""
    pool: Any = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[maps.ndim]
    means: Array = pool(maps, GRID).flatten(2).transpose(1, 2).flatten(0, 1).double().cpu().numpy()
    return means


def _correlations(products: Array) -> Array:
    """Return (C, C) correlations from the summed products (1 + 2C, 1 + 2C) of [1, ours, theirs]; 0 where constant."""
    mean = products[0, 1:] / products[0, 0]
    covariance = products[1:, 1:] / products[0, 0] - np.outer(mean, mean)
    std = np.sqrt(covariance.diagonal().clip(min=0))
    channels = len(mean) // 2
    ours_theirs, scale = covariance[:channels, channels:], np.outer(std[:channels], std[channels:])
    correlations: Array = np.divide(ours_theirs, scale, out=np.zeros_like(scale), where=scale > 0)
    return correlations


PROTOCOLS: dict[str, Callable[[Task], Fit]] = {"same": same, "both": both, "separate": separate}


# ---- psi and its controls --------------------------------------------------------------------------------

Learner = Psi | ASRLayer


@torch.no_grad()
def _values(learners: Mapping[str, Learner]) -> Vectors:
    return {gate: learner.learned_vector().double().cpu().numpy() for gate, learner in learners.items()}


def _controls(learners: Mapping[str, Learner], stripes: Vectors) -> tuple[Vectors, Vectors]:
    """Return what the attention makes of psi at its constant start, and of the psi that fits the stripe best.

    Each psi is put back afterwards.
    """
    psis = [psi for learner in learners.values() for psi in _psis(learner)]
    kept = [psi.detach().clone() for psi in psis]
    for psi in psis:
        nn.init.constant_(psi.requires_grad_(), PSI_INIT)
    untrained = _values(learners)
    for gate, learner in learners.items():
        _fit_psi(learner, torch.as_tensor(stripes[gate]).to(learner.vector))
    best = _values(learners)
    with torch.no_grad():
        for psi, value in zip(psis, kept, strict=True):
            psi.copy_(value)
    return untrained, best


def _psis(learner: Learner) -> Iterator[nn.Parameter]:
    """Yield psi, and those of the ASR layers inside."""
    yield learner.vector
    if isinstance(learner, ASRLayer) and isinstance(learner.bn, ASRLayer):
        yield from _psis(learner.bn)


def _fit_psi(learner: Learner, stripe: Tensor) -> None:
    """Move psi to where attention(psi) is nearest to the stripe (C,) in mean square."""
    optimizer = torch.optim.LBFGS(list(_psis(learner)), max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def misfit() -> float:
        optimizer.zero_grad()
        loss = (learner.learned_vector() - stripe).square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(misfit)
