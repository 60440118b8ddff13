"""The recorder against hooks written by hand, in loops of every kind; what fails leaves neither hook nor tensor."""

import gc
import os
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from stripe.attention import create_attention
from stripe.data import Loader, load_images
from stripe.gates import find_gates
from stripe.models import create_model
from stripe.recorder import Recorder, RecorderCallback
from stripe.store import open_run
from tests.conftest import randomize


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
        squeeze.append(inputs[0].detach().flatten(2).mean(2))

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.inference_mode():
        for batch, *_ in loader:
            model(batch)
    handle.remove()
    return torch.cat(attention).numpy(), torch.cat(squeeze).numpy()


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.equal_bits
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


@pytest.mark.equal_bits
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


def test_the_last_forward_is_taken_on_request_whatever_the_modes_and_sizes(tmp_path, network, loader):
    batch, labels, ids = next(iter(loader))
    gates = find_gates(network, batch[:2])
    with Recorder(network, gates, tmp_path / "run", forwards="last") as recorder:
        with torch.inference_mode():
            network(batch / 2)
        network(batch / 2)
        network(batch[:3])
        with torch.inference_mode():
            network(batch)
        recorder.commit(ids, labels)
        network(batch / 2)
        recorder.commit(ids, labels, epoch=1)
    run = open_run(tmp_path / "run")
    for gate in gates:
        attention, _ = hand_written(network, [(batch, labels, ids)], gate.source)
        np.testing.assert_allclose(run.attention(gate.name, 0), attention, rtol=1e-5)
        assert not np.allclose(run.attention(gate.name, 1), attention, rtol=1e-5)


def test_a_forward_pass_that_failed_has_nothing_to_commit(tmp_path, network, loader):
    batch, labels, ids = next(iter(loader))
    gates = find_gates(network, batch[:2])
    with Recorder(network, gates, tmp_path / "run") as recorder:
        network(batch)
        network.layer3.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            network(batch[:3])
        with pytest.raises(RuntimeError, match="nothing to commit"):
            recorder.commit(ids[:3], labels[:3])


def test_an_exception_leaves_finished_epochs_and_no_hook(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:2])

    def record():
        with Recorder(network, gates, tmp_path / "run") as recorder:
            recorder.record(loader, epoch=1)
            assert open_run(tmp_path / "run").epochs == [1]
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


# ---- moments, other networks, memory ----------------------------------------------------------------------


@pytest.mark.equal_bits
def test_moments_alone_are_those_of_the_rows(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:3])
    for contents in ("samples", "label-moments"):
        with Recorder(network, gates, tmp_path / contents, contents=contents) as recorder:
            recorder.record(loader, epoch=1)
    whole, run = (open_run(tmp_path / contents).moments() for contents in ("samples", "label-moments"))
    assert whole.keys() == run.keys()
    for key in whole:
        np.testing.assert_allclose(run[key].mean, whole[key].mean, rtol=1e-12)
        np.testing.assert_allclose(run[key].std, whole[key].std, rtol=1e-12)
    values, labels = open_run(tmp_path / "samples").attention("layer2.0", 1), loader.images.labels.numpy()
    classes = open_run(tmp_path / "label-moments").moments()[1, "layer2.0"].classes
    np.testing.assert_allclose(classes.means[3], values[labels == classes.keys[3]].mean(0, dtype=float), rtol=1e-12)


@pytest.mark.equal_bits
@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("timm:legacy_seresnet18", "layer1.0.se_module.sigmoid"),
        ("timm:mobilenetv3_small_050", "blocks.0.0.se.gate"),
        ("timm:ecaresnet26t", "layer1.0.se.gate"),
        ("timm:ese_vovnet19b_dw", "stages.0.blocks.0.attn.gate"),
        ("torchvision:mobilenet_v3_small", "features.1.block.1.scale_activation"),
    ],
)
def test_rows_of_five_families_are_a_hand_written_hooks(tmp_path, spec, source):
    model = randomize(create_model(spec)).eval()
    batches = [(torch.rand(2, 3, 96, 96), torch.arange(2), torch.arange(2) + 2 * k) for k in range(2)]
    gates = [gate for gate in find_gates(model, batches[0][0]) if gate.source == source]
    with Recorder(model, gates, tmp_path / "run") as recorder:
        recorder.record(batches)
    recorded = open_run(tmp_path / "run").attention(gates[0].name, 0)
    attention, _ = hand_written(model, batches, source)
    np.testing.assert_array_equal(recorded, attention)
    assert recorded.std() > 0
    assert hooks_on(model) == 0


class Detour(nn.Module):
    """A network that skips its second gate for dark images, and keeps no tensor itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (create_attention("senet", 8) for _ in range(2))
        self.convolution = nn.Conv2d(3, 8, 3)
        self.watch = None

    def forward(self, images):
        features = self.convolution(images)
        if self.watch:
            self.watch(features)
        features = features * self.first(features)
        return features if images.mean() < 0 else features * self.second(features)


def test_a_gate_that_is_passed_by_is_named_and_nothing_is_left(tmp_path):
    model = Detour().eval()
    gates = find_gates(model, torch.rand(3, 3, 16, 12))
    assert [gate.source for gate in gates] == ["first", "second"]
    bright, dark = ((value * torch.ones(4, 3, 16, 12), torch.arange(4), torch.arange(4)) for value in (1, -1))

    def record():
        with Recorder(model, gates, tmp_path / "run") as recorder:
            recorder.record([bright], epoch=1)
            recorder.record([bright, (*dark[:2], dark[2] + 4)], epoch=2)

    with pytest.raises(RuntimeError, match=f"did not pass {gates[1].name}:"):
        record()
    assert hooks_on(model) == 0
    assert open_run(tmp_path / "run").epochs == [1]


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_reference_to_a_feature_map_is_left(tmp_path, interrupted):
    model = Detour().eval()
    images = torch.rand(3, 3, 16, 12)
    gates = find_gates(model, images)
    maps = []
    model.watch = lambda features: maps.append(weakref.ref(features))
    recorder = Recorder(model, gates, tmp_path / "run", squeeze=True)
    try:
        with recorder:
            model(images)
            assert maps[0]() is None or maps[0]().grad_fn is not None
            recorder.commit(range(3))
            if interrupted:
                model(images)
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert interrupted
    gc.collect()
    assert len(maps) == 1 + interrupted
    assert all(reference() is None for reference in maps)
    assert hooks_on(model) == 0
    assert open_run(tmp_path / "run").epochs == ([] if interrupted else [0])


PEAK = """
import resource, sys, torch
from torch import nn
from stripe.attention import create_attention
from stripe.gates import find_gates
from stripe.recorder import Recorder

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.gate = nn.Conv2d(3, 1024, 1), create_attention("senet", 1024)
    def forward(self, images):
        features = self.convolution(images)
        return features * self.gate(features)

torch.set_num_threads(1)
model, images = Wide().eval(), torch.rand(500, 3, 2, 2)
gates = find_gates(model, images[:3])
for contents in ("moments", "samples"):
    with Recorder(model, gates, f"{sys.argv[1]}/{contents}", contents=contents) as recorder, torch.no_grad():
        for start in range(0, 20_000, 500):
            model(images)
            recorder.commit(range(start, start + 500))
            if start + 500 in (2_000, 20_000):
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_does_not_grow_with_the_samples(tmp_path):
    """The rows are 80 MB: one that keeps them all is seen."""
    arguments, environment = [sys.executable, "-c", PEAK, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    peaks = [float(line) for line in result.stdout.split()]
    assert peaks[1] - peaks[0] < 5
    assert peaks[3] - peaks[2] < 50
    for contents in ("moments", "samples"):
        assert open_run(tmp_path / contents).moments()[0, "model"].count == 20_000


# ---- Lightning --------------------------------------------------------------------------------------------


class Task(lightning.LightningModule):
    """A network of ours in a Lightning module; its batches are what the loaders give."""

    def __init__(self, network, fail_in_epoch=None):
        super().__init__()
        self.network, self.fail_in_epoch = network, fail_in_epoch

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if self.current_epoch == self.fail_in_epoch:
            raise FloatingPointError("on purpose")
        self.network(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def train(task, loader, callback, folder, epochs=2):
    """A real run: sanity check, training, validation, checkpoints."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[callback], default_root_dir=folder, **quiet
        )
        trainer.fit(task, loader, loader)
    return trainer


@pytest.mark.equal_bits
def test_a_lightning_trainer_records_its_validation(tmp_path, network, loader, images):
    gates = find_gates(network, next(iter(loader))[0][:3])
    callback = RecorderCallback(None, gates, tmp_path / "run", model=network)
    trainer = train(Task(network), loader, callback, tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))
    assert trainer.sanity_checking is False
    run = open_run(tmp_path / "run")
    assert run.epochs == [0, 1]
    np.testing.assert_array_equal(run.samples(1), images.sample_ids)
    np.testing.assert_array_equal(run.labels(1), images.labels)
    attention, _ = hand_written(network.eval(), loader, gates[0].source)
    np.testing.assert_array_equal(run.attention(gates[0].name, 1), attention)
    assert not np.allclose(run.attention(gates[0].name, 0), attention)
    assert hooks_on(network) == 0


def test_batches_without_ids_are_numbered_and_others_identified_by_the_user(tmp_path, network, loader, images):
    gates = find_gates(network, next(iter(loader))[0][:3])
    pairs = DataLoader([(batch, labels) for batch, labels, _ in loader], batch_size=None)
    train(Task(network), pairs, RecorderCallback(None, gates, tmp_path / "a", model=network), tmp_path, epochs=1)
    np.testing.assert_array_equal(open_run(tmp_path / "a").samples(0), np.arange(50))
    np.testing.assert_array_equal(open_run(tmp_path / "a").labels(0), images.labels)
    callback = RecorderCallback(
        None,
        gates,
        tmp_path / "b",
        model=network,
        identify=lambda batch, seen: (1000 + seen + torch.arange(len(batch[1])), None),
    )
    train(Task(network), pairs, callback, tmp_path, epochs=1)
    np.testing.assert_array_equal(open_run(tmp_path / "b").samples(0), np.arange(1000, 1050))
    assert (open_run(tmp_path / "b").labels(0) == -1).all()


def test_a_lightning_run_that_fails_keeps_finished_epochs_and_no_hook(tmp_path, network, loader):
    gates = find_gates(network, next(iter(loader))[0][:3])
    callback = RecorderCallback(None, gates, tmp_path / "run", model=network)
    with pytest.raises(FloatingPointError, match="on purpose"):
        train(Task(network, fail_in_epoch=1), loader, callback, tmp_path)
    assert open_run(tmp_path / "run").epochs == [0]
    assert hooks_on(network) == 0


def test_fit_needs_a_probe_set(tmp_path, network, loader):
    callback = RecorderCallback(None, find_gates(network, next(iter(loader))[0][:3]), tmp_path / "run")
    with pytest.raises(ValueError, match="no probe set"):
        callback.on_epoch_end(network, 1, {})
    with pytest.raises(AttributeError, match="has no attribute 'record'"):
        callback.record()


def test_the_callback_has_the_hooks_of_both_trainers_and_no_misspelt_one():
    hooks = {
        name for base in (lightning.Callback, transformers.TrainerCallback) for name in dir(base) if name[0] != "_"
    }
    ours = {name for name in dir(RecorderCallback) if not name.startswith("_")}
    assert hooks <= ours <= hooks | {"on_push_begin"}  # the last one is of transformers above 4.47
    assert RecorderCallback(None, [], "run").on_train_start(None, None) is None
    assert not hasattr(RecorderCallback(None, [], "run"), "on_validation_epoch_strat")
