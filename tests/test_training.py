import dataclasses
import math
import pickle
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stripe.cli import main
from stripe.data import ImageSet, Loader, load_images
from stripe.recipe import Recipe
from stripe.training import Evaluation, TensorBoard, evaluate, fit, processes
from tests.forked import ended

SHORT = Recipe(epochs=4, lr=0.05, milestones=(1, 3), seed=7)
CONSTANTS = {"mean": (0.3,) * 3, "std": (0.3,) * 3}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Returning(nn.Module):
    """A network that hands its logits out in some shape of output."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = network(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [
    lambda y: {"loss": y.mean(), "logits": y}, lambda y: {"out": y, "aux": -y}, lambda y: (y, -y), lambda y: [y],
    lambda y: Output(y.mean(), y),
])  # fmt: skip
def test_networks_whose_output_holds_the_logits_are_evaluated(wrap):
    loader = Loader(load_images("digits", "test", size=16, samples=40), 20)
    assert evaluate(Returning(wrap).eval(), loader) == evaluate(network().eval(), loader)
    assert evaluate(Returning(lambda y: wrap(-y)).eval(), loader).loss != evaluate(network().eval(), loader).loss
    with pytest.raises(ValueError, match="the network returned str: expected logits"):
        evaluate(Returning(lambda y: "y").eval(), loader)


@pytest.fixture(scope="module")
def parts() -> tuple[ImageSet, ImageSet]:
    return load_images("digits", "train", size=8, samples=160, **CONSTANTS).hold_out(60, 0)


def train(parts, directory: Path, recipe: Recipe = SHORT, *, model: nn.Module | None = None, **options):
    """Train the small network as a command would; options go to fit."""
    model = network() if model is None else model
    loader = Loader(parts[0], 32, train=True, seed=recipe.seed)
    options = {"description": {"network": "small"}, "progress": False} | options
    return fit(model, loader, Loader(parts[1], 50), recipe, directory=directory, **options)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


class At:
    """Do something after an epoch."""

    def __init__(self, epoch: int, action) -> None:
        self.epoch, self.action = epoch, action

    def on_epoch_end(self, model, epoch, metrics) -> None:
        if epoch == self.epoch:
            self.action()


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def interrupt() -> None:
    signal.default_int_handler(signal.SIGINT, None)  # what Ctrl-C runs, also where a shell has it ignored


# ---- evaluate ----------------------------------------------------------------------------------------------


def slow_evaluation(model: nn.Module, images: ImageSet) -> tuple[float, float]:
    losses, hits = [], []
    for pixels, label in zip(images.images, images.labels.tolist(), strict=True):
        with torch.no_grad():
            logits = model((pixels[None].float() / 255 - 0.3) / 0.3)[0].double()
        losses.append(-logits.log_softmax(0)[label].item())
        hits.append(logits.argmax().item() == label)
    return float(np.mean(losses)), 100 * float(np.mean(hits))


def test_evaluation_equals_a_loop(parts):
    model = network().eval()
    result = evaluate(model, Loader(parts[1], 25))
    loss, accuracy = slow_evaluation(model, parts[1])
    assert result.samples == 60
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.loss != pytest.approx(slow_evaluation(model.train(), parts[1])[0], rel=1e-3)


def test_evaluation_puts_every_flag_back(parts):
    model = network()
    model[1].eval()  # a frozen norm
    flags = [module.training for module in model.modules()]
    evaluate(model, Loader(parts[1], 25), progress=True)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(IndexError):
        evaluate(model, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 99]))])
    assert [module.training for module in model.modules()] == flags


def test_evaluation_needs_samples():
    with pytest.raises(ValueError, match="gave no sample with a label"):
        evaluate(network(), [])


def test_evaluation_of_a_model_without_parameters():
    batch = (torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert evaluate(nn.Identity(), [batch]).accuracy == 75


# ---- fit ---------------------------------------------------------------------------------------------------


def test_training_learns(tmp_path):
    large = load_images("digits", "train", samples=300, **CONSTANTS).hold_out(100, 0)
    metrics = train(large, tmp_path, Recipe(epochs=8, lr=0.1))
    assert metrics["train_loss"].iloc[-1] < metrics["train_loss"].iloc[0] - 0.3
    assert metrics["val_accuracy"].iloc[-1] > 30  # ten classes


def test_training_equals_plain_sgd(parts, tmp_path):
    recipe = Recipe(epochs=2, lr=0.1, nesterov=True, milestones=(1,), weight_decay=0.01, channels_last=False)
    model, reference = (nn.Sequential(*(network()[i] for i in (0, 2, 4, 5, 6))) for _ in range(2))
    train(parts, tmp_path, recipe, model=model)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, 0.9, 0, 0.01, nesterov=True)
    loader = Loader(parts[0], 32, train=True, seed=0)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = 0.1 if epoch == 1 else 0.01
        for images, labels, _ in loader:
            optimizer.zero_grad()
            F.cross_entropy(reference(images), labels).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(ours, dict(reference.named_parameters())["0.weight"].mean())


def test_files_of_a_training(parts, tmp_path):
    model = network()
    metrics = train(parts, tmp_path, model=model, save_every=2, progress=True)
    assert list(metrics) == ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    np.testing.assert_allclose(metrics["lr"], [0.05, 0.005, 0.005, 0.0005])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "metrics.csv"), metrics)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert names == ["best.pt", "epoch=0002.pt", "epoch=0004.pt", "last.pt"]

    last = load(tmp_path / "checkpoints" / "last.pt")
    assert last["epoch"] == 4
    assert last["description"] == {"network": "small"}
    assert last["acc"] == metrics["val_accuracy"].iloc[-1]
    assert last["best_acc"] == metrics["val_accuracy"].max()
    assert last["recipe"]["milestones"] == (1, 3)
    copy = network(1)
    copy.load_state_dict(load(tmp_path / "checkpoints" / "epoch=0004.pt")["state_dict"])
    result = evaluate(copy, Loader(parts[1], 50))
    assert result == evaluate(model, Loader(parts[1], 50))
    assert result == Evaluation(metrics["val_loss"].iloc[-1], metrics["val_accuracy"].iloc[-1], 60)
    assert result != evaluate(network(1), Loader(parts[1], 50))


def test_best_is_the_first_of_the_highest_validation_accuracies(parts, tmp_path):
    metrics = train(parts, tmp_path, Recipe(epochs=6, lr=0.3), save_every=0)
    best = load(tmp_path / "checkpoints" / "best.pt")
    assert best["epoch"] == metrics["val_accuracy"].idxmax() + 1 < 6
    assert best["acc"] == best["best_acc"] == metrics["val_accuracy"].max()
    assert "optimizer" not in best


def test_best_is_the_earlier_of_equals(parts, tmp_path):
    still = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    metrics = train(parts, tmp_path, Recipe(epochs=2, lr=1e-12), model=still)
    assert metrics["val_accuracy"].nunique() == 1
    assert load(tmp_path / "checkpoints" / "best.pt")["epoch"] == 1


def test_a_reader_sees_whole_files_while_they_are_replaced(parts, tmp_path):
    train(parts, tmp_path, Recipe(epochs=1))
    last = tmp_path / "checkpoints" / "last.pt"
    before = last.read_bytes()
    with last.open("rb") as reader:
        train(parts, tmp_path, Recipe(epochs=2), resume=last)
        assert reader.read() == before
    assert last.read_bytes() != before


def test_without_validation(parts, tmp_path):
    metrics = fit(
        network(), Loader(parts[0], 32, train=True), None, SHORT, directory=tmp_path, description={}, progress=False
    )
    assert metrics["val_accuracy"].isna().all()
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    assert math.isnan(load(tmp_path / "checkpoints" / "last.pt")["acc"])


@pytest.mark.equal_bits
def test_same_seed_same_bytes(parts, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(parts, tmp_path / name, Recipe(epochs=2, seed=seed))
    first, same, other = ((tmp_path / name / "metrics.csv").read_bytes() for name in "abc")
    assert first == same
    assert first != other


@pytest.mark.equal_bits
def test_callbacks_see_the_model_and_disturb_nothing(parts, tmp_path):
    model, seen = network(), []

    class Look:
        def on_epoch_end(self, given, epoch, metrics):
            torch.randn(1000)  # random numbers drawn here must not reach the training
            assert not (tmp_path / "looked" / "checkpoints" / f"epoch={epoch:04d}.pt").exists()
            seen.append((given is model, any(module.training for module in given.modules()), epoch, dict(metrics)))

    metrics = train(parts, tmp_path / "looked", model=model, callbacks=[Look()])
    train(parts, tmp_path / "alone")
    assert [row[:3] for row in seen] == [(True, False, epoch) for epoch in (1, 2, 3, 4)]
    assert [row[3] for row in seen] == metrics.to_dict("records")
    looked, alone = (tmp_path / name / "metrics.csv" for name in ("looked", "alone"))
    assert looked.read_bytes() == alone.read_bytes()
    assert not model.training


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_close_but_not_the_same(parts, tmp_path, amp):
    full = train(parts, tmp_path / "full")
    mixed = train(parts, tmp_path / "mixed", Recipe(**{**vars(SHORT), "amp": amp}))
    difference = (full["val_loss"] - mixed["val_loss"]).abs().max()
    assert 0 < difference < 0.05


def test_frozen_parameters_stay(parts, tmp_path):
    model = network()
    model[0].requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train(parts, tmp_path, Recipe(epochs=1), model=model)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"1.weight", "1.bias", "6.weight", "6.bias"}


def test_no_decay_exempts_by_name(parts, tmp_path):
    norms: dict[tuple[str, ...], float] = {}
    for number, exempt in enumerate([(), ("6.*", "1.bias")]):
        model = network()
        recipe = Recipe(epochs=1, lr=0.1, momentum=0.0, weight_decay=5.0, no_decay=exempt)
        train(parts, tmp_path / str(number), recipe, model=model)
        norms[exempt] = model[6].weight.norm().item()
        groups = load(tmp_path / str(number) / "checkpoints" / "last.pt")["optimizer"]["param_groups"]
        assert [(len(group["params"]), group["weight_decay"]) for group in groups] == (
            [(3, 5.0), (3, 0.0)] if exempt else [(6, 5.0), (0, 0.0)]
        )
    assert norms[()] < 0.3 * norms[("6.*", "1.bias")]


# ---- resume ------------------------------------------------------------------------------------------------


def stopped_and_resumed(parts, directory: Path, recipe: Recipe, change=lambda checkpoint: None) -> nn.Module:
    """Interrupt in epoch 3, before it is saved; resume in a new model, after a change to the checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train(parts, directory, recipe, callbacks=[At(3, interrupt)])
    last = directory / "checkpoints" / "last.pt"
    checkpoint = load(last)
    assert checkpoint["epoch"] == 2
    change(checkpoint)
    torch.save(checkpoint, last)
    model = network(99)
    train(parts, directory, recipe, model=model, resume=last)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.equal_bits
@pytest.mark.parametrize("scheduler", ["step", "cosine", "onecycle"])
def test_resumed_training_equals_an_undisturbed_one(parts, tmp_path, scheduler):
    recipe = Recipe(**{**vars(SHORT), "scheduler": scheduler})
    undisturbed = network()
    metrics = train(parts, tmp_path / "whole", recipe, model=undisturbed)
    resumed = stopped_and_resumed(parts, tmp_path / "halves", recipe)
    assert same_weights(resumed, undisturbed)
    whole, halves = (tmp_path / name / "metrics.csv" for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()
    best, again = (load(tmp_path / name / "checkpoints" / "best.pt") for name in ("whole", "halves"))
    assert best["epoch"] == again["epoch"]
    assert metrics["epoch"].tolist() == [1, 2, 3, 4]


def forget_momentum(checkpoint: dict) -> None:
    checkpoint["optimizer"]["state"] = {}


def forget_statistics(checkpoint: dict) -> None:
    checkpoint["state_dict"]["1.running_mean"].zero_()


@pytest.mark.parametrize("change", [forget_momentum, forget_statistics])
def test_a_forgetful_resume_differs(parts, tmp_path, change):
    undisturbed = network()
    train(parts, tmp_path / "whole", model=undisturbed)
    assert not same_weights(stopped_and_resumed(parts, tmp_path / "halves", SHORT, change), undisturbed)


def test_resume_follows_the_recipe_given(parts, tmp_path):
    train(parts, tmp_path, Recipe(epochs=1, lr=0.05, weight_decay=0.1))
    last = tmp_path / "checkpoints" / "last.pt"
    metrics = train(parts, tmp_path, Recipe(epochs=2, lr=0.01, momentum=0.5), resume=last)
    assert metrics["lr"].tolist() == [0.05, 0.01]
    group = load(last)["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 1e-4)


def test_resume_forgets_later_rows_and_may_have_nothing_to_do(parts, tmp_path):
    train(parts, tmp_path)
    kept = tmp_path / "kept.pt"
    train(parts, tmp_path / "other", Recipe(**{**vars(SHORT), "epochs": 2}))
    (tmp_path / "other" / "checkpoints" / "last.pt").rename(kept)
    metrics = train(parts, tmp_path, Recipe(**{**vars(SHORT), "epochs": 2}), resume=kept)
    assert len(metrics) == 2
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "metrics.csv"), metrics)


def test_a_second_training_does_not_overwrite_the_first(parts, tmp_path):
    train(parts, tmp_path, Recipe(epochs=1))
    with pytest.raises(FileExistsError, match="holds a training already: resume its last.pt"):
        train(parts, tmp_path, Recipe(epochs=1))


# ---- bad input ---------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.fixture
def checkpoint(parts, tmp_path) -> Path:
    train(parts, tmp_path / "first", Recipe(epochs=1))
    return tmp_path / "first" / "checkpoints" / "last.pt"


def refusal(parts, directory: Path, resume: Path, kind: type[Exception] = ValueError, **options) -> str:
    """Return the message with which resuming is refused, one line, nothing written."""
    with pytest.raises(kind) as caught:
        train(parts, directory, resume=resume, **options)
    assert "\n" not in str(caught.value)
    assert not (directory / "metrics.csv").exists()
    return str(caught.value)


def test_missing_checkpoint(parts, tmp_path):
    assert "nowhere.pt" in refusal(parts, tmp_path, tmp_path / "nowhere.pt", FileNotFoundError)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"epoch,lr\n1,0.1\n"])
def test_damaged_checkpoint(parts, tmp_path, checkpoint, damage):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert "is no checkpoint, or was cut short" in refusal(parts, tmp_path, checkpoint)


def test_checkpoint_with_code_is_not_executed(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        write({"state_dict": Bomb()}, tmp_path / "bomb.pt")
        assert "is no checkpoint" in refusal(parts, tmp_path, tmp_path / "bomb.pt")
    assert not Path("exploded").exists()
    pickle.loads((tmp_path / "bomb.pt").read_bytes())
    assert Path("exploded").exists()  # it would have gone off


def test_checkpoint_without_optimizer(parts, tmp_path, checkpoint):
    message = refusal(parts, tmp_path, checkpoint.with_name("epoch=0001.pt"))
    assert "lacks metrics, optimizer, scaler" in message
    torch.save([1, 2, 3], tmp_path / "list.pt")
    assert "is no checkpoint" in refusal(parts, tmp_path, tmp_path / "list.pt")


def test_checkpoint_of_another_network(parts, tmp_path, checkpoint):
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert "is of another training" in refusal(parts, tmp_path, checkpoint, model=other)
    assert "does not fit this network" in refusal(parts, tmp_path, checkpoint, model=other, allow_changed=True)


def test_checkpoint_of_another_grouping(parts, tmp_path, checkpoint):
    recipe = Recipe(epochs=2, no_decay=("1.*",))
    assert "does not fit this network and recipe" in refusal(parts, tmp_path, checkpoint, recipe=recipe)


def test_diverging_training_stops_and_keeps_its_files(parts, tmp_path):
    recipe = Recipe(epochs=3, lr=0.05)
    train(parts, tmp_path, Recipe(epochs=1, lr=0.05))
    last = tmp_path / "checkpoints" / "last.pt"
    before = content(tmp_path)
    with pytest.raises(
        FloatingPointError, match=r"^training loss is (nan|inf) in epoch 2 at learning rate 1e\+30: lower"
    ):
        train(parts, tmp_path, Recipe(**{**vars(recipe), "lr": 1e30}), resume=last)
    assert content(tmp_path) == before


def test_full_disk_leaves_the_last_epoch(parts, tmp_path):
    """A limit on file size stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = {}

    def fill() -> None:
        before.update(content(tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(OSError, match="File too large"):
            train(parts, tmp_path, callbacks=[At(2, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert content(tmp_path) == before
    assert load(tmp_path / "checkpoints" / "last.pt")["epoch"] == 1


def test_nothing_to_train(parts, tmp_path):
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        train(parts, tmp_path, model=network().requires_grad_(False))


def test_pattern_without_parameter(parts, tmp_path):
    with pytest.raises(ValueError, match=r"'\*\.psi' matches no trained parameter, such as '0\.weight'"):
        train(parts, tmp_path, Recipe(epochs=1, no_decay=("*.psi",)))


def test_description_must_be_plain(parts, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        train(parts, tmp_path, description={"path": Path("a")})


# ---- several processes -------------------------------------------------------------------------------------


def train_a_share(directory):
    """Train as one process of a job, or as the only one."""
    team = processes()
    share = {"rank": team.process_index, "world_size": team.num_processes}
    images = load_images("digits", "train", size=8, samples=161, **CONSTANTS)
    train, held_out = images.hold_out(61, 0)
    torch.manual_seed(team.process_index)  # the first process's weights count
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    loaders = Loader(train, 32 // team.num_processes, train=True, **share), Loader(held_out, 16, **share)
    fit(model, *loaders, Recipe(epochs=2), directory=directory, description={}, progress=False)


def test_two_processes_train_as_one(forks, tmp_path):
    train_a_share(tmp_path / "one")
    codes = ended(*forks.team(train_a_share, tmp_path / "two", said=tmp_path / "said"))
    assert codes == [0, 0], (tmp_path / "said").read_text()
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    first, second = (load(tmp_path / name / "checkpoints" / "last.pt")["state_dict"] for name in ("one", "two"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-6)
    assert not np.isclose(*one["train_loss"], rtol=1e-3)  # the weights moved by more than the tolerance


# ---- compiled ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the compiler's own
def test_compiled_training_equals_eager_and_leaves_the_model_alone(parts, tmp_path):
    recipe = Recipe(**{**vars(SHORT), "compile": True})
    small = lambda: nn.Sequential(*(module for module in network() if not isinstance(module, nn.Dropout)))  # noqa: E731
    forwards = []

    class Look:
        def on_epoch_end(self, given, epoch, metrics):
            handle = given[0].register_forward_hook(lambda *_: forwards.append(epoch))
            evaluate(given, Loader(parts[1], 50))
            handle.remove()

    eager = train(parts, tmp_path / "eager", model=small())
    torch._dynamo.utils.counters.clear()
    model = small()
    compiled = train(parts, tmp_path / "compiled", recipe, model=model, callbacks=[Look()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    pd.testing.assert_frame_equal(compiled, eager, rtol=1e-4)
    assert not np.isclose(eager["train_loss"].iloc[0], eager["train_loss"].iloc[-1], rtol=1e-3)  # it did train
    assert list(model.state_dict()) == list(small().state_dict())
    assert forwards == [1, 1, 2, 2, 3, 3, 4, 4]  # two batches an epoch, through hooks that compiled code skips

    resumed = small()
    with pytest.raises(KeyboardInterrupt):
        train(parts, tmp_path / "halves", recipe, model=small(), callbacks=[At(3, interrupt)])
    train(parts, tmp_path / "halves", recipe, model=resumed, resume=tmp_path / "halves" / "checkpoints" / "last.pt")
    assert same_weights(resumed, model)


# ---- tensorboard -------------------------------------------------------------------------------------------


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every scalar back: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_metrics_once_also_after_a_resume(parts, tmp_path):
    with pytest.raises(KeyboardInterrupt), TensorBoard(tmp_path / "tensorboard") as board:
        train(parts, tmp_path, callbacks=[board, At(3, interrupt)])  # epoch 3 is written, but not saved
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["lr"]] == [1, 2, 3]
    with TensorBoard(tmp_path / "tensorboard") as board:
        train(parts, tmp_path, callbacks=[board], resume=tmp_path / "checkpoints" / "last.pt")
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    found = scalars(tmp_path / "tensorboard")
    assert found.keys() == set(metrics) - {"epoch"}
    for name, events in found.items():
        assert [step for step, _ in events] == metrics["epoch"].tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose([value for _, value in events], metrics[name], rtol=1e-6)
    assert metrics["train_loss"].nunique() == 4


def test_tensorboard_leaves_out_what_was_not_measured(parts, tmp_path):
    with TensorBoard(tmp_path / "tensorboard") as board:
        fit(
            network(),
            Loader(parts[0], 32, train=True),
            None,
            Recipe(epochs=1),
            directory=tmp_path,
            description={},
            callbacks=[board],
            progress=False,
        )
    assert scalars(tmp_path / "tensorboard").keys() == {"lr", "train_loss", "train_accuracy"}


def test_tensorboard_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stripe-observation\[tensorboard\]'"):
        TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_for_tensorboard_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    words = [
        "train",
        "--dataset",
        "digits",
        "--depth",
        "11",
        "--train-samples",
        "40",
        "--epochs",
        "1",
        "--tensorboard",
        "-c",
    ]
    assert main([*words, str(tmp_path / "a")]) == 0
    [(step, loss)] = scalars(tmp_path / "a" / "tensorboard")["train_loss"]
    assert (step, loss) == (1, pytest.approx(pd.read_csv(tmp_path / "a" / "metrics.csv")["train_loss"][0], rel=1e-6))
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*words, str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: TensorBoard's files need the package tensorboard")
    assert not (tmp_path / "b").exists()
