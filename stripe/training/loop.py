"""One explicit training loop and one evaluation; a resumed run continues as if it had never stopped.

Learning rate, order of samples and random numbers follow from the recipe and the epoch alone, so a checkpoint needs to
hold only weights, the state of optimizer and gradient scaler, and metrics. Accelerate chooses the device and connects
several processes.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor, nn
from tqdm import tqdm

from stripe.capture import CapturedStep
from stripe.checkpoints import write_tensors
from stripe.devices import device_of
from stripe.files import write_csv
from stripe.messages import one_line
from stripe.recipe import PRECISIONS, Recipe
from stripe.resuming import CHECKPOINTS, METRICS, changes, read_resumable, require_same, sole_training
from stripe.training.callbacks import Callback

UNKNOWN_LABEL = -1
REPORT_EVERY = 20  # steps between two looks at the loss, each of which waits for the accelerator


# ---- what the loop works with ------------------------------------------------------------------------------


class Batches(Protocol):
    """Batches of (images (n, ...), labels int64 (n,), ...); whatever follows the labels is ignored."""

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        """Yield the batches of one pass."""
        ...

    def __len__(self) -> int:
        """Return the number of batches, in training the same for every process."""
        ...


class TrainingBatches(Batches, Protocol):
    """Batches whose order and augmentation follow from the epoch."""

    @property
    def samples(self) -> int:
        """Return how many samples an epoch gives to this process."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy and top-1 accuracy in percent over the samples whose label is known, and their number."""

    loss: float
    accuracy: float
    samples: int


def processes(cpu: bool = False) -> PartialState:
    """Return this process's index, the number of processes (`process_index`, `num_processes`) and the device.

    The first call joins the other processes and settles the device; with `cpu`, an accelerator is left alone. Where
    there is no accelerator, Accelerate must be told so, or it overlooks the other processes.
    """
    return PartialState(cpu=cpu or not torch.accelerator.is_available())


# ---- evaluate ----------------------------------------------------------------------------------------------


def evaluate(model: nn.Module, loader: Batches, *, progress: bool = False) -> Evaluation:
    """Evaluate in eval mode on the model's device; several processes add up their parts.

    Labels of -1 are unknown, and their samples are left out. Every module's training flag is restored. Raises
    ValueError when there is no sample with a label.

    Example:
        >>> import torch
        >>> from stripe.data import Loader, load_images
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
        >>> evaluate(model, Loader(load_images("digits", "test"), 100)).samples
        360
    """
    device = device_of(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    scores = []
    try:
        with torch.no_grad():
            hidden = None if progress else True  # None hides the bar unless stderr is a terminal
            for images, labels, *_ in tqdm(loader, "evaluating", unit="batch", leave=False, disable=hidden):
                scores.append(_score(logits_of(model(images.to(device))), labels.to(device)))
    finally:
        for module in training:
            module.training = True
    return _evaluation(scores)


def logits_of(output: Any) -> Tensor:
    """Return the logits (N, classes) in what a network returns.

    They are the tensor itself, or the item named "logits" (as in transformers) or "out" (as in torchvision's
    segmentation), or else the first tensor of a tuple or mapping. Raises ValueError where there is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    items = dict(output) if isinstance(output, Mapping) else {}
    named = [items.get(name, getattr(output, name, None)) for name in ("logits", "out")]
    others = items.values() if items else output if isinstance(output, tuple | list) else ()
    for item in (*named, *others):
        if isinstance(item, Tensor):
            return item
    raise ValueError(
        f"the network returned {type(output).__name__}: expected logits, or a tuple or mapping that holds them"
    )


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (summed loss, correct predictions, labelled samples) of a batch, (3,); the loss is differentiable."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=UNKNOWN_LABEL)
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss, correct.float(), (labels != UNKNOWN_LABEL).sum().to(loss)])


def _evaluation(scores: list[Tensor]) -> Evaluation:
    """Add up the scores of all batches and processes."""
    totals = torch.zeros(3, dtype=torch.float64)
    if scores:
        totals = sum(torch.stack(scores).cpu().double(), totals)  # one wait for the device, not one per batch
    team = processes()
    if team.num_processes > 1:
        totals = reduce(totals.to(team.device), "sum")
    loss, correct, samples = totals.tolist()
    if samples == 0:
        raise ValueError(
            "the loader gave no sample with a label to score: expected at least one batch with labels other than "
            f"{UNKNOWN_LABEL}, which stands for an unknown one"
        )
    return Evaluation(loss / samples, 100 * correct / samples, int(samples))


# ---- fit ---------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    train_loader: TrainingBatches,
    validation_loader: Batches | None,
    recipe: Recipe,
    *,
    directory: str | Path,
    description: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    resume: str | Path | None = None,
    allow_changed: bool = False,
    save_every: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Train in place and return the metrics, one row per epoch; epoch k is the state after k epochs.

    The model ends on the training device, in eval mode, with the last weights. `directory` gets metrics.csv
    (mean losses, accuracies in percent, the epoch's first lr) and in checkpoints/ best.pt (by validation accuracy, so
    only with a validation loader), epoch=0012.pt every `save_every` epochs (0: never) and, after all others, last.pt.

    Args:
        model: images to logits; changed in place.
        train_loader: what to train on.
        validation_loader: held-out images that choose best.pt, or None.
        recipe: how to train.
        directory: where to write; it must not hold another training.
        description: plain values from which the caller can rebuild the model, and that identify the training,
            such as the data and their split; saved in every checkpoint.
        callbacks: called after each epoch.
        resume: a last.pt to continue from, with the recipe given here.
        allow_changed: resume even if the description or the seed is not the one that the training began with.
        save_every: see above.
        progress: show a bar per epoch, where stderr is a terminal.

    Raises:
        BlockingIOError: another training writes into `directory`.
        FileExistsError: `directory` holds another training.
        FileNotFoundError: no checkpoint at `resume`.
        FloatingPointError: the training loss is no longer finite.
        TypeError: the description holds more than plain values.
        ValueError: nothing to train, or a checkpoint that cannot be resumed, or is of another training.
    """
    plain = json.loads(json.dumps(description))
    with _alone(Path(directory), None if resume is None else Path(resume)):
        trainer = _Trainer(model, recipe)
        saved = None if resume is None else read_resumable(Path(resume))
        if saved and not allow_changed:
            require_same(Path(resume or ""), changes(saved, recipe, plain))
        history = [] if saved is None else trainer.restore(saved, resume)
        if history and trainer.accelerator.is_main_process:
            _write_metrics(Path(directory), history)  # drops what a killed run wrote after its last checkpoint
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            trained = trainer.train(train_loader, epoch, progress)
            validated = trainer.validate(validation_loader)
            metrics = {
                "epoch": epoch,
                "lr": recipe.learning_rate(epoch - 1),
                "train_loss": trained.loss,
                "train_accuracy": trained.accuracy,
                "val_loss": validated.loss,
                "val_accuracy": validated.accuracy,
            }
            for callback in callbacks:
                callback.on_epoch_end(model, epoch, metrics)
            history.append(metrics)
            if trainer.accelerator.is_main_process:
                _save(Path(directory), history, plain, trainer.state(), save_every)
        return pd.DataFrame(history)


@contextmanager
def _alone(directory: Path, resume: Path | None) -> Iterator[None]:
    """Let the first process reserve the directory for this training; if it cannot, all processes raise its error."""
    with ExitStack() as held:
        failure: list[Exception | None] = [None]
        if processes().is_main_process:
            try:
                held.enter_context(sole_training(directory, resume))
            except (OSError, ValueError) as error:
                failure = [error]
        [told] = broadcast_object_list(failure)
        if told is not None:
            raise told
        yield


class _Trainer:
    """A model, with everything else that an epoch of training changes."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.accelerator = Accelerator(mixed_precision="no")  # not the recipe's: Accelerate sets it once per process
        self.model.to(self.accelerator.device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        device, precision = self.accelerator.device.type, PRECISIONS[recipe.amp]
        dtype = getattr(torch, precision) if precision else None
        self.autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype is not None)
        objective = _Objective(model, self.autocast)
        if recipe.compile and device != "cuda":
            # compiled in place, around the model, which stays as it is; one graph per batch size, so that no graph
            # depends on what this process ran before, and resuming is exact
            objective.compile(dynamic=False)
        self.objective = self.accelerator.prepare(objective)
        self.optimizer = _optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.amp == "fp16")
        captured = device == "cuda" and not self.scaler.is_enabled() and self.accelerator.num_processes == 1
        self.step = (
            CapturedStep(objective, self.optimizer, compile=recipe.compile, precision=dtype) if captured else self._step
        )

    def train(self, loader: TrainingBatches, epoch: int, progress: bool) -> Evaluation:
        """Train one epoch, leaving the model in eval mode."""
        loader.set_epoch(epoch)
        entropy = (self.recipe.seed, epoch, self.accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self.model.train()
        scores: list[Tensor] = []
        hidden = None if progress and self.accelerator.is_main_process else True  # None: hidden unless on a terminal
        title = f"epoch {epoch}/{self.recipe.epochs}"
        with tqdm(total=loader.samples, desc=title, unit=" images", disable=hidden) as bar:
            for step, (images, labels, *_) in enumerate(loader):
                rate = self.recipe.learning_rate(epoch - 1 + step / len(loader))
                scores.append(self.step(images, labels, rate))
                bar.update(len(labels))
                if (step + 1) % REPORT_EVERY == 0 or step + 1 == len(loader):
                    bar.set_postfix(loss=_finite_loss(scores[-1], epoch, rate), refresh=False)
        broadcast(list(self.model.buffers()))  # batch-norm statistics differ between processes: take the first's
        self.model.eval()
        return _evaluation(scores)

    def validate(self, loader: Batches | None) -> Evaluation:
        """Evaluate in the recipe's precision; without a loader the scores are NaN."""
        if loader is None:
            return Evaluation(math.nan, math.nan, 0)
        with self.autocast():
            return evaluate(self.model, loader)

    def _step(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Take one step at a learning rate; return the batch's scores (3,)."""
        device = self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scores: Tensor = self.objective(images.to(device), labels.to(device))
        self.optimizer.zero_grad()
        self.accelerator.backward(self.scaler.scale(scores[0] / len(labels)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return scores.detach()

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs, except for the metrics."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recipe": asdict(self.recipe),
        }

    def restore(self, saved: Mapping[str, Any], path: object) -> list[dict[str, float]]:
        """Restore the state in a last.pt, read from `path`, and return the metrics of the epochs already trained."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(saved["state_dict"])
            self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # these tensors are mapped from the file
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"checkpoint '{path}' does not fit this network and recipe ({one_line(error)}): "
                "resume with the options it was trained with"
            ) from error
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # this training's recipe, not the checkpoint's
        return list(saved["metrics"])


class _Objective(nn.Module):
    """Images and labels in, scores out: what Accelerate wraps, so that the model itself stays unwrapped."""

    def __init__(self, model: nn.Module, autocast: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            logits = logits_of(self.model(images))
        return _score(logits, labels)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD over the parameters that require gradients, without weight decay for those in `no_decay`."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise ValueError("the network has no parameter with requires_grad: there is nothing to train")
    exempt: set[str] = set()
    for pattern in recipe.no_decay:
        matches = fnmatch.filter(trained, pattern)
        if not matches:
            raise ValueError(
                f"no_decay pattern '{pattern}' matches no trained parameter, such as '{next(iter(trained))}'"
            )
        exempt.update(matches)
    decaying = [weight for name, weight in trained.items() if name not in exempt]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": [trained[name] for name in trained if name in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
    )  # fused takes a quarter of the for-loop's time, on a CPU too


def _finite_loss(scores: Tensor, epoch: int, rate: float) -> float:
    loss, _, samples = scores.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training loss is {loss} in epoch {epoch} at learning rate {rate:.3g}: "
            "lower the learning rate, resuming from last.pt if there is one"
        )
    return float(loss / max(samples, 1))


# ---- files -------------------------------------------------------------------------------------------------


def _save(
    directory: Path,
    history: list[dict[str, float]],
    description: dict[str, Any],
    state: dict[str, Any],
    save_every: int,
) -> None:
    """Write the files of the epoch just finished, last.pt after all others."""
    epoch = len(history)
    accuracies = [row["val_accuracy"] for row in history]
    best = float(np.fmax.reduce(accuracies))  # NaN where nothing was validated
    network = {
        "epoch": epoch,
        "state_dict": state["state_dict"],
        "acc": accuracies[-1],
        "best_acc": best,
        "description": description,
    }
    if accuracies[-1] == best and best not in accuracies[:-1]:
        write_tensors(f"{CHECKPOINTS}/best.pt", network, root=directory)
    if save_every and epoch % save_every == 0:
        write_tensors(f"{CHECKPOINTS}/epoch={epoch:04d}.pt", network, root=directory)
    _write_metrics(directory, history)
    write_tensors(f"{CHECKPOINTS}/last.pt", network | state | {"metrics": history}, root=directory)


def _write_metrics(directory: Path, history: list[dict[str, float]]) -> None:
    write_csv(METRICS, pd.DataFrame(history), root=directory)
