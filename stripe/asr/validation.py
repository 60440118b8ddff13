"""Do learned vectors match observed stripes? Every answer stands beside its controls.

Attention values are all positive, so a cosine is always near 1; correlations are judged against the untrained psi,
a permutation null and the best fit that the attention module can reach.
"""

import copy
import html
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from stripe import stats
from stripe.asr.layers import ASRLayer, asr_layers
from stripe.devices import device_of
from stripe.messages import Progress
from stripe.recipe import PSI_INIT, PSI_STEPS
from stripe.store import GateColumn, Run
from stripe.training import Batches, evaluate

Array = npt.NDArray[np.float64]
Vectors = dict[str, Array]  # by gate, (channels,)
Observed = Mapping[str, npt.NDArray[Any]]  # by gate, (samples, channels)
MATCH_R, MATCH_P = 0.5, 0.05
PSI_RATE = 0.05  # Adam's learning rate for psi
ATTENTION_RATE = 1e-3  # and for the attention's weights, where they are trained too
FIT_STEPS = 100  # at most, of fitting psi to the stripe itself
GRID = 4  # channels are matched on their maps, averaged over GRID x GRID fields


# ---- what is found ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Learned vectors against observed stripes: `table` has a row per gate, `accuracies` are in percent."""

    protocol: str
    rule: str
    epoch: int
    steps: int
    table: pd.DataFrame
    accuracies: dict[str, float]
    learned: Vectors = field(repr=False)
    observed: Observed = field(repr=False)

    @property
    def matched(self) -> bool:
        """Whether every gate matches by the rule."""
        return bool((self.table["verdict"] == "match").all())

    def _repr_html_(self) -> str:
        """Show each gate's correlation beside its controls, the accuracies and the rule, every name escaped."""
        head = html.escape(f"protocol {self.protocol}, epoch {self.epoch}, {self.steps} steps; {self.rule}")
        gates = self.table.drop(columns=["r2", "mean_abs_z", "inside", "p", "rmse_best"])
        accuracies = pd.DataFrame(self.accuracies, index=["accuracy (%)"]).round(2)
        tables = gates.to_html(index=False, float_format="{:.3g}".format) + accuracies.to_html()
        return f"<p><b>Validation</b> {head}</p>{tables}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the observed samples as plain values for JSON; NaN becomes None."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        head = {"protocol": self.protocol, "epoch": self.epoch, "steps": self.steps, "rule": self.rule}
        learned = {gate: vector.tolist() for gate, vector in self.learned.items()}
        return head | {"matched": self.matched, "accuracies": self.accuracies, "gates": rows, "learned": learned}


@dataclass(frozen=True)
class Fit:
    """What a protocol learned, by gate: the vector, the untrained psi's, and the best that any psi can reach.

    `notes` are further columns of the table. `distance` names the column that must be below the untrained psi's.
    """

    learned: Vectors
    untrained: Vectors
    best: Vectors
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    distance: str = "rmse"

    @property
    def rule(self) -> str:
        """Say what makes a gate match."""
        return f"match: r >= {MATCH_R}, adjusted p < {MATCH_P}, and {self.distance} below the untrained psi's"


def validate(
    model: nn.Module,
    run: Run,
    loader: Batches,
    *,
    steps: int = PSI_STEPS,
    protocol: str = "same",
    asr_model: nn.Module | None = None,
    train_attention: bool = False,
    test_loader: Batches | None = None,
    epoch: int | None = None,
    progress: Progress = iter,
) -> Validation:
    """Compare the vectors that a network learned with the stripes of its run.

    Args:
        model: the network whose attention `run` recorded.
        run: its records.
        loader: training batches (images, labels, sample ids), repeated as often as needed.
        steps: training steps of psi for "same", batches to match channels on for "separate"; "both" takes none.
        protocol: "same" freezes the network and trains psi in each gate's place; "both" takes the vectors that
            `model` learned beside its gates; "separate" those of `asr_model`, channel matched to channel.
        asr_model: for "separate", the same network trained with ASR alone, in training form.
        train_attention: for "same", train the attention's weights along with psi.
        test_loader: batches for the accuracies; default `loader`.
        epoch: the run's epoch that belongs to `model`; default the last one.
        progress: wraps the iterator over the steps.

    Raises:
        ValueError: unknown protocol or epoch, an argument of another protocol, a gate of the run that the model
            does not have, or one without an ASR layer before it.
    """
    _check_request(protocol, steps, asr_model is not None, train_attention)
    for gate in run.gates:
        _require_gate(model, gate)
    epoch = run.epochs[-1] if epoch is None else epoch
    observed = {gate.name: run.attention(gate.name, epoch) for gate in run.gates}
    networks = _frozen(model), _frozen(asr_model or model)
    task = Task(*networks, run.gates, observed, loader, steps, train_attention, progress)
    fit = PROTOCOLS[protocol](task)
    data = loader if test_loader is None else test_loader
    tested = {"attention": model, **_with_each_constant(model, run.gates, fit.learned, observed)}
    if asr_model is not None:
        tested |= {"asr": asr_model, "asr deployed": _deployed(asr_model)}
    accuracies = {name: evaluate(network, data).accuracy for name, network in tested.items()}
    return Validation(protocol, fit.rule, epoch, steps, compare(fit, observed), accuracies, fit.learned, observed)


def _check_request(protocol: str, steps: int, asr_model: bool, train_attention: bool) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{protocol}'; expected one of {', '.join(PROTOCOLS)}")
    if (protocol == "separate") != asr_model:
        received = "with" if asr_model else "without"
        raise ValueError(
            f"protocol '{protocol}' {received} a separate ASR network: 'separate' takes one, others do not"
        )
    if protocol == "separate" and steps < 1:
        raise ValueError(f"steps={steps}: 'separate' matches channels on at least one batch")
    if train_attention and protocol != "same":
        raise ValueError(f"protocol '{protocol}' trains nothing: training the attention too belongs to 'same'")


def compare(fit: Fit, observed: Observed) -> pd.DataFrame:
    """Compare vectors (C,) with attention (N, C) gate by gate, controls beside them: the Validation's table."""
    rows = []
    for gate, values in observed.items():
        match = stats.match(fit.learned[gate], values)
        row: dict[str, Any] = {"gate": gate, "channels": values.shape[1], **vars(match)}
        for control, vectors in (("untrained", fit.untrained), ("best", fit.best)):
            reference = stats.match(vectors[gate], values, permutations=0)
            row |= {f"r_{control}": reference.r, f"rmse_{control}": reference.rmse}
        rows.append(row | dict(fit.notes.get(gate, {})))
    table = pd.DataFrame(rows)
    table["p_adjusted"] = stats.benjamini_hochberg(table["p"].to_numpy())
    nearer = table[fit.distance] < table[f"{fit.distance}_untrained"]
    good = (table["r"] >= MATCH_R) & (table["p_adjusted"] < MATCH_P) & nearer
    table["verdict"] = np.where(good, "match", "no match")
    return table


# ---- the three protocols ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a protocol works on: frozen copies of the networks (one network for two, but for "separate"), and data."""

    model: nn.Module
    asr_model: nn.Module
    gates: list[GateColumn]
    observed: Observed
    loader: Batches
    steps: int
    train_attention: bool
    progress: Progress

    @property
    def stripes(self) -> Vectors:
        """The observed stripe of each gate, (C,)."""
        return _stripes(self.observed)

    @property
    def probe(self) -> Tensor:
        """Two images on the network's device."""
        return next(iter(self.loader))[0][:2].to(device_of(self.model))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` batches of images and labels on the network's device."""
        device, endless = device_of(self.model), itertools.chain.from_iterable(itertools.repeat(self.loader))
        for _, (images, labels, *_) in zip(self.progress(range(self.steps)), endless, strict=False):
            yield images.to(device), labels.to(device)


def _same_network(task: Task) -> Fit:
    """Train psi on the task's loss in each gate's place in the frozen network."""
    modules = {}
    for gate, entrance in zip(task.gates, _entrances(task), strict=True):
        psi = torch.full((1, gate.channels, 1, 1), PSI_INIT, device=device_of(task.model))
        modules[gate.name] = PsiGate(_attention_of(task.model, gate, entrance), psi)
    untrained, best = _controls(modules, task.stripes)
    network = _replace(task.model, task.gates, modules)
    attentions = nn.ModuleList(module.attention_module for module in modules.values())
    attentions.requires_grad_(task.train_attention)
    psis = {"params": [module.vector for module in modules.values()], "lr": PSI_RATE}
    optimizer = torch.optim.Adam([psis, {"params": attentions.parameters(), "lr": ATTENTION_RATE}])
    for images, labels in task.batches():
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Fit(_values(modules), untrained, best)


def _gates_and_asr(task: Task) -> Fit:
    """Take the vector of the ASR layer before each gate of the same network."""
    layers = _asr_before(task)
    return Fit(_values(layers), *_controls(layers, task.stripes))


def _separate_networks(task: Task) -> Fit:
    """Take the vectors of another network, its channels matched to the gated one's by how their maps correlate."""
    layers = _asr_before(task)
    stripes, orders, notes = task.stripes, {}, {}
    for gate, correlations in _map_correlations(task, layers).items():
        rows, orders[gate] = linear_sum_assignment(correlations, maximize=True)
        notes[gate] = {"map_r": float(correlations[rows, orders[gate]].mean())}
    learned = {gate: vector[orders[gate]] for gate, vector in _values(layers).items()}
    theirs = {gate: stripe[np.argsort(orders[gate])] for gate, stripe in stripes.items()}
    untrained, best = (
        {gate: vector[orders[gate]] for gate, vector in vectors.items()} for vectors in _controls(layers, theirs)
    )
    for gate, stripe in stripes.items():
        notes[gate] |= {
            "wasserstein": stats.wasserstein(learned[gate], stripe),
            "wasserstein_untrained": stats.wasserstein(untrained[gate], stripe),
            "p_wasserstein": stats.swap_test(learned[gate], stripe),
        }
    return Fit(learned, untrained, best, notes, "wasserstein")


PROTOCOLS: dict[str, Callable[[Task], Fit]] = {
    "same": _same_network,
    "both": _gates_and_asr,
    "separate": _separate_networks,
}


# ---- psi and its controls --------------------------------------------------------------------------------


class PsiGate(nn.Module):
    """Stands where a network's attention module stood: every sample gets attention(psi)."""

    def __init__(self, attention: nn.Module, psi: Tensor) -> None:
        """Keep the attention and psi (1, C, 1, 1); nn.Identity() makes psi itself the constant."""
        super().__init__()
        self.attention_module = attention
        self.vector = nn.Parameter(psi)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention(psi) for each of the N samples of x: (N, C, 1, 1)."""
        return self.learned_vector().view(1, -1, 1, 1).expand(len(x), -1, -1, -1)

    def learned_vector(self) -> Tensor:
        """Return attention(psi), shape (C,)."""
        gate: Tensor = self.attention_module(self.vector)
        return gate.flatten()


Learner = PsiGate | ASRLayer


@torch.no_grad()
def _values(learners: Mapping[str, Learner]) -> Vectors:
    return {gate: learner.learned_vector().double().cpu().numpy() for gate, learner in learners.items()}


def _controls(learners: Mapping[str, Learner], stripes: Vectors) -> tuple[Vectors, Vectors]:
    """Return what the attention makes of psi at its constant start, and of the psi that fits the stripe best."""
    copies = {gate: copy.deepcopy(learner) for gate, learner in learners.items()}
    for learner in copies.values():
        for psi in _psis(learner):
            nn.init.constant_(psi.requires_grad_(), PSI_INIT)
    untrained = _values(copies)
    for gate, learner in copies.items():
        _fit_psi(learner, torch.as_tensor(stripes[gate]).to(learner.vector))
    return untrained, _values(copies)


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


# ---- networks with constants in place of gates -----------------------------------------------------------


def with_constants(model: nn.Module, gates: Iterable[GateColumn], vectors: Vectors) -> nn.Module:
    """Return a copy of `model` in which each of the run's `gates` gives its constant (C,) whatever the image."""
    psis = {gate.name: torch.as_tensor(vectors[gate.name]).float().to(device_of(model)) for gate in gates}
    modules = {name: PsiGate(nn.Identity(), psi.view(1, -1, 1, 1)) for name, psi in psis.items()}
    return _replace(model, gates, modules)


def _with_each_constant(
    model: nn.Module, gates: list[GateColumn], learned: Vectors, observed: Observed
) -> dict[str, nn.Module]:
    stripes = _stripes(observed)
    ones = {gate: np.ones_like(stripe) for gate, stripe in stripes.items()}
    constants = {"learned": learned, "stripe": stripes, "removed": ones}
    return {name: with_constants(model, gates, vectors) for name, vectors in constants.items()}


def _replace(model: nn.Module, gates: Iterable[GateColumn], modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `model` with `modules` in the places of its gates' sources."""
    model = copy.deepcopy(model)
    for gate in gates:
        model.set_submodule(str(gate.source), modules[gate.name])
    return model


def _deployed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for _, layer in list(asr_layers(model)):
        layer.switch_to_deploy(delete=True)
    return model


def _stripes(observed: Observed) -> Vectors:
    return {gate: values.mean(axis=0, dtype=np.float64) for gate, values in observed.items()}


# ---- where gates and ASR layers stand --------------------------------------------------------------------


def _require_gate(model: nn.Module, gate: GateColumn) -> None:
    if gate.source is None or gate.site is None or gate.form != "multiplicative":
        raise ValueError(
            f"gate '{gate.name}' is {gate.form} from {gate.source}; expected a module's multiplicative gate"
        )
    try:
        model.get_submodule(gate.source), model.get_submodule(gate.site)
    except AttributeError as error:
        raise ValueError(
            f"the network has no gate '{gate.name}' ({error}): take the network the run recorded"
        ) from error


def _entrances(task: Task) -> list[str]:
    """Return, gate by gate, the path of the module that takes what the gate scales: its source, else its site."""
    shapes = _trace(task.model, [str(gate.source) for gate in task.gates], task.probe)
    pooled = [shapes[str(gate.source)].numel() <= len(task.probe) * gate.channels for gate in task.gates]
    return [str(gate.site if small else gate.source) for gate, small in zip(task.gates, pooled, strict=True)]


def _attention_of(model: nn.Module, gate: GateColumn, entrance: str) -> nn.Module:
    """Return the module that maps a feature map to the gate: the source, or the site around it read at the source."""
    module = model.get_submodule(entrance)
    return module if entrance == gate.source else _SiteAttention(module, str(gate.source).removeprefix(f"{entrance}."))


class _SiteAttention(nn.Module):
    """The gate inside a module that returns the product, such as timm's and torchvision's."""

    def __init__(self, site: nn.Module, source: str) -> None:
        super().__init__()
        self.site, self.source = copy.deepcopy(site), source

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self.site.get_submodule(self.source).register_forward_hook(lambda m, i, output: seen.append(output))
        try:
            self.site(x)
        finally:
            handle.remove()
        return seen[0].reshape(1, -1, 1, 1)


def _asr_before(task: Task) -> dict[str, ASRLayer]:
    """Return, by gate, the last ASR layer of as many channels that runs between the gate before and this one."""
    layers, sources = dict(asr_layers(task.asr_model)), {gate.source: gate for gate in task.gates}
    found: dict[str, ASRLayer] = {}
    waiting: list[ASRLayer] = []
    for path in _trace(task.model, [*layers, *map(str, sources)], task.probe):
        if path in layers:
            waiting.append(layers[path])
            continue
        gate = sources[path]
        fitting = [layer for layer in waiting if layer.vector.numel() == gate.channels]
        if not fitting:
            raise ValueError(
                f"gate '{gate.name}' has no ASR layer of {gate.channels} channels before it: expected one before each "
                "gate, in training form (deploying with delete drops the vectors)"
            )
        found[gate.name] = fitting[-1]
        waiting.clear()
    return found


@torch.no_grad()
def _trace(model: nn.Module, paths: Iterable[str], images: Tensor) -> dict[str, torch.Size]:
    """Run the network; return the shape of what each module at `paths` takes, in order of execution."""
    shapes: dict[str, torch.Size] = {}

    def note(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[path] = inputs[0].shape

    with ExitStack() as hooks:
        for path in paths:
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"{error}: the ASR network must be built as the one that the run recorded") from error
            hooks.callback(module.register_forward_pre_hook(partial(note, path)).remove)
        model(images)
    return shapes


# ---- channels of two networks ----------------------------------------------------------------------------


@torch.no_grad()
def _map_correlations(task: Task, layers: Mapping[str, ASRLayer]) -> Vectors:
    """Correlate, by gate, what it scales with the ASR layer's map over images and fields: (C, C), rows the gate's."""
    maps: dict[str, list[Array]] = {}
    sums = {gate.name: np.zeros((1 + 2 * gate.channels,) * 2) for gate in task.gates}

    def note_input(gate: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps[gate] = [_fields(inputs[0])]

    def note_output(gate: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps[gate].append(_fields(output))

    with ExitStack() as hooks:
        for gate, entrance in zip(task.gates, _entrances(task), strict=True):
            taker = task.model.get_submodule(entrance)
            hooks.callback(taker.register_forward_pre_hook(partial(note_input, gate.name)).remove)
            hooks.callback(layers[gate.name].register_forward_hook(partial(note_output, gate.name)).remove)
        for images, _ in task.batches():
            task.model(images), task.asr_model(images)
            for name, (ours, theirs) in maps.items():
                rows = np.hstack([np.ones((len(ours), 1)), ours, theirs])
                sums[name] += rows.T @ rows
    return {name: _correlations(products) for name, products in sums.items()}


def _fields(maps: Tensor) -> Array:
    """Average (N, C, H, W) over GRID x GRID fields: (N * GRID^2, C)."""
    means: Array = F.adaptive_avg_pool2d(maps, GRID).permute(0, 2, 3, 1).flatten(0, 2).double().cpu().numpy()
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


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)
