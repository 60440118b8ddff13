"""Robustness: disturb the outputs of every norm of trained networks, and test them in deployed form."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from stripe import asr
from stripe.cli.options import preprocessing
from stripe.data import Loader, load_images
from stripe.figures import save
from stripe.models import read_checkpoint
from stripe.training import evaluate
from studies.table import Table, add_data, headed, publish, read

SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
SPREADS = (0.1, 0.2, 0.3, 0.4, 0.5)
NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm | nn.LayerNorm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    add_data(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the noise")
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="NAME=PATH", help="trained networks")
    parser.add_argument("--samples", type=int, metavar="N", help="test images")


@dataclass(frozen=True)
class Disturbance:
    """Changes each norm's output x to x * a * n + b, with n drawn from N(1, s) per sample and channel."""

    a: float = 1.0
    b: float = 0.0
    s: float = 0.0
    seed: int = 0

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Disturb `model` within the `with`, by hooks on its batch, group and layer norms.

        Raises:
            ValueError: the network has no norm.
        """
        norms = [m for m in model.modules() if isinstance(m, NORMS)]
        if not norms:
            raise ValueError(f"{type(model).__name__} has no norm to disturb: expected batch, group or layer norms")
        generator = torch.Generator().manual_seed(self.seed)
        with ExitStack() as hooks:
            for norm in norms:
                hook = functools.partial(self._disturb, generator)
                hooks.callback(norm.register_forward_hook(hook).remove)
            yield

    def _disturb(self, generator: torch.Generator, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        shape = *output.shape[:2], *[1] * (output.ndim - 2)
        noise = 1 + self.s * torch.randn(shape, generator=generator).to(output)
        return output * (self.a * noise) + self.b


def disturbances(seeds: list[int]) -> Iterator[Disturbance]:
    """Yield the grid of constants, then noise of growing spread, each with every seed."""
    yield from (Disturbance(a, b) for a, b in itertools.product(SCALES, SHIFTS))
    yield from (Disturbance(s=s, seed=seed) for s, seed in itertools.product(SPREADS, seeds))


def run(arguments: argparse.Namespace) -> None:
    """Test every network under every disturbance without a row, and draw the table."""
    checkpoints = dict(_name_and_path(word) for word in arguments.ckpt)
    table = Table(arguments.out / "robustness.csv", {name: getattr(arguments, name) for name in ("dataset", "samples")})
    for name, path in checkpoints.items():
        cases = ({"network": name, "checkpoint": path} | dataclasses.asdict(d) for d in disturbances(arguments.seeds))
        if not (missing := table.missing(cases)):
            continue
        checkpoint = read_checkpoint(path)
        model, own = asr.deploy(checkpoint.model), preprocessing(checkpoint.description)
        options = {"samples": arguments.samples, "data_dir": arguments.data_dir}
        loader = Loader(load_images(arguments.dataset, "test", **options, **own), arguments.batch)
        for case in tqdm(missing, name, disable=None):
            disturbance = Disturbance(**{key: case[key] for key in ("a", "b", "s", "seed")})
            with disturbance.applied(model):
                table.put(case, {"accuracy": evaluate(model, loader).accuracy})
    rows = table.frame()
    publish(tables(arguments.out), arguments.out)
    print(*save(draw_robustness(rows), arguments.out / "robustness"))


def _name_and_path(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--ckpt {word}: expected NAME=PATH, such as SE=runs/se/checkpoints/last.pt")
    return name, path


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Return the table that follows from robustness.csv in a directory, by file name."""
    if not (out / "robustness.csv").exists():
        return {}
    found = read(out / "robustness.csv").pivot_table("accuracy", ["a", "b", "s"], "network", sort=False)
    columns = {"scale a": "a", "shift b": "b", "spread s": "s"} | {str(name): f"{name}:.2f" for name in found}
    return {"robustness-compared.csv": headed(found.reset_index(), columns)}


def draw_robustness(rows: pd.DataFrame) -> Figure:
    """Draw accuracy over the grid of constants, one panel per network, and under noise, one line per network."""
    names = list(rows["network"].unique())
    undisturbed = rows[(rows["a"] == 1) & (rows["b"] == 0) & (rows["s"] == 0)]
    figure = plt.figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = above.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, names, strict=True):
        grid = rows[(rows["network"] == name) & (rows["s"] == 0)].pivot(index="b", columns="a", values="accuracy")[::-1]
        bar = ax is panels[-1]
        sns.heatmap(
            grid, vmin=0, vmax=100, cmap="viridis", annot=True, fmt=".0f", annot_kws={"size": 6},
            cbar=bar, cbar_kws={"label": "test accuracy (%)"} if bar else None, ax=ax,
        )  # fmt: skip
        ax.set(title=name, xlabel="scale a", ylabel="shift b" if ax is panels[0] else "")
    ax = below.subplots()
    noise = pd.concat([undisturbed, rows[rows["s"] > 0]])
    sns.lineplot(noise, x="s", y="accuracy", hue="network", style="network", markers=True, errorbar=("pi", 100), ax=ax)
    ax.set(xlabel="spread s of the noise N(1, s); bands: range over seeds", ylabel="test accuracy (%)", ylim=(0, 100))
    return figure
