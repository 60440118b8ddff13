"""`fold`: replace a trained network's gates by constants, merge these into its weights, and measure what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe.cli import graphs, options
from stripe.files import write_csv
from stripe.folding.legends import LEGENDS
from stripe.recipe import CONSTANTS, DISTILL_LR, LEARNING_STEPS, TRAIN_BATCH, Recipe

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from stripe.data import ImageSet, Loader
    from stripe.folding import Recovery
    from stripe.models import Checkpoint

SUMMARY = "fold the attention out of a trained network: replace its gates by constants merged into plain layers"
EXAMPLE = (
    "--ckpt runs/se/checkpoints/last.pt --dataset hf:../shared/data/cifar10 --max-drop 0.5 --onnx --out runs/folded"
)

TRACED = 3  # images on which the network is traced and exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--ckpt", required=True, metavar="PATH", help=f"checkpoint or ONNX file, or {options.NETWORKS}"
    )
    network.add_argument("--arch", help="network of a file that does not name it: timm:NAME, torchvision:NAME")
    network.add_argument(
        "--run", dest="run_path", metavar="RUN", help="take the mean constants from this run's stripes"
    )
    options.add_normalisers(network)
    data = parser.add_argument_group("data")
    options.add_data(data)
    options.add_loading(data)
    data.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where to measure and recover: cpu, cuda, cuda:1, mps"
    )
    data.add_argument("--train-samples", type=options.positive, metavar="N", help="training images (default: all)")
    data.add_argument(
        "--val-samples",
        type=options.positive,
        metavar="N",
        help="training images held out to choose by (default: 1/10)",
    )
    data.add_argument("--test-samples", type=options.positive, metavar="N", help="images to test on (default: all)")
    data.add_argument("--samples", type=options.positive, default=2000, metavar="N", help="images to measure gates on")
    data.add_argument(
        "--manualSeed",
        type=int,
        metavar="SEED",
        help="seed by which images are held out (default: the checkpoint's, else 0)",
    )
    graphs.add_arguments(parser)
    _add_choice(parser)
    _add_recovery(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=options.path, required=True, metavar="DIR", help="where tables, figure and networks go"
    )
    files.add_argument("--onnx", action="store_true", help="also write ONNX files, checked under onnxruntime")
    files.add_argument(
        "--opset", type=options.positive, metavar="N", help="opset of the ONNX files (default: the exporter's)"
    )
    files.add_argument("--onnx-batch", default="free", metavar="N", help="batch size of the ONNX files: free, or N")
    files.add_argument("--backends", nargs="*", default=["eager"], help="what to time: eager, compile, onnxruntime")
    options.add_json(files)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_argument_group("what to fold")
    choice.add_argument("--keep", type=int, metavar="K", help="leave the K most sensitive gates as they are")
    choice.add_argument(
        "--max-drop",
        type=float,
        metavar="D",
        help="fold as many gates as possible at a cost of at most D points on the held-out images",
    )
    choice.add_argument(
        "--order",
        choices=("single", "greedy", "foretold"),
        default="single",
        help="order of folding. single: by the damage of each gate alone; greedy: by its damage beside the gates "
        "before it; foretold: by the damage that one backward pass predicts",
    )
    choice.add_argument(
        "--rank",
        type=int,
        nargs="+",
        metavar="K",
        help="instead of folding a gate, leave it K scores per image; try each K given (0: fold all)",
    )
    choice.add_argument(
        "--shared",
        nargs="?",
        const="",
        metavar="GATE",
        help="with --rank: also try GATE as the source of all gates' scores (default: the gate that explains most)",
    )
    choice.add_argument("--counts", type=int, nargs="+", metavar="K", help="numbers of folded gates to try")
    choice.add_argument(
        "--weightings",
        nargs="+",
        default=CONSTANTS,
        metavar="KIND",
        help=f"kinds of constants to compare, out of {', '.join(CONSTANTS)}",
    )
    choice.add_argument(
        "--learning-steps",
        type=options.positive,
        default=LEARNING_STEPS,
        metavar="N",
        help="batches on which learned constants are trained",
    )
    choice.add_argument(
        "--outputs",
        help="what the network puts out: classes or values (default: classes if it gives one score per class)",
    )


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    recovery = parser.add_argument_group("recovery")
    recovery.add_argument(
        "--recover-each",
        action="store_true",
        help="recover and time networks of every number of folded gates, not just of the chosen one",
    )
    recovery.add_argument(
        "--distill-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps of distillation from the original network after folding; 0: none",
    )
    recovery.add_argument(
        "--distill-lr", type=float, default=DISTILL_LR, help="highest learning rate of the distillation"
    )
    recovery.add_argument(
        "--train-batch", type=options.positive, default=TRAIN_BATCH, metavar="N", help="images per batch of recovery"
    )
    recovery.add_argument(
        "--weight-decay", type=float, default=Recipe.weight_decay, help="weight decay of the distillation"
    )
    recovery.add_argument("--amp", choices=("no", "bf16"), default=Recipe.amp, help="precision of the distillation")


def run(arguments: argparse.Namespace) -> int:
    """Study what folding costs; print and write the tables, and write the chosen network."""
    if graphs.is_graph(arguments.ckpt):
        return graphs.fold(arguments)
    from stripe import figures, folding, plots

    _check(arguments)
    checkpoint = options.read_network(arguments.ckpt, arguments.arch)
    checkpoint.model.to(options.device(arguments))
    data = _load(arguments, checkpoint)
    print(options.told(arguments.ckpt, data.training, data.validation, data.test), flush=True)
    measured = data.training.take(min(arguments.samples, len(data.training)))
    if arguments.rank:
        return _compact(arguments, checkpoint, data, measured)
    study = folding.study(
        checkpoint.model,
        data.traced,
        data.loader(measured),
        data.loader(data.validation),
        arguments.max_drop,
        keep=arguments.keep,
        counts=arguments.counts,
        order=arguments.order,
        weightings=arguments.weightings,
        means=_means(arguments.run_path),
        recoveries=_recoveries(arguments, checkpoint.model, data),
        recover_each=arguments.recover_each,
        test=data.loader(data.test),
        learning_steps=arguments.learning_steps,
        measure=data.measure,
        outputs=arguments.outputs,
        normalisers=arguments.normaliser,
        progress=options.progress("gates"),
        callback=_print_variant,
    )
    chosen = study.chosen
    print(f"chosen: {study.summary()}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables = {"variants": study.variants, "gates": study.gates, "predictors": study.predictors}
    tables = {name: table for name, table in tables.items() if len(table)}
    if arguments.backends:
        counts = None if arguments.recover_each else [0, chosen.folded]
        tables["latency"] = study.latencies(counts=counts, backends=arguments.backends)
    original, folded, traced = checkpoint.model.cpu(), chosen.network.cpu(), data.traced.cpu()
    if arguments.onnx:
        tables["onnx"] = _save_onnx(arguments, {"original": original, "folded": folded}, traced)
    _report(arguments, study.measure, tables)
    tradeoff = plots.fold_pareto(study.variants, tables.get("latency"), measure=study.measure)
    for file in [
        *_save(arguments, checkpoint, folded, traced),
        *figures.save(tradeoff, arguments.out / "tradeoff"),
    ]:
        print(file)
    return 0


def _compact(arguments: argparse.Namespace, checkpoint: Checkpoint, data: Data, measured: ImageSet) -> int:
    """Compare networks with a few scores per image; print and write the tables, and write the chosen network."""
    from stripe import figures, folding, plots
    from stripe.folding.studying import MAX_DROP

    calibration, model = data.loader(measured), checkpoint.model
    sources: list[str | None] = [None]
    if arguments.shared is not None:
        sources += [arguments.shared or folding.choose_source(model, data.traced, calibration, k=max(arguments.rank))]
    found = folding.tradeoff(
        model,
        data.traced,
        calibration,
        data.loader(data.test),
        ranks=arguments.rank,
        sources=sources,
        held_out=data.loader(data.validation),
        steps=arguments.learning_steps,
        progress=options.progress("ranks"),
        callback=partial(print, flush=True),
    )
    chosen = found.chosen(MAX_DROP if arguments.max_drop is None else arguments.max_drop)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables, traced = {"ranks": found.table}, data.traced.cpu()
    networks = {name: network.cpu() for name, network in found.networks.items()}
    if arguments.backends:
        tables["latency"] = folding.latencies(networks, traced, backends=arguments.backends, batches=[1])
    if arguments.onnx:
        tables["onnx"] = _save_onnx(arguments, networks, traced)
    _report(arguments, found.measure, tables)
    print(f"chosen: {chosen}")
    drawn = figures.save(plots.rank_tradeoff(found.table, measure=found.measure), arguments.out / "ranks")
    print(*_save(arguments, checkpoint, networks[chosen], traced), *drawn, sep="\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError, before anything is loaded, for choices that would otherwise fail after a long measurement."""
    from stripe.folding.latency import BACKENDS

    if unknown := set(arguments.backends) - set(BACKENDS):
        raise ValueError(f"--backends {', '.join(sorted(unknown))}: expected some of {', '.join(BACKENDS)}")
    _check_ranks(arguments)
    if arguments.keep is not None and arguments.max_drop is not None:
        raise ValueError("--keep and --max-drop both choose how many gates to fold: give one of them")
    if arguments.onnx_batch != "free" and not (arguments.onnx_batch.isdecimal() and int(arguments.onnx_batch)):
        raise ValueError(f"--onnx-batch {arguments.onnx_batch}: expected free, or a number of images of at least 1")
    if arguments.distill_steps < 0:
        raise ValueError(f"--distill-steps {arguments.distill_steps}: expected a number of steps, or 0 for none")


def _check_ranks(arguments: argparse.Namespace) -> None:
    """Raise ValueError for choices that have a meaning only with --rank, or only without it."""
    if arguments.shared is not None and not any(arguments.rank or ()):
        raise ValueError("--shared says where scores come from: give --rank with a number above 0 too")
    if arguments.rank and min(arguments.rank) < 0:
        raise ValueError(f"--rank {min(arguments.rank)}: expected numbers of scores, or 0 to fold all gates")
    if arguments.rank:
        usual = {"keep": None, **options.OF_STUDY, "run_path": None, "normaliser": [], "weightings": CONSTANTS}
        options.refuse(arguments, usual, "not with --rank, which makes every gate compact; leave it out")


# ---- what the study is given -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Data:
    """The images to measure, recover, choose and test on.

    `measure` is "agreement" where the network's classes are not those of the images.
    """

    arguments: argparse.Namespace
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    traced: Tensor
    measure: str | None

    def loader(self, images: ImageSet, train: bool = False) -> Loader:
        """Return batches of the images; for recovery (`train`), shuffled and augmented."""
        from stripe.data import Loader

        size = self.arguments.train_batch if train else self.arguments.batch
        return Loader(images, size, train=train, workers=self.arguments.workers, device=self.traced.device)


def _load(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Data:
    """Load the data; where the checkpoint records its seed, the images held out are those held out in training."""
    from stripe.data import Loader, load_images

    where = {"data_dir": arguments.data_dir, **options.preprocessing(checkpoint.description)}
    uri = options.dataset(arguments, arguments.ckpt, checkpoint.description)
    images = load_images(uri, "train", samples=arguments.train_samples, **where)
    seed = checkpoint.description.get("seed", 0) if arguments.manualSeed is None else arguments.manualSeed
    training, validation = images.hold_out(arguments.val_samples or max(2, len(images) // 10), seed)
    test = load_images(uri, "test", samples=arguments.test_samples, **where)
    traced = next(iter(Loader(training, min(TRACED, len(training)))))[0].to(options.device(arguments))
    return Data(arguments, training, validation, test, traced, _measure(arguments, checkpoint.model, traced, images))


def _measure(arguments: argparse.Namespace, model: nn.Module, traced: Tensor, images: ImageSet) -> str | None:
    """Return "agreement" where the network's class scores are not for the classes of the images, else None."""
    import torch

    from stripe.folding.divergence import CLASSES, KINDS, kind_of
    from stripe.folding.tensors import outputs_of

    if arguments.outputs not in (None, *KINDS):
        raise ValueError(f"--outputs {arguments.outputs}: expected one of {', '.join(KINDS)}")
    if (arguments.outputs or kind_of(model, traced)) != CLASSES:
        return None
    with torch.inference_mode():
        scores = outputs_of(model, traced)[0]
    return None if scores.shape[-1] == len(images.classes) else "agreement"


def _means(path: str | None) -> Mapping[str, Any] | None:
    """Return the stripes of the run at `path` as mean constants; None without a path."""
    from stripe.folding import mean_constants
    from stripe.store import open_run

    return None if path is None else mean_constants(open_run(path))


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


# ---- what is printed and written -------------------------------------------------------------------------
def _print_variant(row: Mapping[str, Any]) -> None:
    print(
        f"{row['folded']:3} folded  {row['weighting']:7}  {row['recovery']:12}"
        f"  validation: divergence {row['divergence']:.3g}, {row['validation']:.2f} %;"
        f"  test: {row['test_divergence']:.3g}, {row['test']:.2f} %",
        flush=True,
    )


def _save(arguments: argparse.Namespace, checkpoint: Checkpoint, folded: nn.Module, traced: Tensor) -> list[Path]:
    """Write the chosen network as weights, as a program and, if it is this project's plain ResNet, as a checkpoint."""
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


def _save_onnx(arguments: argparse.Namespace, networks: Mapping[str, nn.Module], traced: Tensor) -> pd.DataFrame:
    """Write networks as ONNX; return a row for each: file, nodes, errors under onnxruntime, operators."""
    import pandas as pd

    from stripe.folding import save_onnx

    out, batch = arguments.out, None if arguments.onnx_batch == "free" else int(arguments.onnx_batch)
    files = [
        save_onnx(network, traced, out / f"{name}.onnx", opset=arguments.opset, batch=batch)
        for name, network in networks.items()
    ]
    rows = [
        {"file": file.path.name, "nodes": file.nodes, "max_abs_error": file.max_abs_error}
        | {"relative_error": file.relative_error}
        | {"operators": ", ".join(f"{count} {kind}" for kind, count in file.operators.items())}
        for file in files
    ]
    return pd.DataFrame(rows)


def _report(arguments: argparse.Namespace, measure: str, tables: dict[str, pd.DataFrame]) -> None:
    """Print and write the tables."""
    out = arguments.out
    legend = {
        name: {column: text for column, text in LEGENDS.get(name, {}).items() if column in table}
        for name, table in tables.items()
    }
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")
        print(options.legend(legend[name]))
        write_csv(out / f"{name}.csv", table)
    content = {"measure": measure, **{name: options.plain(table) for name, table in tables.items()}, "legend": legend}
    for path in (out / "fold.json", arguments.json):
        options.write_json(path, content)
