"""Losses: run the tests that kill, damage and mislead, and count their cases; a test fails where a sample is lost."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
from benchmark import device, versions

from stripe.files import write_csv

ROOT = Path(__file__).parents[2]
ROOMS = (
    "crashes",
    "fuzz_store",
    "hostile",
    "s3",
    "cluster",
    "foreign_runs",
    "writers",
    "checkpoint_bombs",
    "interrupts",
    "resuming",
)
SINGLE = (
    "processes.py::test_a_killed_process_ends_the_job_and_leaves_finished_epochs",
    "processes.py::test_a_process_that_fails_tells_why_and_drops_the_epoch",
    "loops.py::test_a_refused_batch_leaves_neither_rows_nor_ids",
    "loops.py::test_two_threads_never_get_each_others_rows",
    "loops.py::test_copies_made_while_recording_are_not_read_and_can_be_pickled",
)
"""Tests of processes and training loops that kill a process or mislead a Recorder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    tests = [Path("tests", f"test_{room}.py") for room in ROOMS]
    tests += [Path("tests", f"test_{name}") for name in SINGLE]
    told = "tests of this project (default: all that kill, damage or mislead)"
    parser.add_argument("--tests", type=Path, nargs="+", default=tests, metavar="FILE", help=told)
    parser.add_argument("--out", type=Path, default=Path("figures/study"), metavar="DIR", help="where losses.csv goes")


def run(arguments: argparse.Namespace) -> None:
    """Write losses.csv; RuntimeError, and nothing written, where a test failed or nothing was counted."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        processes = 3 * (os.cpu_count() or 2) // 2  # more than cores, because many tests wait for a server or a process
        options = ["-n", str(processes), "--dist", "worksteal", "--durations", "40"]
        options += ["--junitxml", str(report), "-o", "junit_family=xunit1"]  # the family that records properties
        words = [sys.executable, "-m", "pytest", *options, *map(str, arguments.tests)]
        code = subprocess.run(words, cwd=ROOT).returncode
        counted = dict(count(report)) if code == 0 else {}
    if not counted:
        raise RuntimeError(f"pytest ended with exit code {code} and {len(counted)} counts: losses.csv stays as it was")
    rows = [{"tried": what, "cases": cases, "tests": tests} for (what, tests), cases in counted.items()]
    about = {"versions": json.dumps(versions()), "machine": device()}
    write_csv(arguments.out / "losses.csv", pd.DataFrame(rows).assign(**about))


def count(report: Path) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield (what was tried, test file) with its number of cases, from a pytest report."""
    cases: Counter[tuple[str, str]] = Counter()
    for test in ElementTree.parse(report).iter("testcase"):
        for found in test.iter("property"):
            file = test.attrib["classname"].replace(".", "/") + ".py"
            cases[found.attrib["name"], file] += int(found.attrib["value"])
    yield from sorted(cases.items(), key=lambda item: (item[0][1], item[0][0]))
