"""What a protocol works on, and what it finds: networks, images, gates, and what each gate scales.

Values are put in a gate's place through `gates.replace_gates` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stripe.asr.layers import asr_layers
from stripe.devices import device_of
from stripe.folding import GateUse, measure_gates
from stripe.folding.exact import fuse_norms
from stripe.gate import Gate, Kind
from stripe.gates import find_gates, read_gates, replace_gates
from stripe.gates.hooks import copied, uncompiled
from stripe.messages import Progress
from stripe.recipe import PSI_INIT
from stripe.training import Batches, evaluate, logits_of

Array = npt.NDArray[np.floating[Any]]
Data = Batches
Vectors = dict[str, Array]  # by gate, (channels,)
IMAGES = 512  # images that show what a gate scales
TOLERANCE = 1e-3  # relative and absolute, for the outputs of the network with merged norms
OUTPUT_IMAGES = 128  # images on which the outputs are compared, with three forward passes per gate


@dataclass(frozen=True)
class Fit:
    """What a protocol learned, by gate, and what it is judged by.

    Attributes:
        learned: the vector that stands in the stripe's place, in the gate's units, (channels,).
        random: the distances of random vectors from the stripe, (draws,).
        untrained: for "same", the vector of the psi that training began with.
        best: for "same", the vector nearest to the stripe that the attention makes of any psi.
        notes: further columns of the table.
        left_out: why nothing was learned for a gate.
    """

    learned: Vectors
    random: Vectors
    untrained: Vectors = field(default_factory=dict)
    best: Vectors = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Frozen copies of the networks, which a protocol leaves unchanged, the data, and the gates with their stripes.

    `asr_model` is `model` itself, except for "separate". `uses` and `squeezes` (images, channels) are keyed by gate and
    measured on `images`.
    """

    model: nn.Module
    asr_model: nn.Module
    gates: Sequence[Gate]
    stripes: Vectors
    uses: Mapping[str, GateUse]
    squeezes: Mapping[str, Tensor]
    images: Tensor
    loader: Data
    steps: int
    train_attention: bool
    amp: str
    progress: Progress

    @classmethod
    def of(
        cls,
        model: nn.Module,
        asr_model: nn.Module | None,
        *,
        gates: Sequence[Gate],
        stripes: Vectors,
        test_loader: Data,
        quicken: bool,
        **options: object,
    ) -> Task:
        """Copy the networks, locate a run's `gates` in the network, and measure what they scale.

        Gates of older runs do not say where they are applied, so they are found again by name. With `quicken` the
        network's norms are merged, for speed, after what the gates scale has been measured.

        Raises:
            ValueError: the network has no gate with the name and number of channels of one that is found again.
        """
        model = _frozen(model)
        asr_model = _frozen(asr_model) if asr_model else model
        images = _first_images(test_loader, IMAGES).to(device_of(model))
        gates = _readable(model, gates, images[:2])
        uses, squeezes = measured(model, gates, [(batch,) for batch in images.split(OUTPUT_IMAGES)])
        if quicken:
            asr_model = model = _quicker(model, gates, stripes, images[:2])
        known = {"gates": gates, "stripes": stripes, "uses": uses, "squeezes": squeezes, "images": images}
        return cls(model=model, asr_model=asr_model, **known, **options)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return device_of(self.model)

    @property
    def probe(self) -> Tensor:
        """The first two images, on the network's device."""
        return self.images[:2]

    @property
    def precision(self) -> torch.autocast:
        """The autocast context in which the network is run for training and for the accuracies."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")

    def start(self, gate: Gate) -> Tensor:
        """Return the psi (C,) that training begins with."""
        like = next(self.model.parameters(), torch.empty(0))
        return like.new_full((gate.channels,), PSI_INIT)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` batches of images and labels on the network's device."""
        endless = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for _, (images, labels, *_) in zip(self.progress(range(self.steps)), endless, strict=False):
            yield images.to(self.device), labels.to(self.device)

    def accuracies(self, learned: Vectors, data: Data) -> dict[str, float]:
        """Return accuracies in percent, by what the gates apply; without a learned vector a gate keeps its attention.

        The separate ASR network is added, as it is ("asr") and deployed.
        """
        constants = {"attention": {}, "learned": learned, "stripe": self.stripes, "removed": self._removed}
        found = {}
        for name, vectors in constants.items():
            values = {gate: torch.from_numpy(vector) for gate, vector in vectors.items()}
            with self.precision, replace_gates(self.model, self.gates, values):
                found[name] = evaluate(self.model, data).accuracy
        if self.asr_model is not self.model:
            for name, network in (("asr", self.asr_model), ("asr deployed", _deployed(self.asr_model))):
                with self.precision:
                    found[name] = evaluate(network, data).accuracy
        return found

    @torch.inference_mode()
    def divergences(self, learned: Vectors) -> dict[str, dict[str, float]]:
        """Return, by gate with a learned vector, how far the outputs move with a vector in this gate alone.

        The columns kl_learned, kl_stripe and kl_removed hold the Kullback-Leibler divergence of the class probabilities
        from the network's own, in nats, averaged over OUTPUT_IMAGES images.
        """
        images = self.images[:OUTPUT_IMAGES]
        own = logits_of(self.model(images)).double().log_softmax(1)
        found: dict[str, dict[str, float]] = {gate: {} for gate in learned}
        for name, vectors in (("learned", learned), ("stripe", self.stripes), ("removed", self._removed)):
            for gate, columns in found.items():
                with replace_gates(self.model, self.gates, {gate: torch.from_numpy(vectors[gate])}):
                    outputs = logits_of(self.model(images)).double().log_softmax(1)
                divergence = F.kl_div(outputs, own, reduction="batchmean", log_target=True)
                columns[f"kl_{name}"] = max(divergence.item(), 0.0)
        return found

    @property
    def _removed(self) -> Vectors:
        """By gate, values with which it does nothing: 1 if it scales, 0 if it adds, equal weights if it weighs maps."""
        neutral = {"additive": 0.0, "multiplicative": 1.0, "affine": 1.0}
        stripes = {gate: self.stripes[gate.name] for gate in self.gates}
        return {gate.name: np.full_like(s, neutral.get(gate.form, s.mean())) for gate, s in stripes.items()}


def _frozen(model: nn.Module) -> nn.Module:
    return uncompiled(copied(model)).eval().requires_grad_(False)


def _deployed(model: nn.Module) -> nn.Module:
    model = copied(model)
    for _, layer in list(asr_layers(model)):
        layer.switch_to_deploy(delete=True)
    return model


def _first_images(data: Data, count: int) -> Tensor:
    batches: list[Tensor] = []
    for images, *_ in data:
        batches.append(images)
        if sum(map(len, batches)) >= count:
            break
    return torch.cat(batches)[:count]


def _readable(model: nn.Module, gates: Sequence[Gate], probe: Tensor) -> Sequence[Gate]:
    if all(gate.product for gate in gates):
        return gates
    found = {(gate.name, gate.channels): gate for gate in find_gates(model, probe)}
    if lost := [gate.name for gate in gates if (gate.name, gate.channels) not in found]:
        raise ValueError(f"this network has no gates {', '.join(lost)}: take the network that the run recorded")
    return [found[gate.name, gate.channels] for gate in gates]


def _quicker(model: nn.Module, gates: Sequence[Gate], stripes: Vectors, images: Tensor) -> nn.Module:
    """Return the network with its norms merged and channels last, or unchanged if its outputs would differ."""
    constants = {gate: torch.from_numpy(stripe) for gate, stripe in stripes.items()}
    try:
        quick = fuse_norms(model, images)[0].requires_grad_(False).to(memory_format=torch.channels_last)
        for values in ({}, constants):
            with torch.no_grad(), replace_gates(model, gates, values), replace_gates(quick, gates, values):
                torch.testing.assert_close(quick(images), model(images), rtol=TOLERANCE, atol=TOLERANCE)
    except Exception:  # a network that cannot be traced, merged or laid out anew stays as it is
        return model
    return quick


def measured(
    model: nn.Module, gates: Sequence[Gate], loader: Iterable[Sequence[Any]]
) -> tuple[dict[str, GateUse], dict[str, Tensor]]:
    """Return, by gate, its use and its squeezes (images, channels), from one pass over batches (images, ...)."""
    squeezes: dict[str, list[Tensor]] = {gate.name: [] for gate in gates}

    def keep(gate: Gate, kind: Kind, values: Tensor) -> None:
        if kind == "squeeze":
            squeezes[gate.name].append(values)

    with read_gates(model, gates, keep, squeeze=True):
        uses = measure_gates(model, gates, loader)
    return uses, {name: torch.cat(parts).clone() for name, parts in squeezes.items()}
