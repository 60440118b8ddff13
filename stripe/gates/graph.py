"""The graph of one forward pass, of a module or an ONNX file: operations, the calls that they ran in, and values.

It needs no torch: the rules that find gates, and those that merge constants, read nothing but this graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

FACTORS = {"mul": (0, 1), "add": (0, 1), "addcmul": (1, 2), "div": (0, 1), "lerp": (1, 2)}
"""Operations that multiply, divide or add two tensors, with the positions of the two among the arguments.

Where a gate divides, its attention is the inverse of the divisor; lerp(0, x, g) is x * g.
"""

DIRECTED = frozenset({"div", "lerp"})
"""Operations of `FACTORS` in which only the second factor can be the attention."""

MOVES = frozenset(
    "view _unsafe_view _reshape_alias expand permute transpose t squeeze unsqueeze clone _to_copy alias detach"
    " select slice split split_with_sizes unbind cat stack repeat index index_select copy lift_fresh"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d".split()
)
"""Operations that only move, copy or interpolate values."""

ARITHMETIC = frozenset("add sub rsub mul div neg pow reciprocal addcmul maximum minimum".split())
"""Operations that combine values entry by entry."""


def factors_of(name: str, args: Sequence[Any], kind: type[T]) -> tuple[T, T] | None:
    """Return the two tensors (or values) that an operation of `FACTORS` combines, None for any other operation."""
    pair = [args[i] for i in FACTORS.get(name, ()) if i < len(args) and isinstance(args[i], kind)]
    return (pair[0], pair[1]) if len(pair) == 2 else None


@dataclass(eq=False)
class Value:
    """A tensor between two writes to it; values of equal `memory` share memory that was not written in between.

    `live` values depend on the network's input. `parameters` names the parameters and buffers from which a value
    that is not live was made. `even` holds the dimensions along which comparing the entries of a full-shaped factor
    showed it to be constant. `number` is the number that all entries of a constant equal, where it is known and the
    constant is not a parameter.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    memory: int
    live: bool
    parameters: frozenset[str] = frozenset()
    even: frozenset[int] = frozenset()
    number: float | None = None
    producer: Op | None = field(default=None, repr=False)
    consumers: list[Op] = field(default_factory=list, repr=False)

    @property
    def flat(self) -> frozenset[int]:
        """Dimensions along which there is one entry in memory: size 1 or stride 0."""
        return frozenset(
            d for d, (n, step) in enumerate(zip(self.shape, self.stride, strict=True)) if n == 1 or step == 0
        )

    @property
    def entries(self) -> int:
        """Number of entries in memory."""
        return math.prod(n for d, n in enumerate(self.shape) if d not in self.flat)

    def upstream(self, passing: Collection[str] | None = None) -> Iterator[Op]:
        """Yield the live operations that made this value, nearest first, walking on only through those in `passing`."""
        queue, seen = [self], set()
        while queue:
            op = queue.pop(0).producer
            if op is not None and op not in seen and op.live_inputs:
                seen.add(op)
                yield op
                if passing is None or op.name in passing:
                    queue += op.live_inputs

    def chain(self) -> Iterator[Op]:
        """Yield the live operations that made this value, following the main input of each."""
        op = self.producer
        while op is not None and op.live_inputs:
            yield op
            op = op.main_input.producer


@dataclass(frozen=True)
class Place:
    """Where in the source of a module's class something happens: the method, and the expression's position in it.

    `owner` is the position, in the class's method resolution order, of the class that defines the method. `span` holds
    the first line, the last line, the first column and the column after the last, as in the file (columns in bytes).
    """

    owner: int
    method: str
    span: tuple[int, int, int, int]


@dataclass(eq=False)
class Call:
    """One call of a module: its path ("" is the root), the number of the call counted from 0, and the caller.

    The operations from `start` to `end` ran within it. `place` is where the caller calls the module, None where the
    caller has no source, or calls it through something that has none.
    """

    path: str
    index: int
    start: int
    caller: Call | None = field(default=None, repr=False)
    place: Place | None = field(default=None, repr=False)
    end: int = 0


@dataclass(eq=False)
class Op:
    """One ATen operation; `args` and `kwargs` are its arguments with every tensor replaced by its Value.

    An in-place write outputs new values, first for the written tensor and then for its aliases; the aliases' old values
    are its last inputs. The name has neither overload nor trailing underscore. `place` is where the module of `call`
    runs the operation, as in `Call`.
    """

    index: int
    name: str
    call: Call
    inputs: tuple[Value, ...]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    outputs: tuple[Value, ...] = ()
    place: Place | None = field(default=None, repr=False)

    @property
    def live_inputs(self) -> tuple[Value, ...]:
        """Inputs that depend on the network's input."""
        return tuple(value for value in self.inputs if value.live)

    @property
    def main_input(self) -> Value:
        """The largest live input."""
        return max(self.live_inputs, key=lambda value: value.entries)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters and buffers that this operation takes, directly or derived."""
        return frozenset[str]().union(*(value.parameters for value in self.inputs if not value.live))

    @property
    def is_layer(self) -> bool:
        """Whether it takes parameters for more than an entry-by-entry scale or shift."""
        return bool(self.parameters) and self.name not in MOVES | ARITHMETIC


@dataclass(frozen=True, eq=False)
class Port:
    """Where a hook meets a value: an input or output of a module call, by its position among them."""

    call: Call
    side: Literal["input", "output"]
    position: int
    value: Value


@dataclass(eq=False)
class Trace:
    """The graph of one forward pass: operations and calls in order, and for each memory its ports in order.

    `batches` holds the batch sizes that the shapes of the inputs allow.
    """

    batches: tuple[int, ...]
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ports: defaultdict[int, list[Port]] = field(default_factory=lambda: defaultdict(list))
