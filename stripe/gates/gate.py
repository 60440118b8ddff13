"""Gate, and what belongs to it: plain descriptions that hold no tensor and no module.

A gate is a place where a network multiplies a feature map by one value per sample and channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["multiplicative", "additive", "affine", "radix"]
Kind = Literal["attention", "squeeze", "energy"]
"""For a sample and channel: the value; what it scales, averaged over space; the square of that, so averaged."""


@dataclass(frozen=True)
class Tap:
    """Where a hook meets a tensor: an input or output (by position) of the k-th call of the module at `path`."""

    path: str
    call: int
    side: Literal["input", "output"]
    position: int


@dataclass(frozen=True)
class Product:
    """The operation that applies a gate, as a dispatch mode recognises it within one call of the gate's site.

    `operand` says which factor is the gate; `ordinal` counts the operations of the same look before it;
    `copied` marks a gate that was copied to the full shape of its feature map.
    """

    call: int
    op: str
    operand: int
    ordinal: int
    copied: bool


@dataclass(frozen=True)
class Gate:
    """A place where a feature map is scaled (or shifted) by one input-dependent value per sample and channel.

    `site` is the path of the module in whose forward the product happens ("" is the network itself). `layout`
    names the product's dimensions: N, C, R (radix) or G (channel groups), the rest is space. `before` is the
    layer that made the feature map, `after` are the layers that take the product. `attention` and `squeeze`
    say where hooks can read the two, None where only a dispatch mode can; `pooled` that the network itself
    averages at `squeeze`; `exclusive` that only the product uses the module output at `attention`.
    """

    name: str
    channels: int
    form: Form
    layout: str
    site: str
    before: str | None
    after: tuple[str, ...]
    product: Product
    attention: Tap | None
    squeeze: Tap | None
    pooled: bool
    exclusive: bool

    @property
    def source(self) -> str | None:
        """Path of the module whose output is the gate's tensor, None when it is computed functionally."""
        return self.attention.path if self.attention and self.attention.side == "output" else None

    def __repr__(self) -> str:
        """Say in one line which gate it is: a list of gates prints as a list of lines."""
        origin = f"from {self.source}" if self.source else "computed functionally"
        return f"Gate('{self.name}': {self.channels} channels, {self.form}, {origin})"


def table(gates: Sequence[Gate]) -> pd.DataFrame:
    """Return a row per gate: name, channels, form, layout, site, source, and the layers before and after."""
    import pandas as pd

    columns = "name channels form layout site source before after".split()
    rows = [{column: getattr(gate, column) for column in columns} for gate in gates]
    return pd.DataFrame(rows, columns=columns).assign(after=[", ".join(gate.after) for gate in gates])


@dataclass(frozen=True)
class Candidate:
    """A product that was looked at: the gate it is, or the reason why it is none.

    `shape` is the supposed gate's, `scaled` that of what it scales. A `hidden` candidate may be a gate, but
    its feature map is a single pixel at this input size.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    scaled: tuple[int, ...]
    gate: Gate | None
    reason: str
    hidden: bool = False
