"""Records of the benchmarks as readable tables; nothing is timed here."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from studies.table import PROVENANCE, headed

TIMED = {"case": "case", "seconds": "seconds:.4g", "compared with": "baseline", "times as long": "ratio:#.3g"}
TIMED |= {"least round": "ratio_min:#.3g", "greatest round": "ratio_max:#.3g", "images/s": "images_per_second:.1f"}
TIMED |= {"slope": "slope:.2f", "peak MB": "peak_mb:.0f"}
MILLION = 1_000_000


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return a table for each benchmark record (`--json`) in a directory, by the name of its CSV file."""
    records = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {path.with_suffix(".csv").name: table(record) for path, record in records.items() if "benchmark" in record}


def table(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of a benchmark's record as a table whose last columns say how they were made."""
    said = {"coverage": coverage, "sizing": sizing}.get(record["benchmark"], timed)(pd.DataFrame(record["rows"]))
    about = (shlex.join(record["arguments"]), json.dumps(record["versions"]), record["device"])
    return said.assign(**dict(zip(PROVENANCE, about, strict=True)))


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each case: median seconds, and their ratio to those of the case it is compared with."""
    names = {heading: column.partition(":")[0] for heading, column in TIMED.items()}
    known = [heading for heading, name in names.items() if name in rows and rows[name].notna().any()]
    return headed(rows, {heading: TIMED[heading] for heading in known})


def coverage(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each library: its networks, their gates, and the networks in which all were found."""
    tried = rows[~rows["verdict"].str.startswith("skipped")]
    found = [
        {
            "library": library,
            "version": part["version"].iloc[0],
            "networks": len(part),
            "without any gate": (part["expected"] == 0).sum(),
            "gates in all": part["expected"].sum(),
            "of them counted by class": int(part["counted"].fillna(0).sum()),
            "found as many as their authors wrote": f"{(part['verdict'] == 'ok').sum()} of {len(part)}",
        }
        for library, part in tried.groupby(tried["case"].str.partition(":")[0])
    ]
    return pd.DataFrame(found)


def sizing(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each network and kind of work: samples per second on a core, hours per million samples."""
    columns = {"case": "case", "gates": "gates", "channels": "channels:,", "samples/s a core": "rate:,.0f"}
    columns |= {"core hours a million samples": "hours:.2f", "bytes a sample, or of an epoch of moments": "bytes:,.0f"}
    hours = MILLION * rows["seconds"] / 3600
    return headed(rows.assign(rate=1 / rows["seconds"], hours=hours), columns)
