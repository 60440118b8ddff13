"""`check`: report which epochs of a run are whole; repair the run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from stripe.cli import options

if TYPE_CHECKING:
    from stripe.store import EpochCheck

SUMMARY = "read every byte of a run and report whether each epoch is whole; the exit code is 1 if anything is damaged"
EXAMPLE = "runs/probe --repair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_path", metavar="RUN", help="directory of a run, or s3://BUCKET/RUN")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove damaged epochs from the run, rebuild an unreadable run.json and missing or damaged moments, and "
        "clear what interrupted recordings left; other files that leave the run are moved to RUN/.damaged, not deleted",
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the run and, with --repair, repair it; return 1 if something is damaged."""
    from stripe.store import check_run, repair_run

    found = check_run(arguments.run_path)
    if found.problem:
        print(f"run.json: {found.problem}")
    for epoch in found.epochs:
        print(_line(epoch))
    for number in found.interrupted:
        print(f"epoch {number}: its recording is under way or was interrupted; it is not part of the run")
    for name in found.unnamed:
        print(f"{name}: belongs to no finished epoch")
    moments = any(epoch.moments != "whole" for epoch in found.epochs)
    if arguments.repair and not (found.whole and not found.interrupted and not found.unnamed and not moments):
        before, found = len(found.epochs), repair_run(arguments.run_path)
        print(f"repaired: {len(found.epochs)} of {before} epochs are left; what was damaged is in .damaged")
    damaged = sum(not epoch.whole for epoch in found.epochs)
    print(f"{found.path}: {len(found.epochs) - damaged} epochs whole, {damaged} damaged")
    options.write_json(arguments.json, asdict(found) | {"whole": found.whole})
    return 0 if found.whole else 1


def _line(epoch: EpochCheck) -> str:
    size = f"{epoch.parts} parts, {epoch.rows} rows, {epoch.bytes / 1e6:.1f} MB"
    if epoch.problem:
        return f"epoch {epoch.epoch}: {epoch.problem}"
    if epoch.moments == "none":
        return f"epoch {epoch.epoch}: whole, {size}, no moments beside its rows: --repair measures them"
    return f"epoch {epoch.epoch}: {f'whole, {size}' if epoch.whole else f'rows whole; {epoch.moments}'}"
