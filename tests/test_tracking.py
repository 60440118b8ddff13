"""Attention in TensorBoard and Weights & Biases: read back by their own readers, and told by every loop."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import stripe
from stripe.cli import main
from stripe.plots.drawing import RESOLUTION
from stripe.recorder import RecorderCallback
from stripe.store import open_run
from stripe.tracking import Tracker
from tests.runs import record
from tests.test_loops import (
    IMAGES,
    PROBE,
    Net,
    Pictures,
    Task,
    _without_lightnings_advice,
    classifier,
    data,
    huggingface,
    trainer_of,
)

_ = _without_lightnings_advice  # for the trainings of this module too


def read(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def example():
    return stripe.load_example()


@pytest.fixture(scope="module")
def told(example, tmp_path_factory):
    """What TensorBoard reads of two epochs of the example."""
    directory = tmp_path_factory.mktemp("board")
    with SummaryWriter(str(directory)) as board:
        tracker = Tracker(board, gates=["layer1.0", example.gates[-1]])
        for epoch in (1, 20):
            tracker(example, epoch)
    return read(directory)


def test_tensorboard_holds_strength_and_cv_of_every_gate_by_epoch(example, told):
    table = stripe.stats.summarize(example).set_index(["epoch", "gate"])
    for gate in example.gates:
        for measure in ("strength", "cv"):
            found = {event.step: event.value for event in told.Scalars(f"attention/{gate.name}/{measure}")}
            wanted = {epoch: table.loc[(epoch, gate.name), measure] for epoch in (1, 20)}
            assert found == pytest.approx(wanted, rel=1e-6)
            assert found[1] != found[20]


def test_tensorboard_holds_the_heatmaps_of_the_gates_asked_for(example, told):
    assert told.Tags()["images"] == ["attention/layer1.0", f"attention/{example.gates[-1].name}"]
    first, last = (
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in told.Images("attention/layer1.0")
    )
    ax = stripe.plots.stripe_heatmap(example.attention("layer1.0", 20)[:100])
    wide, high = (inches * RESOLUTION for inches in ax.figure.get_size_inches())
    assert last.shape == (int(high), int(wide), 3)
    assert (first != last).any()
    assert len(np.unique(last.reshape(-1, 3), axis=0)) > 50  # colours of values, not an empty sheet


def test_a_run_of_moments_has_numbers_and_no_image(tmp_path):
    path = record(tmp_path / "run", 3, contents="moments")
    with SummaryWriter(str(tmp_path / "board")) as board:
        Tracker(board)(path, 3)
    events = read(tmp_path / "board")
    assert events.Tags()["images"] == []
    assert {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]} == {"strength", "cv"}


def test_what_is_no_service_and_no_epoch_is_refused(example, tmp_path):
    with pytest.raises(TypeError, match="cannot track with str: expected a TensorBoard writer or a run of wandb.init"):
        Tracker("runs/board")
    with SummaryWriter(str(tmp_path)) as board, pytest.raises(ValueError, match="no epoch 3"):
        Tracker(board)(example, 3)


def test_weights_and_biases_hold_the_same(example, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with wandb.init(mode="offline", project="stripes", dir=str(tmp_path)) as service:
        service.log({"loss": 3.0}, step=500)  # steps of the training, which may not fall
        tracker = Tracker(service, gates=["layer1.0"])
        for epoch in (1, 20):
            tracker(example, epoch)
        summary = dict(service.summary)
    table = stripe.stats.summarize(example).set_index(["epoch", "gate"])
    assert summary["attention/epoch"] == 20
    for gate in example.gates:
        for measure in ("strength", "cv"):
            wanted = table.loc[(20, gate.name), measure]
            assert summary[f"attention/{gate.name}/{measure}"] == pytest.approx(wanted, rel=1e-6)
    assert len(list(tmp_path.rglob("media/images/attention/layer1.0*.png"))) == 2


# ---- every loop -------------------------------------------------------------------------------------------


def test_the_command_shows_the_attention_beside_the_metrics(tmp_path):
    words = "train --dataset digits --depth 11 --module senet --epochs 2 --train-samples 40 --record 8 --tensorboard"
    assert main([*words.split(), "-c", str(tmp_path / "run")]) == 0
    events, run = read(tmp_path / "run" / "tensorboard"), open_run(tmp_path / "run")
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
    for gate in run.gates:
        assert [event.step for event in events.Scalars(f"attention/{gate.name}/cv")] == [1, 2]
    assert [event.step for event in events.Images(f"attention/{run.gates[0].name}")] == [1, 2]


def test_lightning_and_transformers_tell_each_epoch_once_it_is_in_the_run(tmp_path):
    told = []

    def recorded(run, epoch):
        told.append((epoch, open_run(run).epochs))

    task = Task()
    gates = stripe.find_gates(task.net, IMAGES[:3])
    callback = RecorderCallback(None, gates, tmp_path / "lightning", model=task.net, recorded=recorded)
    trainer_of(tmp_path, task, None, callback=callback).fit(task, data(), data())
    assert told == [(0, [0]), (1, [0, 1])]

    told.clear()
    model = classifier()
    gates = stripe.find_gates(model, {"pixel_values": PROBE[:3]})
    callback = RecorderCallback(None, gates, tmp_path / "transformers", recorded=recorded)
    huggingface(tmp_path / "out", model, callback, Pictures(PROBE)).train()
    assert told == [(1, [1]), (2, [1, 2])]


def test_what_fails_to_be_tracked_is_not_hidden(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    callback = RecorderCallback(
        [(IMAGES, None)], stripe.find_gates(net, IMAGES[:3]), tmp_path / "run", recorded=lambda *_: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        callback.on_epoch_end(net, 1, {})
    assert open_run(tmp_path / "run").epochs == [1]
