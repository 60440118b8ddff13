"""The directory of a training: who may write into it, and whether a resumed training is still the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stripe.checkpoints import read_tensors
from stripe.files import own_path, require_regular
from stripe.locks import sole_writer
from stripe.messages import shortened
from stripe.recipe import Recipe

METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
RESUMABLE = {"epoch", "state_dict", "optimizer", "scaler", "metrics"}  # what a checkpoint to resume must hold
HOW = {"batch"}  # keys of a description that say how the network is trained, not what is trained on which data


@dataclass(frozen=True)
class Changes:
    """How a resumed training differs from the saved one, as one text per difference.

    Attributes:
        what: differences in the network, the data, their split or the seed, which make it another training.
        how: differences in the recipe, such as the schedule: the same training goes on in another way.
    """

    what: tuple[str, ...]
    how: tuple[str, ...]


def changes(saved: Mapping[str, Any], recipe: Recipe, description: Mapping[str, Any]) -> Changes:
    """Compare what a last.pt says of its training with what is requested now; what it does not state is skipped."""
    old, new = _known(saved.get("description")), dict(description)
    what = [_change(key, old[key], new.get(key)) for key in sorted(old.keys() - HOW) if old[key] != new.get(key)]
    how = [_change(key, old[key], new[key]) for key in sorted(HOW & old.keys() & new.keys()) if old[key] != new[key]]
    was, now = _known(saved.get("recipe")), asdict(recipe)
    for key in sorted(was.keys() & now.keys()):
        if _plain(was[key]) != _plain(now[key]):
            (what if key == "seed" else how).append(_change(key, was[key], now[key]))
    return Changes(tuple(dict.fromkeys(what)), tuple(how))


def require_same(path: Path, found: Changes) -> None:
    """Raise ValueError if what is resumed would be another training."""
    if found.what:
        raise ValueError(
            f"'{path}' is of another training ({shortened('; '.join(found.what), 500)}): resume with the options that "
            "it began with, or pass --allow-changed (allow_changed=True), after which it may be validated on images "
            "that it was trained on"
        )


def read_resumable(path: Path) -> dict[str, Any]:
    """Read a resumable checkpoint without executing anything in it; ValueError for any other file."""
    try:
        saved = read_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"'{path}' is no checkpoint, or was cut short: resume from the last.pt of a training ({error})"
        ) from error
    missing = RESUMABLE - saved.keys()
    if missing:
        raise ValueError(f"'{path}' lacks {', '.join(sorted(missing))}: only a training's last.pt can be resumed")
    metrics = saved["metrics"]
    if not isinstance(metrics, list) or not all(isinstance(row, dict) and "val_accuracy" in row for row in metrics):
        raise ValueError(f"'{path}' holds metrics that no training wrote: resume from another last.pt")
    return saved


@contextmanager
def sole_training(directory: Path, resume: Path | None) -> Iterator[None]:
    """Keep other trainings out of a directory, and this one out of another training's; create the folders.

    Raises:
        BlockingIOError: another training writes here.
        FileExistsError: the directory holds a training other than the resumed one.
        OSError: the directory cannot be written, or leads elsewhere by a link.
    """
    _require_free(directory, resume)
    folder = own_path(directory, CHECKPOINTS)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, f"training '{directory}'"):
        _require_free(directory, resume)  # another training may have begun and ended meanwhile
        yield


def _require_free(directory: Path, resume: Path | None) -> None:
    metrics = directory / METRICS
    if not metrics.exists():
        return
    if resume is None:
        raise FileExistsError(f"'{directory}' holds a training already: resume its last.pt, or use another folder")
    own = resume.resolve().parent == (directory / CHECKPOINTS).resolve()
    if not own and not _begins_with(metrics, read_resumable(resume)["metrics"]):
        raise FileExistsError(
            f"'{directory}' holds another training than '{resume}': resume into that one's own folder, or an empty one"
        )


def _begins_with(path: Path, rows: list[dict[str, float]]) -> bool:
    """Return whether the metrics in a file begin with these rows."""
    try:
        require_regular(path)
        noted = pd.read_csv(path).iloc[: len(rows)]
        wanted = pd.DataFrame(rows)[list(noted.columns)]
        return len(noted) == len(rows) and np.allclose(
            noted.to_numpy(float), wanted.to_numpy(float), rtol=1e-9, atol=0, equal_nan=True
        )
    except (OSError, ValueError, KeyError):
        return False


def _known(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _change(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(_change(f"{name} {key}", old.get(key), new.get(key)) for key in differing)
    return f"{name}: {old!r:.80} then, {new!r:.80} now"
