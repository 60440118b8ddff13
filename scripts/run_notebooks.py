"""Run the notebooks from top to bottom and save their outputs, without times and without local paths."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
KEPT = ("text/html", "image/png", "text/plain")
"""Forms of an output that are kept; text/plain stays beside the others for readers that show only text."""


def main() -> int:
    """Parse the command line; run and rewrite each notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all in notebooks/")
    arguments = parser.parse_args()
    import nbformat

    for path in arguments.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = run(nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


def run(notebook: NotebookNode) -> NotebookNode:
    """Run every cell of a notebook and return it with its outputs; CellExecutionError where a cell fails."""
    from nbclient import NotebookClient

    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as under JupyterLab
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, timeout=900, resources=resources, record_timing=False)
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = {kind: without_paths(output.data[kind]) for kind in KEPT if kind in output.data}
    notebook.metadata.pop("language_info", None)
    return notebook


def without_paths(text: str) -> str:
    """Return a text in which paths of files in the repository are relative to its root."""
    return text.replace(f"{ROOT}{os.sep}", "")


if __name__ == "__main__":
    raise SystemExit(main())
