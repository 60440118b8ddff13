"""Loops in which people train, Lightning's, transformers', accelerate's, their own: what each records and refuses."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.data import DataLoader, TensorDataset

from stripe.folding import fold
from stripe.gates import find_gates
from stripe.recorder import Recorder, RecorderCallback
from stripe.store import open_run
from tests.forked import ROOT, ended
from tests.runs import refused

GATE = "gated"


class Net(nn.Module):
    """A convolution and one gate, whose values are kept at hand for the test, batch by batch."""

    def __init__(self, fail=False):
        super().__init__()
        self.convolution, self.linear, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images):
        features = self.convolution(images)
        features = features * torch.sigmoid(self.linear(features.mean((2, 3))))[:, :, None, None]
        return self.head(features.mean((2, 3)))


def attention_of(net, images):
    """The gate's values, computed apart from the network's forward."""
    with torch.no_grad():
        return torch.sigmoid(net.linear(net.convolution(images).mean((2, 3)))).numpy()


IMAGES = torch.rand(16, 3, 10, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def gates(net):
    return find_gates(net, IMAGES[:3])


# ---- forward passes and commits ----------------------------------------------------------------------------


def test_several_forward_passes_are_refused_or_taken_as_asked(tmp_path, net, gates):
    for forwards, expected in (("last", IMAGES[4:8]), ("all", IMAGES[:8])):
        with Recorder(net, gates, tmp_path / forwards, forwards=forwards) as recorder, torch.no_grad():
            net(IMAGES[:4])
            net(IMAGES[4:8])
            recorder.commit(range(len(expected)))
        found = open_run(tmp_path / forwards).attention(gates[0], 0)
        np.testing.assert_allclose(found, attention_of(net, expected), rtol=1e-6)
    with Recorder(net, gates, tmp_path / "one") as recorder:
        net(IMAGES[:4])
        net(IMAGES[4:8])
        with refused(RuntimeError, "several forward passes", "commit after each"):
            recorder.commit(range(4))
        net(IMAGES[:4])
        recorder.commit(range(4))
    assert len(open_run(tmp_path / "one").samples(0)) == 4
    with refused(ValueError, "forwards 'two'", "one, last, all"):
        Recorder(net, gates, tmp_path / "none", forwards="two")


@pytest.mark.parametrize("forwards", ["one", "last", "all"])
def test_a_forward_pass_that_failed_takes_the_one_before_with_it(tmp_path, net, gates, forwards):
    with Recorder(net, gates, tmp_path / "run", forwards=forwards) as recorder, torch.no_grad():
        net(IMAGES[:4])
        handle = net.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(IMAGES[4:8])
        handle.remove()
        with refused(RuntimeError, "nothing to commit"):
            recorder.commit(range(4))
        net(IMAGES[4:8])
        recorder.commit(range(4))
    found = open_run(tmp_path / "run").attention(gates[0], 0)
    np.testing.assert_allclose(found, attention_of(net, IMAGES[4:8]), rtol=1e-6)
    assert not np.allclose(found, attention_of(net, IMAGES[:4]), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "contents"), [("float32", "samples"), ("float16", "samples"), ("float32", "label-moments")]
)
def test_a_refused_batch_leaves_neither_rows_nor_ids(tmp_path, net, gates, record_property, dtype, contents):
    bad = {"ids": (np.arange(4.5, 8.5), [0] * 4), "number": (range(4, 7), [0] * 3), "labels": (range(4, 8), [0, 1, 2])}
    with Recorder(net, gates, tmp_path / "run", dtype=dtype, contents=contents) as recorder, torch.no_grad():
        net(IMAGES[:4])
        recorder.commit(range(4), [0] * 4)
        for ids, labels in bad.values():
            net(IMAGES[4:8])
            with pytest.raises(ValueError, match="sample id|labels|label"):
                recorder.commit(ids, labels)
        if contents == "label-moments":
            net(IMAGES[4:8])
            with refused(ValueError, "need a label"):
                recorder.commit(range(4, 8), [0, 1, -1, 0])
        net(IMAGES[4:8])
        recorder.commit(range(4, 8), [1] * 4)
    run = open_run(tmp_path / "run")
    found = run.moments()[0, gates[0].name]
    assert found.count == 8
    np.testing.assert_allclose(found.mean, attention_of(net, IMAGES[:8]).mean(0), rtol=1e-3)
    if contents == "samples":
        assert run.samples(0).tolist() == list(range(8))
    record_property("batches that a Recorder refused: neither rows nor ids of them are kept", len(bad))


def test_float16_says_what_it_cannot_hold(tmp_path, net, gates):
    with torch.no_grad():
        net.linear.bias[0] = -25.0  # a sigmoid of 1e-11
    with Recorder(net, gates, tmp_path / "run", dtype="float16") as recorder, torch.no_grad():
        with pytest.warns(UserWarning, match="float16 rounds to 0: record with dtype float32"):
            recorder.record([(IMAGES[:4], None)])
    with warnings.catch_warnings(), Recorder(net, gates, tmp_path / "b") as recorder:
        warnings.simplefilter("error")
        recorder.record([(IMAGES[:4], None)])
    assert open_run(tmp_path / "b").attention(gates[0], 0)[0, 0] > 0


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(tmp_path, net, gates, default):
    try:
        torch.set_default_dtype(default)
        with Recorder(net, gates, tmp_path / "run") as recorder:
            recorder.record([(IMAGES, None)])
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(open_run(tmp_path / "run").attention(gates[0], 0), attention_of(net, IMAGES), rtol=1e-6)


def test_epochs_and_steps_may_be_numpys(tmp_path, net, gates):
    with Recorder(net, gates, tmp_path / "run") as recorder:
        recorder.record([(IMAGES, None)], epoch=np.int64(3), step=torch.tensor(50))
        for wrong in (1.5, True, np.float64(2), -1):
            with refused(ValueError, "epoch"):
                recorder.record([(IMAGES, None)], epoch=wrong)
    assert open_run(tmp_path / "run").epochs == [3]
    assert open_run(tmp_path / "run").steps == {3: 50}


def test_two_threads_never_get_each_others_rows(tmp_path, net, gates, record_property):
    errors, lock, stored = [], threading.Lock(), {}
    start, alone = threading.Barrier(2), copy.deepcopy(net)  # while threads run a network it cannot be copied

    def work(recorder, mine):
        start.wait()
        for number in range(12):
            images = torch.rand(4, 3, 10, 12, generator=torch.Generator().manual_seed(1000 * mine + number))
            ids = range(100 * mine + 4 * number, 100 * mine + 4 * number + 4)
            try:
                with torch.no_grad():
                    net(images)
                with lock:
                    recorder.commit(ids)
                    stored.update(zip(ids, attention_of(alone, images), strict=True))
            except RuntimeError as error:
                errors.append(str(error))

    with Recorder(net, gates, tmp_path / "run") as recorder:
        net(IMAGES[:1])
        recorder.commit([999])
        threads = [threading.Thread(target=work, args=(recorder, mine)) for mine in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run = open_run(tmp_path / "run")
    rows = dict(zip(run.samples(0).tolist(), run.attention(gates[0], 0), strict=True))
    assert rows.keys() == stored.keys() | {999}
    assert all(np.allclose(rows[sample], values, rtol=1e-5) for sample, values in stored.items())
    assert all("thread" in error or "commit" in error for error in errors)
    record_property("batches of two threads that run one network: each thread's own rows, or refused", 24)


def test_a_thread_in_the_middle_of_a_forward_pass_keeps_another_out(tmp_path, net, gates):
    inside, leave, errors = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        assert leave.wait(30)

    def other():
        assert inside.wait(30)
        try:
            net(IMAGES[4:8])
        except RuntimeError as error:
            errors.append(str(error))
        leave.set()

    with Recorder(net, gates, tmp_path / "run") as recorder:
        handle = net.head.register_forward_pre_hook(wait)
        thread = threading.Thread(target=other)
        thread.start()
        net(IMAGES[:4])
        thread.join()
        handle.remove()
        recorder.commit(range(4))
    assert ["two threads run this network" in error for error in errors] == [True]
    found = open_run(tmp_path / "run").attention(gates[0], 0)
    np.testing.assert_allclose(found, attention_of(net, IMAGES[:4]), rtol=1e-6)


def test_copies_made_while_recording_are_not_read_and_can_be_pickled(tmp_path, net, gates, record_property):
    with Recorder(net, gates, tmp_path / "run") as recorder, torch.no_grad():
        copied, read_back = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        torch.save(net, tmp_path / "net.pt")
        averaged = torch.optim.swa_utils.AveragedModel(net)
        net(IMAGES[:4])
        for other in (copied, read_back, averaged):
            other(IMAGES[4:8])
            nn.init.zeros_((other.module if other is averaged else other).linear.weight)
            other(IMAGES[4:8])
        recorder.commit(range(4))
        expected = net(IMAGES[:4])
        recorder.commit(range(4), epoch=1)
    found = open_run(tmp_path / "run").attention(gates[0], 0)
    np.testing.assert_allclose(found, attention_of(net, IMAGES[:4]), rtol=1e-6)
    saved = torch.load(tmp_path / "net.pt", weights_only=False)  # of this test's own making
    torch.testing.assert_close(saved(IMAGES[:4]), expected)
    record_property("copies of a network that were run while it was recorded: not read", 3)


def test_a_network_is_folded_while_it_is_recorded(tmp_path, net, gates):
    constants = {gates[0]: torch.linspace(0.2, 0.9, 8)}
    with Recorder(net, gates, tmp_path / "run") as recorder, torch.no_grad():
        folded, _ = fold(net, constants, IMAGES[:3])
        net(IMAGES[:4])
        folded(IMAGES[4:8])
        recorder.commit(range(4))
    np.testing.assert_allclose(
        open_run(tmp_path / "run").attention(gates[0], 0), attention_of(net, IMAGES[:4]), rtol=1e-6
    )
    with torch.no_grad():
        features = net.convolution(IMAGES) * constants[gates[0]][:, None, None]
        torch.testing.assert_close(folded(IMAGES), net.head(features.mean((2, 3))))
        assert not torch.allclose(folded(IMAGES), net(IMAGES), rtol=1e-3)


class Checkpointed(Net):
    """Computes its features a second time in the backward pass, to save memory."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.runs = reentrant, 0

    def forward(self, images):
        return self.head(checkpointing.checkpoint(self.pooled, images, use_reentrant=self.reentrant))

    def pooled(self, images):
        self.runs += 1
        features = self.convolution(images)
        return (features * torch.sigmoid(self.linear(features.mean((2, 3))))[:, :, None, None]).mean((2, 3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_that_runs_again_in_the_backward_pass_is_recorded_once(tmp_path, reentrant):
    torch.manual_seed(0)
    net, images = Checkpointed(reentrant).eval(), IMAGES.clone().requires_grad_()
    gates = find_gates(net, images[:3])
    with Recorder(net, gates, tmp_path / "run") as recorder:
        net.runs = 0
        for start in (0, 8):
            loss = net(images[start : start + 8]).square().sum()
            recorder.commit(range(start, start + 8))
            loss.backward()
    np.testing.assert_allclose(open_run(tmp_path / "run").attention(gates[0], 0), attention_of(net, IMAGES), rtol=1e-6)
    assert net.runs == 4


@pytest.mark.equal_bits
def test_a_run_that_began_eager_goes_on_with_a_part_compiled(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Net()).eval()
    with Recorder(network, find_gates(network, IMAGES[:3]), tmp_path / "run") as recorder:
        recorder.record([IMAGES])
    network[1] = torch.compile(network[1], backend="eager")
    with Recorder(network, find_gates(network, IMAGES[:3]), tmp_path / "run") as recorder:
        recorder.record([IMAGES], epoch=1)
    run = open_run(tmp_path / "run")
    np.testing.assert_array_equal(*(run.attention(run.gates[0], epoch) for epoch in (0, 1)))
    np.testing.assert_allclose(run.attention(run.gates[0], 1), attention_of(network[1], network[0](IMAGES)), rtol=1e-5)


# ---- loaders ----------------------------------------------------------------------------------------------


class Keyed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, scale=None):
        return self.net(pixel_values if scale is None else pixel_values * scale[:, None, None, None])


def test_record_takes_pairs_images_alone_and_mappings(tmp_path, net, gates):
    labels, keyed = torch.arange(16) % 2, Keyed(net)
    ids = torch.arange(16) + 100
    halves = [slice(0, 8), slice(8, 16)]
    loaders = {
        "triples": (net, [(IMAGES[half], labels[half], ids[half]) for half in halves]),
        "pairs": (net, [(IMAGES[half], labels[half]) for half in halves]),
        "images": (net, [IMAGES[half] for half in halves]),
        "mappings": (keyed, [{"pixel_values": IMAGES[half], "labels": labels[half]} for half in halves]),
        "with ids": (keyed, [{"pixel_values": IMAGES[h], "label": labels[h], "sample_ids": ids[h]} for h in halves]),
    }
    for name, (model, loader) in loaders.items():
        found_gates = gates if model is net else find_gates(keyed, {"pixel_values": IMAGES[:3]})
        with Recorder(model, found_gates, tmp_path / name) as recorder:
            recorder.record(loader)
        run = open_run(tmp_path / name)
        np.testing.assert_allclose(run.attention(found_gates[0], 0), attention_of(net, IMAGES), rtol=1e-6)
        first = 100 if name in ("triples", "with ids") else 0
        assert run.samples(0).tolist() == list(range(first, first + 16))
        assert run.labels(0).tolist() == ([-1] * 16 if name == "images" else labels.tolist())


def test_accelerates_loop_records_what_a_plain_one_does(tmp_path, net, gates):
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(16)), 6)
    prepared, batches = accelerator.prepare(net, loader)
    with Recorder(prepared, gates, tmp_path / "run") as recorder, torch.no_grad():
        for images, ids in batches:
            prepared(images)
            recorder.commit(ids)
        recorder.record(batches, epoch=1)
    run = open_run(tmp_path / "run")
    for epoch in (0, 1):
        np.testing.assert_allclose(run.attention(gates[0], epoch), attention_of(net, IMAGES), rtol=1e-6)


# ---- Lightning --------------------------------------------------------------------------------------------


class Task(lightning.LightningModule):
    def __init__(self, die_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.die_at = Net(), die_at

    def training_step(self, batch, index):
        if self.global_step == self.die_at:
            os._exit(9)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1] % 2)

    def validation_step(self, batch, index, dataloader_idx=0):
        self.net(batch[0])

    def test_step(self, batch, index):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def data(images=IMAGES, labels=None, size=4):
    return DataLoader(TensorDataset(images, torch.arange(len(images)) if labels is None else labels), size)


def trainer_of(folder, task, run, epochs=2, callback=None, **options):
    recording = callback or recording_of(task, run)
    keep = lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[recording, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def recording_of(task, run, **options):
    return RecorderCallback(None, find_gates(task.net, IMAGES[:3]), run, model=task.net, **options)


@pytest.fixture(autouse=True)
def _without_lightnings_advice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch.utils._pytree")
        warnings.filterwarnings(
            "ignore", message=".*LeafSpec.*|.*does not have many workers.*|.*checkpoint directory.*"
        )
        warnings.filterwarnings("ignore", category=lightning.utilities.rank_zero.LightningDeprecationWarning)
        yield


def assert_same_runs(first, second):
    one, two = open_run(first), open_run(second)
    assert one.epochs == two.epochs
    assert one.steps == two.steps
    for epoch in one.epochs:
        order = [np.argsort(run.samples(epoch)) for run in (one, two)]
        np.testing.assert_array_equal(one.samples(epoch)[order[0]], two.samples(epoch)[order[1]])
        for gate in one.gates:
            values = [run.attention(gate, epoch)[o] for run, o in zip((one, two), order, strict=True)]
            np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-7)
    last = [one.attention(one.gates[0], epoch).tobytes() for epoch in one.epochs]
    assert len(set(last)) == len(last)  # epochs differ, so that equal runs mean something


def test_a_resumed_lightning_training_equals_one_that_was_never_stopped(tmp_path):
    task = Task()
    trainer_of(tmp_path / "whole", task, tmp_path / "a", epochs=4).fit(task, data(), data())
    task = Task()
    trainer_of(tmp_path / "parts", task, tmp_path / "b", epochs=3).fit(task, data(), data())
    for older in ("epoch=2.ckpt", "epoch=0.ckpt"):
        task = Task()
        checkpoint = tmp_path / "parts" / older
        trainer_of(tmp_path / older, task, tmp_path / "b", epochs=4).fit(task, data(), data(), ckpt_path=checkpoint)
        assert_same_runs(tmp_path / "a", tmp_path / "b")
    task = Task()
    trainer = trainer_of(tmp_path / "parts", task, tmp_path / "b")
    trainer.test(task, data(), ckpt_path=tmp_path / "parts" / "epoch=1.ckpt")
    with pytest.warns(UserWarning, match="holds epoch 1 already"):
        trainer.validate(task, data(), ckpt_path=tmp_path / "parts" / "epoch=1.ckpt")
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    trainer = trainer_of(tmp_path / "parts", task, tmp_path / "c")
    for epoch in (2, 0):
        trainer.validate(task, data(), ckpt_path=tmp_path / "parts" / f"epoch={epoch}.ckpt")
    found, whole = open_run(tmp_path / "c"), open_run(tmp_path / "a")
    assert found.epochs == [0, 2]
    for epoch in found.epochs:
        values = [run.attention(run.gates[0], epoch) for run in (found, whole)]
        np.testing.assert_allclose(*values, rtol=1e-6)


def test_a_new_training_is_kept_off_anothers_run_before_it_begins(tmp_path):
    task = Task()
    trainer_of(tmp_path, task, tmp_path / "run", epochs=1).fit(task, data(), data())
    before = open_run(tmp_path / "run").epochs
    task = Task(die_at=0)
    with refused(FileExistsError, "holds epochs up to 0", "resume", "overwrite=True"):
        trainer_of(tmp_path, task, tmp_path / "run").fit(task, data(), data())
    assert open_run(tmp_path / "run").epochs == before
    task = Task()
    again = recording_of(task, tmp_path / "run", overwrite=True)
    trainer_of(tmp_path, task, None, callback=again).fit(task, data(), data())
    assert open_run(tmp_path / "run").epochs == [0, 1]


def test_several_validations_an_epoch_are_recorded_apart_by_step(tmp_path):
    task = Task()
    trainer_of(tmp_path, task, tmp_path / "run", val_check_interval=0.5).fit(task, data(), data())
    run = open_run(tmp_path / "run")
    assert run.epochs == [2, 4, 6, 8]
    assert run.steps == {2: 2, 4: 4, 6: 6, 8: 8}
    task = Task()
    trainer_of(tmp_path / "other", task, tmp_path / "whole").fit(task, data(), data())
    whole = open_run(tmp_path / "whole")
    assert whole.steps == {0: 4, 1: 8}
    for epoch, step in whole.steps.items():
        np.testing.assert_allclose(run.attention(run.gates[0], step), whole.attention(run.gates[0], epoch), rtol=1e-6)


def test_validations_around_a_training_leave_its_epochs_alone(tmp_path):
    task = Task()
    trainer = trainer_of(tmp_path, task, tmp_path / "run")
    trainer.validate(task, data())
    before = open_run(tmp_path / "run")
    assert before.steps == {0: 0}
    with pytest.warns(UserWarning, match="epoch 0 of run .* recorded after 0 steps, is recorded again"):
        trainer.fit(task, data(), data())
    trainer.validate(task, data())
    assert open_run(tmp_path / "run").steps == {0: 4, 1: 8}
    task = Task()
    by_step = recording_of(task, tmp_path / "steps", by="step")
    trainer = trainer_of(tmp_path, task, None, callback=by_step)
    trainer.validate(task, data())
    trainer.fit(task, data(), data())
    trainer.validate(task, data())
    assert open_run(tmp_path / "steps").epochs == [0, 4, 8]


def test_validation_loaders_are_never_mixed(tmp_path):
    loaders = [data(IMAGES[:7]), data(IMAGES[7:] * 2)]
    task = Task()
    trainer_of(tmp_path, task, tmp_path / "run").fit(task, data(), loaders)
    for number, images in enumerate((IMAGES[:7], IMAGES[7:] * 2)):
        run = open_run(tmp_path / "run" / f"validation-{number}")
        assert run.epochs == [0, 1]
        assert run.samples(1).tolist() == list(range(len(images)))
        np.testing.assert_allclose(run.attention(run.gates[0], 1), attention_of(task.net, images), rtol=1e-6)
    task = Task()
    kept = recording_of(task, tmp_path / "second", dataloader=1)
    trainer_of(tmp_path, task, None, callback=kept).fit(task, data(), loaders)
    run = open_run(tmp_path / "second")
    np.testing.assert_allclose(run.attention(run.gates[0], 1), attention_of(task.net, IMAGES[7:] * 2), rtol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [torch.eye(16), torch.arange(16.0), torch.arange(16)[:, None], torch.arange(16) > 3],
    ids=lambda x: x.dtype,
)
def test_labels_of_other_forms_are_unknown_and_said_once(tmp_path, labels):
    task = Task()
    task.training_step = lambda batch, batch_idx: task.net(batch[0]).square().mean()
    with pytest.warns(UserWarning, match="recorded as unknown") as told:
        trainer_of(tmp_path, task, tmp_path / "run").fit(task, data(), data(labels=labels))
    assert sum("as unknown" in str(each.message) for each in told) == 1
    run = open_run(tmp_path / "run")
    assert run.epochs == [0, 1]
    assert (run.labels(1) == -1).all()


def test_what_cannot_be_recorded_fails_in_the_sanity_check(tmp_path):
    task = Task(die_at=0)
    twice = task.net
    task.validation_step = lambda batch, batch_idx: (twice(batch[0]), twice(batch[0].flip(-1)))
    with refused(RuntimeError, "several forward passes"):
        trainer_of(tmp_path, task, tmp_path / "run").fit(task, data(), data())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", [lightning.Callback, transformers.TrainerCallback])
def test_every_hook_of_the_trainers_is_there_and_no_misspelt_one(tmp_path, base):
    callback = RecorderCallback(None, [], tmp_path / "run")
    hooks = [name for name in dir(base) if name.startswith("on_")]
    assert len(hooks) > 10
    for name in hooks:
        assert callable(getattr(callback, name))
    with pytest.raises(AttributeError, match="on_validaton_epoch_end"):
        callback.on_validaton_epoch_end(None, None)


# ---- several processes ------------------------------------------------------------------------------------


def train_on(devices, folder, run, die_at=None, checkpoint=None):
    """Train as one device of several, each a process of its own, or as the only one."""
    task = Task(die_at=die_at)
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer = trainer_of(folder, task, run, epochs=3, **options)
    trainer.fit(task, data(size=16 // devices), data(IMAGES[:11], size=3), ckpt_path=checkpoint)  # Lightning shuffles


@pytest.mark.slow
def test_two_devices_killed_and_resumed_record_what_one_process_does(forks, tmp_path):
    said, job = tmp_path / "said", tmp_path / "job.py"
    train_on(1, tmp_path / "one", tmp_path / "whole")
    job.write_text("import sys; from tests.test_loops import train_on; train_on(2, *sys.argv[1:], die_at=2)")
    words = [sys.executable, str(job), str(tmp_path / "two"), str(tmp_path / "parts")]  # Lightning starts the other
    killed = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False, timeout=400
    )
    assert killed.returncode != 0  # in the third epoch
    assert open_run(tmp_path / "parts").epochs == [0, 1]
    for checkpoint in (tmp_path / "two" / "epoch=1.ckpt", tmp_path / "two" / "epoch=0.ckpt"):
        folder = tmp_path / checkpoint.name
        resumed = forks.team(train_on, 2, folder, tmp_path / "parts", None, checkpoint, said=said)
        assert ended(*resumed) == [0, 0], said.read_text()
        assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert sorted(open_run(tmp_path / "parts").samples(2)) == list(range(11))


# ---- transformers -----------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": i % 2}


def classifier():
    torch.manual_seed(0)
    configuration = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="y", num_labels=2
    )
    return transformers.RegNetForImageClassification(configuration)


def huggingface(folder, model, recording, evaluation, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 3,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        | options,
    )
    callbacks = [recording] if recording else []
    pictures = Pictures(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(7)))
    return transformers.Trainer(model, arguments, train_dataset=pictures, eval_dataset=evaluation, callbacks=callbacks)


PROBE = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(8))


@pytest.mark.equal_bits
def test_transformers_trainer_records_what_a_hand_written_hook_sees(tmp_path):
    model = classifier()
    gates = find_gates(model, {"pixel_values": PROBE[:3]})
    assert gates
    recording = RecorderCallback(None, gates, tmp_path / "run")
    trainer = huggingface(tmp_path / "out", model, recording, Pictures(PROBE))
    trainer.train()
    run = open_run(tmp_path / "run")
    assert run.epochs == [1, 2]
    assert run.steps == {1: 2, 2: 4}
    assert run.samples(2).tolist() == list(range(11))
    assert run.labels(2).tolist() == [i % 2 for i in range(11)]
    for gate in gates:
        seen = []
        handle = model.get_submodule(gate.source).register_forward_hook(
            lambda module, given, output: seen.append(output.detach().flatten(1).clone())  # noqa: B023
        )
        huggingface(tmp_path / "again", model, None, Pictures(PROBE)).evaluate()
        handle.remove()
        np.testing.assert_array_equal(run.attention(gate, 2), torch.cat(seen).numpy())
        assert not np.array_equal(run.attention(gate, 1), run.attention(gate, 2))
    plain = classifier()
    huggingface(tmp_path / "plain", plain, None, Pictures(PROBE)).train()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_transformers_trainer_resumes_and_evaluates_by_step_and_by_data_set(tmp_path):
    model = classifier()
    gates = find_gates(model, {"pixel_values": PROBE[:3]})
    sets = {"cats": Pictures(PROBE[:5]), "dogs": Pictures(PROBE[5:])}
    by_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = huggingface(tmp_path / "a", model, RecorderCallback(None, gates, tmp_path / "whole"), sets, **by_step)
    trainer.train()
    for name, images in (("cats", PROBE[:5]), ("dogs", PROBE[5:])):
        run = open_run(tmp_path / "whole" / name)
        assert run.epochs == [1, 2, 3, 4]
        assert len(run.samples(4)) == len(images)
    resumed = classifier()
    recording = RecorderCallback(None, gates, tmp_path / "whole")
    with refused(FileExistsError, "this training begins anew"):
        huggingface(tmp_path / "c", classifier(), recording, sets, **by_step).train()
    before = open_run(tmp_path / "whole" / "dogs").attention(gates[0], 4)
    trainer = huggingface(tmp_path / "b", resumed, recording, sets, **by_step)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    after = open_run(tmp_path / "whole" / "dogs")
    assert after.epochs == [1, 2, 3, 4]
    np.testing.assert_allclose(after.attention(gates[0], 4), before, rtol=1e-5)
