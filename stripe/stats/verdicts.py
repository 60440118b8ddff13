"""Is a learned vector the observed stripe? Its distance, what random vectors reach, and the verdict from both.

A difference is weighted by the energy that passes through its channel. With e the mean square of the map that a gate g
scales, and mu the stripe, the distance of a vector v is d(v) = sum_c (v_c - mu_c)^2 E[e_c] / sum_c E[g_c^2 e_c]: the
energy of the error made with v in the stripe's place, as a share of the result's energy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stripe.stats.arithmetic import SEED, Array

EQUIVALENT = 0.001
"""The distance up to which a vector is always equivalent to the stripe: 3 % in amplitude."""
SIGNIFICANT = 0.05
"""The adjusted p below which a vector counts as nearer to the stripe than random ones."""
DRAWS = 999
"""Random vectors that a learned one is ranked among; the smallest p is 1 / (DRAWS + 1)."""

VERDICTS = {
    "match": "equivalent to the stripe, and nearer to it than random vectors are",
    "trivial": "equivalent to the stripe, but random vectors are too, or come as near: nothing was there to learn",
    "related": "nearer to the stripe than random vectors, but not equivalent to it",
    "no match": "neither equivalent to the stripe nor nearer to it than random vectors",
    "cannot match": "not equivalent to the stripe, and neither is the best vector that the attention can give",
}
"""What each verdict means."""


def energy_distance(vectors: Array, stripe: Array, energy: Array, result: Array) -> Any:
    """Return d(v), the distance of vectors (..., channels) from a stripe (channels,): an array (...).

    Args:
        vectors: what could stand in the stripe's place.
        stripe: the observed mean attention mu.
        energy: E[e], the mean square of what the gate scales (channels,); ones where the gate adds.
        result: E[g^2 e], the mean square of what comes out (channels,).

    Example:
        >>> import numpy as np
        >>> stripe = np.array([0.5, 0.5])
        >>> round(float(energy_distance(np.array([0.6, 0.5]), stripe, np.ones(2), stripe**2)), 3)
        0.02
    """
    wrong = np.square(np.asarray(vectors, dtype=np.float64) - stripe) @ np.asarray(energy, dtype=np.float64)
    total = float(np.sum(result))
    return wrong / total if total > 0 else np.zeros_like(wrong)


def aligned(vectors: Array, stripe: Array, energy: Array) -> Any:
    """Return vectors (..., channels), each times the factor that brings it nearest to the stripe in energy."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norm = np.square(vectors) @ energy
    factor = np.divide(vectors @ (stripe * energy), norm, out=np.zeros_like(norm), where=norm > 0)
    return vectors * factor[..., None]


def misalignment(a: Array, b: Array, energy: Array) -> Any:
    """Return 1 - cos^2 of vectors (..., channels) in energy: the share of either that no common factor explains.

    It is symmetric; a vector without energy is wholly misaligned. The distance of `aligned(a, stripe, energy)` from the
    stripe is the misalignment times the stripe's own share of the result's energy.
    """
    products = np.square((np.asarray(a, dtype=np.float64) * b) @ energy)
    reach = np.asarray((np.square(a) @ energy) * (np.square(b) @ energy))
    return 1 - np.divide(products, reach, out=np.zeros_like(reach), where=reach > 0)


def shuffled_misalignments(moved: Array, fixed: Array, energy: Array, *, draws: int = DRAWS, seed: int = SEED) -> Array:
    """Return `misalignment` (draws,) with the channels of `moved` (channels,) shuffled.

    `moved` must be the vector on which the energies do not depend: if the two vectors are unrelated, only its channels
    are exchangeable.
    """
    rng = np.random.default_rng(seed)
    shuffles = rng.permuted(np.broadcast_to(moved, (draws, len(moved))), axis=1)
    found: Array = misalignment(shuffles, fixed, energy)
    return found


def rank_p(distance: float, random: Array) -> float:
    """Return the p-value of a distance among those of random vectors (draws,): (count + 1) / (draws + 1).

    ``count`` is the number of random vectors that are at least as near; NaN when the distance is.
    """
    if np.isnan(distance):
        return float("nan")
    near = distance + 1e-12 * np.abs(random).max(initial=0.0)  # rounding must not tell equal vectors apart
    return float((np.count_nonzero(random <= near) + 1) / (len(random) + 1))


def verdict(distance: float, *, limit: float, p: float, random: float, best: float = 0.0) -> str:
    """Return the verdict, one of VERDICTS, for a distance from the stripe.

    Args:
        distance: the learned vector's distance.
        limit: the largest distance at which a vector is equivalent to the stripe: the larger of the images' own
            distance from their mean and EQUIVALENT.
        p: p-value of the distance among random vectors, adjusted for the number of gates.
        random: share of the random vectors that are equivalent to the stripe.
        best: the smallest distance that the attention can give for any psi.
    """
    if distance <= limit:
        return "match" if p < SIGNIFICANT and random < 0.5 else "trivial"
    if best > limit:
        return "cannot match"
    return "related" if p < SIGNIFICANT else "no match"
