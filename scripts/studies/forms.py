"""Forms: train networks plain, with attention, with ASR and with both, seed by seed; compare them paired by seed.

"anneal" is attention that turns into its running mean in the training's third quarter (`stripe.asr.anneal`); "folded"
trains nothing: it is the network of "attention", all gates folded into constants learned without labels.

Test accuracy is measured in deployed form, at the last epoch and at the epoch that is best on held-out training images.
Networks whose attention depends on the image are recorded after every epoch. Several processes may run at once and
share the work.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stripe
from stripe.data import ImageSet, Loader
from stripe.folding import learn_constants, measure_gates
from stripe.models import create_model
from stripe.models.resnet import Block
from stripe.recipe import Recipe
from stripe.recorder import RecorderCallback
from stripe.stats import summarize
from stripe.training import evaluate, processes
from studies import comparison
from studies.table import Row, Table, add_data, alone, publish
from studies.training import Images, OutOfTime, load, pending, train

FORMS: dict[str, dict[str, bool]] = {
    "plain": {},
    "attention": {},
    "asr": {"asr": True},
    "both": {"asr": True, "both": True},
    "plain-0.5": {},
    "plain-0.25": {},
    "asr-1": {"asr": True},
    "anneal": {},
    "folded": {},
}
STARTS = {"plain-0.5": 0.5, "plain-0.25": 0.25, "asr-1": 1.0}
"""Controls: the scale at which every residual branch begins: its last norm's weight (under ASR, times v). Plain
networks begin at 1, ASR at about 0.5, where v begins, and both at about 0.25."""
CALIBRATION = 40  # batches of training images that the initial constants of "folded" are measured on
BLENDING = (0.5, 0.75)  # shares of the training after which gates of "anneal" begin and finish becoming constants
RECIPE = ("epochs", "scheduler", "milestones", "lr", "weight_decay", "amp", "compile")
SETTINGS = ("dataset", "depth", "block", "batch", "train_samples", "val_samples", "test_samples", *RECIPE)
STRIPES = "epoch gate channels samples strength std sample_share drift label_share rank flags".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    add_trainings(parser, list(FORMS))
    parser.set_defaults(setting="resnet20", forms=list(FORMS)[:4])
    parser.add_argument("--test-samples", type=int, metavar="N", help="test images (default: all)")
    parser.add_argument("--scheduler", default="cosine", help="step, cosine or onecycle")


def add_trainings(parser: argparse.ArgumentParser, forms: Sequence[str]) -> None:
    """Add the arguments of studies that train networks of several forms, seed by seed."""
    add_data(parser, "hf:../shared/data/cifar10", 128, Path("figures/study"))
    what = parser.add_argument_group("what is trained")
    what.add_argument("--setting", metavar="NAME", help="name for all options but forms, module and seeds")
    what.add_argument("--forms", nargs="+", choices=forms, default=forms, help="which networks, in this order")
    what.add_argument("--module", default="senet", help="attention module")
    what.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights, order, crops, held-out images"
    )
    what.add_argument("--depth", type=int, default=20, help="of the ResNet")
    what.add_argument("--block", default="bottleneck", help="of the ResNet: bottleneck or basicblock")
    what.add_argument("--train-samples", type=int, default=20_000, metavar="N", help="training images")
    what.add_argument(
        "--val-samples", type=int, default=2_000, metavar="N", help="held-out images, of those or in addition"
    )
    what.add_argument("--record", type=int, default=1_000, metavar="N", help="test images to record after every epoch")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=int, default=15, metavar="N", help="of each training")
    how.add_argument(
        "--milestones", type=int, nargs="+", default=[81, 122], metavar="E", help="epochs at which the rate drops"
    )
    how.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
    how.add_argument("--weight-decay", type=float, default=5e-4, help="weight decay of all weights")
    how.add_argument("--amp", default="no", help="mixed precision: no, bf16 or fp16")
    how.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the training"
    )
    how.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no epoch after M minutes, except the first"
    )
    how.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="where networks and runs go")


def run(arguments: argparse.Namespace) -> None:
    """Train every case without a row, then compare and draw all results so far."""
    config = {name: getattr(arguments, name) for name in SETTINGS}
    results, stripes = (
        Table(arguments.out / f"{name}.csv", config, setting=arguments.setting) for name in ("results", "stripes")
    )
    samples = arguments.train_samples + arguments.val_samples
    images = functools.cache(partial(load, arguments, samples, arguments.test_samples))  # loaded when first needed
    cases = list(cases_of(arguments.forms, arguments.module, arguments.seeds))
    for case, directory, deadline in pending(results, cases, arguments.runs / arguments.setting, arguments.minutes):
        if case["form"] == "folded" and results.missing([case | {"form": "attention"}]):
            if "attention" not in arguments.forms:
                raise ValueError(
                    f"'{directory}' folds the network with attention of seed {case['seed']}, which is not trained yet: "
                    "train the form 'attention' first"
                )
            continue  # another process is training it
        with suppress(OutOfTime):
            training, test = images()
            parts = Images(*training.hold_out(arguments.val_samples, case["seed"]), test)
            row, observed = train_case(case, parts, directory, arguments, deadline)
            if observed:
                stripes.put(case, *observed)
            results.put(case, row)
            print(f"{directory}: {row['accuracy_last']:.2f} %, {row['seconds']:.0f} s", flush=True)
    with alone(arguments.out):
        publish(comparison.tables(arguments.out), arguments.out)
        comparison.figures(arguments.out)


def cases_of(forms: Sequence[str], module: str, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield all forms of a seed before the next seed, so that every finished seed gives pairs."""
    for seed, form in itertools.product(seeds, forms):
        yield {"form": form, "module": "none" if form.startswith("plain") else module, "seed": seed}


def train_case(
    case: Row, images: Images, directory: Path, arguments: argparse.Namespace, deadline: float
) -> tuple[Row, list[Row]]:
    """Train one case; return its row, and a row per epoch and gate where attention depends on the image."""
    if case["form"] == "folded":
        return fold_case(case, images, directory, arguments), []
    model, description = build(case, images, arguments)
    if case["form"] in STARTS:
        begin_at(model, STARTS[case["form"]])
    if case["form"] == "anneal":
        steps = arguments.epochs * len(Loader(images.training, arguments.batch, train=True))
        begin, end = (round(part * steps) for part in BLENDING)
        model = stripe.asr.anneal(model, next(iter(Loader(images.test, 2)))[0], begin=begin, end=end)
        description["annealed"] = [begin, end]
    gated = case["form"] in ("attention", "both", "anneal")
    probe = images.test.take(min(arguments.record, len(images.test)))
    row = train(
        model,
        images,
        recipe_of(arguments, case["seed"]),
        directory=directory,
        description=description,
        batch=arguments.batch,
        callbacks=[_recording(model, probe, directory, description)] if gated else [],
        deadline=deadline,
    )
    if not gated:
        return row, []
    table = summarize(stripe.open_run(directory))[STRIPES]
    return row, [{str(name): value for name, value in found.items()} for found in table.to_dict("records")]


def build(case: Row, images: Images, arguments: argparse.Namespace) -> tuple[nn.Module, Row]:
    """Return a case's network with its initial weights, and the training's description."""
    network = {"depth": arguments.depth, "block": arguments.block, "num_classes": len(images.test.classes)}
    network |= FORMS[case["form"]] | {"module": None if case["module"] == "none" else case["module"]}
    torch.manual_seed(case["seed"])
    description = {"model": {"arch": "resnet", **network}, "data": images.training.describe(), "seed": case["seed"]}
    return create_model("resnet", **network), description


def recipe_of(arguments: argparse.Namespace, seed: int) -> Recipe:
    """Return the recipe that the arguments describe."""
    options = {name: getattr(arguments, name) for name in RECIPE} | {"milestones": tuple(arguments.milestones)}
    return Recipe(seed=seed, **options)


def fold_case(case: Row, images: Images, directory: Path, arguments: argparse.Namespace) -> Row:
    """Fold every gate of the seed's network with attention into constants learned without labels; test the result."""
    trained = directory.with_name(directory.name.replace("-folded-", "-attention-")) / "checkpoints"
    row: Row = {}
    began = time.perf_counter()
    for name in ("last", "best") if images.validation else ("last",):
        model = stripe.models.load_checkpoint(trained / f"{name}.pt").to(processes().device)
        batches = Loader(images.training, arguments.batch, device=processes().device)
        probe = next(iter(batches))[0][:2]
        gates = stripe.find_gates(model, probe)
        uses = measure_gates(model, gates, itertools.islice(batches, CALIBRATION))
        constants = learn_constants(model, gates, uses, probe, batches)
        folded, _ = stripe.fold(model, constants, probe)
        row[f"accuracy_{name}"] = evaluate(folded, Loader(images.test, arguments.batch)).accuracy
    return row | {"seconds": time.perf_counter() - began}


@torch.no_grad()
def begin_at(model: nn.Module, scale: float) -> None:
    """Set the last norm of every residual branch so that it, times v where ASR wraps it, scales channels by `scale`."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        norm = block.get_submodule(block.last_norm)
        weight = dict(norm.named_parameters())["bn.weight" if isinstance(norm, stripe.asr.ASRLayer) else "weight"]
        weight.copy_(scale / norm.learned_vector() if isinstance(norm, stripe.asr.ASRLayer) else torch.tensor(scale))


def _recording(model: nn.Module, probe: ImageSet, directory: Path, description: dict[str, Any]) -> RecorderCallback:
    loader = Loader(probe, 100, device=processes().device)
    model.to(processes().device)
    gates = stripe.find_gates(model, next(iter(loader))[0][:2])
    about = {"description": description["model"], "data": probe.describe(), "seeds": {"seed": description["seed"]}}
    return RecorderCallback(loader, gates, directory, overwrite=True, **about)
