"""RecorderCallback: recording in the trainings of `stripe.training.fit`, Lightning and transformers."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from stripe.gate import Gate
from stripe.recorder import group
from stripe.recorder.batches import Identify, Numbering, classes_of
from stripe.recorder.recorder import Batches, Recorder
from stripe.store import open_run


class _OtherHooks:
    """The other hooks that trainers call, as no-ops; inheriting from the trainers' classes would import them."""

    state_key = "stripe.RecorderCallback"
    _legacy_state_key = property(type)

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    # of Lightning
    teardown = on_save_checkpoint = on_fit_end = on_sanity_check_start = on_sanity_check_end = _nothing
    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = _nothing
    on_validation_start = on_validation_end = _nothing
    on_test_start = on_test_epoch_start = on_test_batch_start = _nothing
    on_test_batch_end = on_test_epoch_end = on_test_end = _nothing
    on_predict_start = on_predict_epoch_start = on_predict_batch_start = _nothing
    on_predict_batch_end = on_predict_epoch_end = on_predict_end = _nothing
    on_before_backward = on_after_backward = on_before_zero_grad = on_before_optimizer_step = _nothing
    # of transformers
    on_init_end = on_epoch_begin = on_step_begin = on_substep_end = on_step_end = on_pre_optimizer_step = _nothing
    on_optimizer_step = on_prediction_step = on_predict = on_log = on_save = on_push_begin = _nothing


@dataclass(frozen=True)
class _Moment:
    """When a recording is made: its number in the run, the weight updates so far, and whether a training is running."""

    number: int
    step: int
    training: bool


class RecorderCallback(_OtherHooks):
    """Records attention while a network trains: a callback of `stripe.training.fit`, Lightning and transformers.

    `fit` hands over the network after every epoch, and the probe set in `loader` is recorded. Lightning runs its own
    validation, whose batches are recorded without a second pass:

        import lightning

        gates = find_gates(task.network, images)
        recording = RecorderCallback(None, gates, "runs/a", model=task.network)
        trainer = lightning.Trainer(max_epochs=10, callbacks=[recording])
        trainer.fit(task, train_loader, validation_loader)
        table = summarize(open_run("runs/a"))

    A transformers trainer reports an evaluation only when it is over, so the evaluation's batches, or the probe set in
    `loader`, pass through the network once more:

        recording = RecorderCallback(None, find_gates(model, {"pixel_values": images}), "runs/a")
        transformers.Trainer(model, arguments, callbacks=[recording], ...).train()

    Epochs of the run have the trainer's numbers: Lightning's `current_epoch`, or the number of epochs that transformers
    has finished. If a trainer validates several times an epoch, its recordings are numbered by step. A training that
    is resumed, from its last checkpoint or an older one, records again the epochs that it repeats. Outside of a
    training, `validate` and `evaluate` are recorded under the number of the last trained epoch, unless the run holds
    that epoch already. Lightning's sanity check is recorded as well and thrown away, so that whatever cannot be
    recorded fails there instead of after an epoch.
    """

    def __init__(
        self,
        loader: Batches | None,
        gates: Sequence[Gate],
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        identify: Identify | None = None,
        by: Literal["epoch", "step"] | None = None,
        dataloader: int | None = None,
        recorded: Callable[[str, int], object] | None = None,
        **options: Any,
    ) -> None:
        """Keep the arguments for each epoch's Recorder.

        Args:
            loader: the probe set for `fit` and transformers; None to record what a trainer validates on.
            gates: from `find_gates`.
            path: directory of the run.
            model: the network inside a Lightning module; None if the gates were found in the module itself.
            identify: takes a validation batch and the number of samples before it; returns ids and labels. By default
                batches are (images, labels, sample ids), (images, labels) or mappings with "labels" and "sample_ids".
            by: what numbers the recordings, "epoch" or "step"; None: the step if a trainer validates several times an
                epoch, else the epoch.
            dataloader: which of several validation loaders to record; None: each into a run of its own,
                PATH/validation-0 and so on. Named evaluation data sets of transformers go to PATH/NAME.
            recorded: called with the run's path and the epoch's number once an epoch is recorded, in a group of
                processes only by the first; for instance a `stripe.Tracker` for TensorBoard or Weights & Biases.
            options: further arguments of Recorder, such as `allow_mixed=True`, without which a run takes only epochs
                of one network and of one list of samples.
        """
        if by not in (None, "epoch", "step"):
            raise ValueError(f"by {by!r}; expected 'epoch', 'step' or None")
        self._loader, self._model, self._identify = loader, model, identify
        self._by, self._dataloader, self._on_recorded = by, dataloader, recorded
        self._gates, self._path, self._options = gates, os.fspath(path), options
        self._recorded: dict[tuple[str, int], int] = {}  # (run, number) -> step
        self._last: dict[str, int] = {}  # number and step of the last recording; saved in checkpoints
        self._resumed: Mapping[str, Any] | None = None  # the checkpoint from which Lightning resumes
        self._training = self._begun = False  # whether transformers is training, and whether it began from scratch
        self._told: set[str] = set()
        self._open = ExitStack()
        self._recorder: Recorder | None = None  # the open recorder of a Lightning validation
        self._reading: int | None = None  # the index of its loader among the validation loaders

    # ---- stripe.training.fit ----
    def on_epoch_end(self, *event: Any, **of_transformers: Any) -> None:
        """Record the probe set when `fit` ends an epoch: `event` is the network, the epoch's number, and metrics.

        transformers has an event of the same name, recognised by its keyword arguments, which is ignored. Raises
        ValueError if there is no probe set.
        """
        if of_transformers:
            return
        model, epoch, _ = event
        if self._loader is None:
            raise ValueError("no probe set to record: give RecorderCallback a loader of images, labels, sample ids")
        with Recorder(model, self._gates, self._path, **self._options) as recorder:
            recorder.record(self._loader, epoch=epoch, identify=self._identify)
        self._announce(self._path, epoch)

    # ---- Lightning ----
    def setup(self, trainer: Any, module: nn.Module, stage: str) -> None:
        """Forget the checkpoint of the trainer's previous call."""
        self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves: the number and step of the last recording."""
        return dict(self._last)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint saved."""
        self._last = dict(state)

    def on_load_checkpoint(self, trainer: Any, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Note the epoch and the step of the network that is being loaded."""
        self._resumed = {key: checkpoint[key] for key in ("epoch", "global_step")}

    def on_fit_start(self, trainer: Any, module: nn.Module) -> None:
        """Refuse to begin a training in a run that holds another training (FileExistsError)."""
        if self._resumed is None:
            self._require_new(self._path, self._run_named("validation-0"))

    def on_validation_epoch_start(self, trainer: Any, module: nn.Module) -> None:
        """Prepare for the first batch of the first loader."""
        self._reading = None

    def on_validation_batch_start(
        self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start reading when a loader begins."""
        if dataloader_idx != self._reading:
            self._finish()
            self._reading = dataloader_idx
            if self._dataloader in (None, dataloader_idx):
                self._start(trainer, module, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store the batch that was just validated."""
        if self._recorder:
            sample_ids, labels = self._identified(batch, self._samples)
            self._recorder.commit(sample_ids, labels, epoch=self._moment.number, step=self._moment.step)
            self._samples += len(sample_ids)

    def on_validation_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        """Finish the recording."""
        self._finish()

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """Stop reading and drop the unfinished recording."""
        self._recorder = None
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def _start(self, trainer: Any, module: nn.Module, dataloader: int) -> None:
        """Open a recorder for one loader of a validation, if it is to be recorded."""
        self._moment, options = self._moment_of(trainer), self._options
        several = self._dataloader is None and len(trainer.num_val_batches) > 1
        self._run = self._run_named(f"validation-{dataloader}" if several else "")
        self._trial = trainer.sanity_checking
        if self._trial:
            self._run, options = self._open.enter_context(TemporaryDirectory()), options | {"shared": False}
        elif not self._is_wanted():
            return
        self._samples = 0
        self._number_by(_loader_at(trainer.val_dataloaders, dataloader))
        recorder = Recorder(self._model or module, self._gates, self._run, **options | {"overwrite": True})
        self._recorder = self._open.enter_context(recorder)

    def _finish(self) -> None:
        """Publish the open recording, if there is one."""
        recorder, self._recorder = self._recorder, None
        self._open.close()
        if recorder and not self._trial:
            self._remember()

    def _moment_of(self, trainer: Any) -> _Moment:
        training = trainer.state.fn == "fit"
        epoch, step = trainer.current_epoch, trainer.global_step
        if not training:
            if self._resumed:
                epoch, step = self._resumed["epoch"], self._resumed["global_step"]
            epoch = self._last["number"] if self._last.get("step") == step else max(0, epoch - 1)
        often = trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None
        by_step = often if self._by is None else self._by == "step"
        return _Moment(step if by_step else epoch, step, training)

    # ---- transformers ----
    def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to begin a training in a run that holds another training (FileExistsError)."""
        self._training, self._begun = True, state.global_step == 0
        if self._begun:
            self._require_new(self._path)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Note that the training is over."""
        self._training = self._begun = False

    def on_evaluate(
        self,
        arguments: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        metrics: Mapping[str, float] | None = None,
        eval_dataloader: Batches | None = None,
        **_: Any,
    ) -> None:
        """Record the probe set or, without one, the batches of this evaluation."""
        loader = eval_dataloader if self._loader is None else self._loader
        if loader is None:
            raise ValueError("nothing to record: the trainer has no evaluation data, and RecorderCallback no loader")
        by_step = str(arguments.eval_strategy.value) == "steps" if self._by is None else self._by == "step"
        number = state.global_step if by_step else round(state.epoch or 0)
        self._moment = _Moment(number, state.global_step, self._training)
        self._run = self._run_named("" if self._loader is not None else _data_set_of(metrics or {}))
        if self._begun:
            self._require_new(self._run)
        if self._recorded.get((self._run, number)) == state.global_step or not self._is_wanted():
            return
        self._number_by(loader)
        options = self._options | {"overwrite": True}
        with torch.random.fork_rng(devices=[]):  # a pass over a loader draws a number; the training must not notice
            with Recorder(model, self._gates, self._run, **options) as recorder:
                recorder.record(loader, epoch=number, step=state.global_step, identify=self._identified)
        self._remember()

    # ---- what the trainers share ----
    def _run_named(self, name: str) -> str:
        return os.path.join(self._path, name) if name else self._path

    def _require_new(self, *runs: str) -> None:
        """Refuse to record a new training into runs that hold the epochs of another one (FileExistsError)."""
        mine = {run for run, _ in self._recorded}
        for run in runs:
            if run not in mine and not self._options.get("overwrite") and (epochs := _epochs_of(run)):
                raise FileExistsError(
                    f"run '{run}' holds epochs up to {epochs[-1]}, and this training begins anew: resume from a "
                    "checkpoint, record into another run, or replace its epochs with overwrite=True"
                )

    def _is_wanted(self) -> bool:
        """Return whether to record now; warn if an epoch of the run is replaced, or kept instead of a new recording."""
        run, number = self._run, self._moment.number
        before = self._recorded.get((run, number))
        if self._moment.training or self._options.get("overwrite"):
            if before not in (None, self._moment.step):
                self._tell(f"epoch {number} of run '{run}', recorded after {before} steps, is recorded again")
            return True
        if number in _epochs_of(run):
            if before != self._moment.step:
                self._tell(
                    f"run '{run}' holds epoch {number} already, so what is validated outside of a training is not "
                    "recorded: pass overwrite=True to replace it, by='step', or another run"
                )
            return False
        return True

    def _remember(self) -> None:
        self._recorded[self._run, self._moment.number] = self._moment.step
        self._last = {"number": self._moment.number, "step": self._moment.step}
        self._announce(self._run, self._moment.number)

    def _announce(self, run: str, number: int) -> None:
        """Call `recorded` for an epoch that is in the run; in a group of processes, only the first one does."""
        alone = self._options.get("shared") is False or not group.is_running()
        if self._on_recorded and (alone or group.place()["rank"] == 0):
            self._on_recorded(run, number)

    def _number_by(self, loader: Any) -> None:
        """Prepare to identify the samples of one pass over a loader."""
        alone = self._options.get("shared") is False or not group.is_running()
        self._identify_now = self._identify or Numbering(loader, alone=alone)

    def _identified(self, batch: Any, seen: int) -> tuple[Any, Any | None]:
        """Return the ids and labels of a batch; labels that are not classes become unknown, with one warning."""
        sample_ids, labels = self._identify_now(batch, seen)
        classes = classes_of(labels, len(sample_ids))
        if classes is None and labels is not None:
            self._tell("the labels are no class numbers of shape (samples,), so they are recorded as unknown")
        return sample_ids, classes

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=3)


def _epochs_of(run: str) -> list[int]:
    """Return the epochs that a run holds; [] if there is no run."""
    with suppress(FileNotFoundError):
        return open_run(run).epochs
    return []


def _loader_at(loaders: Any, position: int) -> Any:
    """Return the validation loader at `position`; a trainer may have a single loader, a list or a mapping."""
    several = [*loaders.values()] if isinstance(loaders, Mapping) else loaders
    return several[position] if isinstance(several, list | tuple) else several


def _data_set_of(metrics: Mapping[str, Any]) -> str:
    """Return the name of an evaluation's data set, "" if it has none, from the metric eval_NAME_runtime."""
    found = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
    return re.sub(r"[^\w.-]", "_", found.removeprefix("eval").removeprefix("_"))
