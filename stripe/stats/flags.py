"""What is wrong with a gate: kept apart from how constant it is."""

from __future__ import annotations

import numpy as np

from stripe.stats.arithmetic import Array
from stripe.stats.measuring import BOUNDS, NEAR_BOUND
from stripe.stats.moments import Moments, moments_of

SATURATED_SHARE = 0.99  # more than this share of saturated values flags the gate
DEAD_RANGE = 1e-6  # a gate whose values span no more than this is dead; channels that each do are constant
SCALES = ("multiplicative", "radix")  # forms whose values lie between two bounds, mostly


def flags(attention: Array | Moments, form: str = "multiplicative") -> tuple[str, ...]:
    """Name what is wrong with a gate; a stripe is none of it.

    "dead": all values are equal within 1e-6. "constant": each channel gives every sample one value within 1e-6,
    though channels differ; a module whose hidden units are all inactive reads as a perfect stripe. "saturated": over
    99 % of the values are within 0.001 of a bound of the gate. "nonfinite": some values are not finite.

    Args:
        attention: (samples, channels), or their moments.
        form: of the gate. What scales is bounded by 0 and, where no value exceeds it, by 1 or by 2, as of
            2 * sigmoid; what is added to a map has no bounds.

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
