"""On a CUDA device: batches, captured training steps, recording, deploying, fusing and folding are those of the CPU."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import stripe
from stripe import asr
from stripe.capture import CapturedStep
from stripe.data import Loader, load_images
from stripe.folding import learn_constants, measure_gates
from stripe.models import create_model
from stripe.recipe import Recipe
from stripe.training import fit

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CONSTANTS = {"mean": (0.3,) * 3, "std": (0.3,) * 3}
FORMS = {
    "SE": {"module": "senet"},
    "ASR": {"module": "senet", "asr": True},
    "both": {"module": "senet", "asr": True, "both": True},
    "plain": {},
    "annealed": {"module": "senet"},
}


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions in float32 as on the CPU, not in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def images():
    return load_images("digits", "train", size=32, samples=300, **CONSTANTS)


def network(form="SE", seed=0):
    torch.manual_seed(seed)
    model = create_model("resnet", depth=20, num_classes=10, **FORMS[form])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if form == "annealed":  # within the fifteen steps of a training below
        return asr.anneal(model, torch.randn(2, 3, 32, 32), begin=3, end=9)
    return model


def error(a, b):
    return float((a.cpu().double() - b.cpu().double()).abs().max() / b.cpu().double().abs().max())


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_those_of_the_processor_bit_for_bit(images, train):
    loaders = [Loader(images, 64, train=train, seed=3, device=device) for device in ("cpu", "cuda")]
    for loader in loaders:
        loader.set_epoch(2)
    for mine, its in zip(*loaders, strict=True):
        assert its[0].is_cuda
        assert its[1].is_cuda
        assert all(torch.equal(a, b.cpu()) for a, b in zip(mine, its, strict=True))
    loaders[1].set_epoch(3)
    assert train != torch.equal(next(iter(loaders[0]))[0], next(iter(loaders[1]))[0].cpu())


@pytest.mark.parametrize(("form", "compile"), [*((form, False) for form in FORMS), ("SE", True), ("ASR", True)])
def test_a_captured_training_is_the_eager_one(images, tmp_path, form, compile, monkeypatch):
    def train(name, model=None, **options):
        model = model or network(form)
        loader = Loader(images, 64, train=True, seed=1, device="cuda")  # four batches of 64, one of 44
        # at this rate weights that differ by 1e-6 end 1e-4 apart; at 0.01 those that differ by 1e-7 end 0.1 apart
        recipe = Recipe(epochs=3, lr=1e-4, milestones=(2,), seed=1, **options)
        metrics = fit(model, loader, None, recipe, directory=tmp_path / name, description={}, progress=False)
        return model, metrics

    captured, metrics = train("captured", compile=compile)
    monkeypatch.setattr(CapturedStep, "_capture", lambda *_: None)
    eager, plain = train("eager")
    assert all(module._compiled_call_impl is None for module in captured.modules())
    assert error(torch.tensor(metrics["train_loss"]), torch.tensor(plain["train_loss"])) < 1e-5
    for (name, mine), its in zip(captured.state_dict().items(), eager.state_dict().values(), strict=True):
        assert mine.shape == its.shape
        assert name.endswith(("num_batches_tracked", ".steps")) == (mine.dtype == torch.int64)
        assert torch.equal(mine, its) if mine.dtype == torch.int64 else error(mine, its) < 1e-3, name
    start = network(form).state_dict()["fc.weight"]
    assert error(captured.fc.weight, start) > 5e-3  # it has moved by more than the two differ


def test_a_network_that_cannot_be_captured_is_trained_without(images, tmp_path):
    class Looking(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) else -y  # waits for the device

    torch.manual_seed(0)
    model = Looking(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    before = copy.deepcopy(model[-1].weight)
    loader = Loader(images, 64, train=True, seed=1, device="cuda")
    with pytest.warns(UserWarning, match="cannot be captured"):
        metrics = fit(model, loader, None, Recipe(epochs=2), directory=tmp_path, description={}, progress=False)
    assert np.isfinite(metrics["train_loss"]).all()
    assert error(model[-1].weight, before) > 1e-3


def test_a_captured_step_never_waits_for_the_device(images):
    model = network().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)

    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, labels):
            loss = nn.functional.cross_entropy(self.model(x), labels, reduction="sum")
            return torch.stack([loss, loss.detach(), loss.detach()])

    step, loader = CapturedStep(Objective(), optimizer), Loader(images, 64, train=True, device="cuda")
    batch = next(iter(loader))
    step(*batch[:2], 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, labels, _ in loader:
            if len(x) == 64:
                scores = step(x, labels, 0.1)
        with pytest.raises(RuntimeError, match="synchronizing"):
            scores.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scores.isfinite().all()


def test_the_rate_of_a_captured_step_counts(images):
    batch = next(iter(Loader(images, 64, train=True, device="cuda")))[:2]
    moved = []
    for rate in (0.0, 0.1):
        model = network().cuda()
        before = copy.deepcopy(model.fc.weight)

        class Objective(nn.Module):
            def __init__(self, model=model):
                super().__init__()
                self.model = model

            def forward(self, x, labels):
                loss = nn.functional.cross_entropy(self.model(x), labels, reduction="sum")
                return torch.stack([loss, loss.detach(), loss.detach()])

        step = CapturedStep(Objective(), torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, fused=True))
        step(*batch, rate)
        moved.append(float((model.fc.weight - before).detach().abs().max()))
    assert moved[0] == 0
    assert moved[1] > 0


def record(model, images, path, device, **options):
    gates = stripe.find_gates(model, next(iter(Loader(images, 2, device=device)))[0])
    with stripe.Recorder(model, gates, path, squeeze=True, **options) as recorder:
        recorder.record(Loader(images, 64, device=device))
    return stripe.open_run(path)


def test_recording_is_that_of_the_processor(images, tmp_path):
    model = network().eval()
    ours = record(copy.deepcopy(model).cuda(), images, tmp_path / "cuda", "cuda")
    theirs = record(model, images, tmp_path / "cpu", "cpu")
    assert ours.samples(0).tolist() == theirs.samples(0).tolist()
    assert ours.labels(0).tolist() == theirs.labels(0).tolist()
    for gate in theirs.gates:
        for mine, its in ((ours.attention, theirs.attention), (ours.squeeze, theirs.squeeze)):
            assert np.abs(mine(gate.name, 0) - its(gate.name, 0)).max() < 1e-4 * np.abs(its(gate.name, 0)).max()
    other = record(network(seed=1).eval(), images, tmp_path / "other", "cpu")
    gate = theirs.gates[-1].name
    assert np.abs(ours.attention(gate, 0) - other.attention(gate, 0)).max() > 1e-2


def test_recording_a_compiled_network_reads_its_gates(images, tmp_path):
    model = network().eval().cuda()
    compiled = torch.compile(model)
    x = next(iter(Loader(images, 64, device="cuda")))[0]
    with torch.inference_mode():
        compiled(x)
    theirs = record(model, images, tmp_path / "eager", "cuda")
    gate, said = theirs.gates[0].name, ""
    try:
        ours = record(compiled, images, tmp_path / "compiled", "cuda")
    except RuntimeError as refused:
        said = str(refused)
    else:
        assert np.abs(ours.attention(gate, 0) - theirs.attention(gate, 0)).max() < 1e-4
    assert not said or "uncompiled" in said


def test_the_memory_of_recording_does_not_grow(images, tmp_path):
    model = network().eval().cuda()
    gates = stripe.find_gates(model, next(iter(Loader(images, 2, device="cuda")))[0])
    taken = []
    loader = Loader(images, 30, device="cuda")
    with stripe.Recorder(model, gates, tmp_path / "run") as recorder, torch.inference_mode():
        for x, labels, ids in loader:
            model(x)
            recorder.commit(ids, labels)
            taken.append(torch.cuda.memory_allocated())
    assert max(taken[2:]) <= taken[1]


def test_deployed_fused_and_folded_networks_are_those_of_the_processor(images):
    x = next(iter(Loader(images, 8)))[0]
    for form in ("ASR", "SE"):
        model = network(form).eval()
        with torch.inference_mode():
            wanted = model(x)
            if form == "ASR":
                for convert in (asr.deploy, asr.fuse):
                    assert error(convert(copy.deepcopy(model).cuda())(x.cuda()), wanted) < 1e-4
                    assert error(convert(network(form, seed=1).cuda().eval())(x.cuda()), wanted) > 1e-2
        if form == "SE":
            gates = stripe.find_gates(model, x)
            constants = {
                gate.name: torch.rand(gate.channels, generator=torch.Generator().manual_seed(0)) for gate in gates
            }
            folded, _ = stripe.fold(model, constants, x)
            moved, _ = stripe.fold(copy.deepcopy(model).cuda(), {n: c.cuda() for n, c in constants.items()}, x.cuda())
            with torch.inference_mode():
                assert error(moved(x.cuda()), folded(x)) < 1e-4
                assert error(moved(x.cuda()), wanted) > 1e-2


@pytest.mark.parametrize("cudnn", [False, True])
def test_constants_are_learned_as_on_the_processor(images, cudnn):
    def learned(device, steps):
        model, loader = network().eval().to(device), Loader(images, 64, device=device)
        x = next(iter(loader))[0][:2]
        gates = stripe.find_gates(model, x)
        uses = measure_gates(model, gates, loader)
        return learn_constants(model, gates, uses, x, loader, steps=steps)

    def distance(a, b):  # the largest one jumps with the last bit of a weight: Adam follows a gradient's sign near 0
        return np.sqrt(np.mean((a - b) ** 2)) / np.abs(a).max()

    with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
        ours = learned("cuda", 10)
    theirs, begun = learned("cpu", 10), learned("cpu", 1)
    for gate, its in theirs.items():
        assert distance(its, ours[gate]) < 5e-4
        assert distance(its, begun[gate]) > 5e-3
        if not cudnn:
            assert np.abs(ours[gate] - its).max() < 1e-3 * np.abs(its).max()
            assert np.abs(ours[gate] - begun[gate]).max() > 1e-2 * np.abs(its).max()
