"""Which constant stands for a gate: its mean, or its mean weighted by the energy of what it scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.uses import GateUse, UseSums
from stripe.gates import Gate, read_gates
from stripe.messages import Progress


def measure_gates(
    model: nn.Module, gates: Sequence[Gate], loader: Iterable[Sequence[Tensor]], *, progress: Progress = iter
) -> dict[str, GateUse]:
    """Run the network over batches (images, ...) and return what each gate did; memory stays at one batch.

    Raises:
        RuntimeError: the loader is empty.
    """
    sums: dict[str, UseSums] = {gate.name: UseSums(gate.form == "additive") for gate in gates}
    device = device_of(model)
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(gate: Gate, kind: str, values: Tensor) -> None:
        seen[gate.name, kind] = values

    with torch.inference_mode(), read_gates(model, gates, keep, energy=True):
        for images, *_ in progress(loader):
            model(images.to(device))
            for name, total in sums.items():
                total.add(*(seen[name, kind].double().cpu().numpy() for kind in ("attention", "energy")))
    return {name: total.use() for name, total in sums.items()}
