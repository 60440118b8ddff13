"""Foretelling: how well predictors that need no folding rank the error that folding one gate causes in the outputs."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from studies.table import headed, read

PREDICTORS = {"1 - strength": "variable", "CV": "cv", "energy error": "energy_error"}
FEWEST = 3  # gates that a network needs for a rho of its own
PERMUTATIONS = 9999
HEADINGS = {"network": "network", "predictor": "predictor", "rho": "rho:.2f", "p": "p:.4f", "gates": "gates"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return, for the gates that `study.py wild` folded one by one, each predictor's rho with the outputs' error."""
    records = read(folder / "records.csv") if (folder / "records.csv").exists() else pd.DataFrame()
    if "case" not in records:
        return {}
    gates = records[records["case"] == "gate"].assign(variable=lambda table: 1 - table["strength"])
    groups = {str(name): part for name, part in gates.groupby("network", sort=False) if len(part) >= FEWEST}
    groups["all, ranked within each"] = gates
    rows = [
        {"network": name, "predictor": predictor, "gates": len(part)} | _correlated(part, column)
        for name, part in groups.items()
        for predictor, column in PREDICTORS.items()
    ]
    return {"foretelling.csv": headed(pd.DataFrame(rows), HEADINGS)}


def _correlated(gates: pd.DataFrame, column: str) -> dict[str, float]:
    """Return Spearman's rho of a predictor with the error, ranked within each network, and its two-sided p.

    The p is the share of permutations of the predictor within each network that give as large a rho; the observed order
    counts as one of them.
    """
    networks = gates.groupby("network")
    ranks, costs = (_standard(networks[name].rank().to_numpy(), gates["network"]) for name in (column, "error"))
    rng, places = np.random.default_rng(0), [np.flatnonzero(gates["network"] == name) for name in networks.groups]
    as_large, rho = 1, float(ranks @ costs)
    for _ in range(PERMUTATIONS):
        shuffled = ranks.copy()
        for place in places:
            shuffled[place] = rng.permutation(ranks[place])
        as_large += abs(float(shuffled @ costs)) >= abs(rho) - 1e-12
    return {"rho": rho, "p": as_large / (PERMUTATIONS + 1)}


def _standard(ranks: NDArray[np.float64], networks: pd.Series) -> NDArray[np.float64]:
    """Subtract each network's mean rank, and scale the whole vector to length 1."""
    off = pd.Series(ranks).groupby(networks.to_numpy()).transform(lambda part: part - part.mean()).to_numpy()
    standard: NDArray[np.float64] = off / np.linalg.norm(off)
    return standard
