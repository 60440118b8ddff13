"""`stats`: print how constant a run's attention is, a row per epoch and gate."""

import argparse
from pathlib import Path

from stripe.cli import options
from stripe.files import write_csv

SUMMARY = "measure a run: stripe strength with interval, std, drift, label share, rank, flags per epoch and gate"
EXAMPLE = "runs/probe --csv strength.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no interval")
    parser.add_argument("--moments-only", action="store_true", help="what moments tell, in one pass and little memory")
    parser.add_argument("--dask", metavar="ADDRESS", help="compute on the cluster of the scheduler at tcp://HOST:PORT")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table of stripe.stats.summarize."""
    from stripe.stats import summarize
    from stripe.store import open_run

    recorded = open_run(arguments.run_path)
    chosen = {"samples": not arguments.moments_only, "bootstrap": arguments.bootstrap}
    if arguments.dask is None:
        table = summarize(recorded, **chosen)
    else:
        from stripe.cluster import connect, summarize_on

        with connect(arguments.dask) as client:
            table = summarize_on(client, recorded, **chosen)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if arguments.csv is not None:
        write_csv(arguments.csv, table)
    options.write_json(arguments.json, {"rows": options.plain(table)})
    return 0
