"""Growth: do the stripes of a recorded training rise, fall or settle, and do other images have the same stripes?

The run alone gives strength, std and drift of every gate and epoch, and each gate's trend. With the run's checkpoint,
the same gates are recorded on training images, test images, blurred and noisy test images, and handwritten digits.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import stripe
from stripe import plots
from stripe.cli.options import preprocessing
from stripe.data import ImageSet, Loader, load_images
from stripe.figures import save
from stripe.files import write_csv
from stripe.models import read_checkpoint
from stripe.plots.drawing import draw_by_gate
from stripe.recipe import SETTLED_DRIFT
from stripe.stats import drift, settled_epoch, summarize
from stripe.training import evaluate
from studies.drawing import finish
from studies.table import add_data, headed, publish, read

BLUR = 1.5  # sigma in pixels
LEAST_CHANGE = 0.01  # of strength; a smaller one counts as neither a rise nor a fall
NOISE = 0.1  # sd of the noise, for pixels in 0..1
DECIMALS = 4
EPOCHS = ("epoch gate channels samples strength strength_low strength_high std sample_share drift rank flags").split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    parser.add_argument("run", metavar="RUN", help="a run with several epochs")
    add_data(parser, "hf:../shared/data/cifar10", 100)
    parser.add_argument("--ckpt", metavar="PATH", help="the run's network (default: RUN/checkpoints/last.pt)")
    parser.add_argument("--samples", type=int, default=1_000, metavar="N", help="images of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="where runs go")


def run(arguments: argparse.Namespace) -> None:
    """Measure the run, record and measure the other images, and write tables and figures."""
    observed, out = stripe.open_run(arguments.run), arguments.out
    if len(observed.epochs) < 2:
        raise ValueError(f"run '{arguments.run}' holds epochs {observed.epochs}: growth takes two or more")
    write_csv(out / "epochs.csv", summarize(observed, rank=True)[EPOCHS].round(2 * DECIMALS))
    checkpoint = read_checkpoint(arguments.ckpt or Path(arguments.run, "checkpoints", "last.pt"))
    images = inputs(arguments, preprocessing(checkpoint.description))
    write_csv(out / "inputs.csv", measure(checkpoint.model, images, arguments).round(2 * DECIMALS))
    publish(tables(out), out)
    figures(out)


# ---- over epochs -----------------------------------------------------------------------------------------


def trends(epochs: pd.DataFrame, tolerance: float = SETTLED_DRIFT) -> pd.DataFrame:
    """Return a row per gate: strength at the first and last epoch, Spearman's rho with the epoch, when it settles.

    A gate rises or falls if rho and the change agree in sign, the intervals of the first and last epoch do not overlap,
    and the change is 0.01 or more. Epochs depend on each other, so rho has no p-value. `settled` is the first epoch
    after which drift stays under `tolerance`.
    """
    rows = []
    for gate, part in epochs.groupby("gate", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        rho = float(spearmanr(part["epoch"], part["strength"]).statistic)
        row = {"gate": gate, "channels": first["channels"], "first": first["strength"], "last": last["strength"]}
        row |= {"last_low": last["strength_low"], "last_high": last["strength_high"], "rho": rho}
        row |= {"trend": _trend(first, last, rho), "highest_at": part["epoch"].iloc[part["strength"].argmax()]}
        row |= {"std_first": first["std"], "std_last": last["std"]}
        rows.append(row | {"settled": settled_epoch(part["epoch"], part["drift"], tolerance) or ""})
    return pd.DataFrame(rows).round(DECIMALS)


def _trend(first: pd.Series, last: pd.Series, rho: float) -> str:
    change = last["strength"] - first["strength"]
    apart = last["strength_low"] > first["strength_high"] or last["strength_high"] < first["strength_low"]
    if not (apart and rho * change > 0 and abs(change) >= LEAST_CHANGE):
        return "neither"
    return "rises" if change > 0 else "falls"


# ---- other images ----------------------------------------------------------------------------------------


def inputs(arguments: argparse.Namespace, normalisation: dict[str, Any]) -> dict[str, ImageSet]:
    """Load images of every kind, normalised as for the network; there may be fewer digits than asked for."""
    where = {"data_dir": arguments.data_dir, **normalisation}
    train, test = (load_images(arguments.dataset, s, samples=arguments.samples, **where) for s in ("train", "test"))
    pixels = test.images if isinstance(test.images, Tensor) else test.images.decode()
    digits = load_images("digits", "test", size=pixels.shape[-1], mean=test.mean, std=test.std)
    return {
        "test": test,
        "train": train,
        "blur": dataclasses.replace(test, images=gaussian_blur(pixels, [2 * math.ceil(2 * BLUR) + 1] * 2, [BLUR] * 2)),
        "noise": dataclasses.replace(test, images=noisy(pixels, arguments.seed)),
        "digits": digits.take(min(len(digits), arguments.samples)),
    }


def noisy(pixels: Tensor, seed: int) -> Tensor:
    """Add Gaussian noise to uint8 images (N, 3, H, W)."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (pixels + 255 * NOISE * noise).round().clamp(0, 255).to(torch.uint8)


def measure(model: nn.Module, images: dict[str, ImageSet], arguments: argparse.Namespace) -> pd.DataFrame:
    """Record every kind of image into a run of its own, and return a row per kind and gate.

    `shift` is the mean absolute difference of the stripe from that of the test images, `shift_std` the same in units
    of their mean std; accuracy is in percent, and NaN for digits, which have other classes.
    """
    tables, reference = [], None
    for kind, part in images.items():
        observed = record(model, part, arguments.runs / f"{Path(arguments.run).resolve().name}-{kind}")
        table = summarize(observed).set_index("gate")
        moments = {gate: found for (_, gate), found in observed.moments().items()}
        reference = reference or moments
        shift = pd.Series({gate: drift(reference[gate], found) for gate, found in moments.items()})
        spread = pd.Series({gate: np.nanmean(found.std) for gate, found in reference.items()})
        accuracy = math.nan if kind == "digits" else evaluate(model, Loader(part, arguments.batch)).accuracy
        columns = ["channels", "samples", "strength", "strength_low", "strength_high", "std", "flags"]
        found = table[columns].assign(input=kind, accuracy=accuracy, shift=shift, shift_std=shift / spread)
        tables.append(found.reset_index())
    return pd.concat(tables, ignore_index=True)


def record(model: nn.Module, images: ImageSet, path: Path) -> stripe.Run:
    """Record a kind of image as epoch 0, in place of any earlier run."""
    loader = Loader(images, 100)
    gates = stripe.find_gates(model, next(iter(loader))[0][:3])
    with stripe.Recorder(model, gates, path, data=images.describe(), overwrite=True) as recorder:
        recorder.record(loader)
    return stripe.open_run(path)


# ---- figures and tables ----------------------------------------------------------------------------------


def draw(epochs: pd.DataFrame) -> Figure:
    """Draw strength with its intervals, std and drift over epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(6.9, 2.6), layout="constrained")
    plots.strength_over_epochs(epochs, ax=axes[0])
    for line, (_, rows) in zip(axes[0].get_lines(), epochs.groupby("gate", sort=False), strict=True):
        axes[1].plot(rows["epoch"], rows["std"], color=line.get_color(), linewidth=0.8, marker=".", markersize=2.5)
    for bar in figure.axes[len(axes) :]:
        bar.remove()  # where there are many gates, the last panel's colour bar is enough
    axes[1].set(xlabel="epoch", ylabel="std over images, mean of channels", ylim=(0, None))
    plots.drift_over_epochs(epochs, ax=axes[2])
    return finish(figure)


def draw_ranks(epochs: pd.DataFrame) -> Figure:
    """Draw the effective rank of every gate over epochs, less the 1 of a single direction."""
    figure, ax = plt.subplots(figsize=(3.6, 2.6), layout="constrained")
    draw_by_gate(ax, epochs.assign(rank=epochs["rank"] - 1), "rank")
    ax.set(xlabel="epoch", ylabel="effective rank, less 1", yscale="log")
    return finish(figure)


def draw_inputs(inputs: pd.DataFrame) -> Figure:
    """Draw strength with its interval on every kind of image, and the stripe's distance from that of test images."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.9, 2.6), layout="constrained")
    colors = plt.colormaps["viridis"](np.linspace(0, 0.9, inputs["input"].nunique()))
    for number, ((kind, rows), color) in enumerate(zip(inputs.groupby("input", sort=False), colors, strict=True)):
        places = np.arange(len(rows)) + 0.12 * (number - 2)
        left.vlines(places, rows["strength_low"], rows["strength_high"], color=color, linewidth=1)
        left.plot(
            places, rows["strength"], color=color, linestyle="", marker="osD^v"[number % 5], markersize=3, label=kind
        )
        if kind != "test":
            right.plot(places, rows["shift_std"], color=color, linestyle="", marker="osD^v"[number % 5], markersize=3)
    for ax in (left, right):
        ax.set_xticks(range(inputs["gate"].nunique()), inputs["gate"].unique(), rotation=45, ha="right")
    left.set(ylabel="stripe strength", ylim=(0, 1.03))
    right.set(ylabel="stripe's distance from that of\ntest images, in their std", ylim=(0, None))
    return finish(figure)


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Return the tables that follow from epochs.csv and inputs.csv in a directory, by file name."""
    found = {}
    if (out / "epochs.csv").exists():
        found["trends.csv"] = _trends(trends(read(out / "epochs.csv")))
        found["ranks.csv"] = _ranks(read(out / "epochs.csv"))
    if (out / "inputs.csv").exists():
        found["other-images.csv"] = _other_images(read(out / "inputs.csv"))
    return found


def _trends(rows: pd.DataFrame) -> pd.DataFrame:
    columns = {"gate": "gate", "channels": "channels", "first epoch": "first:.3f", "last epoch": "last:.3f"}
    columns |= {"95 % interval from": "last_low:.3f", "to": "last_high:.3f", "rho": "rho:+.2f", "trend": "trend"}
    columns |= {"highest at": "highest_at", "std at first": "std_first:.4f", "at last": "std_last:.4f"}
    return headed(rows, columns | {"settled": "settled"})


def _ranks(epochs: pd.DataFrame) -> pd.DataFrame:
    """Return each gate's effective rank at the first epoch, at the epoch where it is greatest, and at the last."""
    by_gate = epochs.groupby("gate", sort=False)
    rows = by_gate.agg(channels=("channels", "first"), most=("rank", "max"))
    rows["first"], rows["last"] = (by_gate.nth(place).set_index("gate")["rank"] for place in (0, -1))
    known = epochs.assign(rank=epochs["rank"].fillna(0.0))  # a dead gate has none
    highest = known.loc[known.groupby("gate", sort=False)["rank"].idxmax()].set_index("gate")["epoch"]
    columns = {"gate": "gate", "channels": "channels", "first epoch": "first:.2f", "greatest": "most:.2f"}
    return headed(rows.assign(at=highest).reset_index(), columns | {"at epoch": "at", "last epoch": "last:.3f"})


def _other_images(inputs: pd.DataFrame) -> pd.DataFrame:
    """Return each gate's strength on every kind of image and its stripe's shift, and a last row of accuracies."""
    kinds = list(inputs["input"].unique())
    by_gate = inputs.pivot(index="gate", columns="input", values=["strength", "shift_std"])
    rows = pd.DataFrame({"gate": by_gate.index})
    for kind in kinds:
        rows[f"{kind}: strength"] = [f"{value:.3f}" for value in by_gate["strength", kind]]
    for kind in kinds[1:]:
        rows[f"{kind}: shift"] = [f"{value:.2f}" for value in by_gate["shift_std", kind]]
    accuracy = inputs.groupby("input")["accuracy"].first()
    texts = {f"{kind}: strength": f"{accuracy[kind]:.1f} %" for kind in kinds if pd.notna(accuracy[kind])}
    return pd.concat([rows, pd.DataFrame([{"gate": "accuracy"} | texts])], ignore_index=True).fillna("")


def figures(out: Path) -> None:
    """Draw the epochs.csv and inputs.csv of a directory, where they exist."""
    drawn = ("growth", "epochs.csv", draw), ("ranks", "epochs.csv", draw_ranks), ("inputs", "inputs.csv", draw_inputs)
    for name, source, draws in drawn:
        if (out / source).exists():
            print(*save(draws(read(out / source)), out / name))
