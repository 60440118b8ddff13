"""What folding costs, measured without labels: how far a network's outputs are from the original's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from stripe.folding.fields import Array
from stripe.graphs.file import GraphFile, Tensor
from stripe.graphs.inputs import Batch, Inputs
from stripe.graphs.recording import Path, opened, samples_of
from stripe.graphs.trace import run

TINY = 1e-30  # smallest probability that is distinguished from 0


@dataclass(frozen=True)
class Cost:
    """How far the first output of a network is from the original's.

    `relative_error` is the root of the summed squared differences over that of the summed squared values, `cosine` the
    mean cosine similarity over samples. Where the output is (N, classes), `agreement` is the share of samples with the
    same highest class, and `divergence` the mean KL divergence from the original's class probabilities, in nats;
    otherwise both are None.
    """

    samples: int
    relative_error: float
    cosine: float
    agreement: float | None
    divergence: float | None


def cost(original: Path | GraphFile, other: Path | GraphFile, inputs: Inputs | Iterable[Batch]) -> Cost:
    """Compare the outputs of two networks on `inputs`, which both take.

    Raises:
        ValueError: there is no sample, or the networks' outputs differ in shape.
    """
    files = opened(original), opened(other)
    sessions = [file.session() for file in files]
    name = [files[0].graph.output[0].name]
    sums: Any = np.zeros(6)  # samples, squared differences, squares, cosines, agreements, divergences
    classes = False
    for batch in samples_of(files[0], inputs):
        count = len(batch.sample_ids)
        a, b = (_rows(run(session, batch.inputs, name)[0], count) for session in sessions)
        if a.shape != b.shape:
            raise ValueError(f"outputs '{name[0]}' have shapes {a.shape} and {b.shape}: these are not the same network")
        norms = np.linalg.norm(a.reshape(count, -1), axis=1) * np.linalg.norm(b.reshape(count, -1), axis=1)
        cosines = (a * b).reshape(count, -1).sum(1) / np.where(norms > 0, norms, 1.0)
        classes = a.ndim == 2 and a.shape[1] > 1
        judged = (float((a.argmax(1) == b.argmax(1)).sum()), divergences(a, b).sum()) if classes else (0.0, 0.0)
        sums += [count, ((a - b) ** 2).sum(), (a**2).sum(), cosines.sum(), *judged]
    if not sums[0]:
        raise ValueError("there are no inputs to compare on: give at least one sample")
    count, wrong, squares, cosines, agreements, away = sums.tolist()
    relative = float(np.sqrt(wrong / squares)) if squares else float(wrong > 0)
    rates = (agreements / count, away / count) if classes else (None, None)
    return Cost(int(count), relative, cosines / count, *rates)


def _rows(output: Tensor, count: int) -> Array:
    return np.asarray(output, np.float64)[:count]


def divergences(a: Array, b: Array) -> Array:
    """Return the KL divergence of the class probabilities b (N, classes) from those of a, per sample, in nats."""
    p, q = (probabilities(each) for each in (a, b))
    found: Array = (p * (np.log(p + TINY) - np.log(q + TINY))).sum(1)
    return found


def probabilities(output: Array) -> Array:
    """Return class probabilities: the output itself if its rows are probabilities already, else its softmax."""
    found: Array = output if are_probabilities(output) else softmax(output, axis=1)
    return found


def are_probabilities(output: Tensor) -> bool:
    """Whether the rows of an output (N, classes) are class probabilities already."""
    return bool((output >= 0).all() and np.allclose(output.sum(1), 1.0, atol=1e-3))
