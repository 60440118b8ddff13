"""Crashes, full disks, other writers: finished epochs stay whole, unfinished ones leave no trace."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stripe.store import Run, check_run, open_run
from tests.forked import Forks, ended, run_stripe
from tests.runs import (
    listing,
    parts,
    record,
    refused,
    several_ranks,
    sizes_of,
    vectors,
    writer,
)

ROOT = Path(__file__).parents[1]


class Victim:
    """Lets tests/killed.py work on a run."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, task: str, path: Path, **until: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, "path": str(path)} | until) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def operations(self, task: str, path: Path) -> list[str]:
        """Let the task end undisturbed; return what it wrote."""
        ended = self(task, path)
        assert not ended["killed"]
        return ended["operations"]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    command = [sys.executable, "-m", "tests.killed"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Victim(process)
        process.stdin.close()


def contents(path: Path) -> dict[str, Any]:
    """Every file of a run, and of run.json all but the time."""
    files: dict[str, Any] = listing(path)
    files["run.json"] = {key: value for key, value in json.loads(files["run.json"]).items() if key != "created"}
    return files


def epochs_of(path: Path, run: Run) -> dict[int, list[bytes]]:
    """The files of every epoch: its parts, and the moments of their rows where the manifest knows of them."""
    about, found = run.manifest, {}
    for each in about.epochs:
        names = [f"{about.folder(each.epoch)}/{part.name}" for part in each.parts]
        names += [about.moments_file(each)] if each.moments is not None else []
        found[each.epoch] = [(path / name).read_bytes() for name in names]
    return found


def assert_nothing_lost(path: Path, finished: set[int], undisturbed: dict[int, list[bytes]]) -> None:
    """All that was finished is there, whole and byte for byte; at most one epoch more, whole as well."""
    if not finished and not (path / "run.json").exists():
        return
    run = open_run(path)
    found = epochs_of(path, run)
    assert finished <= found.keys()
    assert len(found) <= len(finished) + 1
    assert found == {number: undisturbed[number] for number in found}
    assert check_run(path).whole


STAGES = {
    "create_dir .unfinished", "open_output_stream .unfinished", "append", "write", "close", "fsync",
    "create_dir attention", "create_dir .moments", "move .unfinished", "open_output_stream .run.json", "move .run.json",
    "delete_dir .unfinished",
}  # fmt: skip


def stage(operation: str) -> str:
    return " ".join(word.partition("/")[0] for word in operation.split()[:2])


def kill_at_operations(victim: Victim, path: Path, every: int) -> int:
    operations = victim.operations("record", path / "undisturbed")
    assert {stage(operation) for operation in operations} == STAGES
    wanted, undisturbed = contents(path / "undisturbed"), open_run(path / "undisturbed")
    for number in range(0, len(operations), every):
        killed = victim("record", path / str(number), operation=number)
        assert killed["killed"]
        assert_nothing_lost(path / str(number), set(killed["finished"]), epochs_of(path / "undisturbed", undisturbed))
        assert not victim("record", path / str(number))["killed"]
        assert contents(path / str(number)) == wanted
    return len(range(0, len(operations), every))


def kill_at_random(victim: Victim, path: Path, kills: int) -> int:
    """Kill recordings of the same run again and again until it is complete, then begin another one."""
    rng, survived, runs, seconds = np.random.default_rng(0), 0, 0, 0.02
    victim("record", path / "undisturbed")
    wanted, undisturbed = contents(path / "undisturbed"), open_run(path / "undisturbed")
    while survived < kills:
        folder, finished, runs, killed = path / str(runs), set[int](), runs + 1, True
        while killed and survived < kills:
            ended = victim("record", folder, seconds=rng.uniform(0, seconds))
            killed, seconds = ended["killed"], seconds * (1.1 if ended["killed"] else 0.7)
            survived, finished = survived + killed, finished | set(ended["finished"])
            assert_nothing_lost(folder, finished, epochs_of(path / "undisturbed", undisturbed))
            finished |= set(open_run(folder).epochs) if (folder / "run.json").exists() else set()
        victim("record", folder)
        assert contents(folder) == wanted
    return survived


def kill_overwriting(victim: Victim, path: Path, task: str, every: int) -> int:
    """Each epoch is the old one or the new one, whole; the same command again ends in the same values."""
    changes = {"contents": "moments"} if task == "moments" else {}
    old = record(path / "old", 1, 2, samples=20, seed=7, **changes)
    shutil.copytree(old, path / "new")
    operations = victim.operations(task, path / "new")
    before, after = (epochs_of(each, open_run(each)) for each in (old, path / "new"))
    assert before.keys() == after.keys()
    assert all(before[number] != after[number] for number in before)
    for number in range(0, len(operations), every):
        folder = shutil.copytree(old, path / str(number))
        assert victim(task, folder, operation=number)["killed"]
        found = epochs_of(folder, open_run(folder))
        assert all(found[each] in (before[each], after[each]) for each in before)
        assert check_run(folder).whole
        victim(task, folder)
        assert epochs_of(folder, open_run(folder)) == after
        assert check_run(folder).unnamed == ()
    return len(range(0, len(operations), every))


def kill_repairing(victim: Victim, path: Path, every: int) -> int:
    """A repair that is killed and done again ends as an undisturbed one: the damaged epoch aside, the others whole."""
    damaged = record(path / "damaged", 1, 2, 3, samples=20)
    whole = epochs_of(damaged, open_run(damaged))
    name = damaged / "attention/epoch=0002/part-0000-000.parquet"
    name.write_bytes(name.read_bytes()[:-50])
    (damaged / "run.json").write_text("{")
    shutil.copytree(damaged, path / "undisturbed")
    operations = victim.operations("repair", path / "undisturbed")
    assert {stage(each) for each in operations} >= {"copy_file run.json", "move .run.json", "move attention"}
    for number in range(0, len(operations), every):
        folder = shutil.copytree(damaged, path / str(number))
        assert victim("repair", folder, operation=number)["killed"]
        victim("repair", folder)
        assert epochs_of(folder, open_run(folder)) == {each: whole[each] for each in (1, 3)}
        assert name.read_bytes() in listing(folder / ".damaged").values()
        assert b"{" in listing(folder / ".damaged").values()
        assert parts(folder) == parts(path / "undisturbed")
    return len(range(0, len(operations), every))


def test_a_kill_while_recording_loses_no_finished_epoch(victim, tmp_path):
    assert kill_at_operations(victim, tmp_path, every=9) >= 8


@pytest.mark.parametrize("task", ["overwrite", "moments"])
def test_a_kill_while_overwriting_leaves_the_old_epoch_or_the_new_one(victim, tmp_path, task):
    assert kill_overwriting(victim, tmp_path, task, every=9) >= 3


def test_a_kill_while_repairing_is_made_good_by_repairing_again(victim, tmp_path):
    assert kill_repairing(victim, tmp_path, every=1) >= 5


def test_what_looks_for_losses_finds_them(tmp_path):
    record(tmp_path, 1, 2)
    undisturbed = epochs_of(tmp_path, open_run(tmp_path))
    assert [len(files) for files in undisturbed.values()] == [2, 2]  # rows and their moments
    assert_nothing_lost(tmp_path, {1, 2}, undisturbed)
    for finished, expected in (({1, 2, 3}, undisturbed), ({1, 2}, undisturbed | {2: [b"other"]}), (set(), undisturbed)):
        with pytest.raises(AssertionError):
            assert_nothing_lost(tmp_path, finished, expected)


def test_kills_at_random_moments_lose_no_sample(victim, tmp_path):
    assert kill_at_random(victim, tmp_path, kills=8) == 8


@pytest.mark.exhaustive
def test_kills_at_every_operation_and_at_random_moments_lose_no_sample(victim, tmp_path, record_property):
    kills = {
        "recording killed (SIGKILL) at each operation": kill_at_operations(victim, tmp_path / "a", every=1),
        "recording killed at random moments": kill_at_random(victim, tmp_path / "b", kills=100),
        "overwriting killed at each operation": kill_overwriting(victim, tmp_path / "c", "overwrite", every=1),
        "overwriting moments killed at each operation": kill_overwriting(victim, tmp_path / "d", "moments", every=1),
        "repairing killed at each operation": kill_repairing(victim, tmp_path / "e", every=1),
    }
    assert sum(kills.values()) >= 200
    for what, count in kills.items():
        record_property(what, count)


# ---- whole commands ----


def run_command(
    forks: Forks, folder: Path, *words: object, changes: int | None = None, after: Path | None = None
) -> bool:
    """Run a command in ``folder``; SIGKILL it after so many changes to the files there, counted once ``after`` exists.

    Return whether it was killed.
    """
    process = forks.start(run_stripe, *words, "--workers", 0, said=folder / "said", folder=folder)
    seen, counted = inodes(folder), 0
    while process.exitcode is None and changes is not None:
        now = inodes(folder)
        counted, seen = counted + (now != seen and (after is None or after.exists())), now
        time.sleep(0.002)
        if counted >= changes:
            os.killpg(process.pid, signal.SIGKILL)
            break
    [code] = ended(process)
    assert code in (0, -signal.SIGKILL), (folder / "said").read_text()
    return code != 0


def inodes(folder: Path) -> set[int]:
    return {entry.inode() for parent, _, _ in os.walk(folder) for entry in entries(parent)}


def entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:  # it has just been renamed or deleted
        return []


@pytest.mark.slow
def test_killed_commands_continue_to_the_same_bytes(forks, tmp_path, record_property):
    """Train with recording and kill, resume to the end; then collect from the checkpoints likewise."""
    rng, kills = np.random.default_rng(0), 0
    small = (
        "--depth",
        8,
        "--block-name",
        "basicblock",
        "--dataset",
        "digits",
        "--module",
        "senet",
        "--epochs",
        3,
        "--schedule",
        "--train-samples",
        64,
        "--val-samples",
        16,
    )
    train = ("train", *small, "--record", 20, "-c", "run")
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    run_command(forks, tmp_path / "undisturbed", *train)
    last = tmp_path / "killed/run/checkpoints/last.pt"
    killed = run_command(forks, tmp_path / "killed", *train, changes=1, after=last)
    while killed:
        kills += 1
        assert check_run(last.parents[1]).whole
        changes = 4 * kills + int(rng.integers(3))
        killed = run_command(forks, tmp_path / "killed", *train, "--resume", "run/checkpoints/last.pt", changes=changes)
    assert kills >= 2
    whole, resumed = (tmp_path / name / "run" for name in ("undisturbed", "killed"))
    assert (resumed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert epochs_of(resumed, open_run(resumed)) == epochs_of(whole, open_run(whole))

    checkpoints = [whole / f"checkpoints/epoch={number:04d}.pt" for number in (1, 2, 3)]
    collect = ("collect", "--ckpt", *checkpoints, "--samples", 60, "--out", "probe", "--resume")
    run_command(forks, tmp_path / "undisturbed", *collect)
    record_property("`train.py --resume` killed: the same bytes in the end", kills)
    kills = 0
    while run_command(forks, tmp_path / "killed", *collect, changes=int(rng.integers(2 + 3 * kills, 8 + 3 * kills))):
        kills += 1
        if (tmp_path / "killed/probe/run.json").exists():
            assert check_run(tmp_path / "killed/probe").whole
    assert kills >= 2
    assert contents(tmp_path / "killed/probe") == contents(tmp_path / "undisturbed/probe")
    record_property("`collect_attention.py --resume` killed: the same bytes in the end", kills)


def test_a_killed_recording_shows_nothing_and_frees_the_run(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.runs import *\n"
        "with writer(sys.argv[2]) as run, run.epoch(2) as epoch:\n"
        "    epoch.append(IDS, IDS, vectors(4)); epoch._hand_over(); epoch._wait()\n"
        "    print('recording', flush=True); sys.stdin.read()\n"
    )
    before = parts(record(tmp_path, 1))
    arguments = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "recording\n"
        assert (tmp_path / ".unfinished/epoch=0002/part-0000-000").exists()
        with refused(BlockingIOError, str(tmp_path), "being written already"):
            writer(tmp_path)
        child.send_signal(signal.SIGKILL)
    assert parts(tmp_path) == before
    assert open_run(tmp_path).epochs == [1]
    assert open_run(record(tmp_path, 3)).epochs == [1, 3]
    assert not (tmp_path / ".unfinished").exists()


def test_an_interruption_while_the_writing_thread_starts_leaves_nothing(tmp_path, monkeypatch):
    start, before = threading.Thread.start, set(threading.enumerate())

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with sizes_of(28 * 4, 2**20), pytest.raises(KeyboardInterrupt):
        record(tmp_path, 1, samples=20)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert listing(tmp_path).keys() == {".lock", "run.json"}


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
    monkeypatch.setattr("stripe.store.rows.ROW_GROUP_BYTES", 28 * 1000)
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
    monkeypatch.setattr("stripe.store.rows.ROW_GROUP_BYTES", 28 * 1000)
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
