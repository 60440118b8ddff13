"""One run or two as a self-contained HTML page of at most LIMIT bytes.

The page needs no network access, and no text of a run can run as script. Curves and heatmaps are SVG, drawn by the
script in page/: plotly would take half of the page's bytes and would interpret gate names as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stripe.files import write_text
from stripe.messages import Progress
from stripe.plots.drawing import HEATMAP
from stripe.recipe import SETTLED_DRIFT
from stripe.report.content import (
    RECORDS,
    about,
    address,
    describe_gates,
    document,
    judged,
    learned_vectors,
    read_beside,
    shown_epochs,
    tables_of,
    training_curves,
)
from stripe.report.panels import sample_panels
from stripe.stats import COLUMNS
from stripe.store import Run

__all__ = ["LIMIT", "SETTLED_DRIFT", "address", "read_beside", "render", "write"]

LIMIT = 10_000_000  # bytes of the page
RESERVE = 20_000  # bytes for what describes the panels, apart from their values
SCRIPTS = ("parts", "tables", "charts", "heatmap", "sections", "page")
"""The files of the page's script, in the order in which they are joined."""

_PAGE = Path(__file__).parent / "page"
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def render(
    run: Run,
    *,
    other: Run | None = None,
    validation: dict[str, Any] | None = None,
    fold: dict[str, Any] | None = None,
    tolerance: float = SETTLED_DRIFT,
    command: str = "",
    progress: Progress = iter,
) -> str:
    """Return the page of a run.

    Args:
        run: a run of samples or of moments; a run of moments has no heatmaps.
        other: a second run; its gates are compared with the first run's gates of the same names.
        validation: the result of ``Validation.to_dict`` for this run's gates.
        fold: tables (lists of plain records) and figures by name, such as the content of fold.json.
        tolerance: a gate has settled at the first epoch after which its drift stays below this value.
        command: the command that makes the page, shown on it.
        progress: wraps the iterators over epochs.

    Raises:
        ValueError: the run has no finished epoch; the validation is of other gates, or of an epoch that the run does
            not hold; the two runs have no gate of the same name; or the gates do not fit on a page.

    Example:
        >>> import stripe
        >>> page = render(stripe.load_example())
        >>> "</html>" in page
        True
    """
    runs = [run] if other is None else [run, other]
    if other is not None and not {gate.name for gate in run.gates} & {gate.name for gate in other.gates}:
        raise ValueError(
            f"runs '{run.path}' and '{other.path}' have no gate of the same name: write a page for each of them"
        )
    tables = [tables_of(each, progress) for each in runs]
    validations = [validation, None]
    for most in RECORDS:
        described = [
            _describe(*each, tolerance=tolerance, most=most) for each in zip(runs, tables, validations, strict=False)
        ]
        content = {
            "runs": described,
            "tolerance": tolerance,
            "colors": base64.b64encode(HEATMAP(np.arange(256), bytes=True)[:, :3].tobytes()).decode(),
            "columns": COLUMNS,
            "validation": validation and judged(validation, most),
            "fold": fold and document(fold, most),
            "command": command,
        }
        room = LIMIT - len(_page(content).encode()) - RESERVE
        if room >= 0:
            panels = ({"heatmaps": sample_panels(each, room // len(runs), progress=progress)} for each in runs)
            page = _page(content | {"runs": [each | its for each, its in zip(described, panels, strict=True)]})
            return page if len(page.encode()) <= LIMIT else _page(content)
    raise ValueError(
        f"a page of {len(run.gates)} gates of run '{run.path}' takes {LIMIT - room} bytes; expected at most {LIMIT}: "
        "record fewer gates, or draw its figures"
    )


def write(run: Run, path: str | os.PathLike[str], **choices: Any) -> Path:
    """Write ``render(run, **choices)`` to `path`, whole or not at all; OSError if `path` cannot be written."""
    path = Path(path)
    page = render(run, **choices)
    write_text(path, page)
    return path


def _describe(
    run: Run,
    tables: Mapping[str, pd.DataFrame],
    validation: dict[str, Any] | None,
    *,
    tolerance: float,
    most: int,
) -> dict[str, Any]:
    """Return what the page shows of a run, without the heatmaps."""
    learned = learned_vectors(run, validation)
    epoch = validation["epoch"] if validation else max(run.epochs, default=0)
    return {
        "name": address(run.path),
        "mixed": run.mixed,
        "epochs": shown_epochs(run, most),
        "stripe_epoch": epoch,
        "gates": describe_gates(run, tables, learned, stripe_epoch=epoch, tolerance=tolerance, most=most),
        "metrics": training_curves(run, most),
        "about": about(run, most),
        "heatmaps": None,
    }


def _page(content: dict[str, Any]) -> str:
    """Fill the template; the content security policy allows only this style and this script."""
    style = (_PAGE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    page = (_PAGE / "page.html").read_text(encoding="utf-8")
    for place, text in {
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data,
    }.items():  # the data comes last, so that its texts are not searched for placeholders
        page = page.replace(f"{{{{{place}}}}}", text, 1)
    return page


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
