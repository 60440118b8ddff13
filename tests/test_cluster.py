"""Statistics on a real Dask cluster of two worker processes: the local table, also when one of them is killed."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stripe.cli import main
from stripe.cluster import _gathered, connect, moments_on, summarize_on
from stripe.gate import Gate
from stripe.stats import summarize
from stripe.store import RunWriter, open_run
from tests.runs import refused

distributed = pytest.importorskip("distributed")

GATES = [Gate("a", 6), Gate("b", 3), Gate("c", 9)]


def record(path, *, epochs=(0, 2), samples=60, ranks=1, contents="samples"):
    """Record random attention; several ranks take contiguous shares, one part each."""
    rng = np.random.default_rng(0)
    values = {epoch: {gate.name: rng.random((samples, gate.channels)) for gate in GATES} for epoch in epochs}
    labels = rng.integers(0, 4, samples)
    meet = threading.Barrier(ranks)

    def share(rank):
        rows = np.arange(samples * rank // ranks, samples * (rank + 1) // ranks)
        options = {"model": {}, "data": {}, "gates": GATES, "contents": contents, "rank": rank, "barrier": meet.wait}
        with RunWriter(path, **options) as writer:
            for epoch in epochs:
                with writer.epoch(epoch) as part:
                    part.append(rows, labels[rows], {gate: each[rows] for gate, each in values[epoch].items()})

    threads = [threading.Thread(target=share, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return open_run(path)


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes of one thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
        with distributed.LocalCluster(**options, silence_logs=50) as cluster:
            yield cluster


@pytest.fixture
def client(cluster):
    with connect(cluster.scheduler_address) as client:
        yield client


def test_the_table_is_the_local_one(tmp_path, client):
    run = record(tmp_path / "run")
    expected = summarize(run, rank=True)
    pd.testing.assert_frame_equal(summarize_on(client, run, rank=True), expected, rtol=1e-12, atol=1e-15)
    assert not summarize_on(client, run, rank=True, confidence=0.9).equals(expected)
    assert expected[["strength_low", "rank"]].notna().all(axis=None)


def test_moments_that_are_kept_are_read_without_the_workers(tmp_path):
    run = record(tmp_path / "run")
    pd.testing.assert_frame_equal(summarize_on(None, run), summarize(run))
    with pytest.raises(AttributeError):
        summarize_on(None, early(run))


def early(run):
    """Make of a run one of an early version, without moments beside its rows."""
    path = Path(run.path)
    manifest = json.loads((path / "run.json").read_text())
    for epoch in manifest["epochs"]:
        del epoch["moments"]
    (path / "run.json").write_text(json.dumps(manifest))
    shutil.rmtree(path / ".moments")
    return open_run(path)


def test_a_run_of_moments_is_measured_too(tmp_path, client):
    run = record(tmp_path / "run", contents="label-moments", ranks=2)
    pd.testing.assert_frame_equal(summarize_on(client, run), summarize(run), check_exact=True)


def test_moments_of_parts_merge_in_a_tree(tmp_path, client):
    run = record(tmp_path / "run", ranks=11, samples=110)
    assert [len(epoch.parts) for epoch in run.manifest.epochs] == [11, 11]  # more than a task merges
    kept = run.moments()
    run = early(run)
    found = moments_on(client, run)
    assert list(found) == list(kept)
    assert all(found[key].is_close(expected, rtol=1e-12) for key, expected in kept.items())
    table = summarize_on(client, run)
    pd.testing.assert_frame_equal(table, summarize(run), rtol=1e-12)
    assert table["strength"].notna().all()
    assert table["rank"].isna().all()


def kill_midway(cluster, victim, total, done):
    """Kill a worker once a tenth of the tasks are done, and note how many were."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = [task.state for task in list(cluster.scheduler.tasks.values())]
        if len(states) == total and states.count("memory") >= total / 10:
            break
        time.sleep(0.005)
    done.append(states.count("memory"))
    os.kill(victim, signal.SIGKILL)


def test_a_worker_killed_midway_changes_nothing(tmp_path, cluster, client, record_property):
    run = record(tmp_path / "run", epochs=range(20), samples=6000)
    expected = summarize(run, rank=True)
    victim, done = next(iter(client.run(os.getpid).values())), []
    killer = threading.Thread(target=kill_midway, args=(cluster, victim, len(expected), done))
    killer.start()
    table = summarize_on(client, run, rank=True)
    killer.join()
    assert 6 <= done[0] < len(expected) == 60
    pd.testing.assert_frame_equal(table, expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    client.wait_for_workers(2, timeout=60)  # the nanny puts another in its place
    record_property("a Dask worker killed midway", 1)


def test_a_cluster_that_loses_its_workers_again_and_again_is_one_line(cluster, client, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with refused(OSError, "the cluster lost its work", "look at the memory and logs of its workers"):
        _gathered(client, [client.submit(os._exit, 1)])
    client.wait_for_workers(2, timeout=60)


def test_the_command_writes_the_local_table(tmp_path, cluster):
    record(tmp_path / "run")
    for name, words in {"local": [], "cluster": ["--dask", cluster.scheduler_address]}.items():
        words = ["stats", str(tmp_path / "run"), "--rank", "--csv", str(tmp_path / f"{name}.csv"), *words]
        assert main(words) == 0
    assert (tmp_path / "local.csv").read_bytes() == (tmp_path / "cluster.csv").read_bytes()
    assert main(["stats", str(tmp_path / "run"), "--csv", str(tmp_path / "moments.csv")]) == 0
    assert (tmp_path / "local.csv").read_bytes() != (tmp_path / "moments.csv").read_bytes()


def test_workers_that_cannot_read_the_run_say_so(tmp_path, client):
    run = record(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="put it where all workers see it"):
        summarize_on(client, run, rank=True)
    record(tmp_path / "run", epochs=(1,))
    with pytest.raises(ValueError, match="another run"):
        summarize_on(client, run, rank=True)


def test_a_damaged_part_is_named(tmp_path, client):
    run = record(tmp_path / "run")
    part = tmp_path / "run" / "attention" / "epoch=0002" / "part-0000-000.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"epoch=0002/part-0000-000\.parquet is damaged"):
        summarize_on(client, run, rank=True)


def test_no_scheduler_is_one_line(tmp_path, capsys, monkeypatch):
    record(tmp_path / "run")
    monkeypatch.setattr("stripe.cluster.TIMEOUT", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for address in (free, "no such address"):
            assert main(["stats", str(tmp_path / "run"), "--dask", address]) == 2
            [line] = capsys.readouterr().err.strip().splitlines()
            assert line.startswith(f"error: no Dask scheduler answers at '{address}'")


def test_no_worker_is_told(cluster):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"n_workers": 0, "dashboard_address": None, "loop": cluster.loop}  # one that runs already
        with (
            distributed.LocalCluster(**options, silence_logs=50) as empty,
            pytest.raises(ConnectionError, match="has no worker"),
            connect(empty.scheduler_address, timeout=5),
        ):
            pass


def test_dask_missing_is_told(tmp_path, monkeypatch, capsys):
    record(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["stats", str(tmp_path / "run"), "--dask", "tcp://127.0.0.1:1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "stripe-observation[cluster]" in said
