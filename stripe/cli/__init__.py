"""The commands: each module parses one command's arguments and calls the packages; libraries load after parsing.

`process` says what becomes of errors.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, Protocol

from stripe import __version__
from stripe.cli import check, collect, demo, figures, fold, report, stats, train, validate
from stripe.cli.process import add_traceback, dispatch, dispatch_process


class Command(Protocol):
    """What a module of this package offers."""

    SUMMARY: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; return its exit code."""


SHELLS = ("bash", "zsh", "tcsh")
"""Shells for which shtab writes completion."""

PLACES = ("DIR", "FILE", "PATH", "RUN")
"""Metavars of arguments that name a file or a folder."""

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


_SubParsers = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, like any other bad input; `process` prints it."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} ({self.prog} --help tells more)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` begins with and return its exit code; without arguments, show help.

    `argv` defaults to the command line of the process.
    """
    start = dispatch_process if argv is None else dispatch
    return start(lambda: build_parser().parse_args(argv), _run)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, without loading any library."""
    parser = Parser(
        prog="stripe",
        description="Record, measure and use the stripes of channel attention.",
        epilog="example: stripe collect --ckpt runs/a/checkpoints/last.pt --samples 500 --out runs/probe",
    )
    parser.set_defaults(run=partial(_show_help, parser))
    _add_version(parser)
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=SHELLS,
        help="print a script that makes this shell complete commands on Tab",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        _configure(commands.add_parser(name, help=command.SUMMARY), command)
    return parser


def script(command: str) -> int:
    """Run one command as a script of its own: `python scripts/train.py ...`."""

    def parse() -> argparse.Namespace:
        parser = Parser()
        _configure(parser, COMMANDS[command])
        return parser.parse_args()

    return dispatch_process(parse, _run)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default as it would be typed, unless there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if "default:" in (action.help or "") or default is None or default is False or default == []:
            return action.help
        shown = super()._get_help_string(action)
        if not shown or not isinstance(default, list | tuple):
            return shown
        return shown.replace("%(default)s", " ".join(map(str, default)).replace("%", "%%"))


class _Completion(argparse.Action):
    """Prints a shell's completion script and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        import shtab

        commands = [action.choices or {} for action in parser._actions if isinstance(action, _SubParsers)]
        for action in (each for command in commands[0].values() for each in command._actions):
            if action.metavar in PLACES:
                action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def _configure(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.description = command.SUMMARY
    parser.epilog = f"example: {parser.prog} {command.EXAMPLE}"
    parser.formatter_class = Help
    parser.set_defaults(run=command.run)
    command.add_arguments(parser)
    _add_version(parser)
    add_traceback(parser)


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"stripe {__version__}")


def _show_help(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _run(arguments: argparse.Namespace) -> int:
    """Run the command; with `--json -`, only its JSON goes to stdout, and everything else it prints goes to stderr."""
    if getattr(arguments, "json", None) != Path("-"):
        return int(arguments.run(arguments))
    with TemporaryDirectory() as folder:
        arguments.json = Path(folder, "figures.json")
        with redirect_stdout(sys.stderr):
            code = int(arguments.run(arguments))
        print(arguments.json.read_text(encoding="utf-8"), end="")
    return code
