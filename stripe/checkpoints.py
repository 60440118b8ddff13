"""Untrusted checkpoint files, read as tensors and plain values: no code runs, and the file's size bounds the memory.

torch's reader runs no code from a file, but it unpacks archives that grow and builds whatever a file merely declares.
So the names and sizes that a file declares are checked before it is read, and the size of the result afterwards.
"""

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe.files import replaced
from stripe.messages import one_line
from stripe.pickles import Survey

NUMPY_SCALARS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, type(np.dtype("float64")), type(np.dtype("float32"))),
]
"""What a pickled NumPy number in a checkpoint, such as an accuracy, is rebuilt with; it runs no code from the file."""
MAX_VALUES = 2**20  # values in a file, counted once per reference: far above any real file
SHARED = 2  # the tensors of a file, which may share their bytes, add up to at most this many times its size
ROOM = 32 * 2**20  # bytes of memory that values other than tensors may take, beside twice the file's size
ENTRY_BYTES = 1200  # bytes of memory that Python's zipfile takes per entry
HEADER_GROWTH = 20  # the parsed header of a safetensors file takes at most this many times its length in memory

_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # at the head of a file from before torch 1.6: magic number, protocol, system, object, keys
_PLAIN = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|(__builtin__|builtins) (set|complex)|_codecs encode"
    r"|torch (Size|device|\w+Storage|bool|(b|)float\w+|u?int\d+|complex\d+)|torch\.storage (Typed|Untyped)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch\.nn\.parameter Parameter"
    r"|numpy\._?core\.multiarray scalar|numpy dtype|numpy\.dtypes \w+DType"
)
"""Names in a pickle that stand for tensors and plain values."""


def read_tensors(path: Path) -> dict[Any, Any]:
    """Read a file that torch or safetensors wrote; its tensors are on the CPU, mapped from the file where possible.

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


def write_tensors(path: str | Path, content: dict[str, Any], *, root: Path | None = None) -> None:
    """Write tensors and plain values for `read_tensors`; `root` and errors are those of `files.replaced`."""
    with (
        replaced(path, root=root) as partial,
        partial.open("wb") as file,
    ):  # given a path, torch would write the path's name into the file
        torch.save(content, file)


def _load(path: Path) -> Any:
    size = path.stat().st_size
    room = 2 * size + ROOM
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        header = int.from_bytes(head, "little")
        if header <= size and HEADER_GROWTH * header > room:
            raise ValueError(f"a header of {header} bytes in a file of {size}")
        return load_file(path)
    zipped = head.startswith(_ZIP)
    survey = Survey(room)
    (_survey_archive if zipped else _survey_legacy_file)(path, survey, room)
    if foreign := sorted(name for name in survey.names if not _PLAIN.fullmatch(name)):
        raise pickle.UnpicklingError(f"it names {foreign[0].replace(' ', '.')}")
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _survey_archive(path: Path, survey: Survey, room: int) -> None:
    """Survey the pickle in a zip archive.

    Raises ValueError for an archive that grows when unpacked, is damaged (torch's reader compares no checksums), or
    could be read differently by torch's reader than by Python's.
    """
    count = _entries_of_one_directory(path)
    if count * ENTRY_BYTES > room:
        raise ValueError(f"an archive of {count} entries in {path.stat().st_size} bytes")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"an archive that unpacks to {size} bytes; expected one as torch.save writes it, unpacked")
        names = [entry.orig_filename.lower() for entry in entries]  # torch's reader ignores case
        if len(entries) != count or len(set(names)) < count or not all(map(_plain_name, names)):
            raise ValueError("an archive of names that two readers may take for different ones")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not have its checksum")
        for entry, name in zip(entries, names, strict=True):
            if name.endswith("data.pkl"):
                survey.look(io.BytesIO(archive.read(entry)))


def _plain_name(name: str) -> bool:
    return name.isascii() and name.isprintable() and "\\" not in name


def _entries_of_one_directory(path: Path) -> int:
    """Return how many entries an archive has, after checking that it ends in one directory, where every reader looks.

    The end of an archive (PKWARE's APPNOTE 4.3.14 to 4.3.16) says where its directory is; a large archive says so
    twice. If more bytes follow, or the statements differ, Python and torch could see different contents.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
    signature, *disks, here, count, length, start, comment = struct.unpack("<4s4H2LH", tail[76:])
    end = size - 22
    if tail[56:60] == b"PK\6\7":  # the numbers are in a zip64 record, which must be right before its locator
        _, disk, end, total = struct.unpack("<4sLQL", tail[56:76])
        start_of_record, record_length, _, _, *disks, here, count, length, start = struct.unpack(
            "<4sQ2H2L4Q", tail[:56]
        )
        disks.append((start_of_record, record_length, disk, end, total) != (b"PK\6\6", 44, 0, size - 98, 1))
    if signature != b"PK\5\6" or any(disks) or comment or here != count or start + length != end:
        raise ValueError("an archive without one directory at its end: expected one as torch.save writes it")
    return int(count)


def _survey_legacy_file(path: Path, survey: Survey, room: int) -> None:
    """Survey the pickles at the head of a file from before torch 1.6."""
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            survey.look(file)


def _require_honest(content: Any, file_bytes: int) -> None:
    """Raise ValueError for tensors beyond what the file holds, and for values that refer to each other without end."""
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
    """Return the bytes that a copy of a tensor takes; ValueError if its storage holds fewer or it is not dense."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}; expected dense tensors")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} declares {size} bytes and has {tensor.untyped_storage().nbytes()}"
        )
    return size
