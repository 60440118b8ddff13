"""Which gates can be constant: what the network loses with each, the order to fold them in, and what predicts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn

from stripe.folding.uses import Constants, GateUse
from stripe.gates import Gate, replace_gates
from stripe.messages import Progress
from stripe.stats import coefficient_of_variation, stripe_strength

Metric = Callable[[nn.Module], float]
"""How good a network is, higher is better, such as minus its divergence from the original on held-out images."""

ORDERS = ("foretold", "single", "greedy")


def sensitivity(
    model: nn.Module, gates: Sequence[Gate], constants: Constants, metric: Metric, *, progress: Progress = iter
) -> dict[str, float]:
    """Return what the metric loses with each gate alone at its constant, by gate, in order of execution."""
    whole = metric(model)
    return {gate.name: whole - _metric_at(model, gates, constants, [gate.name], metric) for gate in progress(gates)}


def greedy_order(
    model: nn.Module,
    gates: Sequence[Gate],
    constants: Constants,
    metric: Metric,
    *,
    damage: Mapping[str, float],
    progress: Progress = iter,
) -> list[str]:
    """Order the gates so that each step takes the one whose constant costs least on top of those before it.

    Takes G (G + 1) / 2 - G - 1 evaluations for G gates; the first step is read from `damage`, that of each gate
    alone. Of equals, the first in order of execution goes first.
    """
    left = [gate.name for gate in gates]
    order = [min(left, key=lambda name: damage[name])]
    left.remove(order[0])
    for _ in progress(range(len(left) - 1)):
        kept = {name: _metric_at(model, gates, constants, [*order, name], metric) for name in left}
        order.append(max(left, key=kept.__getitem__))
        left.remove(order[-1])
    return order + left


def _metric_at(
    model: nn.Module, gates: Sequence[Gate], constants: Constants, names: Sequence[str], metric: Metric
) -> float:
    """Return the metric with some gates at their constants."""
    with replace_gates(model, gates, {name: torch.tensor(np.array(constants[name])).float() for name in names}):
        return metric(model)


PREDICTORS: dict[str, Callable[[GateUse], float]] = {
    "energy error": lambda use: use.error(use.constant("energy")),
    "CV": lambda use: coefficient_of_variation(use.values),
    "within": lambda use: stripe_strength(use.values).within,
    "1 - strength": lambda use: 1 - stripe_strength(use.values).strength,
}
"""What could predict a gate's damage before it is measured; larger should mean more damage."""


def predictors(uses: Mapping[str, GateUse], foretold: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Return the value of each predictor, a row per gate, a column per predictor.

    `foretold` is the divergence that `foretell` predicts, by gate; without it there is no such column.
    """
    columns = {} if foretold is None else {"foretold": [foretold[name] for name in uses]}
    columns |= {name: [predict(use) for use in uses.values()] for name, predict in PREDICTORS.items()}
    return pd.DataFrame(columns, index=pd.Index(list(uses), name="gate"))


def rank_correlations(
    uses: Mapping[str, GateUse], damage: Mapping[str, float], foretold: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Compare each predictor with the measured damage: columns predictor, rho (Spearman), p, gates.

    rho is NaN for fewer than three gates, or where all values are equal; without any damage there are no rows.
    """
    rows: list[tuple[str, float, float, int]] = []
    for name, values in predictors(uses, foretold).items() if damage else ():
        measured = [damage[gate] for gate in values.index]
        varied = len(values) > 2 and values.nunique() > 1 and len(set(measured)) > 1
        rho, p = spearmanr(values, measured) if varied else (float("nan"), float("nan"))
        rows.append((str(name), float(rho), float(p), len(values)))
    return pd.DataFrame(rows, columns=["predictor", "rho", "p", "gates"])
