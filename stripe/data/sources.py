"""What a data URI names: scikit-learn's digits, torchvision's sets, a folder of images or a Hugging Face data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stripe.data.decoding import IMAGE_FORMATS, Reader
from stripe.data.normalisation import CIFAR_MEAN, CIFAR_STD, MeanStd
from stripe.store import Table, find_tables

UNKNOWN = -1  # the label of an image whose class is not known
FOLDER_SPLITS = ("train", "test", "val", "validation")


@dataclass(frozen=True, eq=False)
class Split:
    """One split as its source stores it: uint8 (N, 3, H, W) or a reader; labels int64 (N,); the files, if any."""

    stored: Tensor | Reader
    labels: Tensor
    classes: tuple[str, ...]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """A data set before any image is read; `size` is None where only the images tell it."""

    splits: tuple[str, ...]
    open: Callable[[str], Split]
    size: int | None = None
    flip: bool = True
    mean_std: MeanStd | None = None


def open_source(uri: str, data_dir: str) -> Source:
    """Open the data set that a URI names."""
    scheme, _, target = uri.partition(":")
    for form, opener in _OPENERS.items():
        name, _, expected = form.partition(":")
        if scheme == name and bool(target) == bool(expected):
            return opener(uri, data_dir)
    raise ValueError(f"unknown data URI '{uri}': expected one of {', '.join(_OPENERS)}")


def _open_digits(uri: str, data_dir: str) -> Source:
    """Open scikit-learn's 1,797 digits: 1,437 to train on and 360 to test on, by a fixed stratified draw."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    rows = {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}

    def open_split(split: str) -> Split:
        channels = images[rows[split]].unsqueeze(1).repeat(1, 3, 1, 1)
        return Split(channels, torch.from_numpy(digits.target)[rows[split]], tuple("0123456789"))

    return Source(tuple(rows), open_split, size=32, flip=False)


def _open_torchvision(uri: str, data_dir: str) -> Source:
    """Open one of torchvision's sets, which must be in `data_dir` already."""
    from torchvision import datasets

    name, size, mean_std = _TORCHVISION[uri]

    def open_split(split: str) -> Split:
        which = {"split": split} if name == "STL10" else {"train": split == "train"}
        try:
            dataset = getattr(datasets, name)(data_dir, **which)
        except RuntimeError as error:
            download = f"import torchvision; torchvision.datasets.{name}({data_dir!r}, download=True)"
            raise FileNotFoundError(
                f"'{uri}' is not in '{data_dir}': give its folder, or fetch it with python -c \"{download}\""
            ) from error
        images = torch.from_numpy(dataset.data)
        if name != "STL10":
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(dataset.labels if name == "STL10" else dataset.targets).long()
        return Split(images, labels, tuple(dataset.classes))

    return Source(("train", "test"), open_split, size=size, mean_std=mean_std)


def _open_folder(uri: str, data_dir: str) -> Source:
    """Open DIR/SPLIT/CLASS/image, or DIR/CLASS/image, which serves as every split; without CLASS, unlabelled images."""
    root = Path(uri.partition(":")[2]).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"'{uri}': there is no folder '{root}'; expected DIR/SPLIT/CLASS/image")
    folders = _split_folders(root) or dict.fromkeys(FOLDER_SPLITS, root)
    classes = sorted({entry.name for folder in folders.values() for entry in _subfolders(folder)})
    extensions = {ending for ending, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}

    def open_split(split: str) -> Split:
        groups = {label: (folders[split] / name).rglob("*") for label, name in enumerate(classes)}
        groups = groups or {UNKNOWN: folders[split].iterdir()}
        found = [
            (str(path), label)
            for label, paths in groups.items()
            for path in sorted(paths)
            if path.suffix.lower() in extensions
        ]

        def read(rows: Tensor) -> list[tuple[str, str | BytesIO]]:
            return [(found[row][0], found[row][0]) for row in rows.tolist()]

        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        files = [os.path.relpath(path, root) for path, _ in found]
        return Split(read, labels, tuple(classes), files)

    return Source(tuple(folders), open_split)


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folders named as splits: all of them if there are no other folders, else those that hold folders.

    Among other folders, one named train that holds images directly is a class, of trains.
    """
    named = {split: root / split for split in FOLDER_SPLITS if (root / split).is_dir()}
    if len(named) == len(_subfolders(root)):
        return named
    return {split: folder for split, folder in named.items() if _subfolders(folder)}


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _open_hub(uri: str, data_dir: str) -> Source:
    """Open a Hugging Face data set, whose feature types tell the columns; Parquet files do not need their package."""
    target = uri.partition(":")[2]
    folder = Path(target).expanduser()
    if target.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"'{uri}': there is no folder '{target}'")
    with _loading(uri):
        tables = find_tables(folder) if folder.is_dir() else {}
    return _from_tables(uri, tables) if tables else _from_datasets(uri, str(folder))


@contextmanager
def _loading(uri: str) -> Iterator[None]:
    """Turn any error into one line that names what could not be loaded: malformed files fail in many ways."""
    try:
        yield
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise FileNotFoundError(f"cannot load '{uri}': {reason}") from error


def _from_tables(uri: str, tables: Mapping[str, Table]) -> Source:
    kinds = {name: feature.get("_type") for name, feature in next(iter(tables.values())).features.items()}
    image, label = (_column(kinds, kind, uri) for kind in ("Image", "ClassLabel"))

    def open_split(split: str) -> Split:
        table = tables[split]

        def read(rows: Tensor) -> list[tuple[str, str | BytesIO]]:
            files = table.files(image, rows.tolist())
            return [_encoded(uri, split, *each) for each in zip(rows.tolist(), files, strict=True)]

        names = table.features[label]["names"]
        return Split(read, torch.from_numpy(table.integers(label)), tuple(names))

    return Source(tuple(tables), open_split)


def _from_datasets(uri: str, target: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"'{uri}' needs the package datasets: pip install 'stripe-observation[hub]'"
        ) from error

    with _loading(uri):
        splits = datasets.load_dataset(target, trust_remote_code=False)  # versions before 2.20 run a folder's script
    features = next(iter(splits.values())).features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    image, label = (_column(kinds, kind, uri) for kind in ("Image", "ClassLabel"))

    def open_split(split: str) -> Split:
        table = splits[split]
        encoded = table.select_columns(image).cast_column(image, datasets.Image(decode=False))

        def read(rows: Tensor) -> list[tuple[str, str | BytesIO]]:
            stored = [(each["bytes"], each["path"]) for each in encoded[rows.tolist()][image]]
            return [_encoded(uri, split, *each) for each in zip(rows.tolist(), stored, strict=True)]

        labels = table.select_columns(label).with_format("numpy")[:][label]
        return Split(read, torch.from_numpy(labels).long(), tuple(features[label].names))

    return Source(tuple(splits), open_split)


def _encoded(uri: str, split: str, row: int, stored: tuple[bytes | None, str | None]) -> tuple[str, str | BytesIO]:
    """Return a name for the image of a row, and its content or else its path."""
    content, path = stored
    return f"{uri} {split} row {row}", BytesIO(content) if content else path or ""


def _column(kinds: Mapping[str, str | None], wanted: str, uri: str) -> str:
    """Return the first column of the wanted kind."""
    for name, kind in kinds.items():
        if kind == wanted:
            return name
    raise ValueError(f"'{uri}' has no column of type {wanted}, only {', '.join(kinds)}")


_TORCHVISION: dict[str, tuple[str, int, MeanStd | None]] = {
    "cifar10": ("CIFAR10", 32, (CIFAR_MEAN, CIFAR_STD)),
    "cifar100": ("CIFAR100", 32, (CIFAR_MEAN, CIFAR_STD)),
    "stl10": ("STL10", 96, None),
}
_OPENERS: dict[str, Callable[[str, str], Source]] = {
    "digits": _open_digits,
    **dict.fromkeys(_TORCHVISION, _open_torchvision),
    "imagefolder:DIR": _open_folder,
    "hf:NAME_OR_DIR": _open_hub,
}
