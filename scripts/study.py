"""Studies of stripes and of ASR by the public API alone, as tables that grow and go on where they stopped."""

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from stripe.cli import Help
from stripe.cli.process import add_traceback, dispatch, dispatch_process

STUDIES = {
    "forms": "train plain, attention, ASR and both by seed; paired differences with intervals",
    "paper": "train the paper's four networks by its recipe, in slices of time; stripes of every epoch",
    "growth": "a recorded run over its epochs, and its network on other images: where do stripes rise, fall, settle?",
    "recipes": "train SE and ASR by stripe's recipe and by the reference's as written; paired differences of accuracy",
    "ablation": "train ASR networks that differ in one choice each",
    "robustness": "disturb the outputs of every norm of trained networks",
    "coverage": "simulate gates of known strength: how often does the interval hold it?",
    "constancy": "compare the first and last epoch of runs: does attention vary less over images at the end?",
    "wild": "fold networks that others trained, as ONNX files: what does each gate, and do all gates, cost?",
    "verdicts": "how often psi never trained, and psi fitted to the stripe, is said to match it",
    "hour": "a newcomer's first hour: do on a fresh clone what the README says, in order, and time every step",
    "losses": "run the tests that kill, damage and mislead, and count what they tried",
    "check": "make every table of the pages and every derived CSV anew from the records; exit code 1 if one differs",
}
INTERRUPTED = "interrupted: rows that were finished are kept, the same command goes on"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study; return its exit code, 2 on bad input, 130 after Ctrl-C."""
    names = "\n".join(f"  {name:11} {summary}" for name, summary in STUDIES.items())
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"studies:\n{names}", formatter_class=kind)
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own: see STUDY --help")
    start = dispatch_process if argv is None else dispatch
    return start(partial(_parse, parser, argv), _run, packages=(__name__, "stripe", "studies"), interrupted=INTERRUPTED)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the study's name, then what it asks for itself."""
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
