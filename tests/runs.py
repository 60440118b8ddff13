"""Small runs that the tests of the store record, look at and damage."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from stripe.gate import Gate
from stripe.store import RunWriter

GATES = (Gate("layer1.0.se", 4), Gate("layer2.0.se", 3))


def vectors(samples: int, gates: tuple[Gate, ...] = GATES, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {gate.name: rng.random((samples, gate.channels), dtype=np.float32) for gate in gates}


def writer(path: str | Path, **changes: Any) -> RunWriter:
    return RunWriter(path, **({"model": {"arch": "resnet"}, "data": {"uri": "digits"}, "gates": GATES} | changes))


def record(path: str | Path, *epochs: int, samples: int = 6, seed: int = 0, **changes: Any) -> Path:
    """Record the same values at each epoch, in two batches; the epoch number is added to the seed."""
    with writer(path, **changes) as run:
        for number in epochs:
            values = vectors(samples, seed=seed + number)
            with run.epoch(number) as epoch:
                for rows in (slice(0, samples // 2), slice(samples // 2, samples)):
                    ids = np.arange(samples)[rows]
                    squeeze = {"squeeze": {n: 2 * v[rows] for n, v in values.items()}} if changes.get("squeeze") else {}
                    epoch.append(ids, ids % 3 - 1, {n: v[rows] for n, v in values.items()}, **squeeze)
    return Path(path)


def listing(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def parts(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*.parquet"))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@contextmanager
def refused(kind: type[BaseException], *words: str) -> Iterator[None]:
    """Expect an error of one line that holds all the words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    assert all(word in message for word in words), message


@contextmanager
def sizes_of(row_group: int, part: int) -> Iterator[None]:
    """Write row groups and parts of so many bytes."""
    with mock.patch("stripe.store.rows.ROW_GROUP_BYTES", row_group), mock.patch("stripe.store.parts.PART_BYTES", part):
        yield


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "run.json").read_text())
    change(manifest)
    (path / "run.json").write_text(json.dumps(manifest))


def record_until(path: Path, interruption: type[BaseException], **changes: Any) -> None:
    """Write something of epoch 2, then raise."""
    with writer(path, **changes) as run, run.epoch(2) as epoch:
        epoch.append(IDS, None, vectors(4))
        if run._manifest.has_samples:
            epoch._hand_over()
            epoch._wait()
        else:
            epoch.finish()
        assert (path / ".unfinished/epoch=0002/part-0000-000").exists()
        raise interruption


def several_ranks(path: Path, ids: list[list[int]], **changes: Any) -> list[BaseException]:
    """Record one epoch from as many threads as there are lists of ids, each thread a rank."""
    barrier, errors = threading.Barrier(len(ids), timeout=30), []

    def one(rank: int) -> None:
        try:
            with writer(path, rank=rank, barrier=barrier.wait, **changes) as run, run.epoch(1) as epoch:
                if ids[rank]:
                    values = {name: rows[ids[rank]] for name, rows in vectors(20).items()}
                    epoch.append(ids[rank], [i % 3 for i in ids[rank]], values)
            assert run.epochs == [1]
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


IDS = np.arange(4)
REFUSED_BATCHES: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "repeated id": (([0, 1, 1, 2], None, vectors(4)), ("sample ids", "given twice: 1")),
    "wrong channels": (
        (IDS, None, vectors(4) | {"layer1.0.se": np.zeros((4, 5))}),
        ("layer1.0.se", "(4, 5)", "(4, 4)"),
    ),
    "spatial axes left": (
        (IDS, None, vectors(4) | {"layer2.0.se": np.zeros((4, 3, 1, 1))}),
        ("(4, 3, 1, 1)", "(4, 3)"),
    ),
    "too few rows": ((IDS, None, vectors(3)), ("(3, 4)", "(4, 4)")),
    "missing gate": ((IDS, None, {"layer1.0.se": np.zeros((4, 4))}), ("lacks attention:layer2.0.se",)),
    "unknown gate": ((IDS, None, vectors(4) | {"fc": np.zeros((4, 4))}), ("unknown attention:fc",)),
    "squeeze not recorded": (
        (IDS, None, vectors(4), vectors(4)),
        ("unknown squeeze:layer1.0.se", "squeeze only where"),
    ),
    "float ids": (([0.5, 1, 2, 3], None, vectors(4)), ("sample ids", "float64")),
    "too few labels": ((IDS, [1, 2], vectors(4)), ("label", "(2,)", "(4,)")),
    "two-dimensional labels": ((IDS, np.ones((4, 2), int), vectors(4)), ("labels", "(4, 2)")),
    "labels beyond int32": ((IDS, [0, 1, 2, 2**40], vectors(4)), ("labels", "outside")),
}
