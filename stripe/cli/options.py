"""Arguments that several commands take, each described once."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from stripe import files
from stripe.messages import Progress
from stripe.recipe import BATCH, WORKERS

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_data(parser: Parser, split: str | None = None) -> None:
    """Add --dataset and --data-dir, and --split when `split` gives its default."""
    parser.add_argument(
        "--dataset",
        default="digits",
        metavar="URI",
        help="digits, cifar10, cifar100, stl10, imagefolder:DIR, hf:NAME_OR_DIR",
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where torchvision's sets lie"
    )
    if split is not None:
        parser.add_argument("--split", default=split, help="which split of the data set")


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
        help="ATen functions, such as relu or softplus, to be taken as bounded where gates are looked for",
    )


def add_json(parser: Parser) -> None:
    """Add --json FILE."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the printed figures there too")


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
    """Return the size, mean and std that a network was trained with, as arguments of load_images."""
    data = description.get("data", {})
    return {key: data[key] for key in ("size", "mean", "std") if key in data}


def progress(description: str) -> Progress:
    """Return a wrapper that shows a progress bar on stderr."""
    from tqdm import tqdm

    return partial(tqdm, desc=description, disable=None)


def plain(table: Any) -> list[dict[str, Any]]:
    """Return a DataFrame's rows as plain values for JSON; NaN becomes None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[no-any-return]
