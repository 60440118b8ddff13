"""ImageSet and load_images: the labelled images of one split, all or some of them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stripe.data.decoding import MODES, Encoded, Images, in_memory, open_image, sized
from stripe.data.normalisation import checked_mean_std, statistics
from stripe.data.sources import Split, open_source
from stripe.messages import listing

LARGEST_SIZE = 2048  # pixels a side; no network takes larger images
LARGEST_NATURAL_SIZE = 224  # encoded images are shrunk to this side unless the caller says otherwise
MEASURED_IMAGES = 64  # images opened to learn the size of an encoded set


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images of one split and how to normalise them.

    Attributes:
        uri: where the images come from.
        split: their split.
        images: uint8 (N, channels, H, W), or `Encoded` or `Resized` when they are too many to hold in memory.
        labels: int64 (N,), -1 where the label is unknown.
        sample_ids: int64 (N,), each sample's position in the whole split, the same in every subset.
        classes: class names by label.
        mean: per channel, for pixels in 0..1.
        std: per channel, for pixels in 0..1.
        flip: whether a mirrored image still belongs to its class.
        files: for a folder of images, the file of each sample id, relative to the folder; otherwise empty.
        skipped: names of the images that were left out because they are broken.
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
    files: Mapping[int, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

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
        order = torch.randperm(len(self), generator=seeded_generator(seed))
        kept, held_out = order[samples:].sort().values, order[:samples].sort().values
        return self._select(kept), self._select(held_out)

    def describe(self) -> dict[str, Any]:
        """Return, as plain values, what a checkpoint or run must store to feed a network in the same way."""
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
            files={row: self.files[row] for row in self.sample_ids[positions].tolist() if self.files},
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
    channels: int | None = None,
    skip_broken: bool = False,
) -> ImageSet:
    """Load a split of a data set; a small one is held in memory.

    Args:
        uri: `digits`, `cifar10`, `cifar100`, `stl10`, `imagefolder:DIR` or `hf:NAME_OR_DIR`.
        split: one of the set's splits, such as train or test. Where a set has no "test", this means its "val" or
            "validation", which are two names for one thing.
        size: side of the images in pixels; by default their own, for encoded images at most 224.
        samples: how many images to load, spread evenly over the split; by default all.
        data_dir: folder of torchvision's data sets.
        mean: with `std`, another network's normalisation, per channel in 0..1; by default CIFAR's published
            values or those of the set's own training split.
        std: see `mean`.
        channels: 3 for colour, or 1 for grey, to which colour images are converted; by default as `mean`, or 3.
        skip_broken: leave out images that cannot be decoded, and warn how many; all are decoded once to find them.

    Raises:
        FileNotFoundError: the data are not there.
        ModuleNotFoundError: `hf:` without the package `datasets`.
        ValueError: unknown URI or split, too few samples, a broken image, or unusable size, labels, mean or std.

    Example:
        >>> images = load_images("digits", "test", samples=100)
        >>> len(images), len(images.classes)
        (100, 10)
    """
    if size is not None and not (type(size) is int and 1 <= size <= LARGEST_SIZE):
        raise ValueError(f"images of size {size!s:.80}: expected a side of 1 to {LARGEST_SIZE} pixels")
    source = open_source(uri, str(data_dir))
    split = _existing(split, source.splits, uri)
    reference = "train" if "train" in source.splits else split
    open_split = functools.cache(source.open)
    size = size or source.size or _natural_size(open_split(reference), uri, reference, skip_broken=skip_broken)
    channels = channels or (len(mean) if isinstance(mean, Sequence) else 3)
    if channels not in [*MODES]:
        raise ValueError(f"images of {channels!s:.80} channels: expected 1, for grey, or 3, for colour")

    part = open_split(split)
    _check_labels(part, uri, split)
    usable, skipped = _usable(part, uri, split, skip_broken=skip_broken)
    rows = usable[_spread(len(usable), samples, uri, split)]
    images = in_memory(sized(part.stored, rows, size, channels), uri)
    if mean is not None or std is not None:
        mean_std = checked_mean_std(mean, std, channels)
    elif source.mean_std is not None and channels == 3:
        mean_std = source.mean_std
    elif split == reference and len(rows) == len(usable):
        mean_std = statistics(images, uri)
    else:
        whole = open_split(reference)
        every, _ = (usable, skipped) if split == reference else _usable(whole, uri, reference, skip_broken=skip_broken)
        mean_std = statistics(sized(whole.stored, every, size, channels), uri)
    files = {row: part.files[row] for row in rows.tolist() if part.files}
    return ImageSet(uri, split, images, part.labels[rows], rows, part.classes, *mean_std, source.flip, files, skipped)


def seeded_generator(*numbers: int) -> torch.Generator:
    """Make a generator seeded from several non-negative numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def _existing(split: str, splits: Sequence[str], uri: str) -> str:
    """Return the set's own name for a split."""
    names = {"test": ("test", "val", "validation"), "val": ("val", "validation"), "validation": ("validation", "val")}
    for name in names.get(split, (split,)):
        if name in splits:
            return name
    raise ValueError(f"unknown split '{split}' of '{uri}': expected one of {', '.join(splits)}")


def _usable(part: Split, uri: str, split: str, *, skip_broken: bool) -> tuple[Tensor, tuple[str, ...]]:
    """Return the rows to choose from (with `skip_broken`, of decodable images only) and the names of broken images."""
    rows = torch.arange(len(part.labels))
    if isinstance(part.stored, Tensor) or not skip_broken:
        return rows, ()
    usable, broken = Encoded(part.stored, rows, 1).readable()
    if broken:
        warnings.warn(
            f"'{uri}', split '{split}': {len(broken)} of {len(rows)} images are broken and left out: {listing(broken)}",
            stacklevel=3,
        )
    return usable, tuple(broken)


def _check_count(available: int, asked: int, uri: str, split: str) -> None:
    if available < 2:
        raise ValueError(f"'{uri}' has {available} samples in split '{split}': at least 2 are needed")
    if not 2 <= asked <= available:
        raise ValueError(
            f"{asked} samples asked of '{uri}', split '{split}', which has {available}: ask for 2 to {available}"
        )


def _check_labels(part: Split, uri: str, split: str) -> None:
    """Raise ValueError for labels that name no class, except -1, which stands for an unknown class."""
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


def _natural_size(part: Split, uri: str, split: str, *, skip_broken: bool) -> int:
    """Return the median of the shorter sides of some encoded images, at most LARGEST_NATURAL_SIZE."""
    total = len(part.labels)
    assert not isinstance(part.stored, Tensor)
    sides = []
    for name, file in part.stored(_spread(total, min(total, MEASURED_IMAGES), uri, split)):
        try:
            with open_image(name, file) as image:
                sides.append(min(image.size))
        except ValueError:
            if not skip_broken:
                raise
    return min(LARGEST_NATURAL_SIZE, int(np.median(sides))) if sides else LARGEST_NATURAL_SIZE
