"""Loader: normalised batches of an ImageSet, shuffled and augmented in training, and shared among processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from stripe.data.decoding import Images, decode_ahead
from stripe.data.images import ImageSet, seeded_generator
from stripe.recipe import WORKERS

PADDING = 4  # black pixels around an image before its random crop


class Loader:
    """Batches of (images float32 (n, channels, H, W) normalised, labels int64 (n,), sample ids int64 (n,)).

    In training the order and the augmentation (random crop, mirroring where the set allows) follow from the
    seed and epoch alone, so neither resuming nor another number of processes changes what a sample looks
    like. Otherwise every sample comes once, as it is, in order.

    Several processes share the work. In training each takes `batch_size` samples of every global batch; the
    last, smaller batch is shared equally, or left out where it would give a process a single sample, since
    batch norm cannot train on one. Otherwise the batches are those of one process, dealt out in contiguous
    sequences, so that a network gives each sample the very same values; if there are fewer batches than processes,
    the samples are cut into even shares. Nothing is padded or repeated.

    With a GPU, images that are in memory are copied to the device as uint8 if they fit, and cropped, mirrored and
    normalised there; the batches are the same, bit for bit, as on the CPU. Sample ids stay on the CPU.

    Attributes:
        samples: how many samples an epoch yields to this process.

    Example:
        >>> from stripe.data import load_images
        >>> loader = Loader(load_images("digits", "test", samples=100), 32)
        >>> images, labels, sample_ids = next(iter(loader))
        >>> len(loader), images.shape
        (4, torch.Size([32, 3, 32, 32]))
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
        workers: int = WORKERS,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare batches of `batch_size` for process `rank` of `world_size`.

        `workers` threads decode images that are not in memory. Images and labels are yielded on `device`.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: expected a batch of at least 1 "
                "and a rank below world_size"
            )
        self.images = images
        self.batch_size = batch_size
        self.train = train
        self.device = torch.device(device)
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
        """Choose the epoch whose order and augmentation the next training pass uses."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this process's batches of the epoch."""
        total = len(self.images)
        generator = seeded_generator(self._seed, self._epoch)
        order = torch.randperm(total, generator=generator) if self.train else torch.arange(total)
        corners = torch.randint(2 * PADDING + 1, (total, 2), generator=generator)
        mirrored = (torch.rand(total, generator=generator) < 0.5) & self.images.flip
        corners, mirrored, labels = (self._place(each[order]) for each in (corners, mirrored, self.images.labels))
        sample_ids = self.images.sample_ids[order]
        shift, scale = (
            self._place(255 * torch.tensor(values).view(1, -1, 1, 1)) for values in (self.images.mean, self.images.std)
        )
        held = self._held
        rows = self._place(order) if isinstance(held, Tensor) and held.device.type == self.device.type else order
        decoded = decode_ahead(held, [rows[part] for part in self._parts], self._workers)
        for part, pixels in zip(self._parts, decoded, strict=True):
            pixels = self._place(pixels)
            if self.train:
                pixels = _augment(pixels, corners[part], mirrored[part])
            yield pixels.float().sub_(shift).div_(scale), labels[part], sample_ids[part]

    @functools.cached_property
    def _held(self) -> Images:
        """The images, on the device if they are in memory and take at most half of what is free there."""
        images = self.images.images
        if isinstance(images, Tensor) and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return images.to(self.device) if images.nbytes <= free // 2 else images
        return images

    def _place(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device, from pinned memory so that nothing waits for the copy."""
        if tensor.device.type == "cpu" and self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


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
    """Pad uint8 images (n, channels, H, W), crop them at `corners` (n, 2), and mirror those in `mirrored` (n,)."""
    count, channels, height, width = pixels.shape
    along = torch.arange(width, device=pixels.device)
    y = corners[:, :1] + torch.arange(height, device=pixels.device)
    x = corners[:, 1:] + torch.where(mirrored[:, None], along.flip(0), along)
    sources = (y[:, :, None] * (width + 2 * PADDING) + x[:, None, :]).view(count, 1, -1)
    padded = F.pad(pixels, [PADDING] * 4).flatten(2)
    return padded.gather(2, sources.expand(-1, channels, -1)).view_as(pixels)
