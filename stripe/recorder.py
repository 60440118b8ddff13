"""Recorder: attention of a running network into a run on disk. Hooks live in `with`; memory stays flat."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from stripe.gates import Gate, read_gates
from stripe.store import EpochWriter, GateColumn, RunWriter

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images, labels, sample ids
Progress = Callable[[Batches], Batches]


class Recorder:
    """Reads the gates of a network on every forward pass and stores what is committed.

    `with Recorder(model, gates, "runs/a") as recorder: recorder.record(loader, epoch=3)`, or in a loop of one's own
    `model(images); recorder.commit(sample_ids, labels, epoch=3)`. An epoch is finished when the next one begins or the
    `with` ends; an exception leaves it out of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        path: str | PathLike[str],
        *,
        squeeze: bool = False,
        dtype: str = "float32",
        description: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        seeds: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Prepare to record `gates` of `model` into the run at `path`, a new one or one with the same gates.

        Args:
            model: the network.
            gates: from `find_gates(model, images)`.
            path: directory of the run.
            squeeze: store what each gate scales, averaged over space, as well.
            dtype: "float32" or "float16".
            description: of the model, plain values, for the manifest.
            data: of the images, plain values, for the manifest.
            seeds: plain values, for the manifest.
            overwrite: replace epochs that the run holds.

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
            gates=[GateColumn(g.name, g.channels, g.layout, g.form, g.source, g.site) for g in gates],
            squeeze=squeeze,
            dtype=dtype,
            seeds=seeds,
            overwrite=overwrite,
        )
        self._squeeze = squeeze
        self._seen: dict[str, dict[str, Tensor]] = {}  # by kind, then gate
        self._epoch: tuple[int, EpochWriter] | None = None
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
        self._seen.clear()
        self._open.__exit__(*error)

    def _keep(self, gate: Gate, kind: str, values: Tensor) -> None:
        self._seen.setdefault(kind, {})[gate.name] = values

    def commit(self, sample_ids: Any, labels: Any | None = None, *, epoch: int = 0) -> None:
        """Store what the last forward pass gave for the samples (N,) with their labels (N,).

        Raises:
            RuntimeError: no forward pass has been made since the last commit.
            ValueError: the samples differ in number from those of the forward pass, or repeat.
            FileExistsError: the run holds this epoch.
            OSError: the run cannot be written.
        """
        if not self._seen:
            raise RuntimeError("nothing to commit: run the network on the samples first, inside `with Recorder(...)`")
        values = {kind: {gate: _array(v.float()) for gate, v in seen.items()} for kind, seen in self._seen.items()}
        self._seen.clear()
        self._begin(epoch).append(_array(sample_ids), None if labels is None else _array(labels), **values)

    def record(self, loader: Batches, *, epoch: int = 0, progress: Progress = iter) -> None:
        """Run the network, in eval mode, over `loader` (images, labels, sample ids) and store every batch as `epoch`.

        Raises what `commit` raises. The training flags are restored.
        """
        training = [(module, module.training) for module in self.model.modules()]
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        try:
            self.model.eval()
            with torch.inference_mode():
                for images, labels, sample_ids in progress(loader):
                    self.model(images.to(device))
                    self.commit(sample_ids, labels, epoch=epoch)
        finally:
            for module, flag in training:
                module.training = flag

    def _begin(self, number: int) -> EpochWriter:
        """Return the writer of epoch `number`; a change of number finishes the epoch before."""
        if self._epoch is None or self._epoch[0] != number:
            self._open_epoch.close()
            self._epoch = number, self._open_epoch.enter_context(self._writer.epoch(number))
        return self._epoch[1]


class RecorderCallback:
    """Records a probe set after every epoch of `stripe.training.fit`."""

    def __init__(self, loader: Batches, gates: Sequence[Gate], path: str | PathLike[str], **options: Any) -> None:
        """Keep the probe set's `loader`, and the arguments of each epoch's Recorder."""
        self._loader, self._gates, self._path, self._options = loader, gates, path, options

    def on_epoch_end(self, model: nn.Module, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Record the probe set as `epoch`."""
        with Recorder(model, self._gates, self._path, **self._options) as recorder:
            recorder.record(self._loader, epoch=epoch)


def _array(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
