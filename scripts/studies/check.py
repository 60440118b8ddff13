"""Check: recompute what the READMEs say between study marks, and the tables that follow from others, from the records.

A block lies between the lines `<!-- study:NAME ARGUMENTS -->` and `<!-- /study -->`. Exit code 1 where a figure differs
from the records; `--write` puts the recomputed text in its place.
"""

import argparse
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from studies import comparison, growth
from studies.blocks import markdown

BLOCK = re.compile(
    r"(?P<open><!-- study:(?P<name>\S+)(?P<arguments>[^\n]*?) -->\n)(?P<body>.*?)(?P<close><!-- /study -->)", re.S
)
README = [Path(name) for name in ("README.md", "figures/study/README.md", "figures/fold-se-resnet20/README.md")]
MARK = re.compile(r"<!-- (study:|/study)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("--readme", type=Path, nargs="+", default=README, metavar="FILE", help="the texts to check")
    parser.add_argument("--records", type=Path, default=Path("figures/study"), metavar="DIR", help="committed tables")
    parser.add_argument("--write", action="store_true", help="write what differs anew, and the figures")


def run(arguments: argparse.Namespace) -> int:
    """Compare, or write; return 1 where something differs."""
    texts, blocks = {}, 0
    for path in arguments.readme:
        found = path.read_text()
        expected, made = recompute(found, arguments.records)
        texts[path], blocks = (found, expected), blocks + made
    if arguments.write:
        comparison.report(arguments.records)
        for directory in growths(arguments.records):
            growth.report(directory)
        for path, (_, expected) in texts.items():
            path.write_text(expected)
        return 0
    texts |= derived(arguments.records)
    differing = [path for path, (found, expected) in texts.items() if found != expected]
    for path in differing:
        found, expected = (text.splitlines() for text in texts[path])
        print("\n".join(difflib.unified_diff(found, expected, f"{path}", "the records", lineterm="", n=0)))
    names, others = ", ".join(map(str, arguments.readme)), len(texts) - len(arguments.readme)
    right = f"{blocks} blocks of {names} and {others} tables follow from {arguments.records}"
    print(f"{len(differing)} files differ from the records: correct them, or run check --write" if differing else right)
    return int(bool(differing))


def recompute(text: str, records: Path) -> tuple[str, int]:
    """Return the text with every block made anew, and how many there are.

    Raises:
        ValueError: there is no block, or a mark without its other one.
    """
    made, blocks = BLOCK.subn(lambda block: _made(block, records), text)
    if not blocks or len(MARK.findall(text)) != 2 * blocks:
        marks = len(MARK.findall(text))
        raise ValueError(
            f"{blocks} blocks among {marks} marks: expected lines '<!-- study:NAME -->' and '<!-- /study -->' in pairs"
        )
    return made, blocks


def _made(block: re.Match[str], records: Path) -> str:
    table = markdown(block["name"], records, block["arguments"].split())
    return f"{block['open']}\n{table}\n\n{block['close']}"


def derived(records: Path) -> dict[Path, tuple[str, str]]:
    """Return the (found, expected) text of every table that follows from another one."""
    tables = {records / name: table for name, table in comparison.tables(records).items()}
    for directory in growths(records):
        tables |= {directory / name: table for name, table in growth.tables(directory).items()}
    return {
        path: (path.read_text() if path.exists() else "", table.to_csv(index=False)) for path, table in tables.items()
    }


def growths(records: Path) -> Iterator[Path]:
    """Yield the directories of recorded trainings that were studied."""
    return (path.parent for path in sorted(records.glob("*/epochs.csv")))
