"""Verdicts: how often psi that was never trained "matches" a stripe, and how often psi fitted to the stripe does.

For simulated gates and for those of a trained network, psi is drawn anew, sent through the attention, and judged as
`stripe.asr.validate` judges it, with p adjusted over the gates of one network (over nine simulated gates).
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

import stripe
from stripe.asr.psi import Psi, best_fit, random_psis, vectors_of
from stripe.asr.task import measured
from stripe.attention import create_attention
from stripe.data import Loader, load_images
from stripe.folding import GateUse
from stripe.gates import isolate
from stripe.stats import Moments, benjamini_hochberg
from stripe.stats.verdicts import EQUIVALENT, VERDICTS, energy_distance, rank_p, verdict
from studies.table import Row, Table, add_data, headed, publish, read

RECORDS, SHOWN = "verdict-rates.csv", "verdicts.csv"
TOGETHER = 9  # simulated gates over which p is adjusted
CHANNELS = (16, 64, 128)
START = 0.1
PSIS = {"untrained": 0.3, "untrained, wide": 1.0, "fitted": 0.3}
"""For each kind of psi, the standard deviation of its draw about START; "fitted" is then fitted to the stripe."""
COLUMNS = {"gates": "gates", "channels": "channels", "psi": "psi", "judged": "judged"}
COLUMNS |= {f"{word}, %": f"{word}:.1f" for word in VERDICTS} | {"match where it can be told, %": "told:.1f"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A gate that psi is judged on: its attention as a function of psi (C,), its recorded squeezes, and its use."""

    attention: Any
    squeezes: Tensor
    use: GateUse

    @property
    def stripe(self) -> npt.NDArray[Any]:
        """The observed stripe (C,)."""
        return self.use.values.mean

    @property
    def limit(self) -> float:
        """The largest distance at which a vector is equivalent to the stripe."""
        return max(self.use.error(self.stripe), EQUIVALENT)

    def distance(self, vectors: npt.NDArray[Any]) -> Any:
        """Return the distance of vectors (..., C) from the stripe."""
        return energy_distance(vectors, self.stripe, self.use.energy, self.use.result)

    @functools.cached_property
    def random(self) -> npt.NDArray[Any]:
        """The distances from the stripe of the vectors of random psi."""
        return np.asarray(self.distance(vectors_of(self.attention, random_psis(self.squeezes))))


class Simulated(nn.Module):
    """Squeeze-and-excitation as a function of the squeeze (C,), with weights spread as in trained networks."""

    def __init__(self, channels: int) -> None:
        """Draw the weights and biases once, for all images and psi."""
        super().__init__()
        self.module = create_attention("senet", channels)
        for parameter in self.module.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, squeeze: Tensor) -> Tensor:
        """Return the attention (C,)."""
        attention: Tensor = self.module(squeeze.view(1, -1, 1, 1)).flatten()
        return attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    add_data(parser, "hf:../shared/data/cifar10", 100, Path("figures/study"))
    network = Path("figures/fold-se-resnet20/se-resnet20.pt")
    parser.add_argument("--ckpt", type=Path, default=network, metavar="PATH", help="the trained network")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="test images for its stripes")
    parser.add_argument(
        "--draws", type=int, default=40, metavar="N", help="psi of each kind for every gate of the network"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help=f"lists of {TOGETHER} simulated gates")
    parser.add_argument(
        "--fitted", type=int, default=5, metavar="N", help="psi fitted to the stripe for every gate of the network"
    )


def run(arguments: argparse.Namespace) -> None:
    """Judge every case without a row, then print the table."""
    config = {
        name: str(getattr(arguments, name)) for name in ("ckpt", "dataset", "images", "draws", "rounds", "fitted")
    }
    table = Table(arguments.out / RECORDS, config)
    kinds = [("simulated", str(channels)) for channels in CHANNELS] + [(arguments.ckpt.stem, "16 to 64")]
    cases = [{"gates": g, "channels": c, "psi": psi} for (g, c), psi in itertools.product(kinds, PSIS)]
    for case in table.missing(cases):
        torch.manual_seed(0)
        if case["gates"] == "simulated":
            rounds = simulated(int(case["channels"]), arguments.rounds)
        else:
            rounds = trained(arguments, arguments.fitted if case["psi"] == "fitted" else arguments.draws)
        table.put(case, rates([judged(subjects, case["psi"], seed) for seed, subjects in enumerate(rounds)]))
    publish(tables(arguments.out), arguments.out)


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the rates in a directory's records, with readable headings, by file name."""
    path = folder / RECORDS
    return {SHOWN: headed(read(path), COLUMNS)} if path.exists() else {}


def rates(verdicts: list[pd.DataFrame]) -> Row:
    """Return how many gates were judged, and the share of every verdict in percent.

    `told` is the share of matches among the gates where a match can be told: fewer than half of the random vectors are
    equivalent to the stripe and, where psi was fitted, the fitted vector is.
    """
    found = pd.concat(verdicts)
    told = found[(found["random"] < 0.5) & (found["best"] <= found["limit"])]
    shares = {word: 100 * float((found["verdict"] == word).mean()) for word in VERDICTS}
    return {"judged": len(found), **shares, "told": 100 * float((told["verdict"] == "match").mean())}


def simulated(channels: int, rounds: int) -> Iterator[list[Subject]]:
    """Yield lists of gates, as of one network, simulated anew for each round."""
    for _ in range(rounds):
        yield [_simulated(channels) for _ in range(TOGETHER)]


def _simulated(channels: int, images: int = 200) -> Subject:
    """Make a gate whose squeezes and energies vary by channel and image."""
    attention = Simulated(channels).requires_grad_(False)
    squeezes = torch.randn(channels) * 0.5 + 0.3 * torch.randn(images, channels)
    values = vectors_of(attention, squeezes)
    energies = np.exp(torch.randn(channels).numpy() + 0.3 * torch.randn(images, channels).numpy())
    sums = ((values**power * energies).mean(0) for power in (0, 1, 2))
    return Subject(attention, squeezes, GateUse(Moments.of(values), *sums))


def trained(arguments: argparse.Namespace, rounds: int) -> Iterator[list[Subject]]:
    """Yield the gates of the trained network, the same in each round."""
    model = stripe.models.load_checkpoint(str(arguments.ckpt)).eval().requires_grad_(False)
    images = load_images(arguments.dataset, "test", samples=arguments.images, data_dir=arguments.data_dir)
    loader = Loader(images, arguments.batch)
    first = next(iter(loader))[0][:2]
    gates = stripe.find_gates(model, first)
    uses, squeezes = measured(model, gates, loader)
    attentions, _ = isolate(model, gates, first)
    subjects = [Subject(a, squeezes[name], uses[name]) for name, a in attentions.items()]
    yield from itertools.repeat(subjects, rounds)


def judged(subjects: list[Subject], psi: str, seed: int) -> pd.DataFrame:
    """Draw one psi of a kind for every gate and judge it; `random` is the share of random psi that are equivalent."""
    generator = torch.Generator().manual_seed(seed)
    found = pd.DataFrame([_measured(subject, psi, generator) for subject in subjects])
    found["p"] = benjamini_hochberg(found["p"].to_numpy())
    rows: list[dict[Any, Any]] = found.to_dict("records")
    told = ("limit", "p", "random", "best")
    found["verdict"] = [verdict(row["distance"], **{name: row[name] for name in told}) for row in rows]
    return found


def _measured(subject: Subject, kind: str, generator: torch.Generator) -> Row:
    starts = START + PSIS[kind] * torch.randn(5 if kind == "fitted" else 1, len(subject.stripe), generator=generator)
    if kind == "fitted":
        vector = best_fit(Psi(subject.attention, starts[0].clone()), subject.stripe, subject.use, starts, enough=1e-9)
    else:
        (vector,) = vectors_of(subject.attention, starts)
    distance, random = float(subject.distance(vector)), float((subject.random <= subject.limit).mean())
    best = distance if kind == "fitted" else 0.0
    return {"distance": distance, "limit": subject.limit, "p": rank_p(distance, subject.random), "random": random,
            "best": best}  # fmt: skip
