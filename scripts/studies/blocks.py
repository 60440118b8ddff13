"""What README.md says of the studies: each block is a table in Markdown, made from committed records alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

import stripe
from stripe.stats import summarize
from studies import comparison, findings, growth
from studies import recipes as recipe_study
from studies import sizing as sizes
from studies import speed as benchmarks
from studies.comparison import label
from studies.table import read

Cells = Sequence[Sequence[str]]
EXAMPLE = "cifar10-se-resnet20"


def forms(records: Path, setting: str, module: str) -> Cells:
    """Accuracies of every form of a setting, from results.csv."""
    rows = comparison.by_form(findings.of_module(records, setting, module))
    yield "network", "seeds", "last epoch", "best validated epoch"
    for row in rows.itertuples():
        measured = ((row.last_mean, row.last_sd), (row.best_mean, row.best_sd))
        means = (f"{mean:.2f}" + ("" if pd.isna(sd) else f" ± {sd:.2f}") for mean, sd in measured)
        yield label(row.form, module), str(row.seeds), *means


def differences(records: Path, setting: str, module: str) -> Cells:
    """Paired differences at the last epoch, from results.csv."""
    rows = comparison.paired(findings.of_module(records, setting, module))
    yield "difference", "points", "95 % interval", "p", "adjusted p", "seeds to tell 0.5"
    for row in rows[(rows["module"] == module) & (rows["measure"] == "last")].itertuples():
        name = f"{label(row.form, module)} − {label(row.base, module)}"
        interval = f"{row.low:+.2f} to {row.high:+.2f}"
        yield (
            name,
            f"{row.difference:+.2f}",
            interval,
            f"{row.p:.3f}",
            f"{row.p_adjusted:.3f}",
            f"{row.seeds_needed:.0f}",
        )


def plan(records: Path) -> Cells:
    """How many seeds tell how much, before any training."""
    table = comparison.plan()
    told = [name for name in table if name.startswith("told_by_")]
    yield "sd of differences", "seeds to tell 0.5", *(f"told by {name.removeprefix('told_by_')} seeds" for name in told)
    for row in table.to_dict("records"):
        yield f"{row['spread']:.1f}", str(row["seeds"]), *(f"{row[name]:.2f}" for name in told)


def stripes(records: Path, setting: str) -> Cells:
    """Strength at the first and last epoch in every network that was recorded, from stripes.csv."""
    table = read(records / "stripes.csv")
    yield "network", "seed", "first epoch: mean (least to greatest gate)", "last epoch", "gates that fell"
    networks = table[table["setting"] == setting].groupby(["module", "form", "seed"], sort=False)
    for (module, form, seed), rows in networks:
        by_gate = rows.pivot(index="gate", columns="epoch", values="strength")
        first, last = by_gate.iloc[:, 0], by_gate.iloc[:, -1]
        spans = (f"{part.mean():.2f} ({part.min():.2f} to {part.max():.2f})" for part in (first, last))
        yield label(form, module), str(seed), *spans, f"{(last < first).sum()} of {len(by_gate)}"


def trends(records: Path, name: str) -> Cells:
    """The trend of every gate of a recorded training, from epochs.csv."""
    yield (
        "gate",
        "channels",
        "first epoch",
        "last epoch (95 % interval)",
        "rho",
        "trend",
        "std, first and last",
        "settled",
    )
    for row in growth.trends(read(records / name / "epochs.csv")).itertuples():
        last = f"{row.last:.3f} ({row.last_low:.3f} to {row.last_high:.3f})"
        stds = f"{row.std_first:.4f}, {row.std_last:.4f}"
        yield (
            row.gate,
            str(row.channels),
            f"{row.first:.3f}",
            last,
            f"{row.rho:+.2f}",
            row.trend,
            stds,
            str(row.settled),
        )


def inputs(records: Path, name: str) -> Cells:
    """Strength on other images and how far their stripes are, from inputs.csv."""
    table = read(records / name / "inputs.csv")
    kinds = list(table["input"].unique())
    yield "gate", *(f"{kind}: strength" for kind in kinds), *(f"{kind}: shift" for kind in kinds[1:])
    for gate, rows in table.groupby("gate", sort=False):
        strength, shift = (rows.set_index("input")[column] for column in ("strength", "shift_std"))
        yield str(gate), *(f"{strength[kind]:.3f}" for kind in kinds), *(f"{shift[kind]:.2f}" for kind in kinds[1:])
    accuracy = table.groupby("input", sort=False)["accuracy"].first()
    texts = (f"{value:.1f} %" if pd.notna(value) else "" for value in accuracy)
    yield "accuracy", *texts, *("" for _ in kinds[1:])


def recipes(records: Path, folder: str = ".") -> Cells:
    """Accuracies by stripe's recipe and by the reference's, and their paired difference, from recipes.csv."""
    rows = read(records / folder / "recipes.csv")
    yield "network", "seeds", *recipe_study.RECIPES, "difference", "95 % interval"
    for row in recipe_study.differences(rows).itertuples():
        its = rows[rows["form"] == row.network].pivot(index="seed", columns="recipe", values="accuracy").dropna()
        means = (f"{its[recipe].mean():.2f}" for recipe in recipe_study.RECIPES)
        interval = "" if pd.isna(row.low) else f"{row.low:+.2f} to {row.high:+.2f}"
        yield row.network, str(row.seeds), *means, f"{row.difference:+.2f}", interval


def speed(records: Path, path: str) -> Cells:
    """What the benchmarks found, from the files that they wrote to a folder."""
    yield "what", "ratio (least to greatest round) or figure", "command"
    yield from benchmarks.table(records / path)


def coverage(records: Path, path: str) -> Cells:
    """In how many networks as many gates were found as expected, by library, from the file of the benchmark."""
    rows = pd.DataFrame(json.loads((records / path).read_text())["rows"])
    yield "library", "networks", "without any gate", "gates in all", "found as many as their authors wrote"
    for library, found in rows.groupby(rows["case"].str.partition(":")[0]):
        right, without = (found["verdict"] == "ok").sum(), (found["expected"] == 0).sum()
        yield str(library), str(len(found)), str(without), str(found["expected"].sum()), f"{right} of {len(found)}"


def sizing(records: Path, path: str) -> Cells:
    """What recordings cost, by their gates, from the file that the benchmark wrote."""
    yield from sizes.table(records / path)


def found(records: Path, setting: str, module: str, recorded: str) -> Cells:
    """The answers to the study's questions, from the records of its parts."""
    yield "question", "found"
    yield from findings.table(records, setting, module, recorded)


def example(records: Path) -> Cells:
    """Strength in the example run, measured anew from its Parquet files."""
    table = summarize(stripe.load_example(EXAMPLE))
    strength = table.pivot(index="gate", columns="epoch", values="strength")
    yield "gate", *(f"epoch {epoch}" for epoch in strength)
    for gate, row in strength.iterrows():
        yield str(gate), *(f"{value:.2f}" for value in row)


def match(records: Path, path: str = "") -> Cells:
    """The learned vectors beside the stripes, from a validation.json: of `records`, or the example run's."""
    file = records / path if path else Path(stripe.load_example(EXAMPLE).path, "validation.json")
    content = json.loads(file.read_text())
    yield "gate", "r", "r of the untrained psi", "r of the best psi", "RMSE", "of the untrained psi", "verdict"
    for row in content["gates"]:
        correlations = (f"{row[name]:.2f}" for name in ("r", "r_untrained", "r_best"))
        errors = (f"{row[name]:.3f}" for name in ("rmse", "rmse_untrained"))
        yield row["gate"], *correlations, *errors, row["verdict"]
    for name, value in content["accuracies"].items():
        yield f"accuracy, {name}", *[""] * 5, f"{value:.2f} %"


def fold(records: Path, path: str) -> Cells:
    """Test accuracy by the number of folded gates, from the variants.csv of a fold."""
    table = read(records / path / "variants.csv")
    kinds = table[table["folded"] > 0].drop_duplicates(["recovery", "weighting"])
    cases = [(row.recovery, row.weighting) for row in kinds.itertuples()]
    yield "folded", *(f"{recovery}, {weighting}" for recovery, weighting in cases)
    for count, rows in table.groupby("folded"):
        found = {(row.recovery, row.weighting): row.test for row in rows.itertuples()}
        values = [found.get(case, found.get((case[0], "none"))) for case in cases]
        yield str(count), *("" if value is None else f"{value:.2f}" for value in values)


def folded(records: Path, path: str, setting: str) -> Cells:
    """What folding half the gates and all of them costs, in points, from the tables of a fold and of a longer one.

    Beside it, what the plain network of a setting of results.csv has less.
    """
    first, longer = read(records / path / "variants.csv"), read(records / path / "distilled" / "variants.csv")
    before = first.query("folded == 0 and recovery == 'none'")["test"].iloc[0]
    gates = first["folded"].max()
    yield "gates folded", "constants", "as folded", "norms re-estimated", "distilled", "distilled longer"
    for count in (-(-gates // 2), gates):
        for weighting in ("mean", "energy"):
            rows = first.query("folded == @count and weighting == @weighting").set_index("recovery")["test"]
            costs = [f"{rows[recovery] - before:+.2f}" for recovery in ("none", "re-estimated", "distilled")]
            rows = longer.query("folded == @count and weighting == @weighting and recovery == 'distilled'")["test"]
            costs += [f"{test - before:+.2f}" for test in rows] or [""]
            yield f"{count} of {gates}", weighting, *costs
    plain = read(records / "results.csv").query("setting == @setting and form == 'plain'")["accuracy_last"].item()
    yield "plain network, same recipe", "", f"{plain - before:+.2f}", "", "", ""


def csv(records: Path, path: str, *columns: str) -> Cells:
    """Columns of a table of `records`, as NAME or NAME:FORMAT, such as `r:.2f`."""
    table = read(records / path)
    names = [column.partition(":")[0] for column in columns]
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"{path} lacks columns {', '.join(unknown)}: expected some of {', '.join(table)}")
    yield [name.replace("_", " ") for name in names]
    for row in table.to_dict("records"):
        yield [format(row[name], column.partition(":")[2]) for name, column in zip(names, columns, strict=True)]


BLOCKS: dict[str, Callable[..., Cells]] = {
    block.__name__: block
    for block in (
        found,
        plan,
        forms,
        differences,
        recipes,
        stripes,
        trends,
        inputs,
        speed,
        sizing,
        coverage,
        example,
        match,
        fold,
        folded,
        csv,
    )
}


def markdown(name: str, records: Path, arguments: Sequence[str]) -> str:
    """Make a block.

    Raises:
        ValueError: there is no such block, its arguments are wrong, or a record lacks what it needs.
        FileNotFoundError: a record is missing.
    """
    if name not in BLOCKS:
        raise ValueError(f"no block '{name}': expected one of {', '.join(BLOCKS)}")
    try:
        head, *body = (list(row) for row in BLOCKS[name](records, *arguments))
    except TypeError as error:
        raise ValueError(f"block '{' '.join([name, *arguments])}': {error}") from error
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
