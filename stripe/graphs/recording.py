"""Attention of an ONNX network: its gates, their values on many samples, and the run that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper

from stripe.folding.uses import GateUse, Sums
from stripe.gate import Gate, Gates, product_of
from stripe.gates.graph import FACTORS
from stripe.gates.rules import Candidate, candidates_of
from stripe.graphs.file import GraphFile, Tensor, copied, open_graph
from stripe.graphs.inputs import Batch, Batches, Inputs, first_of
from stripe.graphs.trace import run, trace
from stripe.messages import Progress
from stripe.store import CONTENTS, RunWriter

SEARCHED = 3
"""Number of samples on which gates are searched for."""

Path = str | PathLike[str]


def find_gates(path: Path | GraphFile, inputs: Inputs | Iterable[Batch], *, normalisers: Sequence[str] = ()) -> Gates:
    """Return the gates of an ONNX network in order of execution, as `stripe.find_gates` does for a module.

    A gate has the name of the tensor that its product makes. `inputs` are a few samples, best large and not square, of
    which three are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file, is quantised, or cannot be run on `inputs`; or the inputs are so small that
            gates may be hidden.

    Example:
        >>> gates = stripe.graphs.find_gates("model.onnx", images)  # doctest: +SKIP
    """
    candidates = explain_gates(path, inputs, normalisers=normalisers)
    if hidden := [candidate.site for candidate in candidates if candidate.hidden]:
        raise ValueError(
            f"input too small: what is scaled at {', '.join(hidden)} is a single pixel, where a gate cannot be told"
            " from an activation; use inputs of at least twice the size"
        )
    return Gates(candidate.gate for candidate in candidates if candidate.gate)


def explain_gates(
    path: Path | GraphFile, inputs: Inputs | Iterable[Batch], *, normalisers: Sequence[str] = ()
) -> list[Candidate]:
    """Return every product that might scale channels, in order, accepted or with a reason against it."""
    file = opened(path)
    return candidates_of(trace(file, first_of(file, samples_of(file, inputs), SEARCHED)), normalisers)


def record(
    path: Path | GraphFile,
    gates: Sequence[Gate],
    inputs: Inputs | Iterable[Batch],
    run_path: Path,
    *,
    labels: ArrayLike | None = None,
    epoch: int = 0,
    squeeze: bool = False,
    dtype: str = "float32",
    contents: str = CONTENTS[0],
    description: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    files: Mapping[int, str] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> None:
    """Record the attention of an ONNX network into the run at `run_path`, which is then a run like any other.

    Args:
        path: the ONNX file.
        gates: from `find_gates`.
        inputs: arrays of all samples, or an iterable of Batch.
        run_path: directory of the run, either a new one or one with the same gates.
        labels: labels of the samples, where `inputs` are arrays.
        epoch: the epoch number under which to record.
        squeeze: store what each gate scales, averaged over space, as well.
        dtype: "float32" or "float16".
        contents: as for `Recorder`.
        description: describes the network in the manifest, in plain values.
        data: describes the samples in the manifest, in plain values.
        files: as for `Recorder`.
        overwrite: replace the epoch if the run already holds it.
        progress: wraps the batches, to show progress.

    Raises:
        ValueError: there are no gates, or one of them is not the network's.
        FileExistsError: the run already holds this epoch.
    """
    file = opened(path)
    kinds = ("attention", "squeeze") if squeeze else ("attention",)
    with (
        closing(
            RunWriter(
                run_path,
                model=description or {"file": file.path.name},
                data=data or {},
                gates=gates,
                squeeze=squeeze,
                dtype=dtype,
                contents=contents,
                files=files,
                overwrite=overwrite,
            )
        ) as writer,
        writer.epoch(epoch) as rows,
    ):
        for batch, values in read(file, gates, samples_of(file, inputs, labels), kinds, progress=progress):
            rows.append(batch.sample_ids, batch.labels, **values)


def measure_gates(
    path: Path | GraphFile, gates: Sequence[Gate], inputs: Inputs | Iterable[Batch], *, progress: Progress = iter
) -> dict[str, GateUse]:
    """Return what each gate did over all samples; its `constant("mean")` or `constant("energy")` is for `fold`."""
    file = opened(path)
    sums = {gate.name: Sums(gate.form == "additive") for gate in gates}
    for _, values in read(file, gates, samples_of(file, inputs), ("attention", "energy"), progress=progress):
        for name, total in sums.items():
            total.add(*(values[kind][name].astype(np.float64) for kind in ("attention", "energy")))
    return {name: total.use() for name, total in sums.items()}


def read(
    file: GraphFile, gates: Sequence[Gate], samples: Iterable[Batch], kinds: Sequence[str], *, progress: Progress = iter
) -> Iterator[tuple[Batch, dict[str, dict[str, Tensor]]]]:
    """Yield every batch with its values (n, C) by kind ("attention", "squeeze" or "energy") and gate."""
    if not gates:
        raise ValueError("no gate to read: expected what find_gates returns for a network with channel attention")
    wanted = [_Wanted(file, gate, kind) for kind in kinds for gate in gates]
    probe = copied(file.proto)
    for each in wanted:
        probe.graph.node.extend(each.nodes())
        probe.graph.output.append(onnx.ValueInfoProto(name=each.output))
    session = file.with_proto(probe).session()
    for batch in progress(samples):
        found = run(session, batch.inputs, [each.output for each in wanted])
        values: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for each, array in zip(wanted, found, strict=True):
            values[each.kind][each.gate.name] = each.rows(array)[: len(batch.sample_ids)]
        yield batch, values


def opened(path: Path | GraphFile) -> GraphFile:
    """Open a file unless it is already open."""
    return path if isinstance(path, GraphFile) else open_graph(path)


def samples_of(file: GraphFile, inputs: Any, labels: ArrayLike | None = None) -> Iterable[Batch]:
    """Return arrays as batches that can be iterated over repeatedly; return batches as they are."""
    given = isinstance(inputs, tuple | list) and any(isinstance(each, Batch) for each in inputs)
    if isinstance(inputs, Mapping | tuple | list) or hasattr(inputs, "__array__"):
        return inputs if given else Batches(file, inputs, labels)
    return inputs  # type: ignore[no-any-return]


def operands(file: GraphFile, gate: Gate) -> tuple[onnx.NodeProto, str, str]:
    """Return the node that applies a gate, the name of its attention's tensor, and that of what it scales.

    Raises:
        ValueError: the network has no such gate.
    """
    product = product_of(gate)
    node = next((node for node in file.graph.node if gate.site in node.output), None)
    if node is None or len(node.input) != 2 or product.op not in FACTORS:
        raise ValueError(f"'{file.path}' has no gate {gate.name!r}: take its gates from stripe.graphs.find_gates")
    return node, node.input[product.operand], node.input[1 - product.operand]


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Values of one kind of one gate, computed by nodes that are added to the network."""

    file: GraphFile
    gate: Gate
    kind: str

    @property
    def output(self) -> str:
        return f"{self.kind} of {self.gate.name}"

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Yield nodes that compute rows (n, ...) in float32: the first entry along space, or the average over it."""
        _, attention, scaled = operands(self.file, self.gate)
        space = [d for d, letter in enumerate(self.gate.layout) if letter not in "NRGC"]
        name = f"{self.output}, wide"
        yield helper.make_node(
            "Cast", [attention if self.kind == "attention" else scaled], [name], to=TensorProto.FLOAT
        )
        if self.kind == "energy":
            yield helper.make_node("Mul", [name, name], [f"{self.output}, squared"])
            name = f"{self.output}, squared"
        if self.kind == "attention" or not space:
            yield from self._picked(name, space)
        elif self.file.opset >= 18:
            axes = helper.make_tensor(f"{self.output}, axes", TensorProto.INT64, [len(space)], space)
            yield helper.make_node("Constant", [], [axes.name], value=axes)
            yield helper.make_node("ReduceMean", [name, axes.name], [self.output], keepdims=0)
        else:
            yield helper.make_node("ReduceMean", [name], [self.output], axes=space, keepdims=0)

    def _picked(self, name: str, space: Sequence[int]) -> Iterator[onnx.NodeProto]:
        zero = helper.make_tensor(f"{self.output}, first", TensorProto.INT64, [], [0])
        yield helper.make_node("Constant", [], [zero.name], value=zero)
        for d in sorted(space, reverse=True):
            yield helper.make_node("Gather", [name, zero.name], [f"{self.output}, {d}"], axis=d)
            name = f"{self.output}, {d}"
        yield helper.make_node("Identity", [name], [self.output])

    def rows(self, picked: Tensor) -> Tensor:
        """Merge radix (or groups) and channels in this order, even where the layout has them the other way round."""
        letters = [letter for letter in self.gate.layout if letter in "NRGC"]
        if letters.index("C") < len(letters) - 1:
            picked = np.moveaxis(picked, letters.index("C"), -1)
        rows = picked.reshape(len(picked), -1)
        return rows if rows.shape[1] == self.gate.channels else np.broadcast_to(rows, (len(rows), self.gate.channels))
