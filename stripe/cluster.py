"""Measure a run on a Dask cluster: the workers read the run themselves and return moments or finished statistics.

The workers need stripe and the run: a directory that all of them see under the same path, or s3://. If a worker dies,
another one repeats the task that it was working on.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from stripe.gate import Gate
from stripe.messages import one_line
from stripe.stats import Measured, Moments, measure, summarize, tabulate
from stripe.stats.runs import gates_of
from stripe.store import Epoch, Part, Run, open_run
from stripe.store.moments import merged

if TYPE_CHECKING:
    from distributed import Client, Future

TIMEOUT = 20  # seconds to wait for the scheduler, and then for a first worker
FAN_IN = 8  # moments merged by one task

Key = tuple[int, str]  # epoch, gate


@contextmanager
def connect(address: str, timeout: float | None = None) -> Iterator[Client]:
    """Join the cluster whose scheduler listens at `address`, such as "tcp://10.0.0.1:8786", within TIMEOUT seconds.

    Raises:
        ConnectionError: no scheduler answers, or the scheduler has no worker.
        ModuleNotFoundError: Dask is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ModuleNotFoundError("a cluster needs Dask: pip install 'stripe-observation[cluster]'") from error
    timeout = TIMEOUT if timeout is None else timeout
    try:
        client = Client(address, timeout=timeout)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at '{address}' ({one_line(error)}): start one with `dask scheduler`"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise ConnectionError(
                f"the Dask scheduler at '{address}' has no worker: start some with `dask worker {address}`"
            ) from error
        yield client


def summarize_on(client: Client, run: Run, *, rank: bool = False, **options: Any) -> pd.DataFrame:
    """Return the table of `stats.summarize(run, rank=..., **options)`, with the rows read on the cluster.

    Moments that the run keeps beside its rows are small and are read locally. Where they are missing, the workers
    measure the moments of each part, and these are merged: results agree with the local ones up to the rounding of
    means, 1e-12 relative. With `rank`, each task measures one gate at one epoch, and every result equals the local one
    (the rank to within 1e-6 where workers run BLAS on another processor or with another number of threads).

    Raises:
        ValueError: the run is empty or damaged, or the workers find another run at its path.
        OSError: the workers cannot read the run.
    """
    if not run.has_samples or (run.keeps_moments and not rank):
        return summarize(run, rank=rank, **options)
    if not rank:
        return summarize(_Measured(run, moments_on(client, run)), **options)
    path, stamp = _place(run)
    epochs, gates = options.pop("epochs", None), options.pop("gates", None)
    tasks = [(epoch, gate) for epoch in (run.epochs if epochs is None else epochs) for gate in gates_of(run, gates)]
    futures = [client.submit(_measure, path, stamp, *task, options, pure=False) for task in tasks]
    measured: list[list[Measured]] = _gathered(client, futures)
    return tabulate(each for some in measured for each in some)


def moments_on(client: Client, run: Run) -> dict[Key, Moments]:
    """Return `run.moments()` of a run with samples, measured on the cluster part by part and merged in a tree."""
    path, stamp = _place(run)
    found: dict[Key, Moments] = {}
    trees = []
    for epoch in sorted(run.manifest.epochs, key=lambda epoch: epoch.epoch):
        parts = [client.submit(_moments, path, stamp, epoch.epoch, part, pure=False) for part in epoch.parts]
        trees.append(_merged(client, parts))
    for its in _gathered(client, trees):
        found |= its
    return found


class _Measured:
    """Stands for a run whose moments are known already."""

    keeps_moments = True

    def __init__(self, run: Run, moments: Mapping[Key, Moments]) -> None:
        self.epochs, self.gates, self.has_samples = run.epochs, run.gates, run.has_samples
        self.attention, self.batches, self.labels, self._moments = run.attention, run.batches, run.labels, moments

    def moments(self, epochs: Sequence[int], gates: Sequence[str]) -> Mapping[Key, Moments]:
        return {(epoch, gate): self._moments[epoch, gate] for epoch in epochs for gate in gates}


def _merged(client: Client, futures: list[Future[Any]]) -> Future[Any]:
    while len(futures) > 1:
        groups = [futures[start : start + FAN_IN] for start in range(0, len(futures), FAN_IN)]
        futures = [client.submit(merged, group, pure=False) for group in groups]
    return futures[0]


def _gathered(client: Client, futures: list[Future[Any]]) -> Any:
    """Wait for results; OSError if the cluster lost them, for instance because workers were repeatedly killed."""
    from distributed import CancelledError, KilledWorker

    try:
        return client.gather(futures)
    except (CancelledError, KilledWorker) as error:
        raise OSError(
            f"the cluster lost its work ({one_line(error)}): look at the memory and logs of its workers, then try again"
        ) from error


# ---- on the workers ----------------------------------------------------------------------------------------


def _measure(path: str, stamp: str, epoch: int, gate: Gate, options: dict[str, Any]) -> list[Measured]:
    return list(measure(_open(path, stamp), [epoch], [gate], rank=True, **options))


def _moments(path: str, stamp: str, epoch: int, part: Part) -> dict[Key, Moments]:
    alone = copy.copy(_open(path, stamp))  # as if the run held this part only
    alone.manifest, alone.epochs = replace(alone.manifest, epochs=(Epoch(epoch, (part,)),)), [epoch]
    return alone.moments()


@lru_cache(maxsize=4)
def _open(path: str, stamp: str) -> Run:
    """Open the run on a worker; ValueError if it is not the run that is to be measured."""
    try:
        run = open_run(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"a worker finds no run at '{path}': put it where all workers see it, a shared directory or s3://"
        ) from error
    if _stamp(run) != stamp:
        raise ValueError(f"a worker finds another run at '{path}', or it has changed: measure it again")
    return run


def _place(run: Run) -> tuple[str, str]:
    """Return the path where workers find the run, and the stamp by which they recognise it."""
    return run.path if "://" in run.path else os.path.abspath(run.path), _stamp(run)


def _stamp(run: Run) -> str:
    return hashlib.sha256(run.manifest.to_json().encode()).hexdigest()
