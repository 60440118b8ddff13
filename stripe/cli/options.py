"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe import files
from stripe.gate import Gate
from stripe.messages import Progress
from stripe.recipe import BATCH, WORKERS

if TYPE_CHECKING:
    import torch

    from stripe.data import ImageSet
    from stripe.models import Checkpoint
    from stripe.store import Run

Parser = argparse.ArgumentParser | argparse._ArgumentGroup

LINE = 110  # characters per line of a legend
OF_STUDY: Mapping[str, object] = {
    "counts": None, "recover_each": False, "distill_steps": 0, "order": "single", "outputs": None,
}  # fmt: skip
"""Arguments that only `stripe.folding.study` takes, with their defaults."""

NETWORKS = (
    "timm:NAME[:pretrained], torchvision:NAME[:pretrained], hf:NAME_OR_DIR, package.module:FACTORY (its code runs)"
)
DATASETS = "digits, cifar10, cifar100, stl10, imagefolder:DIR, hf:NAME_OR_DIR"


# ---- data ------------------------------------------------------------------------------------------------
def add_data(parser: Parser, split: str | None = None, default: str = "the one that the checkpoint names") -> None:
    """Add --dataset and --data-dir, and --split when `split` gives its default."""
    parser.add_argument("--dataset", metavar="URI", help=f"{DATASETS} (default: {default})")
    parser.add_argument(
        "--data-dir", type=path, default=Path("data"), metavar="DIR", help="folder of torchvision's data sets"
    )
    if split is not None:
        parser.add_argument("--split", default=split, help="split of the data set")


def add_loading(parser: Parser) -> None:
    """Add --batch and --workers."""
    parser.add_argument("--batch", type=positive, default=BATCH, metavar="N", help="images per batch")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help="processes that decode images from disk"
    )


def add_normalisers(parser: Parser) -> None:
    """Add --normaliser."""
    parser.add_argument(
        "--normaliser",
        nargs="+",
        default=[],
        metavar="NAME",
        help="ATen functions, such as relu or softplus, to treat as bounded when gates are searched",
    )


def dataset(arguments: argparse.Namespace, network: object, description: Mapping[str, Any]) -> str:
    """Return the data set to use: the one that --dataset names, else the one that a checkpoint's description names.

    Raises:
        ValueError: neither names one, or the checkpoint's is not on this machine. There is no other default, since a
            network fed with the wrong images gives numbers that look right, and a checkpoint must not start a download.
    """
    if arguments.dataset is not None:
        return str(arguments.dataset)
    named = named_dataset(description)
    if named is None:
        raise ValueError(f"'{network}' does not say which data set it belongs to: name one with --dataset ({DATASETS})")
    scheme, _, folder = named.partition(":")
    if folder and not path(folder).is_dir():
        raise ValueError(
            f"'{network}' belongs to the data set '{named:.200}', but there is no folder '{folder:.200}' here: "
            f"say where it is with --dataset {scheme:.20}:..."
        )
    return named


def named_dataset(description: Mapping[str, Any]) -> str | None:
    """Return the data set that a checkpoint's description names, if it names one."""
    uri = description.get("data", {}).get("uri")
    return uri if isinstance(uri, str) and uri else None


def told(network: object, *sets: ImageSet) -> str:
    """Return the line in which a command says which network and which images it uses."""
    images = "; ".join(f"{images.uri}, split {images.split}, {len(images)} images" for images in sets)
    return f"network {network}; data {images}"


def told_run(run: Run) -> str:
    """Return the line in which a command says which run it reads, and which network and data the run recorded."""
    data = run.data.get("uri", "of unknown source")
    split = f", split {run.data['split']}" if "split" in run.data else ""
    return f"run {run.path}; network {network_name(run.model)}; data {data}{split}"


def network_name(description: Mapping[str, Any]) -> str:
    """Return a network's description, such as the arguments of `create_model`, as one line."""
    chosen = {key: value for key, value in description.items() if value is not None and value is not False}
    return ", ".join(str(value) if key == "arch" else f"{key} {value}" for key, value in chosen.items()) or "unknown"


# ---- networks --------------------------------------------------------------------------------------------
def read_network(spec: object, arch: str | None = None) -> Checkpoint:
    """Read a network as `stripe.models.read_checkpoint` does; where a factory builds it, say that its code runs."""
    from stripe.models import is_factory, read_checkpoint

    for named in (str(spec), arch or ""):
        if is_factory(named) and not Path(named).exists():
            print(f"running the code of {named}, which builds the network", flush=True)
    return read_checkpoint(str(spec), arch)


# ---- devices, gates and output ---------------------------------------------------------------------------
def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)"
    )


def device(arguments: argparse.Namespace) -> torch.device:
    """Return the device that --device names, else the one that belongs to this process.

    Raises:
        ValueError: unknown device, or one that this machine does not have.
    """
    import torch

    from stripe.training import processes

    own: torch.device = processes(cpu=arguments.device == "cpu").device
    if arguments.device is None:
        return own
    try:
        asked = torch.device(arguments.device)
    except RuntimeError as error:
        raise ValueError(f"--device {arguments.device}: expected cpu, cuda, cuda:1 or mps") from error
    known = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked.type != "cpu" and (known is None or asked.type != known.type):
        raise ValueError(f"--device {arguments.device}: this machine has {known.type if known else 'the cpu alone'}")
    if asked.index is not None and asked.type != "cpu":
        if asked.index >= torch.accelerator.device_count():
            raise ValueError(f"--device {asked}: this machine has {torch.accelerator.device_count()} of them")
        torch.accelerator.set_device_index(asked.index)
    return asked


def add_gates(parser: Parser, default: str) -> None:
    """Add --gates."""
    parser.add_argument(
        "--gates",
        nargs="+",
        metavar="PATTERN",
        help=f"names of gates; * matches any text (default: {default})",
    )


def chosen_gates(gates: Sequence[Gate], patterns: Iterable[str], where: object) -> list[Gate]:
    """Return the gates that match any pattern, in their own order; ValueError for a pattern that matches no gate."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(gate.name, pattern) for gate in gates):
            names = ", ".join(gate.name for gate in gates)
            raise ValueError(f"no gate of {where} is named '{pattern}'; expected a pattern of {names}")
    return [gate for gate in gates if any(fnmatchcase(gate.name, pattern) for pattern in patterns)]


def add_json(parser: Parser) -> None:
    """Add --json FILE."""
    parser.add_argument(
        "--json",
        type=path,
        metavar="FILE",
        help="also write the printed numbers to FILE; -: print them as JSON, and all other output to stderr",
    )


def path(text: str) -> Path:
    """Read a path; ~ is the user's home, also where the shell leaves it, as in --out=~/x."""
    return Path(text).expanduser()


def legend(meanings: Mapping[str, str]) -> str:
    """Return the meaning of each column of a table on a line of its own, wrapped between words."""
    width = max(map(len, meanings))
    return "\n".join(
        textwrap.fill(f"{name:{width}}  {meaning}", LINE, subsequent_indent=" " * (width + 2))
        for name, meaning in meanings.items()
    )


def refuse(arguments: argparse.Namespace, usual: Mapping[str, object], why: str) -> None:
    """Raise ValueError for options that differ from their usual values, which are given by attribute name."""
    given = [name for name, value in usual.items() if getattr(arguments, name) != value]
    if given:
        named = ", ".join(f"--{name.removesuffix('_path').replace('_', '-')}" for name in given)
        raise ValueError(f"{named}: {why}")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write `content` to `path`, if there is one; NaN becomes null."""
    if path is not None:
        files.write_json(path, content)


def preprocessing(description: dict[str, Any]) -> dict[str, Any]:
    """Return for `load_images` the size, channels, mean and std of a network's images, as far as they are known."""
    data = description.get("data", {})
    return {key: data[key] for key in ("size", "channels", "mean", "std") if key in data}


def progress(description: str) -> Progress:
    """Return a wrapper that shows a progress bar on stderr."""
    from tqdm import tqdm

    return partial(tqdm, desc=description, disable=None)


def plain(table: Any) -> list[dict[str, Any]]:
    """Return a DataFrame's rows as plain values for JSON; NaN becomes None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[no-any-return]
