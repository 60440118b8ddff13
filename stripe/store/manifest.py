"""The manifest: everything run.json says, checked field by field; this module does no I/O."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args

import pyarrow as pa

from stripe.gate import Form, Gate, Product, Tap
from stripe.messages import listing, one_line, require, require_count, require_unique
from stripe.store.moments import MOMENTS_SCHEMA

SCHEMA_VERSION = 2
UNKNOWN_LABEL = -1
VALUE_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
KINDS = ("attention", "squeeze")
CONTENTS = ("samples", "moments", "label-moments")
"""What a run holds: a row per sample, or only the moments over samples, or these and the mean of every class."""

MIXED = ("network", "samples")
"""In what the epochs of a run may differ, if that is allowed; comparing such epochs then says little."""

MANIFEST = "run.json"
ORIGIN = "stripe"  # the key, in a part's metadata, of Manifest.origin
NOTES = "stripe.epoch"  # likewise, the key of Manifest.notes
FOLDERS = {"samples": "attention", "moments": "moments", "label-moments": "moments"}  # by contents
MOMENTS_FOLDER, MOMENTS_SUFFIX = ".moments", ".moments"  # of the files beside the rows; Polars reads whole folders
PART_NAME = re.compile(r"part-([0-9]{4})-([0-9]{3,9})\.parquet")
MAX_CHANNELS = 2**20  # this and MAX_COUNT are far above any real value; they refuse a hostile manifest
MAX_COUNT = 2**50
LAYOUT = re.compile(r"N(?=[^C]*C[^C]*$)[RGCDHWLS]{1,15}")


@dataclass(frozen=True)
class Part:
    """A finished Parquet file: its name inside the epoch's folder, its rows and size, and the CRC-32 of its footer."""

    name: str
    rows: int
    bytes: int
    footer: int | None = None  # None in early runs; the pages carry checksums of their own

    def __post_init__(self) -> None:
        """Refuse a name that could lead out of the folder, and impossible sizes (ValueError)."""
        require(type(self.name) is str and PART_NAME.fullmatch(self.name), f"unsafe part name {self.name!r:.80}")
        require_count(self.rows, 1, MAX_COUNT, f"rows of {self.name}")
        require_count(self.bytes, 1, MAX_COUNT, f"bytes of {self.name}")
        require_count(0 if self.footer is None else self.footer, 0, 2**32 - 1, f"footer of {self.name}")


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number, its parts in the order they are read, and the training step, if known.

    A step is an update of the weights; an epoch recorded after the first 500 updates has step 500. ``moments`` is the
    CRC-32 of the file with the moments of the epoch's rows, None if there is no such file.
    """

    epoch: int
    parts: tuple[Part, ...]
    step: int | None = None
    moments: int | None = None

    def __post_init__(self) -> None:
        """Refuse an invalid number, an epoch without parts, and a part named twice (ValueError)."""
        require_count(self.epoch, 0, MAX_COUNT, "epoch")
        require_count(0 if self.step is None else self.step, 0, MAX_COUNT, f"step of epoch {self.epoch}")
        crc = 0 if self.moments is None else self.moments
        require_count(crc, 0, 2**32 - 1, f"checksum of the moments of epoch {self.epoch}")
        require(self.parts, f"epoch {self.epoch} has no parts")
        require_unique((part.name for part in self.parts), "part names must differ")


@dataclass(frozen=True)
class Manifest:
    """Everything run.json says, field by field."""

    schema: int
    created: str
    versions: dict[str, str]
    model: dict[str, Any]
    data: dict[str, Any]
    seeds: dict[str, Any]
    dtype: str
    squeeze: bool
    gates: tuple[Gate, ...]
    contents: str = CONTENTS[0]
    epochs: tuple[Epoch, ...] = ()
    mixed: tuple[str, ...] = ()  # which of MIXED differ between epochs, if that was allowed

    def __post_init__(self) -> None:
        """Refuse fields of the wrong type, unknown or incompatible choices and repeated names (ValueError)."""
        require_count(self.schema, SCHEMA_VERSION, SCHEMA_VERSION, "schema version")
        for field, kind in {"created": str, "squeeze": bool, "dtype": str, "contents": str}.items():
            require(type(getattr(self, field)) is kind, f"'{field}': expected {kind.__name__}")
        for field in ("versions", "model", "data", "seeds"):
            require(type(getattr(self, field)) is dict, f"'{field}': expected an object")
        require(self.dtype in VALUE_TYPES, f"dtype '{self.dtype:.80}'; expected one of {listing(VALUE_TYPES)}")
        require(self.contents in CONTENTS, f"contents '{self.contents:.80}'; expected one of {listing(CONTENTS)}")
        require(
            self.has_samples or (self.dtype, self.squeeze) == ("float32", False),
            "moments are of float32 attention alone: leave out squeeze and dtype float16",
        )
        require(set(self.mixed) <= set(MIXED), f"mixed {self.mixed!r:.80}; expected some of {listing(MIXED)}")
        require(self.gates, "no gates; expected at least one")
        require_unique((gate.name for gate in self.gates), "gate names must differ")
        require_unique((epoch.epoch for epoch in self.epochs), "epochs must differ")

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse run.json strictly: anything but a manifest of this or an earlier version raises a one-line ValueError.

        Version 1 said less about gates; gates read from it lack what is needed to record a network again.
        """
        try:
            record = json.loads(text)
            require_count(record["schema"], 1, SCHEMA_VERSION, "schema version")
            read_gate = _gate if record["schema"] == SCHEMA_VERSION else _gate_of_version_1
            gates = tuple(read_gate(**gate) for gate in record["gates"])
            epochs = tuple(_epoch(**epoch) for epoch in record["epochs"])
            mixed = tuple(record.get("mixed", ()))
            return cls(**{**record, "schema": SCHEMA_VERSION, "gates": gates, "epochs": epochs, "mixed": mixed})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            remedy = "rebuild it with `stripe check --repair`, upgrade stripe, or record anew"
            raise ValueError(f"{MANIFEST} is not usable ({why}): {remedy}") from error

    def to_json(self) -> str:
        """Return the text of run.json; TypeError or ValueError if a description is not plain JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    def origin(self) -> str:
        """Return what every part carries so that run.json can be rebuilt: all but epochs, time and ``mixed``."""
        return json.dumps(
            asdict(replace(self, created="", epochs=(), mixed=())), separators=(",", ":"), allow_nan=False
        )

    def notes(self, step: int | None) -> str:
        """Return what the parts of an epoch carry in addition to their origin: facts that may differ between epochs."""
        return json.dumps({"step": step, "mixed": self.mixed}, separators=(",", ":"))

    @property
    def has_samples(self) -> bool:
        """Whether the run holds a row per sample."""
        return self.contents == CONTENTS[0]

    def folder(self, epoch: int) -> str:
        """Return the folder of the parts of ``epoch``."""
        return f"{FOLDERS[self.contents]}/{epoch_name(epoch)}"

    def moments_file(self, epoch: Epoch) -> str:
        """Return the path of an epoch's moments; it is named after the first part, so overwriting changes it."""
        first = epoch.parts[0].name.removesuffix(".parquet")
        return f"{MOMENTS_FOLDER}/{epoch_name(epoch.epoch)}/{first}{MOMENTS_SUFFIX}"

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Columns of every part."""
        return self.row_schema if self.has_samples else MOMENTS_SCHEMA.with_metadata({ORIGIN: self.origin()})

    @cached_property
    def row_schema(self) -> pa.Schema:
        """Columns of a part that holds a row per sample; an unknown label is null."""
        value = pa.field("element", VALUE_TYPES[self.dtype], nullable=False)
        columns = [pa.field("sample", pa.int64(), nullable=False), pa.field("label", pa.int32())]
        for kind in KINDS if self.squeeze else KINDS[:1]:
            for gate in self.gates:
                vectors = pa.list_(value, gate.channels)
                columns.append(pa.field(f"{kind}:{gate.name}", vectors, nullable=False))
        return pa.schema(columns, metadata={ORIGIN: self.origin()})


def read_notes(text: bytes | None) -> dict[str, Any]:
    """Read what `Manifest.notes` wrote: {} for None, ValueError for anything malformed."""
    if text is None:
        return {}
    try:
        notes = json.loads(text)
        step, mixed = notes["step"], notes["mixed"]
        require_count(0 if step is None else step, 0, MAX_COUNT, "step")
        require(set(mixed) <= set(MIXED), f"mixed {mixed!r:.80}; expected some of {listing(MIXED)}")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"notes {text[:80]!r} of a part: {one_line(error)}") from error
    return {"step": step, "mixed": mixed}


def _epoch(*, parts: Any, **plain: Any) -> Epoch:
    """Build an epoch from the object in run.json.

    Early runs kept moments beside each part and named them in its entry; these are ignored, and the rows measured.
    """
    found = [{name: value for name, value in {**part}.items() if name != "moments"} for part in parts]
    return Epoch(**plain, parts=tuple(Part(**part) for part in found))


# ---- gates, as run.json holds them ----
def _gate(*, product: Any, attention: Any, squeeze: Any, after: Any, **plain: Any) -> Gate:
    """Build a gate from the object in run.json, checked field by field."""
    require(type(after) is list, f"layers after a gate {after!r:.80}: expected a list")
    gate = Gate(
        **plain,
        after=tuple(after),
        product=None if product is None else Product(**product),
        attention=None if attention is None else Tap(**attention),
        squeeze=None if squeeze is None else Tap(**squeeze),
    )
    require_gate(gate)
    return gate


def _gate_of_version_1(
    *, name: str, channels: int, layout: str, form: Any, source: str | None, site: str | None
) -> Gate:
    """Build a gate from its description in version 1, which has the source of its attention but not its product."""
    attention = None if source is None else Tap(source, call=0, side="output", position=0)
    gate = Gate(name, channels, form, layout, "" if site is None else site, attention=attention)
    require_gate(gate)
    return gate


def require_gate(gate: Gate) -> None:
    """Refuse a gate that cannot name or size a column, or that cannot lead a hook to its place (ValueError)."""
    require(
        type(gate.name) is str and 0 < len(gate.name) <= 1000,
        f"gate name {gate.name!r:.80}: expected 1 to 1000 characters",
    )
    what = f"gate '{gate.name:.80}'"
    taps = [tap for tap in (gate.attention, gate.squeeze) if tap is not None]
    operation = gate.product or Product(0, "mul", 0, 0, copied=False)
    paths = [gate.site, "" if gate.before is None else gate.before, *gate.after, *(tap.path for tap in taps)]
    for text in (gate.name, *paths, operation.op):
        fit = type(text) is str and len(text) <= 1000 and text.isprintable()
        require(fit, f"text {text!r:.80} of {what}: expected printable text of at most 1000 characters")
    require_count(gate.channels, 1, MAX_CHANNELS, f"channels of {what}")
    for choice, known in [(gate.form, get_args(Form)), *((tap.side, ("input", "output")) for tap in taps)]:
        require(choice in known, f"{choice!r:.80} in {what}; expected one of {listing(known)}")
    named = type(gate.layout) is str and LAYOUT.fullmatch(gate.layout)
    require(named, f"layout {gate.layout!r:.80} of {what}: expected N, then C once among the other dimensions")
    for count in (operation.call, operation.ordinal, *(n for tap in taps for n in (tap.call, tap.position))):
        require_count(count, 0, MAX_COUNT, f"call or position in {what}")
    require_count(operation.operand, 0, 1, f"operand of {what}")
    for flag in (operation.copied, gate.pooled, gate.exclusive):
        require(type(flag) is bool, f"{flag!r:.80} in {what}: expected true or false")
    require(not gate.exclusive or gate.source is not None, f"{what} is exclusive but has no module's output")
    require(not gate.pooled or gate.squeeze, f"{what} is pooled but has no tensor of it")


def epoch_name(epoch: int) -> str:
    """Name an epoch's folder."""
    return f"epoch={epoch:04d}"


def epoch_number(path: str) -> int | None:
    """Return the epoch whose folder ``path`` is, or is in; None for any other path."""
    found = re.search(r"(?:^|/)epoch=([0-9]{4,15})(?:/|$)", path)
    return int(found[1]) if found else None


def rank_and_sequence(part: str) -> tuple[int, int]:
    """Return the rank and the sequence number in a part's name."""
    rank, sequence = part.removesuffix(".parquet").split("-")[-2:]
    return int(rank), int(sequence)
