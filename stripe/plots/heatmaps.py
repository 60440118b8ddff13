"""Image x channel: the stripes themselves, one gate, a gate before and after, or gates by epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from stripe.gate import name_of
from stripe.plots.channels import std_per_channel
from stripe.plots.drawing import (
    HEATMAP,
    LABEL_SIZE,
    PAGE_WIDTH,
    RESOLUTION,
    TICK_SIZE,
    Array,
    dress,
    new_axes,
    require_vectors,
    short_names,
    tick_integers,
)

Whole = npt.NDArray[np.integer]
NAMES = 14  # at most this many classes are named beside the rows of a figure


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

    Where there are more values than pixels, neighbours are averaged, and the axis says how many. Skipping values
    instead would draw patterns that are not there; but means over images make stripes look cleaner than they are.
    Colours span the values shown, as the colour bar says; give `vmin` and `vmax` to make figures comparable.

    Example:
        >>> import stripe
        >>> run = stripe.load_example("cifar10-se-resnet20")
        >>> ax = stripe.plots.stripe_heatmap(run.attention("layer1.0", 20), title="layer1.0, epoch 20")
        >>> ax.figure.savefig("/dev/null", format="png")
    """
    ax = new_axes(ax, height=2.4)
    image, means = _draw_heatmap(ax, _matrix("values", values), vmin, vmax)
    dress(ax, f"channel index{_means_of(means[1])}", f"image index{_means_of(means[0])}", title)
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

    A squeeze has no fixed range, so one rule serves both panels: the colours of each span the values it shows, as its
    colour bar says. Neither panel looks calmer because of a wider scale.

    Args:
        squeeze: what the gate scales, averaged over space.
        attention: what the gate scales it by.
        std: standard deviations over images of both, (C,) each, drawn below as a share of the colour range, on one
            axis for both.
        strength: stripe strengths of both, over all images, for the titles.
        cv: coefficients of variation of both, likewise.
        labels: class of every image, (N,), negative where unknown; rows are sorted by class, and classes are marked
            if those of all rows are known.
        images: how many rows to draw.
        channels: how many columns to draw.
        title: above both panels.

    Raises:
        ValueError: shapes that do not fit together.

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
        dress(top, "", f"{'image index' if classes is None else 'class of the image'}{_means_of(means[0])}", heading)
        if classes is not None:
            _mark_classes(top, classes)
        _add_colorbar([image], [top], label)
        if std is not None:
            deviation, _ = require_vectors(**{f"std of {label}": std[column], label: values[0]})
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
    """Draw {(gate, epoch): values (N, C)} as gates (down) x epochs (across), on one colour scale per gate.

    Gates differ so much in their values that on a common scale most would look blank; the epochs of one gate can be
    compared. Where a panel has more values than pixels, neighbours are averaged, and the gate's label says how many.
    Gates keep their order in `panels`; a missing combination of gate and epoch stays empty.

    Args:
        panels: the values of every panel.
        title: above all panels.
        label: what the values are.
        limits: least and greatest value of the colours, by gate or one pair for all, such as (0, 1); by default those
            of the gate's values.

    Raises:
        ValueError: there is no panel, or one that is not a matrix.
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
    for row, gate, name in zip(axes, channels, short_names(list(channels)), strict=True):
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


def _matrix(name: str, values: npt.ArrayLike) -> Array:
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {matrix.shape}; expected (images, channels), neither of them 0")
    return matrix


def _draw_heatmap(
    ax: Axes, values: Array, vmin: float | None, vmax: float | None, *, room: float = 0.75
) -> tuple[AxesImage, tuple[int, int]]:
    """Draw values (N, C), averaged to the pixels of `ax`; return the image and the (rows, columns) of a mean.

    `room` is the share of `ax` that labels and colour bar will leave to the image.
    """
    inches = room * np.array(ax.bbox.size) / ax.figure.dpi
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
        tick_integers(axis)
    return image, means


def _block_means(values: Array, sizes: tuple[int, int]) -> Array:
    """Return the means of blocks of `sizes` rows and columns; the last blocks may be smaller."""
    for axis, size in enumerate(sizes):
        if size > 1:
            starts = np.arange(0, values.shape[axis], size)
            counts = np.diff(starts, append=values.shape[axis])
            values = np.add.reduceat(values, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return values


def _means_of(count: int) -> str:
    return "" if count == 1 else f", means of {count}"


def _by_class(labels: npt.ArrayLike | None, images: int, count: int) -> tuple[Whole, Whole | None]:
    """Return the first images in the order to draw them, sorted by class, and their classes if all are known."""
    order = np.arange(min(images, count))
    if labels is None:
        return order, None
    known = np.asarray(labels)
    if known.shape != (count,):
        raise ValueError(f"labels have shape {known.shape}; expected ({count},), one for each image")
    order = np.argsort(known[order], kind="stable")
    return order, known[order] if (known[order] >= 0).all() else None


def _mark_classes(ax: Axes, classes: Whole) -> None:
    """Name each class beside its rows where there is room, and draw a line between classes."""
    starts = np.flatnonzero(np.diff(classes, prepend=classes[0] - 1))
    ends = np.append(starts[1:], len(classes))
    names: dict[float, str] = {}
    for place, start in zip((starts + ends - 1) / 2, starts, strict=True):
        if place - max(names, default=-np.inf) >= len(classes) / NAMES:
            names[place] = str(classes[start])
    ax.set_yticks(list(names), list(names.values()))
    ax.tick_params(axis="y", length=0)
    ax.hlines(starts[1:] - 0.5, *ax.get_xlim(), color="1", linewidth=0.6)


def _scales(
    matrices: Mapping[tuple[str, int], Array],
    limits: tuple[float, float] | Mapping[Any, tuple[float, float]] | None,
) -> dict[str, tuple[float, float]]:
    """Return by gate the least and greatest value of its colour scale."""
    scales: dict[str, tuple[float, float]] = {}
    given = {name_of(gate): ends for gate, ends in limits.items()} if isinstance(limits, Mapping) else {}
    for gate in dict.fromkeys(gate for gate, _ in matrices):
        own = np.concatenate([values.ravel() for (its, _), values in matrices.items() if its == gate])
        own = own[np.isfinite(own)]
        spanned = (float(own.min()), float(own.max())) if own.size else (0.0, 1.0)
        scales[gate] = given.get(gate, spanned) if not isinstance(limits, tuple) else limits
    return scales


def _add_colorbar(images: Sequence[AxesImage], axes: Sequence[Axes], label: str, aspect: int = 20) -> None:
    """Add a colour bar for images that share limits: pointed where values exceed them, with a note on grey."""
    values = np.concatenate([np.asarray(image.get_array(), dtype=float).ravel() for image in images])
    finite = values[np.isfinite(values)]
    low, high = images[0].get_clim()
    ends = bool((finite < low).any()), bool((finite > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[ends]
    bar = axes[0].figure.colorbar(images[0], ax=axes, extend=extend, aspect=aspect)
    note = "\n(grey: not finite)" if finite.size < values.size else ""
    dress(bar.ax, "", label + note, "")
