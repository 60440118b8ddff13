"""How far a network's outputs are from the original's, without labels, and its accuracy where there are labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.tensors import outputs_of
from stripe.gates.trace import Images
from stripe.torch_internals import tree_map

CLASSES = "classes"
VALUES = "values"
KINDS = (CLASSES, VALUES)

Outputs = Sequence[Tensor]
"""Every tensor of a network's output."""


def kind_of(model: nn.Module, images: Images) -> str:
    """Return the kind of a network's output: "classes" if it is one tensor of scores (N, K >= 2), else "values"."""
    with torch.inference_mode():
        outputs = outputs_of(model, images)
    one = len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1 and outputs[0].is_floating_point()
    return CLASSES if one else VALUES


def divergence(kind: str, found: Outputs, wanted: Outputs) -> Tensor:
    """Return how far outputs are from the wanted ones, as a differentiable scalar; 0 if they are equal.

    For "classes" it is the Kullback-Leibler divergence of the class probabilities from the wanted ones, in nats,
    averaged over the samples; for "values" the squared error over the squared value, averaged over the floating-point
    tensors.
    """
    if kind == CLASSES:
        return _leibler(found[0], wanted[0]).sum() / len(found[0])
    return torch.stack([wrong / total.clamp_min(1e-30) for wrong, total in _energies(found, wanted)]).mean()


def of_each(kind: str, found: Outputs, wanted: Outputs) -> tuple[Tensor, Tensor]:
    """Return each sample's divergence and likeness (1: the same), (N,) each, in float64.

    For "values" all tensors of a sample are taken together, and the likeness is the cosine. For "classes" the likeness
    is whether the most likely class is the same.
    """
    if kind == CLASSES:
        same = found[0].argmax(1) == wanted[0].argmax(1)
        return _leibler(found[0].double(), wanted[0].double()).sum(1), same.double()
    ours, theirs = (torch.cat([t.double().reshape(len(t), -1) for t in outputs], 1) for outputs in (found, wanted))
    wrong = (ours - theirs).square().sum(1) / theirs.square().sum(1).clamp_min(1e-300)
    return wrong, torch.cosine_similarity(ours, theirs)


def _leibler(found: Tensor, wanted: Tensor) -> Tensor:
    """Return what each class adds to a sample's Kullback-Leibler divergence, (N, K), from two outputs' scores."""
    ours, theirs = log_probabilities(found), log_probabilities(wanted)
    return theirs.exp() * (theirs - ours)


def log_probabilities(scores: Tensor) -> Tensor:
    """Return log-probabilities of classes (N, K) from logits, log-probabilities or probabilities."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    with torch.no_grad():
        are_probabilities = bool((scores >= 0).all() and ((scores.sum(1) - 1).abs() < 1e-3).all())
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if are_probabilities else scores.log_softmax(1)


def sounding(kind: str, outputs: Outputs, generator: torch.Generator) -> Tensor:
    """Return a scalar whose gradient v, taken per sample, predicts the divergence: a change d causes E[(v . d)^2].

    The scalar weights the outputs by random signs, so that one backward pass stands for one per output (Hutchinson
    1990); for classes, E[v v'] is half the Fisher information, the second-order term of the divergence.
    """

    def signs(like: Tensor) -> Tensor:
        return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1

    if kind == CLASSES:
        logs = log_probabilities(outputs[0])
        return (logs * signs(logs) * (logs.detach().exp() / 2).sqrt()).sum()
    floats = [output for output in outputs if output.is_floating_point()]
    sizes = [output.detach().square().sum() / len(output) for output in floats]
    terms = [
        (output * signs(output)).sum() / (size.clamp_min(1e-30) * len(floats)).sqrt()
        for output, size in zip(floats, sizes, strict=True)
    ]
    return torch.stack(terms).sum()


def _energies(found: Outputs, wanted: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return, per floating-point tensor, the sum of squared differences and that of squared wanted values."""
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.is_floating_point()]
    return [((a - b).square().sum(), b.square().sum()) for a, b in pairs]


# ---- measuring over batches ----
@dataclass(frozen=True)
class Damage:
    """How far a network is from the original over some samples.

    Attributes:
        divergence: for classes in nats, as in `divergence`; for values the relative error |f - o| / |o|, averaged over
            the output's tensors.
        fidelity: in percent: the share of samples whose most likely class is the original's, or the mean cosine
            between a sample's values and the original's.
        accuracy: the share of labels predicted, in percent; None where labels are missing or name no class.
        samples: the number of samples.
    """

    divergence: float
    fidelity: float
    accuracy: float | None
    samples: int


def damage(
    network: nn.Module, original: nn.Module, batches: Iterable[Sequence[Any]], *, kind: str | None = None
) -> Damage:
    """Compare a network with the original over batches (images, labels, ...); memory stays at one batch.

    `kind` is "classes" or "values" (default: found by `kind_of`). Labels are optional.

    Raises:
        ValueError: no batches, or an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"outputs '{kind}': expected one of {', '.join(KINDS)}")
    device, sums = device_of(original), _Sums()
    with torch.inference_mode():
        for batch in batches:
            images = tree_map(lambda item: item.to(device) if isinstance(item, Tensor) else item, batch[0])
            found, wanted = outputs_of(network, images), outputs_of(original, images)
            kind = kind or kind_of(original, images)
            sums.add(kind, found, wanted, batch[1] if len(batch) > 1 else None)
    if kind is None or not sums.samples:
        raise ValueError("there are no batches to compare networks on: expected at least one")
    return sums.damage(kind)


class _Sums:
    """Sums over the samples of all batches."""

    def __init__(self) -> None:
        self.samples = self._right = 0
        self._away = self._alike = 0.0
        self._energies: Tensor | float = 0.0  # (outputs, 2): squared differences, squares
        self._labelled = True

    def add(self, kind: str, found: Outputs, wanted: Outputs, labels: Tensor | None) -> None:
        """Add a batch."""
        away, alike = of_each(kind, found, wanted)
        self.samples += len(away)
        self._away += float(away.sum())
        self._alike += float(alike.sum())
        if kind == CLASSES:
            self._labelled &= are_classes(labels, found[0])
            if self._labelled and labels is not None:
                self._right += int((found[0].argmax(1).cpu() == labels.cpu()).sum())
        else:
            pairs = _energies([each.double() for each in found], [each.double() for each in wanted])
            self._energies += torch.tensor([[float(wrong), float(total)] for wrong, total in pairs]).double()

    def damage(self, kind: str) -> Damage:
        """Return the means."""
        alike = 100 * self._alike / self.samples
        if kind == CLASSES:
            accuracy = 100 * self._right / self.samples if self._labelled else None
            return Damage(max(self._away / self.samples, 0.0), alike, accuracy, self.samples)
        assert isinstance(self._energies, Tensor)
        wrong, total = self._energies.unbind(1)
        return Damage(float((wrong / total.clamp_min(1e-300)).sqrt().mean()), alike, None, self.samples)


def are_classes(labels: Any, scores: Tensor) -> bool:
    """Return whether labels name one of the classes of scores (N, K) for each sample."""
    if not isinstance(labels, Tensor) or labels.shape != scores.shape[:1] or labels.is_floating_point():
        return False
    return bool(((labels >= 0) & (labels < scores.shape[1])).all())
