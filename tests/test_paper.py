"""The study of the paper's four networks: recorded every epoch, stopped, killed and resumed to the same end."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from studies.forms import begin_at
from study import main

import stripe
from stripe.models import create_model
from tests.forked import ended

SMALL = (
    "paper --dataset digits --depth 8 --block basicblock --epochs 3 --milestones 2 --amp no"
    " --train-samples 200 --record 20 --no-compile"
).split()
NAME = "paper-digits-resnet8"


def words(where: Path, *more: str) -> list[str]:
    return [*SMALL, "--out", str(where / "study"), "--runs", str(where / "runs"), *more]


def state_of(where: Path, case: str) -> dict:
    """Return all that a training leaves but its times."""
    directory = where / "runs" / f"{NAME}-{case}"
    epochs = [
        {name: value for name, value in row.items() if name != "observing_seconds"}
        for row in json.loads((directory / "test.json").read_text())
    ]
    last = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    found = {"epochs": epochs, "metrics": (directory / "metrics.csv").read_bytes()}
    found["weights"] = {name: tensor.numpy().tobytes() for name, tensor in last["state_dict"].items()}
    if (directory / "run.json").exists():
        probe, every = stripe.open_run(directory), stripe.open_run(directory / "all")
        gates = [gate.name for gate in probe.gates]
        found["rows"] = {(e, g): probe.attention(g, e).tobytes() for e in probe.epochs for g in gates}
        found["moments"] = {key: m.mean.tobytes() for key, m in every.moments().items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("whole")
    assert main(words(where, "--forms", "attention", "asr")) == 0
    return where


def test_every_epoch_of_every_network_is_tested_and_recorded(whole):
    results = pd.read_csv(whole / "study" / "results.csv")
    assert results["form"].tolist() == ["attention", "asr"]
    assert (results["accuracy_best_on_test"] >= results["accuracy_last"]).all()
    assert results["images_per_second"].gt(0).all()
    assert "accuracy_best" not in results or results["accuracy_best"].isna().all()  # nothing is held out
    run = stripe.open_run(whole / "runs" / f"{NAME}-attention-senet-1")
    assert run.epochs == [1, 2, 3]
    assert len(run.samples(1)) == 20
    every = stripe.open_run(whole / "runs" / f"{NAME}-attention-senet-1" / "all")
    assert {moments.count for moments in every.moments().values()} == {360}
    stripes = pd.read_csv(whole / "study" / "paper" / f"{NAME}-attention-senet-1-stripes.csv")
    assert len(stripes) == 3 * len(run.gates)
    epochs = pd.read_csv(whole / "study" / "paper" / f"{NAME}-asr-senet-1-epochs.csv")
    assert epochs["test_accuracy"].iloc[-1] == pytest.approx(results["accuracy_last"].iloc[1], abs=0.3)
    assert epochs["lr"].tolist() == pytest.approx([0.1, 0.1, 0.01])


def test_tables_follow_from_trainings_without_validation_too(whole, tmp_path):
    study, page = shutil.copytree(whole / "study", tmp_path / "study"), tmp_path / "README.md"
    page.write_text("<!-- csv: study/forms.csv -->\n<!-- /csv -->\n")
    assert main(["check", "--records", str(study), "--pages", str(page), "--write"]) == 0
    shown, results = pd.read_csv(study / "forms.csv"), pd.read_csv(study / "results.csv")
    assert shown["last epoch"].tolist() == pytest.approx(results["accuracy_last"].tolist(), abs=0.0051)
    assert shown["best validated epoch"].isna().all()
    assert "| ASR(SE) | 1 |" in page.read_text()


@pytest.mark.equal_bits
def test_slices_of_time_end_where_one_piece_does(whole, tmp_path, capsys):
    for _ in range(3):  # an epoch each
        assert main(words(tmp_path, "--forms", "attention", "--minutes", "0")) == 0
    assert "1 of 1 trainings to go" in capsys.readouterr().out
    assert main(words(tmp_path, "--forms", "attention", "--minutes", "0")) == 0
    assert state_of(tmp_path, "attention-senet-1") == state_of(whole, "attention-senet-1")
    assert state_of(tmp_path, "attention-senet-1") != state_of(whole, "asr-senet-1")


@pytest.mark.equal_bits
def test_a_killed_training_is_taken_up_where_it_was(forks, whole, tmp_path):
    last = tmp_path / "runs" / f"{NAME}-attention-senet-1" / "checkpoints" / "last.pt"
    process = forks.start(main, words(tmp_path, "--forms", "attention"), said=tmp_path / "said")
    while not last.exists():
        assert process.exitcode is None
        time.sleep(0.02)
    process.kill()
    assert ended(process) == [-signal.SIGKILL]
    assert not (tmp_path / "study" / "results.csv").exists()
    assert main(words(tmp_path, "--forms", "attention")) == 0
    ours, theirs = state_of(tmp_path, "attention-senet-1"), state_of(whole, "attention-senet-1")
    assert ours == theirs


def test_other_options_do_not_go_on_with_a_training(whole, capsys):
    assert main([*words(whole, "--forms", "plain"), "--lr", "0.05"]) == 2
    assert "holds rows of another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "scale"), [({}, 0.25), ({"asr": True, "module": "senet"}, 1.0)])
def test_a_control_begins_its_branches_where_it_says(form, scale):
    torch.manual_seed(0)
    model = create_model("resnet", depth=11, **form)
    begun = {}
    for begin in (False, True):
        if begin:
            begin_at(model, scale)
        plain = stripe.asr.deploy(model)
        begun[begin] = [block.bn3.weight.detach().numpy() for block in (plain.layer1[0], plain.layer3[0])]
    assert all(np.allclose(weights, scale, rtol=1e-5) for weights in begun[True])
    assert not any(np.allclose(weights, scale, rtol=1e-2) for weights in begun[False])
