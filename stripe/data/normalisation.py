"""The mean and std that normalise a set's channels: published, given, or measured over its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch

from stripe.data import decoding
from stripe.data.decoding import Images, decode_all

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, for pixels in 0..1

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def statistics(images: Images, uri: str) -> MeanStd:
    """Return each channel's mean and std over all pixels, in 0..1; a std of 1 where all pixels are equal.

    Counts how often each of the 256 values occurs, so the result does not depend on the order of the sum. For
    a set larger than MEMORY_LIMIT it uses as many images as fit, spread evenly.
    """
    total, *shape = images.shape
    fitting = min(total, decoding.MEMORY_LIMIT // math.prod(shape))
    counts = torch.zeros(shape[0], 256, dtype=torch.int64)
    for _, pixels in decode_all(images[torch.arange(fitting) * total // fitting], uri):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[counts.count_nonzero(1) == 1] = 1.0
    return checked_mean_std(mean.tolist(), std.tolist(), shape[0])


def checked_mean_std(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> MeanStd:
    """Return a given mean and std as tuples; ValueError if they cannot normalise images of `channels` channels."""
    given = [*(mean or ()), *(std or ())]
    usable = len(given) == 2 * channels and all(isinstance(x, Real) and math.isfinite(x) for x in given)
    if mean is None or std is None or len(mean) != channels or not usable or not min(std) > 0:
        number = {1: "one value", 3: "three values"}[channels]
        raise ValueError(f"mean {mean} and std {std}: expected {number} each, std above 0; pass both")
    return tuple(mean), tuple(std)
