"""psi in a trained gate's place: the vectors that the gate's attention makes of psi, random psi and the best psi."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stripe.folding.uses import GateUse
from stripe.stats import SEED
from stripe.stats.verdicts import DRAWS, energy_distance

Array = npt.NDArray[np.floating[Any]]
Attention = Callable[[Tensor], Tensor]  # psi (C,) in, vector (C,) out
FIT_STEPS = 100  # at most, for fitting psi to the stripe itself, from each start
NEAREST = 3  # the nearest random psi, from which the fit also starts, beside the learned and the untrained psi
EXACT = 1e-6  # the distance at which no further start is tried
AT_ONCE = 100  # how many psi are sent through the attention together


class Psi(nn.Module):
    """A gate's psi, and the trained attention that makes a vector of it."""

    def __init__(self, attention: nn.Module, start: Tensor) -> None:
        """Start psi at a vector (C,)."""
        super().__init__()
        self.attention_module, self.vector = attention, nn.Parameter(start)

    def learned_vector(self) -> Tensor:
        """Return attention(psi), shape (C,)."""
        vector: Tensor = self.attention_module(self.vector)
        return vector


@torch.no_grad()
def values(psis: Mapping[str, Psi]) -> dict[str, Array]:
    """Return the current vector of each psi, (channels,) by gate."""
    return {gate: psi.learned_vector().double().cpu().numpy() for gate, psi in psis.items()}


def random_psis(squeezes: Tensor, draws: int = DRAWS, seed: int = SEED) -> Tensor:
    """Return random psi (draws, C): draws from the recorded squeezes (images, C), each with its channels shuffled."""
    rng = np.random.default_rng(seed)
    rows = squeezes.cpu().numpy()[rng.integers(len(squeezes), size=draws)]
    return torch.from_numpy(rng.permuted(rows, axis=1)).to(squeezes)


@torch.no_grad()
def vectors_of(attention: Attention, psis: Tensor) -> Array:
    """Return the vectors (draws, C) that the attention makes of many psi (draws, C)."""
    try:
        vectors = torch.vmap(attention, chunk_size=AT_ONCE)(psis)
    except Exception:  # whatever the reason, an attention that cannot take many psi at once takes them one by one
        vectors = torch.stack([attention(psi) for psi in psis])
    found: Array = vectors.double().cpu().numpy()
    return found


def best_fit(psi: Psi, stripe: Array, use: GateUse, starts: Tensor, *, enough: float = EXACT) -> Array:
    """Return the vector (C,) nearest to the stripe that the attention makes of any psi, searched from `starts` (n, C).

    One start is not enough: ReLUs of the attention that are dead at a start stay dead. `psi` keeps its value.
    """
    found = vectors_of(psi.attention_module, starts)
    distances = energy_distance(found, stripe, use.energy, use.result)
    order = np.argsort(distances, kind="stable")
    best: Array = found[order[0]]
    nearest = float(distances[order[0]])
    kept = psi.vector.detach().clone()
    for start in order:
        if nearest <= enough:
            break
        vector = _descend(psi, starts[start], stripe, use)
        if (distance := float(energy_distance(vector, stripe, use.energy, use.result))) < nearest:
            best, nearest = vector, distance
    with torch.no_grad():
        psi.vector.copy_(kept)
    return best


def _descend(psi: Psi, start: Tensor, stripe: Array, use: GateUse) -> Array:
    """Move psi from a start to where attention(psi) is nearest to the stripe in energy; return the vector."""
    target, weight = (torch.as_tensor(each).to(psi.vector) for each in (stripe, use.energy / use.energy.max()))
    with torch.no_grad():
        psi.vector.copy_(start)
        first = ((psi.learned_vector() - target).square() * weight).sum().clamp_min(1e-12)
    optimizer = torch.optim.LBFGS([psi.vector.requires_grad_()], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def misfit() -> float:
        optimizer.zero_grad()
        loss = ((psi.learned_vector() - target).square() * weight).sum() / first
        loss.backward()
        return loss.item()

    optimizer.step(misfit)
    return values({"": psi})[""]
