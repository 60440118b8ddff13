"""Figures of stripes. Finished numbers in, Axes or Figure out: no statistic, no file, no global setting.

seaborn draws what maps columns of a table to colours, marks and dashes: curves and scatter. It is loaded by the first
figure that needs it, and is never left to estimate or resample anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.typing import ColorType

from stripe.gate import name_of
from stripe.stats import CONFIDENCE

__all__ = [
    "before_after", "drift_over_epochs", "fold_pareto", "heatmap_grid", "learned_over_stripe", "learned_scatter",
    "std_grid", "std_per_channel", "strength_by_gate", "strength_over_epochs", "stripe_heatmap", "training_curves",
]  # fmt: skip

COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.9  # inches: one column and both columns of a printed page
RESOLUTION = 200  # dots per inch that a heatmap counts on: larger matrices are averaged to the pixels there are
FEW_EPOCHS = 8  # as many or fewer are named one by one on their axis
LABEL_SIZE, TICK_SIZE = 8, 7  # points
HEATMAP = colormaps["viridis"].with_extremes(bad="0.75")  # grey: not finite
OBSERVED, LEARNED = "#0173B2", "#D55E00"  # blue and vermilion of seaborn's colour-blind palette
LEGEND_ROOM = 8  # more gates than this are named by a colour bar

Array = npt.NDArray[np.floating]
Whole = npt.NDArray[np.integer]


# ---- image x channel -------------------------------------------------------------------------------------


def stripe_heatmap(
    values: npt.ArrayLike,
    *,
    ax: Axes | None = None,
    title: str = "",
    label: str = "attention",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Axes:
    """Draw values (N, C) as image index x channel index; equal rows show as vertical stripes.

    Where there are more values than pixels, neighbours are averaged, and the axis says how many: to leave some out
    would draw patterns that are not there, but means over images make stripes look cleaner than they are. Colours
    span what is shown, as the colour bar says; give `vmin` and `vmax` so that figures compare.

    Example:
        >>> import stripe
        >>> run = stripe.load_example("cifar10-se-resnet20")
        >>> ax = stripe.plots.stripe_heatmap(run.attention("layer1.0", 20), title="layer1.0, epoch 20")
        >>> ax.figure.savefig("/dev/null", format="png")
    """
    ax = _axes(ax, height=2.4)
    image, means = _draw_heatmap(ax, _matrix("values", values), vmin, vmax)
    _dress(ax, f"channel index{_means_of(means[1])}", f"image index{_means_of(means[0])}", title)
    _add_colorbar([image], [ax], label)
    return ax


def before_after(
    squeeze: npt.ArrayLike,
    attention: npt.ArrayLike,
    *,
    std: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    strength: tuple[float, float] | None = None,
    cv: tuple[float, float] | None = None,
    labels: npt.ArrayLike | None = None,
    images: int = 20,
    channels: int = 60,
    title: str = "",
) -> Figure:
    """Draw the first images and channels of one gate's squeeze (N, C) beside those of its attention (N, C).

    A squeeze has no fixed range, so by one rule for both each panel's colours span the values it shows, as
    its colour bar says: neither side looks calmer for a wider scale.

    Args:
        squeeze: what the gate scales, averaged over space.
        attention: what it scales it by.
        std: standard deviations over images of both, (C,) each, drawn below as a share of the colour range, on one
            axis for both.
        strength: stripe strengths of both, over all images, for the titles.
        cv: coefficients of variation of both, likewise.
        labels: class of every image, (N,), negative where unknown; rows are sorted by it, and classes are marked.
        images: how many rows to draw.
        channels: how many columns.
        title: above both panels.

    Raises:
        ValueError: shapes that do not belong together.

    Example:
        >>> import stripe
        >>> run = stripe.load_example()
        >>> figure = before_after(run.squeeze("layer1.0", 20), run.attention("layer1.0", 20), title="layer1.0")
    """
    before, after = _matrix("squeeze", squeeze), _matrix("attention", attention)
    if before.shape != after.shape:
        raise ValueError(f"squeeze {before.shape} and attention {after.shape} differ: pass one gate and epoch")
    order, classes = _by_class(labels, images, len(before))
    heights = (2,) if std is None else (2, 1)
    size = PAGE_WIDTH, 1.0 + 1.2 * len(heights)
    fig, axes = plt.subplots(
        len(heights), 2, figsize=size, squeeze=False, sharex=True, sharey="row", height_ratios=heights
    )
    fig.set_layout_engine("constrained", wspace=0.12)
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    panels = (("Before", "squeeze", before), ("After", "attention", after))
    for column, (moment, label, values) in enumerate(panels):
        top, bottom = axes[0, column], axes[-1, column]
        image, means = _draw_heatmap(top, values[order, :channels], None, None)
        measured = [f"strength {strength[column]:.2f}"] if strength else []
        measured += [f"CV {cv[column]:.3f}"] if cv else []
        heading = "\n".join(filter(None, (f"{moment} attention module", ", ".join(measured))))
        _dress(top, "", f"{'image index' if classes is None else 'class of the image'}{_means_of(means[0])}", heading)
        if classes is not None:
            _mark_classes(top, classes)
        _add_colorbar([image], [top], label)
        if std is not None:
            deviation, _ = _vectors(**{f"std of {label}": std[column], label: values[0]})
            low, high = image.get_clim()
            std_per_channel({label: deviation[:channels] / (high - low or 1.0)}, ax=bottom)
            bottom.set_ylabel("std over images\n/ colour range")
        bottom.set_xlabel(f"channel index{_means_of(means[1])}", fontsize=LABEL_SIZE)
    for ax in axes.flat:
        ax.label_outer()
    return fig


def heatmap_grid(
    panels: Mapping[tuple[Any, int], npt.ArrayLike],
    *,
    title: str = "",
    label: str = "attention",
    limits: tuple[float, float] | Mapping[Any, tuple[float, float]] | None = None,
) -> Figure:
    """Draw {(gate, epoch): values (N, C)} as gates (down) x epochs (across), on one colour scale a gate.

    Gates differ so much in their values that on one scale for all most would look blank; epochs of one gate compare.
    Where a panel has more values than pixels, neighbours are averaged, and the gate's label says how many. Gates keep
    their order in `panels`; a combination that is missing there stays empty.

    Args:
        panels: the values of every panel.
        title: above all.
        label: what the values are.
        limits: least and greatest value of the colours, of every gate or the same for all, such as (0, 1); by default
            those of the gate's values.

    Raises:
        ValueError: there is no panel, or one that is no matrix.
    """
    if not panels:
        raise ValueError("panels is empty; expected {(gate, epoch): values (images, channels)}")
    named = {(name_of(gate), epoch): values for (gate, epoch), values in panels.items()}
    matrices = {key: _matrix(f"panels[{key}]", values) for key, values in named.items()}
    channels = {gate: values.shape[1] for (gate, _), values in matrices.items()}
    epochs = sorted({epoch for _, epoch in matrices})
    size = max(PAGE_WIDTH, 2 + 0.25 * len(epochs)), 0.9 + 0.8 * len(channels)
    fig, axes = plt.subplots(len(channels), len(epochs), figsize=size, squeeze=False)
    fig.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    scales = _scales(matrices, limits)
    for row, gate, name in zip(axes, channels, _short_names(list(channels)), strict=True):
        images, note = [], ""
        for ax, epoch in zip(row, epochs, strict=True):
            if (gate, epoch) in matrices:
                image, means = _draw_heatmap(ax, matrices[gate, epoch], *scales[gate], room=0.9)
                images.append(image)
                counts = [f"{n} {what}" for n, what in zip(means, ("images", "channels"), strict=True) if n > 1]
                note = f"\nmeans of {' x '.join(counts)}" if counts else ""
            else:
                ax.set_frame_on(False)
            ax.set(xticks=[], yticks=[])
        row_label = f"{name}\n{channels[gate]} channels{note}"
        row[0].set_ylabel(row_label, rotation=0, ha="right", va="center", fontsize=TICK_SIZE)
        _add_colorbar(images, row.tolist(), label, aspect=8)
    for ax, epoch in zip(axes[0], epochs, strict=True):
        ax.set_title(epoch, fontsize=TICK_SIZE)
    fig.suptitle(f"{title}\nepoch" if title else "epoch", fontsize=LABEL_SIZE, wrap=True)
    fig.supxlabel("channel index", fontsize=LABEL_SIZE)
    fig.supylabel("image index", fontsize=LABEL_SIZE)
    return fig


# ---- one value a channel ---------------------------------------------------------------------------------


def std_per_channel(std: Mapping[str, npt.ArrayLike], *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw standard deviations over images, {label: (C,)}, against the channel index."""
    ax = _axes(ax, height=2.0)
    for (label, values), name, color in zip(std.items(), _short_names(list(std)), _sequence(len(std)), strict=True):
        _draw_steps(ax, label, values, color=color, name=name)
    _dress(ax, "channel index", "std over images", title)
    if len(std) > 1:
        _legend_below(ax)
    return ax


def std_grid(panels: Mapping[tuple[Any, int], npt.ArrayLike], *, title: str = "") -> Figure:
    """Draw {(gate, epoch): standard deviations over images (C,)}: a panel a gate, a line an epoch, one std axis."""
    if not panels:
        raise ValueError("panels is empty; expected {(gate, epoch): std (channels,)}")
    named = {(name_of(gate), epoch): values for (gate, epoch), values in panels.items()}
    gates, epochs = list(dict.fromkeys(gate for gate, _ in named)), sorted({epoch for _, epoch in named})
    columns = min(3, len(gates))
    rows = math.ceil(len(gates) / columns)
    size = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH, 0.8 + 1.4 * rows
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    colors = dict(zip(epochs, _sequence(len(epochs)), strict=True))
    for (gate, epoch), values in named.items():
        ax = axes.flat[gates.index(gate)]
        _draw_steps(ax, f"panels[{(gate, epoch)}]", values, color=colors[epoch], name=f"epoch {epoch}")
    for number, (ax, name) in enumerate(zip(axes.flat, _short_names(gates), strict=False)):
        _dress(ax, "channel index", "" if number % columns else "std over images", name)
    for ax in axes.flat[len(gates) :]:
        ax.remove()
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    handles = [Line2D([], [], color=color, label=f"epoch {epoch}") for epoch, color in colors.items()]
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
    learned, mean, std = _vectors(learned=learned, mean=mean, std=std)
    ax = _axes(ax, height=2.4)
    order, rank = np.argsort(mean, kind="stable"), np.arange(mean.size)
    learned, mean, std = learned[order], mean[order], std[order]
    import seaborn as sns

    sns.scatterplot(x=rank, y=learned, color=LEARNED, s=8, linewidth=0, zorder=3, label="learned vector", ax=ax)
    sns.lineplot(x=rank, y=mean, estimator=None, color=OBSERVED, linewidth=1, label="observed stripe", ax=ax)
    ax.fill_between(rank, mean - std, mean + std, color=OBSERVED, alpha=0.25, linewidth=0, label="\u00b1 1 std")
    _dress(ax, "channel, sorted by observed stripe", "attention", title)
    _legend_below(ax)
    return ax


def learned_scatter(
    vectors: Mapping[Any, tuple[npt.ArrayLike, npt.ArrayLike]], *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw {gate: (learned vector (C,), observed stripe (C,))}, dark to light, with the line where both agree.

    Gates are told apart, since those that differ in their mean correlate when pooled, whatever their channels do.
    """
    import seaborn as sns

    beside = len(vectors) > LEGEND_ROOM  # the gates' names, not below
    ax = _axes(ax, height=COLUMN_WIDTH * 0.8 if beside else COLUMN_WIDTH + 0.4)
    pairs = {
        name_of(gate): _vectors(**{f"learned of {name_of(gate)}": learned, f"stripe of {name_of(gate)}": mean})
        for gate, (learned, mean) in vectors.items()
    }
    points = pd.concat(
        [pd.DataFrame({"gate": gate, "x": mean, "y": learned}) for gate, (learned, mean) in pairs.items()]
    )
    colors = dict(zip(pairs, _gate_colors(len(pairs)), strict=True))
    sns.scatterplot(points, x="x", y="y", hue="gate", palette=colors, s=8, linewidth=0, alpha=0.8, legend=False, ax=ax)
    limits = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    _dress(ax, "observed stripe", "learned vector", title)
    if len(pairs) > 1:
        _name_gates(ax, list(pairs))
    ax.plot(limits, limits, color="0.5", linewidth=0.8, zorder=0)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    return ax


# ---- one value a gate and epoch --------------------------------------------------------------------------


def strength_by_gate(
    table: pd.DataFrame, *, ax: Axes | None = None, title: str = "", confidence: float = CONFIDENCE
) -> Axes:
    """Draw stripe strength with its interval, one row a gate, from one epoch's rows of `stripe.stats.summarize`.

    `confidence` is the one that the table was made with; the axis names it.

    Example:
        >>> import stripe
        >>> table = stripe.stats.summarize(stripe.load_example())
        >>> ax = strength_by_gate(table[table["epoch"] == 20])
    """
    if table["gate"].duplicated().any():
        epochs = table["epoch"].unique().tolist()
        raise ValueError(f"table holds epochs {epochs}; expected one row a gate: select one epoch")
    import seaborn as sns

    ax = _axes(ax, height=0.95 + 0.14 * len(table))
    rows, names = np.arange(len(table)), _short_names(list(table["gate"]))
    ax.hlines(rows, table["strength_low"], table["strength_high"], color=OBSERVED, linewidth=1)
    sns.scatterplot(x=table["strength"].to_numpy(), y=rows, color=OBSERVED, s=12, linewidth=0, ax=ax)
    ax.set(xlim=(0, 1), ylim=(len(table) - 0.5, -0.5))
    ax.set_yticks(rows, names)
    _dress(ax, f"stripe strength\n{_interval(table, confidence)}", "gate", title)
    return ax


def strength_over_epochs(
    table: pd.DataFrame, *, ax: Axes | None = None, title: str = "", confidence: float = CONFIDENCE
) -> Axes:
    """Draw stripe strength with its interval, one line a gate, from the rows of `stripe.stats.summarize`.

    `confidence` is the one that the table was made with; the axis names it.

    Example:
        >>> import stripe
        >>> ax = strength_over_epochs(stripe.stats.summarize(stripe.load_example()))
    """
    ax = _axes(ax, height=2.6)
    _draw_by_gate(ax, table, "strength", interval=("strength_low", "strength_high"))
    _dress(ax, "epoch", f"stripe strength\n{_interval(table, confidence)}", title)
    ax.set_ylim(0, 1)
    return ax


def drift_over_epochs(table: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw drift on a logarithmic axis, one line a gate, from the rows of `stripe.stats.summarize`.

    Where not every epoch was recorded, each drift is divided by the epochs it took, so that steps of different
    lengths compare, and the axis says so. A drift of exactly 0 leaves a gap.

    Raises:
        ValueError: no row has a drift, for which it takes two recorded epochs.
    """
    if not table["drift"].notna().any():
        raise ValueError("table holds no drift; expected at least two recorded epochs of a gate: record one more")
    ax = _axes(ax, height=2.6)
    table = table.sort_values("epoch", kind="stable")
    took = table.groupby("gate", sort=False)["epoch"].diff()
    uneven = bool((took.dropna() != 1).any())
    if uneven:
        table = table.assign(drift=table["drift"] / took)
    _draw_by_gate(ax, table, "drift")
    if (table["drift"] > 0).any():
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set(major_formatter=_Decimals(), minor_formatter=_Decimals())
    label = "drift per epoch\n(mean between recorded epochs)" if uneven else "drift since the epoch before"
    _dress(ax, "epoch", label, title)
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
            _stretches(curves, ["run", "images"], "value"), x="epoch", y="value", hue="run", style="images",
            style_order=["validation", "training"], palette=_gate_colors(len(metrics)), units="stretch",
            estimator=None, linewidth=1, legend="full" if ax is axes[1] else False, ax=ax,
        )  # fmt: skip
        _tick_integers(ax.xaxis)
        _dress(ax, "epoch", "accuracy (%)" if quantity == "accuracy" else quantity, "")
    fig.suptitle(title, fontsize=LABEL_SIZE, wrap=True)
    handles, labels = axes[1].get_legend_handles_labels()
    axes[1].get_legend().remove()
    named = [pair for pair in zip(handles, labels, strict=True) if pair[1] not in ("run", "images")]
    fig.legend(*zip(*named, strict=True), loc="outside lower center", ncols=3, fontsize=TICK_SIZE, frameon=False)
    return fig


# ---- folding ---------------------------------------------------------------------------------------------


def fold_pareto(
    variants: pd.DataFrame,
    latencies: pd.DataFrame | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    measure: str = "accuracy",
) -> Axes:
    """Draw what folded networks are worth against their latency, and the front of those that no other beats in both.

    The network without a folded gate is a star and a dashed line of its own; the other networks have a mark and a
    colour for each way of folding. The upper axis translates latency to folded gates, where its labels have room.

    Args:
        variants: a row per network, as `stripe.folding.study` gives it: folded (number of gates), test or else
            validation (the measure in percent), and, where there are several ways of folding, weighting and recovery.
        latencies: as `Study.latencies` or `stripe.folding.latencies` gives it, joined by the column that both tables
            share, folded or network; drawn are the first backend and the largest batch, with their range over the
            rounds. Without it, lines over the number of folded gates are drawn.
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
    ax = _axes(ax, height=2.9)
    marks = {"hue": "variant", "style": "variant", "markers": True, "palette": _palette(len(names)), "ax": ax}
    if latencies is None:
        marks |= {"dashes": False, "estimator": None, "linewidth": 0.8, "markersize": 5, "markeredgewidth": 0.4}
        sns.lineplot(folded, x=x, y=worth, **marks)
        _tick_integers(ax.xaxis)
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
    _dress(ax, label, f"{worth} {measure} (%)", title)
    _legend_below(ax)
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _axes(ax: Axes | None, *, height: float) -> Axes:
    """Return `ax`, or the Axes of a new figure of one column's width."""
    return ax or plt.subplots(figsize=(COLUMN_WIDTH, height), layout="constrained")[1]


def _matrix(name: str, values: npt.ArrayLike) -> Array:
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {matrix.shape}; expected (images, channels), neither of them 0")
    return matrix


def _vectors(**vectors: npt.ArrayLike) -> list[Array]:
    arrays = [np.asarray(values, dtype=float) for values in vectors.values()]
    if any(array.ndim != 1 or array.size != arrays[0].size for array in arrays):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(vectors, arrays, strict=True))
        raise ValueError(f"{shapes}; expected (channels,), the same for each")
    return arrays


def _dress(ax: Axes, xlabel: str, ylabel: str, title: str) -> None:
    ax.set_xlabel(xlabel, fontsize=LABEL_SIZE)
    ax.set_ylabel(ylabel, fontsize=LABEL_SIZE)
    ax.set_title(title, fontsize=LABEL_SIZE, wrap=True)
    ax.tick_params(which="both", labelsize=TICK_SIZE)
    ax.yaxis.get_offset_text().set_fontsize(TICK_SIZE)


def _draw_heatmap(
    ax: Axes, values: Array, vmin: float | None, vmax: float | None, *, room: float = 0.75
) -> tuple[AxesImage, tuple[int, int]]:
    """Draw values (N, C), averaged to the pixels of `ax`; return the image and the (rows, columns) of a mean.

    `room` is the share of `ax` that labels and colour bar will leave to the image.
    """
    inches = room * np.array(_figure_size(ax)) * ax.get_position().size
    columns, rows = (max(1, int(pixels)) for pixels in inches * RESOLUTION)
    means = -(-values.shape[0] // rows), -(-values.shape[1] // columns)
    shown = _block_means(values, means)
    edge = shown.shape[1] * means[1] - 0.5, shown.shape[0] * means[0] - 0.5
    image = ax.imshow(
        shown, cmap=HEATMAP, vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest",
        extent=(-0.5, edge[0], edge[1], -0.5),
    )  # fmt: skip
    ax.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    for axis in (ax.xaxis, ax.yaxis):
        _tick_integers(axis)
    return image, means


def _figure_size(ax: Axes) -> tuple[float, float]:
    width, height = ax.get_figure(root=True).get_size_inches()  # type: ignore[union-attr]
    return float(width), float(height)


def _block_means(values: Array, sizes: tuple[int, int]) -> Array:
    """Average blocks of so many rows and columns; the last ones may be smaller."""
    for axis, size in enumerate(sizes):
        if size > 1:
            starts = np.arange(0, values.shape[axis], size)
            counts = np.diff(starts, append=values.shape[axis])
            values = np.add.reduceat(values, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return values


def _means_of(count: int) -> str:
    return "" if count == 1 else f", means of {count}"


def _by_class(labels: npt.ArrayLike | None, images: int, count: int) -> tuple[Whole, Whole | None]:
    """Return which of the first images to draw from top to bottom, and their classes where any is known."""
    order = np.arange(min(images, count))
    if labels is None:
        return order, None
    known = np.asarray(labels)
    if known.shape != (count,):
        raise ValueError(f"labels have shape {known.shape}; expected ({count},), one for each image")
    order = np.argsort(known[order], kind="stable")
    return order, known[order] if (known[order] >= 0).all() else None


def _mark_classes(ax: Axes, classes: Whole) -> None:
    """Name each class beside its rows, and draw a line between classes."""
    starts = np.flatnonzero(np.diff(classes, prepend=classes[0] - 1))
    ends = np.append(starts[1:], len(classes))
    ax.set_yticks((starts + ends - 1) / 2, [str(classes[start]) for start in starts])
    ax.tick_params(axis="y", length=0)
    ax.hlines(starts[1:] - 0.5, *ax.get_xlim(), color="1", linewidth=0.6)


def _scales(
    matrices: Mapping[tuple[str, int], Array],
    limits: tuple[float, float] | Mapping[Any, tuple[float, float]] | None,
) -> dict[str, tuple[float, float]]:
    """Return the ends of each gate's colours."""
    scales: dict[str, tuple[float, float]] = {}
    given = {name_of(gate): ends for gate, ends in limits.items()} if isinstance(limits, Mapping) else {}
    for gate in dict.fromkeys(gate for gate, _ in matrices):
        own = np.concatenate([values.ravel() for (its, _), values in matrices.items() if its == gate])
        own = own[np.isfinite(own)]
        spanned = (float(own.min()), float(own.max())) if own.size else (0.0, 1.0)
        scales[gate] = given.get(gate, spanned) if not isinstance(limits, tuple) else limits
    return scales


def _interval(table: pd.DataFrame, confidence: float) -> str:
    """Name the interval that is drawn, or say that there is none."""
    return f"({100 * confidence:g} % interval)" if table["strength_low"].notna().any() else "(no interval)"


def _draw_steps(ax: Axes, what: str, values: npt.ArrayLike, *, color: Array, name: str) -> None:
    """Draw one value a channel, (C,), on an axis that holds 0: how small a std is shows only against it."""
    (steps,) = _vectors(**{what: values})
    ax.stairs(steps, np.arange(steps.size + 1) - 0.5, baseline=None, color=color, linewidth=0.8, label=name)
    ax.update_datalim([(0, 0)])
    ax.margins(x=0)


def _translate(ax: Axes, positions: pd.Series[float], label: str) -> None:
    """Label the upper edge with the index of `positions` on the x axis: its ends, then others that have room."""
    left, right = ax.get_xlim()
    shown: dict[str, float] = {}
    for name, position in (*positions.iloc[[0, -1]].items(), *positions.items()):
        if all(abs(position - other) > (right - left) / 10 for other in shown.values()):
            shown[str(name)] = position
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(shown.values()), list(shown))
    top.set_xlabel(label, fontsize=LABEL_SIZE)
    top.tick_params(labelsize=TICK_SIZE)


def _add_colorbar(images: Sequence[AxesImage], axes: Sequence[Axes], label: str, aspect: int = 20) -> None:
    """Explain the colours of images that share limits: pointed where values go beyond, a note on grey."""
    values = np.concatenate([np.asarray(image.get_array(), dtype=float).ravel() for image in images])
    finite = values[np.isfinite(values)]
    low, high = images[0].get_clim()
    ends = bool((finite < low).any()), bool((finite > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[ends]
    bar = axes[0].figure.colorbar(images[0], ax=axes, extend=extend, aspect=aspect)
    note = "\n(grey: not finite)" if finite.size < values.size else ""
    _dress(bar.ax, "", label + note, "")


def _sequence(count: int) -> Array:
    """Return `count` colours (count, 4) from dark to light, short of a yellow too pale for a line."""
    return colormaps["viridis"](np.linspace(0, 0.85, count))


def _palette(count: int) -> list[tuple[float, float, float]]:
    """Return `count` colours that every kind of colour vision tells apart; beyond ten they come again."""
    import seaborn as sns

    return list(sns.color_palette("colorblind", count))


def _gate_colors(count: int) -> list[ColorType]:
    """Return a colour for each of `count` things in order: few have distinct colours, many go from dark to light."""
    return [*_palette(count)] if count <= LEGEND_ROOM else [*map(tuple, _sequence(count))]


def _stretches(table: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Number the stretches of each curve between missing values, `stretch`: no line is drawn across what is missing."""
    table = table.reset_index(drop=True)
    return table.assign(stretch=table[column].isna().groupby([table[key] for key in keys], sort=False).cumsum())


def _draw_by_gate(ax: Axes, table: pd.DataFrame, column: str, interval: tuple[str, str] | None = None) -> None:
    """Draw a line a gate, in order of first appearance, and name them."""
    import seaborn as sns

    gates = list(table["gate"].unique())
    colors = dict(zip(gates, _gate_colors(len(gates)), strict=True))
    rows = _stretches(table.sort_values("epoch"), ["gate"], column)
    sns.lineplot(
        rows, x="epoch", y=column, hue="gate", hue_order=gates, palette=colors, units="stretch", estimator=None,
        linewidth=0.8, marker="o", markersize=2.5, markeredgewidth=0, legend=False, ax=ax,
    )  # fmt: skip
    if interval:
        paler_when_many = 0.5 / (1 + len(gates) ** 0.5)
        for gate, own in rows.groupby("gate", sort=False):
            low, high = (own[bound] for bound in interval)
            ax.fill_between(own["epoch"], low, high, color=colors[gate], alpha=paler_when_many, linewidth=0.5)
    _tick_epochs(ax, rows["epoch"])
    _name_gates(ax, gates)


def _name_gates(ax: Axes, gates: Sequence[str]) -> None:
    """Name `gates`, drawn in their colours in this order, by a legend or, where many, a colour bar."""
    names = _short_names(gates)
    if len(gates) <= LEGEND_ROOM:
        colors = _gate_colors(len(gates))
        _legend_below(ax, [_mark(color, name) for color, name in zip(colors, names, strict=True)])
        return
    mappable = ScalarMappable(Normalize(0.5, len(gates) + 0.5), ListedColormap(_sequence(len(gates))))
    bar = ax.figure.colorbar(mappable, ax=ax, ticks=np.linspace(1, len(gates), 5).round())
    _dress(bar.ax, "", f"gate 1: {names[0]}\ngate {len(gates)}: {names[-1]}", "")


# ---- the tables of a fold --------------------------------------------------------------------------------


def _require_columns(name: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in table]:
        raise ValueError(
            f"{name} lacks {', '.join(missing)}; expected the tables of stripe.folding.study: its variants, and its "
            "latencies beside them"
        )


def _timed(variants: pd.DataFrame, latencies: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Give each variant its latency in the first backend at the largest batch; return the rows timed and a label."""
    _require_columns("latencies", latencies, ["backend", "batch", "milliseconds", "low", "high"])
    backend, batch = latencies["backend"].iloc[0], latencies["batch"].max()
    shared = [name for name in ("folded", "network") if name in variants and name in latencies]
    if not shared:
        raise ValueError("variants and latencies share neither folded nor network: they cannot be joined")
    times = latencies[(latencies["backend"] == backend) & (latencies["batch"] == batch)]
    rows = variants.merge(times[[*shared, "milliseconds", "low", "high"]], on=shared)
    return rows, f"latency (ms, {backend}, batch of {batch})"


def _as_folded(variants: pd.DataFrame) -> pd.Series[bool]:
    """Tell which variants were not recovered after folding: all of them where the table has no such column."""
    return variants.get("recovery", pd.Series("none", index=variants.index)).eq("none")


def _variant_names(variants: pd.DataFrame) -> pd.Series[str]:
    """Name each way of folding: the weighting of its constants, and how it was recovered, if it was."""
    weighting = variants.get("weighting", pd.Series("folded", index=variants.index))
    recovery = variants.get("recovery", pd.Series("none", index=variants.index))
    return weighting + (", " + recovery).where(recovery != "none", "")


# ---- texts -----------------------------------------------------------------------------------------------


def _short_names(gates: Sequence[str]) -> list[str]:
    """Leave out the last parts of the module paths where all gates share them."""
    paths = [gate.split(".") for gate in gates]
    ends = zip(*(path[:0:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, ends))) if len(gates) > 1 else 0
    return [".".join(path[: len(path) - shared]) for path in paths]


class _Decimals(LogFormatter):
    """Writes 0.02 where LogFormatter writes 2e-02, and nothing where that writes nothing."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _tick_integers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _tick_epochs(ax: Axes, epochs: pd.Series[int]) -> None:
    """Label the recorded epochs where they are few, else some of them."""
    recorded = sorted(set(epochs))
    if len(recorded) <= FEW_EPOCHS:
        ax.set_xticks(recorded)
    else:
        _tick_integers(ax.xaxis)


def _mark(color: ColorType, label: str) -> Line2D:
    return Line2D([], [], color=color, linewidth=0.8, marker="o", markersize=3, label=label)


def _legend_below(ax: Axes, handles: Sequence[Any] | None = None) -> None:
    """Place the legend under the x label, where it hides no data, in as many columns as its names allow."""
    handles = handles or ax.get_legend_handles_labels()[0]
    longest = max(len(str(handle.get_label())) for handle in handles)
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.2,
        ncols=max(1, min(3, 45 // longest)),  # about 45 letters fit a column's width
        columnspacing=1.2,
        handlelength=1.2,
        fontsize=TICK_SIZE,
        frameon=False,
    )


def __dir__() -> list[str]:
    return __all__
