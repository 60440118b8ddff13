"""Do learned vectors match observed stripes? Every answer stands beside its controls.

Attention values are all positive, so a cosine is always near 1; correlations are judged against the untrained psi,
a permutation null and the best fit that the attention module can reach.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stripe import stats
from stripe.asr.layers import PSI_INIT
from stripe.store import Run
from stripe.training import Batches, evaluate

Vectors = dict[str, npt.NDArray[np.float64]]  # by gate, (channels,)
Observed = Mapping[str, npt.NDArray[Any]]  # by gate, (samples, channels)
Progress = Callable[[Iterable[int]], Iterable[int]]
MATCH_R, MATCH_P = 0.5, 0.05
RULE = f"match: r >= {MATCH_R}, adjusted p < {MATCH_P}, and RMSE below the untrained psi's"
PSI_RATE = 0.05  # Adam's learning rate for psi
FIT_STEPS = 100  # at most, of fitting psi to the stripe itself


@dataclass(frozen=True)
class Validation:
    """Learned vectors against observed stripes: `table` has a row per gate, `accuracies` are in percent."""

    protocol: str
    epoch: int
    steps: int
    table: pd.DataFrame
    accuracies: dict[str, float]
    learned: Vectors = field(repr=False)
    observed: Observed = field(repr=False)

    @property
    def matched(self) -> bool:
        """Whether every gate matches by RULE."""
        return bool((self.table["verdict"] == "match").all())

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the observed samples as plain values for JSON; NaN becomes None."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        head = {"protocol": self.protocol, "epoch": self.epoch, "steps": self.steps, "rule": RULE}
        learned = {gate: vector.tolist() for gate, vector in self.learned.items()}
        return head | {"matched": self.matched, "accuracies": self.accuracies, "gates": rows, "learned": learned}


@dataclass(frozen=True)
class Fit:
    """What a protocol learned, by gate: the vector, the untrained psi's, and the best that any psi can reach."""

    learned: Vectors
    untrained: Vectors
    best: Vectors


class PsiGate(nn.Module):
    """Stands where a network's attention module stood: every sample gets attention(psi)."""

    def __init__(self, attention: nn.Module, psi: Tensor) -> None:
        """Keep the attention and psi (1, C, 1, 1); nn.Identity() makes psi itself the constant."""
        super().__init__()
        self.attention_module = attention
        self.vector = nn.Parameter(psi)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention(psi) for each of the N samples of x: (N, C, 1, 1)."""
        gate: Tensor = self.attention_module(self.vector)
        return gate.expand(len(x), -1, -1, -1)

    def values(self) -> npt.NDArray[np.float64]:
        """Return attention(psi) as (C,)."""
        with torch.no_grad():
            vector: Tensor = self.attention_module(self.vector)
            return vector.flatten().double().cpu().numpy()


def validate(
    model: nn.Module,
    run: Run,
    loader: Batches,
    *,
    steps: int = 200,
    protocol: str = "same",
    test_loader: Batches | None = None,
    epoch: int | None = None,
    progress: Progress = iter,
) -> Validation:
    """Learn vectors for a trained network and compare them with the stripes of its run.

    Args:
        model: the network whose attention `run` recorded.
        run: its records.
        loader: training batches (images, labels, sample ids), repeated as often as needed.
        steps: training steps of psi.
        protocol: a key of PROTOCOLS; "same" freezes the network and trains psi in each gate's place.
        test_loader: batches for the accuracies; default `loader`.
        epoch: the run's epoch that belongs to `model`; default the last one.
        progress: wraps the iterator over the steps.

    Raises:
        ValueError: unknown protocol or epoch, or a gate of the run that the model does not have.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{protocol}'; expected one of {', '.join(PROTOCOLS)}")
    epoch = run.epochs[-1] if epoch is None else epoch
    observed = {gate.name: run.attention(gate.name, epoch) for gate in run.gates}
    fit = PROTOCOLS[protocol](model, run.gates, observed, loader, steps, progress)
    stripes = {name: values.mean(axis=0, dtype=np.float64) for name, values in observed.items()}
    ones = {name: np.ones_like(stripe) for name, stripe in stripes.items()}
    constants = {"learned": fit.learned, "stripe": stripes, "removed": ones}
    data = loader if test_loader is None else test_loader
    accuracies = {"attention": evaluate(model, data).accuracy}
    for name, vectors in constants.items():
        accuracies[name] = evaluate(with_constants(model, run.gates, vectors), data).accuracy
    return Validation(protocol, epoch, steps, compare(fit, observed), accuracies, fit.learned, observed)


def compare(fit: Fit, observed: Observed) -> pd.DataFrame:
    """Compare vectors (C,) with attention (N, C) gate by gate, controls beside them: the Validation's table."""
    rows = []
    for gate, values in observed.items():
        match = stats.match(fit.learned[gate], values)
        row: dict[str, Any] = {"gate": gate, "channels": values.shape[1], **vars(match)}
        for control, vectors in (("untrained", fit.untrained), ("best", fit.best)):
            reference = stats.match(vectors[gate], values, permutations=0)
            row |= {f"r_{control}": reference.r, f"rmse_{control}": reference.rmse}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p_adjusted"] = stats.benjamini_hochberg(table["p"].to_numpy())
    good = (table["r"] >= MATCH_R) & (table["p_adjusted"] < MATCH_P) & (table["rmse"] < table["rmse_untrained"])
    table["verdict"] = np.where(good, "match", "no match")
    return table


def with_constants(model: nn.Module, gates: Iterable[Any], vectors: Vectors) -> nn.Module:
    """Return a copy of `model` in which each of the run's `gates` gives its constant (C,) whatever the image."""
    device = next(model.parameters()).device
    psis = {gate.name: torch.as_tensor(vectors[gate.name]).float().to(device).view(1, -1, 1, 1) for gate in gates}
    return _replace(model, gates, {name: PsiGate(nn.Identity(), psi) for name, psi in psis.items()})


def _same_network(
    model: nn.Module, gates: list[Any], observed: Observed, loader: Batches, steps: int, progress: Progress
) -> Fit:
    """Train psi alone, on the task's loss, in each gate's place in the frozen network."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    images = next(iter(loader))[0].to(device)
    modules = {}
    for gate in gates:
        psi = torch.full((1, gate.channels, 1, 1), PSI_INIT, device=device)
        modules[gate.name] = PsiGate(_attention_of(frozen, gate, images), psi)
    untrained = {name: module.values() for name, module in modules.items()}
    best = {name: _fit_psi(copy.deepcopy(module), observed[name]) for name, module in modules.items()}
    network = _replace(frozen, gates, modules)
    optimizer = torch.optim.Adam([module.vector for module in modules.values()], lr=PSI_RATE)
    for _, (images, labels, *_) in zip(progress(range(steps)), batches, strict=False):
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Fit({name: module.values() for name, module in modules.items()}, untrained, best)


PROTOCOLS = {"same": _same_network}


def _fit_psi(gate: PsiGate, observed: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the attention(psi) nearest to the stripe in mean square: the best that any psi can reach."""
    stripe = torch.as_tensor(observed.mean(axis=0, dtype=np.float64)).to(gate.vector)
    optimizer = torch.optim.LBFGS([gate.vector], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def misfit() -> float:
        optimizer.zero_grad()
        loss = (gate.attention_module(gate.vector).flatten() - stripe).square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(misfit)
    return gate.values()


def _replace(model: nn.Module, gates: Iterable[Any], modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `model` with `modules` in the places of its gates' sources."""
    model = copy.deepcopy(model)
    for gate in gates:
        model.set_submodule(gate.source, modules[gate.name])
    return model


def _attention_of(model: nn.Module, gate: Any, images: Tensor) -> nn.Module:
    """Return the module that maps a feature map to the gate: the source, or the site around it read at the source."""
    if gate.source is None or gate.form != "multiplicative":
        raise ValueError(
            f"gate '{gate.name}' is {gate.form} from {gate.source}; expected a module's multiplicative gate"
        )
    try:
        source, site = model.get_submodule(gate.source), model.get_submodule(gate.site)
    except AttributeError as error:
        raise ValueError(
            f"the network has no gate '{gate.name}' ({error}): take the network the run recorded"
        ) from error
    seen: list[torch.Size] = []
    handle = source.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    if seen[0].numel() > len(images) * gate.channels:  # a feature map comes in
        return source
    return _SiteAttention(site, gate.source.removeprefix(f"{gate.site}."))


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
