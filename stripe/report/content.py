"""The page's content: texts are plain, and numbers are finite or null and rounded to five digits."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from stripe import stats
from stripe.files import read_text
from stripe.report.packing import Plain, coded, numbers, plain, spread
from stripe.stats.spectrum import SHOWN_SAMPLES
from stripe.store import Run

RECORDS = (500, 100, 20, 4)  # rows of a table from a file, and points of a curve; fewer if the page is short of room
MAX_COLUMNS = 40  # of a table from a file
MEASURES = ("strength", "strength_low", "strength_high", "cv", "std", "drift", "label_share", "sample_share")
MAX_SUMMARY = 2_000  # characters
MAX_CLASSES = 10  # classes whose means are drawn in a gate's figure
CURVES = ("lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy")  # of metrics.csv

Learned = dict[str, list[Plain]]  # by gate, (channels,)


# ---- gates -----------------------------------------------------------------------------------------------


def shown_epochs(run: Run, most: int) -> list[int]:
    """Return the epochs that the curves show, at most `most`."""
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
    """Return what the page shows of each gate: its statistics by epoch, stripe, class means and learned vector."""
    gates, shown = [], spread(len(run.epochs), most)
    stripes = run.moments([stripe_epoch])
    for gate in run.gates:
        table, stripe = tables[gate.name], stripes[stripe_epoch, gate.name]
        gates.append(
            {
                "name": gate.name,
                "channels": gate.channels,
                "settled": stats.settled_epoch(table["epoch"], table["drift"], tolerance),
                "rank": plain(float(table["rank"].iloc[-1])),
                "flags": table["flags"].str.replace(",", ", ").iloc[shown].tolist(),
                "curves": {name: numbers(table[name].to_numpy()[shown]) for name in MEASURES},
                "mean": numbers(stripe.mean),
                "std": numbers(stripe.std),
                "classes": _class_means(stripe),
                "shares": _shares(run, gate.name, stripe_epoch),
                "learned": learned.get(gate.name),
            }
        )
    return gates


def tables_of(run: Run, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> dict[str, pd.DataFrame]:
    """Return each gate's rows of the table that `stripe.stats.summarize` makes."""
    last = run.epochs[-1:]  # the only epoch whose ranks are shown
    rows = stats.tabulate(
        measured
        for epoch in progress(run.epochs)
        for measured in stats.measure(run, [epoch], run.gates, rank=[epoch] == last)
    )
    return {str(name): its for name, its in rows.groupby("gate")}


def _class_means(stripe: stats.Moments) -> dict[str, Any] | None:
    """Return the mean attention of at most MAX_CLASSES classes, (classes, channels); None for fewer than two."""
    means = stats.class_means(stripe)
    if len(means) < 2:
        return None
    shown = [list(means)[i] for i in spread(len(means), MAX_CLASSES)]
    return {"all": len(means), "labels": shown, **coded(np.array([means[label] for label in shown], np.float32))}


def _shares(run: Run, gate: str, epoch: int) -> list[list[Plain]] | None:
    """Return the share of variance that the first k directions hold, with its interval; None for too few samples."""
    if not run.has_samples:
        return None
    ids = run.samples(epoch)
    first = np.argsort(ids, kind="stable")[:SHOWN_SAMPLES]
    attention = run.attention(gate, epoch)[first]
    if np.isfinite(attention).all(axis=1).sum() < 3:
        return None
    found = stats.spectrum(attention, sample_ids=ids[first])
    return [numbers(each) for each in (found.shares, found.low, found.high)]


def learned_vectors(run: Run, validation: Mapping[str, Any] | None) -> Learned:
    """Return a validation's vectors, of all or some of the run's gates; ValueError if they are of another run."""
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
    """Return the object in the JSON file `path` or, without a `path`, in the run's own file `name`; None if missing.

    Raises:
        ValueError: the file is not JSON, or it holds something other than an object.
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


def training_curves(run: Run, most: int) -> dict[str, list[Plain]] | None:
    """Return the epochs and curves of the run's metrics.csv, at most `most` epochs; None if there is no such file.

    Raises:
        ValueError: the file is damaged or has no epochs.
    """
    text = run.read_text("metrics.csv")
    if text is None:
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(
            f"metrics.csv of run '{run.path}' is damaged ({error}): write it anew, or move it away"
        ) from error
    rows = [rows[i] for i in spread(len(rows), most)] if rows else []
    curves = {name: [_number(row.get(name)) for row in rows] for name in ("epoch", *CURVES)}
    if None in curves["epoch"] or not rows:
        raise ValueError(f"metrics.csv of run '{run.path}' has no column of epochs: write it anew, or move it away")
    return {name: values for name, values in curves.items() if any(value is not None for value in values)}


def _number(text: str | None) -> Plain:
    try:
        return plain(float(text or "nan"))
    except ValueError:
        return None


def address(path: str) -> str:
    """Return a run's path as it may be shown: a URI loses its user, password and query, which may hold keys."""
    if "://" not in path:
        return path
    parts = urlsplit(path)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def judged(validation: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Turn a validation into words, tables and facts, without its vectors.

    The table of gates has the columns that the file's legend explains, from which the verdict follows; the other
    columns go into a second table.
    """
    gates, legend = validation.get("gates"), validation.get("legend")
    rows = [row for row in gates if isinstance(row, dict)] if isinstance(gates, list) else []
    legend = legend if isinstance(legend, dict) else {}
    explained = legend.get("gates")
    main = [
        "gate",
        "verdict",
        *(explained if isinstance(explained, dict) else {column: "" for row in rows for column in row}),
    ]
    tables = {"gates": [{key: row[key] for key in main if key in row} for row in rows]}
    tables["further figures"] = [
        {key: each for key, each in row.items() if key == "gate" or key not in main} for row in rows
    ]
    if not any(len(row) > 1 for row in tables["further figures"]):
        del tables["further figures"]
    apart = {"learned", "conclusion", "gates"}
    found = document(tables | {key: each for key, each in validation.items() if key not in apart}, most)
    verdicts = Counter(str(row["verdict"]) for row in rows if "verdict" in row)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    summary = validation.get("conclusion") or (f"Of {len(rows)} gates: {counts}." if counts else "")
    meanings = legend.get("verdict")
    words = [[plain(key), plain(each)] for key, each in meanings.items()] if isinstance(meanings, dict) else []
    return found | {"summary": plain(summary, MAX_SUMMARY), "words": words[:most]}


def document(content: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Turn plain JSON into tables, one for each list of records, and facts, a line for each other value.

    The value of "legend", texts by table and column, explains the headings of the columns.
    """
    facts: list[list[Plain]] = []
    tables = []
    legends = content.get("legend")
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
            tables.append(_table(key, value, legends.get(key) if isinstance(legends, dict) else None, most))
        elif isinstance(value, dict) and key != "legend":
            facts += [[plain(f"{key}: {name}"), plain(each)] for name, each in value.items()]
        elif key != "legend":
            facts.append([plain(key), plain(value)])
    return {"facts": facts[:most], "tables": tables[:most]}


def _table(title: str, records: Sequence[Mapping[str, Any]], legend: object, most: int) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [[plain(record.get(name)) for name in columns[:MAX_COLUMNS]] for record in records[:most]]
    meanings = legend if isinstance(legend, dict) else {}
    cut = []
    if len(records) > most:
        cut.append(f"the first {most} of {len(records)} rows")
    if len(columns) > MAX_COLUMNS:
        cut.append(f"the first {MAX_COLUMNS} of {len(columns)} columns")
    return {
        "title": plain(title),
        "columns": [[plain(name), plain(meanings.get(name, ""))] for name in columns[:MAX_COLUMNS]],
        "rows": rows,
        "note": f"Shown: {' and '.join(cut)}." if cut else "",
    }


def about(run: Run, most: int) -> list[dict[str, Any]]:
    """Return how the run was made, as titled facts."""
    manifest = run.manifest
    recorded = "attention and squeeze" if manifest.squeeze else "attention"
    what = {
        "path": address(run.path),
        "recorded": f"{recorded}, {manifest.dtype}" if run.has_samples else "only moments, no row per sample",
        "epochs": f"{len(run.epochs)}, {run.epochs[0]} to {run.epochs[-1]}",
        **({"mixed": run.mixed} if run.mixed else {}),
        "gates": len(run.gates),
        "channels": sum(gate.channels for gate in run.gates),
        "begun": manifest.created,
    }
    sections = {"run": what, "model": run.model, "data": run.data, "seeds": manifest.seeds}
    sections |= {"versions": manifest.versions}
    return [{"title": title, **document(content, most)} for title, content in sections.items() if content]
