"""`fold`: put constants in place of a trained network's gates, merge them into its weights, and say what it costs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe.cli import options
from stripe.files import write_csv
from stripe.recipe import DISTILL_LR, TRAIN_BATCH, Recipe

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from stripe.data import ImageSet
    from stripe.folding import GateUse, Metric, Recovery, Variant
    from stripe.gates import Gate
    from stripe.models import Checkpoint

SUMMARY = "fold the attention out of a trained network: constants for its gates, merged into plain layers"
EXAMPLE = (
    "--ckpt runs/se/checkpoints/last.pt --dataset hf:../shared/data/cifar10 --max-drop 0.5 --onnx --out runs/folded"
)

TRACED = 3  # images on which the network is traced and exported
MOST_COUNTS = 9  # of folded gates in the table, where none is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    network = parser.add_argument_group("network")
    network.add_argument("--ckpt", required=True, metavar="PATH", help="file, timm:NAME, torchvision:NAME[:pretrained]")
    network.add_argument("--arch", help="network of a file that does not tell: timm:NAME, torchvision:NAME")
    network.add_argument(
        "--run", dest="run_path", metavar="RUN", help="take the mean constants from this run's stripes"
    )
    data = parser.add_argument_group("data")
    options.add_data(data)
    options.add_loading(data)
    data.add_argument("--train-samples", type=options.positive, metavar="N", help="training images (default: all)")
    data.add_argument("--val-samples", type=options.positive, metavar="N", help="of them to choose by (default: 1/10)")
    data.add_argument("--test-samples", type=options.positive, metavar="N", help="images to test on (default: all)")
    data.add_argument("--samples", type=options.positive, default=2000, metavar="N", help="images to measure gates on")
    data.add_argument("--manualSeed", type=int, metavar="SEED", help="of the split (default: the checkpoint's, else 0)")
    choice = parser.add_argument_group("what to fold")
    choice.add_argument("--keep", type=int, metavar="K", help="leave the K most sensitive gates as they are")
    choice.add_argument(
        "--max-drop", type=float, metavar="D", help="fold as many as cost at most D points by --val-samples"
    )
    choice.add_argument(
        "--order", default="single", help="single: by each gate's own damage; greedy: beside those before"
    )
    choice.add_argument("--counts", type=int, nargs="+", metavar="K", help="numbers of folded gates in the table")
    choice.add_argument("--weightings", nargs="+", default=["mean", "energy"], help="of the constants to compare")
    recovery = parser.add_argument_group("recovery")
    recovery.add_argument(
        "--recover-each",
        action="store_true",
        help="recover, and time, every number of folded gates, not just the chosen",
    )
    recovery.add_argument(
        "--distill-steps", type=int, default=0, metavar="N", help="then distil to the original; 0: do not"
    )
    recovery.add_argument(
        "--distill-lr", type=float, default=DISTILL_LR, help="highest learning rate of the distillation"
    )
    recovery.add_argument(
        "--train-batch", type=options.positive, default=TRAIN_BATCH, metavar="N", help="images per step"
    )
    recovery.add_argument("--weight-decay", type=float, default=Recipe.weight_decay, help="of the distillation")
    recovery.add_argument("--amp", default=Recipe.amp, help="precision of the distillation: no or bf16")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, figure and networks go")
    files.add_argument("--onnx", action="store_true", help="write ONNX too, checked against onnxruntime")
    files.add_argument("--backends", nargs="*", default=["eager"], help="to time: eager, compile, onnxruntime")
    options.add_json(files)


def run(arguments: argparse.Namespace) -> int:
    """Measure the gates, order them, fold more and more of them, choose, write."""
    import pandas as pd

    from stripe import folding
    from stripe.cli.figures import draw_pareto, save
    from stripe.folding import AS_FOLDED
    from stripe.gates import find_gates
    from stripe.models import read_checkpoint

    _check(arguments)
    checkpoint = read_checkpoint(arguments.ckpt, arguments.arch)
    model, data = checkpoint.model, _load(arguments, checkpoint)
    gates = find_gates(model, data.traced)
    if not gates:
        raise ValueError(f"{arguments.ckpt} has no gate to fold: see collect_attention.py --explain")
    measured = data.loader(data.training.take(min(arguments.samples, len(data.training))))
    uses = folding.measure_gates(model, gates, measured, progress=options.progress("measuring gates"))
    constants = _constants(arguments, uses)
    validate, test = data.metric(model, data.validation), data.metric(model, data.test)
    damage, order = _order(arguments, model, gates, uses, validate)
    study = Study(model, data.traced, order, constants, validate, test, data.measure)
    recoveries = _recoveries(arguments, model, data)
    study.add(_counts(arguments, len(gates)), {**AS_FOLDED, **recoveries} if arguments.recover_each else AS_FOLDED)
    count = choose_count(study.rows, len(gates), arguments.keep, arguments.max_drop)
    if not arguments.recover_each:
        study.add([count], recoveries)
    chosen = study.best(count)
    print(f"chosen: {chosen.folded} of {len(gates)} gates folded, {chosen.weighting}, {chosen.recovery}")
    tables = {
        "gates": _gates(chosen, uses, damage, order),
        "variants": pd.DataFrame(study.rows),
        "predictors": folding.rank_correlations(uses, damage),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.backends:
        tables["latency"] = study.latencies(arguments.backends, None if arguments.recover_each else [0, count])
    if arguments.onnx:
        pair = {"original": model, "folded": chosen.network}
        tables["onnx"] = _save_onnx(arguments.out, pair, data.traced)
    _report(arguments, data.measure, tables)
    for file in [
        *_save(arguments, checkpoint, chosen.network, data.traced),
        *save(draw_pareto(tables, data.measure), arguments.out / "tradeoff", ["png"]),
    ]:
        print(file)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from stripe.folding.latency import BACKENDS
    from stripe.folding.sensitivity import ORDERS

    if arguments.order not in ORDERS:
        raise ValueError(f"--order {arguments.order}: expected one of {', '.join(ORDERS)}")
    if unknown := set(arguments.backends) - set(BACKENDS):
        raise ValueError(f"--backends {', '.join(sorted(unknown))}: expected some of {', '.join(BACKENDS)}")
    if arguments.keep is not None and arguments.max_drop is not None:
        raise ValueError("--keep and --max-drop both choose how many gates to fold: give one of them")
    if arguments.distill_steps < 0:
        raise ValueError(f"--distill-steps {arguments.distill_steps}: expected a number of steps, or 0 for none")


# ---- images, and how good a network is on them ----
@dataclass(frozen=True)
class Data:
    """The images to measure, recover, choose and test on; `measure` names what `metric` gives."""

    arguments: argparse.Namespace
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    traced: Tensor
    measure: str

    def loader(self, images: ImageSet, train: bool = False) -> Any:
        """Return batches, for recovery shuffled and augmented."""
        from stripe.data import Loader

        size = self.arguments.train_batch if train else self.arguments.batch
        return Loader(images, size, train=train, workers=self.arguments.workers)

    def metric(self, model: nn.Module, images: ImageSet) -> Callable[[nn.Module], float]:
        """Return what gives the accuracy in percent; without fitting labels, the agreement with `model` itself."""
        from stripe.training import evaluate

        if self.measure == "agreement":
            images = dataclasses.replace(images, labels=_predictions(model, self.loader(images)))
        loader = self.loader(images)
        return lambda network: evaluate(network, loader).accuracy


def _load(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Data:
    """Load the data; the images held out are those of the training, where the checkpoint tells its seed."""
    import torch

    from stripe.data import Loader, load_images

    where = {"data_dir": arguments.data_dir, **options.constants(checkpoint.description)}
    images = load_images(arguments.dataset, "train", samples=arguments.train_samples, **where)
    seed = checkpoint.description.get("seed", 0) if arguments.manualSeed is None else arguments.manualSeed
    training, validation = images.hold_out(arguments.val_samples or max(2, len(images) // 10), seed)
    test = load_images(arguments.dataset, "test", samples=arguments.test_samples, **where)
    traced = next(iter(Loader(training, min(TRACED, len(training)))))[0]
    with torch.no_grad():
        outputs = checkpoint.model(traced).shape[1]
    fitting = outputs == len(images.classes) and all(int(part.labels.min()) >= 0 for part in (validation, test))
    return Data(arguments, training, validation, test, traced, "accuracy" if fitting else "agreement")


def _predictions(model: nn.Module, loader: Any) -> Tensor:
    import torch

    with torch.inference_mode():
        return torch.cat([model(images).argmax(1) for images, *_ in loader])


# ---- constants, order, variants ----
def _constants(arguments: argparse.Namespace, uses: dict[str, GateUse]) -> dict[str, dict[str, Any]]:
    """Return the constants of every gate by weighting; the means are the run's, where one is given."""
    from stripe.folding import mean_constants
    from stripe.store import open_run

    constants = {kind: {gate: use.constant(kind) for gate, use in uses.items()} for kind in arguments.weightings}
    if arguments.run_path is not None and "mean" in constants:
        observed = mean_constants(open_run(arguments.run_path))
        if missing := constants["mean"].keys() - observed.keys():
            raise ValueError(f"run '{arguments.run_path}' lacks gates {', '.join(sorted(missing))}: record them all")
        constants["mean"] = {gate: observed[gate] for gate in uses}
    return constants


def _order(
    arguments: argparse.Namespace, model: nn.Module, gates: Sequence[Gate], uses: dict[str, GateUse], metric: Any
) -> tuple[dict[str, float], list[str]]:
    """Return each gate's damage alone, and the order in which they are folded; equal damage goes by energy error."""
    from stripe.folding import greedy_order, sensitivity

    constants = {name: use.constant("energy") for name, use in uses.items()}
    damage = sensitivity(model, gates, constants, metric, progress=options.progress("each gate alone"))
    if arguments.order == "single":
        return damage, sorted(uses, key=lambda name: (damage[name], uses[name].error(constants[name])))
    bar = options.progress("greedy order")
    return damage, greedy_order(model, gates, constants, metric, damage=damage, progress=bar)


def _recoveries(arguments: argparse.Namespace, model: nn.Module, data: Data) -> dict[str, Recovery]:
    from stripe import folding

    loader = data.loader(data.training, train=True)
    recoveries: dict[str, Recovery] = {"re-estimated": partial(folding.reestimate_norms, loader=loader)}
    if arguments.distill_steps:
        recoveries["distilled"] = partial(
            folding.distill,
            teacher=model,
            loader=loader,
            steps=arguments.distill_steps,
            lr=arguments.distill_lr,
            weight_decay=arguments.weight_decay,
            amp=arguments.amp,
            progress=options.progress("distilling"),
        )
    return recoveries


def _counts(arguments: argparse.Namespace, gates: int) -> list[int]:
    """Return the numbers of folded gates to try; 0 is always among them."""
    asked = arguments.counts
    if asked is None:
        asked = options.spread(range(gates + 1), MOST_COUNTS) if arguments.keep is None else [gates - arguments.keep]
    if not all(0 <= count <= gates for count in asked):
        raise ValueError(f"{', '.join(map(str, asked))} gates to fold: expected 0 to {gates}, which the network has")
    return sorted({0, *asked})


def choose_count(rows: Sequence[dict[str, Any]], gates: int, keep: int | None, max_drop: float | None) -> int:
    """Return how many gates to fold: all but `keep`, or the most that cost at most `max_drop` on validation images."""
    if keep is not None:
        return gates - keep
    least = rows[0]["validation"] - (max_drop if max_drop is not None else float("inf"))
    return max(int(row["folded"]) for row in rows if row["validation"] >= least)


@dataclass
class Study:
    """Variants of a network, each with a row of what it is worth; rows are printed as they come."""

    model: nn.Module
    images: Tensor
    order: list[str]
    constants: dict[str, dict[str, Any]]
    validate: Metric
    test: Metric
    measure: str
    found: list[Variant] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, counts: Sequence[int], recoveries: Mapping[str, Recovery]) -> None:
        """Make the variants of these numbers of folded gates, and test them."""
        from stripe.folding import variants

        made = variants(self.model, self.images, self.order, self.constants, counts=counts, recoveries=recoveries)
        for variant in made:
            row = {"folded": variant.folded, "last": self.order[variant.folded - 1] if variant.folded else ""}
            row |= {"weighting": variant.weighting, "recovery": variant.recovery}
            row |= {"validation": self.validate(variant.network), "test": self.test(variant.network)}
            self.rows.append(row | {"error": variant.report.error if variant.report else 0.0})
            self.found.append(variant)
            print(
                f"{variant.folded:3} folded  {variant.weighting:6}  {variant.recovery:12}  {self.measure} in %:"
                f" validation {row['validation']:.2f}, test {row['test']:.2f}",
                flush=True,
            )

    def best(self, count: int) -> Variant:
        """Return the variant of `count` folded gates that is best on the validation images."""
        positions = [position for position, variant in enumerate(self.found) if variant.folded == count]
        return self.found[max(positions, key=lambda position: self.rows[position]["validation"])]

    def latencies(self, backends: Sequence[str], counts: Sequence[int] | None) -> pd.DataFrame:
        """Time a network for each of these numbers of folded gates, or all: their variants differ in values alone."""
        from stripe.folding import latencies

        first = {variant.folded: variant.network for variant in reversed(self.found)}
        networks = {str(count): first[count] for count in sorted(first) if counts is None or count in counts}
        table = latencies(networks, self.images, backends=backends)
        return table.assign(network=table["network"].astype(int)).rename(columns={"network": "folded"})


# ---- what is said and written ----
def _gates(chosen: Variant, uses: dict[str, GateUse], damage: dict[str, float], order: Sequence[str]) -> pd.DataFrame:
    """Return a row per gate: what it cost alone, what could have foretold it, and where its constant went."""
    from stripe.folding import predictors

    table = predictors(uses).assign(damage=[damage[gate] for gate in uses])
    table.insert(0, "place", [order.index(str(gate)) + 1 for gate in table.index])
    if chosen.report is not None:
        merged = chosen.report.table.set_index("gate")
        table = table.join(merged.assign(into=merged["into"].str.join(", "), through=merged["through"].str.join(", ")))
    return table.reset_index()


def _save(arguments: argparse.Namespace, checkpoint: Checkpoint, folded: nn.Module, traced: Tensor) -> list[Path]:
    """Write the chosen network: weights, program and, where it is this project's plain ResNet, a checkpoint."""
    from stripe.checkpoints import write_tensors
    from stripe.folding import save_program, save_weights
    from stripe.models import ResNet

    out = arguments.out
    files = [save_weights(folded, out / "folded.safetensors"), save_program(folded, traced, out / "folded.pt2")]
    if isinstance(folded, ResNet) and folded.config["module"] is None:
        description = checkpoint.description | {"model": {"arch": "resnet", **folded.config}}
        content = {"epoch": checkpoint.epoch, "state_dict": folded.state_dict(), "description": description}
        write_tensors(out / "folded.pt", content)
        files.append(out / "folded.pt")
    return files


def _save_onnx(out: Path, networks: dict[str, nn.Module], traced: Tensor) -> pd.DataFrame:
    """Write networks as ONNX; return a row for each: file, nodes, errors under onnxruntime, operators."""
    import pandas as pd

    from stripe.folding import save_onnx

    files = [save_onnx(network, traced, out / f"{name}.onnx") for name, network in networks.items()]
    rows = [
        {"file": file.path.name, "nodes": file.nodes, "max_abs_error": file.max_abs_error}
        | {"relative_error": file.relative_error}
        | {"operators": ", ".join(f"{count} {kind}" for kind, count in file.operators.items())}
        for file in files
    ]
    return pd.DataFrame(rows)


def _report(arguments: argparse.Namespace, measure: str, tables: dict[str, pd.DataFrame]) -> None:
    """Print and write the tables, and draw the trade-off."""
    out = arguments.out
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")
        write_csv(out / f"{name}.csv", table)
    plain = {name: options.plain(table) for name, table in tables.items()}
    content = {"measure": measure, "rows": plain.pop("gates"), **plain}
    for path in (out / "fold.json", arguments.json):
        options.write_json(path, content)
