"""Study stripes and ASR through the public API; an interrupted study continues its tables where they stopped."""

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from stripe.cli import Help
from stripe.cli.process import add_traceback, dispatch, dispatch_process

STUDIES = {
    "forms": "train networks plain, with attention, with ASR and with both, by seed; paired differences with intervals",
    "paper": "train the paper's four networks by its recipe, in slices of time; stripes of every epoch",
    "growth": "follow a run over its epochs, and its network on other images: where do stripes rise, fall, settle?",
    "recipes": "train SE and ASR by stripe's recipe and by the reference's as written; paired differences of accuracy",
    "ablation": "train ASR networks that differ in one choice each",
    "robustness": "disturb the outputs of every norm of trained networks",
    "coverage": "simulate gates of known strength: how often does the interval contain it?",
    "constancy": "compare the first and last epoch of runs: does attention vary less over images at the end?",
    "wild": "fold networks that others trained, as ONNX files: what does each gate, and do all gates, cost?",
    "verdicts": "count how often an untrained psi, and one fitted to the stripe, is judged to match the stripe",
    "hour": "a newcomer's first hour: follow the README on a fresh clone, in order, and time every step",
    "losses": "run the tests that kill processes, damage files and feed hostile input, and count the cases tried",
    "check": "make every table of the pages and every derived CSV anew from the records; exit code 1 if one differs",
}
INTERRUPTED = "interrupted: finished rows are kept; the same command continues"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study; return its exit code, or 2 on bad input, 130 after Ctrl-C."""
    names = "\n".join(f"  {name:11} {summary}" for name, summary in STUDIES.items())
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"studies:\n{names}", formatter_class=kind)
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help="a name from the list below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the study: see STUDY --help")
    start = dispatch_process if argv is None else dispatch
    return start(partial(_parse, parser, argv), _run, packages=(__name__, "stripe", "studies"), interrupted=INTERRUPTED)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the study's name, then its own arguments."""
    chosen = parser.parse_args(argv)
    module = import_module(f"studies.{chosen.study}")
    own = argparse.ArgumentParser(f"{parser.prog} {chosen.study}", description=module.__doc__, formatter_class=Help)
    module.add_arguments(own)
    add_traceback(own)
    return own.parse_args(chosen.arguments, argparse.Namespace(study=chosen.study))


def _run(arguments: argparse.Namespace) -> int:
    return int(import_module(f"studies.{arguments.study}").run(arguments) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
