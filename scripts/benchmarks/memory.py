"""Time inference with freed memory returned to the system, as is usual, and with it kept, as in stripe's commands."""

import argparse
from functools import partial

from benchmarks.networks import add_network, build, pixels, prepared_forward
from benchmarks.timing import Result, Run, measure, report
from stripe import keep_memory

FORMS = ("plain", "SE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the network's arguments."""
    add_network(parser, rounds=15, batch=100)


def run(arguments: argparse.Namespace) -> Result:
    """Time one batch through each network in both ways; every case has a process of its own."""
    rows = []
    for form in FORMS:
        cases = {name: partial(_prepare, form, arguments, "kept" in name) for name in (form, f"{form}, kept")}
        rows += report(measure(cases, arguments.rounds), form, images=arguments.batch)
    return Result(rows)


def _prepare(form: str, arguments: argparse.Namespace, keep: bool) -> Run:
    if keep and not keep_memory():
        raise OSError("this machine's C library cannot be told to keep memory: only glibc can")
    return prepared_forward(build(form, arguments.depth, arguments.module), pixels(arguments.batch))
