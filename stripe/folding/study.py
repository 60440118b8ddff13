"""Fold until it costs too much: order the gates, fold more and more of them, recover, measure, choose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.constants import WEIGHTINGS, Constants, GateUse, measure_gates
from stripe.folding.latency import BACKENDS, BATCHES, latencies
from stripe.folding.recovery import reestimate_norms
from stripe.folding.sensitivity import ORDERS, Metric, greedy_order, predictors, rank_correlations, sensitivity
from stripe.folding.variants import AS_FOLDED, Recovery, Variant, variants
from stripe.gates import Gate, find_gates
from stripe.gates.trace import Images
from stripe.messages import Progress
from stripe.training import Batches, evaluate

MOST_COUNTS = 9  # numbers of folded gates that are tried where none are asked for
MAX_DROP = 0.5  # points of the measure that folding may cost


@dataclass(frozen=True, eq=False)
class Study:
    """What folding costs a network, and the variant that was chosen.

    Attributes:
        gates: a row per gate: gate, place (in the order of folding, from 1), what could have predicted its damage
            (columns of `predictors`), damage (what the measure loses with this gate alone at its constant), and
            where the chosen variant merged its constant (columns of `FoldReport.table`; missing where it was kept).
        variants: a row per network tried: folded (number of gates), last (the gate folded last), weighting, recovery,
            validation and, with test batches, test (the measure in percent), error (relative, of the merge).
        predictors: how well each predictor ranks the damage, as `rank_correlations` gives it.
        chosen: the variant with most gates folded within the allowed drop; its `network` is ready for use.
        measure: what validation and test hold: "accuracy" or "agreement".
        networks: the best network for each number of folded gates.
        images: the small batch on which the network was traced.
    """

    gates: pd.DataFrame
    variants: pd.DataFrame
    predictors: pd.DataFrame
    chosen: Variant
    measure: str
    networks: Mapping[int, nn.Module] = field(repr=False)
    images: Images = field(repr=False)

    def latencies(
        self,
        *,
        counts: Iterable[int] | None = None,
        backends: Sequence[str] = tuple(BACKENDS),
        batches: Sequence[int] = BATCHES,
    ) -> pd.DataFrame:
        """Time one network for each number of folded gates, which all its variants share but for their values.

        Returns the table of `stripe.folding.latencies` with the number of folded gates, `folded`, in place of the
        name: what `plots.fold_pareto` takes beside `variants`.

        Raises:
            ValueError: an unknown backend, or a network that takes more than one tensor.
        """
        if not isinstance(self.images, Tensor):
            raise ValueError(f"the network takes {type(self.images).__name__}; only one tensor of images can be timed")
        timed = sorted(self.networks if counts is None else set(counts) & set(self.networks))
        networks = {str(count): self.networks[count] for count in timed}
        table = latencies(networks, self.images, backends=backends, batches=batches)
        return table.assign(network=table["network"].astype(int)).rename(columns={"network": "folded"})

    def _repr_html_(self) -> str:
        """Show in a notebook what was chosen, and every variant."""
        chosen = f"<p><b>{self.chosen.folded} of {len(self.gates)}</b> gates folded"
        chosen += f" ({self.chosen.weighting}, {self.chosen.recovery}); {self.measure} in %</p>"
        return chosen + self.variants.to_html(index=False, float_format="{:.4g}".format)


def study(
    model: nn.Module,
    images: Images,
    calibration: Iterable[Sequence[Tensor]],
    held_out: Batches,
    max_drop: float | None = MAX_DROP,
    *,
    keep: int | None = None,
    counts: Sequence[int] | None = None,
    order: str = "single",
    weightings: Sequence[str] = WEIGHTINGS,
    means: Constants | None = None,
    recoveries: Mapping[str, Recovery] | None = None,
    recover_each: bool = False,
    test: Batches | None = None,
    measure: str = "accuracy",
    normalisers: Collection[str] = (),
    progress: Progress = iter,
    callback: Callable[[Mapping[str, Any]], None] | None = None,
) -> Study:
    """Fold a trained network's gates, the least sensitive first, as far as the held-out images allow.

    Every gate is put at its constant alone to see what that costs; in this order more and more gates are folded, and
    each network is measured. The one chosen has the most gates folded at a cost of at most `max_drop`.

    Args:
        model: the trained network, in eval mode; it is left as it is.
        images: a small batch as `find_gates` takes it.
        calibration: batches (images, ...) to measure the gates on; read several times.
        held_out: batches (images, labels, ...) to order and choose by, in the same order each time.
        max_drop: percentage points that folding may cost on `held_out`; None: fold all gates.
        keep: leave this many of the most sensitive gates as they are, whatever the others cost; `max_drop` is then
            not used.
        counts: numbers of folded gates to try (default: up to 9, from none to all).
        order: "single" orders the gates by what each costs alone, "greedy" by what each costs beside those before it.
        weightings: which constants to compare, of "mean" and "energy".
        means: the "mean" constants by gate, such as `mean_constants` of a run (default: measured on `calibration`).
        recoveries: what may win back accuracy, by name (default: batch norms re-estimated on `calibration`).
        recover_each: try the recoveries at every number of folded gates, not only at the chosen one.
        test: batches like `held_out` on which each variant is measured too, but nothing is chosen.
        measure: "accuracy" by the labels, or "agreement" with the predictions of `model`, for which no labels are read.
        normalisers: ATen names of functions to be taken as bounded, as in `find_gates`.
        progress: wraps the iterators over batches and gates.
        callback: called with each row of `Study.variants` as soon as it is measured.

    Raises:
        ValueError: an unknown order, measure or weighting, an impossible count, means that lack a gate, batches that
            can be read only once, a network in train mode or without gates.

    Example:
        >>> import torch, stripe
        >>> from stripe.data import Loader, load_images
        >>> _ = torch.manual_seed(0)
        >>> model = stripe.models.create_model("resnet", depth=11, module="senet").eval()
        >>> train, held_out = load_images("digits", "train", samples=60).hold_out(20, seed=0)
        >>> images = next(iter(Loader(held_out, 2)))[0]
        >>> choice = stripe.folding.study(model, images, Loader(train, 20), Loader(held_out, 20), max_drop=None)
        >>> choice.chosen.folded
        3
        >>> stripe.find_gates(choice.chosen.network, images)
        []
        >>> ax = stripe.plots.fold_pareto(choice.variants)
    """
    _require_choices(order, measure, max_drop, {"calibration": calibration, "held_out": held_out, "test": test})
    if model.training:
        raise ValueError("the network is in train mode, where statistics change: call model.eval() before study")
    gates = find_gates(model, images, normalisers=normalisers)
    counts = _counts(counts, len(gates), keep)
    uses = measure_gates(model, gates, calibration, progress=progress)
    constants = _constants(uses, weightings, means)
    loaders = {"validation": held_out} | ({} if test is None else {"test": test})
    metrics = {name: MEASURES[measure](model, batches) for name, batches in loaders.items()}
    damage, names = _order(order, model, gates, uses, metrics["validation"], progress)
    trials = _Trials(model, images, names, constants, metrics, callback, normalisers)
    if recoveries is None:
        recoveries = {"re-estimated": partial(reestimate_norms, loader=calibration)}
    trials.add(counts, {**AS_FOLDED, **recoveries} if recover_each else AS_FOLDED)
    count = len(gates) - keep if keep is not None else most_folded(trials.rows, max_drop)
    if not recover_each:
        trials.add([count], recoveries)
    chosen = trials.best[count]
    return Study(
        gates=_describe_gates(chosen, uses, damage, names),
        variants=pd.DataFrame(trials.rows),
        predictors=rank_correlations(uses, damage),
        chosen=chosen,
        measure=measure,
        networks={folded: variant.network for folded, variant in sorted(trials.best.items())},
        images=images,
    )


def most_folded(rows: Iterable[Mapping[str, Any]], max_drop: float | None) -> int:
    """Return the largest number of folded gates that costs at most `max_drop` points against the first row."""
    rows = list(rows)
    least = -float("inf") if max_drop is None else rows[0]["validation"] - max_drop
    return max(int(row["folded"]) for row in rows if row["validation"] >= least)


# ---- what is asked for -----------------------------------------------------------------------------------


def _require_choices(order: str, measure: str, max_drop: float | None, batches: Mapping[str, Any]) -> None:
    if order not in ORDERS:
        raise ValueError(f"order '{order}': expected one of {', '.join(ORDERS)}")
    if measure not in MEASURES:
        raise ValueError(f"measure '{measure}': expected one of {', '.join(MEASURES)}")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop {max_drop}: expected points of at least 0, or None to fold all gates")
    for name, given in batches.items():
        if isinstance(given, Iterator):
            raise ValueError(f"{name} can be read only once: pass a list or a loader, which can be read again")


def _counts(counts: Sequence[int] | None, gates: int, keep: int | None) -> list[int]:
    """Return the numbers of folded gates to try; 0 is always among them, and so is what `keep` leaves."""
    if not gates:
        raise ValueError("the network has no gate to fold: see stripe.gates.explain_gates for what was looked at")
    if counts is None and keep is None:
        steps = min(gates, MOST_COUNTS - 1)
        counts = [round(step * gates / steps) for step in range(steps + 1)]
    asked = [*(counts or []), *([] if keep is None else [gates - keep])]
    if not all(0 <= count <= gates for count in asked):
        raise ValueError(f"{', '.join(map(str, asked))} gates to fold: expected 0 to {gates}, which the network has")
    return sorted({0, *asked})


def _constants(uses: Mapping[str, GateUse], weightings: Sequence[str], means: Constants | None) -> dict[str, Constants]:
    """Return the constants of every gate by weighting."""
    constants: dict[str, Constants] = {
        kind: {gate: use.constant(kind) for gate, use in uses.items()} for kind in weightings
    }
    if means is not None and "mean" in constants:
        if missing := uses.keys() - means.keys():
            raise ValueError(f"the means lack gates {', '.join(sorted(missing))}: record every gate of the network")
        constants["mean"] = {gate: means[gate] for gate in uses}
    return constants


# ---- how good a network is -------------------------------------------------------------------------------


def _accuracy(model: nn.Module, batches: Batches) -> Metric:
    """Return the metric of the share of labels that a network predicts, in percent."""
    return lambda network: evaluate(network, batches).accuracy


def _agreement(model: nn.Module, batches: Batches) -> Metric:
    """Return the metric of the share of `model`'s own predictions that a network repeats, in percent."""
    first, wanted = _predictions(model, batches)

    def agreement(network: nn.Module) -> float:
        images, given = _predictions(network, batches)
        if not torch.equal(images, first):
            raise ValueError(
                "the held-out batches differ from one pass to the next: pass a loader that does not shuffle"
            )
        return 100 * float((given == wanted).double().mean())

    return agreement


MEASURES: Mapping[str, Callable[[nn.Module, Batches], Metric]] = {"accuracy": _accuracy, "agreement": _agreement}
"""What a network's worth is measured by: makes the metric of the original network and the batches."""


def _predictions(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return the first batch's images and the class that the network predicts for each image, (N,)."""
    device = device_of(model)
    first, classes = None, []
    with torch.inference_mode():
        for images, *_ in batches:
            first = images if first is None else first
            classes.append(model(images.to(device)).argmax(1).cpu())
    if first is None:
        raise ValueError("the held-out batches are empty: expected at least one batch")
    return first, torch.cat(classes)


# ---- order and variants ----------------------------------------------------------------------------------


def _order(
    order: str,
    model: nn.Module,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    metric: Metric,
    progress: Progress,
) -> tuple[dict[str, float], list[str]]:
    """Return each gate's damage alone, and the order in which they are folded; equal damage goes by energy error."""
    constants = {name: use.constant("energy") for name, use in uses.items()}
    damage = sensitivity(model, gates, constants, metric, progress=progress)
    if order == "greedy":
        return damage, greedy_order(model, gates, constants, metric, damage=damage, progress=progress)
    return damage, sorted(uses, key=lambda name: (damage[name], uses[name].error(constants[name])))


@dataclass
class _Trials:
    """The variants tried so far: a row for each, and the best on the held-out images of each number of folded gates."""

    model: nn.Module
    images: Images
    order: Sequence[str]
    constants: Mapping[str, Constants]
    metrics: Mapping[str, Metric]
    callback: Callable[[Mapping[str, Any]], None] | None
    normalisers: Collection[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[int, Variant] = field(default_factory=dict)
    highest: dict[int, float] = field(default_factory=dict)

    def add(self, counts: Sequence[int], recoveries: Mapping[str, Recovery]) -> None:
        """Make the variants of these numbers of folded gates, and measure them."""
        options: Any = {"counts": counts, "recoveries": recoveries, "normalisers": self.normalisers}
        made = variants(self.model, self.images, self.order, self.constants, **options)
        for variant in made:
            row: dict[str, Any] = {
                "folded": variant.folded,
                "last": self.order[variant.folded - 1] if variant.folded else "",
                "weighting": variant.weighting,
                "recovery": variant.recovery,
                **{name: metric(variant.network) for name, metric in self.metrics.items()},
                "error": variant.report.error if variant.report else 0.0,
            }
            self.rows.append(row)
            if variant.folded not in self.best or row["validation"] > self.highest[variant.folded]:
                self.best[variant.folded], self.highest[variant.folded] = variant, row["validation"]
            if self.callback:
                self.callback(row)


def _describe_gates(
    chosen: Variant, uses: Mapping[str, GateUse], damage: Mapping[str, float], order: Sequence[str]
) -> pd.DataFrame:
    """Return a row per gate: its place, what could have predicted its damage, the damage, where its constant went."""
    table = predictors(uses).assign(damage=[damage[gate] for gate in uses])
    table.insert(0, "place", [order.index(str(gate)) + 1 for gate in table.index])
    if chosen.report is not None:
        merged = chosen.report.table.set_index("gate")
        table = table.join(merged.assign(into=merged["into"].str.join(", "), through=merged["through"].str.join(", ")))
    return table.reset_index()
