"""One writer a run: of two, one is refused or both epochs are there; a run is of one network and list of samples."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stripe import figures, locks, report
from stripe.cli import main
from stripe.store import RunWriter, check_run, open_run
from tests.runs import record, refused, vectors, writer
from tests.test_s3 import objects, proxy, run_path, server  # noqa: F401

INTERLEAVED = "interleavings of two writers: every published epoch is there, or its writer was refused"


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of a cluster or network that has no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def step_by_step(path: str | Path, epoch: int, published: list[int]) -> Any:
    """Record an epoch in steps; another writer may do some of its own between them."""
    run = writer(path)
    yield
    try:
        with run.epoch(epoch) as rows:
            yield
            rows.append(np.arange(4), None, vectors(4, seed=epoch))
            yield
        published.append(epoch)
        yield
    finally:
        run.close()


def interleave(path: str | Path, seed: int) -> int:
    """Let two writers record in an order of the seed's; return how many were refused."""
    chance, published, refusals = random.Random(seed), [], 0
    waiting = [step_by_step(path, 2 * seed + k, published) for k in range(2)]
    while waiting:
        steps = chance.choice(waiting)
        try:
            next(steps)
        except StopIteration:
            waiting.remove(steps)
        except BlockingIOError:
            waiting.remove(steps)
            refusals += 1
    assert set(published) <= set(open_run(path).epochs)
    assert len(published) + refusals == 2
    return refusals


def interleave_all(path: str | Path, count: int, record_property: Callable[[str, object], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "PATIENCE", 0.0)  # the other writer waits in this same thread
        refusals = [interleave(path, seed) for seed in range(count)]
    assert 0 < sum(refusals) < count  # some met, some did not
    run = open_run(path)
    for epoch in run.epochs:
        np.testing.assert_array_equal(run.attention("layer1.0.se", epoch), vectors(4, seed=epoch)["layer1.0.se"])
    check = check_run(path)
    assert (check.whole, check.unnamed, check.interrupted) == (True, (), ())
    record_property(INTERLEAVED, count)


COUNTS = [20, pytest.param(200, marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("count", COUNTS)
def test_two_writers_of_a_local_run(tmp_path, record_property, count):
    interleave_all(tmp_path / "run", count, record_property)


@pytest.mark.parametrize("count", COUNTS)
def test_two_writers_where_there_is_no_flock(tmp_path, record_property, without_flock, count):
    interleave_all(tmp_path / "run", count, record_property)
    assert not list((tmp_path / "run").glob(f"{locks.CLAIM}*"))


@pytest.mark.parametrize("count", COUNTS)
def test_two_writers_of_a_run_in_a_bucket(run_path, record_property, count):  # noqa: F811
    path = f"{run_path.partition('[')[0]}-{count}"
    interleave_all(path, count, record_property)
    assert not [name for name in objects(path) if locks.CLAIM in name]


def claim_of(folder: Path, **holder: object) -> Path:
    path = folder / f"{locks.CLAIM}0000"
    path.write_text(json.dumps({"host": "elsewhere", "process": 7} | holder))
    return path


def test_a_claim_that_looks_stale_says_so(tmp_path, without_flock):
    run = record(tmp_path / "run", 1)
    claim = claim_of(run)
    with refused(BlockingIOError, "by process 7 on elsewhere", "wait for it"):
        record(run, 2)
    os.utime(claim, (time.time() - 60, time.time() - 60))
    with refused(BlockingIOError, "last sign of life 6", "seconds ago", claim.name):
        record(run, 2)
    assert open_run(run).epochs == [1]


def test_a_claim_that_nobody_renewed_is_taken_over(tmp_path, without_flock):
    run = record(tmp_path / "run", 1)
    long_ago = time.time() - locks.LIFETIME - 5
    os.utime(claim_of(run), (long_ago, long_ago))
    record(run, 2)
    assert open_run(run).epochs == [1, 2]


def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over(tmp_path, without_flock):
    run = record(tmp_path / "run", 1)
    me = locks._myself()
    claim_of(run, **me | {"process": 2**22 + 1})  # above any process number
    record(run, 2)
    claim_of(run, **me | {"process": os.getppid()})  # alive
    with refused(BlockingIOError, f"process {os.getppid()}"):
        record(run, 3)


def test_a_writer_that_was_taken_over_publishes_nothing(tmp_path, without_flock):
    run = tmp_path / "run"
    slow = writer(run)
    with refused(BlockingIOError, "was taken over by another writer"), slow.epoch(5) as rows:
        rows.append(np.arange(4), None, vectors(4))
        [claim] = run.glob(f"{locks.CLAIM}*")
        claim.unlink()  # as one who takes over does
        record(run, 6, samples=4)
    slow.close()
    assert open_run(run).epochs == [6]


def test_a_claim_is_renewed_while_its_writer_works(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(locks, "RENEWAL", 0.05)
    with writer(tmp_path / "run"):
        [claim] = (tmp_path / "run").glob(f"{locks.CLAIM}*")
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 20
        while claim.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not claim.exists()


# ---- one network, one list of samples ----------------------------------------------------------------------


def test_another_network_is_refused_or_said(tmp_path, capsys):
    run = record(tmp_path / "run", 1)
    with refused(ValueError, "one network", "'depth': 20", "allow_mixed=True"):
        record(run, 2, model={"arch": "resnet", "depth": 20})
    with refused(ValueError, "one list of samples", "brings 3 more", "allow_mixed=True"):
        record(run, 2, samples=9)
    assert open_run(run).epochs == [1]
    assert open_run(run).mixed == ""
    record(run, 2, samples=9, model={"arch": "resnet", "depth": 20}, allow_mixed=True)
    found = open_run(run)
    assert found.manifest.mixed == ("network", "samples")
    assert "different networks and samples" in found.mixed
    assert main(["stats", str(run)]) == 0
    assert found.mixed in capsys.readouterr().out
    assert found.mixed in report.render(found)
    texts = {name: [text.get_text() for text in figure.texts] for name, figure in figures.each_figure(found)}
    assert {name for name, each in texts.items() if found.mixed in each} == set(texts) & figures.OVER_EPOCHS
    assert found.mixed not in report.render(open_run(record(tmp_path / "one", 1, 2)))


def test_the_same_samples_in_another_order_are_the_same(tmp_path):
    run, values = record(tmp_path / "run", 1), vectors(6)
    backwards = np.arange(6)[::-1]
    with writer(run) as again, again.epoch(2) as rows:
        rows.append(backwards, None, {name: each[backwards] for name, each in values.items()})
    assert open_run(run).mixed == ""
    grid = [figures._first_images(open_run(run), "layer1.0.se", epoch) for epoch in (2,)]
    np.testing.assert_array_equal(grid[0], values["layer1.0.se"])


def test_a_run_may_replace_its_only_epoch_by_other_samples(tmp_path):
    record(tmp_path / "run", 1)
    record(tmp_path / "run", 1, samples=9, overwrite=True)
    assert len(open_run(tmp_path / "run").samples(1)) == 9


def test_two_gates_never_share_a_figures_name():
    names = ["a/b", "a_b", "a:b", "a b", "x" * 300, "x" * 301, "\u00e9" * 200, "layer1.0"]
    made = [figures.file_name("stripe", name) for name in names]
    assert len(set(made)) == len(names)
    assert all(len(name.encode()) < 200 for name in made)
    assert made[1] == "stripe-a_b"


def test_a_reader_sees_a_whole_run_while_its_writer_holds_it(tmp_path):
    run: RunWriter = writer(tmp_path / "run")
    with run.epoch(1) as rows:
        rows.append(np.arange(4), None, vectors(4))
    assert open_run(tmp_path / "run").epochs == [1]
    run.close()
