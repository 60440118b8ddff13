"""Images, labels and sample ids from a data URI; a URI, split and seed give the same samples in the same order.

`load_images` opens a data set as an `ImageSet`; a `Loader` turns that into normalised batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
MEMORY_LIMIT = 2**30  # bytes of decoded images held in memory; larger sets are decoded batch by batch
LARGEST_SIZE = 2048  # pixels; a side beyond is no network's input
LARGEST_NATURAL_SIZE = 224  # encoded images are shrunk to this side unless the caller says otherwise
PADDING = 4  # black pixels around an image before its random crop
DECODED_AT_ONCE = 256  # images a thread decodes before it hands them over
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program
FOLDER_SPLITS = ("train", "test", "val")
MEASURED_IMAGES = 64  # images opened to learn the size of an encoded set

warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow refuses what is twice as large by itself

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, for pixels in 0..1
Reader = Callable[[Tensor], list[tuple[str, str | BytesIO]]]  # rows to the names and files of their images


# ---- image sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images left encoded until a batch needs them; indexing selects, `decode` reads."""

    read: Reader
    rows: Tensor  # int64 (N,), positions in the split
    size: int

    def __getitem__(self, positions: Tensor) -> Encoded:
        """Return the selected images, still encoded."""
        return dataclasses.replace(self, rows=self.rows[positions])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the decoded images, (N, 3, size, size)."""
        return len(self.rows), 3, self.size, self.size

    def decode(self) -> Tensor:
        """Decode to uint8 (N, 3, size, size): shorter side resized to `size`, centre cropped.

        A broken image raises ValueError with its name.
        """
        strip = Image.new("RGB", (self.size, self.size * len(self.rows)))  # one below the other
        for number, (name, file) in enumerate(self.read(self.rows)):
            with _open_image(name, file) as image:
                strip.paste(_square(image.convert("RGB"), self.size), (0, self.size * number))
        pixels = np.asarray(strip).reshape(-1, self.size, self.size, 3)
        return torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class Resized:
    """Images kept at their own size until a batch needs them at `size`; indexing selects, `decode` resizes."""

    stored: Tensor  # uint8 (N, 3, h, w)
    size: int

    def __getitem__(self, positions: Tensor) -> Resized:
        """Return the selected images, not yet resized."""
        return Resized(self.stored[positions], self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the resized images, (N, 3, size, size)."""
        return len(self.stored), 3, self.size, self.size

    def decode(self) -> Tensor:
        """Resize to uint8 (N, 3, size, size)."""
        return F.interpolate(self.stored, (self.size, self.size), mode="bilinear", antialias=True)


Images = Tensor | Encoded | Resized  # uint8 (N, 3, H, W), in memory or to be decoded batch by batch


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images of one split and how to normalise them.

    Attributes:
        uri: where the images come from.
        split: their split.
        images: uint8 (N, 3, H, W), or `Encoded` or `Resized` when they are too many to hold in memory.
        labels: int64 (N,), -1 where the source does not know.
        sample_ids: int64 (N,), each sample's position in the whole split, the same in every subset.
        classes: class names by label.
        mean: per channel, for pixels in 0..1.
        std: per channel, for pixels in 0..1.
        flip: whether a mirrored image still belongs to its class.
    """

    uri: str
    split: str
    images: Images
    labels: Tensor
    sample_ids: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, samples: int) -> ImageSet:
        """Return `samples` of the images, spread evenly over the set (sets are often sorted by class)."""
        return self._select(_spread(len(self), samples, self.uri, self.split))

    def hold_out(self, samples: int, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split at random into (train, validation), with `samples` images in validation."""
        for part in (samples, len(self) - samples):
            _check_count(len(self), part, self.uri, self.split)
        order = torch.randperm(len(self), generator=_generator(seed))
        kept, held_out = order[samples:].sort().values, order[:samples].sort().values
        return self._select(kept), self._select(held_out)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint or run must know to feed a network the same way, as plain values."""
        return {
            "uri": self.uri,
            "split": self.split,
            "size": self.images.shape[-1],
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def _select(self, positions: Tensor) -> ImageSet:
        return dataclasses.replace(
            self,
            images=self.images[positions],
            labels=self.labels[positions],
            sample_ids=self.sample_ids[positions],
        )


def load_images(
    uri: str,
    split: str,
    *,
    size: int | None = None,
    samples: int | None = None,
    data_dir: str | Path = "data",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageSet:
    """Load a split of a data set, small ones into memory.

    Args:
        uri: `digits`, `cifar10`, `cifar100`, `stl10`, `imagefolder:DIR` or `hf:NAME_OR_DIR`.
        split: one of the set's splits, such as train or test.
        size: side of the images in pixels; by default their own, for encoded ones 224 at most.
        samples: how many to load, spread evenly over the split; by default all.
        data_dir: folder of torchvision's data sets.
        mean: with `std`, another network's normalisation, per channel in 0..1; by default CIFAR's published
            constants or those of the set's own training split.
        std: see `mean`.

    Raises:
        FileNotFoundError: the data are not there.
        ModuleNotFoundError: `hf:` without the package `datasets`.
        ValueError: unknown URI or split, too few samples, a broken image, unusable size, labels, mean and std.
    """
    if size is not None and not (type(size) is int and 1 <= size <= LARGEST_SIZE):
        raise ValueError(f"images of size {size!s:.80}: expected a side of 1 to {LARGEST_SIZE} pixels")
    source = _open(uri, str(data_dir))
    if split not in source.splits:
        raise ValueError(f"unknown split '{split}' of '{uri}': expected one of {', '.join(source.splits)}")
    reference = "train" if "train" in source.splits else split
    open_split = functools.cache(source.open)
    size = size or source.size or _natural_size(open_split(reference), uri, reference)

    part = open_split(split)
    _check_labels(part, uri, split)
    rows = _spread(len(part.labels), samples, uri, split)
    images = _in_memory(_sized(part.stored, rows, size), uri)
    if mean is not None or std is not None:
        constants = _constants(mean, std)
    elif source.constants is not None:
        constants = source.constants
    elif split == reference and len(rows) == len(part.labels):
        constants = _statistics(images, uri)
    else:
        whole = open_split(reference)
        constants = _statistics(_sized(whole.stored, torch.arange(len(whole.labels)), size), uri)
    return ImageSet(uri, split, images, part.labels[rows], rows, part.classes, *constants, source.flip)


# ---- batches -----------------------------------------------------------------------------------------------


class Loader:
    """Batches of (images float32 (n, 3, H, W) normalised, labels int64 (n,), sample ids int64 (n,)).

    In training the order and the augmentation (random crop, mirroring where the set allows) follow from the
    seed and epoch alone, so neither a resumed run nor another number of processes changes what a sample looks
    like. Otherwise every sample comes once, as it is, in order.

    Several processes share the work. In training each takes `batch_size` samples of every global batch; the
    last, smaller one is shared equally and left out where it would give a process a single sample, since
    batch norm cannot train on one. Otherwise the batches are those of one process, dealt out in contiguous runs,
    so that a network gives each sample the very same values; fewer batches than processes are cut into even
    shares. Nothing is padded or repeated.

    Attributes:
        samples: how many samples an epoch yields to this process.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        train: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 4,
    ) -> None:
        """Prepare batches of `batch_size` for process `rank` of `world_size`.

        `workers` threads decode images that are not in memory.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: expected a batch of at least 1 "
                "and a rank below world_size"
            )
        self.images = images
        self.batch_size = batch_size
        self.train = train
        self._seed = seed
        self._epoch = 0
        self._workers = workers
        parts = _training_parts if train else _ordered_parts
        self._parts = list(parts(len(images), batch_size, rank, world_size))
        self.samples = sum(part.stop - part.start for part in self._parts)
        if train and not self._parts:
            raise ValueError(
                f"{len(images)} training samples give {world_size} processes no batch of two: "
                "use more samples or fewer processes"
            )

    def __len__(self) -> int:
        """Return the number of batches an epoch yields to this process."""
        return len(self._parts)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next training pass takes."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this process's batches of the epoch."""
        total = len(self.images)
        generator = _generator(self._seed, self._epoch)
        order = torch.randperm(total, generator=generator) if self.train else torch.arange(total)
        corners = torch.randint(2 * PADDING + 1, (total, 2), generator=generator)
        mirrored = (torch.rand(total, generator=generator) < 0.5) & self.images.flip
        shift = 255 * torch.tensor(self.images.mean).view(1, 3, 1, 1)
        scale = 255 * torch.tensor(self.images.std).view(1, 3, 1, 1)
        batches = [order[part] for part in self._parts]
        for rows, pixels in zip(batches, _pixels(self.images.images, batches, self._workers), strict=True):
            if self.train:
                pixels = _augment(pixels, corners[rows], mirrored[rows])
            normalised = pixels.float().sub_(shift).div_(scale)
            yield normalised, self.images.labels[rows], self.images.sample_ids[rows]


def _training_parts(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    for start in range(0, total, batch_size * world_size):
        share = min(batch_size, (total - start) // world_size)
        if share >= min(2, batch_size):
            yield slice(start + rank * share, start + (rank + 1) * share)


def _ordered_parts(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    starts = range(0, total, batch_size)
    even = [total * each // world_size for each in range(world_size + 1)]
    ends = [*starts, total] if len(starts) >= world_size else even
    first, last = ((len(ends) - 1) * each // world_size for each in (rank, rank + 1))
    for start, stop in pairwise(ends[first : last + 1]):
        if start < stop:
            yield slice(start, stop)


def _augment(pixels: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Crop padded uint8 images (n, 3, H, W) at `corners` (n, 2) and mirror those in `mirrored` (n,)."""
    count, channels, height, width = pixels.shape
    along = torch.arange(width)
    y = corners[:, :1] + torch.arange(height)
    x = corners[:, 1:] + torch.where(mirrored[:, None], along.flip(0), along)
    sources = (y[:, :, None] * (width + 2 * PADDING) + x[:, None, :]).view(count, 1, -1)
    padded = F.pad(pixels, [PADDING] * 4).flatten(2)
    return padded.gather(2, sources.expand(-1, channels, -1)).view_as(pixels)


def _pixels(images: Images, batches: list[Tensor], workers: int) -> Iterator[Tensor]:
    """Yield uint8 (n, 3, H, W) for each batch of positions; threads decode up to `workers` batches ahead."""
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


# ---- from stored to decoded --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Split:
    """One split as its source stores it: uint8 (N, 3, H, W) or a reader; labels int64 (N,)."""

    stored: Tensor | Reader
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A data set before any image is read; `size` is None where the images must be asked."""

    splits: tuple[str, ...]
    open: Callable[[str], _Split]
    size: int | None = None
    flip: bool = True
    constants: Constants | None = None


def _generator(*numbers: int) -> torch.Generator:
    """Make a generator seeded from several non-negative numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def _check_count(available: int, asked: int, uri: str, split: str) -> None:
    if available < 2:
        raise ValueError(f"'{uri}' has {available} samples in split '{split}': at least 2 are needed")
    if not 2 <= asked <= available:
        raise ValueError(
            f"{asked} samples asked of '{uri}', split '{split}', which has {available}: ask for 2 to {available}"
        )


def _check_labels(part: _Split, uri: str, split: str) -> None:
    """Refuse labels that name no class; -1 is an unknown one."""
    if len(part.labels) and not -1 <= part.labels.min() <= part.labels.max() < len(part.classes):
        raise ValueError(
            f"'{uri}' has labels {part.labels.min()} to {part.labels.max()} in split '{split}': expected -1 (unknown) "
            f"to {len(part.classes) - 1}, one for each of its classes"
        )


def _spread(total: int, samples: int | None, uri: str, split: str) -> Tensor:
    """Return `samples` positions spread evenly over `total`, in order."""
    samples = total if samples is None else samples
    _check_count(total, samples, uri, split)
    return torch.arange(samples) * total // samples


@contextmanager
def _open_image(name: str, file: str | BytesIO) -> Iterator[Image.Image]:
    """Open an image and name it in whatever error its decoding raises (Pillow's decoders raise many types)."""
    try:
        if isinstance(file, str) and not os.path.isfile(file):
            raise ValueError("no regular file")  # a pipe would be waited for
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image
    except Exception as error:
        raise ValueError(f"broken image '{name}' ({error}): replace or remove it") from error


def _square(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image, `size` pixels wide."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _natural_size(part: _Split, uri: str, split: str) -> int:
    """Return the median shorter side of some of the encoded images, LARGEST_NATURAL_SIZE at most."""
    total = len(part.labels)
    assert not isinstance(part.stored, Tensor)
    sides = []
    for name, file in part.stored(_spread(total, min(total, MEASURED_IMAGES), uri, split)):
        with _open_image(name, file) as image:
            sides.append(min(image.size))
    return min(LARGEST_NATURAL_SIZE, int(np.median(sides)))


def _sized(stored: Tensor | Reader, rows: Tensor, size: int) -> Images:
    """Take the images of some rows as (N, 3, size, size), where need be by decoding."""
    if not isinstance(stored, Tensor):
        return Encoded(stored, rows, size)
    images = stored[rows]
    return images if images.shape[2:] == (size, size) else Resized(images, size)


def _in_memory(images: Images, uri: str) -> Images:
    """Decode the images now if they fit below MEMORY_LIMIT."""
    if isinstance(images, Tensor) or math.prod(images.shape) > MEMORY_LIMIT:
        return images
    decoded = torch.empty(images.shape, dtype=torch.uint8)
    for part, pixels in _decoded(images, uri):
        decoded[part] = pixels
    return decoded


def _decoded(images: Images, uri: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions, uint8 images) in order, with a progress bar when it takes long."""
    parts = list(torch.split(torch.arange(images.shape[0]), DECODED_AT_ONCE))
    pixels = _pixels(images, parts, os.cpu_count() or 1)
    bar = tqdm(pixels, f"reading {uri}", len(parts), leave=False, delay=2, unit="batch")
    yield from zip(parts, bar, strict=True)


# ---- normalisation -----------------------------------------------------------------------------------------


def _statistics(images: Images, uri: str) -> Constants:
    """Return each channel's mean and std over all pixels, in 0..1.

    Counts how often each of the 256 values occurs, so the result does not depend on the order of the sum. Of
    a set beyond MEMORY_LIMIT it takes as many images as fit, spread evenly.
    """
    total, *shape = images.shape
    fitting = min(total, MEMORY_LIMIT // math.prod(shape))
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for _, pixels in _decoded(images[torch.arange(fitting) * total // fitting], uri):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return _constants(mean.tolist(), std.tolist())


def _constants(mean: Sequence[float] | None, std: Sequence[float] | None) -> Constants:
    given = [*(mean or ()), *(std or ())]
    usable = len(given) == 6 and all(isinstance(x, Real) and math.isfinite(x) for x in given)
    if mean is None or std is None or len(mean) != 3 or not usable or not min(std) > 0:
        raise ValueError(f"mean {mean} and std {std}: expected three values each, std above 0; pass both")
    return tuple(mean), tuple(std)


# ---- sources -----------------------------------------------------------------------------------------------


def _open(uri: str, data_dir: str) -> _Source:
    scheme, _, target = uri.partition(":")
    for form, opener in _OPENERS.items():
        name, _, expected = form.partition(":")
        if scheme == name and bool(target) == bool(expected):
            return opener(uri, data_dir)
    raise ValueError(f"unknown data URI '{uri}': expected one of {', '.join(_OPENERS)}")


def _open_digits(uri: str, data_dir: str) -> _Source:
    """Open scikit-learn's 1,797 digits: 1,437 to train on and 360 to test on, by a fixed stratified draw."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    rows = {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}

    def open_split(split: str) -> _Split:
        channels = images[rows[split]].unsqueeze(1).repeat(1, 3, 1, 1)
        return _Split(channels, torch.from_numpy(digits.target)[rows[split]], tuple("0123456789"))

    return _Source(tuple(rows), open_split, size=32, flip=False)


def _open_torchvision(uri: str, data_dir: str) -> _Source:
    """Open one of torchvision's sets, which must be in `data_dir` already."""
    from torchvision import datasets

    name, size, constants = _TORCHVISION[uri]

    def open_split(split: str) -> _Split:
        which = {"split": split} if name == "STL10" else {"train": split == "train"}
        try:
            dataset = getattr(datasets, name)(data_dir, **which)
        except RuntimeError as error:
            download = f"import torchvision; torchvision.datasets.{name}({data_dir!r}, download=True)"
            raise FileNotFoundError(
                f"'{uri}' is not in '{data_dir}': give its folder, or fetch it with python -c \"{download}\""
            ) from error
        images = torch.from_numpy(dataset.data)
        if name != "STL10":
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(dataset.labels if name == "STL10" else dataset.targets).long()
        return _Split(images, labels, tuple(dataset.classes))

    return _Source(("train", "test"), open_split, size=size, constants=constants)


def _open_folder(uri: str, data_dir: str) -> _Source:
    """Open DIR/SPLIT/CLASS/image, or DIR/CLASS/image, which then serves as every split."""
    root = Path(uri.partition(":")[2]).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"'{uri}': there is no folder '{root}'; expected DIR/SPLIT/CLASS/image")
    folders = {split: root / split for split in FOLDER_SPLITS if (root / split).is_dir()}
    folders = folders or dict.fromkeys(FOLDER_SPLITS, root)
    entries = [entry for folder in folders.values() for entry in folder.iterdir()]
    classes = sorted({entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")})
    extensions = {ending for ending, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}

    def open_split(split: str) -> _Split:
        found = [
            (str(path), label)
            for label, name in enumerate(classes)
            for path in sorted((folders[split] / name).rglob("*"))
            if path.suffix.lower() in extensions
        ]

        def read(rows: Tensor) -> list[tuple[str, str | BytesIO]]:
            return [(found[row][0], found[row][0]) for row in rows.tolist()]

        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        return _Split(read, labels, tuple(classes))

    return _Source(tuple(folders), open_split)


def _open_hub(uri: str, data_dir: str) -> _Source:
    """Open a Hugging Face data set; image and label columns are found by their feature types."""
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"'{uri}' needs the package datasets: pip install 'stripe-observation[hub]'"
        ) from error

    target = uri.partition(":")[2]
    if target.startswith((".", "/")) and not Path(target).is_dir():
        raise FileNotFoundError(f"'{uri}': there is no folder '{target}'")
    try:
        splits = datasets.load_dataset(target)
    except Exception as error:  # files that are not what they say fail in many ways
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise FileNotFoundError(f"cannot load '{uri}': {reason}") from error
    features = next(iter(splits.values())).features
    image = _column(features, datasets.Image, uri)
    label = _column(features, datasets.ClassLabel, uri)

    def open_split(split: str) -> _Split:
        table = splits[split]
        encoded = table.select_columns(image).cast_column(image, datasets.Image(decode=False))

        def read(rows: Tensor) -> list[tuple[str, str | BytesIO]]:
            return [
                (f"{uri} {split} row {row}", BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])
                for row, stored in zip(rows.tolist(), encoded[rows.tolist()][image], strict=True)
            ]

        labels = table.select_columns(label).with_format("numpy")[:][label]
        return _Split(read, torch.from_numpy(labels).long(), tuple(features[label].names))

    return _Source(tuple(splits), open_split)


def _column(features: Mapping[str, object], kind: type, uri: str) -> str:
    for name, feature in features.items():
        if isinstance(feature, kind):
            return name
    raise ValueError(f"'{uri}' has no column of type {kind.__name__}, only {', '.join(features)}")


_TORCHVISION: dict[str, tuple[str, int, Constants | None]] = {
    "cifar10": ("CIFAR10", 32, (CIFAR_MEAN, CIFAR_STD)),
    "cifar100": ("CIFAR100", 32, (CIFAR_MEAN, CIFAR_STD)),
    "stl10": ("STL10", 96, None),
}
_OPENERS: dict[str, Callable[[str, str], _Source]] = {
    "digits": _open_digits,
    **dict.fromkeys(_TORCHVISION, _open_torchvision),
    "imagefolder:DIR": _open_folder,
    "hf:NAME_OR_DIR": _open_hub,
}
