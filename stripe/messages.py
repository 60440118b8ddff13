"""Text for errors and progress bars: on one line, cut to length, and without codes that a terminal obeys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

QUOTED = 300  # characters of another error's message inside one of ours
SCREEN = 1500  # characters of a whole message, which then fits a terminal of 80 by 24 with room to spare
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # what terminals obey, except tab and line feed
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what changes the direction of text, or breaks lines
    r"\ud800-\udfff]"  # what no encoding can write
)
T = TypeVar("T")


class Progress(Protocol):
    """Wraps the items of a loop to show its progress, as `tqdm.tqdm` does; `iter` shows nothing."""

    def __call__(self, items: Iterable[T], /) -> Iterable[T]:
        """Yield the same items."""
        ...


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_count(value: object, low: int, high: int, what: str) -> None:
    """Raise ValueError unless the value is an int from low to high."""
    require(type(value) is int and low <= value <= high, f"{what}: {value!r:.80}; expected {low} to {high}")


def require_unique(values: Iterable[object], rule: str) -> None:
    """Raise ValueError if values occur more than once, naming them."""
    repeated = [value for value, times in Counter(values).items() if times > 1]
    require(not repeated, f"{rule}, given twice: {listing(repeated)}")


def listing(names: Iterable[object]) -> str:
    """Join the first ten names, each cut to 80 characters in its middle."""
    texts = [shortened(str(name), 80) for name in names]
    more = f", ... ({len(texts)} in all)" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more if texts else "none"


def only(first: Iterable[str], second: Iterable[str]) -> str:
    """List the names that are only in the first."""
    known = set(second)
    return listing(name for name in first if name not in known)


def one_line(error: BaseException, limit: int = QUOTED) -> str:
    r"""Return an error's message, or its type if it has none, as one printable line of at most `limit` characters.

    Example:
        >>> one_line(ValueError("first\n  second \x1b[2J"))
        'first second \\x1b[2J'
    """
    text = getattr(error, "strerror", None) or str(error)  # without the number that OSError puts before it
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{text}: '{error.filename}'"
    return shortened(printable(" ".join(text.split())), limit) or type(error).__name__


def printable(text: str) -> str:
    """Write control characters as escapes, so that a terminal shows them and does not obey them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, limit: int) -> str:
    """Cut text of more than `limit` characters in its middle: its end often says what to do."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[-end:]}"
