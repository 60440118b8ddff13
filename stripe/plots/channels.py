"""One value per channel: standard deviations over images, class means, learned vectors beside observed stripes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
    LEARNED,
    LEGEND_ROOM,
    OBSERVED,
    PAGE_WIDTH,
    TICK_SIZE,
    Array,
    dress,
    gate_colors,
    gate_markers,
    legend_below,
    name_gates,
    new_axes,
    palette,
    require_vectors,
    sequence,
    short_names,
)


def std_per_channel(std: Mapping[str, npt.ArrayLike], *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw standard deviations over images, {label: (C,)}, against the channel index."""
    ax = new_axes(ax, height=2.0)
    for (label, values), name, color in zip(std.items(), short_names(list(std)), sequence(len(std)), strict=True):
        _draw_steps(ax, label, values, color=color, name=name)
    dress(ax, "channel index", "std over images", title)
    if len(std) > 1:
        legend_below(ax)
    return ax


def std_grid(panels: Mapping[tuple[Any, int], npt.ArrayLike], *, title: str = "") -> Figure:
    """Draw {(gate, epoch): standard deviations over images (C,)}: a panel per gate, a line per epoch, one std axis."""
    colors = {f"epoch {epoch}": color for epoch, color in _colored(panels, sequence)}
    named = {(name_of(gate), f"epoch {epoch}"): values for (gate, epoch), values in panels.items()}
    return _line_grid(named, colors, "std over images", title)


def excitation(panels: Mapping[tuple[Any, int], npt.ArrayLike], *, title: str = "") -> Figure:
    """Draw {(gate, class): mean attention of the class (C,)}: a panel per gate, a line per class, on one axis.

    Where the lines of a panel coincide, the network at that depth attends to every class alike (Hu et al. 2018,
    figure 5, shows this for some classes of ImageNet).

    Example:
        >>> import stripe
        >>> run = stripe.load_example()
        >>> moments = run.moments([20], ["layer1.0", "layer3.1"])
        >>> means = {gate: stripe.stats.class_means(of) for (_, gate), of in moments.items()}
        >>> figure = excitation({(gate, k): its[k] for gate, its in means.items() for k in (0, 5)})
    """
    colors = {f"class {label}": color for label, color in _colored(panels, palette)}
    named = {(name_of(gate), f"class {label}"): values for (gate, label), values in panels.items()}
    return _line_grid(named, colors, "mean attention", title)


def directions(panels: Mapping[tuple[Any, int], npt.ArrayLike], *, title: str = "") -> Figure:
    """Draw {(gate, k): k-th direction of its attention (C,)}: a panel per gate, a line per direction, on one axis.

    Example:
        >>> import stripe
        >>> found = stripe.stats.spectrum(stripe.load_example().attention("layer3.1", 20))
        >>> figure = directions({("layer3.1", k): found.directions[k - 1] for k in (1, 2)})
    """
    colors = {f"direction {k}": color for k, color in _colored(panels, palette)}
    named = {(name_of(gate), f"direction {k}"): values for (gate, k), values in panels.items()}
    return _line_grid(named, colors, "direction (unit vector)", title)


def _colored(panels: Mapping[tuple[Any, int], Any], colors: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """Give a colour to each epoch, class or number of the panels, in ascending order; ValueError without a panel."""
    if not panels:
        raise ValueError("panels is empty; expected vectors (channels,) by gate and epoch, class or number")
    keys = sorted({key for _, key in panels})
    return zip(keys, colors(len(keys)), strict=True)


def _line_grid(
    panels: Mapping[tuple[str, str], npt.ArrayLike], colors: Mapping[str, Any], ylabel: str, title: str
) -> Figure:
    """Draw {(gate, name of a line): (C,)}: a panel per gate, all on one axis, with one legend below the panels."""
    gates = list(dict.fromkeys(gate for gate, _ in panels))
    columns = min(3, len(gates))
    rows = math.ceil(len(gates) / columns)
    size = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH, 0.8 + 1.4 * rows
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for (gate, name), values in panels.items():
        ax = axes.flat[gates.index(gate)]
        _draw_steps(ax, f"panels[{gate}, {name}]", values, color=colors[name], name=name)
    for number, (ax, name) in enumerate(zip(axes.flat, short_names(gates), strict=False)):
        dress(ax, "channel index", "" if number % columns else ylabel, name)
    for ax in axes.flat[len(gates) :]:
        ax.remove()
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=2 * columns, fontsize=TICK_SIZE, frameon=False)
    return fig


def learned_over_stripe(
    learned: npt.ArrayLike,
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Draw a learned vector (C,) over the observed stripe's mean (C,) +- std (C,), channels sorted."""
    learned, mean, std = require_vectors(learned=learned, mean=mean, std=std)
    ax = new_axes(ax, height=2.4)
    order, rank = np.argsort(mean, kind="stable"), np.arange(mean.size)
    learned, mean, std = learned[order], mean[order], std[order]
    import seaborn as sns

    sns.scatterplot(x=rank, y=learned, color=LEARNED, s=8, linewidth=0, zorder=3, label="learned vector", ax=ax)
    sns.lineplot(x=rank, y=mean, estimator=None, color=OBSERVED, linewidth=1, label="observed stripe", ax=ax)
    ax.fill_between(rank, mean - std, mean + std, color=OBSERVED, alpha=0.25, linewidth=0, label="\u00b1 1 std")
    dress(ax, "channel, sorted by observed stripe", "attention", title)
    legend_below(ax)
    return ax


def learned_scatter(
    vectors: Mapping[Any, tuple[npt.ArrayLike, npt.ArrayLike]], *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw {gate: (learned vector (C,), observed stripe (C,))}, with the line on which the two agree.

    Each gate has its own colour: pooled, gates of different means correlate, whatever their channels do.
    """
    import seaborn as sns

    beside = len(vectors) > LEGEND_ROOM  # the gates' names go beside the axes, not below
    ax = new_axes(ax, height=COLUMN_WIDTH * 0.8 if beside else COLUMN_WIDTH + 0.4)
    pairs = {
        name_of(gate): require_vectors(**{f"learned of {name_of(gate)}": learned, f"stripe of {name_of(gate)}": mean})
        for gate, (learned, mean) in vectors.items()
    }
    points = pd.concat(
        [pd.DataFrame({"gate": gate, "x": mean, "y": learned}) for gate, (learned, mean) in pairs.items()]
    )
    colors = dict(zip(pairs, gate_colors(len(pairs)), strict=True))
    markers = dict(zip(pairs, gate_markers(len(pairs)), strict=True))
    marks = {"hue": "gate", "palette": colors, "style": "gate", "markers": markers}
    sns.scatterplot(points, x="x", y="y", **marks, s=8, linewidth=0, alpha=0.8, legend=False, ax=ax)
    limits = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    dress(ax, "observed stripe", "learned vector", title)
    if len(pairs) > 1:
        name_gates(ax, list(pairs))
    ax.plot(limits, limits, color="0.5", linewidth=0.8, zorder=0)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    return ax


def _draw_steps(ax: Axes, what: str, values: npt.ArrayLike, *, color: Array, name: str) -> None:
    """Draw one value per channel, (C,), on an axis that includes 0: only against 0 does a small std look small."""
    (steps,) = require_vectors(**{what: values})
    drawn = ax.stairs(steps, np.arange(steps.size + 1) - 0.5, baseline=None, color=color, linewidth=0.8, label=name)
    drawn.sticky_edges.y.clear()  # otherwise matplotlib 3.8 ends the axis at 0, right on a line of zeros
    ax.update_datalim([(0, 0)])
    ax.margins(x=0)
