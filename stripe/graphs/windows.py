"""Windows of convolutions and pools: how they move over space, read from the attributes of an ONNX node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Attribute = Callable[[str, Any], Any]
"""Gives a node's attribute by its name, or the default if the node does not have it."""


@dataclass(frozen=True)
class Window:
    """How a convolution or a pool moves over space."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]

    @classmethod
    def of(cls, attribute: Attribute, kernel: Sequence[int], wide: Sequence[int], narrow: Sequence[int]) -> Window:
        """Read the window off the attributes of a node that turns sizes `wide` into `narrow`."""
        n = len(kernel)
        strides, dilations = (list(attribute(name, [1] * n)) for name in ("strides", "dilations"))
        auto = attribute("auto_pad", "NOTSET")
        pads = list(attribute("pads", [0] * 2 * n))
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            reached = cls([*kernel], strides, dilations, pads)._reached(narrow)
            both = [max(r - w, 0) for r, w in zip(reached, wide, strict=True)]
            less, more = [b // 2 for b in both], [b - b // 2 for b in both]
            pads = less + more if auto == "SAME_UPPER" else more + less
        return cls([*kernel], strides, dilations, pads)

    @property
    def attributes(self) -> dict[str, list[int]]:
        """The window as attributes of a node."""
        return {"kernel_shape": self.kernel, "strides": self.strides, "dilations": self.dilations, "pads": self.pads}

    def rest(self, wide: Sequence[int], narrow: Sequence[int]) -> list[int]:
        """Return how many entries at the end of `wide` the window never reaches, by dimension."""
        reached, n = self._reached(narrow), len(self.kernel)
        return [w - r + self.pads[i] + self.pads[n + i] for i, (w, r) in enumerate(zip(wide, reached, strict=True))]

    def _reached(self, narrow: Sequence[int]) -> list[int]:
        """Return how far the window reaches, pads included, to make `narrow`."""
        sizes = zip(narrow, self.strides, self.dilations, self.kernel, strict=True)
        return [(m - 1) * s + d * (k - 1) + 1 for m, s, d, k in sizes]
