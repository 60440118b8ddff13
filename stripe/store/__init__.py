"""Runs on disk: attention as Parquet beside a manifest; an epoch exists once the manifest names it.

A run is a directory, or an object-storage prefix such as ``s3://bucket/run``::

    run.json                                    the manifest: it alone says which epochs are finished
    attention/epoch=0012/part-0000-000.parquet  a row per sample: sample, label, attention:<gate>, squeeze:<gate>
    .moments/epoch=0012/part-0000-000.moments   a Parquet table of the moments of all the epoch's rows; see `Moments`
    moments/epoch=0012/part-0000-000.parquet    that table alone, instead of the two files above, in a run of moments
    .unfinished/epoch=0013/                     files that are still being written; readers never look here
    .damaged/                                   files that a repair has set aside
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
