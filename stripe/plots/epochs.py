"""One value per gate and epoch: stripe strength, drift, and the curves of a training."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stripe.plots.drawing import (
    LABEL_SIZE,
    OBSERVED,
    PAGE_WIDTH,
    TICK_SIZE,
    Decimals,
    draw_by_gate,
    dress,
    gate_colors,
    name_interval,
    new_axes,
    short_names,
    stretches,
    tick_integers,
)
from stripe.stats import CONFIDENCE


def strength_by_gate(
    table: pd.DataFrame, *, ax: Axes | None = None, title: str = "", confidence: float = CONFIDENCE
) -> Axes:
    """Draw stripe strength with its interval, one row per gate, from one epoch's rows of `stripe.stats.summarize`.

    `confidence` is the level that the table was made with; the axis names it.

    Example:
        >>> import stripe
        >>> table = stripe.stats.summarize(stripe.load_example())
        >>> ax = strength_by_gate(table[table["epoch"] == 20])
    """
    if table["gate"].duplicated().any():
        epochs = table["epoch"].unique().tolist()
        raise ValueError(f"table holds epochs {epochs}; expected one row a gate: select one epoch")
    import seaborn as sns

    ax = new_axes(ax, height=0.95 + 0.14 * len(table))
    rows, names = np.arange(len(table)), short_names(list(table["gate"]))
    ax.hlines(rows, table["strength_low"], table["strength_high"], color=OBSERVED, linewidth=1)
    sns.scatterplot(x=table["strength"].to_numpy(), y=rows, color=OBSERVED, s=12, linewidth=0, ax=ax)
    ax.set(xlim=(0, 1), ylim=(len(table) - 0.5, -0.5))
    ax.set_yticks(rows, names)
    dress(ax, f"stripe strength\n{name_interval(table['strength_low'], confidence)}", "gate", title)
    return ax


def strength_over_epochs(
    table: pd.DataFrame, *, ax: Axes | None = None, title: str = "", confidence: float = CONFIDENCE
) -> Axes:
    """Draw stripe strength with its interval, one line per gate, from the rows of `stripe.stats.summarize`.

    `confidence` is the level that the table was made with; the axis names it.

    Example:
        >>> import stripe
        >>> ax = strength_over_epochs(stripe.stats.summarize(stripe.load_example()))
    """
    ax = new_axes(ax, height=2.6)
    draw_by_gate(ax, table, "strength", interval=("strength_low", "strength_high"))
    dress(ax, "epoch", f"stripe strength\n{name_interval(table['strength_low'], confidence)}", title)
    ax.set_ylim(0, 1)
    return ax


def drift_over_epochs(table: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw drift on a logarithmic axis, one line per gate, from the rows of `stripe.stats.summarize`.

    Where not every epoch was recorded, each drift is divided by the number of epochs it spans, so that steps of
    different lengths compare, and the axis says so. A drift of exactly 0 leaves a gap.

    Raises:
        ValueError: no row has a drift, which takes two recorded epochs.
    """
    if not table["drift"].notna().any():
        raise ValueError("table holds no drift; expected at least two recorded epochs of a gate: record one more")
    ax = new_axes(ax, height=2.6)
    table = table.sort_values("epoch", kind="stable")
    took = table.groupby("gate", sort=False)["epoch"].diff()
    uneven = bool((took.dropna() != 1).any())
    if uneven:
        table = table.assign(drift=table["drift"] / took)
    draw_by_gate(ax, table, "drift")
    if (table["drift"] > 0).any():
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set(major_formatter=Decimals(), minor_formatter=Decimals())
    label = "drift per epoch\n(mean between recorded epochs)" if uneven else "drift since the epoch before"
    dress(ax, "epoch", label, title)
    return ax


def training_curves(metrics: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """Draw loss and accuracy over epochs from {label: rows of a run's metrics.csv}."""
    import seaborn as sns

    fig, axes = plt.subplots(1, 2, figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    parts = {"train": "training", "val": "validation"}
    for ax, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        curves = pd.concat(
            rows[["epoch"]].assign(run=label, images=images, value=rows[f"{part}_{quantity}"])
            for label, rows in metrics.items()
            for part, images in parts.items()
        )
        sns.lineplot(
            stretches(curves, ["run", "images"], "value"), x="epoch", y="value", hue="run", style="images",
            style_order=["validation", "training"], palette=gate_colors(len(metrics)), units="stretch",
            estimator=None, linewidth=1, legend="full" if ax is axes[1] else False, ax=ax,
        )  # fmt: skip
        tick_integers(ax.xaxis)
        dress(ax, "epoch", "accuracy (%)" if quantity == "accuracy" else quantity, "")
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    handles, labels = axes[1].get_legend_handles_labels()
    axes[1].get_legend().remove()
    named = [pair for pair in zip(handles, labels, strict=True) if pair[1] not in ("run", "images")]
    fig.legend(*zip(*named, strict=True), loc="outside lower center", ncols=3, fontsize=TICK_SIZE, frameon=False)
    return fig
