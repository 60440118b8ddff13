"""find_gates: run a network once, and decide on its graph which products scale channels by attention."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import nn

from stripe.gate import Gates
from stripe.gates.hooks import uncompiled
from stripe.gates.rules import CONSTANT, Candidate, candidates_of
from stripe.gates.trace import Images, trace


def find_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> Gates:
    """Return the gates of `model` in order of execution: a list, empty when there are none, that prints as a table.

    A gate whose map is a single pixel at this input size cannot be told from an activation: it is left out, with a
    UserWarning that names it. When no gate is found although the network has products that depend on its input, a
    UserWarning gives the most frequent reason for rejecting them; `explain_gates` gives the reason for each.

    Args:
        model: the network; it is left as it is.
        images: a batch as the network takes it: a tensor, a tuple or mapping of several inputs, or a list of single
            images (channels, H, W), as detectors take it; best large and not square.
        normalisers: ATen names, such as "softplus" or "relu", of functions to treat as bounded, besides NORMALISERS.

    Raises:
        ValueError: `images` holds no batch, the network is sharded, or the only possible gates are on single pixels.

    Example:
        >>> import torch, stripe
        >>> model = stripe.models.create_model("resnet", depth=11, module="senet")
        >>> [gate.name for gate in stripe.find_gates(model, torch.rand(2, 3, 32, 40))]
        ['layer1.0', 'layer2.0', 'layer3.0']
    """
    model = uncompiled(model)
    graph = trace(model, images)
    candidates = candidates_of(graph, normalisers)
    found = Gates(candidate.gate for candidate in candidates if candidate.gate)
    if hidden := dict.fromkeys(candidate.site or "model" for candidate in candidates if candidate.hidden):
        said = (
            f"input too small: what is scaled at {', '.join(hidden)} is a single pixel, where a gate cannot be told"
            f" from an activation; {_advice(model, images)}"
        )
        if not found:
            raise ValueError(said)
        warnings.warn(f"{said}; the other gates were found", stacklevel=2)
    elif not found:
        _warn_of_rejected(candidates)
    return found


def explain_gates(model: nn.Module, images: Images, *, normalisers: Collection[str] = ()) -> list[Candidate]:
    """Return every product and division that depends on the input, in order, accepted or with a reason against it.

    The list also holds sums in which one summand is spread over space, and matrix products or convolutions of two
    tensors that depend on the input. Arguments and errors are those of `find_gates`.
    """
    return candidates_of(trace(uncompiled(model), images), normalisers)


def _advice(model: nn.Module, images: Images) -> str:
    """Say which larger input to use, if the network takes one at all."""
    if not isinstance(images, torch.Tensor) or images.ndim < 3:
        return "use larger inputs"
    size = tuple(2 * n for n in images.shape[2:])
    try:
        trace(model, images.new_zeros(images.shape[:2] + size))
    except Exception:  # a head for one fixed input size can fail in many ways
        return "the network takes no larger input, so that these cannot be folded or recorded"
    return f"use images of at least twice the size, {'x'.join(map(str, size))}"


def _warn_of_rejected(candidates: Sequence[Candidate]) -> None:
    """Warn that products which may be meant as gates were rejected, and give the most frequent reason."""
    products = [c for c in candidates if c.op in ("mul", "addcmul", "div", "lerp") and c.reason != CONSTANT]
    if products:
        reason, count = Counter(candidate.reason for candidate in products).most_common(1)[0]
        warnings.warn(
            f"no gates: of {len(products)} products that depend on the input {count} were rejected because of this:"
            f" {reason}; explain_gates(model, images) names each",
            stacklevel=3,
        )
