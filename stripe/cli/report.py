"""`report`: write a run, or two compared, as one self-contained HTML page."""

import argparse
import shlex

from stripe.cli import options
from stripe.recipe import SETTLED_DRIFT

SUMMARY = "write one HTML page of a run, or of two compared: gates, heatmaps, curves, learned vectors, fold tables"
EXAMPLE = "runs/se --out report.html"
FILES = {"validation": "validate_asr.py", "fold": "fold.py"}
"""JSON files that the page shows, and the scripts that write them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument("other_path", nargs="?", metavar="RUN2", help="a second run, to be compared with the first")
    parser.add_argument("--out", type=options.path, required=True, metavar="FILE", help="the page, such as report.html")
    for name, made_by in FILES.items():
        parser.add_argument(
            f"--{name}",
            type=options.path,
            metavar="FILE",
            help=f"the {name}.json that {made_by} wrote (default: the one in the first run, if any)",
        )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=SETTLED_DRIFT,
        metavar="D",
        help="a gate has settled once its drift stays below D",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; print its name and size."""
    from stripe import report
    from stripe.store import open_run

    paths = [arguments.run_path, *filter(None, [arguments.other_path])]
    runs = [open_run(path) for path in paths]
    page = report.write(
        runs[0],
        arguments.out,
        other=runs[1] if len(runs) > 1 else None,
        **{name: report.read_beside(runs[0], f"{name}.json", getattr(arguments, name)) for name in FILES},
        tolerance=arguments.tolerance,
        command=_command(arguments, [report.address(path) for path in paths]),
        progress=options.progress("epochs"),
    )
    print(*map(options.told_run, runs), sep="\n")
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    return 0


def _command(arguments: argparse.Namespace, runs: list[str]) -> str:
    """Return the command that makes this page, without credentials for an object store."""
    words = ["stripe", "report", *runs, "--out", str(arguments.out)]
    for name in FILES:
        if (path := getattr(arguments, name)) is not None:
            words += [f"--{name}", str(path)]
    if arguments.tolerance != SETTLED_DRIFT:
        words += ["--tolerance", str(arguments.tolerance)]
    return shlex.join(words)
