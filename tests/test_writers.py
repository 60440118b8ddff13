"""One writer a run: of two, one is refused or both epochs are there; a run is of one network and list of samples."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stripe import figures, locks, report
from stripe.cli import main
from stripe.store import RunWriter, check_run, open_run
from stripe.store.directory import Directory
from tests.runs import record, refused, sizes_of, vectors, writer
from tests.test_s3 import objects, proxy, run_path, server  # noqa: F401

RUN_LENGTH = 10  # interleavings in a run, then another begins
INTERLEAVED = "interleavings of two writers: every published epoch is there, or its writer was refused"


@pytest.fixture(params=["ENOSYS"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of a cluster or network that has no locks."""
    number = getattr(errno, request.param)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


class Turns:
    """Lets threads take turns in an order of a seed's, one storage operation at a time; keeps their clock as well."""

    def __init__(self, seed: int) -> None:
        self._chance, self._time = random.Random(seed), 0.0
        self._changed = threading.Condition()
        self._waiting: list[int | None] = []  # the threads that have work left, in order of their beginning
        self._next: int | None = None

    def run(self, *works: Callable[[], None]) -> None:
        """Run functions, a thread for each, to their ends."""
        self._waiting = [None] * len(works)
        threads = [threading.Thread(target=self._one, args=each) for each in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, place: int, work: Callable[[], None]) -> None:
        with self._changed:
            self._waiting[place] = threading.get_ident()
            self._changed.notify_all()
            self._changed.wait_for(lambda: None not in self._waiting)
            self._next = self._waiting[0]
        try:
            self.step()
            work()
        finally:
            with self._changed:
                self._waiting.remove(threading.get_ident())
                self._hand_over()

    def _hand_over(self) -> None:
        self._next = self._chance.choice(self._waiting) if self._waiting else None
        self._changed.notify_all()

    def step(self) -> None:
        """Wait until it is this thread's turn again; threads that help another one are let through."""
        me = threading.get_ident()
        if me in self._waiting:
            with self._changed:
                if self._next == me:
                    self._hand_over()
                self._changed.wait_for(lambda: self._next == me)

    def sleep(self, seconds: float) -> None:
        self._time += 4 * seconds  # a writer that waits looks less often than in earnest
        self.step()

    def monotonic(self) -> float:
        return self._time

    def before(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Take a step before an operation."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.step()
            return operation(*arguments, **options)

        return call


class Stepping:
    """Arrow's file system, with a step before every operation."""

    def __init__(self, files: Any, turns: Turns) -> None:
        self._files, self._turns = files, turns

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._files, name)
        return self._turns.before(value) if callable(value) else value


def interleave(path: str | Path, seed: int) -> int:
    """Let two writers record in an order of the seed's; return how many were refused."""
    published, refusals, turns, prepare = [], [], Turns(seed), Directory.__init__
    head_start = random.Random(-seed).randrange(80)  # of the first writer, in steps

    def init(self: Directory, path: Any) -> None:
        prepare(self, path)
        self.files = Stepping(self.files, turns)

    def work(epoch: int) -> None:
        for _ in range(head_start * (epoch % 2)):
            turns.step()
        try:
            with writer(path) as run, run.epoch(epoch) as rows:
                rows.append(np.arange(4), None, vectors(4, seed=epoch))
            published.append(epoch)
        except BlockingIOError:
            refusals.append(epoch)

    before = open_run(path).epochs if seed % RUN_LENGTH else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directory, "__init__", init)
        patch.setattr(locks, "time", turns)
        names = random.Random(seed)  # of two claims put down together the first by name stays
        patch.setattr(locks.secrets, "token_hex", lambda size: names.randbytes(size).hex())
        for name in ("put", "renewed", "read", "remove"):
            patch.setattr(locks.FolderClaims, name, turns.before(getattr(locks.FolderClaims, name)))
        turns.run(lambda: work(2 * seed), lambda: work(2 * seed + 1))
    assert open_run(path).epochs == [*before, *sorted(published)]
    assert {*published, *refusals} == {2 * seed, 2 * seed + 1}
    return len(refusals)


def interleave_all(path: str | Path, seeds: range, record_property: Callable[[str, object], None]) -> list[str]:
    """Let pairs of writers record into runs that begin anew now and then; return the runs."""
    runs = {seed: f"{path}-{seed // RUN_LENGTH}" for seed in seeds}
    refusals = [interleave(run, seed) for seed, run in runs.items()]
    assert 0 < sum(refusals) < len(seeds)  # some met, some did not
    for each in set(runs.values()):
        run, check = open_run(each), check_run(each)
        for epoch in run.epochs:
            np.testing.assert_array_equal(run.attention("layer1.0.se", epoch), vectors(4, seed=epoch)["layer1.0.se"])
        assert (check.whole, check.unnamed, check.interrupted) == (True, (), ())
    record_property(INTERLEAVED, len(seeds))
    return sorted(set(runs.values()))


SEEDS = [range(10), *(pytest.param(range(n, n + 50), marks=pytest.mark.exhaustive) for n in range(0, 200, 50))]


@pytest.mark.parametrize("seeds", SEEDS)
def test_two_writers_of_a_local_run(tmp_path, record_property, seeds):
    interleave_all(tmp_path / "run", seeds, record_property)


@pytest.mark.parametrize("seeds", SEEDS)
def test_two_writers_where_there_is_no_flock(tmp_path, record_property, without_flock, seeds):
    interleave_all(tmp_path / "run", seeds, record_property)
    assert not list(tmp_path.rglob(f"{locks.CLAIM}*"))


@pytest.mark.parametrize("seeds", SEEDS)
def test_two_writers_of_a_run_in_a_bucket(run_path, record_property, seeds):  # noqa: F811
    path = f"{run_path.partition('[')[0]}-{seeds.start}-{seeds.stop}"
    for run in interleave_all(path, seeds, record_property):
        assert not [name for name in objects(run) if locks.CLAIM in name]


def claim_of(folder: Path, **holder: object) -> Path:
    path = folder / f"{locks.CLAIM}0000"
    path.write_text(json.dumps({"host": "elsewhere", "process": 7} | holder))
    return path


@pytest.mark.parametrize("without_flock", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"], indirect=True)
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


def test_a_writer_that_was_taken_over_leaves_alone_what_the_other_one_writes(tmp_path, without_flock):
    slow = writer(tmp_path / "run")
    recording = slow.epoch(5)
    recording.__enter__().append(np.arange(4), None, vectors(4))
    [claim] = (tmp_path / "run").glob(f"{locks.CLAIM}*")
    claim.unlink()
    with sizes_of(28 * 4, 2**20), writer(tmp_path / "run") as other, other.epoch(6) as rows:
        rows.append(np.arange(8), None, vectors(8))  # goes to the disk at once
        with pytest.raises(BlockingIOError, match="taken over"):
            recording.__exit__(None, None, None)
    assert open_run(tmp_path / "run").epochs == [6]
    assert check_run(tmp_path / "run").whole


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
