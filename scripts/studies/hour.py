"""Follow the README, in order, on a fresh clone: from `make demo` to the report page of one's own network.

Only commands of the README are run. What its Python blocks print is compared with the output that it shows, and the
page is opened in Chromium. With --environment, the packages of an existing environment replace those that `make demo`
would install.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from stripe.files import write_csv

ROOT = Path(__file__).parents[2]
END = "stripe report"  # the command that ends the first hour
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
RUNNER = """
import contextlib, io, json, sys, time
names, found = {}, []
for block in json.load(sys.stdin):
    started, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), names)
    found.append([time.perf_counter() - started, printed.getvalue()])
print(json.dumps(found))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("--environment", type=Path, metavar="DIR", help="a virtual environment with every package")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as CSV")


def run(arguments: argparse.Namespace) -> int:
    """Do every step and print how long each took; CalledProcessError where a step fails."""
    with tempfile.TemporaryDirectory() as folder:
        rows = pd.DataFrame(steps(Path(folder, "stripe"), arguments.environment), columns=["step", "seconds"])
    whole = pd.DataFrame({"step": ["in all"], "seconds": [rows["seconds"].sum()]})
    rows = pd.concat([rows, whole]).round(1)
    print(rows.to_string(index=False))
    if arguments.out is not None:
        write_csv(arguments.out, rows)
    return 0


def steps(clone: Path, environment: Path | None) -> Iterator[tuple[str, float]]:
    """Yield each step's name and seconds."""
    yield timed("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], Path.cwd(), os.environ)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if environment is not None:
        variables |= {"PATH": f"{environment.resolve() / 'bin'}:{variables['PATH']}", "PYTHONPATH": str(clone)}
    blocks, python = BLOCK.findall((clone / "README.md").read_text(encoding="utf-8")), []
    for (kind, text), (following, output) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python":
            python.append((text, output if following == "text" else ""))
        for line in text.splitlines() if kind == "sh" else []:
            if line.startswith("source "):
                activated = clone / Path(line.split()[1]).parent
                variables |= {"PATH": f"{activated}:{variables['PATH']}"} if environment is None else {}
                continue
            if python:
                yield from run_python(python, clone, variables)
                python = []
            command = as_installed(line) if environment is not None else line
            yield timed(command, ["bash", "-c", command], clone, variables)
            if line.startswith(END):
                yield opened(clone / line.split()[-1])
                return
    raise ValueError(f"the README says nowhere '{END}', which ends the first hour")


def as_installed(line: str) -> str:
    """Return the command to run in place of a README line where everything is already installed."""
    return {"make demo": "python scripts/demo.py"}.get(line, line.replace("stripe ", "python -m stripe ", 1))


def timed(name: str, command: list[str], folder: Path, variables: Mapping[str, str]) -> tuple[str, float]:
    """Run a command; return its name and seconds."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=dict(variables), check=True, stdout=sys.stderr)
    return name, time.perf_counter() - started


def run_python(
    blocks: list[tuple[str, str]], folder: Path, variables: Mapping[str, str]
) -> Iterator[tuple[str, float]]:
    """Run Python blocks in one process; ValueError where a block prints something other than the README says."""
    started = time.perf_counter()
    texts = json.dumps([text for text, _ in blocks])
    command = [shutil.which("python", path=variables["PATH"]) or "python", "-c", RUNNER]
    done = subprocess.run(command, input=texts, cwd=folder, env=dict(variables), check=True, text=True, stdout=-1)
    whole, found = time.perf_counter() - started, json.loads(done.stdout)
    yield "python starts", whole - sum(seconds for seconds, _ in found)
    for (text, expected), (seconds, printed) in zip(blocks, found, strict=True):
        if printed != expected:
            raise ValueError(f"the README says that this prints {expected!r}, but it printed {printed!r}: {text}")
        yield f"python: {text.strip().splitlines()[-1]}", seconds


def opened(page: Path) -> tuple[str, float]:
    """Open the page in Chromium and wait for its heatmaps; ValueError where the browser reports an error."""
    from playwright.sync_api import sync_playwright

    started = time.perf_counter()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab, complaints = browser.new_page(), []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        tab.locator("#panels svg").first.wait_for()
        browser.close()
    if complaints:
        raise ValueError(f"{page.name} complains: {complaints[0]}")
    return f"{page.name} is open", time.perf_counter() - started
