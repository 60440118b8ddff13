"""`stats`: print how constant the attention of a run is, in a row per epoch and gate."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

from stripe.cli import options
from stripe.files import write_csv

SUMMARY = "measure a run: stripe strength with interval, CV, std, drift, label share and flags per epoch and gate"
EXAMPLE = "runs/probe --csv strength.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    options.add_gates(parser, "all")
    parser.add_argument("--epoch", type=int, nargs="+", metavar="E", help="epochs of the table (default: all)")
    parser.add_argument("--rank", action="store_true", help="add the effective rank, for which all rows are read")
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="read whatever rows are needed on a Dask cluster, whose scheduler is at tcp://HOST:PORT",
    )
    parser.add_argument("--csv", type=options.path, metavar="FILE", help="also write the table to FILE")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table of stripe.stats.summarize and what its columns mean."""
    from stripe.stats import COLUMNS, summarize
    from stripe.store import open_run

    recorded = open_run(arguments.run_path)
    shown = recorded.epochs if arguments.epoch is None else arguments.epoch
    choice = {
        "epochs": _measured(recorded.epochs, shown),
        "gates": arguments.gates and options.chosen_gates(recorded.gates, arguments.gates, arguments.run_path),
        "rank": arguments.rank,
    }
    if arguments.dask is None:
        table = summarize(recorded, **choice)
    else:
        from stripe.cluster import connect, summarize_on

        with connect(arguments.dask) as client:
            table = summarize_on(client, recorded, **choice)
    table = table[table["epoch"].isin(shown)]
    print(options.told_run(recorded))
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if recorded.mixed:
        print(recorded.mixed)
    print("\n" + options.legend(COLUMNS))
    if arguments.csv is not None:
        write_csv(arguments.csv, table)
    options.write_json(arguments.json, {"rows": options.plain(table), "mixed": recorded.mixed or None})
    return 0


def _measured(recorded: Sequence[int], shown: Sequence[int]) -> list[int]:
    """Return the epochs to measure: the shown ones, and the one before each of them, which its drift needs."""
    before = {epoch: earlier for earlier, epoch in pairwise(recorded)}
    return sorted({*shown, *(before[epoch] for epoch in shown if epoch in before)})
