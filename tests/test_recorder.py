import numpy as np
import pytest
import torch
from torch import nn

from stripe.data import Loader, load_images
from stripe.gates import find_gates
from stripe.models import create_model
from stripe.recorder import Recorder, RecorderCallback
from stripe.store import open_run


@pytest.fixture(scope="module")
def images():
    return load_images("digits", "test", samples=50)


@pytest.fixture
def loader(images):
    return Loader(images, 16)


@pytest.fixture
def network():
    return create_model("resnet", depth=11, module="senet").eval()


def hand_written(model, loader, path):
    """What a hook written by hand collects from the module at `path`: (N, C) attention and its input's mean."""
    attention, squeeze = [], []

    def hook(module, inputs, output):
        attention.append(output.detach().flatten(1).clone())
        squeeze.append(inputs[0].detach().mean((2, 3)))

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.inference_mode():
        for batch, *_ in loader:
            model(batch)
    handle.remove()
    return torch.cat(attention).numpy(), torch.cat(squeeze).numpy()


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recorded_rows_are_a_hand_written_hooks_bit_for_bit_in_order(tmp_path, network, loader, images):
    gates = find_gates(network, next(iter(loader))[0][:2])
    with Recorder(network, gates, tmp_path / "run", squeeze=True) as recorder:
        recorder.record(loader, epoch=3)
    run = open_run(tmp_path / "run")
    assert run.epochs == [3]
    assert [gate.name for gate in run.gates] == ["layer1.0", "layer2.0", "layer3.0"]
    np.testing.assert_array_equal(run.samples(3), images.sample_ids)
    np.testing.assert_array_equal(run.labels(3), images.labels)
    for gate in gates:
        attention, squeeze = hand_written(network, loader, gate.source)
        np.testing.assert_array_equal(run.attention(gate.name, 3), attention)
        np.testing.assert_allclose(run.squeeze(gate.name, 3), squeeze, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(run.attention(gate.name, 3), attention[::-1])
    assert hooks_on(network) == 0


def test_a_loop_of_ones_own_commits_what_it_ran(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:2])
    with Recorder(network, gates, tmp_path / "own") as recorder, torch.no_grad():
        for epoch in (1, 2):
            for batch, labels, ids in loader:
                network(batch * epoch)
                recorder.commit(ids, labels, epoch=epoch)
    with Recorder(network, gates, tmp_path / "whole") as recorder:
        recorder.record(loader, epoch=1)
    own, whole = open_run(tmp_path / "own"), open_run(tmp_path / "whole")
    assert own.epochs == [1, 2]
    np.testing.assert_array_equal(own.attention("layer1.0", 1), whole.attention("layer1.0", 1))
    assert not np.array_equal(own.attention("layer1.0", 2), whole.attention("layer1.0", 1))


def test_commit_without_a_forward_pass_or_with_other_samples_is_refused(tmp_path, network, loader):
    batch, labels, ids = next(iter(loader))
    gates = find_gates(network, batch[:2])
    with Recorder(network, gates, tmp_path / "run") as recorder:
        with pytest.raises(RuntimeError, match="run the network on the samples first"):
            recorder.commit(ids, labels)
        network(batch)
        recorder.commit(ids, labels)
        with pytest.raises(RuntimeError, match="nothing to commit"):
            recorder.commit(ids, labels)

    def commit_too_few():
        with Recorder(network, gates, tmp_path / "b") as recorder:
            network(batch)
            recorder.commit(ids[:-1], labels[:-1])

    with pytest.raises(ValueError, match="give one row per sample id"):
        commit_too_few()
    assert open_run(tmp_path / "b").epochs == []


def test_an_exception_leaves_finished_epochs_and_no_hook(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:2])

    def record():
        with Recorder(network, gates, tmp_path / "run") as recorder:
            recorder.record(loader, epoch=1)
            network(next(iter(loader))[0])
            recorder.commit(range(16), epoch=2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert open_run(tmp_path / "run").epochs == [1]
    assert hooks_on(network) == 0
    with Recorder(network, gates, tmp_path / "run") as recorder:
        recorder.record(loader, epoch=2)
    assert open_run(tmp_path / "run").epochs == [1, 2]


def test_an_epoch_that_is_there_is_refused_or_overwritten(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:2])
    for overwrite in (False, True):
        with Recorder(network, gates, tmp_path / "run", overwrite=overwrite) as recorder:
            recorder.record(loader, epoch=1)
    with pytest.raises(FileExistsError, match="epoch 1"), Recorder(network, gates, tmp_path / "run") as recorder:
        recorder.record(loader, epoch=1)
    assert len(open_run(tmp_path / "run").samples(1)) == 50


def test_training_flags_are_put_back(tmp_path, network, loader):
    network.train()
    network.layer1.eval()
    gates = find_gates(network, next(iter(loader))[0][:2])
    RecorderCallback(loader, gates, tmp_path / "run").on_epoch_end(network, 4, {})
    assert network.training
    assert not network.layer1[0].bn1.training
    assert network.layer2[0].bn1.training
    assert open_run(tmp_path / "run").epochs == [4]


def test_nan_attention_is_recorded_as_it_is(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:2])
    with torch.no_grad():
        network.layer2[0].attention_module.fc2.bias[3] = float("nan")
    with Recorder(network, gates, tmp_path / "run") as recorder:
        recorder.record(loader)
    run = open_run(tmp_path / "run")
    values = run.attention("layer2.0", 0)
    assert np.isnan(values[:, 3]).all()
    assert np.isfinite(values[:, :3]).all()


def test_no_gate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no gate to record"):
        Recorder(nn.Identity(), [], tmp_path / "run")
    assert not (tmp_path / "run").exists()
