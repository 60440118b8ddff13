"""`stats`: print how constant a run's attention is, a row per epoch and gate."""

import argparse
from pathlib import Path

from stripe.cli import options
from stripe.files import write_csv

SUMMARY = "measure a run: stripe strength with interval, CV, std, drift, label share and flags per epoch and gate"
EXAMPLE = "runs/probe --csv strength.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument("--rank", action="store_true", help="the effective rank too, for which all rows are read")
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="read rows, where rows must be read, on the cluster of the scheduler at tcp://HOST:PORT",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table of stripe.stats.summarize."""
    from stripe.stats import summarize
    from stripe.store import open_run

    recorded = open_run(arguments.run_path)
    if arguments.dask is None:
        table = summarize(recorded, rank=arguments.rank)
    else:
        from stripe.cluster import connect, summarize_on

        with connect(arguments.dask) as client:
            table = summarize_on(client, recorded, rank=arguments.rank)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if recorded.mixed:
        print(recorded.mixed)
    if arguments.csv is not None:
        write_csv(arguments.csv, table)
    options.write_json(arguments.json, {"rows": options.plain(table), "mixed": recorded.mixed or None})
    return 0
