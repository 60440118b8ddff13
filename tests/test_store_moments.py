"""Runs of moments alone: the same figures as from rows, in memory that does not grow with the samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe.cli import main
from stripe.stats import Moments, summarize
from stripe.store import check_run, open_run, repair_run
from tests.runs import (
    IDS,
    REFUSED_BATCHES,
    edit,
    listing,
    parts,
    record,
    record_until,
    refused,
    several_ranks,
    sizes_of,
    vectors,
    writer,
)


def equal_moments(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        equal(found[key], expected[key], rtol, str(key))


def equal(found: Any, expected: Any, rtol: float, where: str) -> None:
    """Compare moments, and groups within them, field by field."""
    for field in dataclasses.fields(expected):
        actual, wanted = (getattr(each, field.name) for each in (found, expected))
        if field.name == "classes" and None in (actual, wanted):
            continue  # runs of moments do not keep them unless they are asked to
        if dataclasses.is_dataclass(wanted):
            equal(actual, wanted, rtol, f"{where} {field.name}")
            continue
        actual, wanted = (np.asarray(each, float) for each in (actual, wanted))
        scale = np.abs(wanted).max(initial=0) if field.name in ("m2", "scatter", "rows") else 0
        np.testing.assert_allclose(
            actual, wanted, rtol=rtol, atol=rtol * scale, err_msg=f"{where} {field.name}", equal_nan=True
        )


def test_moments_alone_are_those_of_a_run_with_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("stripe.store.parts.PART_BYTES", 500)
    whole = open_run(record(tmp_path / "whole", 1, 12, samples=500))
    run = open_run(record(tmp_path / "run", 1, 12, samples=500, contents="moments"))
    assert run.epochs == [1, 12]
    assert len(parts(tmp_path / "run/moments/epoch=0012")) == 1
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
            classes = found.moments()[0, gate].classes
            for label, count, mean in zip(classes.keys, classes.counts, classes.means, strict=True):
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
    tables = {path.name: summarize(open_run(path), rank=True) for path in tmp_path.iterdir()}
    whole = tables["samples"]
    assert not whole.drop(columns="drift").isna().any().any()
    pd.testing.assert_frame_equal(tables["label-moments"].drop(columns="rank"), whole.drop(columns="rank"), rtol=1e-12)
    labelled = ["rank", "label_share", "label_omega"]
    pd.testing.assert_frame_equal(tables["moments"].drop(columns=labelled), whole.drop(columns=labelled), rtol=1e-12)
    assert tables["moments"][labelled].isna().all().all()
    assert (whole["strength_low"] < whole["strength_high"]).all()


def test_values_that_are_not_finite_stay_so_in_moments(tmp_path):
    values = vectors(8)
    values["layer1.0.se"][3, 1], values["layer1.0.se"][4, 2], values["layer1.0.se"][5, 2] = np.nan, np.inf, -np.inf
    for contents in ("samples", "label-moments"):
        with writer(tmp_path / contents, contents=contents) as run, run.epoch(0) as epoch:
            epoch.append(range(8), np.arange(8) // 6, values)
    found, whole = (open_run(tmp_path / contents) for contents in ("label-moments", "samples"))
    equal_moments(found.moments(), whole.moments())
    measured = found.moments()[0, "layer1.0.se"]
    assert (measured.nonfinite, measured.left_out, measured.count) == (3, 3, 5)
    assert found.moments()[0, "layer2.0.se"].count == 8
    assert "nonfinite" in summarize(found)["flags"][0]
    pd.testing.assert_frame_equal(summarize(found), summarize(whole))


def test_a_run_of_moments_says_so_where_samples_are_asked_for(tmp_path):
    run = open_run(record(tmp_path / "run", 1, contents="moments"))
    asking = [
        lambda: run.attention("layer1.0.se", 1), lambda: run.samples(1), lambda: run.labels(1),
        lambda: run.batches(1), lambda: run.to_pandas("layer1.0.se", 1),
    ]  # fmt: skip
    for ask in asking:
        with refused(ValueError, str(tmp_path), "moments only", "moments()"):
            ask()
    assert run.moments()[1, "layer1.0.se"].classes is None
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
    classes, values = run.moments()[1, "layer1.0.se"].classes, whole.attention("layer1.0.se", 1)
    assert classes.counts.tolist() == [3, 2, 2]
    np.testing.assert_allclose(classes.means, [values[k::3].mean(0, dtype=float) for k in range(3)], rtol=1e-12)


def test_moments_are_read_by_pandas_polars_and_duckdb(tmp_path):
    run = open_run(record(tmp_path, 1, 12, contents="moments"))
    found = run.moments()[12, "layer1.0.se"]
    table = pd.read_parquet(tmp_path / "moments").query("epoch == 12 and gate == 'layer1.0.se'")
    assert table["block"].isna().tolist() == [True, *[False] * len(found.blocks.keys)]
    np.testing.assert_array_equal(table["mean"].iloc[0], found.mean)
    np.testing.assert_array_equal(np.stack(table["mean"].iloc[1:]), found.blocks.means)
    table = pl.scan_parquet(tmp_path / "moments", hive_partitioning=True).collect()
    table = table.filter((pl.col("epoch") == 12) & (pl.col("gate") == "layer1.0.se") & pl.col("block").is_null())
    np.testing.assert_array_equal(table["mean"].to_list(), [found.mean])
    rows = duckdb.execute(
        "select mean from read_parquet(?, hive_partitioning=true) "
        "where epoch = 12 and gate = 'layer1.0.se' and block is null",
        [f"{tmp_path}/**/*.parquet"],
    ).fetchall()
    np.testing.assert_array_equal(rows[0][0], found.mean)


# ---- beside the rows ----


def without_moments(path: Path) -> Path:
    """Make of a run one of an early version, which kept no moments."""

    def forget(manifest: dict[str, Any]) -> None:
        for epoch in manifest["epochs"]:
            del epoch["moments"]

    edit(path, forget)
    shutil.rmtree(path / ".moments")
    return path


def test_a_run_keeps_the_moments_of_its_rows_and_reads_no_row_for_the_table(tmp_path, monkeypatch):
    with sizes_of(28 * 20, 2000):  # several row groups and parts
        path = record(tmp_path / "run", 1, 2, samples=300)
    assert len(parts(path)) > 4
    assert len(list(path.glob(".moments/*/*"))) == 2  # one file an epoch, however many parts
    old = open_run(without_moments(Path(shutil.copytree(path, tmp_path / "old"))))
    run = open_run(path)
    equal_moments(run.moments(), old.moments())
    assert (run.keeps_moments, old.keeps_moments) == (True, False)
    expected = summarize(run, rank=True)
    pd.testing.assert_frame_equal(summarize(old, rank=True), expected, rtol=1e-12)
    for gate in run.gates:
        values, labels = run.attention(gate.name, 2), run.labels(2)
        one = Moments.of(values, sample_ids=run.samples(2), labels=labels)
        equal(run.moments()[2, gate.name], one, 1e-12, gate.name)

    def read(*_: Any) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr("stripe.store.reading.read_part", read)
    pd.testing.assert_frame_equal(summarize(run), expected.assign(rank=np.nan))
    with pytest.raises(AssertionError, match="a row was read"):
        summarize(old)


def test_moments_that_are_gone_are_measured_from_the_rows(tmp_path):
    path = record(tmp_path / "run", 1, samples=50)
    expected = summarize(open_run(path))
    shutil.rmtree(path / ".moments")
    pd.testing.assert_frame_equal(summarize(open_run(path)), expected, rtol=1e-12)
    assert not check_run(path).whole
    assert "missing" in check_run(path).epochs[0].moments


def damage_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def exchange(path: Path) -> None:
    """Put the moments of another recording there, whole, and named by the manifest."""
    other = record(path.parents[3] / "other", 1, samples=50, seed=9)
    [source] = other.glob(".moments/*/*.moments")
    shutil.copy(source, path)
    crc = json.loads((other / "run.json").read_text())["epochs"][0]["moments"]
    edit(path.parents[2], lambda manifest: manifest["epochs"][0].update(moments=crc))


@pytest.mark.parametrize("damage", [damage_bytes, exchange, Path.unlink], ids=["cut", "another's", "lost"])
def test_moments_are_checked_against_the_rows_and_rebuilt(tmp_path, damage, capsys):
    path = record(tmp_path / "run", 1, 2, samples=50)
    before, expected = listing(path), open_run(path).moments()
    assert check_run(path).whole
    damage(path / ".moments/epoch=0001/part-0000-000.moments")
    found = check_run(path)
    assert [epoch.problem for epoch in found.epochs] == [None, None]
    assert [epoch.moments == "whole" for epoch in found.epochs] == [False, True]
    assert main(["check", str(path)]) == 1
    assert "part-0000-000.moments" in capsys.readouterr().out
    if damage is damage_bytes:
        with refused(ValueError, "part-0000-000.moments is damaged", "check --repair"):
            open_run(path).moments()
    assert main(["check", str(path), "--repair"]) == 0
    assert check_run(path).whole
    equal_moments(open_run(path).moments(), expected)
    assert (
        listing(path)[".moments/epoch=0001/part-0000-000.moments"]
        == before[".moments/epoch=0001/part-0000-000.moments"]
    )


def test_old_runs_are_whole_and_get_their_moments_by_a_repair(tmp_path, capsys):
    path = record(tmp_path / "run", 1, samples=50)
    expected = open_run(path).moments()
    without_moments(path)
    assert main(["check", str(path)]) == 0
    assert "no moments beside its rows: --repair measures them" in capsys.readouterr().out
    assert main(["check", str(path), "--repair"]) == 0
    assert open_run(path).keeps_moments
    equal_moments(open_run(path).moments(), expected)
    assert check_run(path).epochs[0].moments == "whole"


def test_runs_that_had_moments_beside_each_part_open_and_get_those_of_the_epoch(tmp_path):
    path = record(tmp_path / "run", 1, samples=300)
    expected = open_run(path).moments()

    def of_parts(manifest: dict[str, Any]) -> None:
        [epoch] = manifest["epochs"]
        epoch["parts"][0]["moments"] = epoch.pop("moments")

    edit(path, of_parts)
    assert not open_run(path).keeps_moments
    equal_moments(open_run(path).moments(), expected)
    assert repair_run(path).whole
    assert open_run(path).keeps_moments
    equal_moments(open_run(path).moments(), expected)


def test_a_rebuilt_manifest_knows_the_moments(tmp_path):
    path = record(tmp_path / "run", 1, 2, samples=50)
    expected = open_run(path).moments()
    (path / "run.json").write_text("{")
    assert repair_run(path).whole
    assert open_run(path).keeps_moments
    equal_moments(open_run(path).moments(), expected)


def test_moments_of_two_ranks_are_those_of_one(tmp_path):
    assert several_ranks(tmp_path / "two", [[0, 2, 4, 6, 8], [1, 3, 5, 7]]) == []
    with writer(tmp_path / "one") as run, run.epoch(1) as epoch:
        epoch.append(range(9), [i % 3 for i in range(9)], {name: rows[:9] for name, rows in vectors(20).items()})
    two, one = open_run(tmp_path / "two"), open_run(tmp_path / "one")
    assert len(list(tmp_path.glob("*/.moments/*/*"))) == 2  # merged into one file
    assert check_run(tmp_path / "two").whole
    equal_moments(two.moments(), one.moments())
    pd.testing.assert_frame_equal(summarize(two), summarize(one), rtol=1e-12)


def test_an_overwritten_epoch_has_the_moments_of_its_rows(tmp_path):
    record(tmp_path, 1, 2, samples=40)
    record(tmp_path, 1, samples=40, seed=30, overwrite=True)
    assert check_run(tmp_path).whole
    assert check_run(tmp_path).unnamed == (
        "attention/epoch=0001/part-0000-000.parquet", ".moments/epoch=0001/part-0000-000.moments",
    ) or check_run(tmp_path).unnamed == ()  # fmt: skip
    values = open_run(tmp_path).attention("layer1.0.se", 1)
    np.testing.assert_allclose(open_run(tmp_path).moments()[1, "layer1.0.se"].mean, values.mean(0, dtype=float))
