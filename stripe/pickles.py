"""Survey pickles without loading them: which names they hold, and roughly how much memory loading them would take.

A pickle is a program for a stack machine. A few of its bytes build an object, and a single byte can refer to a large
object again and have it copied, so a small file can demand any amount of memory without naming any code.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

ATOM, ENTRY, NOTED, CALL = 80, 100, 100, 600  # bytes, roughly, of a value, container item, memo entry, object
MAX_NESTED = 2**20  # values in a tuple, counted once per reference, all of which hashing the tuple visits
_MADE_AT_RUN_TIME = "a name put together at run time"  # torch's reader supports no such names


@dataclass(slots=True)
class _Value:
    """A value on the stack: its length or number of items, the items if it is a tuple, and its count of all values."""

    size: int
    items: Sequence[_Value] = ()
    nested: int = 1


class Survey:
    """The names in pickles, as "module name", and the memory to load them; `look` may be called repeatedly."""

    def __init__(self, limit: int) -> None:
        """Allow up to `limit` bytes of memory, for all pickles together."""
        self.names: set[str] = set()
        self._limit, self._bytes = limit, 0
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}

    def look(self, file: IO[bytes]) -> None:
        """Go through the pickle at a file's current position.

        Raises:
            ValueError: there is no valid pickle, or loading it would take more memory than the limit.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for operation, argument, _ in pickletools.genops(file):
            try:
                self._step(operation.name, argument)
            except LookupError as error:
                raise ValueError(f"a damaged pickle: {operation.name} takes a value that is not there") from error
            if self._bytes > self._limit:
                raise ValueError(f"a pickle that would take more than {self._limit} bytes, far more than it holds")

    def _step(self, name: str, argument: Any) -> None:
        if name in _STEPS:
            _STEPS[name](self)
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            self.names.add(_MADE_AT_RUN_TIME if name == "STACK_GLOBAL" else str(argument))
            self._push(_Value(1))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
            self._bytes += NOTED
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP", "BINPERSID"):  # BINPERSID replaces a key by its storage
            self._push(_Value(len(argument) if isinstance(argument, str | bytes | bytearray) else 1))

    def _push(self, value: _Value) -> None:
        self._bytes += ATOM + value.size
        self._stack.append(value)

    def _since_mark(self) -> list[_Value]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _put(self, items: list[_Value]) -> None:
        """Put items into the container on the stack."""
        self._stack[-1].size += len(items)
        self._bytes += ENTRY * len(items)

    def _tuple(self, items: list[_Value]) -> None:
        nested = 1 + sum(item.nested for item in items)
        if nested > MAX_NESTED:
            raise ValueError(f"a tuple of more than {MAX_NESTED} values")
        self._bytes += ENTRY * len(items)
        self._push(_Value(len(items), tuple(items), nested))

    def _call(self) -> None:
        """Replace a callable and its tuple of arguments by the result, which may copy each argument."""
        arguments = self._stack.pop()
        size = arguments.size + sum(item.size for item in arguments.items)
        self._bytes += CALL + ENTRY * size
        self._stack[-1] = _Value(size)

    def _build(self) -> None:
        self._bytes += ENTRY * self._stack.pop().size

    def _last(self, count: int) -> list[_Value]:
        if len(self._stack) < count:
            raise LookupError(count)
        return [self._stack.pop() for _ in range(count)][::-1]


_STEPS: dict[str, Callable[[Survey], object]] = {
    "MARK": Survey._mark,
    "POP": lambda survey: survey._stack.pop(),
    "POP_MARK": Survey._since_mark,
    "EMPTY_LIST": lambda survey: survey._push(_Value(0)),
    "EMPTY_DICT": lambda survey: survey._push(_Value(0)),
    "EMPTY_SET": lambda survey: survey._push(_Value(0)),
    "EMPTY_TUPLE": lambda survey: survey._tuple([]),
    "LIST": lambda survey: survey._tuple(survey._since_mark()),
    "DICT": lambda survey: survey._tuple(survey._since_mark()),
    "FROZENSET": lambda survey: survey._tuple(survey._since_mark()),
    "TUPLE": lambda survey: survey._tuple(survey._since_mark()),
    "TUPLE1": lambda survey: survey._tuple(survey._last(1)),
    "TUPLE2": lambda survey: survey._tuple(survey._last(2)),
    "TUPLE3": lambda survey: survey._tuple(survey._last(3)),
    "APPEND": lambda survey: survey._put(survey._last(1)),
    "SETITEM": lambda survey: survey._put(survey._last(2)),
    "APPENDS": lambda survey: survey._put(survey._since_mark()),
    "SETITEMS": lambda survey: survey._put(survey._since_mark()),
    "ADDITEMS": lambda survey: survey._put(survey._since_mark()),
    "REDUCE": Survey._call,
    "NEWOBJ": Survey._call,
    "BUILD": Survey._build,
}
