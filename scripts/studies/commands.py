"""What `fold.py` and `validate_asr.py` wrote, and the example run, as tables with headings for people."""

import json
from pathlib import Path

import pandas as pd

import stripe
from stripe.stats import benjamini_hochberg, summarize
from studies.table import headed, read

EXAMPLE = "cifar10-se-resnet20"
MATCH = {"gate": "gate", "distance": "distance:.2g", "images": "limit:.2g", "random": "random:.2g"}
MATCH |= {"best": "distance_best:.2g", "p": "p_adjusted:.3f", "KL learned": "kl_learned:.2g"}
MATCH |= {"KL stripe": "kl_stripe:.2g", "KL removed": "kl_removed:.2g", "verdict": "verdict"}
PREDICTORS = {"predictor": "predictor", "rho": "rho:.2f", "p": "p:.2f", "adjusted p": "p_adjusted:.2f"}
PREDICTORS |= {"gates": "gates"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables that follow from what the commands left in a directory, by file name."""
    found = {path.with_suffix(".csv").name: match(path) for path in sorted(folder.glob("match-*.json"))}
    if (folder / "variants.csv").exists():
        found["accuracy.csv"] = folded(read(folder / "variants.csv"))
    if (folder / "predictors.csv").exists():
        predictors = read(folder / "predictors.csv")
        found["damage.csv"] = headed(
            predictors.assign(p_adjusted=benjamini_hochberg(predictors["p"].to_numpy())), PREDICTORS
        )
    if folder.name == EXAMPLE:
        found["strength-by-epoch.csv"] = example()
    return found


def match(path: Path) -> pd.DataFrame:
    """Return the verdicts and what they follow from, gate by gate, and accuracies below, from a validation.json.

    The columns are those of `Validation.summary`, whose legend explains them.
    """
    content = json.loads(path.read_text())
    gates = headed(pd.DataFrame(content["gates"]), MATCH)
    rows = [{"gate": f"accuracy, {name}", "verdict": f"{value:.2f} %"} for name, value in content["accuracies"].items()]
    return pd.concat([gates, pd.DataFrame(rows)], ignore_index=True).fillna("")


def folded(variants: pd.DataFrame) -> pd.DataFrame:
    """Return test accuracy by the number of folded gates, a column for each recovery and weighting."""
    kinds = variants[variants["folded"] > 0].drop_duplicates(["recovery", "weighting"])
    test = variants.set_index(["folded", "recovery", "weighting"])["test"]
    rows = pd.DataFrame({"folded": sorted(variants["folded"].unique())})
    for recovery, weighting in zip(kinds["recovery"], kinds["weighting"], strict=True):
        alike = [(recovery, weighting), (recovery, "none")]  # nothing folded has no weighting
        rows[f"{recovery}, {weighting}"] = [
            next((f"{test[count, *kind]:.2f}" for kind in alike if (count, *kind) in test), "")
            for count in rows["folded"]
        ]
    return rows


def example() -> pd.DataFrame:
    """Return strength in the example run, measured anew from its Parquet files, a column for each epoch."""
    table = summarize(stripe.load_example(EXAMPLE))
    strength = table.pivot(index="gate", columns="epoch", values="strength")
    columns = {"gate": "gate"} | {f"epoch {epoch}": f"{epoch}:.2f" for epoch in strength}
    return headed(strength.rename(columns=str).reset_index(), columns)
