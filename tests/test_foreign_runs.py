"""Run directories from strangers, with links, pipes, sockets and devices in them: no write leaves, nothing hangs."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from stripe import report
from stripe.cli import main
from stripe.files import UnsafePath, own_path, read_text, replaced
from stripe.stats import summarize
from stripe.store import check_run, open_run, repair_run
from tests.runs import listing, parts, record, refused, writer

TRIED = "run directories with links, pipes and devices in them: nothing changed outside, nothing waited for"
PLACES = (
    ".lock", ".run.json", "run.json", ".unfinished", ".unfinished/epoch=0002", ".unfinished/epoch=0003",
    ".unfinished/epoch=0003/part-0000-000", ".unfinished/epoch=0003/part-0000-000.moments", "attention",
    "attention/epoch=0001", "attention/epoch=0002", "attention/epoch=0002/part-0000-000.parquet",
    "attention/epoch=0003", "attention/epoch=0003/part-0000-000.parquet", "attention/epoch=0002/part-0000-007.parquet",
    "attention/epoch=0007/part-0000-000.parquet", "attention/loop", ".damaged", ".damaged/run.json.0", ".moments",
    ".moments/epoch=0001", ".moments/epoch=0002/part-0000-000.moments", ".moments/epoch=0003",
    ".moments/epoch=0001/part-0000-000.moments.new", "metrics.csv", "validation.json", "fold.json", ".writer-0000",
)  # fmt: skip


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What a stranger's directory might want to reach: files, and a run of one's own."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (folder / "metrics.csv").write_text("epoch,lr\n1,0.1\n")
    record(folder / "run", 2, 3, samples=12)
    return folder


def socket_at(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # the name of a socket must be short
        made.bind(path.name)


def targets(outside: Path) -> list[Path]:
    run = outside / "run"
    inside = [
        run,
        run / "attention",
        run / "attention/epoch=0002",
        run / ".moments/epoch=0002",
        *run.rglob("*.parquet"),
    ]
    return [outside / "thesis.txt", outside / "metrics.csv", outside, outside / "new", run / "run.json", *inside]


def attack(path: Path, outside: Path, chance: random.Random) -> str:
    """Put something foreign at a path, whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = chance.choice(targets(outside))
    makers: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(target),
        "relative link": lambda: path.symlink_to(os.path.relpath(target, path.parent)),
        "loop": lambda: path.symlink_to(path.parent),
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: socket_at(path),
        "link to a device": lambda: path.symlink_to(chance.choice(["/dev/zero", "/dev/stdin", "/dev/tty"])),
        "hard link": lambda: path.hardlink_to(outside / "thesis.txt"),
    }
    kind = chance.choice([*makers, "link", "relative link"])
    makers[kind]()
    return f"{kind} at {path.name}"


def use(run: Path, chance: random.Random) -> None:
    """Do one thing that a user does with a run directory."""
    uses: list[Callable[[], object]] = [
        lambda: record(run, 3),
        lambda: record(run, 2, 3, seed=9, overwrite=True),
        lambda: record(run, 1, contents="moments", overwrite=True),
        lambda: repair_run(run),
        lambda: check_run(run),
        lambda: summarize(open_run(run)),
        lambda: [open_run(run).read_text(name) for name in ("metrics.csv", "validation.json", "fold.json")],
        lambda: report.write(open_run(run), run.parent / "page.html"),
    ]
    with contextlib.suppress(OSError, ValueError):
        chance.choice(uses)()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_a_strangers_run_directory_harms_nobody(tmp_path, outside, record_property, count):
    template = record(tmp_path / "template", 1, 2)
    for name in ("metrics.csv", "validation.json", "fold.json"):
        (template / name).write_text("{}")
    before = listing(outside)
    for seed in range(count):
        chance = random.Random(seed)
        run = Path(shutil.copytree(template, tmp_path / "run"))
        done = [attack(run / place, outside, chance) for place in chance.sample(PLACES, chance.randint(1, 3))
                if not any(parent.is_symlink() or parent.is_fifo() or parent.is_socket() or parent.is_file()
                           for parent in (run / place).parents)]  # fmt: skip
        for _ in range(3):
            use(run, chance)
        assert listing(outside) == before, (seed, done)
        shutil.rmtree(run)
    record_property(TRIED, count)


def test_the_attack_works_where_nobody_looks(tmp_path, outside):
    """The control: the same link, written through by plain means, does reach the file outside."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(outside / "thesis.txt")
    (tmp_path / "run" / ".lock").write_text("")
    assert (outside / "thesis.txt").read_text() == ""


@pytest.mark.parametrize("place", [".lock", ".run.json", ".unfinished", "attention", "attention/epoch=0002"])
def test_a_link_on_the_way_of_a_write_is_named(tmp_path, outside, place):
    run = record(tmp_path / "run", 1)
    if (run / place).is_dir():
        shutil.rmtree(run / place)
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(outside / ("run" if "." not in place else "thesis.txt"))
    before = listing(outside)
    with refused(UnsafePath, place, "symbolic link", "replace it by a copy"):
        record(run, 2)
    assert listing(outside) == before


def test_an_honest_run_may_itself_be_a_link_and_be_read_through_links(tmp_path):
    """Users keep runs on other disks, and caches of downloads are made of links."""
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk").mkdir()
    record(tmp_path / "run", 1)
    cached = tmp_path / "cached"
    for name, content in listing(tmp_path / "disk").items():
        blob = tmp_path / f"blob-{len(content)}-{abs(hash(name))}"
        blob.write_bytes(content)
        (cached / name).parent.mkdir(parents=True, exist_ok=True)
        (cached / name).symlink_to(blob)
    assert check_run(cached).whole
    assert summarize(open_run(cached)).equals(summarize(open_run(tmp_path / "disk")))
    with refused(UnsafePath, "symbolic link"):
        record(cached, 2)


@pytest.mark.parametrize("name", ["metrics.csv", "validation.json", "fold.json", "part"])
def test_commands_do_not_wait_for_a_pipe(tmp_path, capsys, name):
    run = record(tmp_path / "run", 1)
    path = run / (parts(run)[0] if name == "part" else name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for words in (["figures", run, "--out", tmp_path / "figures"], ["report", run, "--out", tmp_path / "page.html"]):
        code = main([str(word) for word in words])
        assert code == 2 or (words[0] == "report" and name == "metrics.csv")
        assert "no regular file" in capsys.readouterr().err or code == 0
    assert main(["check", str(run)]) == (name == "part")


def test_a_path_with_a_null_character_is_refused():
    with refused(ValueError, "null character"):
        open_run("a\0b")


def test_a_text_of_any_size_is_not_read_whole(tmp_path):
    run = record(tmp_path / "run", 1)
    with (run / "metrics.csv").open("wb") as file:
        file.truncate(2**40)
    with refused(ValueError, "metrics.csv"):
        open_run(run).read_text("metrics.csv")
    with refused(ValueError, "metrics.csv"):
        read_text(run / "metrics.csv")


def test_a_name_is_followed_only_inside_its_folder(tmp_path, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(outside)
    with refused(UnsafePath, "checkpoints", "symbolic link"):
        own_path(tmp_path / "run", "checkpoints/last.pt")
    with refused(UnsafePath, "symbolic link"), replaced("checkpoints/last.pt", root=tmp_path / "run"):
        raise AssertionError
    with replaced("new/last.pt", root=tmp_path / "run") as partial:
        partial.write_text("weights")
    assert (tmp_path / "run/new/last.pt").read_text() == "weights"


def test_a_lock_that_cannot_be_opened_says_what_to_do(tmp_path, monkeypatch):
    run = record(tmp_path / "run", 1)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")  # root, who runs tests in containers, may write everything

    monkeypatch.setattr("os.open", refuse)
    with refused(PermissionError, "could not be locked", "look at the permissions"):
        writer(run)
