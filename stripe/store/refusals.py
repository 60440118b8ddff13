"""Refusals: a condition that does not hold is a ValueError of one line, with long lists and texts cut short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_count(value: object, low: int, high: int, what: str) -> None:
    """Refuse what is not an int from low to high."""
    require(type(value) is int and low <= value <= high, f"{what}: {value!r:.80}; expected {low} to {high}")


def require_unique(values: Iterable[object], rule: str) -> None:
    """Refuse values that come twice, naming them."""
    repeated = [value for value, times in Counter(values).items() if times > 1]
    require(not repeated, f"{rule}, given twice: {listing(repeated)}")


def listing(names: Iterable[object]) -> str:
    """Join the first ten names, each cut at 80 characters."""
    texts = [f"{name!s:.80}" for name in names]
    more = f", ... ({len(texts)} in all)" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more if texts else "none"


def only(first: Iterable[str], second: Iterable[str]) -> str:
    """List what only the first holds."""
    known = set(second)
    return listing(name for name in first if name not in known)


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
