"""Check that every table in the pages follows from its CSV, and every derived CSV from the records beside it.

In a page, a table stands between the lines `<!-- csv: PATH -->` and `<!-- /csv -->`, where PATH is relative to the
page's directory; it shows the CSV unchanged, without the columns that say how its rows were made. The exit code is 1 if
a table or a derived CSV differs; `--write` writes both anew, and draws the figures.
"""

import argparse
import difflib
import re
from pathlib import Path

from benchmarks import tables as benchmarks

from studies import ablation, commands, comparison, constancy, foretelling, growth, recipes, robustness, verdicts, wild
from studies.table import PROVENANCE, read_text

BLOCK = re.compile(r"(?P<open><!-- csv: (?P<path>[^\n]+) -->\n)(?:(?!<!-- /?csv).)*?(?P<close><!-- /csv -->)", re.S)
MARK = re.compile(r"<!-- /?csv")
MODULES = (ablation, benchmarks, commands, comparison, foretelling, growth, recipes, robustness, verdicts, wild)
"""Modules whose `tables(directory)` returns, by file name, the tables that follow from the records there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    pages = sorted(Path("figures").glob("*/README.md"))
    parser.add_argument("--pages", type=Path, nargs="+", default=pages, metavar="FILE", help="the pages to check")
    parser.add_argument("--records", type=Path, default=Path("figures"), metavar="DIR", help="directories of records")
    parser.add_argument("--write", action="store_true", help="rewrite what differs, and draw the figures")


def run(arguments: argparse.Namespace) -> int:
    """Compare, or write; return 1 where something differs."""
    folders = [arguments.records, *(path for path in sorted(arguments.records.rglob("*")) if path.is_dir())]
    found = ((folder, module.tables(folder)) for folder in folders for module in MODULES)
    made = {folder / name: table for folder, tables in found for name, table in tables.items()}
    differing = [path for path, table in made.items() if differs(path, table.to_csv(index=False), arguments.write)]
    pages = {page: filled(page) for page in arguments.pages}
    differing += [page for page, (text, _) in pages.items() if differs(page, text, arguments.write)]
    if arguments.write:
        for folder in folders:
            comparison.figures(folder)
            constancy.figures(folder)
            growth.figures(folder)
            wild.figures(folder)
        return 0
    blocks = sum(count for _, count in pages.values())
    right = f"{blocks} tables of {len(pages)} pages and {len(made)} derived CSVs follow from {arguments.records}"
    print(f"{len(differing)} files differ: correct them, or run check --write" if differing else right)
    return int(bool(differing))


def differs(path: Path, expected: str, write: bool) -> bool:
    """Return whether a file differs from the expected text; show the difference, or write the expected text."""
    found = path.read_text() if path.exists() else ""
    if found == expected:
        return False
    if write:
        path.write_text(expected)
    else:
        lines = found.splitlines(), expected.splitlines()
        print("\n".join(difflib.unified_diff(*lines, f"{path}", "expected", lineterm="", n=0)))
    return True


def filled(page: Path) -> tuple[str, int]:
    """Return the text of a page, every table made anew from its CSV, and the number of tables.

    Raises:
        ValueError: the page holds no table, or an opening or closing mark without its counterpart.
    """
    text = page.read_text()
    made, blocks = BLOCK.subn(lambda block: _table(block, page.parent), text)
    if not blocks or len(MARK.findall(text)) != 2 * blocks:
        raise ValueError(
            f"'{page}' holds {len(MARK.findall(text))} marks, {blocks} of them before a table: "
            "expected lines '<!-- csv: PATH -->' and '<!-- /csv -->' in pairs, one pair or more"
        )
    return made, blocks


def _table(block: re.Match[str], folder: Path) -> str:
    table = read_text(folder / block["path"]).drop(columns=list(PROVENANCE), errors="ignore")
    rows: list[list[str]] = [list(map(str, table)), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([block["open"], *lines, "", block["close"]])
