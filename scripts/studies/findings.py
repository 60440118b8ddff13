"""What the studies found, question by question, from their records: README's summary, every figure of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from studies import comparison, growth
from studies.comparison import label
from studies.table import read

Finding = tuple[str, str]


def table(records: Path, setting: str, module: str, recorded: str) -> Iterator[Finding]:
    """Yield (question, what was found) by the trainings of a setting and by the recorded training `recorded`."""
    yield from _forms(records, setting, module)
    yield from _growth(records / recorded)
    yield from _match(records / recorded)
    yield from _fold(records / recorded / "fold")
    yield from _modules(records, setting)


def of_module(records: Path, setting: str, module: str) -> pd.DataFrame:
    """Return the rows of results.csv of a module and of the plain networks beside it.

    Raises:
        ValueError: there is no such setting and module.
    """
    parts = {(s, m): part for s, m, part in comparison.groups(read(records / "results.csv"))}
    if (setting, module) not in parts:
        known = ", ".join(" ".join(key) for key in parts)
        raise ValueError(f"results.csv holds no '{setting} {module}': expected one of {known}")
    return parts[setting, module]


def _forms(records: Path, setting: str, module: str) -> Iterator[Finding]:
    results = of_module(records, setting, module)
    means = comparison.by_form(results).set_index("form")["last_mean"]
    pairs = comparison.paired(results).query("measure == 'last'")
    for row in pairs.itertuples():
        form, base = (label(name, module) for name in (row.form, row.base))
        interval = f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}), adjusted p {row.p_adjusted:.2f}"
        yield f"{form} over {base}?", f"{means[row.form]:.2f} and {means[row.base]:.2f} %: {interval}"
    told = f"{pairs['told'].min():.1f} to {pairs['told'].max():.1f}"
    needed = f"{pairs['seeds_needed'].min():.0f} to {pairs['seeds_needed'].max():.0f}"
    seeds = f"{pairs['seeds'].min()} seeds"
    yield f"What do {seeds} tell, at a power of {comparison.POWER}?", f"{told} points; to tell 0.5, {needed} seeds"


def _growth(folder: Path) -> Iterator[Finding]:
    trends = growth.trends(read(folder / "epochs.csv"))
    rises, falls = ((trends["trend"] == trend).sum() for trend in ("rises", "falls"))
    strengths = (
        f"{part.mean():.2f} ({part.min():.2f} to {part.max():.2f})" for part in (trends["first"], trends["last"])
    )
    yield (
        "Does strength rise over the epochs?",
        f"{' at first, '.join(strengths)} at last; {rises} gates rise, {falls} fall",
    )
    less = f"{(trends['std_last'] < trends['std_first']).sum()} of {len(trends)} gates"
    stds = f"{trends['std_first'].mean():.3f} to {trends['std_last'].mean():.3f}"
    yield "Does attention vary less over images?", f"in {less}; std {stds}, mean of the gates"
    settled = trends["settled"].replace("", np.nan).astype(float)
    never = f"; {settled.isna().sum()} of {len(settled)} not" if settled.isna().any() else ""
    yield (
        "When does the stripe settle (drift under 0.01)?",
        f"from epoch {settled.min():.0f} to {settled.max():.0f}{never}",
    )
    inputs = read(folder / "inputs.csv")
    others = (_beside(inputs, kind) for kind in inputs["input"].unique() if kind != "test")
    yield "On other images, beside test images?", "; ".join(others)


def _beside(inputs: pd.DataFrame, kind: str) -> str:
    """Say how far a kind of image is from the test images: the least and greatest gate's."""
    strength, shift = (inputs.pivot(index="gate", columns="input", values=name) for name in ("strength", "shift_std"))
    change, moved = strength[kind] - strength["test"], shift[kind]
    found = (
        f"strength {change.min():+.2f} to {change.max():+.2f}, stripe {moved.min():.2f} to {moved.max():.2f} sd away"
    )
    return f"{kind}: {found}"


def _match(folder: Path) -> Iterator[Finding]:
    parts = []
    for protocol in ("same", "both", "separate"):
        gates = pd.DataFrame(json.loads((folder / f"match-{protocol}.json").read_text())["gates"])
        span = f"r {gates['r'].min():.2f} to {gates['r'].max():.2f}"
        parts.append(f"{protocol} {(gates['verdict'] == 'match').sum()} of {len(gates)} gates ({span})")
    yield "Do learned vectors match the stripes, by protocol?", "; ".join(parts)
    accuracies = json.loads((folder / "match-same.json").read_text())["accuracies"]
    texts = (f"{name} {value:.2f}" for name, value in accuracies.items())
    yield "Accuracy with them in the gates' places (same)?", ", ".join(texts)


def _fold(folder: Path) -> Iterator[Finding]:
    variants = read(folder / "variants.csv")
    test = variants.set_index(["folded", "weighting", "recovery"])["test"]
    before, gates = test[0, "none", "none"], variants["folded"].max()
    drops = [f"{count}: {test[count, 'energy', 'none'] - before:+.2f}" for count in (gates // 3, 2 * gates // 3, gates)]
    distilled = f"{test[gates, 'energy', 'distilled'] - before:+.2f}"
    yield "What does folding cost?", f"of {before:.2f} %, by gates folded {', '.join(drops)}; distilled {distilled}"
    predictors = read(folder / "predictors.csv")
    found = (f"{row.predictor} {row.rho:+.2f} (p {row.p:.2f})" for row in predictors.itertuples())
    yield "What predicts a gate's damage (Spearman's rho)?", ", ".join(found)


def _modules(records: Path, setting: str) -> Iterator[Finding]:
    stripes = read(records / "stripes.csv").query("setting == @setting and form == 'attention'")
    parts = []
    for name, rows in stripes.groupby("module", sort=False):
        by_gate = rows.pivot(index=["seed", "gate"], columns="epoch", values="strength")
        first, last = by_gate.iloc[:, 0], by_gate.iloc[:, -1]
        fell = f"fell in {(last < first).sum()} of {len(last)} gates"
        parts.append(
            f"{label('attention', str(name))} {last.mean():.2f} ({last.min():.2f} to {last.max():.2f}), {fell}"
        )
    yield "Strength in the short trainings, last epoch?", "; ".join(parts)
