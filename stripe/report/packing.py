"""How values are sent to the page: as plain, finite JSON, or, if there are many, as one byte each."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_TEXT = 300  # characters of a text
LEVELS = 255  # codes 1 to 255 span a panel's range; code 0 marks a value that is not finite

Plain = str | int | float | bool | None
Values = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced, including the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()  # type: ignore[no-any-return]


def plain(value: object, most: int = MAX_TEXT) -> Plain:
    """Return a value for JSON: numbers to five digits, non-finite ones as None, texts and nested values cut short."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, list) and all(isinstance(each, float) for each in value):
        value = numbers(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="replace").decode()  # a lone surrogate could not be encoded as UTF-8
    return text if len(text) <= most else f"{text[:most]}..."


def numbers(values: Iterable[float]) -> list[Plain]:
    """Return each number as ``plain`` returns it."""
    return [plain(float(value)) for value in values]


def quantise(values: Values) -> tuple[Codes, float | None, float | None]:
    """Return codes (images, channels) and the range they span: value = low + (code - 1) / 254 * (high - low)."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8), None, None
    low, high = float(values[finite].min()), float(values[finite].max())
    shares = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    codes = np.where(finite, 1 + np.rint(shares * (LEVELS - 1)), 0).astype(np.uint8)
    return codes, float(f"{low:.9g}"), float(f"{high:.9g}")


def pack(panels: Iterable[Codes]) -> str:
    """Compress panels (images, channels), each as its channels' medians and the differences from them modulo 256."""
    packed = zlib.compressobj(6)
    parts = []
    for codes in panels:
        middle = np.median(codes, axis=0).astype(np.uint8)
        parts += [packed.compress(middle.tobytes()), packed.compress((codes - middle).tobytes())]
    return base64.b64encode(b"".join([*parts, packed.flush()])).decode()


def coded(values: Values) -> dict[str, Any]:
    """Return values (rows, columns) in the form of a single panel of the page: codes and the range they span."""
    codes, low, high = quantise(values)
    return {"codes": base64.b64encode(codes.tobytes()).decode(), "low": low, "high": high}
