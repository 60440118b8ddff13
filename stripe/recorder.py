"""Recorder: attention of a running network into a run on disk. Hooks live in `with`; memory stays flat."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from stripe.devices import device_of
from stripe.gate import Gate
from stripe.gates import read_gates
from stripe.messages import Progress
from stripe.store import CONTENTS, KINDS, EpochWriter, RunWriter

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images, labels, sample ids
Identify = Callable[[Any, int], tuple[Any, Any | None]]  # a batch and how many samples came before: ids, labels


class Recorder:
    """Reads the gates of a network on every forward pass and stores what is committed.

    `record` runs a loader through the network; a loop of one's own commits after each forward pass:

        model = timm.create_model("seresnet50", pretrained=True).eval()
        gates = find_gates(model, next(iter(loader))[0])
        with Recorder(model, gates, "runs/a") as recorder, torch.inference_mode():
            for images, labels, sample_ids in loader:
                logits = model(images)
                recorder.commit(sample_ids, labels)
        attention = open_run("runs/a").attention(gates[0].name, epoch=0)  # (samples, channels)

    An epoch is finished when `record` returns, the next one begins or the `with` ends; an exception leaves an
    unfinished one out of the run.

    With `shared`, all processes of a job (torchrun) record one run on a file system they share: each commits its own
    samples, none twice, and all begin and end the same epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        path: str | PathLike[str],
        *,
        squeeze: bool = False,
        dtype: str = "float32",
        contents: str = CONTENTS[0],
        description: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        seeds: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        allow_mixed: bool = False,
        shared: bool = False,
    ) -> None:
        """Prepare to record `gates` of `model` into the run at `path`, a new one or one with the same gates.

        Args:
            model: the network.
            gates: from `find_gates(model, images)`, or `run.gates` of a run of this network.
            path: directory of the run.
            squeeze: store what each gate scales, averaged over space, as well.
            dtype: "float32" or "float16".
            contents: "samples", a row for each; or "moments" over them alone, in memory and on disk independent
                of their number; or "label-moments", these with the mean of every class.
            description: of the model, plain values, for the manifest.
            data: of the images, plain values, for the manifest.
            seeds: plain values, for the manifest.
            overwrite: replace epochs that the run holds.
            allow_mixed: record also another network or other samples than those of the run, which then says so.
            shared: record together with the other processes of torch.distributed's group, where there is one;
                False: alone.

        Raises:
            ValueError: there is no gate.
        """
        if not gates:
            raise ValueError("no gate to record: expected what find_gates returns for a network with channel attention")
        self.model = model
        self.gates = list(gates)
        self._open_writer = partial(
            RunWriter,
            path,
            model=description or {"class": type(model).__qualname__},
            data=data or {},
            gates=gates,
            squeeze=squeeze,
            dtype=dtype,
            contents=contents,
            seeds=seeds,
            overwrite=overwrite,
            allow_mixed=allow_mixed,
            **_place_in_group() if shared else {},
        )
        self._squeeze = squeeze
        self._columns, self._width = _side_by_side(self.gates, KINDS if squeeze else KINDS[:1])
        self._values: Tensor | None = None  # of the last forward pass, (N, width)
        self._kept: set[tuple[str, str]] = set()  # whose columns hold some
        self._epoch: tuple[int, EpochWriter] | None = None
        self._batch: _Batch | None = None  # committed, and on its way from a device
        self._open = ExitStack()  # the writer and the hooks
        self._open_epoch = ExitStack()

    def __enter__(self) -> Self:
        """Open the run and start reading."""
        with ExitStack() as stack:
            self._writer = stack.enter_context(self._open_writer())
            stack.push(self._open_epoch)
            stack.enter_context(read_gates(self.model, self.gates, self._keep, squeeze=self._squeeze))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop reading; finish the epoch, or drop it after an exception."""
        self._values = None
        self._epoch = None
        self._open.__exit__(*error)

    def _keep(self, gate: Gate, kind: str, values: Tensor) -> None:
        """Copy a gate's values (N, C) into the one block of all.

        Blocks of their own would lie scattered among the network's feature maps, which would then need more memory.
        """
        if self._values is None or len(self._values) != len(values):
            with torch.inference_mode(False):  # the next forward pass may be in another mode
                self._values = torch.empty(len(values), self._width, device=values.device)
            self._kept.clear()
        self._values[:, self._columns[kind, gate.name]] = values
        self._kept.add((kind, gate.name))

    def commit(self, sample_ids: Any, labels: Any | None = None, *, epoch: int = 0) -> None:
        """Store what the last forward pass gave for the samples (N,) with their labels (N,).

        Raises:
            RuntimeError: no forward pass has been made, to its end, since the last commit.
            ValueError: the samples differ in number from those of the forward pass, or repeat.
            FileExistsError: the run holds this epoch.
            OSError: the run cannot be written.
        """
        if self._values is None or self._columns.keys() != self._kept:
            raise RuntimeError("nothing to commit: run the network on the samples first, inside `with Recorder(...)`")
        block, self._values = self._values, None
        rows = self._begin(epoch)
        batch = _Batch(rows, block, sample_ids, labels)
        self._store()  # the batch before, while a device computes this one
        self._batch = batch
        if not batch.copying:
            self._store()

    def _store(self) -> None:
        """Append the committed batch that is still to be stored, if there is one."""
        batch, self._batch = self._batch, None
        if batch:
            block, sample_ids, labels = batch.arrive()
            values: dict[str, dict[str, Any]] = {}
            for (kind, gate), columns in self._columns.items():
                values.setdefault(kind, {})[gate] = block[:, columns]
            batch.rows.append(sample_ids, labels, **values)

    def record(self, loader: Batches, *, epoch: int = 0, progress: Progress = iter) -> None:
        """Run the network, in eval mode, over `loader` (images, labels, sample ids) and store every batch as `epoch`.

        Raises what `commit` raises. The training flags are restored.
        """
        training = [(module, module.training) for module in self.model.modules()]
        device = device_of(self.model)
        try:
            self.model.eval()
            self._begin(epoch)
            with torch.inference_mode():
                for images, labels, sample_ids in progress(loader):
                    self.model(images.to(device))
                    self.commit(sample_ids, labels, epoch=epoch)
            self._finish()
        finally:
            for module, flag in training:
                module.training = flag

    def _begin(self, number: int) -> EpochWriter:
        """Return the writer of epoch `number`; a change of number finishes the epoch before."""
        if self._epoch is None or self._epoch[0] != number:
            self._finish()
            self._epoch = number, self._open_epoch.enter_context(self._writer.epoch(number))
            self._open_epoch.push(self._settle)
        return self._epoch[1]

    def _settle(self, error: type[BaseException] | None, *_: object) -> None:
        """Store what is still to be stored before the epoch ends, but not after an exception."""
        if error is None:
            self._store()
        self._batch = None

    def _finish(self) -> None:
        """Publish the epoch that is open, if one is."""
        self._epoch = None
        self._open_epoch.close()


class _Batch:
    """What was committed, copied to the processor; from a CUDA device without waiting for it."""

    def __init__(self, rows: EpochWriter, block: Tensor, sample_ids: Any, labels: Any | None) -> None:
        self.rows = rows
        self.copying = block.device.type == "cuda"
        self._parts = [_to_processor(part) for part in (block, sample_ids, labels)]
        self._copied = torch.cuda.Event() if self.copying else None
        if self._copied:
            self._copied.record(torch.cuda.current_stream(block.device))

    def arrive(self) -> list[Any]:
        """Wait for the copies; return values (N, width), ids and labels as arrays."""
        if self._copied:
            self._copied.synchronize()
        return [part.numpy() if isinstance(part, Tensor) else part for part in self._parts]


def _to_processor(values: Any) -> Any:
    """Copy a tensor into memory of the processor, pinned where it comes from a CUDA device."""
    return (
        values.detach().to("cpu", non_blocking=values.device.type == "cuda") if isinstance(values, Tensor) else values
    )


def identify(batch: Sequence[Any], seen: int) -> tuple[Any, Any]:
    """Return sample ids and labels of a batch (images, labels[, sample ids]); without ids, number samples on."""
    _, labels, *ids = batch
    return ids[0] if ids else range(seen, seen + len(labels)), labels


class _OtherHooks:
    """Whatever else a Lightning trainer calls a callback by; a base class of Lightning's would need it imported."""

    state_key = "stripe.RecorderCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return {}: nothing of this is kept in a checkpoint."""
        return {}

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    setup = teardown = load_state_dict = on_save_checkpoint = on_load_checkpoint = _nothing
    on_fit_start = on_fit_end = on_sanity_check_start = on_sanity_check_end = _nothing
    on_train_start = on_train_epoch_start = on_train_batch_start = _nothing
    on_train_batch_end = on_train_epoch_end = on_train_end = _nothing
    on_validation_start = on_validation_batch_start = on_validation_end = _nothing
    on_test_start = on_test_epoch_start = on_test_batch_start = _nothing
    on_test_batch_end = on_test_epoch_end = on_test_end = _nothing
    on_predict_start = on_predict_epoch_start = on_predict_batch_start = _nothing
    on_predict_batch_end = on_predict_epoch_end = on_predict_end = _nothing
    on_before_backward = on_after_backward = on_before_zero_grad = on_before_optimizer_step = _nothing


class RecorderCallback(_OtherHooks):
    """Records attention while a network trains: a callback of `stripe.training.fit`, and of a Lightning trainer.

    `fit` hands over the network after every epoch, and the probe set in `loader` is recorded. Lightning validates
    on batches of its own, and these are recorded, as the trainer's `current_epoch`, without a second pass:

        import lightning

        gates = find_gates(task.network, images)
        recording = RecorderCallback(None, gates, "runs/a", model=task.network)
        trainer = lightning.Trainer(max_epochs=10, callbacks=[recording])
        trainer.fit(task, train_loader, validation_loader)
        table = summarize(open_run("runs/a"))
    """

    def __init__(
        self,
        loader: Batches | None,
        gates: Sequence[Gate],
        path: str | PathLike[str],
        *,
        model: nn.Module | None = None,
        identify: Identify = identify,
        **options: Any,
    ) -> None:
        """Keep what each epoch's Recorder takes.

        Args:
            loader: the probe set for `fit`; None under Lightning.
            gates: from `find_gates`.
            path: directory of the run.
            model: the network inside a Lightning module; None when the module's own `forward` was searched.
            identify: takes a validation batch and the number of samples before it, returns ids and labels.
            options: further arguments of Recorder.
        """
        self._loader, self._model, self._identify = loader, model, identify
        self._gates, self._path, self._options = gates, path, options
        self._open = ExitStack()
        self._recorder: Recorder | None = None
        self._samples = 0

    def on_epoch_end(self, model: nn.Module, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Record the probe set as `epoch`; ValueError when there is none."""
        if self._loader is None:
            raise ValueError("no probe set to record: give RecorderCallback a loader of images, labels, sample ids")
        with self._recording(model) as recorder:
            recorder.record(self._loader, epoch=epoch)

    def on_validation_epoch_start(self, trainer: Any, module: nn.Module) -> None:
        """Start reading, but not in the trainer's sanity check."""
        self._samples = 0
        if not trainer.sanity_checking:
            self._recorder = self._open.enter_context(self._recording(self._model or module))

    def on_validation_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store the batch that was just validated."""
        if self._recorder:
            sample_ids, labels = self._identify(batch, self._samples)
            self._recorder.commit(sample_ids, labels, epoch=trainer.current_epoch)
            self._samples += len(sample_ids)

    def on_validation_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        """Finish the epoch."""
        self._recorder = None
        self._open.close()

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """Stop reading and drop the epoch."""
        self._recorder = None
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def _recording(self, model: nn.Module) -> Recorder:
        return Recorder(model, self._gates, self._path, **self._options)


def _side_by_side(gates: Sequence[Gate], kinds: Sequence[str]) -> tuple[dict[tuple[str, str], slice], int]:
    """Return the columns of each kind and gate in a matrix of all, and its width."""
    columns, width = {}, 0
    for kind in kinds:
        for gate in gates:
            columns[kind, gate.name] = slice(width, width + gate.channels)
            width += gate.channels
    return columns, width


def _place_in_group() -> dict[str, Any]:
    """Return this process's rank and the group's barrier, as arguments of RunWriter; none for a single process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    return {"rank": distributed.get_rank(), "barrier": _barrier}


def _barrier() -> None:
    """Wait for the group; RuntimeError of one line when one of its processes is gone."""
    try:
        distributed.barrier()
    except RuntimeError as error:
        raise RuntimeError(
            "another process of this job is gone: what is finished is kept, start the job again to go on "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
