"""Time the start of python, `import stripe` and every command's --help."""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.timing import Result, Timing, report
from stripe import interleave

SCRIPTS = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --rounds."""
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds over all cases")


def run(arguments: argparse.Namespace) -> Result:
    """Start a fresh interpreter for every case and round."""
    commands = {"python -c pass": ["-c", "pass"], "import stripe": ["-c", "import stripe"]}
    for script in sorted(SCRIPTS.glob("*.py")):
        commands[f"{script.name} --help"] = [str(script), "--help"]
    seconds = interleave({name: partial(_start, words) for name, words in commands.items()}, arguments.rounds)
    return Result(report({name: Timing(times, None, None) for name, times in seconds.items()}, "python -c pass"))


def _start(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ChildProcessError(f"'{' '.join(words)}' exits with {done.returncode}: {done.stderr[-200:]}")
