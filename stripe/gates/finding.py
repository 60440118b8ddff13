"""find_gates: run a network once, and decide on its graph which products scale channels by attention."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from stripe.gate import Gates
from stripe.gates.hooks import uncompiled
from stripe.gates.rules import Candidate, candidates_of
from stripe.gates.trace import Images, trace


def find_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> Gates:
    """Return the gates of `model` in order of execution: a list, empty when there is none, that prints as a table.

    `images` is a batch as the network takes it, or a tuple or mapping of several inputs; best large and not
    square. `normalisers` adds ATen names (such as "softplus") to NORMALISERS. Raises ValueError when the
    input is so small that gates may hide.
    """
    graph = trace(uncompiled(model), images)
    candidates = candidates_of(graph, normalisers)
    if hidden := dict.fromkeys(candidate.site or "model" for candidate in candidates if candidate.hidden):
        size = "x".join(str(2 * n) for n in graph.inputs[0].shape[2:])
        raise ValueError(
            f"input too small: what is scaled at {', '.join(hidden)} is a single pixel, where a gate cannot be told;"
            f" use images of at least twice the size, {size}"
        )
    return Gates(candidate.gate for candidate in candidates if candidate.gate)


def explain_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product that might scale channels, in order of execution, accepted or with the reason why not."""
    return candidates_of(trace(uncompiled(model), images), normalisers)
