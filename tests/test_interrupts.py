"""Ctrl-C at random moments of every command: exit code 130, no stray file, nothing cut, no process left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from PIL import Image

from stripe.cli import COMMANDS
from stripe.store import check_run
from tests.forked import Forks, ended, run_stripe
from tests.runs import listing

ROOT = Path(__file__).parents[1]
TRIED = "commands interrupted (SIGINT) at random moments: exit code 130, no stray file, what is there is whole"
TRAIN = "train --dataset digits --depth 8 --block-name basicblock --module senet --train-samples 60 --train-batch 20"
TRAIN += " --val-samples 10 --epochs 3 --record 20 --squeeze --workers 0 -c run"
LAST = "../../trained/run/checkpoints/last.pt"
DATA = "--train-samples 60 --test-samples 20 --batch 20"
WORDS = {
    "train": TRAIN,
    "collect": f"collect --ckpt {LAST} {LAST.replace('last', 'epoch=0001')} --samples 20 --batch 5 --out run",
    "stats": "stats ../../trained/run --json a.json --csv a.csv",
    "check": "check damaged --repair",
    "figures": "figures ../../trained/run --gates layer1.0 --out figures",
    "validate": f"validate --ckpt {LAST} --run ../../trained/run --steps 5 {DATA} --out out",
    "fold": f"fold --ckpt {LAST} --run ../../trained/run --learning-steps 3 --samples 20 {DATA} --onnx --out out",
    "report": "report ../../trained/run --out page.html",
    "demo": "demo --epochs 1 --asr-epochs 1 --steps 2 --train-samples 60 --out run --figures figures --json a.json",
}
TIMES = {"fold": 4, "demo": 2}  # that a command is interrupted, the others more often: they take less time
SWIFT = ["collect", "stats", "check", "report"]  # what the fast tests interrupt


class Ended(NamedTuple):
    code: int
    seconds: float
    left: bool  # a process that it started, or itself


def alive(group: int) -> bool:
    """Tell whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Commands:
    """Runs commands, each in a folder of its own: works in its `work`, has `temporary`, and prints into `said`."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self._forks, self.folder = forks, folder
        self._count = 0
        self._undisturbed: dict[str, Path] = {}
        self._seconds: dict[str, float] = {}  # in which a command is interrupted

    def run(self, name: str, words: str, seconds: float | None = None) -> tuple[Ended, Path]:
        """Run a command, interrupted after so many seconds; return how it ended and the folder it was given."""
        folder = self.folder / name
        (folder / "work").mkdir(parents=True)
        (folder / "temporary").mkdir()
        if words.startswith("check"):
            damaged = shutil.copytree(self.folder / "trained/run", folder / "work/damaged")
            part = damaged / "attention/epoch=0002/part-0000-000.parquet"
            part.write_bytes(part.read_bytes()[:-50])
        where = {"said": folder / "said", "folder": folder / "work", "environment": {"TMPDIR": f"{folder}/temporary"}}
        process, began = self._forks.start(run_stripe, *words.split(), **where), time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it has ended before
                os.killpg(process.pid, signal.SIGINT)
        [code] = ended(process)
        return Ended(code, time.monotonic() - began, alive(process.pid)), folder

    def undisturbed(self, name: str) -> Path:
        """Return the folder of a command that nobody interrupts."""
        if name not in self._undisturbed:
            found, self._undisturbed[name] = self.run(f"{name}-undisturbed", WORDS[name])
            self._seconds[name] = found.seconds
            assert found.code == 0, (self._undisturbed[name] / "said").read_text()
        return self._undisturbed[name]

    def interrupt(self, name: str, chance: random.Random) -> bool:
        """Interrupt a command at a random moment and look at what it left; tell whether it was before its end."""
        whole = self.undisturbed(name)
        self._count += 1
        found, folder = self.run(f"{name}-{self._count}", WORDS[name], chance.uniform(0, self._seconds[name]))
        said = (folder / "said").read_text()
        assert_clean(folder, whole)
        assert not found.left
        if found.code == -signal.SIGINT:  # before a line of ours had run
            assert "cli/process.py" not in said
        elif found.code == 130:
            assert said.endswith("interrupted: what was finished is valid and kept\n"), said
            assert "Traceback" not in said
        else:  # its work was done before
            assert found.code == 0, said
            assert said.count("\n") == (whole / "said").read_text().count("\n")
            assert listing(folder).keys() == listing(whole).keys()
            self._seconds[name] *= 0.8
        shutil.rmtree(folder)
        return found.code == 130


@pytest.fixture(scope="module")
def commands(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    made = Commands(forks, tmp_path_factory.mktemp("interrupted"))
    found, folder = made.run("training", TRAIN)
    assert found.code == 0, (folder / "said").read_text()
    (folder / "work").rename(made.folder / "trained")
    return made


def read_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


READERS: dict[str, Callable[[Path], object]] = {
    ".png": read_image,
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": lambda path: pd.read_csv(path, on_bad_lines="error"),
    ".pt": lambda path: torch.load(path, weights_only=True),
}


def assert_clean(folder: Path, whole: Path) -> None:
    """Every file is one that an undisturbed command leaves, and whole; nothing else is left."""
    found, expected = listing(folder / "work"), listing(whole / "work")
    before = {f"damaged/{name}" for name in listing(whole.parent / "trained/run")}
    assert set(os.listdir(folder / "temporary")) <= set(os.listdir(whole / "temporary"))  # onnxruntime leaves a file
    assert {name for name in found if not re.search(r"\.lock$|\.damaged/", name)} <= expected.keys() | before
    for name, content in found.items():
        path = folder / "work" / name
        if name.endswith((".html", ".svg", ".onnx", ".safetensors")):
            assert content == expected[name]
        elif ".damaged" not in path.parts:
            READERS.get(path.suffix, lambda path: path)(path)
    for manifest in (folder / "work").rglob("run.json"):
        if "damaged" not in str(manifest):
            run = check_run(manifest.parent)
            assert (run.whole, run.unnamed, run.interrupted) == (True, (), ())


def test_the_commands_are_all_there_are():
    assert WORDS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", SWIFT)
def test_ctrl_c_leaves_nothing_half_done(commands, record_property, name):
    record_property(TRIED, int(commands.interrupt(name, random.Random(0))))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WORDS)
def test_ctrl_c_at_any_moment_leaves_nothing_half_done(commands, record_property, name):
    chance, interrupted = random.Random(name), 0
    while interrupted < TIMES.get(name, 11):
        interrupted += commands.interrupt(name, chance)
    record_property(TRIED, interrupted)


LOADING = ["-m stripe stats run", "scripts/report.py run --out page.html", "scripts/fold.py --ckpt none.pt --out out"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", LOADING)
def test_ctrl_c_while_libraries_are_loaded(commands, tmp_path, record_property, words):
    """Before a line of ours runs, Python ends by the signal itself, which shells tell as 130 too."""
    shutil.copytree(commands.folder / "trained/run", tmp_path / "run")
    before, chance, interrupted = listing(tmp_path), random.Random(words), 0
    command = [sys.executable, *words.replace("scripts", str(ROOT / "scripts")).split()]
    seconds, usual, _ = started(command, tmp_path)
    (tmp_path / "page.html").unlink(missing_ok=True)
    while interrupted < 7:
        _, code, said = started(command, tmp_path, chance.uniform(0, seconds))
        if code == usual:  # its work was done before
            seconds *= 0.8
            (tmp_path / "page.html").unlink(missing_ok=True)
            continue
        interrupted += 1
        assert code in (130, -signal.SIGINT), said
        assert "bug" not in said
        assert ("Traceback" in said) <= (code < 0)
        assert listing(tmp_path) == before
    record_property(TRIED, interrupted)


def started(command: list[str], folder: Path, seconds: float | None = None) -> tuple[float, int, str]:
    """Start a process, interrupted after so many seconds; return how long it took, its exit code and stderr."""
    began, pipe = time.monotonic(), subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=_heed_signals
    ) as process:
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    return time.monotonic() - began, process.returncode, said


def _heed_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
