"""Do learned vectors match observed stripes? Every answer is shown with its controls.

A vector is judged by the error that it causes in the stripe's place, as a share of the scaled map's energy
(`stats.verdicts`). This distance is compared with the images' own distance from the stripe, with random vectors, and
with the best vector that the attention can reach. The divergence of the outputs is shown beside the verdict: psi cannot
learn anything in a gate on which the outputs hardly depend.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from stripe import stats
from stripe.asr.protocols import PROTOCOLS
from stripe.asr.task import Data, Fit, Task, Vectors
from stripe.messages import Progress
from stripe.recipe import PSI_STEPS, Recipe
from stripe.stats.verdicts import EQUIVALENT, SIGNIFICANT, VERDICTS, energy_distance, rank_p, verdict
from stripe.store import Run

Observed = Mapping[str, npt.NDArray[Any]]  # by gate, (samples, channels)
RULE = (
    f"match: the distance is at most that of the images, or {EQUIVALENT:g}, and below that of random vectors with "
    f"adjusted p < {SIGNIFICANT:g}"
)
LEGEND = {
    "distance": "share of the gate's output energy that is wrong with the learned vector in place of the stripe",
    "images": "the same of the images' own attention about its mean, or 0.001 if that is more: the limit for a match",
    "random": "the same of a random vector (median)",
    "best": "the same of the best vector that the attention can give",
    "p": "probability that a random vector comes as near, adjusted for the number of gates",
    "KL learned": "divergence of the outputs from the network's own, with the learned vector in this gate alone",
    "KL stripe": "the same with the stripe",
    "KL removed": "the same with the gate taken out: how much depends on this gate at all",
    "map r": "mean correlation of the maps of the channels that were matched",
}
"""What the columns of `Validation.summary` mean."""
_COLUMNS = {"distance": "distance", "images": "limit", "random": "random", "best": "distance_best", "p": "p_adjusted"}
_COLUMNS |= {"KL learned": "kl_learned", "KL stripe": "kl_stripe", "KL removed": "kl_removed", "map r": "map_r"}

_WITH = {"attention": "with the network's attention", "learned": "with the learned vectors"}
_WITH |= {"stripe": "with the stripes", "removed": "with the gates taken out"}
_WITH |= {"asr": "of the ASR network", "asr deployed": "of it deployed"}


# ---- what is found ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Learned vectors against observed stripes: `table` has a row per gate, `accuracies` are in percent.

    Accuracies are keyed by what the gates apply: their own "attention", the "learned" vectors (gates left out keep
    their attention), the observed "stripe", or "removed", attention that changes nothing. `learned` holds the vectors
    that stand in the stripe's place; for "both" and "separate" these are merged scales, in the gate's units.
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
        """Whether every gate with a learned vector is a match or trivial, and at least one is a match."""
        verdicts = set(self.table["verdict"]) - {"left out"}
        return "match" in verdicts and verdicts <= {"match", "trivial"}

    def summary(self) -> pd.DataFrame:
        """Return the columns of the table that the verdict follows from, named as LEGEND explains them."""
        about = {"gate": self.table["gate"], "channels": self.table["channels"]}
        columns = {name: self.table[column] for name, column in self._shown().items()}
        return pd.DataFrame(about | columns | {"verdict": self.table["verdict"]})

    def legend(self) -> list[str]:
        """Return a line for every column of `summary`, and for every verdict in it."""
        columns = [f"{name}: {LEGEND[name]}" for name in self._shown()]
        return [*columns, *(f'verdict "{word}": {meaning}' for word, meaning in self._verdicts().items())]

    def _shown(self) -> dict[str, str]:
        """Return the columns of the table that the summary shows, by their names in the summary."""
        known = {name: column for name, column in _COLUMNS.items() if column in self.table}
        return {name: column for name, column in known.items() if self.table[column].notna().any()}

    def _verdicts(self) -> dict[str, str]:
        found = set(self.table["verdict"])
        return {word: meaning for word, meaning in VERDICTS.items() if word in found}

    def conclusion(self) -> str:
        """Say in a few sentences what was found."""
        counts = self.table["verdict"].value_counts()
        words = [f"{counts[word]} {word}" for word in (*VERDICTS, "left out") if word in counts]
        accuracies = ", ".join(f"{percent:.2f} {_WITH.get(name, name)}" for name, percent in self.accuracies.items())
        parts = [f"Of {len(self.table)} gates: {', '.join(words)}.", *self._drift(), f"Accuracy in %: {accuracies}."]
        return " ".join(parts)

    def _drift(self) -> list[str]:
        """Say where training moved psi away from a stripe that it began at, and whether this changes the outputs."""
        away = (self.table["distance_untrained"] <= self.table["limit"]) & (
            self.table["distance"] > self.table["limit"]
        )
        if not away.any():
            return []
        left = self.table[away]
        kl = {name: left[f"kl_{name}"].mean() for name in ("learned", "stripe", "removed")}
        flat = kl["learned"] < 2 * kl["stripe"] or kl["learned"] < 0.1 * kl["removed"]
        why = "the loss is nearly flat there" if flat else "the outputs do change there"
        kls = f"{kl['learned']:.2g} with the learned vector, {kl['stripe']:.2g} with the stripe"
        return [
            f"In {', '.join(left['gate'])} psi began at the stripe and drifted away in training: {why} "
            f"(mean KL {kls}, {kl['removed']:.2g} with the gate taken out)."
        ]

    def _repr_html_(self) -> str:
        """Show the summary, its legend, the accuracies and the conclusion, every name escaped."""
        head = html.escape(f"protocol {self.protocol}, epoch {self.epoch}, {self.steps} steps; {self.rule}")
        accuracies = pd.DataFrame(self.accuracies, index=["accuracy (%)"]).round(2)
        tables = self.summary().to_html(index=False, float_format="{:.3g}".format) + accuracies.to_html()
        legend = "<br>".join(map(html.escape, self.legend()))
        return f"<p><b>Validation</b> {head}</p>{tables}<p>{html.escape(self.conclusion())}</p><p>{legend}</p>"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the observed samples as plain values for JSON; NaN becomes None."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        head = {"protocol": self.protocol, "epoch": self.epoch, "steps": self.steps, "rule": self.rule}
        found = {"matched": self.matched, "conclusion": self.conclusion(), "accuracies": self.accuracies}
        learned = {gate: vector.tolist() for gate, vector in self.learned.items()}
        columns = {column: LEGEND[name] for name, column in self._shown().items()}
        legend = {"gates": columns, "verdict": self._verdicts()}
        return head | found | {"gates": rows, "legend": legend, "learned": learned}


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
    amp: str = Recipe.amp,
    progress: Progress = iter,
) -> Validation:
    """Compare the vectors that a network learned with the stripes of its run.

    Args:
        model: the network whose attention `run` recorded.
        run: the records of that attention. Gates that no gradient can reach are left out of training, which the table
            says.
        loader: training batches (images, labels, sample ids), repeated as often as needed.
        steps: training steps of psi for "same", batches to match channels on for "separate"; "both" takes none.
        protocol: "same" freezes the network and trains psi in each gate's place; "both" takes the vectors that
            `model` learned beside its gates; "separate" takes those of `asr_model`, with its channels matched to
            those of `model`.
        asr_model: for "separate", the same network trained with ASR alone, in training form.
        train_attention: for "same", train the attention's weights along with psi.
        test_loader: batches for the accuracies; what each gate scales, and how far the outputs move with one gate at
            a constant, is measured on the first images; default `loader`.
        epoch: the run's epoch that belongs to `model`; default the last one.
        amp: "bf16" trains psi and measures the accuracies in bfloat16, with coarser rounding but several times as fast
            on a processor or GPU that supports it. psi, its vectors and every distance stay in full precision.
        progress: wraps the iterator over the steps.

    Raises:
        ValueError: unknown protocol, epoch or `amp`, an argument of another protocol, a gate of the run that the model
            does not have, or, for "both" and "separate", a gate without an ASR layer before it.
    """
    _check_request(protocol, steps, asr_model is not None, train_attention)
    if amp not in ("no", "bf16"):
        raise ValueError(f"amp '{amp}': expected no or bf16")
    epoch, test_loader = run.epochs[-1] if epoch is None else epoch, loader if test_loader is None else test_loader
    observed = {gate.name: run.attention(gate, epoch) for gate in run.gates}
    task = Task.of(
        model,
        asr_model,
        gates=run.gates,
        stripes={name: values.mean(axis=0, dtype=np.float64) for name, values in observed.items()},
        loader=loader,
        test_loader=test_loader,
        steps=steps,
        train_attention=train_attention,
        amp=amp,
        progress=progress,
        quicken=protocol == "same" and not train_attention,
    )
    fit = PROTOCOLS[protocol](task)
    table = tabulate(fit, observed, task)
    accuracies = task.accuracies(fit.learned, test_loader)
    return Validation(protocol, RULE, epoch, steps, table, accuracies, fit.learned, observed)


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


def tabulate(fit: Fit, observed: Observed, task: Task) -> pd.DataFrame:
    """Return the Validation's table: what was learned compared with attention (N, C) gate by gate, and the controls.

    If nothing was learned for a gate, its row holds only the controls that exist, `verdict` is "left out", and the
    column `left_out` says why.
    """
    outputs = task.divergences(fit.learned)
    rows = [_compared(fit, gate, values, task) | outputs.get(gate, {}) for gate, values in observed.items()]
    table = pd.DataFrame(rows)
    table["p_adjusted"] = stats.benjamini_hochberg(table["p"].to_numpy())
    table["verdict"] = [_verdict(row) if row["gate"] in fit.learned else "left out" for _, row in table.iterrows()]
    if fit.left_out:
        table["left_out"] = [fit.left_out.get(gate, "") for gate in table["gate"]]
    return table


def _verdict(row: "pd.Series[Any]") -> str:
    best = 0.0 if np.isnan(row["distance_best"]) else row["distance_best"]
    chance = row["random_equivalent"]
    return verdict(row["distance"], limit=row["limit"], p=row["p_adjusted"], random=chance, best=best)


def _compared(fit: Fit, gate: str, values: npt.NDArray[Any], task: Task) -> dict[str, Any]:
    """Return a gate's row: what was learned, its controls, and what the protocol notes."""
    use, stripe = task.uses[gate], task.stripes[gate]
    limit, random = max(use.error(use.values.mean), EQUIVALENT), fit.random.get(gate, np.full(1, np.nan))
    row: dict[str, Any] = {"gate": gate, "channels": values.shape[1], "limit": limit}
    for control, vectors in (("", fit.learned), ("_untrained", fit.untrained), ("_best", fit.best)):
        found = stats.match(vectors[gate], values, permutations=0) if gate in vectors else None
        names = ("r", "rmse") if control else ("r", "r2", "rmse", "mean_abs_z", "inside")
        row |= {f"{name}{control}": getattr(found, name, np.nan) for name in names}
        away = energy_distance(vectors[gate], stripe, use.energy, use.result) if found else np.nan
        row[f"distance{control}"] = float(away)
    row |= {
        "random": float(np.median(random)),
        "random_equivalent": float(np.mean(np.where(np.isnan(random), np.nan, random <= limit))),
    }
    return row | {"p": rank_p(row["distance"], random)} | dict(fit.notes.get(gate, {}))
