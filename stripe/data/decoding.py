"""Images kept encoded or at their own size, and how they are decoded or resized: all at once or batch by batch."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

MEMORY_LIMIT = 2**30  # bytes of decoded images held in memory; larger sets are decoded batch by batch
DECODED_AT_ONCE = 256  # images a thread decodes before it hands them over
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no format whose decoder runs another program

warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses only what is twice as large

MODES = {1: "L", 3: "RGB"}  # Pillow's modes, by the number of channels

Reader = Callable[[Tensor], list[tuple[str, str | BytesIO]]]  # from rows to the names and files of their images


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images left encoded until a batch needs them; indexing selects, `decode` reads."""

    read: Reader
    rows: Tensor  # int64 (N,), positions in the split
    size: int
    channels: int = 3

    def __getitem__(self, positions: Tensor) -> Encoded:
        """Return the selected images, still encoded."""
        return dataclasses.replace(self, rows=self.rows[positions])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the decoded images, (N, channels, size, size)."""
        return len(self.rows), self.channels, self.size, self.size

    def decode(self) -> Tensor:
        """Decode to uint8 (N, channels, size, size): shorter side resized to `size`, centre cropped.

        A broken image raises ValueError with its name.
        """
        mode = MODES[self.channels]
        strip = Image.new(mode, (self.size, self.size * len(self.rows)))  # images one below the other
        for number, (name, file) in enumerate(self.read(self.rows)):
            with open_image(name, file) as image:
                strip.paste(_square(_eight_bits(image, mode), self.size), (0, self.size * number))
        pixels = np.asarray(strip).reshape(-1, self.size, self.size, self.channels)
        return torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()

    def readable(self) -> tuple[Tensor, list[str]]:
        """Decode every image once; return the positions of those that can be decoded, and the names of the others."""
        good: list[int] = []
        broken: list[str] = []
        with ThreadPoolExecutor() as pool:
            for part in torch.split(torch.arange(len(self.rows)), DECODED_AT_ONCE):
                named = self.read(self.rows[part])
                for position, (name, _), whole in zip(part.tolist(), named, pool.map(_is_whole, named), strict=True):
                    if whole:
                        good.append(position)
                    else:
                        broken.append(name)
        return torch.tensor(good, dtype=torch.int64), broken


@dataclass(frozen=True, eq=False)
class Resized:
    """Images kept at their own size until a batch needs them at `size`; indexing selects, `decode` resizes."""

    stored: Tensor  # uint8 (N, channels, h, w)
    size: int

    def __getitem__(self, positions: Tensor) -> Resized:
        """Return the selected images, not yet resized."""
        return Resized(self.stored[positions], self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the resized images, (N, channels, size, size)."""
        return len(self.stored), self.stored.shape[1], self.size, self.size

    def decode(self) -> Tensor:
        """Resize to uint8 (N, channels, size, size)."""
        return F.interpolate(self.stored, (self.size, self.size), mode="bilinear", antialias=True)


Images = Tensor | Encoded | Resized  # uint8 (N, channels, H, W), in memory or to be decoded batch by batch


def sized(stored: Tensor | Reader, rows: Tensor, size: int, channels: int = 3) -> Images:
    """Return the images of some rows as (N, channels, size, size), to be decoded or resized later where necessary."""
    if not isinstance(stored, Tensor):
        return Encoded(stored, rows, size, channels)
    images = stored[rows] if channels == 3 else _grey(stored[rows])
    if images.shape[2:] == (size, size):
        return images
    if size == 1:  # an internal assertion of torch fails
        raise ValueError("images of size 1: torch cannot shrink an image to one pixel; expected a side of at least 2")
    return Resized(images, size)


def in_memory(images: Images, uri: str) -> Images:
    """Decode the images now if they fit below MEMORY_LIMIT."""
    if isinstance(images, Tensor) or math.prod(images.shape) > MEMORY_LIMIT:
        return images
    decoded = torch.empty(images.shape, dtype=torch.uint8)
    for part, pixels in decode_all(images, uri):
        decoded[part] = pixels
    return decoded


def decode_all(images: Images, uri: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions, uint8 images) in order, with a progress bar when it takes long."""
    parts = list(torch.split(torch.arange(images.shape[0]), DECODED_AT_ONCE))
    pixels = decode_ahead(images, parts, os.cpu_count() or 1)
    bar = tqdm(pixels, f"reading {uri}", len(parts), leave=False, delay=2, unit="batch", disable=None)
    yield from zip(parts, bar, strict=True)


def decode_ahead(images: Images, batches: list[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield uint8 (n, channels, H, W) for each batch of positions; threads decode up to `workers` batches ahead."""
    if isinstance(images, Tensor):
        yield from (images[rows] for rows in batches)
        return
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for rows in batches:
            waiting.append(pool.submit(images[rows].decode))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def open_image(name: str, file: str | BytesIO) -> Iterator[Image.Image]:
    """Open an image and name it in whatever error its decoding raises (Pillow's decoders raise many types)."""
    try:
        if isinstance(file, str) and not os.path.isfile(file):
            raise ValueError("no regular file")  # opening a pipe would wait for its writer
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image
    except Exception as error:
        raise ValueError(f"broken image '{name}' ({error}): replace or remove it") from error


def _is_whole(named: tuple[str, str | BytesIO]) -> bool:
    try:
        with open_image(*named) as image:
            _eight_bits(image, "L")
    except ValueError:
        return False
    return True


def _grey(images: Tensor) -> Tensor:
    """Convert colour images to grey uint8 (N, 1, H, W) by the weights of ITU-R 601, rounded as Pillow does."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(1, 3, 1, 1)
    return (((images * weights).sum(1, keepdim=True) + 2**15) >> 16).to(torch.uint8)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode of 8 bits a channel; 16-bit grey, which `convert` would clip, keeps its higher 8."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}: expected 8 or 16 bits a channel")
    return image.convert(mode)


def _square(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image, `size` pixels wide."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
