"""What `fold.py` and `validate_asr.py` wrote, and the example run, as tables with headings for people."""

import json
from pathlib import Path

import pandas as pd

import stripe
from stripe.stats import summarize
from studies.table import headed, read

EXAMPLE = "cifar10-se-resnet20"
MATCH = {"gate": "gate", "r": "r:.2f", "r of the untrained psi": "r_untrained:.2f", "r of the best psi": "r_best:.2f"}
MATCH |= {"RMSE": "rmse:.3f", "of the untrained psi": "rmse_untrained:.3f", "verdict": "verdict"}
PREDICTORS = {"predictor": "predictor", "rho": "rho:.2f", "p": "p:.2f", "gates": "gates"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables that follow from what the commands left in a directory, by file name."""
    found = {path.with_suffix(".csv").name: match(path) for path in sorted(folder.glob("match-*.json"))}
    if (folder / "variants.csv").exists():
        found["accuracy.csv"] = folded(read(folder / "variants.csv"))
    if (folder / "predictors.csv").exists():
        found["damage.csv"] = headed(read(folder / "predictors.csv"), PREDICTORS)
    if folder.name == EXAMPLE:
        found["strength-by-epoch.csv"] = example()
        found["match.csv"] = match(Path(stripe.load_example(EXAMPLE).path, "validation.json"))
    return found


def match(path: Path) -> pd.DataFrame:
    """Return the learned vectors beside the stripes, gate by gate, and accuracies below, from a validation.json."""
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
