"""An ONNX file in memory without its weights, which stay on disk to be read one at a time or mapped by a session.

Python's protobuf would hold a file of 2 GB in memory twice, and cannot hold a larger one at all.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from stripe.messages import listing, one_line

Tensor = npt.NDArray[Any]
Proto = TypeVar("Proto", onnx.ModelProto, onnx.GraphProto, onnx.NodeProto, onnx.TensorProto)

LARGE = 1024
"""Size in bytes from which weights stay on disk; a smaller one may be a shape, which a session must see at once."""
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
SPOOLED = "weights"  # name of the file in a spool
OLDEST_OPSET = 7  # before it, products did not broadcast as NumPy's do

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinear", "Integer", "QAttention", "QGemm", "QMoE", "MatMulNBits")


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a large weight are on disk."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the weight in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the weight as a new array."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return np.frombuffer(stream.read(self.bytes), self.dtype).reshape(self.shape)


class Spool:
    """A file for large weights in a temporary folder (see TMPDIR), deleted with the last network that uses it."""

    def __init__(self) -> None:
        """Make the folder."""
        self.folder = Path(tempfile.mkdtemp(prefix="stripe-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def keep(self, array: Tensor) -> Stored:
        """Append an array and return where it is."""
        path = self.folder / SPOOLED
        with path.open("ab") as stream:
            offset = aligned(stream)
            stream.write(np.ascontiguousarray(array).data)
        return Stored(path, offset, array.dtype, array.shape)


@dataclass(frozen=True, eq=False)
class GraphFile:
    """An ONNX network: `proto` holds nodes and small weights, `large` the others, by name.

    Constant nodes that hold a tensor are initialisers here; `lifted` names them, and `save` makes them nodes again,
    unless it puts the weights into a second file. `external` says that the file kept its weights in another one.
    """

    path: Path
    proto: onnx.ModelProto
    spool: Spool
    large: Mapping[str, Stored]
    lifted: tuple[str, ...] = ()
    external: bool = False

    @property
    def graph(self) -> onnx.GraphProto:
        """The graph."""
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return next((each.version for each in self.proto.opset_import if each.domain in ("", "ai.onnx")), 1)

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs of the network, without the weights that older files list among them."""
        weights = {tensor.name for tensor in self.graph.initializer}
        return [each for each in self.graph.input if each.name not in weights]

    @property
    def batch_size(self) -> int | None:
        """Number of samples that the network takes at once, None where it takes any number."""
        dims = self.inputs[0].type.tensor_type.shape.dim
        return dims[0].dim_value if dims and dims[0].dim_value > 0 else None

    def with_proto(self, proto: onnx.ModelProto, changed: Mapping[str, Tensor] | None = None) -> GraphFile:
        """Return a file with another graph, and some weights replaced or added."""
        large = dict(self.large)
        initialisers = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, array in (changed or {}).items():
            if name not in initialisers:
                initialisers[name] = proto.graph.initializer.add(name=name)
            large.pop(name, None)
            if array.nbytes >= LARGE:
                large[name] = _stored(initialisers[name], array, self.spool)
            else:
                initialisers[name].CopyFrom(numpy_helper.from_array(array, name))
        return replace(self, proto=proto, large=large)

    def weight(self, name: str) -> Tensor:
        """Return a weight as it is stored.

        Raises:
            KeyError: no weight has this name.
        """
        if name in self.large:
            return self.large[name].read()
        return _array({tensor.name: tensor for tensor in self.graph.initializer}[name])

    def session(self, *, plain: bool = False) -> Any:
        """Open the network in onnxruntime; `plain` runs every node unoptimised, on weights that stay mapped from disk.

        Raises:
            ValueError: onnxruntime cannot load it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
        options.log_severity_level = 4
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.spool.folder))
        if plain:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return onnxruntime.InferenceSession(
                self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise ValueError(f"'{self.path}' cannot be run by onnxruntime: {one_line(error)}") from error


def open_graph(path: str | os.PathLike[str]) -> GraphFile:
    """Open an ONNX file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete ONNX file, is quantised to integers, takes no input, or has too old an opset.
    """
    source = Path(path)
    try:
        proto = onnx.ModelProto.FromString(source.read_bytes())
    except DecodeError as error:
        raise ValueError(f"'{path}' is no ONNX file: {one_line(error)}") from error
    if not proto.graph.node or not proto.graph.output:
        raise ValueError(f"'{path}' is no ONNX file, or holds no network: expected nodes and outputs")
    external = any(tensor.external_data for tensor in proto.graph.initializer)
    lifted = _lift(proto.graph)
    spool = Spool()
    large = dict(_taken_out(proto.graph, source, spool))
    skeleton = proto.SerializeToString()
    del proto  # its memory is freed as a whole or not at all
    file = GraphFile(source, onnx.ModelProto.FromString(skeleton), spool, large, lifted, external)
    _require_usable(file)
    return file


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from nodes_of(inner)


def captured(node: onnx.NodeProto) -> set[str]:
    """Return the names that the graphs inside a node take from outside, and some that these graphs make themselves."""
    inner = [each for a in node.attribute for each in [*a.graphs, *([a.g] if a.HasField("g") else [])]]
    taken = {name for graph in inner for each in nodes_of(graph) for name in each.input}
    return taken | {output.name for graph in inner for output in graph.output}


def _require_usable(file: GraphFile) -> None:
    quantised = {node.op_type for node in nodes_of(file.graph) if any(part in node.op_type for part in _QUANTISED)}
    if quantised:
        raise ValueError(
            f"'{file.path}' is quantised ({listing(sorted(quantised))}): a constant merged into weights of 8 bits would"
            " be rounded to their steps; give the file from before its quantisation, and quantise what is folded"
        )
    if file.opset < OLDEST_OPSET:
        raise ValueError(
            f"'{file.path}' has opset {file.opset}; expected {OLDEST_OPSET} or later: convert it with"
            " onnx.version_converter.convert_version"
        )
    if not file.inputs:
        raise ValueError(f"'{file.path}' takes no input")


# ---- weights ----
def _lift(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Turn the Constant nodes that hold a tensor into initialisers; return their names."""
    kept, lifted = [], []
    for node in graph.node:
        tensors = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
        if node.op_type == "Constant" and tensors:
            graph.initializer.append(tensors[0])
            graph.initializer[-1].name = node.output[0]
            lifted.append(node.output[0])
        else:
            kept.append(node)
    if lifted:
        copies = onnx.GraphProto(node=kept)
        del graph.node[:]
        graph.node.extend(copies.node)
    return tuple(lifted)


def _taken_out(graph: onnx.GraphProto, source: Path, spool: Spool) -> Iterator[tuple[str, Stored]]:
    """Move the large weights of a graph into the spool, from the graph itself or from a file beside it."""
    for tensor in graph.initializer:
        if tensor.external_data:
            yield tensor.name, _stored(tensor, _beside(tensor, source).read(), spool)
        elif tensor.data_type in FLOATS and (array := _array(tensor)).nbytes >= LARGE:
            yield tensor.name, _stored(tensor, array, spool)


def _stored(tensor: onnx.TensorProto, array: Tensor, spool: Spool) -> Stored:
    """Put `array` into the spool, and make an initialiser refer to it there."""
    name, stored = tensor.name, spool.keep(array)
    tensor.Clear()
    tensor.name, tensor.data_type = name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    locate(tensor, SPOOLED, stored.offset, stored.bytes)
    return stored


def aligned(stream: IO[bytes]) -> int:
    """Pad a stream to the next position from which data can be mapped by itself; return that position."""
    stream.write(b"\0" * (-stream.tell() % mmap.ALLOCATIONGRANULARITY))
    return stream.tell()


def _beside(tensor: onnx.TensorProto, source: Path) -> Stored:
    """Return where a weight is that `source` keeps in another file."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    path = (source.parent / info.get("location", "")).resolve()
    if not path.is_relative_to(source.parent.resolve()) or not path.is_file():
        raise ValueError(
            f"'{source}' has weights in '{info.get('location')}', which is not in its folder: put it there"
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    stored = Stored(path, int(info.get("offset", 0)), dtype, tuple(tensor.dims))
    if stored.offset + stored.bytes > path.stat().st_size:
        raise ValueError(f"'{path}' ends before weight {tensor.name!r} of '{source}' does: it is not whole")
    return stored


def locate(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make an initialiser refer to the file that holds its weight, and to the weight's place there."""
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def copied(proto: Proto) -> Proto:
    """Return a copy of a network, a graph, a node or a tensor."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def _array(tensor: onnx.TensorProto) -> Tensor:
    return np.asarray(numpy_helper.to_array(tensor))


def referenced(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the tensors that nodes take or the network gives out."""
    taken = {name for node in graph.node for name in [*node.input, *captured(node)]}
    return taken | {output.name for output in graph.output}


def rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Make nodes take `new` instead of `old`."""
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def replace_node(graph: onnx.GraphProto, made: str, nodes: Sequence[onnx.NodeProto]) -> None:
    """Replace the node that makes the tensor `made` with `nodes`."""
    position = next(i for i, node in enumerate(graph.node) if made in node.output)
    graph.node.pop(position)
    for i, node in enumerate(nodes):
        graph.node.insert(position + i, node)


def prune(graph: onnx.GraphProto) -> None:
    """Remove the nodes, weights and descriptions that the outputs no longer need."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update([*node.input, *captured(node)])
            kept.append(node)
    copies = onnx.GraphProto(node=reversed(kept))
    del graph.node[:]
    graph.node.extend(copies.node)
    for field in (graph.initializer, graph.value_info, graph.sparse_initializer):
        for each in [each for each in field if getattr(each, "name", None) not in needed and hasattr(each, "name")]:
            field.remove(each)
