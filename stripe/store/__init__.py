"""Runs on disk: attention as Parquet beside a manifest; a file is visible once whole, an epoch once named.

A run is a directory, or an object-storage prefix such as ``s3://bucket/run``::

    run.json                                    the manifest, the only word on what is finished
    attention/epoch=0012/part-0000-000.parquet  a row per sample: sample, label, attention:<gate>, squeeze:<gate>
    .moments/epoch=0012/part-0000-000.moments   the moments of all rows of the epoch, a Parquet table; see `Moments`
    moments/epoch=0012/part-0000-000.parquet    in place of both, in a run of moments: that table alone
    .unfinished/epoch=0013/                     what is being written; readers never look here
    .damaged/                                   what a repair set aside
"""

from stripe.store.checking import EpochCheck, RunCheck, check_run, repair_run
from stripe.store.manifest import (
    CONTENTS,
    KINDS,
    SCHEMA_VERSION,
    UNKNOWN_LABEL,
    VALUE_TYPES,
    Epoch,
    Manifest,
    Part,
)
from stripe.store.reading import Run, open_run
from stripe.store.rows import EpochWriter
from stripe.store.tables import Table, find_tables
from stripe.store.writing import RunWriter

__all__ = [
    "CONTENTS", "KINDS", "SCHEMA_VERSION", "UNKNOWN_LABEL", "VALUE_TYPES", "Epoch", "EpochCheck", "EpochWriter",
    "Manifest", "Part", "Run", "RunCheck", "RunWriter", "Table", "check_run", "find_tables", "open_run", "repair_run",
]  # fmt: skip
