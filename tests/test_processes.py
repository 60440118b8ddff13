"""Several processes, on gloo: each sample once, one process's values, and what one leaves that dies under torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stripe.cli import main
from stripe.models import create_model
from stripe.store import open_run
from tests.conftest import randomize
from tests.forked import ended, run_stripe

ROOT = Path(__file__).parents[1]
KILLED = "a rank of `torchrun` killed while training or recording"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = (
    "--dataset digits --depth 8 --block-name basicblock --module senet"
    " --train-batch 16 --test-batch 20 --lr 0.05 --squeeze"
).split()


def launch(*words):
    """Start a script under torchrun with two processes of one thread each."""
    script, *arguments = map(str, words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.fixture
def run_two(forks, tmp_path):
    """Run a command in two processes to its end; return what they printed to stdout."""

    def run(*words):
        said, errors = tmp_path / "said", tmp_path / "errors"
        said.write_text("")
        codes = ended(*forks.team(run_stripe, *words, said=said, errors=errors))
        assert codes == [0, 0], errors.read_text()
        return said.read_text()

    return run


@pytest.fixture
def checkpoint(tmp_path):
    model = {"arch": "resnet", "depth": 11, "module": "senet"}
    state = randomize(create_model(**model)).state_dict()
    description = {"model": model, "data": {"uri": "digits"}}
    torch.save({"state_dict": state, "epoch": 4, "description": description}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.equal_bits
@pytest.mark.parametrize("contents", [[], pytest.param(["--moments-only", "--by-label"], marks=pytest.mark.slow)])
def test_two_processes_record_what_one_records(run_two, tmp_path, checkpoint, contents):
    words = ["--ckpt", str(checkpoint), "--samples", "110", "--batch", "20", *contents]
    assert run_two("collect", *words, "--out", tmp_path / "two").splitlines() == [
        f"{tmp_path}/two: epoch 4, 3 gates; network {checkpoint}; data digits, split test, 110 images"
    ]
    assert main(["collect", *words, "--out", str(tmp_path / "one")]) == 0
    one, two = (open_run(tmp_path / name) for name in ("one", "two"))
    parts = [part.name for part in two.manifest.epochs[0].parts]
    assert parts == ["part-0000-000.parquet", "part-0001-000.parquet"]
    assert len(one.manifest.epochs[0].parts) == 1
    for key, moments in one.moments().items():
        found = two.moments()[key]
        assert found.count == moments.count == 110
        np.testing.assert_allclose(found.mean, moments.mean, rtol=1e-12)
        np.testing.assert_allclose(found.m2, moments.m2, rtol=1e-12)
        assert not np.allclose(moments.m2, 0)
    if not contents:
        np.testing.assert_array_equal(two.samples(4), one.samples(4))
        np.testing.assert_array_equal(two.labels(4), one.labels(4))
        for gate in one.gates:
            np.testing.assert_array_equal(two.attention(gate.name, 4), one.attention(gate.name, 4))
    else:
        means = [run.moments()[4, "layer1.0"].classes for run in (one, two)]
        np.testing.assert_array_equal(means[0].counts, means[1].counts)
        np.testing.assert_allclose(means[0].means, means[1].means, rtol=1e-12)


def test_two_processes_train_and_record_their_shares(run_two, tmp_path):
    words = [*TRAIN, "--train-samples", "200", "--val-samples", "40", "--epochs", "2", "--record", "50"]
    assert run_two("train", *words, "-c", tmp_path / "run").count("test: accuracy") == 1
    run = open_run(tmp_path / "run")
    assert run.epochs == [1, 2]
    for epoch in run.manifest.epochs:
        assert [part.name[:9] for part in epoch.parts] == ["part-0000", "part-0001"]
        assert [part.rows for part in epoch.parts] == [20, 30]
        assert run.samples(epoch.epoch).tolist() == [i * 360 // 50 for i in range(50)]
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["epoch"].tolist() == [1, 2]
    assert not np.array_equal(run.attention("layer1.0", 1), run.attention("layer1.0", 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_end_before_python_shuts_down(tmp_path, checkpoint, processes):
    script = tmp_path / "collect.py"
    script.write_text(
        "import atexit\n"
        "from stripe.cli import script\n"
        "atexit.register(print, 'Python shuts down')\n"
        "raise SystemExit(script('collect'))\n"
    )
    words = [str(script), "--ckpt", str(checkpoint), "--samples", "20", "--out", str(tmp_path / "run")]
    command = [*LAUNCH, *words] if processes > 1 else [sys.executable, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(open_run(tmp_path / "run").samples(4)) == 20
    told, *rest = ended.stdout.splitlines()
    used = f"network {checkpoint}; data digits, split test, 20 images"
    assert told == f"{tmp_path}/run: epoch 4, 3 gates; {used}"
    assert rest == ["Python shuts down"] * (processes == 1)


@pytest.mark.slow
def test_fewer_batches_than_processes_are_cut_evenly(run_two, tmp_path, checkpoint):
    run_two("collect", "--ckpt", checkpoint, "--samples", 11, "--out", tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert [part.rows for part in run.manifest.epochs[0].parts] == [5, 6]
    assert len(run.samples(4)) == 11


def epochs_of(directory):
    return open_run(directory).epochs if (directory / "run.json").exists() else []


def wait_for(launcher, condition):
    """Wait until the condition holds; AssertionError where the job ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(launcher):
    """Process ids of the launched script by rank, as the launcher told each in its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (folder / "status").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{launcher.pid}\n" in status:
            for entry in environment.split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(folder.name)
    return found


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_finished_epochs(run_two, tmp_path, record_property):
    words = [*TRAIN, "--train-samples", "200", "--val-samples", "40", "--record", "50", "--manualSeed", "3"]
    directory, resume = tmp_path / "run", []
    for rank in (0, 1):
        before = len(epochs_of(directory))
        launcher = launch("train", *words, *resume, "--epochs", 60, "-c", directory)
        wait_for(launcher, lambda: len(epochs_of(directory)) >= before + 2)  # noqa: B023
        os.kill(workers_of(launcher)[rank], signal.SIGKILL)
        code, _, error = finish(launcher)
        assert code != 0
        assert "SIGKILL" in error
        kept = open_run(directory)
        assert before + 2 <= len(kept.epochs) < 60
        assert all(len(kept.samples(epoch)) == 50 for epoch in kept.epochs)
        resume = ["--resume", directory / "checkpoints" / "last.pt"]
        record_property(KILLED, 1)
    until = len(kept.epochs) + 1
    for words_of in ([*words, *resume, "-c", directory], [*words, "-c", tmp_path / "undisturbed"]):
        run_two("train", *words_of, "--epochs", until)
    resumed, undisturbed = (open_run(tmp_path / name) for name in ("run", "undisturbed"))
    assert resumed.epochs == undisturbed.epochs == list(range(1, until + 1))
    for epoch in resumed.epochs:
        np.testing.assert_array_equal(resumed.attention("layer3.0", epoch), undisturbed.attention("layer3.0", epoch))
    metrics = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("run", "undisturbed")]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_process_that_fails_tells_why_and_drops_the_epoch(run_two, tmp_path, checkpoint, record_property):
    epochs, saved = list(range(1, 31)), torch.load(checkpoint)
    for epoch in epochs:
        torch.save(saved | {"epoch": epoch}, tmp_path / f"{epoch}.pt")
    words = ["--samples", 40, "--out", tmp_path / "run", "--ckpt", *(tmp_path / f"{epoch}.pt" for epoch in epochs)]
    launcher = launch("collect_attention", *words, "--batch", 1)
    wait_for(launcher, lambda: epochs_of(tmp_path / "run"))
    os.kill(workers_of(launcher)[1], signal.SIGKILL)
    code, _, error = finish(launcher)
    assert code != 0
    assert "SIGKILL" in error
    kept = open_run(tmp_path / "run")
    assert kept.epochs == epochs[: len(kept.epochs)]
    assert 1 <= len(kept.epochs) < len(epochs)
    assert all(len(kept.samples(epoch)) == 40 for epoch in kept.epochs)
    run_two("collect", *words, "--resume")
    whole = open_run(tmp_path / "run")
    assert whole.epochs == epochs
    np.testing.assert_allclose(whole.attention("layer1.0", 30), whole.attention("layer1.0", 1), rtol=1e-5)
    record_property(KILLED, 1)
