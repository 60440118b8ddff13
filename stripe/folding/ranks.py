"""How many numbers per image attention needs: what compact networks cost, from no number to the full attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from stripe.devices import device_of
from stripe.folding.compacting import compact
from stripe.folding.divergence import CLASSES, are_classes, kind_of, of_each
from stripe.folding.tensors import outputs_of
from stripe.folding.uses import Array
from stripe.gates import find_gates
from stripe.gates.trace import Images
from stripe.messages import Progress
from stripe.recipe import LEARNING_STEPS
from stripe.stats import CONFIDENCE
from stripe.stats.intervals import student
from stripe.training import Batches

ORIGINAL = "original"


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """Compact networks and what each costs.

    Attributes:
        table: a row per network, the original first: network (its name), k (scores per gate), source (the gate that
            gives the scores of all; empty where each gate has its own), numbers (per image, of all gates together; for
            the original, the values of its attention), parameters (of the whole network), divergence (from the
            original, averaged over images), worth (the measure in percent), drop (the points lost against the
            original), the ends of the intervals over images of divergence and drop (with the endings _low and _high)
            and, with `held_out`, validation_drop (the drop on these images).
        measure: the measure in `worth`: "accuracy" where there are labels, "agreement" with the original, or "cosine".
        networks: the networks by name, the original among them.
    """

    table: pd.DataFrame
    measure: str
    networks: Mapping[str, nn.Module] = field(repr=False)

    def chosen(self, max_drop: float) -> str:
        """Return the name of the network with the fewest numbers per image that loses at most `max_drop` points.

        Of several, it is the nearest to the original; if every network loses more, it is the nearest of all.
        """
        tried = self.table[self.table["network"] != ORIGINAL]
        allowed = tried[tried["validation_drop" if "validation_drop" in tried else "drop"] <= max_drop]
        order = ["numbers", "divergence"] if len(allowed) else ["divergence"]
        return str((allowed if len(allowed) else tried).sort_values(order)["network"].iloc[0])


def tradeoff(
    model: nn.Module,
    images: Images,
    calibration: Iterable[Sequence[Any]],
    test: Batches,
    *,
    ranks: Sequence[int],
    sources: Sequence[str | None] = (None,),
    held_out: Batches | None = None,
    steps: int = LEARNING_STEPS,
    progress: Progress = iter,
    callback: Callable[[str], None] | None = None,
) -> Tradeoff:
    """Make compact networks of k scores for every k in `ranks`, and compare each with the original, image by image.

    Args:
        model: the trained network, in eval mode; it is left as it is.
        images: a small batch as `find_gates` takes it.
        calibration: batches (images, ...) to learn on, as in `compact`; read many times.
        test: batches (images, labels, ...) to compare on; labels may be missing, or -1 for none.
        ranks: scores per gate; 0 is the network with everything folded.
        sources: where the scores come from: None for each gate's own, or the name of the gate that serves all.
        held_out: batches like `test` by which `Tradeoff.chosen` chooses (default: by `test`).
        steps: number of training steps for each network.
        progress: wraps the iterators over steps and batches.
        callback: called with the name of each network as soon as it is made.

    Raises:
        ValueError: as in `compact`, or no batches.

    Example:
        >>> import torch, stripe
        >>> model = stripe.models.create_model("resnet", depth=11, module="senet").eval()
        >>> batches = [(torch.randn(32, 3, 32, 32),) for _ in range(2)]
        >>> found = tradeoff(model, batches[0][0][:2], batches, batches, ranks=[0, 1], steps=1)
        >>> found.table[["network", "numbers"]]
            network  numbers
        0  original      448
        1        k0        0
        2        k1        3
    """
    gates, networks = find_gates(model, images), {ORIGINAL: model}
    rows = [{"network": ORIGINAL, "k": math.nan, "source": "", "numbers": sum(gate.channels for gate in gates)}]
    tried = [(k, source) for k in ranks for source in (sources if k else (None,))]
    for k, source in tried:
        name = f"k{k}-{source}" if source else f"k{k}"
        networks[name], _ = compact(model, images, calibration, k=k, source=source, steps=steps, progress=progress)
        rows.append({"network": name, "k": k, "source": source or "", "numbers": k if source else k * len(gates)})
        if callback:
            callback(name)
    kind = kind_of(model, images)
    away, worth, measure = _compared(networks, progress(test), kind)
    for row, network, divergences, values in zip(rows, networks.values(), away, worth, strict=True):
        row["parameters"] = sum(p.numel() for p in network.parameters())
        row |= _mean("divergence", divergences) | {"worth": values.mean()} | _mean("drop", worth[0] - values)
    if held_out is not None:
        _, worth, _ = _compared(networks, progress(held_out), kind)
        for row, values in zip(rows, worth, strict=True):
            row["validation_drop"] = float((worth[0] - values).mean())
    return Tradeoff(pd.DataFrame(rows), measure, networks)


def _compared(networks: Mapping[str, nn.Module], test: Iterable[Sequence[Any]], kind: str) -> tuple[Array, Array, str]:
    """Return divergence and worth by network and image, (networks, images), and the measure in the worth."""
    away, right, same, labelled = [], [], [], True
    with torch.inference_mode():
        for batch in test:
            images = batch[0].to(device_of(networks[ORIGINAL]))
            outputs = [outputs_of(network, images) for network in networks.values()]
            found = [of_each(kind, each, outputs[0]) for each in outputs]
            away.append(torch.stack([divergence for divergence, _ in found]).cpu())
            same.append(torch.stack([likeness for _, likeness in found]).cpu())
            labels = batch[1] if len(batch) > 1 else None
            labelled &= kind == CLASSES and are_classes(labels, outputs[0][0])
            if labelled and labels is not None:
                right.append(torch.stack([each[0].argmax(1).cpu() == labels.cpu() for each in outputs]))
    if not away:
        raise ValueError("there are no batches to compare networks on: expected at least one")
    measure = "accuracy" if labelled else "agreement" if kind == CLASSES else "cosine"
    worth = torch.cat(right if labelled else same, 1).double()
    return torch.cat(away, 1).double().numpy(), 100 * worth.numpy(), measure


def _mean(name: str, values: Array, confidence: float = CONFIDENCE) -> dict[str, float]:
    """Return the mean over images and the ends of its interval by Student's t."""
    mean, count = float(values.mean()), len(values)
    reach = student(confidence, count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}
