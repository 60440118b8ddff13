"""Gate and its parts: plain data without tensors or modules, so that run.json can hold all of it.

A gate is a place where a network multiplies a feature map by one value per sample and channel. The same object is
found by `find_gates`, recorded by `Recorder`, kept in run.json and read back as one of `run.gates`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["multiplicative", "additive", "affine", "radix"]
Kind = Literal["attention", "squeeze", "energy", "map", "product"]
"""What can be read at a gate: the attention; the squeeze; the spatial mean of the square of what the gate scales; that
feature map itself; the product."""


@dataclass(frozen=True)
class Tap:
    """Where a hook can read a tensor: an input or output (by position) of the k-th call of the module at `path`."""

    path: str
    call: int
    side: Literal["input", "output"]
    position: int


@dataclass(frozen=True)
class Product:
    """The operation that applies a gate, as a dispatch mode recognises it within one call of the gate's site.

    `operand` says which factor is the attention; `ordinal` is the number of earlier operations in the call that look
    the same; `copied` marks attention that was copied to the full shape of its feature map.
    """

    call: int
    op: str
    operand: int
    ordinal: int
    copied: bool


@dataclass(frozen=True)
class Gate:
    """A place where a feature map is scaled (or shifted) by one input-dependent value per sample and channel.

    Attributes:
        name: unique in its network: the path of a module, with "#k" for the k-th call of a module that is called
            several times, and "@j" where gates would otherwise share a name.
        channels: how many values the attention has per sample.
        form: "multiplicative" (x * g), "additive" (x + g), "affine" (g is divided by its own mean over channels) or
            "radix" (a softmax over several maps, which are then summed).
        layout: the dimensions of the product: N, C, R (radix) or G (groups of channels); all others are spatial.
        site: path of the module in whose forward the product is computed; "" is the network itself.
        before: path of the layer that made the feature map; None where no layer did.
        after: paths of the layers that take the product as input.
        product: which operation applies the attention; None in a run of a version that did not record it.
        attention: where a hook can read the attention; None where it can only be read at the product itself.
        squeeze: where a hook can read the squeeze, or the map whose average it is; None as for `attention`.
        pooled: whether the tensor at `squeeze` is already the average over space.
        exclusive: whether nothing but the product uses the module output at `attention`.
    """

    name: str
    channels: int
    form: Form = "multiplicative"
    layout: str = "NCHW"
    site: str = ""
    before: str | None = None
    after: tuple[str, ...] = ()
    product: Product | None = None
    attention: Tap | None = None
    squeeze: Tap | None = None
    pooled: bool = False
    exclusive: bool = False

    @property
    def source(self) -> str | None:
        """Path of the module whose output is the attention; None when it is computed functionally."""
        return self.attention.path if self.attention and self.attention.side == "output" else None

    def __repr__(self) -> str:
        """Describe the gate in one line."""
        origin = f"from {self.source}" if self.source else "computed functionally"
        return f"Gate('{self.name}': {self.channels} channels, {self.form}, {origin})"


class Gates(list[Gate]):
    """A list of gates, in order of execution, that is shown as a table in a terminal and in a notebook."""

    def __repr__(self) -> str:
        """Return the table as text, a row per gate."""
        return table(self).drop(columns=["layout", "after"]).fillna("-").to_string(index=False) if self else "no gates"

    def _repr_html_(self) -> str:
        return table(self).fillna("-").to_html(index=False) if self else "<p>no gates</p>"


def table(gates: Iterable[Gate]) -> pd.DataFrame:
    """Return a row per gate: name, channels, form, layout, site, source, and the layers before and after."""
    import pandas as pd

    columns = "name channels form layout site source before after".split()
    rows = [[getattr(gate, column) for column in columns[:-1]] + [", ".join(gate.after)] for gate in gates]
    return pd.DataFrame(rows, columns=columns)


def name_of(gate: Gate | str) -> str:
    """Return the name of a gate; a name is returned as it is."""
    return gate if isinstance(gate, str) else gate.name


def product_of(gate: Gate) -> Product:
    """Return which operation applies a gate.

    Raises:
        ValueError: the gate has no product: it comes from a run of an earlier version, or was made by hand.
    """
    if gate.product is None:
        raise ValueError(
            f"gate {gate.name!r} does not say where its network applies it, as in runs of earlier versions:"
            " take the gate of this name from find_gates(model, images)"
        )
    return gate.product
