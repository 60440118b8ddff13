"""Compare trainings of different forms, paired by seed: rows of results.csv in, tables and figures out; no networks."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import optimize, stats

from stripe.figures import save
from stripe.stats import benjamini_hochberg
from studies.table import headed, read

ALPHA, POWER = 0.05, 0.8  # of the paired, two-sided t-test
DIFFERENCE = 0.5  # points of accuracy worth telling apart
FEWEST, MOST = 2, 100_000  # seeds
CERTAIN = 50.0  # standard errors: so large a difference is always found, and the distribution's tail cannot be computed
PAIRS = (
    ("attention", "plain"),
    ("asr", "plain"),
    ("both", "attention"),
    ("asr", "attention"),
    ("plain-0.5", "plain"),
    ("plain-0.25", "plain"),
    ("asr", "plain-0.5"),
    ("both", "plain-0.25"),
    ("asr-1", "plain"),
    ("asr", "asr-1"),
    ("anneal", "attention"),
    ("anneal", "folded"),
    ("anneal", "asr"),
    ("folded", "attention"),
)
FORMS = {
    "plain": "plain",
    "attention": "{0}",
    "asr": "ASR({0})",
    "both": "ASR({0})+{0}",
    "plain-0.5": "plain from 0.5",
    "plain-0.25": "plain from 0.25",
    "asr-1": "ASR({0}) from 1",
    "anneal": "annealed {0}",
    "folded": "folded {0}",
}
"""Display name of each form, in the order of the figures; {0} is the name of the attention module."""
MEASURES = {"last": "last epoch", "best": "best validated epoch"}
NAMES = {"senet": "SE", "eca": "ECA", "srm": "SRM"}
DECIMALS = 4  # in written tables: more than any accuracy has


# ---- how many seeds --------------------------------------------------------------------------------------


def power(pairs: int, spread: float, difference: float = DIFFERENCE) -> float:
    """Return the probability that a paired t-test finds `difference` if paired differences have the sd `spread`."""
    limit, shift = stats.t.isf(ALPHA / 2, pairs - 1), difference / spread * math.sqrt(pairs)
    return float(stats.nct.sf(limit, pairs - 1, shift)) if shift < CERTAIN else 1.0  # the other tail is negligible


def seeds_needed(spread: float, difference: float = DIFFERENCE) -> int:
    """Return the fewest seeds at which a paired t-test finds `difference` with the power `POWER`."""
    if not spread > 0:
        return FEWEST
    return FEWEST + bisect_left(range(FEWEST, MOST), POWER, key=lambda pairs: power(pairs, spread, difference))


def detectable(pairs: int, spread: float) -> float:
    """Return the least difference that `pairs` pairs detect with the power `POWER`; NaN for fewer than two."""
    if pairs < 2:
        return math.nan
    return float(optimize.brentq(lambda d: power(pairs, spread, d) - POWER, 0.0, 40 * spread))


def plan(spreads: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.7), pairs: Sequence[int] = (3, 5, 8)) -> pd.DataFrame:
    """Plan the number of seeds before any training, for several sd of paired differences.

    Each row holds the seeds that detect 0.5 points, and the least difference that each number of `pairs` detects.
    """
    rows = [
        {"spread": spread, "seeds": seeds_needed(spread)} | {f"told_by_{n}": detectable(n, spread) for n in pairs}
        for spread in spreads
    ]
    return pd.DataFrame(rows)


# ---- tables ----------------------------------------------------------------------------------------------


def groups(results: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (setting, module, the module's rows and those of the plain networks of the setting)."""
    for (setting, module), _ in results[results["module"] != "none"].groupby(["setting", "module"], sort=False):
        beside = results["module"].isin([module, "none"]) & (results["setting"] == setting)
        yield str(setting), str(module), results[beside]


def by_form(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting and form: seeds, accuracies' mean and sd, epochs, median speed."""
    rows = []
    for (setting, module, form), part in results.groupby(["setting", "module", "form"], sort=False):
        row = {"setting": setting, "module": module, "form": form, "seeds": len(part)}
        for measure in MEASURES:
            accuracy = part[f"accuracy_{measure}"]
            row |= {f"{measure}_mean": accuracy.mean(), f"{measure}_sd": accuracy.std()}
        rows.append(row | {"best_epoch": part["best_epoch"].mean(), "seconds": part["seconds"].median()})
    return pd.DataFrame(rows).round(DECIMALS)


def paired(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting, module, pair of forms and measure: the mean difference with its t-interval.

    `p` is the paired t-test's, `p_adjusted` over the pairs of a measure (Benjamini, Hochberg 1995). `seeds_needed`
    is how many seeds detect 0.5 points at the observed sd, `told` the least difference that the present seeds detect.
    """
    tables = []
    for setting, module, part in groups(results):
        for measure in MEASURES:
            accuracies = part.pivot(index="seed", columns="form", values=f"accuracy_{measure}")
            rows = [difference(accuracies, *pair) for pair in PAIRS if set(pair) <= set(accuracies)]
            table = pd.DataFrame(rows)
            if len(table):
                table.insert(len(table.columns), "p_adjusted", benjamini_hochberg(table["p"].to_numpy()))
                tables.append(
                    pd.DataFrame({"setting": setting, "module": module, "measure": measure}, table.index).join(table)
                )
    if not tables:
        return pd.DataFrame()
    found = pd.concat(tables, ignore_index=True)
    return found.round({name: DECIMALS for name in found.columns.difference(["p", "p_adjusted"])})


def difference(accuracies: pd.DataFrame, form: str, base: str) -> dict[str, object]:
    """Compare two columns of accuracies (seeds, forms), paired by seed; NaN where a single pair gives no interval."""
    differences = (accuracies[form] - accuracies[base]).dropna()
    pairs, mean, sd = len(differences), differences.mean(), differences.std()
    row: dict[str, object] = {"form": form, "base": base, "seeds": pairs, "difference": mean, "sd": sd}
    if pairs < 2 or not sd > 0:
        return row | dict.fromkeys(("low", "high", "p", "seeds_needed", "told"), math.nan)
    reach = stats.t.isf(ALPHA / 2, pairs - 1) * sd / math.sqrt(pairs)
    p = stats.ttest_1samp(differences, 0.0).pvalue
    row |= {"low": mean - reach, "high": mean + reach, "p": p}
    return row | {"seeds_needed": seeds_needed(sd), "told": detectable(pairs, sd)}


def label(form: str, module: str) -> str:
    """Return the display name of a form in tables and figures."""
    return FORMS[form].format(NAMES.get(module, module))


# ---- figure ----------------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, differences: pd.DataFrame, module: str, measure: str = "last") -> Figure:
    """Draw a module's accuracies, one line per seed, and the paired differences with their intervals."""
    forms = [form for form in FORMS if form in set(results["form"])]
    shown = differences[differences["measure"] == measure]
    size = (6.9, max(2.6, 0.3 * len(shown) + 0.9))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(3, 2))
    accuracies = results.pivot(index="seed", columns="form", values=f"accuracy_{measure}")[forms]
    for seed, row in accuracies.iterrows():
        left.plot(forms, row, color="0.6", linewidth=0.8, marker=".", label=f"seed {seed}")
    left.plot(forms, accuracies.mean(), color="#0072B2", linestyle="", marker="_", markersize=18, label="mean")
    names = [label(form, module) for form in forms]
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(forms) > 4 else {}
    left.set_xticks(range(len(forms)), names, **turned)
    left.set_xlim(-0.5, len(forms) - 0.5)
    left.set_ylabel(f"test accuracy (%),\n{MEASURES[measure]}")
    _draw_differences(right, shown)
    for ax in (left, right):
        ax.tick_params(labelsize=7)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
    return figure


def _draw_differences(ax: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))
    ax.axvspan(-DIFFERENCE, DIFFERENCE, color="0.92", zorder=0)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.hlines(places, rows["low"], rows["high"], color="#D55E00", linewidth=1.2)
    ax.plot(rows["difference"], places, color="#D55E00", linestyle="", marker="o", markersize=4)
    ax.set_yticks(places, _pairs(rows))
    interval = "95 % t-interval" if rows["low"].notna().any() else "one seed, no interval"
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"points, {interval};\ngrey: within {DIFFERENCE:g} points")


# ---- tables and figures of a directory -------------------------------------------------------------------


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Return the tables that follow from results.csv and stripes.csv in a directory, by file name."""
    found = {}
    if (out / "results.csv").exists():
        results = _results(out)
        found = {"forms.csv": _forms(by_form(results)), "seeds.csv": _seeds(plan())}
        if len(pairs := paired(results)):
            found["differences.csv"] = _differences(pairs)
    if (out / "stripes.csv").exists():
        found["strength.csv"] = strengths(read(out / "stripes.csv"))
    return found


def _results(out: Path) -> pd.DataFrame:
    """Read results.csv; the columns of the chosen epoch are empty where no images were held out to choose one."""
    results = read(out / "results.csv")
    return results.reindex(columns=[*dict.fromkeys([*results, "best_epoch", "accuracy_best"])])


def _forms(rows: pd.DataFrame) -> pd.DataFrame:
    columns = {"setting": "setting", "network": "network", "seeds": "seeds"}
    columns |= {"last epoch": "last_mean:.2f", "its sd": "last_sd:.2f"}
    columns |= {"best validated epoch": "best_mean:.2f", "sd of that": "best_sd:.2f"}
    return headed(rows.assign(network=_labels(rows, "form")), columns)


def _seeds(rows: pd.DataFrame) -> pd.DataFrame:
    told = {
        f"told by {name.removeprefix('told_by_')} seeds": f"{name}:.2f" for name in map(str, rows) if "told" in name
    }
    return headed(rows, {"sd of differences": "spread:.1f", f"seeds to tell {DIFFERENCE}": "seeds", **told})


def _differences(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each pair of forms with more than one seed; the others have no interval."""
    rows = pairs.dropna(subset="low")
    rows = rows.assign(name=_pairs(rows), at=rows["measure"].map(MEASURES))
    columns = {"setting": "setting", "difference": "name", "at": "at", "seeds": "seeds", "points": "difference:+.2f"}
    columns |= {"95 % interval from": "low:+.2f", "to": "high:+.2f", "p": "p:.2g", "adjusted p": "p_adjusted:.2g"}
    return headed(
        rows, columns | {"least difference told": "told:.2f", f"seeds to tell {DIFFERENCE}": "seeds_needed:.0f"}
    )


def strengths(stripes: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each recorded network: strength and std over its gates at the first and the last epoch."""
    rows = []
    for (setting, module, form, seed), part in stripes.groupby(["setting", "module", "form", "seed"], sort=False):
        first, last = (
            part[part["epoch"] == epoch].set_index("gate") for epoch in (min(part["epoch"]), max(part["epoch"]))
        )
        row = {"setting": setting, "network": label(str(form), str(module)), "seed": str(seed)}
        for name, gates in (("first epoch", first["strength"]), ("last epoch", last["strength"])):
            row |= {f"{name}: mean": f"{gates.mean():.2f}", f"{name}: least gate": f"{gates.min():.2f}"}
            row[f"{name}: greatest gate"] = f"{gates.max():.2f}"
        row["gates that fell"] = _fell(first["strength"], last["strength"])
        row |= {"std at the first": f"{first['std'].mean():.4f}", "at the last": f"{last['std'].mean():.4f}"}
        rows.append(row | {"gates whose std fell": _fell(first["std"], last["std"])})
    return pd.DataFrame(rows)


def _fell(first: "pd.Series[float]", last: "pd.Series[float]") -> str:
    return f"{(last < first).sum()} of {len(first)}"


def _pairs(rows: pd.DataFrame) -> list[str]:
    """Return the names of the differences, such as SE \u2212 plain."""
    return [f"{form} \u2212 {base}" for form, base in zip(_labels(rows, "form"), _labels(rows, "base"), strict=True)]


def _labels(rows: pd.DataFrame, form: str) -> list[str]:
    return [label(str(name), str(module)) for name, module in zip(rows[form], rows["module"], strict=True)]


def figures(out: Path) -> None:
    """Draw every setting and module of the results.csv of a directory, if there is one."""
    if not (out / "results.csv").exists():
        return
    for setting, module, part in groups(_results(out)):
        rows = paired(part)
        if len(rows):
            save(draw(part, rows, module), out / f"forms-{setting}-{module}")
