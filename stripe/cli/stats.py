"""`stats`: print how constant a run's attention is, a row per epoch and gate."""

import argparse
from pathlib import Path

from stripe.cli import options

SUMMARY = "measure a run: stripe strength with interval, std, drift, label share, rank, flags per epoch and gate"
EXAMPLE = "runs/probe --csv strength.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no interval")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table of stripe.stats.summarize."""
    from stripe.stats import summarize
    from stripe.store import open_run

    table = summarize(open_run(arguments.run_path), bootstrap=arguments.bootstrap)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if arguments.csv is not None:
        table.to_csv(arguments.csv, index=False)
    options.write_json(arguments.json, {"rows": options.plain(table)})
    return 0
