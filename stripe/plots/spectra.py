"""The spectrum of attention: how much variance the first directions hold, and the scores of images along them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stripe.gate import name_of
from stripe.plots.drawing import (
    COLUMN_WIDTH,
    LABEL_SIZE,
    PAGE_WIDTH,
    TICK_SIZE,
    draw_by_gate,
    dress,
    name_interval,
    new_axes,
    palette,
    short_names,
)
from stripe.stats import CONFIDENCE


def rank_curve(table: pd.DataFrame, *, ax: Axes | None = None, title: str = "", confidence: float = CONFIDENCE) -> Axes:
    """Draw the share of variance that the first k directions hold, a line per gate, from `stripe.stats.rank_table`.

    `confidence` is the level that the table was made with; the axis names it.

    Example:
        >>> import stripe
        >>> run = stripe.load_example()
        >>> spectra = {gate.name: stripe.stats.spectrum(run.attention(gate, 20)) for gate in run.gates}
        >>> ax = rank_curve(stripe.stats.rank_table(spectra))
    """
    ax = new_axes(ax, height=2.6)
    draw_by_gate(ax, table, "share", over="directions", interval=("share_low", "share_high"))
    named = name_interval(table["share_low"], confidence)
    dress(ax, "directions, the widest first", f"share of variance over images\n{named}", title)
    ax.set_ylim(0, 1.03)
    return ax


def scores(
    panels: Mapping[Any, npt.ArrayLike],
    *,
    shares: Mapping[Any, float] | None = None,
    labels: npt.ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """Draw images along the first two directions of gates, a panel per gate, coloured by class.

    Both axes of a panel have the same scale, so that it shows how much more images vary along the first direction.

    Args:
        panels: {gate: scores (N, 2 or more)}, as `stripe.stats.Spectrum.scores` gives them.
        shares: by gate, the share of variance that both directions hold together, for the titles.
        labels: class of every image, (N,); images of a negative label, such as an unknown one, are drawn in grey.
        title: above all panels.

    Raises:
        ValueError: no panel, scores of another shape, or another number of labels than images.

    Example:
        >>> import stripe
        >>> run = stripe.load_example()
        >>> attention = run.attention("layer3.1", 20)
        >>> panels = {"layer3.1": stripe.stats.spectrum(attention).scores(attention)}
        >>> figure = scores(panels, labels=run.labels(20))
    """
    named = {name_of(gate): np.asarray(values, dtype=float) for gate, values in panels.items()}
    count = len(next(iter(named.values()))) if named else 0
    classes = np.full(count, -1) if labels is None else np.asarray(labels)
    for gate, values in named.items():
        if values.ndim != 2 or values.shape[1] < 2 or len(values) != len(classes):
            raise ValueError(f"panels[{gate}] {values.shape}; expected ({len(classes)} images, 2 or more directions)")
    if not named:
        raise ValueError("panels is empty; expected scores (images, directions) by gate")
    told = {name_of(gate): f": {100 * share:.1f} % of the variance" for gate, share in (shares or {}).items()}
    columns = min(3, len(named))
    rows = math.ceil(len(named) / columns)
    size = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH, 0.8 + 2.2 * rows
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    known = np.unique(classes[classes >= 0])
    colors = dict(zip(known.tolist(), palette(len(known)), strict=True))
    every = [colors.get(each, (0.7, 0.7, 0.7)) for each in classes.tolist()]
    for ax, (gate, values), short in zip(axes.flat, named.items(), short_names(list(named)), strict=False):
        ax.scatter(values[:, 0], values[:, 1], s=3, c=every, alpha=0.7, linewidth=0, rasterized=True)
        ax.set_aspect("equal", adjustable="datalim")
        dress(ax, "direction 1", "direction 2", f"{short}{told.get(gate, '')}")
    for ax in axes.flat[len(named) :]:
        ax.remove()
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    marks = [Line2D([], [], color=color, linestyle="", marker="o", markersize=3) for color in colors.values()]
    if marks:
        names = [f"class {label}" for label in colors]
        fig.legend(marks, names, loc="outside lower center", ncols=2 * columns, fontsize=TICK_SIZE, frameon=False)
    return fig
