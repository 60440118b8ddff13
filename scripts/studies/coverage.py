"""Coverage: how often the interval of the strength holds the true strength, on simulated gates of known strength."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stripe.stats import CONFIDENCE, Moments, strength_interval, stripe_strength
from studies.table import Table

IMAGES, CHANNELS, STRENGTHS = (20, 100, 1000), (16, 64, 256), (0.1, 0.5, 0.9)
NOISES = {
    "independent": "normal, independent over images and channels",
    "rank one": "normal, one number per image times one weight per channel",
    "half common to a row": "normal, half of its variance from one number per image that all channels share",
    "t3": "independent, Student's t with 3 degrees of freedom: heavy tails",
}

Values = NDArray[np.float64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, metavar="N", help="images of a gate")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, metavar="C", help="its channels")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, metavar="S", help="true strengths")
    parser.add_argument(
        "--noises", nargs="+", choices=NOISES, default=list(NOISES), metavar="KIND", help="kinds of noise"
    )
    parser.add_argument("--repetitions", type=int, default=500, metavar="N", help="simulated gates of each kind")
    parser.add_argument(
        "--out", type=Path, default=Path("figures/study"), metavar="DIR", help="where coverage.csv goes; continued"
    )


def run(arguments: argparse.Namespace) -> None:
    """Simulate every kind of gate that the table lacks, and print the extreme coverage and the largest bias."""
    table = Table(arguments.out / "coverage.csv", {"repetitions": arguments.repetitions, "confidence": CONFIDENCE})
    for cell in tqdm(table.missing(cells(arguments)), desc="coverage", unit="cell"):
        noise, images, channels, strength = cell.values()
        table.put(cell, simulate(noise, (images, channels), strength, arguments.repetitions))
    found = table.frame()
    for noise in found["noise"].unique():
        part = found[found["noise"] == noise]
        low, high = part["coverage"].min(), part["coverage"].max()
        print(f"{noise}: covered in {low:.3f} to {high:.3f}, bias up to {part['bias'].abs().max():.3f}")


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every kind of simulated gate."""
    return [
        {"noise": noise, "images": images, "channels": channels, "true strength": strength}
        for noise in arguments.noises
        for images in arguments.images
        for channels in arguments.channels
        for strength in arguments.strengths
    ]


def simulate(noise: str, shape: tuple[int, int], strength: float, repetitions: int) -> dict[str, Any]:
    """Return how often the interval held the truth, the estimate's bias and spread, and the interval's median width."""
    estimates, ends = [], []
    for values in draw(noise, shape, strength, repetitions):
        moments = Moments.of(values)
        interval = strength_interval(moments)
        estimates.append(stripe_strength(moments).strength)
        ends.append((interval.low, interval.high))
    low, high = np.array(ends).T
    estimate = np.array(estimates)
    if not ((low <= estimate) & (estimate <= high)).all():
        raise ArithmeticError(f"an interval of {noise} noise, {shape}, strength {strength} lacks its own estimate")
    return {
        "coverage": round(float(np.mean((low <= strength) & (strength <= high))), 4),
        "above": round(float(np.mean(low > strength)), 4),
        "below": round(float(np.mean(high < strength)), 4),
        "bias": round(float(estimate.mean() - strength), 5),
        "standard deviation": round(float(estimate.std(ddof=1)), 5),
        "median width": round(float(np.median(high - low)), 5),
    }


def draw(noise: str, shape: tuple[int, int], strength: float, repetitions: int) -> Iterator[Values]:
    """Yield gates (images, channels): the channel means hold exactly `strength` of the variance, noise the rest."""
    seed = [sorted(NOISES).index(noise), *shape, round(1000 * strength)]
    rng = np.random.default_rng(seed)
    for _ in range(repetitions):
        means = rng.normal(size=shape[1])
        means = (means - means.mean()) / means.std(ddof=1)
        yield 0.5 + 0.1 * (np.sqrt(strength) * means + np.sqrt(1 - strength) * _unit_noise(noise, shape, rng))


def _unit_noise(noise: str, shape: tuple[int, int], rng: np.random.Generator) -> Values:
    """Draw noise whose variance, averaged over channels, is 1."""
    images, channels = shape
    if noise == "t3":
        heavy: Values = rng.standard_t(3, size=shape) / np.sqrt(3)
        return heavy
    if noise == "rank one":
        weights = rng.normal(size=channels)
        directed: Values = rng.normal(size=(images, 1)) * weights / np.sqrt(np.mean(weights**2))
        return directed
    independent: Values = rng.normal(size=shape)
    if noise == "independent":
        return independent
    shifted: Values = math.sqrt(0.5) * (rng.normal(size=(images, 1)) + independent)
    return shifted
