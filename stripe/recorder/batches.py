"""Finding the network's input, the labels and the sample ids in a loader's batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

Identify = Callable[[Any, int], tuple[Any, Any | None]]
"""Takes a batch and the number of samples before it; returns sample ids and labels (None: unknown)."""

LABEL_KEYS = ("labels", "label")
ID_KEY = "sample_ids"


def input_of(batch: Any) -> Any:
    """Return the network's input: a mapping without its labels and ids, else the first item of the batch."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in (*LABEL_KEYS, ID_KEY)}
    return batch[0] if isinstance(batch, tuple | list) else batch


class Numbering:
    """Identifies the samples of one pass over a loader: an `Identify` for batches of every common form.

    Batches are (images, labels, sample ids), (images, labels), images alone, or mappings with "labels" (or "label") and
    "sample_ids". Samples without ids are numbered consecutively; in a group of processes, by their places in the data
    set, which are read from the loader's sampler.
    """

    def __init__(self, loader: Any = None, *, alone: bool = True) -> None:
        """Prepare for one pass over `loader`, made by this process alone or by every process of a group."""
        self._loader, self._alone = loader, alone
        self._places: Iterator[int] | None = None

    def __call__(self, batch: Any, seen: int) -> tuple[Any, Any | None]:
        """Return the ids and labels of a batch that comes after `seen` samples.

        Raises ValueError for a batch without ids if processes share a loader whose order is not known.
        """
        if isinstance(batch, Mapping):
            ids = batch.get(ID_KEY)
            labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        else:
            _, labels, ids, *_ = (*batch, None, None) if isinstance(batch, tuple | list) else (batch, None, None)
        if ids is None:
            counted: Any = labels if hasattr(labels, "__len__") else _first_tensor(input_of(batch))
            ids = self._numbers(len(counted), seen)
        return ids, labels

    def _numbers(self, size: int, seen: int) -> Any:
        if self._alone:
            return range(seen, seen + size)
        if self._places is None:
            self._places = iter(_places(self._loader))
        return list(islice(self._places, size))


def _places(loader: Any) -> Iterable[int]:
    """Return the data-set indices of the samples that a loader gives to this process, in order."""
    batches = getattr(loader, "batch_sampler", None)
    inner = getattr(batches, "batch_sampler", batches)  # accelerate deals out the batches of another sampler
    sampler = getattr(inner, "sampler", None)
    if batches is None or not isinstance(sampler, DistributedSampler | SequentialSampler):
        raise ValueError(
            "several processes record one run, and nothing says which samples these are: let the loader yield "
            "(images, labels, sample ids), or pass identify="
        )
    return chain.from_iterable(batches)


def _first_tensor(given: Any) -> Tensor:
    """Return the first tensor of a network's input, which has one row per sample."""
    while not isinstance(given, Tensor):
        given = next(iter(given.values() if isinstance(given, Mapping) else given))
    return given


def classes_of(labels: Any, samples: int) -> Any | None:
    """Return `labels` unchanged if they are one class number for each of `samples` samples, else None."""
    if isinstance(labels, Tensor):
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        return labels if whole and labels.shape == (samples,) else None
    try:
        values = np.asarray(labels)
    except ValueError:  # lists of different lengths
        return None
    return labels if values.dtype.kind in "iu" and values.shape == (samples,) else None


def moved(given: Any, device: Any) -> Any:
    """Return a network's input with its tensors on `device`."""
    if isinstance(given, Tensor):
        return given.to(device)
    if isinstance(given, Mapping):
        return {key: moved(value, device) for key, value in given.items()}
    return type(given)(moved(value, device) for value in given) if isinstance(given, tuple | list) else given
