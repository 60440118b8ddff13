"""`figures`: draw the stripe figures of runs."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stripe.cli import options

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stripe.store import Run

SUMMARY = "draw a run's figures: stripes before and after, gates x epochs, std, strength, drift"
EXAMPLE = "runs/probe --out figures/probe --format png pdf"
GATES, EPOCHS = 6, 6  # at most as many are drawn unless --gates names them
FORMATS = ("png", "pdf", "svg")
RESOLUTION = 200  # dots per inch of PNG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run_paths", nargs="+", type=Path, metavar="RUN", help="runs, or log.txt files of the ASR reference"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument("--epoch", type=int, metavar="E", help="epoch of the stripe figure (default: the last)")
    parser.add_argument("--gates", nargs="+", metavar="G", help=f"gates to draw (default: {GATES} from first to last)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="file formats")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no intervals")


def run(arguments: argparse.Namespace) -> int:
    """Draw every figure of every run; several runs get a directory each."""
    from stripe import plots
    from stripe.store import open_run

    for path in arguments.run_paths:
        out = arguments.out / path.stem if len(arguments.run_paths) > 1 else arguments.out
        if path.is_file():
            figures = iter([("training", plots.training_curves({path.parent.name: read_log(path)}))])
        else:
            figures = draw(open_run(path), arguments.gates, arguments.epoch, arguments.bootstrap)
        for name, figure in figures:
            for file in save(figure, out / name, arguments.format):
                print(file)
    return 0


def draw(
    run: "Run", gates: list[str] | None = None, epoch: int | None = None, bootstrap: int = 1000
) -> Iterator[tuple[str, "Figure"]]:
    """Yield (name, figure) of everything a run can show."""
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd

    from stripe import plots, stats

    gates = gates or options.spread([gate.name for gate in run.gates], GATES)
    epochs = options.spread(run.epochs, EPOCHS)
    epoch = run.epochs[-1] if epoch is None else epoch
    values = {gate: run.attention(gate, epoch) for gate in gates}
    std = {gate: stats.Moments.of(attention).std for gate, attention in values.items()}
    for gate, attention in values.items():
        title = f"{gate}, epoch {epoch}"
        if run.manifest.squeeze:
            squeeze = run.squeeze(gate, epoch)
            before_after = (stats.Moments.of(squeeze).std, std[gate])
            yield f"stripe-{gate}", plots.before_after(squeeze, attention, std=before_after, title=title)
        else:
            yield f"stripe-{gate}", figure_of(plots.stripe_heatmap(attention, title=title))
    grid = {(gate, e): run.attention(gate, e)[:100] for gate in gates for e in epochs}
    shown = np.concatenate([panel.ravel() for panel in grid.values()])
    yield "grid", plots.heatmap_grid(grid, vmin=float(np.nanmin(shown)), vmax=float(np.nanmax(shown)))
    yield "std", figure_of(plots.std_per_channel(std, title=f"epoch {epoch}"))
    table = stats.summarize(run, bootstrap=bootstrap)
    yield "strength", figure_of(plots.strength_by_gate(table[table["epoch"] == epoch], title=f"epoch {epoch}"))
    if len(run.epochs) > 1:
        yield "strength-over-epochs", figure_of(plots.strength_over_epochs(table))
        yield "drift", figure_of(plots.drift_over_epochs(table))
    if (Path(run.path) / "metrics.csv").is_file():
        metrics = pd.read_csv(Path(run.path) / "metrics.csv")
        yield "training", plots.training_curves({Path(run.path).name: metrics})
    plt.close("all")


LOG_COLUMNS = {
    "Learning Rate": "lr",
    "Train Loss": "train_loss",
    "Valid Loss": "val_loss",
    "Train Acc.": "train_accuracy",
    "Valid Acc.": "val_accuracy",
}
"""The ASR reference code's names in log.txt, and metrics.csv's."""


def read_log(path: Path) -> "pd.DataFrame":
    """Read the tab-separated log.txt of the ASR reference code as rows of metrics.csv; epochs count from 1.

    Raises:
        ValueError: the file lacks a column or holds something other than numbers.
    """
    import pandas as pd

    log = pd.read_csv(path, sep="\t", skipinitialspace=True).rename(columns=str.strip).rename(columns=LOG_COLUMNS)
    if missing := [name for name, column in LOG_COLUMNS.items() if column not in log]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected a run's directory or the reference's log.txt")
    log = log[list(LOG_COLUMNS.values())].astype(float)
    return log.assign(epoch=range(1, len(log) + 1))


def figure_of(ax: "Axes") -> "Figure":
    """Return the figure that a plot of one Axes made."""
    return cast("Figure", ax.get_figure(root=True))


def save(figure: "Figure", path: Path, formats: list[str]) -> Iterator[Path]:
    """Write a figure in each format, without dates, so that the same figure gives the same bytes; yield the files."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    dateless = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    for kind in formats:
        file = path.with_name(f"{path.name}.{kind}")
        with plt.rc_context({"svg.hashsalt": "stripe", "pdf.fonttype": 42}):
            figure.savefig(file, dpi=RESOLUTION, metadata=dateless[kind])
        yield file
    plt.close(figure)
