"""Two studies, each a table that grows row by row and goes on where it stopped: ablations of ASR, and robustness.

`ablation` trains ASR networks that differ in one choice each. `robustness` disturbs the outputs of every norm of
trained networks. All training is seeded, all tests are made on networks in deployed form.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from tqdm import tqdm

import stripe
from stripe import asr
from stripe.data import ImageSet, Loader, load_images
from stripe.models import create_model, read_checkpoint
from stripe.training import Recipe, evaluate, fit

Row = dict[str, Any]
LAST_NORM = {"bottleneck": "bn3", "basicblock": "bn2"}  # of each block: what ASR wraps
PSI_INITS = (0.1, 0.3, 0.5, "normal")
REPEATS = (1, 2, 3)
INSERTIONS = ("every", "second", "last stage")
SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
SPREADS = (0.1, 0.2, 0.3, 0.4, 0.5)


class Table:
    """Rows of one configuration in a CSV, written anew, by rename, after each one."""

    def __init__(self, path: Path, config: Row) -> None:
        """Open the table at `path`.

        Raises:
            ValueError: it holds rows of another configuration.
        """
        versions = {"python": platform.python_version(), "torch": torch.__version__, "stripe": stripe.__version__}
        self.path = path
        self._always = {"config": json.dumps(config), "versions": json.dumps(versions)}
        self.rows: list[Row] = []
        if path.exists():
            self.rows += pd.read_csv(path).to_dict("records")  # type: ignore[arg-type]
        if any(row["config"] != self._always["config"] for row in self.rows):
            raise ValueError(f"'{path}' holds rows of another configuration: name another --out")

    def missing(self, cases: Iterable[Row]) -> list[Row]:
        """Return the cases without a row."""
        return [case for case in cases if not any(_same(row, case) for row in self.rows)]

    def add(self, row: Row) -> None:
        """Append a row; it is on disk afterwards."""
        self.rows.append(row | self._always)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        self.frame().to_csv(partial, index=False)
        partial.replace(self.path)

    def frame(self) -> pd.DataFrame:
        """Return all rows."""
        return pd.DataFrame(self.rows)


def _same(row: Row, case: Row) -> bool:
    """Tell whether a row read from a file is that of a case: 0.1 and "0.1" are the same."""
    return all(str(row[key]) == str(value) for key, value in case.items())


# ---- ablation --------------------------------------------------------------------------------------------


def ablation(arguments: argparse.Namespace) -> None:
    """Train every missing case and add its row."""
    settings = ("dataset", "depth", "block", "module", "epochs", "lr", "batch", "train_samples", "test_samples")
    table = Table(arguments.out / "ablation.csv", {name: getattr(arguments, name) for name in settings})
    images = load_images(arguments.dataset, "train", samples=arguments.train_samples, data_dir=arguments.data_dir)
    test = load_images(arguments.dataset, "test", samples=arguments.test_samples, data_dir=arguments.data_dir)
    choices = {"psi_init": arguments.psi_init, "repeats": arguments.repeats, "insertion": arguments.insertion}
    for case in tqdm(table.missing(ablation_cases(choices, arguments.seeds)), "ablation", disable=None):
        directory = arguments.out / "-".join(str(value).replace(" ", "-") for value in case.values())
        table.add(case | train_case(case, images, test, directory, arguments))
    print(table.frame().drop(columns=["config", "versions"]).to_string(index=False))


def ablation_cases(choices: dict[str, list[Any]], seeds: list[int]) -> Iterator[Row]:
    """Yield the first value of every choice, then each other value with the first of all others, for each seed."""
    first = {name: values[0] for name, values in choices.items()}
    others = ({name: value} for name, values in choices.items() for value in values[1:])
    for change, seed in itertools.product([{}, *others], seeds):
        yield first | change | {"seed": seed}


def train_case(case: Row, images: ImageSet, test: ImageSet, directory: Path, arguments: argparse.Namespace) -> Row:
    """Train one case, or finish its training; return test accuracies of the last and of the best validated epoch."""
    training, validation = images.hold_out(len(images) // 10, case["seed"])
    model = build_case(case, len(images.classes), arguments)
    last, best = (directory / "checkpoints" / name for name in ("last.pt", "best.pt"))
    if not last.exists():
        shutil.rmtree(directory, ignore_errors=True)  # stopped within its first epoch
    metrics = fit(
        model,
        Loader(training, arguments.batch, train=True, seed=case["seed"]),
        Loader(validation, arguments.batch),
        Recipe(epochs=arguments.epochs, lr=arguments.lr, scheduler="cosine", seed=case["seed"]),
        directory=directory,
        description=case,
        resume=last if last.exists() else None,
        save_every=0,
        progress=False,
    )
    row: Row = {"layers": sum(isinstance(module, asr.ASRLayer) for module in model.modules())}
    for name, path in (("last", last), ("best", best)):
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        row[f"accuracy_{name}"] = evaluate(asr.deploy(model), Loader(test, arguments.batch)).accuracy
    return row | {"best_epoch": int(metrics["val_accuracy"].argmax()) + 1}


def build_case(case: Row, classes: int, arguments: argparse.Namespace) -> nn.Module:
    """Build a plain network and insert ASR as the case says; plain weights depend on the seed alone."""
    torch.manual_seed(case["seed"])
    model = create_model("resnet", depth=arguments.depth, block=arguments.block, num_classes=classes)
    norms = [name for name, _ in model.named_modules() if name.endswith(f".{LAST_NORM[arguments.block]}")]
    last_stage = norms[-1].split(".")[0]
    chosen = {
        "every": norms,
        "second": norms[::2],
        "last stage": [name for name in norms if name.split(".")[0] == last_stage],
    }[case["insertion"]]
    for name in chosen:
        options = {"psi_init": case["psi_init"], "repeats": case["repeats"]}
        asr.insert(model, arguments.module, where=name, inplace=True, **options)
    return model


# ---- robustness ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """What every norm gives is made x * a * n + b, n drawn from N(1, s) for each sample and channel."""

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
        norms = [m for m in model.modules() if isinstance(m, _NormBase | nn.GroupNorm | nn.LayerNorm)]
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
    """Yield the grid of constants, then noise of growing spread for each seed."""
    yield from (Disturbance(a, b) for a, b in itertools.product(SCALES, SHIFTS))
    yield from (Disturbance(s=s, seed=seed) for s, seed in itertools.product(SPREADS, seeds))


def robustness(arguments: argparse.Namespace) -> None:
    """Test every network under every disturbance without a row, and draw the table."""
    checkpoints = dict(_name_and_path(word) for word in arguments.ckpt)
    table = Table(arguments.out / "robustness.csv", {name: getattr(arguments, name) for name in ("dataset", "samples")})
    for name, path in checkpoints.items():
        cases = ({"network": name, "checkpoint": path} | dataclasses.asdict(d) for d in disturbances(arguments.seeds))
        if not (missing := table.missing(cases)):
            continue
        checkpoint = read_checkpoint(path)
        model, data = asr.deploy(checkpoint.model), checkpoint.description.get("data", {})
        constants = {key: data[key] for key in ("size", "mean", "std") if key in data}
        options = {"samples": arguments.samples, "data_dir": arguments.data_dir}
        loader = Loader(load_images(arguments.dataset, "test", **options, **constants), arguments.batch)
        for case in tqdm(missing, name, disable=None):
            disturbance = Disturbance(**{key: case[key] for key in ("a", "b", "s", "seed")})
            with disturbance.applied(model):
                table.add(case | {"accuracy": evaluate(model, loader).accuracy})
    rows = table.frame()
    draw_robustness(rows).savefig(arguments.out / "robustness.png", dpi=200)
    print(rows.pivot_table("accuracy", ["a", "b", "s"], "network", sort=False).round(2).to_string())
    print(arguments.out / "robustness.png")


def _name_and_path(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--ckpt {word}: expected NAME=PATH, such as SE=runs/se/checkpoints/last.pt")
    return name, path


def draw_robustness(rows: pd.DataFrame) -> Figure:
    """Draw accuracy over the grid of constants, a panel a network, and under noise, a line a network."""
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


# ---- command line ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a study; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    studies = parser.add_subparsers(required=True, metavar="STUDY")
    for study, add_arguments in ((ablation, _add_ablation), (robustness, _add_robustness)):
        own = studies.add_parser(
            study.__name__, help=study.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        own.set_defaults(study=study)
        own.add_argument("--dataset", default="digits", metavar="URI", help="digits, cifar10, hf:NAME_OR_DIR, ...")
        own.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="of torchvision's sets")
        own.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the table goes; continued")
        own.add_argument("--batch", type=int, default=64, metavar="N", help="images per batch")
        own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training, or of the noise")
        add_arguments(own)
    arguments = parser.parse_args(argv)
    try:
        arguments.study(arguments)
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet")
    parser.add_argument("--block", choices=LAST_NORM, default="bottleneck", help="of the ResNet")
    parser.add_argument("--module", default="senet", help="attention module under ASR")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="of each training")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate, falling by a cosine")
    parser.add_argument("--train-samples", type=int, metavar="N", help="training images, a tenth held out")
    parser.add_argument("--test-samples", type=int, metavar="N", help="test images")
    parser.add_argument("--psi-init", type=_psi, nargs="+", default=PSI_INITS, help="first: of the other cases too")
    parser.add_argument("--repeats", type=int, nargs="+", default=REPEATS, help="learned vectors per layer")
    parser.add_argument("--insertion", nargs="+", choices=INSERTIONS, default=INSERTIONS, help="in which blocks")


def _add_robustness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="NAME=PATH", help="trained networks")
    parser.add_argument("--samples", type=int, metavar="N", help="test images")


def _psi(text: str) -> float | str:
    return text if text == "normal" else float(text)


if __name__ == "__main__":
    raise SystemExit(main())
