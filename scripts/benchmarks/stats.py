"""Time moments, strength and drift of a run beside reads, DuckDB, Polars and pandas; or one gate's bootstrap.

The bare read checks nothing; the other one, like stripe's, the checksum of every page.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.runs import add_run, gate_channels, write_run
from benchmarks.timing import Prepare, Result, Run, check, measure, report
from stripe import open_run, stats

TOLERANCE = 1e-3  # of means and standard deviations, in standard deviations; some peers add up in float32

Found = NDArray[np.float64]  # (2, epochs * channels): means, variances


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="of the run")
    parser.add_argument("--samples", type=int, default=10_000, metavar="N", help="of every epoch")
    add_run(parser, gates=54)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all cases")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="instead: N resamples of one gate, beside SciPy's")
    parser.add_argument("--channels", type=int, default=256, metavar="N", help="of the gate of --bootstrap")


def run(arguments: argparse.Namespace) -> Result:
    """Take every statistic from the same files, or the same interval from the same values."""
    if arguments.bootstrap:
        return _compare_bootstraps(arguments)
    channels = gate_channels(arguments.gates)
    with tempfile.TemporaryDirectory() as folder:
        files = write_run(Path(folder), arguments.epochs, arguments.samples, channels)
        columns = [f"attention:gate{number}" for number in range(len(channels))]
        cases: dict[str, Prepare] = {"read": partial(_prepare, _read, files, columns, False)}
        cases["checked read"] = partial(_prepare, _read, files, columns, True)
        cases["stripe"] = partial(_prepare, _stripe, folder, arguments.epochs)
        cases |= {
            name: partial(_prepare, peer, files, columns) for name, peer in PEERS.items() if find_spec(name) is not None
        }
        timings = measure(cases, arguments.rounds)
    rows = report(timings, "read")
    means, variances = timings["stripe"].returned
    error = 0.0
    for name in PEERS.keys() & timings.keys():
        other_means, other_variances = timings[name].returned
        spread = np.sqrt(variances)
        error = max(error, float(np.abs((other_means - means) / spread).max()))
        error = max(error, float(np.abs(np.sqrt(other_variances) / spread - 1).max()))
    return Result(rows, not check("difference of means and standard deviations from the peers'", error, TOLERANCE))


def _prepare(take: Callable[..., Any], *arguments: Any) -> Run:
    return partial(take, *arguments)


def _read(files: Sequence[str], columns: Sequence[str], checked: bool) -> None:
    for file in files:
        pq.read_table(file, columns=columns, page_checksum_verification=checked)


def _stripe(path: str, epochs: int) -> Found:
    moments = open_run(path).moments()
    for (epoch, gate), now in moments.items():
        stats.stripe_strength(now)
        if epoch:
            stats.drift(moments[epoch - 1, gate], now)
    return np.stack(
        [np.concatenate([getattr(each, name) for each in moments.values()]) for name in ("mean", "variance")]
    )


def _pandas(files: Sequence[str], columns: Sequence[str]) -> Found:
    found = []
    for file in files:
        table = pd.read_parquet(file, columns=list(columns))
        for column in columns:
            values = pd.DataFrame(np.stack(table[column].to_list()))
            found.append((values.mean().to_numpy(np.float64), values.var().to_numpy(np.float64)))
    return np.concatenate(found, axis=1)


def _polars(files: Sequence[str], columns: Sequence[str]) -> Found:
    import polars as pl

    found = []
    for file in files:
        for column in columns:
            parts = pl.scan_parquet(file).select(pl.col(column).arr.to_struct()).unnest(column).collect()
            found.append((parts.mean().to_numpy()[0], parts.var().to_numpy()[0]))
    return np.concatenate(found, axis=1).astype(np.float64)


def _duckdb(files: Sequence[str], columns: Sequence[str]) -> Found:
    import duckdb

    found = []
    for file in files:
        for column in columns:
            [(width,)] = duckdb.execute(f'select len("{column}") from read_parquet(?) limit 1', [file]).fetchall()
            each = [f'"{column}"[{number}]' for number in range(1, width + 1)]
            wanted = [f"{name}({value})" for name in ("avg", "var_samp") for value in each]
            [row] = duckdb.execute(f"select {', '.join(wanted)} from read_parquet(?)", [file]).fetchall()
            found.append(np.reshape(row, (2, width)))
    return np.concatenate(found, axis=1)


PEERS = {"duckdb": _duckdb, "polars": _polars, "pandas": _pandas}


# ---- bootstrap ---------------------------------------------------------------------------------------------


def _compare_bootstraps(arguments: argparse.Namespace) -> Result:
    rng = np.random.default_rng(0)
    stripe = 0.2 + 0.6 * rng.random(arguments.channels)
    values = (stripe + 0.3 * rng.standard_normal((arguments.samples, arguments.channels))).astype(np.float32)
    cases = {
        "scipy": partial(_prepare, _scipy_bootstrap, values, arguments.bootstrap),
        "stripe": partial(_prepare, _stripe_bootstrap, values, arguments.bootstrap),
    }
    timings = measure(cases, arguments.rounds)
    rows = report(timings, "scipy")
    intervals = np.array([timing.returned for timing in timings.values()])
    error = float(np.abs(intervals[0] - intervals[1]).max() / np.diff(intervals[0])[0])
    print(f"intervals: {', '.join(f'{low:.6f} to {high:.6f}' for low, high in intervals)}")
    return Result(rows, not check("difference of their ends, in widths", error, _monte_carlo(arguments.bootstrap)))


def _monte_carlo(resamples: int) -> float:
    """Return five standard errors of the difference of two 2.5 % quantiles of normal resamples, in interval widths."""
    density, width = math.exp(-(1.96**2) / 2) / math.sqrt(2 * math.pi), 2 * 1.96
    return 5 * math.sqrt(2 * 0.025 * 0.975 / resamples) / density / width


def _stripe_bootstrap(values: NDArray[np.float32], resamples: int) -> tuple[float, float]:
    interval = stats.bootstrap_strength(values, resamples=resamples)
    return interval.low, interval.high


def _scipy_bootstrap(values: NDArray[np.float32], resamples: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def strength(rows: NDArray[np.int64]) -> float:
        drawn = values[rows]
        within = drawn.var(axis=0, ddof=1).mean()
        between = max(drawn.mean(axis=0).var(ddof=1) - within / len(drawn), 0.0)
        return float(between / (between + within))

    rows = (np.arange(len(values)),)
    rng = np.random.default_rng(1)  # other draws than stripe's
    found = bootstrap(
        rows, strength, n_resamples=resamples, vectorized=False, method="percentile", random_state=rng
    ).confidence_interval
    return float(found.low), float(found.high)
