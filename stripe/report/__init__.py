"""A run as one self-contained HTML page: no network, nothing of the run runs as script, at most LIMIT bytes.

Curves are small SVG and heatmaps a canvas, drawn by page.js: plotly would take half of the page's bytes and would read
gate names as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

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
)
from stripe.report.panels import sample_panels
from stripe.store import Run

__all__ = ["LIMIT", "SETTLED_DRIFT", "address", "read_beside", "render", "write"]

LIMIT = 10_000_000  # bytes of the page
RESERVE = 20_000  # bytes for what the panels say of themselves beside their values

_HERE = Path(__file__).parent
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def render(
    run: Run,
    *,
    validation: dict[str, Any] | None = None,
    fold: dict[str, Any] | None = None,
    tolerance: float = SETTLED_DRIFT,
    command: str = "",
    progress: Progress = iter,
) -> str:
    """Return the page of a run.

    Args:
        run: of samples or of moments; these have no heatmaps.
        validation: what ``Validation.to_dict`` gave, of this run's gates.
        fold: tables (lists of plain records) and figures by name, such as fold.json's.
        tolerance: a gate has settled at the first epoch after which its drift stays below.
        command: how the page is made, shown on it.
        progress: wraps the iterators over epochs.

    Raises:
        ValueError: no finished epoch; a validation of other gates, or of an epoch that the run does not hold; gates
            that do not fit on a page.

    Example:
        >>> import stripe
        >>> page = render(stripe.load_example())
        >>> "</html>" in page
        True
    """
    learned = learned_vectors(run, validation)
    epoch = validation["epoch"] if validation else max(run.epochs, default=0)
    tables = tables_of(run, progress)
    colors = base64.b64encode(HEATMAP(np.arange(256), bytes=True)[:, :3].tobytes()).decode()
    for most in RECORDS:
        content = {
            "run": address(run.path),
            "epochs": shown_epochs(run, most),
            "tolerance": tolerance,
            "stripe_epoch": epoch,
            "gates": describe_gates(run, tables, learned, stripe_epoch=epoch, tolerance=tolerance, most=most),
            "colors": colors,
            "validation": validation and judged(validation, most),
            "fold": fold and document(fold, most),
            "about": about(run, command, most),
        }
        room = LIMIT - len(_page(content).encode()) - RESERVE
        if room >= 0:
            page = _page(content | {"heatmaps": sample_panels(run, room, progress=progress)})
            return page if len(page.encode()) <= LIMIT else _page(content | {"heatmaps": None})
    raise ValueError(
        f"a page of {len(run.gates)} gates of run '{run.path}' takes {LIMIT - room} bytes; expected at most {LIMIT}: "
        "record fewer gates, or draw its figures"
    )


def write(run: Run, path: str | os.PathLike[str], **choices: Any) -> Path:
    """Write ``render(run, **choices)`` to `path`, whole or not at all; OSError where that cannot be."""
    path = Path(path)
    page = render(run, **choices)
    write_text(path, page)
    return path


def _page(content: dict[str, Any]) -> str:
    """Fill the template; the policy allows this style and this script alone."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    for place, text in {
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data,
    }.items():  # what is foreign last
        page = page.replace(f"{{{{{place}}}}}", text, 1)
    return page


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
