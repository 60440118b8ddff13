"""`report`: write a run as one self-contained HTML page."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe.cli import options
from stripe.recipe import SETTLED_DRIFT

if TYPE_CHECKING:
    from stripe.store import Run

SUMMARY = "write one HTML page of a run, without network: gates, heatmaps by epoch, curves, learned vectors, fold table"
EXAMPLE = "runs/se --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    for name, made_by in (("validation", "validate_asr.py"), ("fold", "fold.py")):
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"{name}.json of {made_by} (default: the run's own, if any)"
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
    from stripe.report.content import address
    from stripe.store import open_run

    observed = open_run(arguments.run_path)
    page = report.write(
        observed,
        arguments.out,
        validation=_read(observed, "validation.json", arguments.validation),
        fold=_read(observed, "fold.json", arguments.fold),
        tolerance=arguments.tolerance,
        command=f"stripe report {address(arguments.run_path)} --out {arguments.out}",
        progress=options.progress("epochs"),
    )
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    return 0


def _read(observed: "Run", name: str, path: Path | None) -> dict[str, Any] | None:
    """Return the object in the file given, else in the run's own one; None where there is neither."""
    try:
        text = observed.read_text(name) if path is None else path.read_text(encoding="utf-8")
        content = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path or name} is not JSON ({error}): write it anew, or name another file") from error
    if text is None:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"{path or name} holds {type(content).__name__}; expected the object that its command wrote")
    return content
