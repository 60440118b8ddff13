"""Writing an ONNX file weight by weight, so that the file is never in memory as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from onnx import helper

from stripe.files import replaced
from stripe.graphs.file import GraphFile, aligned, copied, locate
from stripe.messages import one_line

LARGEST_FILE = 2**31 - 2**20
"""Largest size of a protobuf message in bytes; weights that would exceed it go into a file of their own."""

_GRAPH, _NODE, _INITIALISER = 7, 1, 5  # field numbers: one of ModelProto, two of GraphProto
_BYTES = 2  # protobuf's wire type of messages


def save(file: GraphFile, path: str | os.PathLike[str]) -> Path:
    """Write an ONNX file, with its weights in a second file where the original had one or protobuf's limit requires it.

    Raises:
        ArithmeticError: the network is not valid ONNX.
        ValueError: the file that it was made from is not valid ONNX either.
        OSError: the file cannot be written.
    """
    target = Path(path)
    _check(file)
    if file.external or sum(stored.bytes for stored in file.large.values()) > LARGEST_FILE:
        _save_beside(file, target)
        return target
    body = file.spool.folder / "body"
    with body.open("wb") as stream:
        for field, content in _parts(file):
            _write_field(stream, field, content)
        stream.write(_rest(file).SerializeToString())
    model = copied(file.proto)
    model.ClearField("graph")
    with replaced(target) as partial, partial.open("wb") as stream:
        stream.write(model.SerializeToString())
        stream.write(_varint(_GRAPH << 3 | _BYTES) + _varint(body.stat().st_size))
        with body.open("rb") as graph:
            shutil.copyfileobj(graph, stream)
    body.unlink()
    return target


def _check(file: GraphFile) -> None:
    """Run onnx's checker on the network, with the weights left where they are."""
    checked = file.spool.folder / "checked.onnx"
    checked.write_bytes(file.proto.SerializeToString())
    try:
        onnx.checker.check_model(str(checked))
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(str(file.path))
        except onnx.checker.ValidationError as own:
            raise ValueError(f"'{file.path}' is no valid ONNX to begin with: {one_line(own)}") from own
        raise ArithmeticError(f"what was made of '{file.path}' is no valid ONNX: {one_line(error)}") from error
    finally:
        checked.unlink()


def _parts(file: GraphFile) -> Iterator[tuple[int, bytes]]:
    """Yield, as fields of a graph, nodes for the weights that Constant nodes held, then the other large weights."""
    later = []
    for tensor in file.graph.initializer:
        if tensor.name in file.lifted:
            node = helper.make_node("Constant", [], [tensor.name], value=_whole(file, tensor))
            yield _NODE, node.SerializeToString()
        elif tensor.name in file.large:
            later.append(tensor)
    for tensor in later:
        yield _INITIALISER, _whole(file, tensor).SerializeToString()


def _rest(file: GraphFile) -> onnx.GraphProto:
    """Return the graph without what `_parts` yields."""
    rest = copied(file.graph)
    for tensor in [each for each in rest.initializer if each.name in file.large or each.name in file.lifted]:
        rest.initializer.remove(tensor)
    return rest


def _whole(file: GraphFile, tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return an initialiser with its weight inside."""
    whole = copied(tensor)
    if tensor.name in file.large:
        del whole.external_data[:]
        whole.data_location = onnx.TensorProto.DEFAULT
        whole.raw_data = file.weight(tensor.name).tobytes()
    return whole


def _save_beside(file: GraphFile, target: Path) -> None:
    data = target.with_name(f"{target.name}.data")
    proto = copied(file.proto)
    with replaced(data) as partial, partial.open("wb") as stream:
        for tensor in (each for each in proto.graph.initializer if each.name in file.large):
            array = file.weight(tensor.name)
            locate(tensor, data.name, aligned(stream), array.nbytes)
            stream.write(np.ascontiguousarray(array).data)
    with replaced(target) as partial:
        partial.write_bytes(proto.SerializeToString())


def _write_field(stream: IO[bytes], field: int, content: bytes) -> None:
    stream.write(_varint(field << 3 | _BYTES) + _varint(len(content)))
    stream.write(content)


def _varint(number: int) -> bytes:
    """Encode a number as protobuf does: seven bits a byte, lowest first, the eighth set in all bytes but the last."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
