"""A resumed training is the same training, and a directory belongs to one: what differs is refused or said."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from stripe.cli import main
from stripe.resuming import sole_training
from stripe.store import open_run
from tests.forked import ended, run_stripe
from tests.runs import listing, refused

TRIED = "trainings resumed with other options, or into another's directory: refused, nothing written"
SMALL = ["train", "--dataset", "digits", "--depth", "8", "--block-name", "basicblock", "--module", "senet"]
SMALL += ["--train-samples", "60", "--train-batch", "20", "--workers", "0"]
CHANGED = {
    "--manualSeed": "5", "--val-samples": "9", "--train-samples": "50", "--depth": "14", "--module": "eca",
}  # fmt: skip


def train(directory: Path, *words: object) -> int:
    return main([*SMALL, "-c", str(directory), *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "a"
    assert train(directory, "--epochs", 1, "--record", 10) == 0
    return directory


@pytest.fixture
def begun(trained: Path, tmp_path: Path) -> Path:
    """A training of one epoch, to go on with."""
    for name, content in listing(trained).items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(content)
    return tmp_path / "a"


@pytest.mark.parametrize("option", CHANGED)
def test_what_makes_it_another_training_is_refused(begun, capsys, record_property, option):
    before, last = listing(begun), begun / "checkpoints" / "last.pt"
    assert train(begun, "--epochs", 2, "--resume", last, option, CHANGED[option]) == 2
    error = capsys.readouterr().err
    assert "is of another training" in error
    assert "--allow-changed" in error
    assert " then, " in error
    assert listing(begun) == before
    record_property(TRIED, 1)


def test_it_goes_on_with_the_same_options_and_says_what_else_changed(begun, capsys):
    last = begun / "checkpoints" / "last.pt"
    assert train(begun, "--epochs", 2, "--resume", last, "--lr", 0.05, "--record", 10) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]
    assert "epochs: 1 then, 2 now" in line
    assert "lr: 0.1 then, 0.05 now" in line
    assert len(pd.read_csv(begun / "metrics.csv")) == 2
    assert open_run(begun).epochs == [1, 2]


def test_another_split_is_allowed_on_request_and_said(begun, capsys):
    words = ["--epochs", 2, "--resume", begun / "checkpoints" / "last.pt", "--val-samples", 9]
    assert train(begun, *words, "--allow-changed") == 0
    assert "split validation: 6 then, 9 now" in capsys.readouterr().out


def test_a_resume_into_the_directory_of_another_training_is_refused(begun, tmp_path, capsys, record_property):
    assert train(tmp_path / "b", "--epochs", 2, "--manualSeed", 2) == 0
    before, last = listing(tmp_path / "b"), begun / "checkpoints" / "last.pt"
    assert train(tmp_path / "b", "--epochs", 3, "--resume", last, "--record", 10) == 2
    assert "holds another training" in capsys.readouterr().err
    assert listing(tmp_path / "b") == before
    assert train(tmp_path / "c", "--epochs", 2, "--resume", last) == 0  # into an empty one
    record_property(TRIED, 1)


def test_a_training_keeps_others_out_before_they_write(tmp_path):
    with sole_training(tmp_path / "a", None):
        before = listing(tmp_path)
        with refused(BlockingIOError, "training '", "is being written already"), sole_training(tmp_path / "a", None):
            raise AssertionError
        assert listing(tmp_path) == before
    with sole_training(tmp_path / "a", None):
        pass


@pytest.mark.slow
def test_of_two_trainings_started_together_one_is_refused(forks, tmp_path):
    words = [*SMALL, "--epochs", 3, "-c", tmp_path / "a", "--manualSeed"]
    said = [tmp_path / seed for seed in "12"]
    codes = ended(*(forks.start(run_stripe, *words, path.name, said=path) for path in said))
    errors = [path.read_text() for path in said]
    assert sorted(codes) == [0, 2], errors
    assert any("is being written already" in error or "holds a training already" in error for error in errors)
    assert len(pd.read_csv(tmp_path / "a" / "metrics.csv")) == 3


@pytest.mark.parametrize("place", ["metrics.csv", "checkpoints", "checkpoints/last.pt", "checkpoints/.lock"])
def test_a_training_writes_through_no_link(begun, tmp_path, capsys, place):
    outside = tmp_path / "outside"
    (begun / place).rename(outside) if (begun / place).exists() else outside.write_text("mine")
    (begun / place).unlink(missing_ok=True)
    (begun / place).symlink_to(outside)
    before = listing(tmp_path)
    last = begun / "checkpoints" / "last.pt"
    assert train(begun, "--epochs", 2, "--resume", last) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert {name: data for name, data in listing(tmp_path).items() if name.startswith("outside")} == {
        name: data for name, data in before.items() if name.startswith("outside")
    }
