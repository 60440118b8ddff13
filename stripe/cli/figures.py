"""`figures`: draw the stripe figures of runs."""

import argparse
from pathlib import Path, PurePosixPath

from stripe.cli import options

SUMMARY = "draw a run's figures: stripes before and after, gates x epochs, std, strength, drift"
EXAMPLE = "runs/probe --out figures/probe --format png pdf"
FORMATS = ("png", "pdf", "svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="runs, or log.txt files of the ASR reference (default: the example run)",
    )
    parser.add_argument(
        "--out", type=options.path, metavar="DIR", help="where figures go (default: figures/ and a run's name)"
    )
    parser.add_argument("--epoch", type=int, metavar="E", help="epoch of the stripe figure (default: the last)")
    options.add_gates(parser, "up to 6, spread from first to last")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="file formats")


def run(arguments: argparse.Namespace) -> int:
    """Draw every figure of every run; several runs get a directory each."""
    from stripe import figures, plots
    from stripe.examples import load_example
    from stripe.store import open_run

    for path in arguments.runs or [load_example().path]:
        name = PurePosixPath(path)  # works for an address such as s3://BUCKET/RUN too
        out = arguments.out or Path("figures") / name.stem
        out = out / name.stem if len(arguments.runs) > 1 and arguments.out else out
        if (log := options.path(path)).is_file():
            curves = plots.training_curves({name.parent.name: figures.read_log(log)})
            files = figures.save(curves, out / "training", arguments.format)
        else:
            run = open_run(path)
            gates = arguments.gates and options.chosen_gates(run.gates, arguments.gates, path)
            print(options.told_run(run))
            files = figures.draw(run, out, gates=gates, epoch=arguments.epoch, formats=arguments.format)
        print(*files, sep="\n")
    return 0
