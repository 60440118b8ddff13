"""`figures`: draw the stripe figures of runs."""

import argparse
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from stripe.cli import options

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stripe.stats import Moments
    from stripe.store import Run

SUMMARY = "draw a run's figures: stripes before and after, gates x epochs, std, strength, drift"
EXAMPLE = "runs/probe --out figures/probe --format png pdf"
GATES, EPOCHS = 6, 6  # at most as many are drawn unless --gates names them
FORMATS = ("png", "pdf", "svg")
EXAMPLE_RUN = "cifar10-se-resnet20"
RANGE = 0.005, 0.995  # quantiles between which the grid's colours span; the colour bar points beyond
RESOLUTION = 200  # dots per inch of PNG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=f"runs, or log.txt files of the ASR reference (default: the example run {EXAMPLE_RUN})",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures go (default: figures/ and a run's name)")
    parser.add_argument("--epoch", type=int, metavar="E", help="epoch of the stripe figure (default: the last)")
    parser.add_argument("--gates", nargs="+", metavar="G", help=f"gates to draw (default: {GATES} from first to last)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="file formats")


def run(arguments: argparse.Namespace) -> int:
    """Draw every figure of every run; several runs get a directory each."""
    from stripe import plots
    from stripe.examples import load_example
    from stripe.store import open_run

    for path in arguments.runs or [load_example(EXAMPLE_RUN).path]:
        name = PurePosixPath(path)  # also of an object store's address
        out = arguments.out or Path("figures") / name.stem
        out = out / name.stem if len(arguments.runs) > 1 and arguments.out else out
        if Path(path).is_file():
            figures = iter([("training", plots.training_curves({name.parent.name: read_log(Path(path))}))])
        else:
            figures = draw(open_run(path), arguments.gates, arguments.epoch)
        for figure_name, figure in figures:
            for file in save(figure, out / figure_name, arguments.format):
                print(file)
    return 0


def draw(run: "Run", gates: list[str] | None = None, epoch: int | None = None) -> Iterator[tuple[str, "Figure"]]:
    """Yield (name, figure) of everything a run can show, with what validation and folding left beside it."""
    import matplotlib.pyplot as plt

    from stripe import plots, stats

    gates = gates or options.spread([gate.name for gate in run.gates], GATES)
    epoch = run.epochs[-1] if epoch is None else epoch
    yield from _draw_samples(run, gates, epoch)
    table = stats.summarize(run)
    yield "strength", figure_of(plots.strength_by_gate(table[table["epoch"] == epoch], title=f"epoch {epoch}"))
    if len(run.epochs) > 1:
        yield "strength-over-epochs", figure_of(plots.strength_over_epochs(table))
        yield "drift", figure_of(plots.drift_over_epochs(table))
    yield from _draw_beside(run)
    plt.close("all")


def _draw_samples(run: "Run", gates: list[str], epoch: int) -> Iterator[tuple[str, "Figure"]]:
    """Draw stripes before and after, gates x epochs, and how each channel varies at the first epoch and `epoch`."""
    import numpy as np

    from stripe import plots, stats

    for gate in gates:
        attention, title = run.attention(gate, epoch), f"{gate}, epoch {epoch}"
        if run.manifest.squeeze:
            squeeze = run.squeeze(gate, epoch)
            std = stats.Moments.of(squeeze).std, stats.Moments.of(attention).std
            yield file_name("stripe", gate), plots.before_after(squeeze, attention, std=std, title=title)
        else:
            yield file_name("stripe", gate), figure_of(plots.stripe_heatmap(attention, title=title))
    grid = {(gate, e): run.attention(gate, e)[:100] for gate in gates for e in options.spread(run.epochs, EPOCHS)}
    low, high = np.nanquantile(np.concatenate([panel.ravel() for panel in grid.values()]), RANGE)
    yield "grid", plots.heatmap_grid(grid, vmin=float(low), vmax=float(high))
    moments = run.moments(sorted({run.epochs[0], epoch}), gates)
    yield "std", plots.std_grid({(gate, e): found.std for (e, gate), found in moments.items()})


def _draw_beside(run: "Run") -> Iterator[tuple[str, "Figure"]]:
    """Draw the files beside a run's attention, those there are; ValueError for one that is not stripe's."""
    for name, draw_text in BESIDE.items():
        if (text := run.read_text(name)) is not None:
            try:
                yield from draw_text(run, text)
            except KeyError as error:
                raise ValueError(f"'{run.path}/{name}' lacks {error}: write it anew, or move it away") from error


def _draw_metrics(run: "Run", text: str) -> Iterator[tuple[str, "Figure"]]:
    import pandas as pd

    from stripe import plots

    yield "training", plots.training_curves({Path(run.path).name: pd.read_csv(io.StringIO(text))})


def _draw_validation(run: "Run", text: str) -> Iterator[tuple[str, "Figure"]]:
    """Draw what was learned for gates of the run at the epoch of the validation, where the run holds these."""
    found = json.loads(text)
    r = {row["gate"]: math.nan if row["r"] is None else row["r"] for row in found["gates"]}
    gates = [gate.name for gate in run.gates if gate.name in found["learned"]]
    if gates and found["epoch"] in run.epochs:
        moments = {gate: stripe for (_, gate), stripe in run.moments([found["epoch"]], gates).items()}
        yield from draw_learned(found["learned"], moments, r)


def _draw_fold(run: "Run", text: str) -> Iterator[tuple[str, "Figure"]]:
    import pandas as pd

    found = json.loads(text)
    tables = {name: pd.DataFrame(found[name]) for name in ("variants", "latency") if name in found}
    yield "fold-pareto", draw_pareto(tables, found["measure"])


BESIDE = {"metrics.csv": _draw_metrics, "validation.json": _draw_validation, "fold.json": _draw_fold}


def draw_learned(
    learned: "Mapping[str, npt.ArrayLike]", stripes: "Mapping[str, Moments]", r: "Mapping[str, float]"
) -> Iterator[tuple[str, "Figure"]]:
    """Yield (name, figure): the learned vector of every gate in `stripes` over its stripe, then all in one scatter."""
    from stripe import plots

    for gate, stripe in stripes.items():
        title = f"{gate}, r = {r[gate]:.2f}"
        ax = plots.learned_over_stripe(learned[gate], stripe.mean, stripe.std, title=title)
        yield file_name("learned", gate), figure_of(ax)
    pairs = {gate: (learned[gate], stripe.mean) for gate, stripe in stripes.items()}
    yield "learned-scatter", figure_of(plots.learned_scatter(pairs))


def draw_pareto(tables: "Mapping[str, pd.DataFrame]", measure: str) -> "Figure":
    """Draw the test metric of every variant over latency in the first backend, or over the number of folded gates.

    `tables` are those of `stripe fold`, by name: variants and, where they were timed, latency.
    """
    from stripe.plots import fold_pareto

    rows = tables["variants"].query("folded > 0 or recovery == 'none'")
    names = rows["weighting"] + (", " + rows["recovery"]).where(rows["recovery"] != "none", "")
    rows = rows.assign(accuracy=rows["test"], variant=names, latency_ms=float("nan"))
    if "latency" in tables:
        times = tables["latency"]
        first = times[(times["backend"] == times["backend"].iloc[0]) & (times["batch"] == times["batch"].max())]
        rows["latency_ms"] = rows["folded"].map(first.set_index("folded")["milliseconds"])
    return figure_of(fold_pareto(rows, label=measure))


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


def file_name(kind: str, gate: str) -> str:
    """Name a gate's figure; what could leave the directory, or no file system takes, becomes an underscore."""
    return re.sub(r"[^\w.#-]", "_", f"{kind}-{gate}")


def figure_of(ax: "Axes") -> "Figure":
    """Return the figure that a plot of one Axes made."""
    return cast("Figure", ax.get_figure(root=True))


def save(figure: "Figure", path: Path, formats: list[str]) -> list[Path]:
    """Write a figure in each format, without date and version, so that its bytes do not change; return the files."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, dict[str, None]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None},
        "svg": {"Date": None},
    }
    files = {kind: path.with_name(f"{path.name}.{kind}") for kind in formats}
    for kind, file in files.items():
        with plt.rc_context({"svg.hashsalt": "stripe", "pdf.fonttype": 42}):
            figure.savefig(file, dpi=RESOLUTION, metadata=metadata[kind])
    plt.close(figure)
    return list(files.values())
