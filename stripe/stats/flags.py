"""What is wrong with a gate, kept apart from how constant it is."""

from __future__ import annotations

import numpy as np

from stripe.stats.arithmetic import Array
from stripe.stats.measuring import BOUNDS, NEAR_BOUND
from stripe.stats.moments import Moments, moments_of

SATURATED_SHARE = 0.99  # more than this share of saturated values flags the gate
DEAD_RANGE = 1e-6  # a gate is dead if all its values span no more than this, constant if those of each channel do
SCALES = ("multiplicative", "radix")  # forms whose values mostly lie between two bounds


def flags(attention: Array | Moments, form: str = "multiplicative") -> tuple[str, ...]:
    """Name what is wrong with a gate; that it is a stripe is no fault.

    "dead": all values are equal within 1e-6. "constant": each channel gives every sample one value within 1e-6,
    though channels differ; a module whose hidden units are all inactive thus looks like a perfect stripe.
    "saturated": over 99 % of the values are within 0.001 of a bound of the gate. "nonfinite": some values are not
    finite.

    Args:
        attention: (samples, channels), or their moments.
        form: form of the gate. A scale is bounded by 0 and by the first of 1 and 2 (as of 2 * sigmoid) that no value
            exceeds, if there is one; what is added to a map has no bounds.

    Example:
        >>> import numpy as np
        >>> flags(np.full((500, 16), 0.5))
        ('dead',)
    """
    moments = moments_of(attention)
    low, high = moments.low[moments.finite], moments.high[moments.finite]
    dead = low.size > 0 and high.max() - low.min() <= DEAD_RANGE
    found = {
        "dead": dead,
        "constant": low.size > 0 and not dead and moments.count > 1 and (high - low).max() <= DEAD_RANGE,
        "saturated": form in SCALES and _saturated(moments, high),
        "nonfinite": moments.nonfinite > 0,
    }
    return tuple(name for name, raised in found.items() if raised)


def _saturated(moments: Moments, high: Array) -> bool:
    if not moments.count or not high.size:
        return False
    top = next((number for number in (1, 2) if high.max() <= BOUNDS[number] + NEAR_BOUND), None)
    near = moments.near[0] + (moments.near[top] if top else 0)
    return bool(near > SATURATED_SHARE * moments.count * np.count_nonzero(moments.finite))
