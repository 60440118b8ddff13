"""Every command once. A module here parses one command's words and calls the rooms; libraries load after parsing.

What errors become is written in `process`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from stripe.cli import check, collect, demo, figures, fold, report, stats, train, validate
from stripe.cli.process import add_traceback, dispatch, dispatch_process


class Command(Protocol):
    """What a module of this package offers."""

    SUMMARY: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; return the exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "collect": collect,
    "stats": stats,
    "check": check,
    "figures": figures,
    "validate": validate,
    "fold": fold,
    "report": report,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None, prog: str = "stripe") -> int:
    """Run `argv` (default: the process's), a command's name first; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Record, measure and use the stripes of channel attention.",
        epilog="example: stripe collect --ckpt runs/a/checkpoints/last.pt --samples 500 --out runs/probe",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _configure(commands.add_parser(name, help=command.SUMMARY), command)
    start = dispatch_process if argv is None else dispatch
    return start(partial(parser.parse_args, argv), _run)


def script(command: str) -> int:
    """Run one command as a script of its own: `python scripts/train.py ...`."""
    parser = argparse.ArgumentParser()
    _configure(parser, COMMANDS[command])
    return dispatch_process(parser.parse_args, _run)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _configure(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.description = command.SUMMARY
    parser.epilog = f"example: {parser.prog} {command.EXAMPLE}"
    parser.formatter_class = _Help
    parser.set_defaults(run=command.run)
    command.add_arguments(parser)
    add_traceback(parser)


def _run(arguments: argparse.Namespace) -> int:
    code: int = arguments.run(arguments)
    return code
