"""Do learned vectors match observed stripes? Every answer stands beside its controls.

Attention values are all positive, so a cosine is always near 1; correlations are judged against the untrained psi,
a permutation null and the best fit that the attention module can reach.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from stripe import stats
from stripe.asr.protocols import PROTOCOLS, Data, Fit, Task, Vectors
from stripe.messages import Progress
from stripe.recipe import PSI_STEPS
from stripe.store import Run

Observed = Mapping[str, npt.NDArray[Any]]  # by gate, (samples, channels)
MATCH_R, MATCH_P = 0.5, 0.05


# ---- what is found ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Learned vectors against observed stripes: `table` has a row per gate, `accuracies` are in percent.

    Accuracies are by what the gates give: "attention", what was "learned" (gates left out keep their attention), the
    "stripe" that was observed, and "removed", attention that changes nothing.
    """

    protocol: str
    rule: str
    epoch: int
    steps: int
    table: pd.DataFrame
    accuracies: dict[str, float]
    learned: Vectors = field(repr=False)
    observed: Observed = field(repr=False)

    @property
    def matched(self) -> bool:
        """Whether every gate that something was learned for matches by the rule, and there is one."""
        verdicts = self.table["verdict"][self.table["verdict"] != "left out"]
        return bool(len(verdicts) and (verdicts == "match").all())

    def _repr_html_(self) -> str:
        """Show each gate's correlation beside its controls, the accuracies and the rule, every name escaped."""
        head = html.escape(f"protocol {self.protocol}, epoch {self.epoch}, {self.steps} steps; {self.rule}")
        gates = self.table.drop(columns=["r2", "mean_abs_z", "inside", "p", "rmse_best"])
        accuracies = pd.DataFrame(self.accuracies, index=["accuracy (%)"]).round(2)
        tables = gates.to_html(index=False, float_format="{:.3g}".format) + accuracies.to_html()
        return f"<p><b>Validation</b> {head}</p>{tables}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the observed samples as plain values for JSON; NaN becomes None."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        head = {"protocol": self.protocol, "epoch": self.epoch, "steps": self.steps, "rule": self.rule}
        learned = {gate: vector.tolist() for gate, vector in self.learned.items()}
        return head | {"matched": self.matched, "accuracies": self.accuracies, "gates": rows, "learned": learned}


def validate(
    model: nn.Module,
    run: Run,
    loader: Data,
    *,
    steps: int = PSI_STEPS,
    protocol: str = "same",
    asr_model: nn.Module | None = None,
    train_attention: bool = False,
    test_loader: Data | None = None,
    epoch: int | None = None,
    progress: Progress = iter,
) -> Validation:
    """Compare the vectors that a network learned with the stripes of its run.

    Args:
        model: the network whose attention `run` recorded.
        run: its records. Gates that no gradient can reach are left out of training; the table says so.
        loader: training batches (images, labels, sample ids), repeated as often as needed.
        steps: training steps of psi for "same", batches to match channels on for "separate"; "both" takes none.
        protocol: "same" freezes the network and trains psi in each gate's place; "both" takes the vectors that
            `model` learned beside its gates; "separate" those of `asr_model`, channel matched to channel.
        asr_model: for "separate", the same network trained with ASR alone, in training form.
        train_attention: for "same", train the attention's weights along with psi.
        test_loader: batches for the accuracies; default `loader`.
        epoch: the run's epoch that belongs to `model`; default the last one.
        progress: wraps the iterator over the steps.

    Raises:
        ValueError: unknown protocol or epoch, an argument of another protocol, a gate of the run that the model
            does not have, or one without an ASR layer before it.
    """
    _check_request(protocol, steps, asr_model is not None, train_attention)
    epoch = run.epochs[-1] if epoch is None else epoch
    observed = {gate.name: run.attention(gate, epoch) for gate in run.gates}
    task = Task.of(
        model,
        asr_model,
        gates=run.gates,
        stripes={name: values.mean(axis=0, dtype=np.float64) for name, values in observed.items()},
        loader=loader,
        steps=steps,
        train_attention=train_attention,
        progress=progress,
    )
    fit, distance = PROTOCOLS[protocol](task), DISTANCES[protocol]
    accuracies = task.accuracies(fit.learned, loader if test_loader is None else test_loader)
    table = compare(fit, observed, distance)
    return Validation(protocol, rule(distance), epoch, steps, table, accuracies, fit.learned, observed)


def _check_request(protocol: str, steps: int, asr_model: bool, train_attention: bool) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{protocol}'; expected one of {', '.join(PROTOCOLS)}")
    if (protocol == "separate") != asr_model:
        received = "with" if asr_model else "without"
        raise ValueError(
            f"protocol '{protocol}' {received} a separate ASR network: 'separate' takes one, others do not"
        )
    if protocol == "separate" and steps < 1:
        raise ValueError(f"steps={steps}: 'separate' matches channels on at least one batch")
    if train_attention and protocol != "same":
        raise ValueError(f"protocol '{protocol}' trains nothing: training the attention too belongs to 'same'")


# ---- the comparison and the verdict ----------------------------------------------------------------------

DISTANCES = {"same": "rmse", "both": "rmse", "separate": "wasserstein"}
"""By protocol, the column that must be below the untrained psi's for a match."""


def rule(distance: str) -> str:
    """Say what makes a gate match."""
    return f"match: r >= {MATCH_R}, adjusted p < {MATCH_P}, and {distance} below the untrained psi's"


def compare(fit: Fit, observed: Observed, distance: str = "rmse") -> pd.DataFrame:
    """Compare vectors (C,) with attention (N, C) gate by gate, controls beside them: the Validation's table.

    Where nothing was learned for a gate, the controls that there are stand alone, `verdict` is "left out" and the
    column `left_out` says why.
    """
    rows = [_compared(fit, gate, values, distance) for gate, values in observed.items()]
    table = pd.DataFrame(rows)
    learned = table["gate"].isin(list(fit.learned))
    table["p_adjusted"] = np.nan
    table.loc[learned, "p_adjusted"] = stats.benjamini_hochberg(table.loc[learned, "p"].to_numpy())
    table["verdict"] = np.where(learned, verdicts(table, distance), "left out")
    if not learned.all():
        table["left_out"] = [fit.left_out.get(gate, "") for gate in table["gate"]]
    return table


def verdicts(table: pd.DataFrame, distance: str) -> npt.NDArray[np.str_]:
    """Return "match" or "no match" for every row of a comparison, (gates,)."""
    nearer = table[distance] < table[f"{distance}_untrained"]
    good = (table["r"] >= MATCH_R) & (table["p_adjusted"] < MATCH_P) & nearer
    return np.where(good, "match", "no match")


def _compared(fit: Fit, gate: str, values: npt.NDArray[Any], distance: str) -> dict[str, Any]:
    """Return a gate's row: what was learned, its controls, and what the protocol notes."""
    row: dict[str, Any] = {"gate": gate, "channels": values.shape[1]}
    blank = dict.fromkeys((column.name for column in fields(stats.Match)), np.nan)
    row |= vars(stats.match(fit.learned[gate], values)) if gate in fit.learned else blank
    for control, vectors in (("untrained", fit.untrained), ("best", fit.best)):
        reference = stats.match(vectors[gate], values, permutations=0) if gate in vectors else None
        row |= {f"{name}_{control}": getattr(reference, name, np.nan) for name in ("r", "rmse")}
    row |= fit.notes.get(gate, {})
    if distance == "wasserstein" and gate in fit.learned:
        stripe = values.mean(axis=0, dtype=np.float64)
        row["wasserstein"] = stats.wasserstein(fit.learned[gate], stripe)
        row["wasserstein_untrained"] = stats.wasserstein(fit.untrained[gate], stripe)
        row["p_wasserstein"] = stats.swap_test(fit.learned[gate], stripe)
    return row
