"""What a network is run on: arrays by input name, cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx
from numpy.typing import ArrayLike

from stripe.graphs.file import GraphFile, Tensor
from stripe.messages import listing, one_line, require

Inputs = ArrayLike | Mapping[str, ArrayLike] | Sequence[ArrayLike]
"""An array (N, ...); for a network of several inputs, a mapping by their names, or a list in their order."""

BATCH = 32
LABELS = "labels"
"""Name of the array of a file that holds labels, unless the network has an input of this name."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples: inputs by name, as the network takes them, labels (n,) where they are known, and their ids (n,)."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    sample_ids: Tensor


def by_name(file: GraphFile, inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs by name, in the types that the network takes.

    Raises:
        ValueError: the names, the number, the types or the dimensions of the inputs are not those of the network.
    """
    names = [each.name for each in file.inputs]
    if isinstance(inputs, Mapping):
        given = {name: np.asarray(array) for name, array in inputs.items()}
    elif isinstance(inputs, tuple | list) and len(names) > 1:
        require(len(inputs) == len(names), f"{len(inputs)} inputs were given; '{file.path}' takes {listing(names)}")
        given = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True)}
    else:
        require(len(names) == 1, f"'{file.path}' takes {len(names)} inputs: give a mapping of {listing(names)}")
        given = {names[0]: np.asarray(inputs)}
    require(given.keys() == set(names), f"inputs {listing(given)} were given; '{file.path}' takes {listing(names)}")
    return {each.name: _as_taken(each, given[each.name]) for each in file.inputs}


class Batches:
    """Inputs cut into batches of at most `size`, or of what the network takes at once; they can be iterated repeatedly.

    An input whose first dimension is not the first input's number of samples goes into every batch whole. Where the
    network takes a fixed number of samples and the last batch has fewer, its last sample is repeated to fill it;
    `sample_ids` does not count the repeats.
    """

    def __init__(self, file: GraphFile, inputs: Inputs, labels: ArrayLike | None = None, *, size: int = BATCH) -> None:
        """Take arrays and, where they are known, labels (N,).

        Raises:
            ValueError: the arrays do not fit the network, or the labels do not fit the arrays.
        """
        self._arrays = by_name(file, inputs)
        first = self._arrays[file.inputs[0].name]
        require(first.ndim and len(first), f"input '{file.inputs[0].name}' holds no sample")
        self._count, self._size, self._fixed = len(first), file.batch_size or size, file.batch_size is not None
        self._labels = None if labels is None else np.asarray(labels)
        require(
            self._labels is None or self._labels.shape == (self._count,),
            f"labels are not of the {self._count} samples: expected shape ({self._count},)",
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        for start in range(0, self._count, self._size):
            stop = min(start + self._size, self._count)
            rows = np.arange(start, stop)
            if self._fixed:
                rows = np.minimum(np.arange(start, start + self._size), self._count - 1)
            parts = {
                name: np.ascontiguousarray(array[rows]) if array.ndim and len(array) == self._count else array
                for name, array in self._arrays.items()
            }
            labels = None if self._labels is None else self._labels[start:stop]
            yield Batch(parts, labels, np.arange(start, stop))


def read_inputs(file: GraphFile, path: str, *, samples: int | None = None, size: int = BATCH) -> Iterator[Batch]:
    """Yield the batches of a .npz or .npy file, or of all such files in a folder in the order of their names.

    A .npz file holds an array for each input, by its name, and may hold labels (n,) as "labels"; where the network has
    one input, a single array besides the labels is that input, whatever its name. The first dimension counts samples.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a file holds no arrays as NumPy writes them, or its arrays do not fit.
    """
    root = Path(path)
    files = sorted(each for each in root.iterdir() if each.suffix in (".npz", ".npy")) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"'{path}' holds no .npz or .npy file")
    seen = 0
    for each in files:
        arrays, labels = _read(file, each)
        for batch in Batches(file, arrays, labels, size=size):
            room = len(batch.sample_ids) if samples is None else min(len(batch.sample_ids), samples - seen)
            if room <= 0:
                return
            known = None if batch.labels is None else batch.labels[:room]
            yield Batch(batch.inputs, known, np.arange(seen, seen + room))
            seen += room


def first_of(file: GraphFile, batches: Iterable[Batch], count: int) -> dict[str, Tensor]:
    """Return the inputs of the first `count` samples, or of as many as the network takes at once.

    Raises:
        ValueError: there is no batch.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("there are no inputs: give at least one sample")
    if file.batch_size:
        return batch.inputs
    total = len(batch.sample_ids)
    return {name: a[:count] if a.ndim and len(a) == total else a for name, a in batch.inputs.items()}


def _read(file: GraphFile, path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    names = [each.name for each in file.inputs]
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {names[0]: loaded}
    except (ValueError, BadZipFile, EOFError) as error:
        raise ValueError(f"'{path}' is no file of arrays, as numpy.savez writes them: {one_line(error)}") from error
    labels = arrays.pop(LABELS, None) if LABELS not in names else None
    if len(names) == len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    return arrays, labels


def _as_taken(info: onnx.ValueInfoProto, array: Tensor) -> Tensor:
    """Return an array in the type of an input.

    Raises:
        ValueError: the array is of another kind, or has other dimensions.
    """
    kind = info.type.tensor_type
    wanted = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    require(
        array.dtype == wanted
        or array.dtype.kind in "fiub"
        and wanted.kind in "fiub"
        and (wanted.kind == "f") >= (array.dtype.kind == "f"),
        f"input '{info.name}' is of type {array.dtype}; expected {wanted}",
    )
    dims = [each.dim_value for each in kind.shape.dim]
    fits = len(dims) == array.ndim and all(
        n in (0, -1, m) or i == 0 for i, (n, m) in enumerate(zip(dims, array.shape, strict=True))
    )
    shown = ", ".join(each.dim_param or str(each.dim_value) for each in kind.shape.dim)
    require(not kind.HasField("shape") or fits, f"input '{info.name}' has shape {array.shape}; expected ({shown})")
    return np.ascontiguousarray(array, wanted)
