"""`validate`: compare learned vectors with the observed stripes of a run."""

import argparse
from typing import TYPE_CHECKING

from stripe.cli import options
from stripe.files import write_csv
from stripe.recipe import PSI_STEPS, Recipe

if TYPE_CHECKING:
    from stripe.asr.validation import Validation

PROTOCOLS = ("same", "both", "separate")
SUMMARY = "compare constant vectors, learned in place of attention or by ASR, with the stripes observed in a run"
EXAMPLE = "--ckpt runs/se/checkpoints/last.pt --run runs/probe --dataset hf:../shared/data/cifar10 --out figures/match"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="PATH",
        help=f"the trained network that the run recorded: a file, or {options.NETWORKS}",
    )
    parser.add_argument("--arch", help="network of a file that does not name it: timm:NAME, torchvision:NAME")
    parser.add_argument(
        "--run", dest="run_path", required=True, metavar="RUN", help="directory of the run that recorded the network"
    )
    options.add_data(parser)
    options.add_loading(parser)
    options.add_device(parser)
    parser.add_argument("--train-samples", type=options.positive, metavar="N", help="learn from N training images")
    parser.add_argument("--test-samples", type=options.positive, metavar="N", help="test on N images")
    parser.add_argument(
        "--steps",
        type=options.positive,
        default=PSI_STEPS,
        metavar="N",
        help="training steps of psi (separate: batches on which channels are matched)",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="where the learned vectors come from. same: train psi at each gate of the frozen network; both: the "
        "network has ASR beside its gates; separate: the network of --asr-ckpt, its channels matched to those here",
    )
    parser.add_argument(
        "--asr-ckpt", metavar="PATH", help="with --protocol separate: the same network trained with ASR alone"
    )
    parser.add_argument(
        "--train-attention", action="store_true", help="with --protocol same: train the attention's weights with psi"
    )
    parser.add_argument(
        "--amp", choices=("no", "bf16"), default=Recipe.amp, help="precision for training psi and for the accuracies"
    )
    parser.add_argument(
        "--epoch", type=int, metavar="E", help="epoch of the run (default: the checkpoint's, else the last)"
    )
    parser.add_argument("--manualSeed", type=int, default=0, metavar="SEED", help="seed of the images' order")
    parser.add_argument(
        "--out", type=options.path, required=True, metavar="DIR", help="where table, JSON and figures go"
    )
    parser.add_argument("--require-match", action="store_true", help="exit with 1 unless every gate matches")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare the vectors; print and write the table, its JSON and its figures."""
    from stripe import figures
    from stripe.asr.validation import validate
    from stripe.data import Loader, load_images
    from stripe.models import load_checkpoint
    from stripe.store import open_run

    run = open_run(arguments.run_path)
    checkpoint = options.read_network(arguments.ckpt, arguments.arch)
    epoch = checkpoint.epoch if arguments.epoch is None and checkpoint.epoch in run.epochs else arguments.epoch
    preprocessing = options.preprocessing(checkpoint.description)
    uri, device = options.dataset(arguments, arguments.ckpt, checkpoint.description), options.device(arguments)
    train, test = (
        load_images(uri, split, samples=samples, data_dir=arguments.data_dir, **preprocessing)
        for split, samples in (("train", arguments.train_samples), ("test", arguments.test_samples))
    )
    print(options.told(arguments.ckpt, train, test))
    print(options.told_run(run))
    validation = validate(
        checkpoint.model.to(device),
        run,
        Loader(train, arguments.batch, train=True, seed=arguments.manualSeed, workers=arguments.workers, device=device),
        steps=arguments.steps,
        protocol=arguments.protocol,
        asr_model=arguments.asr_ckpt and load_checkpoint(arguments.asr_ckpt).to(device),
        train_attention=arguments.train_attention,
        test_loader=Loader(test, arguments.batch, workers=arguments.workers, device=device),
        epoch=epoch,
        amp=arguments.amp,
        progress=options.progress("steps"),
    )
    print_validation(validation)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "validation.csv", validation.table)
    options.write_json(arguments.out / "validation.json", validation.to_dict())
    options.write_json(arguments.json, validation.to_dict())
    print(*figures.draw_validation(validation, arguments.out), sep="\n")
    return 1 if arguments.require_match and not validation.matched else 0


def print_validation(validation: "Validation") -> None:
    """Print the table of gates, what its columns and verdicts mean, and the conclusion."""
    print(validation.summary().to_string(index=False, float_format="{:.2g}".format, na_rep="-"))
    print(*(f"  {line}" for line in validation.legend()), sep="\n")
    print(validation.conclusion())
