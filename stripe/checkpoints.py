"""Checkpoint files from strangers, read as tensors and plain values: no code runs, memory follows the file's size.

torch's reader runs no code of a file, but it unpacks archives that grow and builds whatever a file merely declares.
So what a file names and how large it says to be is looked at first, and what came of it is measured afterwards.
"""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from stripe.files import replaced
from stripe.messages import one_line

NUMPY_SCALARS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, type(np.dtype("float64")), type(np.dtype("float32"))),
]
"""What a NumPy number in a checkpoint, such as an accuracy, is pickled as; it runs no code of the file's."""
MAX_VALUES = 2**20  # values in a file, each as often as it is referred to: far above any real one
SHARED = 8  # the tensors of a file, which may share their bytes, add up to at most this many times its size

_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # at the head of a file of before torch 1.6: magic number, protocol, system, object, keys
_PLAIN = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|(__builtin__|builtins) (set|complex)|_codecs encode"
    r"|torch (Size|device|\w+Storage|bool|(b|)float\w+|u?int\d+|complex\d+)|torch\.storage (Typed|Untyped)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch\.nn\.parameter Parameter"
    r"|numpy\._?core\.multiarray scalar|numpy dtype|numpy\.dtypes \w+DType"
)
"""Names in a pickle that stand for tensors and plain values."""


def read_tensors(path: Path) -> dict[Any, Any]:
    """Read a file that torch or safetensors wrote; its tensors lie on the CPU, backed by the file.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, pipe or device.
        ValueError: it is truncated or foreign, names code, or declares more than it holds.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "not found"
        raise FileNotFoundError(
            f"checkpoint '{path}' {what}; expected a file, timm:NAME, torchvision:NAME or package.module:FACTORY"
        )
    try:
        content = _load(path)
        _require_honest(content, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, it is not a file of tensors and plain values alone ({one_line(error)}); "
            "its code was not run"
        ) from error
    except Exception as error:  # torch, zipfile and safetensors raise many kinds on foreign bytes
        raise ValueError(f"{path}: not a readable checkpoint (truncated or foreign): {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of weights, received {type(content).__name__}")
    return content


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by tensors and plain values, for `read_tensors`; OSError where it cannot be written."""
    with replaced(path) as partial, partial.open("wb") as file:  # given a path, torch would put its name into the file
        torch.save(content, file)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    names = {*(_names_in_archive(path) if zipped else _names_in_legacy_file(path))}
    if foreign := sorted(name for name in names if not _PLAIN.fullmatch(name)):
        raise pickle.UnpicklingError(f"it names {foreign[0].replace(' ', '.')}")
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _names_in_archive(path: Path) -> Iterator[str]:
    """Yield what the pickle of a zip archive names.

    ValueError for an archive that grows when unpacked, or has lost a bit: torch's reader compares no checksums.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"an archive that unpacks to {size} bytes; expected one as torch.save writes it, unpacked")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not have its checksum")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as file:
                    yield from _names(file)


def _names_in_legacy_file(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            yield from _names(file)


def _names(file: IO[bytes]) -> Iterator[str]:
    """Yield "module name" of every global that the pickle at the head of a file names."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif operation.name == "STACK_GLOBAL":  # torch's reader knows it not
            yield "a name put together at run time"


def _require_honest(content: Any, file_bytes: int) -> None:
    """Refuse tensors beyond what the file holds, and values that refer to each other without end (ValueError)."""
    waiting, count, total = [content], 0, 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values; expected weights and a few plain values")
        if isinstance(value, Tensor):
            total += _dense_bytes(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    if total > SHARED * file_bytes:
        raise ValueError(f"it declares tensors of {total} bytes and holds {file_bytes} bytes")


def _dense_bytes(tensor: Tensor) -> int:
    """Return how many bytes a copy takes; ValueError where that is more than the tensor itself has."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}; expected dense tensors")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} declares {size} bytes and has {tensor.untyped_storage().nbytes()}"
        )
    return size
