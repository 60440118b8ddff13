"""Recorder: attention of a running network into a run on disk.

Hooks are in place only inside the `with` block, and memory grows only by the sample ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import index
from os import PathLike
from threading import Lock, get_ident
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.gate import Gate
from stripe.gates import read_gates
from stripe.gates.hooks import Hooks, unwrap
from stripe.gates.trace import called
from stripe.messages import Progress, listing
from stripe.recorder import group
from stripe.recorder.batches import Identify, Numbering, input_of, moved
from stripe.store import CONTENTS, KINDS, EpochWriter, RunWriter

Batches = Iterable[Any]
"""Batches are (images, labels, sample ids), (images, labels), or mappings with "labels" and "sample_ids"."""

FORWARDS = ("one", "last", "all")
"""What a commit does after several forward passes: refuse them, store the last one, or the rows of all in order."""


class Recorder:
    """Reads the gates of a network on every forward pass and stores what is committed.

    `record` runs the network over a loader; a loop of your own commits after each forward pass:

        model = timm.create_model("seresnet50", pretrained=True).eval()
        gates = find_gates(model, next(iter(loader))[0])
        with Recorder(model, gates, "runs/a") as recorder, torch.inference_mode():
            for images, labels, sample_ids in loader:
                logits = model(images)
                recorder.commit(sample_ids, labels)
        attention = open_run("runs/a").attention(gates[0].name, epoch=0)  # (samples, channels)

    An epoch is finished when `record` returns, when the next epoch begins or when the `with` block ends; after an
    exception, an unfinished epoch is not part of the run.

    The processes of a job (torchrun) record one run on a file system they share: each commits its own samples, and all
    begin and end the same epochs. A sample that a sampler repeats in the last batch of a process is stored once.

    Only this network is read, run by one thread at a time. Copies of it made inside the `with` block, for instance by
    `copy.deepcopy`, are not read; loading a copy that was pickled there requires `stripe` to be installed.
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
        files: Mapping[int, str] | None = None,
        overwrite: bool = False,
        allow_mixed: bool = False,
        shared: bool | None = None,
        forwards: Literal["one", "last", "all"] = "one",
    ) -> None:
        """Prepare to record `gates` of `model` into the run at `path`, which is new or has the same gates.

        Args:
            model: the network.
            gates: from `find_gates(model, images)`, or `run.gates` of a run of this network.
            path: directory of the run.
            squeeze: also store what each gate scales, averaged over space.
            dtype: "float32" or "float16".
            contents: "samples", a row for each sample; "moments", only the moments over samples, whose memory and disk
                space do not depend on the number of samples; or "label-moments", these and the mean of every class.
            description: plain values that describe the model, for the manifest.
            data: plain values that describe the images, for the manifest.
            seeds: plain values, for the manifest.
            files: the file name of each sample id, if samples are files; `run.files` returns them.
            overwrite: replace epochs that the run holds.
            allow_mixed: also accept a network or samples other than those of the run, which is then marked as mixed.
            shared: record together with the other processes of torch.distributed's group, as is done by default if
                there are several; False: this process records alone, for instance because no other process records.
            forwards: what a commit does after several forward passes: "one" refuses them, "last" stores the last one,
                and "all" stores the rows of all, one after another, each row with a sample id of its own.

        Raises:
            ValueError: `gates` is empty, or `forwards` is not one of FORWARDS.
        """
        if not gates:
            raise ValueError("no gate to record: expected what find_gates returns for a network with channel attention")
        if forwards not in FORWARDS:
            raise ValueError(f"forwards {forwards!r}; expected one of {listing(FORWARDS)}")
        self.model = model
        self.gates = list(gates)
        self._together = group.is_running() if shared is None else shared and group.is_running()
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
            files=files,
            overwrite=overwrite,
            allow_mixed=allow_mixed,
            **group.place() if self._together else {},
        )
        self._squeeze = squeeze
        self._columns, width = _side_by_side(self.gates, KINDS if squeeze else KINDS[:1])
        self._passes = _Passes(self._columns.keys(), width, forwards)
        self._epoch: tuple[int, EpochWriter] | None = None
        self._batch: _Batch | None = None  # committed but not stored yet
        self._stored: list[NDArray[np.int64]] = []  # the epoch's stored ids, kept only when several processes record
        self._open = ExitStack()  # the writer and the hooks
        self._open_epoch = ExitStack()

    def __enter__(self) -> Self:
        """Open the run and start reading."""
        with ExitStack() as stack:
            self._writer = stack.enter_context(self._open_writer())
            stack.push(self._open_epoch)
            hooks = stack.enter_context(Hooks())
            hooks.before(unwrap(self.model), self._passes.begin)
            hooks.after(unwrap(self.model), self._passes.complete)
            hooks.after(unwrap(self.model), self._passes.leave, always=True)
            stack.enter_context(read_gates(self.model, self.gates, self._keep, squeeze=self._squeeze))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop reading; finish the epoch, or drop it after an exception."""
        self._passes.forget()
        self._epoch = None
        self._open.__exit__(*error)

    def _keep(self, gate: Gate, kind: str, values: Tensor) -> None:
        self._passes.keep((kind, gate.name), self._columns[kind, gate.name], values)

    def commit(self, sample_ids: Any, labels: Any | None = None, *, epoch: int = 0, step: int | None = None) -> None:
        """Store what the forward pass since the last commit gave for the samples (N,) with their labels (N,).

        `step` is the number of weight updates that the network has had, for the manifest. Nothing of a refused commit
        is stored.

        Raises:
            RuntimeError: no forward pass has been completed since the last commit, or several have and `forwards` is
                "one", or the forward pass was made by another thread.
            ValueError: the number of samples differs from that of the forward pass, or sample ids repeat.
            FileExistsError: the run holds this epoch already.
            OSError: the run cannot be written.
        """
        block = self._passes.take()
        if hasattr(sample_ids, "__len__") and len(sample_ids) != len(block):
            raise ValueError(
                f"{len(sample_ids)} sample ids for {len(block)} rows of the forward pass: give one row per sample id"
            )
        rows = self._begin(epoch, step)
        batch = _Batch(rows, block, sample_ids, labels)
        self._store()  # the previous batch, while the device computes this one
        self._batch = batch
        if not (batch.copying or self._together):
            self._store()

    def _store(self, *, shared_out: bool = False) -> None:
        """Append the committed batch that is not stored yet, if there is one.

        With `shared_out`, only the samples that this process is to store are appended. This is meant for the last
        batch of an epoch, in which samplers repeat samples.
        """
        batch, self._batch = self._batch, None
        nothing: list[Any] = [None, np.zeros(0, np.int64), None]
        block, sample_ids, labels = batch.arrive() if batch else nothing
        if shared_out:
            mine = group.owned(np.asarray(sample_ids), self._stored)
            if batch and not mine.all():
                block, sample_ids = block[mine], np.asarray(sample_ids)[mine]
                labels = None if labels is None else np.asarray(labels)[mine]
        if not batch or not len(sample_ids):
            return
        values: dict[str, dict[str, Any]] = {}
        for (kind, gate), columns in self._columns.items():
            values.setdefault(kind, {})[gate] = block[:, columns]
        batch.rows.append(sample_ids, labels, **values)
        if self._together:
            self._stored.append(np.asarray(sample_ids))

    def record(
        self,
        loader: Batches,
        *,
        epoch: int = 0,
        step: int | None = None,
        identify: Identify | None = None,
        progress: Progress = iter,
    ) -> None:
        """Run the network, in eval mode, over `loader` and store every batch as part of `epoch`.

        Batches are (images, labels, sample ids), (images, labels), or mappings of the network's arguments with "labels"
        and "sample_ids"; samples without ids are numbered consecutively. For batches of another form, pass `identify`:
        it takes a batch and the number of samples before it, and returns ids and labels. Raises what `commit` raises.
        The modules' training flags are restored at the end.
        """
        training = [(module, module.training) for module in self.model.modules()]
        device, seen = device_of(self.model), 0
        identify = identify or Numbering(loader, alone=not self._together)
        try:
            self.model.eval()
            self._begin(epoch, step)
            with torch.inference_mode():
                for batch in progress(loader):
                    sample_ids, labels = identify(batch, seen)
                    called(self.model, moved(input_of(batch), device))
                    self.commit(sample_ids, labels, epoch=epoch, step=step)
                    seen += len(sample_ids)
            self._finish()
        finally:
            for module, flag in training:
                module.training = flag

    def _begin(self, epoch: int, step: int | None) -> EpochWriter:
        """Return the writer of an epoch; a new number finishes the previous epoch."""
        number, step = _as_int(epoch), None if step is None else _as_int(step)
        if self._epoch is None or self._epoch[0] != number:
            self._finish()
            self._epoch = number, self._open_epoch.enter_context(self._writer.epoch(number, step=step))
            self._stored.clear()
            self._open_epoch.push(self._settle)
        return self._epoch[1]

    def _settle(self, error: type[BaseException] | None, *_: object) -> None:
        """Store the batch that is not stored yet before the epoch ends, unless an exception ends it."""
        if error is None:
            self._store(shared_out=self._together)
        self._batch = None

    def _finish(self) -> None:
        """Publish the open epoch, if there is one."""
        self._epoch = None
        self._open_epoch.close()


class _Passes:
    """The values that forward passes gave since the last commit: a block (N, width) for each completed pass.

    Separate blocks for the gates would fragment the memory of the network's feature maps, which would then need more.
    """

    def __init__(self, columns: Iterable[tuple[str, str]], width: int, forwards: str) -> None:
        self._columns, self._width, self._forwards = frozenset(columns), width, forwards
        self._thread: int | None = None  # the thread that runs the network, or ran it last
        self._running = False
        self._lock = Lock()
        self.forget()

    def forget(self) -> None:
        """Drop everything."""
        self._running = False
        self._block: Tensor | None = None
        self._kept: set[tuple[str, str]] = set()  # the kinds and gates whose columns of the block are filled
        self._blocks: list[Tensor] = []

    def begin(self, _: Any) -> None:
        """Prepare for a forward pass; RuntimeError if another thread is in the middle of one."""
        with self._lock:
            if self._running and self._thread != get_ident():
                raise RuntimeError(
                    "two threads run this network while a Recorder reads it, and their values could not be told apart: "
                    "let one thread run it, or give each a copy and a Recorder of its own"
                )
            if self._running or self._forwards == "last":  # the pass before was interrupted, or is superseded
                self.forget()
            self._thread, self._running = get_ident(), True
            self._block, self._kept = None, set()

    def keep(self, column: tuple[str, str], place: slice, values: Tensor) -> None:
        """Copy a gate's values (N, C) into their columns; ValueError if N differs from that of the gates before it."""
        if not self._running:  # a part of the network is being recomputed during a backward pass
            return
        if self._block is None:
            with torch.inference_mode(False):  # the next forward pass may be in another mode
                self._block = torch.empty(len(values), self._width, dtype=torch.float32, device=values.device)
        if len(values) != len(self._block):
            raise ValueError(
                f"{column[0]} of gate {column[1]!r} has {len(values)} rows, gates before it have {len(self._block)}: "
                "record gates with one row per sample, or these and the others in runs of their own"
            )
        self._block[:, place] = values
        self._kept.add(column)

    def complete(self, _: Any) -> None:
        """Keep the block of a forward pass in which every gate gave its values."""
        if self._block is not None and self._columns == self._kept:
            self._blocks = [*(self._blocks if self._forwards == "all" else self._blocks[:1]), self._block]
            self._running, self._block = False, None

    def leave(self, _: Any) -> None:
        """Drop everything if a forward pass failed: the passes before it may be of other samples."""
        if self._running and self._thread == get_ident():
            self.forget()

    def take(self) -> Tensor:
        """Return the values to commit; RuntimeError if there are none, or if it is not clear which are meant."""
        blocks, interrupted = self._blocks, self._running
        self.forget()
        if interrupted or not blocks:
            raise RuntimeError("nothing to commit: run the network on the samples first, inside `with Recorder(...)`")
        if self._thread != get_ident():
            raise RuntimeError("nothing to commit: the last forward pass was another thread's, which must commit it")
        if self._forwards == "one" and len(blocks) > 1:
            raise RuntimeError(
                "several forward passes were made since the last commit: commit after each, or take the last or all "
                'of them with Recorder(..., forwards="last") or forwards="all"'
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


class _Batch:
    """A committed batch, copied to the CPU; from a CUDA device, the copy is asynchronous."""

    def __init__(self, rows: EpochWriter, block: Tensor, sample_ids: Any, labels: Any | None) -> None:
        self.rows = rows
        self.copying = block.device.type == "cuda"
        self._parts = [_to_processor(part) for part in (block, sample_ids, labels)]
        self._copied = torch.cuda.Event() if self.copying else None
        if self._copied:
            self._copied.record(torch.cuda.current_stream(block.device))

    def arrive(self) -> list[Any]:
        """Wait for the copies and return the values (N, width), ids and labels, tensors as arrays."""
        if self._copied:
            self._copied.synchronize()
        return [part.numpy() if isinstance(part, Tensor) else part for part in self._parts]


def _to_processor(values: Any) -> Any:
    """Copy a tensor to CPU memory, which is pinned if the tensor comes from a CUDA device; return anything else."""
    return (
        values.detach().to("cpu", non_blocking=values.device.type == "cuda") if isinstance(values, Tensor) else values
    )


def _as_int(number: Any) -> Any:
    """Return an integer of another library, such as NumPy, as a Python int; anything else as it is, to be refused."""
    return index(number) if hasattr(number, "__index__") and not isinstance(number, bool) else number


def _side_by_side(gates: Sequence[Gate], kinds: Sequence[str]) -> tuple[dict[tuple[str, str], slice], int]:
    """Return the columns of each kind and gate in one matrix that holds all of them, and the matrix's width."""
    columns, width = {}, 0
    for kind in kinds:
        for gate in gates:
            columns[kind, gate.name] = slice(width, width + gate.channels)
            width += gate.channels
    return columns, width
