"""Runs on disk: what is recorded comes back bit for bit, and what does not fit is refused without a trace."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Barrier
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe.examples import load_example
from stripe.gate import Gate, Product, Tap
from stripe.stats import summarize
from stripe.store import VALUE_TYPES, Manifest, check_run, open_run, repair_run
from stripe.store.parts import PartWriter
from tests.runs import (
    GATES,
    IDS,
    REFUSED_BATCHES,
    bits,
    edit,
    listing,
    parts,
    record,
    record_until,
    refused,
    sizes_of,
    vectors,
    writer,
)

WHOLE_GATE = Gate(
    "a", 2, "radix", "NRCHW", "block.a", "conv1", ("conv2", "conv3"), Product(1, "mul", 1, 3, copied=False),
    Tap("a.gate", 1, "output", 0), Tap("a", 0, "input", 2), pooled=True, exclusive=True,
)  # fmt: skip

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]), min_size=1)
gate_lists = st.lists(st.builds(Gate, names, st.integers(1, 5)), min_size=1, max_size=4, unique_by=lambda g: g.name)


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
    limits = sizes_of(row_group, part)
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
    sizes = {d: record(tmp_path / d, 1, samples=2000, dtype=d) for d in VALUE_TYPES}
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
    monkeypatch.setattr("stripe.store.rows.ROW_GROUP_BYTES", 7 * 4 * 100)
    monkeypatch.setattr("stripe.store.parts.PART_BYTES", 20_000)
    run = open_run(record(tmp_path, 1, samples=3000))
    assert parts(tmp_path) == [f"attention/epoch=0001/part-0000-{k:03d}.parquet" for k in range(len(parts(tmp_path)))]
    assert len(parts(tmp_path)) > 3
    assert all(20_000 <= (tmp_path / name).stat().st_size < 60_000 for name in parts(tmp_path)[:-1])
    assert [len(batch["layer1.0.se"]) for batch in run.batches(1)] == [100] * 30
    np.testing.assert_array_equal(run.samples(1), np.arange(3000))


def test_a_row_group_is_measured_while_it_is_written(tmp_path, monkeypatch):
    both = Barrier(2, timeout=20)  # one thread for both would wait for itself, and break it

    def beginning_together(task):
        return lambda *arguments: (both.wait(), task(*arguments))

    for name in ("write", "measure"):
        monkeypatch.setattr(PartWriter, name, beginning_together(getattr(PartWriter, name)))
    monkeypatch.setattr("stripe.store.rows.ROW_GROUP_BYTES", 7 * 4 * 100)
    assert len(open_run(record(tmp_path, 1, samples=300)).samples(1)) == 300


def test_reading_batches_holds_one_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("stripe.store.rows.ROW_GROUP_BYTES", 2**16)
    run = open_run(record(tmp_path, 1, samples=100_000))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in run.batches(1)]
    assert len(held) > 40
    assert max(held) < 8 * 2**16
    assert sum(a.nbytes for a in list(run.batches(1))[0].values()) <= 2**16


def test_gate_names_that_begin_alike_are_kept_apart(tmp_path):
    gates = (Gate("layer1", 2), Gate("layer1.0", 3), Gate("layer1.0#1", 2))
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

    # as a number: Polars as it is, the others with one word more
    assert table.schema["epoch"].is_integer()
    numbers = frame.astype({"epoch": int})
    assert (numbers.epoch > 1).sum() == (numbers.epoch + 1 == 13).sum() == len(expected)
    with pytest.raises(TypeError):
        _ = frame.epoch > 1
    query = "select max(epoch + 1) from read_parquet(?, hive_partitioning=true, hive_types={'epoch': INT})"
    assert duckdb.execute(query, [glob]).fetchall() == [(13,)]


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
    gates = (WHOLE_GATE, Gate("b", 1))
    with writer(tmp_path, gates=gates, model={"depth": 20}, seeds={"train": 1}):
        pass
    run = open_run(str(tmp_path))
    assert run.gates == list(gates)
    assert run.gates[0].source == "a.gate"
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


def test_a_gate_stands_wherever_its_name_is_expected(tmp_path):
    run = open_run(record(tmp_path, 1, squeeze=True))
    first, second = run.gates
    for read in (run.attention, run.squeeze):
        np.testing.assert_array_equal(read(second, 1), read(second.name, 1))
        assert read(first, 1).shape != read(second, 1).shape
    assert run.to_pandas(first, 1).equals(run.to_pandas(first.name, 1))
    assert next(run.batches(1, [second])).keys() == {second.name}
    assert run.moments([1], [second]).keys() == {(1, second.name)}
    assert set(summarize(run, gates=[second])["gate"]) == {second.name}
    with refused(ValueError, "no gate 'other'", "layer1.0.se, layer2.0.se"):
        run.attention(Gate("other", 4), 1)


# ---- older runs ----
def as_version_1(manifest):
    """Write a manifest as the first version of the schema did."""
    manifest["schema"] = 1
    for gate in manifest["gates"]:
        source, site = f"{gate['name']}.gate", gate["name"]
        plain = {field: gate[field] for field in ("name", "channels", "layout", "form")}
        gate.clear()
        gate.update(plain | {"source": source, "site": site})


def test_a_run_of_the_first_version_opens_and_gives_the_same_table(tmp_path):
    path = record(tmp_path, 1, 2)
    now = summarize(open_run(path))
    edit(path, as_version_1)
    old = open_run(path)
    pd.testing.assert_frame_equal(summarize(old), now)
    assert old.gates[0] == Gate("layer1.0.se", 4, site="layer1.0.se", attention=Tap("layer1.0.se.gate", 0, "output", 0))
    assert [gate.source for gate in old.gates] == ["layer1.0.se.gate", "layer2.0.se.gate"]
    assert check_run(path).whole


def test_a_run_of_the_first_version_can_be_continued(tmp_path):
    path = record(tmp_path, 1)
    edit(path, as_version_1)
    old = open_run(path).gates
    record(path, 2)
    run = open_run(path)
    assert (run.epochs, run.gates, run.manifest.schema) == ([1, 2], old, 2)


def test_a_manifest_is_rebuilt_from_the_parts_of_the_example_that_ships(tmp_path):
    """Its parts carry the manifest in the words of the version that wrote them."""
    whole = load_example("cifar10-se-resnet20")
    path = shutil.copytree(whole.path, tmp_path / "run")
    (path / "run.json").unlink()
    assert repair_run(path).whole
    assert (open_run(path).gates, open_run(path).epochs) == (whole.gates, whole.epochs)


def test_the_manifest_of_the_first_example_still_reads():
    """The text is what the package shipped when its runs were of version 1."""
    gates = Manifest.from_json((Path(__file__).parent / "run_of_version_1.json").read_bytes()).gates
    assert [(gate.name, gate.channels, gate.source, gate.site) for gate in gates] == [
        ("layer1.0", 64, "layer1.0.attention_module", "layer1.0"),
        ("layer2.0", 128, "layer2.0.attention_module", "layer2.0"),
        ("layer3.1", 256, "layer3.1.attention_module", "layer3.1"),
    ]
    assert all(gate.product is None for gate in gates)


def test_versions_skip_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("stripe.store.writing.DISTRIBUTIONS", ("numpy", "no-such-distribution"))
    assert open_run(record(tmp_path, 1)).manifest.versions.keys() == {"python", "numpy"}


def test_importing_store_loads_the_ground_floor_alone_and_no_torch():
    code = "import sys, stripe.store; print([m for m in sys.modules if m == 'torch' or m.startswith('stripe.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {room.split(".")[1] for room in ast.literal_eval(found.stdout)}
    assert rooms == {"files", "gate", "locks", "messages", "store"}


def test_any_file_system_that_arrow_reaches(tmp_path):
    """An object store stands behind the same seam as a directory; fsspec's memory plays one here."""
    pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow", "21", reason="before 21, Arrow knows no addresses that begin with fsspec+")
    remote = "fsspec+memory://bucket/run"
    record(remote, 1, 2)
    record(remote, 2, 3, overwrite=True, seed=50)
    found, local = open_run(remote), open_run(record(tmp_path, 1))
    assert found.epochs == [1, 2, 3]
    np.testing.assert_array_equal(found.attention("layer1.0.se", 1), local.attention("layer1.0.se", 1))
    np.testing.assert_array_equal(found.attention("layer1.0.se", 2), vectors(6, seed=52)["layer1.0.se"])
    with refused(FileNotFoundError, "memory://bucket/none"):
        open_run("fsspec+memory://bucket/none")


# ---- refusals ----


@pytest.mark.parametrize(("batch", "words"), REFUSED_BATCHES.values(), ids=REFUSED_BATCHES)
def test_bad_batches_are_refused_and_leave_nothing(tmp_path, batch, words):
    before = listing(record(tmp_path, 1, samples=4))
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


def test_samples_repeat_exactly_where_a_set_says_so(tmp_path):
    """Batches of every size, ids of either sign and at the ends of their range, some of them given before."""
    rng, ends = np.random.default_rng(0), np.iinfo(np.int64)
    numbers = np.concatenate([rng.permutation(np.arange(-400, 400)), [ends.min, ends.max]])
    known, refusals = set(), 0
    with writer(tmp_path) as run, run.epoch(1) as epoch:
        for _ in range(300):
            ids = rng.choice(numbers, rng.integers(0, 9), replace=False)
            if known & {*ids.tolist()}:
                refusals += 1
                with pytest.raises(ValueError, match="given twice"):
                    epoch.append(ids, None, vectors(len(ids)))
            else:
                epoch.append(ids, None, vectors(len(ids)))
                known |= {*ids.tolist()}
    assert refusals > 50
    assert set(open_run(tmp_path).samples(1).tolist()) == known
    assert len(known) > 100


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
    "channels": ({"gates": (GATES[0], Gate("layer2.0.se", 8))}, ("layer2.0.se (3)", "layer2.0.se (8)")),
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
    (tmp_path / "file").touch()
    with refused(FileNotFoundError, "it is a file"):
        open_run(tmp_path / "file")
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
