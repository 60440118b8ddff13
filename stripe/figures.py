"""The figures of a run, as files or one by one as matplotlib figures; torch is never loaded."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stripe import plots, stats
from stripe.files import replaced, require_regular
from stripe.gate import Gate, name_of
from stripe.messages import one_line
from stripe.plots.drawing import RESOLUTION
from stripe.stats.spectrum import SHOWN_SAMPLES
from stripe.store import Run, open_run

GATES, EPOCHS, IMAGES = 6, 6, 100  # at most this many are drawn, unless gates are named; IMAGES is for the grid
CLASSES = 10  # at most this many lines in the excitation figure and colours in the scores figure
MAX_NAME = 150  # bytes of a figure's name; most file systems take 255
RANGE = 0.005, 0.995  # quantiles of a gate's values that its colours in the grid span; beyond, the end colours
OVER_EPOCHS = {"grid", "std", "strength-over-epochs", "drift"}  # the figures that compare epochs
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
"""File formats, and the metadata left out of each: a date or version would make the bytes of equal figures differ."""

T = TypeVar("T")


class Validated(Protocol):
    """The part of a validation that is drawn; `stripe.asr.validate` returns such an object."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per gate, with columns gate and r."""
        ...

    @property
    def learned(self) -> Mapping[str, Any]:
        """Learned vectors (C,) by gate."""
        ...

    @property
    def observed(self) -> Mapping[str, Any]:
        """Observed attention (N, C) by gate."""
        ...


def draw(
    run: Run | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    gates: Sequence[str | Gate] | None = None,
    epoch: int | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draw everything that a run can show, and write it to files.

    Args:
        run: a run, or its path.
        directory: where the files go; it is created if missing, and files of the same names are replaced.
        gates: names of the gates to draw (default: up to 6, spread from the first to the last).
        epoch: the epoch of the stripe figures (default: the last).
        formats: file formats, any of "png", "pdf" and "svg".

    Returns:
        The files, in the order in which `each_figure` yields their figures.

    Raises:
        ValueError: an unknown format, gate or epoch, or a file beside the attention that stripe did not write.

    Example:
        >>> import stripe, tempfile
        >>> run = stripe.load_example("cifar10-se-resnet20")
        >>> paths = stripe.figures.draw(run, tempfile.mkdtemp(), gates=["layer1.0"])
        >>> [path.name for path in paths][:3]
        ['stripe-layer1.0.png', 'grid.png', 'std.png']
    """
    _require_formats(formats)
    figures = each_figure(run, gates=gates, epoch=epoch)
    return [file for name, figure in figures for file in save(figure, Path(directory, name), formats)]


def draw_validation(
    validation: Validated, directory: str | os.PathLike[str], *, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Draw each gate's learned vector over its stripe, and all gates in one scatter; return the files.

    Raises:
        ValueError: an unknown format.
    """
    _require_formats(formats)
    stripes = {gate: stats.Moments.of(validation.observed[gate]) for gate in validation.learned}
    r = dict(zip(validation.table["gate"], validation.table["r"], strict=True))
    figures = _each_learned(validation.learned, stripes, r)
    return [file for name, figure in figures for file in save(figure, Path(directory, name), formats)]


def each_figure(
    run: Run | str | os.PathLike[str],
    *,
    gates: Sequence[str | Gate] | None = None,
    epoch: int | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for everything that a run can show, with its training, validation and folding results.

    The arguments are those of `draw`. pyplot does not keep the figures, so many take no more memory than one; a
    notebook shows a figure only where it is the last value of a cell.
    """
    run = run if isinstance(run, Run) else open_run(run)
    names = [name_of(gate) for gate in gates or spread(run.gates, GATES)]
    epoch = run.epochs[-1] if epoch is None else epoch
    for name, figure in _each(run, names, epoch):
        plt.close(figure)
        if run.mixed and name in OVER_EPOCHS:
            figure.text(0.01, 0.005, run.mixed, fontsize="x-small", color="firebrick")
        yield name, figure


def save(figure: Figure | Axes, path: str | os.PathLike[str], formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure as `path` with each format's ending, whole or not at all, and close it; return the files.

    The files hold no date and no version, so that the same figure gives the same bytes.

    Raises:
        ValueError: an unknown format.
    """
    _require_formats(formats)
    figure, path = figure if isinstance(figure, Figure) else _figure_of(figure), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in formats]
    for kind, file in zip(formats, files, strict=True):
        with replaced(file) as unfinished, plt.rc_context({"svg.hashsalt": "stripe", "pdf.fonttype": 42}):
            figure.savefig(unfinished, format=kind, dpi=RESOLUTION, metadata=METADATA[kind])
    plt.close(figure)
    return files


# ---- the figures of a run --------------------------------------------------------------------------------


def _each(run: Run, gates: Sequence[str], epoch: int) -> Iterator[tuple[str, Figure]]:
    yield from _each_of_samples(run, gates, epoch)
    yield from _each_of_spectrum(run, gates, epoch)
    table = stats.summarize(run)
    yield "strength", _figure_of(plots.strength_by_gate(table[table["epoch"] == epoch], title=f"epoch {epoch}"))
    if len(run.epochs) > 1:
        yield "strength-over-epochs", _figure_of(plots.strength_over_epochs(table))
        yield "drift", _figure_of(plots.drift_over_epochs(table))
    yield from _each_beside(run)


def _each_of_samples(run: Run, gates: Sequence[str], epoch: int) -> Iterator[tuple[str, Figure]]:
    """Draw stripes before and after, the grid of gates x epochs, each channel's std, and the means of classes."""
    for gate in gates:
        attention, title = run.attention(gate, epoch), f"{gate}, epoch {epoch}"
        if run.manifest.squeeze:
            squeeze = run.squeeze(gate, epoch)
            yield file_name("stripe", gate), _before_after(squeeze, attention, run.labels(epoch), title)
        else:
            yield file_name("stripe", gate), _figure_of(plots.stripe_heatmap(attention, title=title))
    grid = {(gate, e): _first_images(run, gate, e) for gate in gates for e in spread(run.epochs, EPOCHS)}
    yield "grid", plots.heatmap_grid(grid, limits={gate: _range(grid, gate) for gate in gates})
    moments = run.moments(sorted({run.epochs[0], epoch}), gates)
    yield "std", plots.std_grid({(gate, e): found.std for (e, gate), found in moments.items()})
    means = {gate: stats.class_means(moments[epoch, gate]) for gate in gates}
    labels = spread(sorted({label for its in means.values() for label in its}), CLASSES)
    if len(labels) > 1:
        panels = {(gate, label): its[label] for gate, its in means.items() for label in labels if label in its}
        yield "excitation", plots.excitation(panels, title=f"epoch {epoch}")


def _each_of_spectrum(run: Run, gates: Sequence[str], epoch: int) -> Iterator[tuple[str, Figure]]:
    """Draw in how few directions attention varies: their shares, the images' scores along two, the directions."""
    ids = run.samples(epoch)
    first = np.argsort(ids, kind="stable")[:SHOWN_SAMPLES]
    ids, attention = ids[first], {gate: run.attention(gate, epoch)[first] for gate in gates}
    enough = {gate: its for gate, its in attention.items() if np.isfinite(its).all(axis=1).sum() > 2}
    found = {gate: stats.spectrum(its, sample_ids=ids) for gate, its in enough.items()}
    if not found:
        return
    title = f"epoch {epoch}"
    yield "rank-curve", _figure_of(plots.rank_curve(stats.rank_table(found), title=title))
    wide = {gate: its for gate, its in found.items() if len(its.directions) > 1}
    if wide:
        panels = {gate: its.scores(attention[gate]) for gate, its in wide.items()}
        shares = {gate: its.shares[1] for gate, its in wide.items() if np.isfinite(its.shares[1])}
        labels = run.labels(epoch)[first]
        shown = spread(np.unique(labels[labels >= 0]).tolist(), CLASSES)
        classes = np.where(np.isin(labels, shown), labels, -1)
        yield "scores", plots.scores(panels, shares=shares, labels=classes, title=title)
    vectors = {(gate, k): each for gate, its in found.items() for k, each in enumerate(its.directions[:2], 1)}
    yield "directions", plots.directions(vectors, title=title)


def _first_images(run: Run, gate: str, epoch: int) -> npt.NDArray[np.float32]:
    """Return the attention (n, C) of the first images by sample id, which are the same images at each epoch."""
    return run.attention(gate, epoch)[np.argsort(run.samples(epoch), kind="stable")[:IMAGES]]


def _before_after(squeeze: Any, attention: Any, labels: Any, title: str) -> Figure:
    """Draw both sides of a gate, with their statistics over all images."""
    before, after = stats.Moments.of(squeeze), stats.Moments.of(attention)
    return plots.before_after(
        squeeze,
        attention,
        std=(before.std, after.std),
        strength=(stats.stripe_strength(before).strength, stats.stripe_strength(after).strength),
        cv=(stats.coefficient_of_variation(before), stats.coefficient_of_variation(after)),
        labels=labels,
        title=title,
    )


def _range(grid: Mapping[tuple[str, int], npt.NDArray[Any]], gate: str) -> tuple[float, float]:
    """Return the values between which a gate's colours span, over all its epochs."""
    values = np.concatenate([panel.ravel() for (name, _), panel in grid.items() if name == gate])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, RANGE) if values.size else (0.0, 1.0)
    return float(low), float(high)


def _each_beside(run: Run) -> Iterator[tuple[str, Figure]]:
    """Draw the files that exist beside a run's attention; ValueError for a file that stripe did not write."""
    for name, draw_text in BESIDE.items():
        if (text := run.read_text(name)) is not None:
            try:
                yield from draw_text(run, text)
            except FOREIGN as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else f"is another file ({one_line(error)})"
                raise ValueError(f"'{run.path}/{name}' {what}: write it anew, or move it away") from error


FOREIGN = (ArithmeticError, AttributeError, LookupError, NameError, RecursionError, TypeError, ValueError)
"""The errors that reading a table or JSON of another form can raise; the NameError comes from pandas."""


def _each_of_metrics(run: Run, text: str) -> Iterator[tuple[str, Figure]]:
    yield "training", plots.training_curves({Path(run.path).name: pd.read_csv(io.StringIO(text))})


def _each_of_validation(run: Run, text: str) -> Iterator[tuple[str, Figure]]:
    """Draw the learned vectors of a validation, if the run holds its epoch, for the gates that the run holds."""
    found = json.loads(text)
    r = {row["gate"]: math.nan if row["r"] is None else row["r"] for row in found["gates"]}
    gates = [gate.name for gate in run.gates if gate.name in found["learned"]]
    if gates and found["epoch"] in run.epochs:
        stripes = {gate: stripe for (_, gate), stripe in run.moments([found["epoch"]], gates).items()}
        yield from _each_learned(found["learned"], stripes, r)


def _each_of_fold(run: Run, text: str) -> Iterator[tuple[str, Figure]]:
    found = json.loads(text)
    if "ranks" in found:
        yield "rank-tradeoff", plots.rank_tradeoff(pd.DataFrame(found["ranks"]), measure=found["measure"])
        return
    latencies = pd.DataFrame(found["latency"]) if "latency" in found else None
    ax = plots.fold_pareto(pd.DataFrame(found["variants"]), latencies, measure=found["measure"])
    yield "fold-pareto", _figure_of(ax)


BESIDE = {"metrics.csv": _each_of_metrics, "validation.json": _each_of_validation, "fold.json": _each_of_fold}


def _each_learned(
    learned: Mapping[str, npt.ArrayLike], stripes: Mapping[str, stats.Moments], r: Mapping[str, float]
) -> Iterator[tuple[str, Figure]]:
    """Draw the learned vector of every gate in `stripes` over its stripe, then all of them in one scatter."""
    for gate, stripe in stripes.items():
        title = f"{gate}, r = {r[gate]:.2f}"
        ax = plots.learned_over_stripe(learned[gate], stripe.mean, stripe.std, title=title)
        yield file_name("learned", gate), _figure_of(ax)
    pairs = {gate: (learned[gate], stripe.mean) for gate, stripe in stripes.items()}
    if pairs:
        yield "learned-scatter", _figure_of(plots.learned_scatter(pairs))


# ---- the reference's log ---------------------------------------------------------------------------------

LOG_COLUMNS = {
    "Learning Rate": "lr",
    "Train Loss": "train_loss",
    "Valid Loss": "val_loss",
    "Train Acc.": "train_accuracy",
    "Valid Acc.": "val_accuracy",
}
"""The column names of the ASR reference code's log.txt, and those of metrics.csv."""


def read_log(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the tab-separated log.txt of the ASR reference code as rows of metrics.csv; epochs count from 1.

    Raises:
        ValueError: the file lacks a column or holds something other than numbers.
    """
    require_regular(path)
    log = pd.read_csv(path, sep="\t", skipinitialspace=True).rename(columns=str.strip).rename(columns=LOG_COLUMNS)
    if missing := [name for name, column in LOG_COLUMNS.items() if column not in log]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected a run's directory or the reference's log.txt")
    log = log[list(LOG_COLUMNS.values())].astype(float)
    return log.assign(epoch=range(1, len(log) + 1))


# ---- parts -----------------------------------------------------------------------------------------------


def file_name(kind: str, gate: str) -> str:
    """Name a gate's figure, with an underscore for every character that could be unsafe in a file name.

    A name that is changed by this, or is too long, ends with a checksum, so that no two gates share a figure's name.
    """
    name = f"{kind}-{gate}"
    safe = re.sub(r"[^\w.#-]", "_", name)
    if safe == name and len(name.encode()) <= MAX_NAME:
        return name
    cut = safe.encode()[:MAX_NAME].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items, first and last included, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _figure_of(ax: Axes) -> Figure:
    """Return the figure that holds an Axes."""
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _require_formats(formats: Sequence[str]) -> None:
    if unknown := [kind for kind in formats if kind not in METADATA]:
        raise ValueError(f"format '{unknown[0]}': expected some of {', '.join(METADATA)}")
