"""Time the table of a run's statistics, with and without the rank, beside reads, DuckDB, Polars and pandas.

The table comes from the moments that a recording keeps beside its rows. "stripe, rows" measures the rows anew, as for
a run without moments; the peers do the same. "stripe, N times the samples" takes the table of a longer run and is
compared with "stripe". The bare read checks nothing; the checked read, like stripe's, checks every page's checksum.
"""

import argparse
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

from benchmarks.runs import add_run, gate_channels, rows_alone, write_run
from benchmarks.timing import Prepare, Result, Run, check, measure, report
from stripe import open_run, stats

TOLERANCE = 1e-3  # of means and standard deviations, in standard deviations; some peers add up in float32

Found = NDArray[np.float64]  # (2, epochs * channels): means, variances


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="epochs of the run")
    parser.add_argument("--samples", type=int, default=10_000, metavar="N", help="samples per epoch")
    parser.add_argument("--times", type=int, default=10, metavar="N", help="the longer run has N times the samples")
    add_run(parser, gates=54)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all cases")


def run(arguments: argparse.Namespace) -> Result:
    """Time every case on the same files, and compare the means and standard deviations."""
    channels = gate_channels(arguments.gates)
    with tempfile.TemporaryDirectory() as folder:
        kept, longer = (Path(folder, name) for name in ("kept", "longer"))
        files = write_run(kept, arguments.epochs, arguments.samples, channels)
        rows = rows_alone(kept, Path(folder, "rows"))
        write_run(longer, arguments.epochs, arguments.times * arguments.samples, channels)
        columns = [f"attention:gate{number}" for number in range(len(channels))]
        cases: dict[str, Prepare] = {"read": partial(_prepare, _read, files, columns, False)}
        cases["checked read"] = partial(_prepare, _read, files, columns, True)
        cases["stripe"] = partial(_prepare, _summarize, kept, False)
        cases[more := f"stripe, {arguments.times} times the samples"] = partial(_prepare, _summarize, longer, False)
        cases["stripe, rank"] = partial(_prepare, _summarize, kept, True)
        cases["stripe, rows"] = partial(_prepare, _stripe, rows)
        cases |= {
            name: partial(_prepare, peer, files, columns) for name, peer in PEERS.items() if find_spec(name) is not None
        }
        timings = measure(cases, arguments.rounds)
        means, variances = _stripe(kept)
    found = report({name: timing for name, timing in timings.items() if name != more}, "read")
    found += report({name: timings[name] for name in ("stripe", more)}, "stripe")[1:]
    error = 0.0
    for name in ["stripe, rows", *(PEERS.keys() & timings.keys())]:
        other_means, other_variances = timings[name].returned
        spread = np.sqrt(variances)
        error = max(error, float(np.abs((other_means - means) / spread).max()))
        error = max(error, float(np.abs(np.sqrt(other_variances) / spread - 1).max()))
    return Result(found, not check("difference of means and standard deviations from the peers'", error, TOLERANCE))


def _prepare(take: Callable[..., Any], *arguments: Any) -> Run:
    return partial(take, *arguments)


def _read(files: Sequence[str], columns: Sequence[str], checked: bool) -> None:
    for file in files:
        pq.read_table(file, columns=columns, page_checksum_verification=checked)


def _summarize(path: Path, rank: bool) -> None:
    stats.summarize(open_run(path), rank=rank)


def _stripe(path: Path) -> Found:
    """Return the means and variances of a run's moments: those kept, or measured from the rows if none are kept."""
    moments = open_run(path).moments().values()
    return np.stack([np.concatenate([getattr(each, name) for each in moments]) for name in ("mean", "variance")])


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
