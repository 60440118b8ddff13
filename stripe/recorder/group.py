"""What the processes of a job agree on when they record one run: when it begins and ends, and who stores a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed


def is_running() -> bool:
    """Return whether this process belongs to a torch.distributed group of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def place() -> dict[str, Any]:
    """Return this process's rank and the group's barrier, as arguments of RunWriter."""
    return {"rank": distributed.get_rank(), "barrier": barrier}


def barrier() -> None:
    """Wait for the group; a one-line RuntimeError if one of its processes is gone."""
    _together(distributed.barrier)


def owned(ids: NDArray[np.int64], stored: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Return which of the samples `ids` (n,) this process must store; the others are stored already or by a lower rank.

    Every process calls it, with the `ids` that it has not stored yet and those that it has `stored`. Samplers that must
    give every process the same number of samples, or of batches, repeat some samples in a process's last batch.
    """
    shares: list[Any] = [None] * distributed.get_world_size()
    mine = np.concatenate([np.zeros(0, np.int64), *stored])
    _together(lambda: distributed.all_gather_object(shares, (mine, ids)))
    taken = [each for each, _ in shares] + [held for _, held in shares[: distributed.get_rank()]]
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    found: NDArray[np.bool_] = first & ~np.isin(ids, np.concatenate(taken))
    if len(ids) - found.sum() >= len(shares):
        warnings.warn(
            f"{len(ids) - found.sum()} samples that were recorded before or by another process are stored once: if they"
            " are other samples, their ids must differ",
            stacklevel=2,
        )
    return found


def _together(act: Callable[[], object]) -> None:
    try:
        act()
    except RuntimeError as error:
        raise RuntimeError(
            "another process of this job is gone: what is finished is kept, start the job again to go on "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
