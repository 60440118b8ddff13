"""Runs on disk: what is recorded comes back bit for bit, and nothing that fails leaves a trace."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe import store
from stripe.stats import summarize
from stripe.store import GateColumn, RunWriter, open_run

GATES = (GateColumn("layer1.0.se", 4), GateColumn("layer2.0.se", 3))


def vectors(samples: int, gates: tuple[GateColumn, ...] = GATES, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {gate.name: rng.random((samples, gate.channels), dtype=np.float32) for gate in gates}


def writer(path: str | Path, **changes: Any) -> RunWriter:
    return RunWriter(path, **({"model": {"arch": "resnet"}, "data": {"uri": "digits"}, "gates": GATES} | changes))


def record(path: str | Path, *epochs: int, samples: int = 6, seed: int = 0, **changes: Any) -> Path:
    """Record the same values at each epoch, in two batches; the epoch number is added to the seed."""
    with writer(path, **changes) as run:
        for number in epochs:
            values = vectors(samples, seed=seed + number)
            with run.epoch(number) as epoch:
                for rows in (slice(0, samples // 2), slice(samples // 2, samples)):
                    ids = np.arange(samples)[rows]
                    squeeze = {"squeeze": {n: 2 * v[rows] for n, v in values.items()}} if changes.get("squeeze") else {}
                    epoch.append(ids, ids % 3 - 1, {n: v[rows] for n, v in values.items()}, **squeeze)
    return Path(path)


def listing(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def parts(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*.parquet"))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@contextmanager
def refused(kind: type[BaseException], *words: str) -> Iterator[None]:
    """Expect an error of one line that holds all the words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    assert all(word in message for word in words), message


# ---- round trips ------------------------------------------------------------------------------------------

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]), min_size=1)
gate_lists = st.lists(
    st.builds(GateColumn, names, st.integers(1, 5)), min_size=1, max_size=4, unique_by=lambda g: g.name
)


@settings(deadline=None, max_examples=25)
@given(
    gate_lists, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from(["float32", "float16"]), st.data()
)
def test_any_batches_come_back_bit_for_bit(gates, sizes, dtype, data):
    squeeze, row_group, part = data.draw(st.booleans()), data.draw(st.integers(1, 200)), data.draw(st.integers(1, 4000))
    total = sum(sizes)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = rng.permutation(1000)[:total] - 500
    labels = rng.integers(-1, 5, total)
    kinds = ("attention", "squeeze") if squeeze else ("attention",)
    limits = mock.patch.multiple(store, ROW_GROUP_BYTES=row_group, PART_BYTES=part)
    with tempfile.TemporaryDirectory() as folder, limits:
        values = {}
        for kind in kinds:
            for gate in gates:
                values[kind, gate.name] = rng.standard_normal((total, gate.channels)).astype(dtype).astype(np.float32)
        values["attention", gates[0].name][rng.random((total, gates[0].channels)) < 0.2] = np.nan
        with writer(folder, gates=gates, squeeze=squeeze, dtype=dtype) as run:
            if not total:
                with refused(ValueError, "no samples"), run.epoch(3):
                    pass
                return
            with run.epoch(3) as epoch:
                for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
                    rows = slice(stop - size, stop)
                    given_ = {kind: {g.name: values[kind, g.name][rows] for g in gates} for kind in kinds}
                    epoch.append(ids[rows], labels[rows], **given_)
        found = open_run(folder)
        np.testing.assert_array_equal(found.samples(3), ids)
        np.testing.assert_array_equal(found.labels(3), labels)
        for kind in kinds:
            batches = list(found.batches(3, kind=kind))
            for gate in gates:
                expected = values[kind, gate.name]
                np.testing.assert_array_equal(bits(getattr(found, kind)(gate.name, 3)), bits(expected))
                np.testing.assert_array_equal(bits(np.concatenate([b[gate.name] for b in batches])), bits(expected))
                assert not np.array_equal(bits(expected) + 1, bits(expected))


def test_arrays_may_be_reused_after_append(tmp_path):
    buffer = vectors(2)
    with writer(tmp_path) as run, run.epoch(1) as epoch:
        for start in range(0, 6, 2):
            for name in buffer:
                buffer[name][:] = start
            epoch.append([start, start + 1], None, buffer)
    run = open_run(tmp_path)
    np.testing.assert_array_equal(run.attention("layer1.0.se", 1)[:, 0], [0, 0, 2, 2, 4, 4])
    np.testing.assert_array_equal(run.labels(1), [-1] * 6)


def test_float16_halves_the_file_and_refuses_what_it_cannot_hold(tmp_path):
    sizes = {d: record(tmp_path / d, 1, samples=2000, dtype=d) for d in store.VALUE_TYPES}
    sizes = {d: sum(p.stat().st_size for p in path.rglob("*.parquet")) for d, path in sizes.items()}
    assert sizes["float16"] < 0.7 * sizes["float32"]
    values = open_run(tmp_path / "float16").attention("layer1.0.se", 1)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, vectors(2000, seed=1)["layer1.0.se"].astype(np.float16))
    too_large = {name: 1e6 * values for name, values in vectors(2).items()}
    with refused(ValueError, "layer1.0.se", "float32"), writer(tmp_path / "new", dtype="float16") as run:
        with run.epoch(1) as epoch:
            epoch.append([0, 1], None, too_large)
    assert open_run(tmp_path / "new").epochs == []


def test_large_epochs_are_split_into_parts_and_row_groups_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP_BYTES", 7 * 4 * 100)
    monkeypatch.setattr(store, "PART_BYTES", 20_000)
    run = open_run(record(tmp_path, 1, samples=3000))
    assert parts(tmp_path) == [f"attention/epoch=0001/part-0000-{k:03d}.parquet" for k in range(len(parts(tmp_path)))]
    assert len(parts(tmp_path)) > 3
    assert all(20_000 <= (tmp_path / name).stat().st_size < 60_000 for name in parts(tmp_path)[:-1])
    assert [len(batch["layer1.0.se"]) for batch in run.batches(1)] == [100] * 30
    np.testing.assert_array_equal(run.samples(1), np.arange(3000))


def test_reading_batches_holds_one_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP_BYTES", 2**16)
    run = open_run(record(tmp_path, 1, samples=100_000))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in run.batches(1)]
    assert len(held) > 40
    assert max(held) < 8 * 2**16
    assert sum(a.nbytes for a in list(run.batches(1))[0].values()) <= 2**16


def test_gate_names_that_begin_alike_are_kept_apart(tmp_path):
    gates = (GateColumn("layer1", 2), GateColumn("layer1.0", 3), GateColumn("layer1.0#1", 2))
    values = vectors(5, gates)
    with writer(tmp_path, gates=gates) as run, run.epoch(0) as epoch:
        epoch.append(range(5), None, values)
    for name, expected in values.items():
        np.testing.assert_array_equal(open_run(tmp_path).attention(name, 0), expected)


def test_tidy_frame(tmp_path):
    run = open_run(record(tmp_path, 2, squeeze=True))
    frame = run.to_pandas("layer2.0.se", 2)
    assert list(frame) == ["epoch", "gate", "sample", "label", "channel", "attention", "squeeze"]
    assert len(frame) == 18
    wide = frame.pivot(index="sample", columns="channel", values="attention").to_numpy()
    np.testing.assert_array_equal(wide, run.attention("layer2.0.se", 2))
    np.testing.assert_array_equal(frame["squeeze"], 2 * frame["attention"])
    labels = frame.drop_duplicates("sample").label
    assert labels.isna().tolist() == [True, False, False, True, False, False]
    assert labels.dropna().tolist() == [0, 1, 0, 1]
    assert "squeeze" not in open_run(record(tmp_path / "plain", 2)).to_pandas("layer2.0.se", 2)


def test_moments_are_those_of_the_recorded_values(tmp_path):
    run = open_run(record(tmp_path, 1, 2))
    found = run.moments(epochs=[2], gates=["layer1.0.se"])
    assert list(found) == [(2, "layer1.0.se")]
    np.testing.assert_allclose(found[2, "layer1.0.se"].mean, run.attention("layer1.0.se", 2).mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pandas_polars_and_duckdb_read_a_run(tmp_path, dtype):
    run = open_run(record(tmp_path, 1, 12, dtype=dtype))
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "part-0000-000").write_bytes(b"PAR1 not finished")
    column, expected = "attention:layer1.0.se", run.attention("layer1.0.se", 12)
    glob = f"{tmp_path}/**/*.parquet"

    frame = pd.read_parquet(tmp_path / "attention")
    np.testing.assert_array_equal(np.stack(frame[frame.epoch == 12][column]), expected)
    assert frame.label.isna().sum() == 4
    table = pl.scan_parquet(tmp_path / "attention", hive_partitioning=True).filter(pl.col("epoch") == 12).collect()
    np.testing.assert_array_equal(table[column].to_numpy(), expected)
    query = f'select "{column}" from read_parquet(?, hive_partitioning=true) where epoch::int = 12 order by sample'
    rows = duckdb.execute(query, [glob]).fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in rows], np.float32), expected)
    assert not np.array_equal(expected, run.attention("layer1.0.se", 1))


def test_values_are_stored_as_designed(tmp_path):
    for dtype, encoding in (("float32", "BYTE_STREAM_SPLIT"), ("float16", "PLAIN")):
        file = pq.ParquetFile(record(tmp_path / dtype, 1, dtype=dtype) / "attention/epoch=0001/part-0000-000.parquet")
        column = file.metadata.row_group(0).column(2)
        assert encoding in column.encodings
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
    assert file.schema_arrow.field("label").nullable
    assert file.schema_arrow.field("attention:layer1.0.se").type.list_size == 4


def test_manifest_and_description(tmp_path):
    gates = (GateColumn("a", 2, layout="NHWC", form="radix", source="a.gate", site="a"), GateColumn("b", 1))
    with writer(tmp_path, gates=gates, model={"depth": 20}, seeds={"train": 1}):
        pass
    run = open_run(str(tmp_path))
    assert run.gates == list(gates)
    assert run.model == {"depth": 20}
    assert run.data == {"uri": "digits"}
    assert run.manifest.seeds == {"train": 1}
    assert run.manifest.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "pyarrow"} <= run.manifest.versions.keys()
    assert "not-installed" not in run.manifest.versions
    assert run.manifest.created.endswith("+00:00")
    assert repr(run) == f"Run('{tmp_path}': attention of 2 gates, 3 channels; epochs none)"
    record(tmp_path / "squeeze", *range(12), squeeze=True)
    assert "attention and squeeze of 2 gates, 7 channels" in repr(open_run(tmp_path / "squeeze"))
    assert "9, ... (12 in all)" in repr(open_run(tmp_path / "squeeze"))


def test_versions_skip_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_DISTRIBUTIONS", ("numpy", "no-such-distribution"))
    assert open_run(record(tmp_path, 1)).manifest.versions.keys() == {"python", "numpy"}


def test_importing_store_loads_nothing_of_stripe_and_no_torch():
    code = "import sys, stripe.store; print([m for m in sys.modules if m == 'torch' or m.startswith('stripe.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['stripe.store']"


def test_any_file_system_that_arrow_reaches(tmp_path):
    """An object store stands behind the same seam as a directory; fsspec's memory plays one here."""
    pytest.importorskip("fsspec")
    remote = "fsspec+memory://bucket/run"
    record(remote, 1, 2)
    record(remote, 2, 3, overwrite=True, seed=50)
    found, local = open_run(remote), open_run(record(tmp_path, 1))
    assert found.epochs == [1, 2, 3]
    np.testing.assert_array_equal(found.attention("layer1.0.se", 1), local.attention("layer1.0.se", 1))
    np.testing.assert_array_equal(found.attention("layer1.0.se", 2), vectors(6, seed=52)["layer1.0.se"])
    with refused(FileNotFoundError, "memory://bucket/none"):
        open_run("fsspec+memory://bucket/none")


# ---- refusals ---------------------------------------------------------------------------------------------

IDS = np.arange(4)
REFUSED_BATCHES: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "repeated id": (([0, 1, 1, 2], None, vectors(4)), ("sample ids", "given twice: 1")),
    "wrong channels": (
        (IDS, None, vectors(4) | {"layer1.0.se": np.zeros((4, 5))}),
        ("layer1.0.se", "(4, 5)", "(4, 4)"),
    ),
    "spatial axes left": (
        (IDS, None, vectors(4) | {"layer2.0.se": np.zeros((4, 3, 1, 1))}),
        ("(4, 3, 1, 1)", "(4, 3)"),
    ),
    "too few rows": ((IDS, None, vectors(3)), ("(3, 4)", "(4, 4)")),
    "missing gate": ((IDS, None, {"layer1.0.se": np.zeros((4, 4))}), ("lacks attention:layer2.0.se",)),
    "unknown gate": ((IDS, None, vectors(4) | {"fc": np.zeros((4, 4))}), ("unknown attention:fc",)),
    "squeeze not recorded": (
        (IDS, None, vectors(4), vectors(4)),
        ("unknown squeeze:layer1.0.se", "squeeze only where"),
    ),
    "float ids": (([0.5, 1, 2, 3], None, vectors(4)), ("sample ids", "float64")),
    "too few labels": ((IDS, [1, 2], vectors(4)), ("label", "(2,)", "(4,)")),
    "two-dimensional labels": ((IDS, np.ones((4, 2), int), vectors(4)), ("labels", "(4, 2)")),
    "labels beyond int32": ((IDS, [0, 1, 2, 2**40], vectors(4)), ("labels", "outside")),
}


@pytest.mark.parametrize(("batch", "words"), REFUSED_BATCHES.values(), ids=REFUSED_BATCHES)
def test_bad_batches_are_refused_and_leave_nothing(tmp_path, batch, words):
    before = listing(record(tmp_path, 1))
    with refused(ValueError, *words), writer(tmp_path) as run, run.epoch(2) as epoch:
        epoch.append(IDS + 10, IDS, vectors(4))  # a good one first
        epoch.append(*batch)
    assert listing(tmp_path) == before
    with writer(tmp_path) as run, run.epoch(2) as epoch:
        epoch.append(IDS, IDS, vectors(4))
    assert open_run(tmp_path).epochs == [1, 2]


def test_a_sample_repeated_in_a_later_batch_is_refused(tmp_path):
    with writer(tmp_path) as run, run.epoch(1) as epoch:
        epoch.append([1, 2], None, vectors(2))
        epoch.append([3, 4], None, vectors(2))
        with refused(ValueError, "given twice: 2"):
            epoch.append([5, 2], None, vectors(2))
    np.testing.assert_array_equal(open_run(tmp_path).samples(1), [1, 2, 3, 4])


def record_until(path: Path, interruption: type[BaseException], **changes: Any) -> None:
    """Write something of epoch 2, then raise."""
    with writer(path, **changes) as run, run.epoch(2) as epoch:
        epoch.append(IDS, None, vectors(4))
        if run._manifest.has_samples:
            epoch._hand_over()
            epoch._wait()
        else:
            epoch.finish()
        assert (path / ".unfinished" / "part-0000-000").exists()
        raise interruption


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_loop_leaves_the_run_as_it_was(tmp_path, interruption, overwrite):
    before = listing(record(tmp_path, *((1, 2) if overwrite else (1,))))
    with pytest.raises(interruption):
        record_until(tmp_path, interruption, overwrite=overwrite)
    assert listing(tmp_path) == before


def test_a_recorded_epoch_is_refused_before_anything_is_written(tmp_path):
    before = listing(record(tmp_path, 1, 10))
    with writer(tmp_path) as run, refused(FileExistsError, str(tmp_path), "epoch 10", "--overwrite"), run.epoch(10):
        pytest.fail("the block of a refused epoch ran")
    assert listing(tmp_path) == before


def test_overwrite_replaces_an_epoch_and_leaves_no_old_part(tmp_path):
    record(tmp_path, 1, 10)
    old = open_run(tmp_path)
    record(tmp_path, 10, seed=99, overwrite=True)
    run = open_run(tmp_path)
    assert run.epochs == [1, 10]
    np.testing.assert_array_equal(run.attention("layer1.0.se", 10), vectors(6, seed=109)["layer1.0.se"])
    np.testing.assert_array_equal(run.attention("layer1.0.se", 1), vectors(6, seed=1)["layer1.0.se"])
    assert parts(tmp_path) == [
        "attention/epoch=0001/part-0000-000.parquet",
        "attention/epoch=0010/part-0000-001.parquet",
    ]
    with refused(FileNotFoundError, "part-0000-000.parquet", "open the run again"):
        old.attention("layer1.0.se", 10)


DIFFERENT_RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dtype": ({"dtype": "float16"}, ("dtype float32", "float16")),
    "squeeze": ({"squeeze": True}, ("squeeze False", "True")),
    "data": ({"data": {"uri": "cifar10"}}, ("digits", "cifar10")),
    "channels": ({"gates": (GATES[0], GateColumn("layer2.0.se", 8))}, ("layer2.0.se (3)", "layer2.0.se (8)")),
    "gates": ({"gates": GATES[:1]}, ("lacks: layer2.0.se (3)", "lacks: none")),
}


@pytest.mark.parametrize(("changes", "words"), DIFFERENT_RUNS.values(), ids=DIFFERENT_RUNS)
def test_a_different_recording_does_not_continue_a_run(tmp_path, changes, words):
    before = listing(record(tmp_path, 1))
    with refused(ValueError, str(tmp_path), "choose another run", *words):
        writer(tmp_path, **changes)
    assert listing(tmp_path) == before
    assert open_run(record(tmp_path, 2)).epochs == [1, 2]  # and the refused writer let go of the run


def test_a_run_that_finished_no_epoch_may_be_begun_anew(tmp_path):
    with writer(tmp_path, dtype="float16"):
        pass
    assert open_run(record(tmp_path, 1)).manifest.dtype == "float32"


def test_a_run_goes_into_a_training_directory_and_not_into_a_foreign_one(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch\n")
    assert open_run(record(tmp_path, 1)).epochs == [1]
    (tmp_path / "run.json").unlink()
    with refused(FileExistsError, "run.json", "choose another"):
        writer(tmp_path)
    with pytest.raises(OSError, match="metrics.csv"):
        writer(tmp_path / "metrics.csv")


def test_bad_descriptions_are_refused_before_anything_is_created(tmp_path):
    for changes in ({"gates": ()}, {"gates": (GATES[0], GATES[0])}, {"dtype": "int8"}, {"model": {"lr": float("nan")}}):
        with refused(ValueError), writer(tmp_path / "run", **changes):
            pass
    with pytest.raises(TypeError, match="serializable"):
        writer(tmp_path / "run", data={"mean": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_opening_what_is_no_run(tmp_path):
    with refused(FileNotFoundError, "none", "no such directory"):
        open_run(tmp_path / "none")
    with refused(FileNotFoundError, str(tmp_path), "run.json"):
        open_run(tmp_path)


def test_asking_for_what_was_not_recorded(tmp_path):
    run = open_run(record(tmp_path, *range(12), samples=2))
    with refused(ValueError, "no gate 'fc'", "layer1.0.se, layer2.0.se"):
        run.attention("fc", 1)
    with refused(ValueError, "no epoch 99", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)"):
        run.batches(99)
    with refused(ValueError, "no kind 'psi'", "attention, squeeze"):
        run.batches(1, kind="psi")
    with refused(ValueError, "holds no squeeze", "--squeeze"):
        run.squeeze("layer1.0.se", 1)


# ---- damage -----------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "run.json").read_text())
    change(manifest)
    (path / "run.json").write_text(json.dumps(manifest))


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer schema": (lambda m: m.update(schema=2, extra=1), "upgrade stripe"),
    "schema is true": (lambda m: m.update(schema=True), "schema"),
    "no gates": (lambda m: m.pop("gates"), "lacks 'gates'"),
    "no dtype": (lambda m: m.pop("dtype"), "dtype"),
    "unknown field": (lambda m: m.update(more=1), "more"),
    "unknown dtype": (lambda m: m.update(dtype="int8"), "float32, float16"),
    "dtype is a list": (lambda m: m.update(dtype=[]), "dtype"),
    "unknown contents": (lambda m: m.update(contents="rows"), "samples, moments"),
    "squeeze is a number": (lambda m: m.update(squeeze=1), "squeeze"),
    "model is a list": (lambda m: m.update(model=[1]), "model"),
    "gates are a number": (lambda m: m.update(gates=3), "iterable"),
    "gate is a string": (lambda m: m.update(gates=["a"]), "mapping"),
    "gate named twice": (lambda m: m["gates"].append(m["gates"][0]), "layer1.0.se"),
    "gate with a line break": (lambda m: m["gates"][0].update(name="a\nb"), "printable"),
    "gate with a key of two lines": (lambda m: m["gates"][0].update({"a\nb": 1}), "a b"),
    "gate without a name": (lambda m: m["gates"][0].update(name=""), "characters"),
    "absurd channels": (lambda m: m["gates"][0].update(channels=10**18), "channels"),
    "channels true": (lambda m: m["gates"][0].update(channels=True), "channels"),
    "epoch named twice": (lambda m: m["epochs"].append(m["epochs"][0]), "epochs"),
    "negative epoch": (lambda m: m["epochs"][0].update(epoch=-1), "epoch"),
    "epoch without parts": (lambda m: m["epochs"][0].update(parts=[]), "parts"),
    "part twice": (lambda m: m["epochs"][0].update(parts=m["epochs"][0]["parts"] * 2), "part names"),
    "part outside": (lambda m: m["epochs"][0]["parts"][0].update(name="../../part-0000-000.parquet"), "unsafe"),
    "absolute part": (lambda m: m["epochs"][0]["parts"][0].update(name="/etc/passwd"), "unsafe"),
    "part is a number": (lambda m: m["epochs"][0]["parts"][0].update(name=3), "unsafe"),
    "absurd rows": (lambda m: m["epochs"][0]["parts"][0].update(rows=10**30), "rows"),
    "no bytes": (lambda m: m["epochs"][0]["parts"][0].update(bytes=0), "bytes"),
}


@pytest.mark.parametrize(("change", "word"), HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS)
def test_a_manifest_is_read_strictly(tmp_path, change, word):
    edit(record(tmp_path, 1), lambda manifest: None)
    assert open_run(tmp_path).epochs == [1]
    edit(tmp_path, change)
    for opening in (open_run, writer):
        with refused(ValueError, str(tmp_path), "run.json is not usable", word):
            opening(tmp_path)


def test_a_cut_or_foreign_manifest(tmp_path, monkeypatch):
    whole = (record(tmp_path, 1) / "run.json").read_bytes()
    for text in (*(whole[:size] for size in range(0, len(whole) - 1, 97)), b"\xff\xfe", b"[" * 100_000, b"[]", b"7"):
        (tmp_path / "run.json").write_bytes(text)
        with refused(ValueError, str(tmp_path), "run.json is not usable"):
            open_run(tmp_path)
    (tmp_path / "run.json").write_bytes(whole)
    assert open_run(tmp_path).epochs == [1]
    monkeypatch.setattr(store, "_MAX_MANIFEST_BYTES", 100)
    with refused(ValueError, "bytes of run.json"):
        open_run(tmp_path)


json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
json_values = json_leaves | st.lists(json_leaves, max_size=2) | st.dictionaries(st.text(max_size=9), json_leaves)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded"), 1)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_change_of_the_manifest_is_refused_in_one_line_or_harmless(recorded, data):
    manifest = json.loads((recorded / "run.json").read_text())
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    try:
        found = store.Manifest.from_json(json.dumps(manifest))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert store.Manifest.from_json(json.dumps(json.loads(json.dumps(manifest)))).gates == found.gates


def test_a_damaged_part_is_named_and_the_rest_stays_readable(tmp_path):
    run = open_run(record(tmp_path, 1, 2, samples=500))
    name = "attention/epoch=0001/part-0000-000.parquet"
    whole = (tmp_path / name).read_bytes()
    damages = {"cut": whole[:-100], "empty": b"", "other": b"x" * len(whole)}
    for position in np.random.default_rng(0).integers(4, len(whole) - 1000, 20):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        damages[f"bit {position}"] = bytes(flipped)
    for damage in damages.values():
        (tmp_path / name).write_bytes(damage)
        try:
            values = run.attention("layer1.0.se", 1)
        except ValueError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            assert f"{name} is damaged" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:  # the flipped bit lies in another column
            np.testing.assert_array_equal(values, vectors(500, seed=1)["layer1.0.se"])
            with refused(ValueError, name):
                list(run.batches(1)), run.samples(1), run.labels(1)
        np.testing.assert_array_equal(run.attention("layer1.0.se", 2), vectors(500, seed=2)["layer1.0.se"])


@pytest.mark.parametrize("change", [{"samples": 7}, {"dtype": "float16"}, {"squeeze": True}])
def test_a_part_that_is_not_what_the_manifest_says(tmp_path, change):
    run, other = record(tmp_path / "run", 1), record(tmp_path / "other", 1, **change)
    foreign = (other / parts(other)[0]).read_bytes()
    (run / parts(run)[0]).write_bytes(foreign)
    size = len(foreign)
    edit(run, lambda manifest: manifest["epochs"][0]["parts"][0].update(bytes=size))
    with refused(ValueError, parts(run)[0], "7 rows; expected 6" if "samples" in change else "columns"):
        open_run(run).samples(1)


# ---- crashes, full disks, other writers -------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from stripe import store
sys.path.insert(0, sys.argv[1])
from test_store import record

fsync = os.fsync
for stage in range(int(sys.argv[3])):
    if not os.fork():
        calls = iter(range(99))
        def sync(handle):
            fsync(handle)
            if next(calls) == stage:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = sync
        with mock.patch.multiple(store, ROW_GROUP_BYTES=28 * 2, PART_BYTES=2000):
            record(Path(sys.argv[2]) / str(stage), 2, samples=20, seed=int(sys.argv[4]), overwrite=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("overwriting", [False, True])
def test_a_kill_at_any_stage_leaves_finished_epochs_whole(tmp_path, overwriting):
    stages = 7  # kills after two parts, two folders, the staged manifest and its rename; the last is not killed
    for stage in range(stages):
        record(tmp_path / str(stage), *((1, 2) if overwriting else (1,)), samples=20)
    arguments = [str(Path(__file__).parent), str(tmp_path), str(stages), "70"]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, timeout=120)
    first, old, new = (vectors(20, seed=seed)["layer2.0.se"] for seed in (1, 2, 72))
    outcomes = []
    for folder in sorted(tmp_path.iterdir()):
        run = open_run(folder)
        np.testing.assert_array_equal(run.attention("layer2.0.se", 1), first)
        found = run.attention("layer2.0.se", 2) if 2 in run.epochs else None
        outcomes.append("absent" if found is None else "old" if np.array_equal(found, old) else "new")
        assert outcomes[-1] != "new" or np.array_equal(found, new)
        record(folder, 2, samples=20, seed=70, overwrite=True)
        again = open_run(folder)
        np.testing.assert_array_equal(again.attention("layer2.0.se", 2), new)
        named = [f"epoch={epoch.epoch:04d}/{part.name}" for epoch in again.manifest.epochs for part in epoch.parts]
        assert parts(folder / "attention") == named
    assert outcomes == (["old"] if overwriting else ["absent"]) * 5 + ["new"] * 2


def test_a_killed_recording_shows_nothing_and_frees_the_run(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_store import *\n"
        "with writer(sys.argv[2]) as run, run.epoch(2) as epoch:\n"
        "    epoch.append(IDS, IDS, vectors(4)); epoch._hand_over(); epoch._wait()\n"
        "    print('recording', flush=True); sys.stdin.read()\n"
    )
    before = parts(record(tmp_path, 1))
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "recording\n"
        assert (tmp_path / ".unfinished" / "part-0000-000").exists()
        with refused(BlockingIOError, str(tmp_path), "being written already"):
            writer(tmp_path)
        child.send_signal(signal.SIGKILL)
    assert parts(tmp_path) == before
    assert open_run(tmp_path).epochs == [1]
    assert open_run(record(tmp_path, 3)).epochs == [1, 3]
    assert not (tmp_path / ".unfinished").exists()


def test_two_writers_in_one_process(tmp_path):
    with writer(tmp_path):
        with refused(BlockingIOError, str(tmp_path)):
            writer(tmp_path)
        assert open_run(tmp_path).epochs == []  # readers are welcome
    with writer(tmp_path):
        pass


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_told_in_the_loop_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP_BYTES", 28 * 1000)
    before = listing(record(tmp_path, 1))
    appended = 0
    with refused(OSError, str(tmp_path), os.strerror(errno.EFBIG), "make room"), writer(tmp_path) as run:
        with run.epoch(2) as epoch, file_size_limit(50_000):
            for start in range(0, 100_000, 1000):
                epoch.append(np.arange(start, start + 1000), None, vectors(1000, seed=start))
                appended += 1000
    assert 0 < appended < 100_000
    assert listing(tmp_path) == before
    with refused(OSError, str(tmp_path), "make room"), writer(tmp_path) as run, run.epoch(2) as epoch:
        epoch.append(np.arange(1000), None, vectors(1000))
        with file_size_limit(100):
            epoch.finish()
    assert listing(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk(small_disk, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP_BYTES", 28 * 1000)
    before = listing(record(small_disk / "run", 1))
    with refused(OSError, "run", "No space left"), writer(small_disk / "run") as run, run.epoch(2) as epoch:
        for start in range(0, 100_000, 1000):
            epoch.append(np.arange(start, start + 1000), None, vectors(1000, seed=start))
    assert listing(small_disk / "run") == before
    assert open_run(record(small_disk / "run", 2)).epochs == [1, 2]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root's right to write anywhere, if the tests run as root."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_directory():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        path = Path(folder)
        record(path, 1)
        before = listing(path)
        for each in (path, *path.rglob("*")):
            each.chmod(0o555 if each.is_dir() else 0o444)
        with unprivileged():
            with refused(PermissionError, folder):
                writer(path / "new")
            with refused(PermissionError, folder), writer(path) as run, run.epoch(2):
                pass
            assert open_run(path).epochs == [1]
        assert listing(path) == before
        for each in (path, *path.rglob("*")):
            each.chmod(0o755)


def several_ranks(path: Path, ids: list[list[int]], **changes: Any) -> list[BaseException]:
    """Record one epoch from as many threads as there are lists of ids, each thread a rank."""
    barrier, errors = threading.Barrier(len(ids), timeout=30), []

    def one(rank: int) -> None:
        try:
            with writer(path, rank=rank, barrier=barrier.wait, **changes) as run, run.epoch(1) as epoch:
                if ids[rank]:
                    values = {name: rows[ids[rank]] for name, rows in vectors(20).items()}
                    epoch.append(ids[rank], [i % 3 for i in ids[rank]], values)
            assert run.epochs == [1]
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_several_ranks_write_one_run(tmp_path):
    ids = [[0, 2, 4, 6], [1, 3, 5], []]
    assert several_ranks(tmp_path, ids) == []
    run = open_run(tmp_path)
    assert parts(tmp_path) == [f"attention/epoch=0001/part-000{rank}-000.parquet" for rank in (0, 1)]
    np.testing.assert_array_equal(run.samples(1), ids[0] + ids[1])
    np.testing.assert_array_equal(run.attention("layer1.0.se", 1), vectors(20)["layer1.0.se"][ids[0] + ids[1]])


def test_a_sample_recorded_by_two_ranks_is_refused(tmp_path):
    errors = several_ranks(tmp_path, [[0, 2, 4], [1, 3, 4]])
    assert any("two ranks recorded samples 4" in str(error) for error in errors)
    assert open_run(tmp_path).epochs == []
    assert parts(tmp_path) == []


# ---- moments alone ----------------------------------------------------------------------------------------


def equal_moments(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        for field in dataclasses.fields(expected[key]):
            actual, wanted = (np.asarray(getattr(each[key], field.name), float) for each in (found, expected))
            np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=1e-300, err_msg=f"{key} {field.name}")


def test_moments_alone_are_those_of_a_run_with_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 500)  # one part for each gate
    whole = open_run(record(tmp_path / "whole", 1, 12, samples=500))
    run = open_run(record(tmp_path / "run", 1, 12, samples=500, contents="moments"))
    assert run.epochs == [1, 12]
    assert len(parts(tmp_path / "run/moments/epoch=0012")) == 2
    assert repr(run) == f"Run('{tmp_path}/run': moments of 2 gates, 7 channels; epochs 1, 12)"
    equal_moments(run.moments(), whole.moments())
    equal_moments(run.moments([12], ["layer2.0.se"]), whole.moments([12], ["layer2.0.se"]))
    with pytest.raises(AssertionError):
        equal_moments(run.moments([1]), {(1, gate): whole.moments()[12, gate] for _, gate in whole.moments([1])})


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(1e-6, 10), st.integers(0, 99))
def test_moments_do_not_depend_on_how_samples_come(sizes, spread, seed):
    sizes, rng = [*sizes, 2], np.random.default_rng(seed)
    values = {name: 0.5 + np.float32(spread) * rows for name, rows in vectors(sum(sizes), seed=seed).items()}
    labels = rng.integers(0, 3, sum(sizes))
    with tempfile.TemporaryDirectory() as folder:
        for name, cut, contents in (("a", sizes, "label-moments"), ("b", [sum(sizes)], "samples")):
            with writer(f"{folder}/{name}", contents=contents) as run, run.epoch(0) as epoch:
                for stop, size in zip(np.cumsum(cut), cut, strict=True):
                    rows = slice(stop - size, stop)
                    epoch.append(np.arange(sum(sizes))[rows], labels[rows], {n: v[rows] for n, v in values.items()})
        found, whole = open_run(f"{folder}/a"), open_run(f"{folder}/b")
        # m2 of parts is known to within the rounding of their means
        equal_moments(found.moments(), whole.moments(), rtol=max(1e-12, 1e-14 / spread))
        for gate in values:
            classes = found.label_means(gate, 0)
            for label, count, mean in zip(classes.labels, classes.counts, classes.means, strict=True):
                assert count == (labels == label).sum()
                expected = whole.attention(gate, 0)[labels == label].mean(0, dtype=float)
                np.testing.assert_allclose(mean, expected, rtol=1e-12)
            assert classes.counts.sum() == sum(sizes)


def test_summary_of_moments_has_all_that_needs_no_sample(tmp_path):
    for contents in ("samples", "moments", "label-moments"):
        with writer(tmp_path / contents, contents=contents) as run:
            for number in (1, 2):
                with run.epoch(number) as epoch:
                    epoch.append(range(50), np.arange(50) % 3, vectors(50, seed=number))
    tables = {path.name: summarize(open_run(path), bootstrap=10) for path in tmp_path.iterdir()}
    whole, sampled = tables["samples"], ["strength_low", "strength_high", "sample_share", "rest_share", "rank"]
    assert not whole.drop(columns="drift").isna().any().any()
    pd.testing.assert_frame_equal(tables["label-moments"].drop(columns=sampled), whole.drop(columns=sampled), rtol=1e-9)
    labelled = ["label_share", "label_omega"]
    pd.testing.assert_frame_equal(
        tables["moments"].drop(columns=sampled + labelled), whole.drop(columns=sampled + labelled), rtol=1e-12
    )
    assert tables["label-moments"][sampled].isna().all().all()
    assert tables["moments"][sampled + labelled].isna().all().all()


def test_values_that_are_not_finite_stay_so_in_moments(tmp_path):
    values = vectors(8)
    values["layer1.0.se"][3, 1], values["layer1.0.se"][4, 2], values["layer1.0.se"][5, 2] = np.nan, np.inf, -np.inf
    for contents in ("samples", "label-moments"):
        with writer(tmp_path / contents, contents=contents) as run, run.epoch(0) as epoch:
            epoch.append(range(8), np.arange(8) // 6, values)
    found, whole = (open_run(tmp_path / contents) for contents in ("label-moments", "samples"))
    equal_moments(found.moments(), whole.moments())
    assert found.moments()[0, "layer1.0.se"].nonfinite == 3
    assert "nonfinite" in summarize(found)["flags"][0]
    pd.testing.assert_series_equal(summarize(found)["label_share"], summarize(whole, bootstrap=0)["label_share"])


def test_a_run_of_moments_says_so_where_samples_are_asked_for(tmp_path):
    run = open_run(record(tmp_path / "run", 1, contents="moments"))
    asking = [
        lambda: run.attention("layer1.0.se", 1), lambda: run.samples(1), lambda: run.labels(1),
        lambda: run.batches(1), lambda: run.to_pandas("layer1.0.se", 1),
    ]  # fmt: skip
    for ask in asking:
        with refused(ValueError, str(tmp_path), "moments only", "moments()"):
            ask()
    with refused(ValueError, "holds no means by label", "--by-label"):
        run.label_means("layer1.0.se", 1)
    with refused(ValueError, "no epoch 3", "1"):
        run.moments([3])
    with refused(ValueError, "no gate 'fc'", "layer1.0.se"):
        run.moments(gates=["fc"])


@pytest.mark.parametrize("change", [{"squeeze": True}, {"dtype": "float16"}, {"contents": "rows"}])
def test_moments_of_anything_but_attention_are_refused(tmp_path, change):
    with refused(ValueError, "moments"):
        writer(tmp_path / "run", **({"contents": "moments"} | change))
    assert not list(tmp_path.iterdir())


def test_moments_by_label_need_every_label(tmp_path):
    before = listing(record(tmp_path, 1, contents="moments"))
    with refused(ValueError, "contents moments", "label-moments"):
        writer(tmp_path, contents="label-moments")
    assert listing(tmp_path) == before
    for labels in (None, [0, 1, -1, 2]):
        with refused(ValueError, "a label for every sample"), writer(tmp_path / "b", contents="label-moments") as run:
            with run.epoch(1) as epoch:
                epoch.append(IDS, labels, vectors(4))
    assert parts(tmp_path / "b") == []


@pytest.mark.parametrize(("batch", "words"), list(REFUSED_BATCHES.values())[1:], ids=list(REFUSED_BATCHES)[1:])
def test_bad_batches_of_moments_are_refused_and_leave_nothing(tmp_path, batch, words):
    before = listing(record(tmp_path, 1, contents="moments"))
    with refused(ValueError, *words), writer(tmp_path, contents="moments") as run, run.epoch(2) as epoch:
        epoch.append(IDS + 10, IDS, vectors(4))
        epoch.append(*batch)
    assert listing(tmp_path) == before
    with refused(ValueError, "no samples"), writer(tmp_path, contents="moments") as run, run.epoch(2):
        pass


def test_moments_are_overwritten_whole_or_not_at_all(tmp_path):
    record(tmp_path, 1, 2, contents="moments")
    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        record_until(tmp_path, KeyboardInterrupt, contents="moments", overwrite=True)
    assert listing(tmp_path) == before
    record(tmp_path, 2, seed=40, contents="moments", overwrite=True)
    assert parts(tmp_path) == [f"moments/epoch=000{n}/part-0000-00{k}.parquet" for n, k in ((1, 0), (2, 1))]
    found = open_run(tmp_path).moments([2])[2, "layer1.0.se"]
    np.testing.assert_allclose(found.mean, vectors(6, seed=42)["layer1.0.se"].mean(0, dtype=float), rtol=1e-12)
    (tmp_path / "run.json").unlink()
    with refused(FileExistsError, "folder moments", "run.json"):
        writer(tmp_path)


def test_damaged_moments_are_named(tmp_path):
    run = open_run(record(tmp_path, 1, contents="moments"))
    name = parts(tmp_path)[0]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with refused(ValueError, f"{name} is damaged"):
        run.moments()


def test_moments_of_several_ranks_merge(tmp_path):
    ids = [[0, 2, 4, 6], [1, 3, 5], []]
    assert several_ranks(tmp_path / "run", ids, contents="label-moments") == []
    assert len(parts(tmp_path / "run")) == 2
    with writer(tmp_path / "whole") as run, run.epoch(1) as epoch:
        epoch.append(range(7), [i % 3 for i in range(7)], {name: rows[:7] for name, rows in vectors(20).items()})
    run, whole = open_run(tmp_path / "run"), open_run(tmp_path / "whole")
    equal_moments(run.moments(), whole.moments())
    classes, values = run.label_means("layer1.0.se", 1), whole.attention("layer1.0.se", 1)
    assert classes.counts.tolist() == [3, 2, 2]
    np.testing.assert_allclose(classes.means, [values[k::3].mean(0, dtype=float) for k in range(3)], rtol=1e-12)


def test_moments_are_read_by_pandas_polars_and_duckdb(tmp_path):
    run = open_run(record(tmp_path, 1, 12, contents="moments"))
    expected = run.moments()[12, "layer1.0.se"].mean
    where = "epoch == 12 and gate == 'layer1.0.se'"
    [mean] = pd.read_parquet(tmp_path / "moments").query(where)["mean"]
    np.testing.assert_array_equal(mean, expected)
    table = pl.scan_parquet(tmp_path / "moments", hive_partitioning=True).collect()
    table = table.filter((pl.col("epoch") == 12) & (pl.col("gate") == "layer1.0.se"))
    np.testing.assert_array_equal(table["mean"].to_list(), [expected])
    rows = duckdb.execute(
        f"select mean from read_parquet(?, hive_partitioning=true) where {where.replace('==', '=')}",
        [f"{tmp_path}/**/*.parquet"],
    ).fetchall()
    np.testing.assert_array_equal(rows[0][0], expected)
