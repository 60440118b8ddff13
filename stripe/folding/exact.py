"""fold: constants in place of a trained network's gates, merged into its weights. What is not exact is not merged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stripe.folding.building import verified
from stripe.folding.merging import Merge, Network
from stripe.folding.tensors import doubled, named_tensors, tensors_in
from stripe.gate import Gate, name_of
from stripe.gates.finding import find_gates
from stripe.gates.hooks import uncompiled
from stripe.gates.trace import Images, trace


@dataclass(frozen=True, eq=False)
class FoldReport:
    """What became of each gate, and how far the folded network is from the one whose gates are constant.

    `table` has one row per gate: gate, direction ("back", "forward" or "kept"), into (names of the tensors that
    changed), through (maps between), reason (why it was kept) and weight_growth (largest weight after over before).
    `error` is the largest difference over the largest output, in float64.
    """

    table: pd.DataFrame
    error: float

    def _repr_html_(self) -> str:
        """Show in a notebook how many gates were merged, how exactly, and the table."""
        merged = int((self.table["direction"] != "kept").sum())
        head = f"<p><b>{merged} of {len(self.table)}</b> gates merged, relative error {self.error:.1g}</p>"
        return head + self.table.to_html(index=False)


def fold(
    model: nn.Module, constants: Mapping[Any, Tensor | np.ndarray[Any, Any]], images: Images
) -> tuple[nn.Module, FoldReport]:
    """Replace the gates in `constants` by its vectors (C,), and merge these into the network's weights.

    The keys of `constants` are gates or their names; `images` is a small batch as `find_gates` takes it. Returns a
    new network and the report. A gate without an exact merge becomes a ChannelScale.

    Raises:
        ValueError: train mode, no gates, an unknown gate, a vector that does not fit or is not finite, or a gate
            that cannot be taken out of the module that applies it.
        ArithmeticError: the folded network differs, even with nothing merged.
    """
    model = uncompiled(model)
    if training := [path or "model" for path, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in train mode, where statistics change: call model.eval() before fold")
    usual = tensors_in(images)[0].dtype
    exact, images = copy.deepcopy(model).double(), tree_map(doubled, images)
    gates = find_gates(exact, images)
    vectors = _checked(gates, constants, tensors_in(images)[0])
    chosen = [gate for gate in gates if gate.name in vectors]
    with torch.no_grad():
        folds = Network(exact, trace(exact, images), chosen, vectors).plan()
        folded, folds, error = verified(exact, images, folds, vectors)
    _cast_like(folded, model, usual)
    return folded, FoldReport(_table(folds), error)


def _checked(
    gates: Sequence[Gate], constants: Mapping[Any, Tensor | np.ndarray[Any, Any]], like: Tensor
) -> dict[str, Tensor]:
    """Return the constants on the device and of the type of `like`."""
    if not gates:
        raise ValueError("the network has no gates to fold: see stripe.gates.explain_gates for what was looked at")
    channels = {gate.name: gate.channels for gate in gates}
    vectors = {name_of(gate): torch.as_tensor(given).detach().to(like) for gate, given in constants.items()}
    for name, vector in vectors.items():
        if name not in channels:
            raise ValueError(f"no gate is named {name!r}; expected some of {', '.join(channels)}")
        if vector.shape != (channels[name],):
            raise ValueError(
                f"the constant of gate {name!r} has shape {tuple(vector.shape)}; expected ({channels[name]},)"
            )
        if not vector.isfinite().all():
            raise ValueError(f"the constant of gate {name!r} is not finite in {(~vector.isfinite()).sum()} channels")
    return vectors


def _table(folds: Iterable[Merge]) -> pd.DataFrame:
    rows = [
        (f.gate.name, f.direction, tuple(dict.fromkeys(e.name for e in f.edits)), f.through, f.reason, f.growth)
        for f in folds
    ]
    return pd.DataFrame(rows, columns=["gate", "direction", "into", "through", "reason", "weight_growth"])


def _cast_like(folded: nn.Module, model: nn.Module, usual: torch.dtype) -> None:
    """Give the folded network's tensors the types of the original's; what is new takes the usual one."""
    types = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    for name, tensor in named_tensors(folded).items():
        tensor.data = tensor.data.to(types.get(name, usual))
