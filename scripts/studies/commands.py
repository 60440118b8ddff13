"""The output of `fold.py` and `validate_asr.py`, and the example run, as tables with readable headings."""

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
NUMBERS = {"network": "network", "numbers per image": "numbers", "parameters": "parameters"}
NUMBERS |= {"divergence": "divergence:.4f", "from": "divergence_low:.4f", "to": "divergence_high:.4f"}
NUMBERS |= {"test, %": "worth:.2f", "points lost": "drop:.2f", "at least": "drop_low:.2f", "at most": "drop_high:.2f"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables that follow from the commands' output in a directory, by file name."""
    found = {path.with_suffix(".csv").name: match(path) for path in sorted(folder.glob("match-*.json"))}
    if (folder / "variants.csv").exists():
        found["accuracy.csv"] = folded(read(folder / "variants.csv"))
    if (folder / "predictors.csv").exists():
        predictors = read(folder / "predictors.csv")
        found["damage.csv"] = headed(
            predictors.assign(p_adjusted=benjamini_hochberg(predictors["p"].to_numpy())), PREDICTORS
        )
    if (folder / "ranks.csv").exists() and "numbers" in read(folder / "ranks.csv"):
        found["numbers.csv"] = numbers(folder)
    if folder.name == EXAMPLE:
        found["strength-by-epoch.csv"] = example()
    return found


def match(path: Path) -> pd.DataFrame:
    """Return a validation.json as a table: each gate's verdict and its basis, then the accuracies.

    The columns are those of `Validation.summary`, whose legend explains them.
    """
    content = json.loads(path.read_text())
    gates = headed(pd.DataFrame(content["gates"]), MATCH)
    rows = [{"gate": f"accuracy, {name}", "verdict": f"{value:.2f} %"} for name, value in content["accuracies"].items()]
    return pd.concat([gates, pd.DataFrame(rows)], ignore_index=True).fillna("")


def folded(variants: pd.DataFrame) -> pd.DataFrame:
    """Return test accuracy by the number of folded gates, with a column for each recovery and weighting."""
    kinds = variants[variants["folded"] > 0].drop_duplicates(["recovery", "weighting"])
    test = variants.set_index(["folded", "recovery", "weighting"])["test"]
    rows = pd.DataFrame({"folded": sorted(variants["folded"].unique())})
    for recovery, weighting in zip(kinds["recovery"], kinds["weighting"], strict=True):
        alike = [(recovery, weighting), (recovery, "none")]  # where nothing is folded, the weighting is "none"
        rows[f"{recovery}, {weighting}"] = [
            next((f"{test[count, *kind]:.2f}" for kind in alike if (count, *kind) in test), "")
            for count in rows["folded"]
        ]
    return rows


def numbers(folder: Path) -> pd.DataFrame:
    """Return the costs of networks with a few scores per gate, and ONNX nodes and one-image times where measured."""
    rows, headings = read(folder / "ranks.csv").set_index("network"), dict(NUMBERS)
    if (folder / "onnx.csv").exists():
        files = read(folder / "onnx.csv")
        rows["nodes"] = files.set_index(files["file"].str.removesuffix(".onnx"))["nodes"]
        headings["nodes"] = "nodes:.0f"
    if (folder / "latency.csv").exists():
        for backend, its in read(folder / "latency.csv").groupby("backend", sort=False):
            rows[backend] = its.set_index("network")["speedup"]
            headings[f"speedup, {backend}"] = f"{backend}:.2f"
    return headed(rows.reset_index(), headings)


def example() -> pd.DataFrame:
    """Return strength in the example run, computed anew from its Parquet files, with a column for each epoch."""
    table = summarize(stripe.load_example(EXAMPLE))
    strength = table.pivot(index="gate", columns="epoch", values="strength")
    columns = {"gate": "gate"} | {f"epoch {epoch}": f"{epoch}:.2f" for epoch in strength}
    return headed(strength.rename(columns=str).reset_index(), columns)
