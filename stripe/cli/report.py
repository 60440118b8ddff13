"""`report`: write a run as one self-contained HTML page."""

import argparse

from stripe.cli import options
from stripe.recipe import SETTLED_DRIFT

SUMMARY = "write one HTML page of a run, without network: gates, heatmaps by epoch, curves, learned vectors, fold table"
EXAMPLE = "runs/se --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument("--out", type=options.path, required=True, metavar="FILE", help="the page, such as report.html")
    for name, made_by in (("validation", "validate_asr.py"), ("fold", "fold.py")):
        parser.add_argument(
            f"--{name}",
            type=options.path,
            metavar="FILE",
            help=f"{name}.json of {made_by} (default: the run's own, if any)",
        )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=SETTLED_DRIFT,
        metavar="D",
        help="a gate has settled once its drift stays below",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; print its name and size."""
    from stripe import report
    from stripe.store import open_run

    run = open_run(arguments.run_path)
    page = report.write(
        run,
        arguments.out,
        validation=report.read_beside(run, "validation.json", arguments.validation),
        fold=report.read_beside(run, "fold.json", arguments.fold),
        tolerance=arguments.tolerance,
        command=f"stripe report {report.address(arguments.run_path)} --out {arguments.out}",
        progress=options.progress("epochs"),
    )
    print(options.told_run(run))
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    return 0
