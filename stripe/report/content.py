"""What the page says in numbers and words: every text plain, every number finite or null, rounded to five digits."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from stripe import stats
from stripe.files import read_text
from stripe.store import Run

RECORDS = (500, 100, 20, 4)  # of a table from a file, and points of a curve, by how little room there is
MAX_COLUMNS, MAX_TEXT = 40, 300  # of such a table, and characters of a text
CURVES = ("strength", "strength_low", "strength_high", "std", "drift")
LAST = (*CURVES, "cv", "sample_share", "label_share", "rank")

Plain = str | int | float | bool | None
Learned = dict[str, list[Plain]]  # by gate, (channels,)


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced, first and last included."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()  # type: ignore[no-any-return]


def plain(value: object) -> Plain:
    """Return a value as JSON takes it: a number to five digits, NaN as None, texts and what is nested cut short."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="replace").decode()  # a lone surrogate cannot be written
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def numbers(values: Iterable[float]) -> list[Plain]:
    """Return numbers as ``plain`` does."""
    return [plain(float(value)) for value in values]


# ---- gates -----------------------------------------------------------------------------------------------


def shown_epochs(run: Run, most: int) -> list[int]:
    """Return the epochs of the curves."""
    return [run.epochs[i] for i in spread(len(run.epochs), most)]


def describe_gates(
    run: Run,
    tables: Mapping[str, pd.DataFrame],
    learned: Learned,
    *,
    stripe_epoch: int,
    tolerance: float,
    most: int,
) -> list[dict[str, Any]]:
    """Return what the page knows of each gate: figures of the last epoch, curves, its stripe and learned vector."""
    gates, shown = [], spread(len(run.epochs), most)
    stripes = run.moments([stripe_epoch])
    for gate in run.gates:
        table, stripe = tables[gate.name], stripes[stripe_epoch, gate.name]
        last = table.iloc[-1]
        gates.append(
            {
                "name": gate.name,
                "channels": gate.channels,
                "last": {name: plain(float(last[name])) for name in LAST},
                "settled": stats.settled_epoch(table["epoch"], table["drift"], tolerance),
                "flags": last["flags"].replace(",", ", "),
                "curves": {name: numbers(table[name].to_numpy()[shown]) for name in CURVES},
                "mean": numbers(stripe.mean),
                "std": numbers(stripe.std),
                "learned": learned.get(gate.name),
            }
        )
    return gates


def tables_of(run: Run, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> dict[str, pd.DataFrame]:
    """Return each gate's rows of summarize."""
    last = run.epochs[-1:]  # whose ranks are told
    rows = stats.tabulate(
        measured
        for epoch in progress(run.epochs)
        for measured in stats.measure(run, epoch, run.gates, rank=[epoch] == last)
    )
    return {str(name): its for name, its in rows.groupby("gate")}


def learned_vectors(run: Run, validation: Mapping[str, Any] | None) -> Learned:
    """Return a validation's vectors of the run's gates, which may be fewer; ValueError where they are another's."""
    if validation is None:
        return {}
    vectors, epoch = validation.get("learned"), validation.get("epoch")
    if not isinstance(vectors, dict) or type(epoch) is not int or epoch not in run.epochs:
        found = f"epoch {epoch!r:.80} and {'vectors' if isinstance(vectors, dict) else 'no vectors'}"
        raise ValueError(
            f"the validation holds {found}; expected an epoch of run '{run.path}' and 'learned' vectors by gate: "
            "validate this run, or report without it"
        )
    channels = {gate.name: gate.channels for gate in run.gates}
    known = {gate: vector for gate, vector in vectors.items() if gate in channels} or vectors
    for gate, vector in known.items():
        if channels.get(gate) != (len(vector) if _is_vector(vector) else None) or gate not in channels:
            raise ValueError(
                f"the validation's vector of gate '{gate:.80}' does not fit run '{run.path}'; expected "
                f"{channels.get(gate, 'no')} numbers: validate this run, or report without it"
            )
    return {gate: numbers(vector) for gate, vector in known.items()}


def _is_vector(value: object) -> bool:
    return isinstance(value, list) and all(type(each) in (int, float) for each in value)


# ---- files beside the run, and the run itself ------------------------------------------------------------


def read_beside(run: Run, name: str, path: str | os.PathLike[str] | None = None) -> dict[str, Any] | None:
    """Return the object in the JSON file `path`, else in the run's own file `name`; None where there is neither.

    Raises:
        ValueError: the file is not JSON, or holds something other than an object.
        OSError: `path` cannot be read.
    """
    try:
        text = run.read_text(name) if path is None else read_text(path)
        content = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path or name} is not JSON ({error}): write it anew, or name another file") from error
    if text is None:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"{path or name} holds {type(content).__name__}; expected the object that its command wrote")
    return content


def address(path: str) -> str:
    """Return a run's path as it may be shown: a URI without its user, password and query, which hold keys."""
    if "://" not in path:
        return path
    parts = urlsplit(path)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def judged(validation: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Turn a validation into tables and facts, without its vectors and with the verdict beside the gate."""
    gates = validation.get("gates")
    rows = [row for row in gates if isinstance(row, dict)] if isinstance(gates, list) else []
    first = [{key: row[key] for key in ("gate", "verdict") if key in row} | row for row in rows]
    told = {key: first if key == "gates" else each for key, each in validation.items() if key != "learned"}
    return document(told, most)


def document(content: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Turn plain JSON into tables, one for each list of records, and facts, a line for each other value."""
    facts: list[list[Plain]] = []
    tables = []
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
            tables.append(_table(key, value, most))
        elif isinstance(value, dict):
            facts += [[plain(f"{key}: {name}"), plain(each)] for name, each in value.items()]
        else:
            facts.append([plain(key), plain(value)])
    return {"facts": facts[:most], "tables": tables[:most]}


def _table(title: str, records: Sequence[Mapping[str, Any]], most: int) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [[plain(record.get(name)) for name in columns[:MAX_COLUMNS]] for record in records[:most]]
    cut = []
    if len(records) > most:
        cut.append(f"the first {most} of {len(records)} rows")
    if len(columns) > MAX_COLUMNS:
        cut.append(f"the first {MAX_COLUMNS} of {len(columns)} columns")
    return {
        "title": plain(title),
        "columns": [plain(name) for name in columns[:MAX_COLUMNS]],
        "rows": rows,
        "note": f"Shown: {' and '.join(cut)}." if cut else "",
    }


def about(run: Run, command: str, most: int) -> list[dict[str, Any]]:
    """Return how the run was made, as titled facts."""
    manifest = run.manifest
    recorded = "attention and squeeze" if manifest.squeeze else "attention"
    what = {
        "path": address(run.path),
        "recorded": f"{recorded}, {manifest.dtype}" if run.has_samples else "moments alone, no row per sample",
        "epochs": f"{len(run.epochs)}, {run.epochs[0]} to {run.epochs[-1]}",
        **({"mixed": run.mixed} if run.mixed else {}),
        "gates": len(run.gates),
        "channels": sum(gate.channels for gate in run.gates),
        "begun": manifest.created,
    }
    sections = {"run": what, "model": run.model, "data": run.data, "seeds": manifest.seeds}
    sections |= {"versions": manifest.versions, "this page": {"command": command} if command else {}}
    return [{"title": title, **document(content, most)} for title, content in sections.items() if content]
