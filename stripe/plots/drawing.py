"""What the plots share: sizes and colours, checks of vectors, names of gates, ticks and legends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.typing import ColorType

RESOLUTION = 200  # dots per inch assumed for a heatmap: a matrix with more values than pixels is averaged to them
COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.9  # inches: one column and both columns of a printed page
LABEL_SIZE, TICK_SIZE = 8, 7  # points
HEATMAP = colormaps["viridis"].with_extremes(bad="0.75")  # grey where a value is not finite
OBSERVED, LEARNED = "#0173B2", "#D55E00"  # blue and vermilion of seaborn's colour-blind palette
FEW = 8  # an axis with at most this many values has a tick at each
LEGEND_ROOM = 8  # more gates than this are named by a colour bar
MARKERS = "os^DvPX*"  # LEGEND_ROOM of them

Array = npt.NDArray[np.floating]


def new_axes(ax: Axes | None, *, height: float) -> Axes:
    """Return `ax`, or the Axes of a new figure of one column's width."""
    return ax or plt.subplots(figsize=(COLUMN_WIDTH, height), layout="constrained")[1]


def require_vectors(**vectors: npt.ArrayLike) -> list[Array]:
    """Return vectors as arrays; ValueError unless each is (C,) with the same C."""
    arrays = [np.asarray(values, dtype=float) for values in vectors.values()]
    if any(array.ndim != 1 or array.size != arrays[0].size for array in arrays):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(vectors, arrays, strict=True))
        raise ValueError(f"{shapes}; expected (channels,), the same for each")
    return arrays


def dress(ax: Axes, xlabel: str, ylabel: str, title: str) -> None:
    """Label the axes and set the title, in the text sizes that all plots share."""
    ax.set_xlabel(xlabel, fontsize=LABEL_SIZE)
    ax.set_ylabel(ylabel, fontsize=LABEL_SIZE)
    ax.set_title(title, fontsize=LABEL_SIZE, wrap=True)
    ax.tick_params(which="both", labelsize=TICK_SIZE)
    ax.yaxis.get_offset_text().set_fontsize(TICK_SIZE)


def sequence(count: int) -> Array:
    """Return `count` colours (count, 4) from dark to light, short of a yellow too pale for a line."""
    return colormaps["viridis"](np.linspace(0, 0.85, count))


def palette(count: int) -> list[tuple[float, float, float]]:
    """Return `count` colours that every kind of colour vision tells apart; after ten they repeat."""
    import seaborn as sns

    return list(sns.color_palette("colorblind", count))


def gate_colors(count: int) -> list[ColorType]:
    """Return a colour for each of `count` things in order: few have distinct colours, many go from dark to light."""
    return [*palette(count)] if count <= LEGEND_ROOM else [*map(tuple, sequence(count))]


def gate_markers(count: int) -> list[str]:
    """Return a marker for each of `count` things in order: a few get distinct ones, which tell them apart in grey."""
    return list(MARKERS[:count]) if count <= LEGEND_ROOM else ["o"] * count


def name_gates(ax: Axes, gates: Sequence[str]) -> None:
    """Name `gates`, drawn in their colours in this order, by a legend or, for many gates, by a colour bar."""
    names = short_names(gates)
    if len(gates) <= LEGEND_ROOM:
        drawn = zip(gate_colors(len(gates)), gate_markers(len(gates)), names, strict=True)
        legend_below(ax, [_mark(*each) for each in drawn])
        return
    mappable = ScalarMappable(Normalize(0.5, len(gates) + 0.5), ListedColormap(sequence(len(gates))))
    bar = ax.figure.colorbar(mappable, ax=ax, ticks=np.linspace(1, len(gates), 5).round())
    dress(bar.ax, "", f"gate 1: {names[0]}\ngate {len(gates)}: {names[-1]}", "")


def draw_by_gate(
    ax: Axes, table: pd.DataFrame, column: str, *, over: str = "epoch", interval: tuple[str, str] | None = None
) -> None:
    """Draw one column over another, a line per gate with its interval, and name the gates in order of appearance."""
    import seaborn as sns

    gates = list(table["gate"].unique())
    colors = dict(zip(gates, gate_colors(len(gates)), strict=True))
    markers = dict(zip(gates, gate_markers(len(gates)), strict=True))
    rows = stretches(table.sort_values(over), ["gate"], column)
    sns.lineplot(
        rows, x=over, y=column, hue="gate", hue_order=gates, palette=colors, style="gate", style_order=gates,
        markers=markers, dashes=False, units="stretch", estimator=None, linewidth=0.8, markersize=2.5,
        markeredgewidth=0, legend=False, ax=ax,
    )  # fmt: skip
    if interval:
        paler_when_many = 0.5 / (1 + len(gates) ** 0.5)
        for gate, own in rows.groupby("gate", sort=False):
            low, high = (own[bound] for bound in interval)
            ax.fill_between(own[over], low, high, color=colors[gate], alpha=paler_when_many, linewidth=0.5)
    values = sorted(set(rows[over]))
    if len(values) <= FEW:
        ax.set_xticks(values)
    else:
        tick_integers(ax.xaxis)
    name_gates(ax, gates)


def stretches(table: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Number (column `stretch`) the stretches of each curve between missing values: no line is drawn across a gap."""
    table = table.reset_index(drop=True)
    return table.assign(stretch=table[column].isna().groupby([table[key] for key in keys], sort=False).cumsum())


def name_interval(ends: pd.Series[float], confidence: float) -> str:
    """Return the name of the interval that is drawn, or a note that there is none."""
    return f"({100 * confidence:g} % interval)" if ends.notna().any() else "(no interval)"


def short_names(gates: Sequence[str]) -> list[str]:
    """Return the gates' names without the last parts of their module paths, where all gates share them."""
    paths = [gate.split(".") for gate in gates]
    ends = zip(*(path[:0:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, ends))) if len(gates) > 1 else 0
    return [".".join(path[: len(path) - shared]) for path in paths]


def tick_integers(axis: Axis) -> None:
    """Put a handful of ticks on the axis, all at whole numbers."""
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _mark(color: ColorType, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=color, linewidth=0.8, marker=marker, markersize=3, label=label)


def legend_below(ax: Axes, handles: Sequence[Any] | None = None) -> None:
    """Place the legend under the x label, where it hides no data, in as many columns as its names allow."""
    handles = handles or ax.get_legend_handles_labels()[0]
    longest = max(len(str(handle.get_label())) for handle in handles)
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.2,
        ncols=max(1, min(3, 45 // longest)),  # about 45 letters fit into COLUMN_WIDTH
        columnspacing=1.2,
        handlelength=1.2,
        fontsize=TICK_SIZE,
        frameon=False,
    )


class Decimals(LogFormatter):
    """Labels ticks as LogFormatter does, but writes 0.02 instead of 2e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the text of a tick."""
        return f"{x:g}" if super().__call__(x, pos) else ""
