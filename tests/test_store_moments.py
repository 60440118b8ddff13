"""Runs of moments alone: the same figures as from rows, in memory that does not grow with the samples."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe.stats import summarize
from stripe.store import open_run
from tests.runs import (
    IDS,
    REFUSED_BATCHES,
    listing,
    parts,
    record,
    record_until,
    refused,
    several_ranks,
    vectors,
    writer,
)


def equal_moments(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        for field in dataclasses.fields(expected[key]):
            actual, wanted = (np.asarray(getattr(each[key], field.name), float) for each in (found, expected))
            np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=1e-300, err_msg=f"{key} {field.name}")


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
