"""The same network with more and more gates folded, by each kind of constant, with and without recovery."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stripe.folding.exact import fold
from stripe.folding.report import FoldReport
from stripe.folding.uses import Constants
from stripe.gates.trace import Images

Recovery = Callable[[nn.Module], nn.Module]
"""Makes a better network of a folded one, such as `reestimate_norms` or `distill` with its loader bound."""

NONE = "none"  # the weighting of a network without folded gates
AS_IS = "none"  # the name for no recovery
AS_FOLDED: Mapping[str, Recovery] = {AS_IS: lambda network: network}
"""No recovery: the network stays as it was folded."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A network with the first `folded` gates of an order folded; `report` is None if none is folded."""

    folded: int
    weighting: str
    recovery: str
    network: nn.Module
    report: FoldReport | None


def variants(
    model: nn.Module,
    images: Images,
    order: Sequence[str],
    constants: Mapping[str, Constants],
    *,
    counts: Iterable[int],
    recoveries: Mapping[str, Recovery],
    normalisers: Collection[str] = (),
) -> Iterator[Variant]:
    """Yield a variant for each count of folded gates, each weighting in `constants`, and each recovery.

    `images` and `normalisers` are as `fold` takes them. A count of 0 is `model` itself, with the weighting "none":
    together with a recovery, it shows what the recovery does to a network with nothing folded.
    """
    for count in counts:
        for weighting in constants if count else [NONE]:
            network, report = model, None
            if count:
                chosen = {name: constants[weighting][name] for name in order[:count]}
                network, report = fold(model, chosen, images, normalisers=normalisers)
            for name, recover in recoveries.items():
                yield Variant(count, weighting, name, recover(network), report)
