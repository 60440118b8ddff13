"""Every command once. A module here parses one command's words and calls the rooms; libraries load after parsing.

Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from stripe.cli import check, collect, demo, figures, fold, report, stats, train, validate
from stripe.memory import keep_memory


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
BAD_INPUT = (ArithmeticError, ModuleNotFoundError, OSError, RuntimeError, ValueError, TypeError)


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
    arguments = parser.parse_args(argv)
    return _run_process(arguments) if argv is None else _run(arguments)


def script(command: str) -> int:
    """Run one command as a script of its own: `python scripts/train.py ...`."""
    parser = argparse.ArgumentParser()
    _configure(parser, COMMANDS[command])
    return _run_process(parser.parse_args())


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


def _run(arguments: argparse.Namespace) -> int:
    try:
        return cast(int, arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted: what was finished is valid and kept", file=sys.stderr)
        return 130
    except BAD_INPUT as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _run_process(arguments: argparse.Namespace) -> int:
    """Run a command as all that this process does; one process of several ends here, with the exit code.

    Threads of gloo, which a group's end does not join, now and then need Python while it shuts down: the process
    aborts, and the job, whose work is done, counts as failed.
    """
    keep_memory()
    code = _run(arguments)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
