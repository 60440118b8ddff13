"""Fold until it costs too much: order the gates, fold more and more of them, recover, measure and choose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor, nn

from stripe.folding.comparing import AS_FOLDED, AS_IS, Recovery, Variant, variants
from stripe.folding.constants import Forecast, fit_matrices, foretell, learn_constants, measure_gates
from stripe.folding.divergence import VALUES, Damage, damage, kind_of
from stripe.folding.latency import BACKENDS, BATCHES, latencies
from stripe.folding.ordering import ORDERS, Metric, greedy_order, predictors, rank_correlations, sensitivity
from stripe.folding.recovery import reestimate_norms
from stripe.folding.uses import AVERAGES, Constants, GateUse
from stripe.gates import Gate, find_gates
from stripe.gates.hooks import copied
from stripe.gates.trace import Images
from stripe.messages import Progress
from stripe.recipe import CONSTANTS, LEARNING_STEPS
from stripe.training import Batches

MOST_COUNTS = 9  # how many numbers of folded gates are tried by default
MAX_DROP = 0.5  # points of the measure that folding may cost
CONTROL_DROP = 0.1  # points of accuracy that a recovery may cost a network with nothing folded
MEASURES = ("accuracy", "agreement", "cosine")


@dataclass(frozen=True, eq=False)
class Study:
    """What folding costs a network, and the variant that was chosen.

    Attributes:
        gates: a row per gate: gate, place (in the order of folding, from 1), damage (the divergence from the original
            with this gate alone at its energy constant; missing in the order "foretold"), the predictors of the damage
            (columns of `predictors`), and where the chosen variant merged the constant (columns of
            `FoldReport.table`; missing where the gate was not folded).
        variants: a row per network tried: folded (number of gates), last (the gate folded last), weighting (the kind
            of its constants), recovery, divergence (from the original, on the held-out images, as in `Damage`),
            validation (the measure in percent, on the same images), test_divergence and test (the same two on the test
            batches, if there are any), and error (the merge's relative error). The rows without a folded gate are the
            controls of the recoveries.
        predictors: how well each predictor ranks the damage, as `rank_correlations` gives it; empty without damage.
        chosen: the variant with the most gates folded within the allowed drop and, of several, the one nearest to the
            original; its `network` is ready for use.
        measure: the measure in validation and test: "accuracy", "agreement" or "cosine".
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
        """Time one network for each number of folded gates; its variants differ only in the values of their weights.

        Returns the table of `stripe.folding.latencies` with the number of folded gates, `folded`, in place of the
        network's name. `plots.fold_pareto` takes this table beside `variants`.

        Raises:
            ValueError: an unknown backend, or a network that takes more than one tensor.
        """
        if not isinstance(self.images, Tensor):
            raise ValueError(f"the network takes {type(self.images).__name__}; only one tensor of images can be timed")
        timed = sorted(self.networks if counts is None else set(counts) & set(self.networks))
        networks = {str(count): self.networks[count] for count in timed}
        table = latencies(networks, self.images, backends=backends, batches=batches)
        return table.assign(network=table["network"].astype(int)).rename(columns={"network": "folded"})

    def summary(self) -> str:
        """Say in one sentence what was chosen and what it costs."""
        is_chosen = (self.variants[["folded", "weighting", "recovery"]] == self._key()).all(axis=1)
        row, first = self.variants[is_chosen].iloc[0], self.variants.iloc[0]
        return (
            f"{self.chosen.folded} of {len(self.gates)} gates folded ({self.chosen.weighting}, {self.chosen.recovery}):"
            f" divergence {row['divergence']:.3g}, {self.measure} {row['validation']:.2f} %"
            f" of {first['validation']:.2f} % before"
        )

    def _key(self) -> list[Any]:
        return [self.chosen.folded, self.chosen.weighting, self.chosen.recovery]

    def _repr_html_(self) -> str:
        """Show in a notebook what was chosen, and every variant."""
        return f"<p>{self.summary()}</p>" + self.variants.to_html(index=False, float_format="{:.4g}".format)


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
    weightings: Sequence[str] = CONSTANTS,
    means: Constants | None = None,
    learning_steps: int = LEARNING_STEPS,
    recoveries: Mapping[str, Recovery] | None = None,
    recover_each: bool = False,
    test: Batches | None = None,
    measure: str | None = None,
    outputs: str | None = None,
    normalisers: Collection[str] = (),
    progress: Progress = iter,
    callback: Callable[[Mapping[str, Any]], None] | None = None,
) -> Study:
    """Fold a trained network's gates, the least sensitive first, as far as the held-out images allow.

    To order the gates, each one alone is set to its constant, and the outputs are compared with the original's, which
    needs no labels. In this order more and more gates are folded, with each kind of constants, and each network is
    measured. The chosen network has the most gates folded at a cost of at most `max_drop` and, of several, the least
    divergence. A recovery is shown but never chosen if, with nothing folded, it costs accuracy or moves the outputs
    farther than folding does.

    Args:
        model: the trained network, in eval mode; it is left as it is.
        images: a small batch as `find_gates` takes it.
        calibration: batches (images, ...) to measure the gates on; read several times.
        held_out: batches (images, labels, ...) to order and choose by; labels may be missing, or -1 for none.
        max_drop: percentage points that folding may cost on `held_out`; None: fold all gates.
        keep: leave this many of the most sensitive gates as they are, whatever the others cost; `max_drop` is then
            not used.
        counts: numbers of folded gates to try (default: up to 9, from none to all).
        order: "single" orders the gates by what each costs alone, "greedy" by what each costs on top of those before
            it, "foretold" by what one backward pass over `calibration` predicts, without measuring any gate alone.
        weightings: which kinds of constants to compare: some of "mean", "energy", "fisher", "learned" and "matrix".
        means: the "mean" constants by gate, such as `mean_constants` of a run (default: measured on `calibration`).
        learning_steps: batches on which "learned" constants are trained, for each number of folded gates.
        recoveries: what may win back accuracy, by name (default: batch norms re-estimated on `calibration`).
        recover_each: try the recoveries with every kind of constants at every number of folded gates, not only with
            the best at the chosen one.
        test: batches like `held_out` on which each variant is measured as well; they choose nothing.
        measure: what `max_drop` counts: "accuracy" by the labels, "agreement" with the predictions of `model`, or, for
            outputs that are not class scores, "cosine" (default: the first that the network and the labels allow).
        outputs: the kind of the network's output, "classes" or "values" (default: found by `kind_of`).
        normalisers: ATen names of functions to be taken as bounded, as in `find_gates`.
        progress: wraps the iterators over batches and gates.
        callback: called with each row of `Study.variants` as soon as it is measured.

    Raises:
        ValueError: an unknown order, measure, kind of outputs or weighting, an impossible count, means
            that lack a gate, batches that can be read only once, a network in train mode or without gates.

    Example:
        >>> import torch, stripe
        >>> from stripe.data import Loader, load_images
        >>> _ = torch.manual_seed(0)
        >>> model = stripe.models.create_model("resnet", depth=8, block="basicblock", module="senet").eval()
        >>> train, held_out = load_images("digits", "train", size=16, samples=60).hold_out(20, seed=0)
        >>> images = next(iter(Loader(held_out, 2)))[0]
        >>> choice = stripe.folding.study(
        ...     model, images, Loader(train, 20), Loader(held_out, 20), max_drop=None, learning_steps=20
        ... )
        >>> choice.chosen.folded
        3
        >>> stripe.find_gates(choice.chosen.network, images)
        no gates
        >>> ax = stripe.plots.fold_pareto(choice.variants)
    """
    _require_eval(model)
    _require_choices(order, measure, weightings, max_drop)
    _require_rereadable(calibration=calibration, held_out=held_out, test=test)
    gates = find_gates(model, images, normalisers=normalisers)
    counts = _counts(counts, len(gates), keep)
    kind = outputs or kind_of(model, images)
    original = copied(model)  # the network to judge may be `model` itself with its gates replaced
    loaders = {"validation": held_out} | ({} if test is None else {"test": test})
    judges = {name: _Judge(original, batches, kind) for name, batches in loaders.items()}
    measure = _measure(measure, kind, judges["validation"](original))
    uses = measure_gates(model, gates, calibration, progress=progress)
    energy = {gate: use.constant("energy") for gate, use in uses.items()}
    asked: Any = {"kind": kind, "normalisers": normalisers, "progress": progress}
    forecasts = foretell(model, gates, energy, images, calibration, **asked)
    foretold = {gate: each.divergence for gate, each in forecasts.items()}
    learn = partial(learn_constants, model, uses=uses, images=images, loader=calibration, steps=learning_steps, **asked)
    fit = partial(fit_matrices, model, uses=uses, loader=calibration, progress=progress)
    constants = _Constants(gates, uses, forecasts, means, {"learned": learn, "matrix": fit})
    damages, names = _order(order, model, gates, uses, foretold, judges["validation"].negative, progress)
    allowed = None if keep is not None else max_drop
    trials = _Trials(model, images, names, constants, judges, measure, allowed, callback, normalisers)
    recoveries = {"re-estimated": partial(reestimate_norms, loader=calibration)} if recoveries is None else recoveries
    for count in counts:
        trials.add(count, weightings, {**AS_FOLDED, **recoveries} if recover_each else AS_FOLDED)
    count = len(gates) - keep if keep is not None else most_folded(trials.rows, max_drop)
    if not recover_each and count:
        trials.add(0, [], recoveries)
        trials.add(count, [trials.best[count].weighting], recoveries)
    chosen = trials.best[count]
    return Study(
        gates=_describe_gates(chosen, predictors(uses, foretold), damages, names),
        variants=pd.DataFrame(trials.rows),
        predictors=rank_correlations(uses, damages, foretold),
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


# ---- checks of the arguments -----------------------------------------------------------------------------


def _require_eval(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the network is in train mode, where statistics change: call model.eval() before study")


def _require_choices(order: str, measure: str | None, weightings: Sequence[str], max_drop: float | None) -> None:
    if order not in ORDERS:
        raise ValueError(f"order '{order}': expected one of {', '.join(ORDERS)}")
    if measure is not None and measure not in MEASURES:
        raise ValueError(f"measure '{measure}': expected one of {', '.join(MEASURES)}")
    if unknown := [kind for kind in weightings if kind not in CONSTANTS]:
        raise ValueError(f"no weighting '{unknown[0]}'; expected some of {', '.join(CONSTANTS)}")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop {max_drop}: expected points of at least 0, or None to fold all gates")


def _require_rereadable(**batches: Any) -> None:
    for name, given in batches.items():
        if isinstance(given, Iterator):
            raise ValueError(f"{name} can be read only once: pass a list or a loader, which can be read again")


def _counts(counts: Sequence[int] | None, gates: int, keep: int | None) -> list[int]:
    """Return the numbers of folded gates to try: always 0 and, with `keep`, the number that it leaves to fold."""
    if not gates:
        raise ValueError("the network has no gate to fold: see stripe.gates.explain_gates for what was looked at")
    if counts is None and keep is None:
        steps = min(gates, MOST_COUNTS - 1)
        counts = [round(step * gates / steps) for step in range(steps + 1)]
    asked = [*(counts or []), *([] if keep is None else [gates - keep])]
    if not all(0 <= count <= gates for count in asked):
        raise ValueError(f"{', '.join(map(str, asked))} gates to fold: expected 0 to {gates}, which the network has")
    return sorted({0, *asked})


class _Constants:
    """The constants of some gates, by kind; kinds that depend on which gates are folded are made once for each set."""

    def __init__(
        self,
        gates: Sequence[Gate],
        uses: Mapping[str, GateUse],
        forecasts: Mapping[str, Forecast],
        means: Constants | None,
        together: Mapping[str, Callable[[Sequence[Gate]], Constants]],
    ) -> None:
        if means is not None and (missing := uses.keys() - means.keys()):
            raise ValueError(f"the means lack gates {', '.join(sorted(missing))}: record every gate of the network")
        self._gates, self._together = gates, together
        self._fixed: dict[str, Constants] = {
            kind: {gate: use.constant(kind) for gate, use in uses.items()} for kind in AVERAGES
        }
        self._fixed["fisher"] = {gate: each.constant for gate, each in forecasts.items()}
        if means is not None:
            self._fixed["mean"] = {gate: means[gate] for gate in uses}
        self._made: dict[tuple[str, frozenset[str]], Constants] = {}

    def __call__(self, folded: Sequence[str], kind: str) -> Constants:
        """Return the constants of this kind for gates that are folded together."""
        if kind in self._fixed:
            return self._fixed[kind]
        key = kind, frozenset(folded)
        if key not in self._made:
            self._made[key] = self._together[kind]([gate for gate in self._gates if gate.name in key[1]])
        return self._made[key]


# ---- how good a network is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Measures networks against the original on some batches."""

    original: nn.Module
    batches: Batches
    kind: str

    def __call__(self, network: nn.Module) -> Damage:
        return damage(network, self.original, self.batches, kind=self.kind)

    def negative(self, network: nn.Module) -> float:
        """Return minus the divergence: a metric, so that higher is better."""
        return -self(network).divergence


def _measure(asked: str | None, kind: str, whole: Damage) -> str:
    """Return the measure to take in percent beside the divergence; `whole` is the original's own `Damage`."""
    classes = ("accuracy", "agreement") if whole.accuracy is not None else ("agreement",)
    allowed = ("cosine",) if kind == VALUES else classes
    if asked is None:
        return allowed[0]
    if asked not in allowed:
        raise ValueError(
            f"measure '{asked}': the network gives {kind} and the held-out labels are"
            f" {'some' if whole.accuracy is not None else 'none'} of them; expected one of {', '.join(allowed)}"
        )
    return asked


def _in_percent(measure: str, found: Damage) -> float:
    return found.accuracy if measure == "accuracy" and found.accuracy is not None else found.fidelity


# ---- order and variants ----------------------------------------------------------------------------------


def _order(
    order: str,
    model: nn.Module,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    foretold: Mapping[str, float],
    metric: Metric,
    progress: Progress,
) -> tuple[dict[str, float], list[str]]:
    """Return the damage of each gate alone, if it was measured, and the order in which to fold the gates."""
    if order == "foretold":
        return {}, sorted(uses, key=lambda name: foretold[name])
    constants = {name: use.constant("energy") for name, use in uses.items()}
    alone = sensitivity(model, gates, constants, metric, progress=progress)
    if order == "greedy":
        return alone, greedy_order(model, gates, constants, metric, damage=alone, progress=progress)
    return alone, sorted(uses, key=lambda name: (alone[name], foretold[name]))


@dataclass
class _Trials:
    """The variants tried so far: a row for each, and the best on the held-out images per number of folded gates."""

    model: nn.Module
    images: Images
    order: Sequence[str]
    constants: Callable[[Sequence[str], str], Constants]
    judges: Mapping[str, _Judge]
    measure: str
    max_drop: float | None
    callback: Callable[[Mapping[str, Any]], None] | None
    normalisers: Collection[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[int, Variant] = field(default_factory=dict)
    _worth: dict[int, tuple[bool, float]] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """Return the lowest acceptable value of the measure, in percent."""
        return -float("inf") if self.max_drop is None else self.rows[0]["validation"] - self.max_drop

    def add(self, count: int, kinds: Sequence[str], recoveries: Mapping[str, Recovery]) -> None:
        """Fold this number of gates with each kind of constants, recover, and measure."""
        folded = self.order[:count]
        constants = {kind: self.constants(folded, kind) for kind in kinds} if count else {}
        options: Any = {"counts": [count], "recoveries": recoveries, "normalisers": self.normalisers}
        made = variants(self.model, self.images, self.order, constants, **options)
        for variant in made:
            row = self._row(variant)
            self.rows.append(row)
            worth = row["validation"] >= self.least, -row["divergence"]
            if count not in self.best or worth > self._worth[count] and not self._ruins(row):
                self.best[count], self._worth[count] = variant, worth
            if self.callback:
                self.callback(row)

    def _row(self, variant: Variant) -> dict[str, Any]:
        row: dict[str, Any] = {
            "folded": variant.folded,
            "last": self.order[variant.folded - 1] if variant.folded else "",
            "weighting": variant.weighting,
            "recovery": variant.recovery,
        }
        for name, judge in self.judges.items():
            found = judge(variant.network)
            row[f"{name}_divergence".removeprefix("validation_")] = found.divergence
            row[name] = _in_percent(self.measure, found)
        return row | {"error": variant.report.error if variant.report else 0.0}

    def _ruins(self, row: Mapping[str, Any]) -> bool:
        """Return whether a recovery with nothing folded costs accuracy, or more divergence than folding does."""
        if row["recovery"] == AS_IS or not row["folded"]:
            return False
        control = next(each for each in self.rows if not each["folded"] and each["recovery"] == row["recovery"])
        merely = [r for r in self.rows if r["folded"] == row["folded"] and r["recovery"] == AS_IS]
        farther = control["divergence"] > min(r["divergence"] for r in merely)
        falls = self.measure == "accuracy" and control["validation"] < self.rows[0]["validation"] - CONTROL_DROP
        return bool(farther or falls)


def _describe_gates(
    chosen: Variant, predicted: pd.DataFrame, damages: Mapping[str, float], order: Sequence[str]
) -> pd.DataFrame:
    """Return a row per gate: its place, its damage, the predictors of the damage, and where its constant was merged."""
    table = predicted.copy()
    if damages:
        table.insert(0, "damage", [damages[str(gate)] for gate in table.index])
    table.insert(0, "place", [order.index(str(gate)) + 1 for gate in table.index])
    if chosen.report is not None:
        merged = chosen.report.table.set_index("gate")
        table = table.join(merged.assign(into=merged["into"].str.join(", "), through=merged["through"].str.join(", ")))
    return table.reset_index()
