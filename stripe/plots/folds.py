"""What folding and compacting networks saves, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from stripe.plots.drawing import (
    LABEL_SIZE,
    MARKERS,
    PAGE_WIDTH,
    TICK_SIZE,
    Decimals,
    dress,
    legend_below,
    new_axes,
    palette,
    tick_integers,
)


def fold_pareto(
    variants: pd.DataFrame,
    latencies: pd.DataFrame | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    measure: str = "accuracy",
) -> Axes:
    """Draw how well folded networks do against their latency, and the front of those that no other beats in both.

    The network without a folded gate is a star with a dashed line; the others have a marker and a colour for each way
    of folding. The upper axis translates latency to the number of folded gates, as far as its labels have room.

    Args:
        variants: a row per network, as `stripe.folding.study` gives it: folded (number of gates), test or else
            validation (the measure in percent), and, where there are several ways of folding, weighting and recovery.
        latencies: as `Study.latencies` or `stripe.folding.latencies` gives them, joined by the column that both tables
            share, folded or network; the figure shows the first backend and the largest batch, with the range over the
            rounds. Without latencies, it shows lines over the number of folded gates.
        ax: where to draw (default: a new figure).
        title: title of the Axes.
        measure: what the percentages are, for the label: "accuracy" or "agreement".

    Raises:
        ValueError: a table lacks a column, or the tables share none.
    """
    import seaborn as sns

    worth = "test" if "test" in variants else "validation"
    _require_columns("variants", variants, ["folded", worth])
    rows = variants[(variants["folded"] > 0) | _as_folded(variants)]
    x, label = "folded", "folded gates"
    if latencies is not None:
        rows, label = _timed(rows, latencies)
        x = "milliseconds"
    rows = rows.assign(variant=_variant_names(rows))
    whole, folded = rows[rows["folded"] == 0], rows[rows["folded"] > 0]
    names = list(folded["variant"].unique())
    ax = new_axes(ax, height=2.9)
    marks = {"hue": "variant", "style": "variant", "markers": True, "palette": palette(len(names)), "ax": ax}
    if latencies is None:
        marks |= {"dashes": False, "estimator": None, "linewidth": 0.8, "markersize": 5, "markeredgewidth": 0.4}
        sns.lineplot(folded, x=x, y=worth, **marks)
        tick_integers(ax.xaxis)
    else:
        sns.scatterplot(folded, x=x, y=worth, s=22, linewidth=0.4, **marks)
        ax.hlines(rows[worth], rows["low"], rows["high"], color="0.8", linewidth=0.6, zorder=0)
        front = rows.sort_values([x, worth], ascending=[True, False])
        front = front[front[worth] > front[worth].cummax().shift(fill_value=-math.inf)]
        ax.step(front[x], front[worth], where="post", color="0.6", linewidth=0.8, zorder=1, label="Pareto front")
        _translate(ax, rows.groupby("folded")[x].min(), "folded gates")
    if len(whole):
        ax.axhline(whole[worth].iloc[0], color="0.5", linewidth=0.8, linestyle="--", zorder=1)
        ax.plot(whole[x], whole[worth], color="0", linestyle="", marker="*", markersize=6, label="unfolded")
    dress(ax, label, f"{worth} {measure} (%)", title)
    legend_below(ax)
    return ax


def rank_tradeoff(table: pd.DataFrame, *, measure: str = "accuracy", title: str = "") -> Figure:
    """Draw what compact networks cost over the numbers per image that replace their attention, with intervals.

    Args:
        table: `stripe.folding.Tradeoff.table`.
        measure: what its `worth` is, for the label.
        title: above both panels.

    Raises:
        ValueError: the table lacks a column.
    """
    ends = [f"{name}_{end}" for name in ("divergence", "drop") for end in ("low", "high")]
    _require_columns("table", table, ["k", "source", "numbers", "divergence", "drop", *ends])
    fig, axes = plt.subplots(1, 2, figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    rows = table[table["k"].notna()]
    ways = {"own scores": rows["source"] == ""}
    ways |= {f"from {source}": rows["source"] == source for source in rows["source"].unique() if source}
    whole = table[table["k"].isna()]["numbers"]
    labels = {"divergence": "divergence from the original", "drop": f"{measure} lost (points)"}
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        for (way, its), color, marker in zip(ways.items(), palette(len(ways)), MARKERS, strict=False):
            part = rows[its | (rows["k"] == 0)].sort_values("numbers")
            reach = [part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]]
            marks = {"marker": marker, "markersize": 4, "linewidth": 0.8, "elinewidth": 0.8, "capsize": 2}
            ax.errorbar(part["numbers"], part[name], yerr=reach, color=color, label=way, **marks)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(-0.3, max([*rows["numbers"], *whole]) * 1.4)
        for numbers in whole:
            ax.axvline(numbers, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        dress(ax, "numbers per image (dashed: full attention)", label, "")
    axes[0].set_yscale("log")
    axes[0].yaxis.set(major_formatter=Decimals(), minor_formatter=Decimals())
    axes[1].axhline(0, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=TICK_SIZE, frameon=False
    )
    return fig


def _require_columns(name: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in table]:
        raise ValueError(
            f"{name} lacks {', '.join(missing)}; expected the tables of stripe.folding.study: its variants, and its "
            "latencies beside them"
        )


def _timed(variants: pd.DataFrame, latencies: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Join each variant with its latency in the first backend at the largest batch; return the rows and a label."""
    _require_columns("latencies", latencies, ["backend", "batch", "milliseconds", "low", "high"])
    backend, batch = latencies["backend"].iloc[0], latencies["batch"].max()
    shared = [name for name in ("folded", "network") if name in variants and name in latencies]
    if not shared:
        raise ValueError("variants and latencies share neither folded nor network: they cannot be joined")
    times = latencies[(latencies["backend"] == backend) & (latencies["batch"] == batch)]
    rows = variants.merge(times[[*shared, "milliseconds", "low", "high"]], on=shared)
    return rows, f"latency (ms, {backend}, batch of {batch})"


def _as_folded(variants: pd.DataFrame) -> pd.Series[bool]:
    """Return which variants were not recovered after folding: all of them if the table has no such column."""
    return variants.get("recovery", pd.Series("none", index=variants.index)).eq("none")


def _variant_names(variants: pd.DataFrame) -> pd.Series[str]:
    """Name each way of folding: the weighting of its constants, and how it was recovered, if it was."""
    weighting = variants.get("weighting", pd.Series("folded", index=variants.index))
    recovery = variants.get("recovery", pd.Series("none", index=variants.index))
    return weighting + (", " + recovery).where(recovery != "none", "")


def _translate(ax: Axes, positions: pd.Series[float], label: str) -> None:
    """Label the upper edge with the index of `positions` on the x axis: first and last, then any others that fit."""
    left, right = ax.get_xlim()
    shown: dict[str, float] = {}
    for name, position in (*positions.iloc[[0, -1]].items(), *positions.items()):
        if all(abs(position - other) > (right - left) / 10 for other in shown.values()):
            shown[str(name)] = position
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(shown.values()), list(shown))
    top.set_xlabel(label, fontsize=LABEL_SIZE)
    top.tick_params(labelsize=TICK_SIZE)
