import dataclasses
import io
import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from stripe.data import CIFAR_MEAN, Encoded, ImageSet, Loader, decoding, load_images, loading

CIFAR = Path(__file__).parents[1] / "../shared/data/cifar10"
CIFAR100 = CIFAR.parent / "cifar100"
PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
few = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images("digits", "train")


def random_set(samples: int, *, side: int = 8, flip: bool = True) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (samples, 3, side, side), dtype=np.uint8)
    labels = torch.arange(samples) % 3
    ids = torch.arange(samples) * 10
    return ImageSet(
        "random", "train", torch.from_numpy(pixels), labels, ids, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, flip
    )


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def gray(value: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def write_folder(root: Path, layout: dict[str, list[np.ndarray]]) -> str:
    for name, images in layout.items():
        (root / name).mkdir(parents=True, exist_ok=name == ".")
        for number, pixels in enumerate(images):
            (root / name / f"{number}.png").write_bytes(encode(pixels))
    return f"imagefolder:{root}"


def cat(loader: Loader) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*loader, strict=True)]


# ---- digits and subsets ------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all(digits):
    test = load_images("digits", "test")
    assert (len(digits), len(test)) == (1437, 360)
    assert digits.images.shape == (1437, 3, 32, 32)
    assert digits.images.dtype == torch.uint8
    assert not digits.flip
    assert digits.classes == tuple("0123456789")
    counts = torch.bincount(torch.cat([digits.labels, test.labels]))
    assert counts.tolist() == np.bincount(load_digits().target).tolist()
    assert (torch.bincount(test.labels) - 36).abs().max() <= 1  # stratified
    assert torch.equal(digits.images, load_images("digits", "train").images)


def test_digits_show_what_scikit_learn_holds(digits):
    small = load_images("digits", "train", size=8)
    stored = {image.tobytes() for image in np.rint(load_digits().images * 255 / 16).astype(np.uint8)}
    assert {image[0].numpy().tobytes() for image in small.images} <= stored
    assert {(255 - image[0]).numpy().tobytes() for image in small.images}.isdisjoint(stored)
    assert torch.equal(digits.images[:, 0], digits.images[:, 2])


def test_normalisation_comes_from_the_training_split(digits):
    pixels = digits.images.numpy() / 255
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(digits.std, pixels.std((0, 2, 3)), rtol=1e-12)
    test = load_images("digits", "test", samples=10)
    assert (test.mean, test.std) == (digits.mean, digits.std)
    assert not np.allclose(test.images.numpy().mean() / 255, digits.mean[0], rtol=1e-3)


def test_a_given_mean_and_std_win():
    assert load_images("digits", "test", **PLAIN).describe() == {
        "uri": "digits",
        "split": "test",
        "size": 32,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }


def test_description_is_plain(digits):
    assert json.loads(json.dumps(digits.describe())) == digits.describe()


@few
@given(total=st.integers(2, 200), data=st.data())
def test_take_spreads_and_keeps_ids(total, data):
    images = random_set(total, side=1)
    samples = data.draw(st.integers(2, total))
    taken = images.take(samples)
    positions = taken.sample_ids // 10
    assert len(taken) == samples
    assert torch.equal(taken.images, images.images[positions])
    assert torch.equal(taken.labels, images.labels[positions])
    gaps = positions.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@few
@given(total=st.integers(4, 200), seed=st.integers(0, 2**40), data=st.data())
def test_hold_out_is_disjoint_and_complete(total, seed, data):
    images = random_set(total, side=1)
    samples = data.draw(st.integers(2, total - 2))
    train, validation = images.hold_out(samples, seed)
    again = images.hold_out(samples, seed)[1]
    assert len(validation) == samples
    assert sorted(train.sample_ids.tolist() + validation.sample_ids.tolist()) == images.sample_ids.tolist()
    assert torch.equal(validation.sample_ids, again.sample_ids)


def test_hold_out_follows_its_seed(digits):
    first, second = (digits.hold_out(300, seed)[1].sample_ids for seed in (1, 2))
    assert not torch.equal(first, second)


def test_samples_loads_what_take_takes(digits):
    loaded, taken = load_images("digits", "train", samples=50), digits.take(50)
    assert torch.equal(loaded.images, taken.images)
    assert torch.equal(loaded.sample_ids, taken.sample_ids)
    assert loaded.mean == taken.mean


# ---- loader ------------------------------------------------------------------------------------------------


def test_evaluation_yields_everything_once_in_order(digits):
    images, labels, ids = cat(Loader(digits, 100))
    expected = (digits.images.double() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
    assert images.dtype == torch.float32
    assert torch.equal(labels, digits.labels)
    assert torch.equal(ids, digits.sample_ids)


def test_training_follows_seed_and_epoch(digits):
    def epoch(seed: int, number: int) -> list[torch.Tensor]:
        loader = Loader(digits, 128, train=True, seed=seed)
        loader.set_epoch(number)
        return cat(loader)

    images, labels, ids = epoch(1, 5)
    same, other_epoch, other_seed = epoch(1, 5), epoch(1, 6), epoch(2, 5)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, ids), same, strict=True))
    assert sorted(ids.tolist()) == digits.sample_ids.tolist()
    assert torch.equal(labels, digits.labels[ids])
    assert not torch.equal(ids, other_epoch[2])
    assert not torch.equal(ids, other_seed[2])
    by_id, by_id_later = images[ids.argsort()], other_epoch[0][other_epoch[2].argsort()]
    assert not torch.equal(by_id, by_id_later)  # augmented anew


def slowly_augmented(image: np.ndarray, corner: tuple[int, int], mirrored: bool) -> np.ndarray:
    height, width = image.shape[1:]
    padded = np.zeros((3, height + 8, width + 8), dtype=np.uint8)
    padded[:, 4:-4, 4:-4] = image
    crop = padded[:, corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    return crop[:, :, ::-1] if mirrored else crop


@few
@given(side=st.integers(1, 9), count=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_augmentation_equals_a_loop(side, count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, side, side + 2), dtype=np.uint8)
    corners, mirrored = rng.integers(0, 9, (count, 2)), rng.random(count) < 0.5
    result = loading._augment(*map(torch.from_numpy, (pixels, corners, mirrored)))
    expected = [slowly_augmented(*row) for row in zip(pixels, corners, mirrored, strict=True)]
    np.testing.assert_array_equal(result, np.stack(expected))


def test_augmentation_mirrors_only_where_allowed():
    bright_left = np.zeros((400, 3, 16, 16), dtype=np.uint8)
    bright_left[..., :4] = 255  # a crop moves it by 4 at most

    def mirrored(flip: bool) -> float:
        images = dataclasses.replace(random_set(400, flip=flip), images=torch.from_numpy(bright_left))
        brightness = cat(Loader(images, 100, train=True))[0].mean((1, 2))
        return (brightness[:, 8:].mean(1) > brightness[:, :8].mean(1)).float().mean().item()

    assert mirrored(flip=False) == 0
    assert 0.4 < mirrored(flip=True) < 0.6


@few
@given(total=st.integers(2, 120), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_evaluation_gives_each_sample_to_one_process(total, batch, world):
    images = random_set(total, side=1)
    loaders = [Loader(images, batch, rank=rank, world_size=world) for rank in range(world)]
    ids = [ids.tolist() for loader in loaders for _, _, ids in loader]
    assert sum(ids, []) == images.sample_ids.tolist()
    assert sum(loader.samples for loader in loaders) == total
    assert len(ids) == sum(map(len, loaders))


@few
@given(total=st.integers(2, 120), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_evaluation_deals_out_the_batches_of_one_process(total, batch, world):
    images = random_set(total, side=1)
    one = [ids.tolist() for _, _, ids in Loader(images, batch)]
    dealt = [[ids.tolist() for _, _, ids in Loader(images, batch, rank=r, world_size=world)] for r in range(world)]
    if len(one) >= world:
        assert sum(dealt, []) == one
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    else:
        sizes = [sum(map(len, share)) for share in dealt]
        assert max(sizes) - min(sizes) <= 1


@few
@given(total=st.integers(10, 120), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_training_gives_processes_equal_shares(total, batch, world):
    images = random_set(total, side=1)
    loaders = [Loader(images, batch, train=True, rank=rank, world_size=world) for rank in range(world)]
    sizes = {tuple(len(ids) for _, _, ids in loader) for loader in loaders}
    ids = [int(i) for loader in loaders for _, _, ids in loader for i in ids]
    assert len(sizes) == 1
    assert batch == 1 or min(sizes.pop()) >= 2
    assert len(ids) == len(set(ids))
    assert total - len(ids) < 2 * world


def test_processes_together_see_the_batches_of_one():
    images = random_set(48)
    one = Loader(images, 16, train=True, seed=3)
    two = [Loader(images, 8, train=True, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        for column, *pieces in zip(whole, *parts, strict=True):
            assert torch.equal(column, torch.cat(pieces))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 4, "rank": 2, "world_size": 2}, {"batch_size": 4, "rank": -1}]
)
def test_loader_refuses_impossible_shares(options):
    with pytest.raises(ValueError, match="expected a batch of at least 1 and a rank below world_size"):
        Loader(random_set(8), **options)


def test_loader_refuses_to_train_on_nothing():
    with pytest.raises(ValueError, match="3 training samples give 2 processes no batch of two"):
        Loader(random_set(3), 4, train=True, world_size=2)


# ---- image folders -----------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    uri = write_folder(
        tmp_path,
        {
            "train/cat": [gray(10), gray(20)],
            "train/dog": [gray(30)],
            "test/dog": [gray(40), gray(50)],
        },
    )
    train, test = load_images(uri, "train"), load_images(uri, "test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [1, 1]  # no cat among the tests
    assert train.images.float().mean((1, 2, 3)).tolist() == [10, 20, 30]
    assert train.flip
    np.testing.assert_allclose(test.mean, 20 / 255)
    with pytest.raises(ValueError, match="unknown split 'val' of .*: expected one of train, test$"):
        load_images(uri, "val")


def test_folder_without_splits_serves_as_any(tmp_path):
    uri = write_folder(tmp_path, {"a": [gray(10)], "b": [gray(20)]})
    for split in ("train", "test", "val"):
        assert load_images(uri, split).images.float().mean((1, 2, 3)).tolist() == [10, 20]


def test_a_class_may_be_named_like_a_split(tmp_path):
    uri = write_folder(tmp_path, {"bus": [gray(10)], "car": [gray(20), gray(25)], "train": [gray(30)]})
    images = load_images(uri, "train")
    assert (len(images), images.classes) == (4, ("bus", "car", "train"))
    assert images.labels.tolist() == [0, 1, 1, 2]
    assert len(load_images(uri, "test")) == 4


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_without_test_images_is_tested_on_those_of_validation(tmp_path, name):
    uri = write_folder(tmp_path, {"train/a": [gray(10)] * 2, f"{name}/a": [gray(40)] * 3})
    for split in ("test", "val", "validation"):
        images = load_images(uri, split)
        assert (len(images), images.split) == (3, name)
    assert len(load_images(uri, "train")) == 2
    both = write_folder(tmp_path / "both", {"train/a": [gray(1)] * 2, "val/a": [gray(2)] * 3, "test/a": [gray(3)] * 4})
    assert [len(load_images(both, split)) for split in ("train", "val", "test")] == [2, 3, 4]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flat_folder_holds_images_without_labels(tmp_path, split):
    uri = write_folder(tmp_path / "flat", {".": [gray(10), gray(20)]})
    images = load_images(uri, split)
    assert images.labels.tolist() == [-1, -1]
    assert images.classes == ()
    assert images.images.float().mean((1, 2, 3)).tolist() == [10, 20]
    uri = write_folder(tmp_path / "split", {"train": [gray(10)] * 2, "test": [gray(20)] * 3})
    images = load_images(uri, split)
    assert images.labels.unique().tolist() == [-1]
    assert len(images) == (2 if split == "train" else 3)


@pytest.mark.parametrize(
    ("form", "kind"), [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.uint16), ("TIFF", ">u2")]
)
def test_grey_of_sixteen_bits_keeps_its_higher_eight(tmp_path, form, kind):
    ramp = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (40, 1))
    for number in range(2):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / f"{number}.{form.lower()}", form)
    row = load_images(f"imagefolder:{tmp_path}", "test").images[0, :, 7]
    assert row.tolist() == [(ramp[7] >> 8).tolist()] * 3


def test_images_are_not_shrunk_to_a_pixel_that_torch_refuses():
    with pytest.raises(ValueError, match="^images of size 1: .* at least 2"):
        load_images("digits", "test", size=1, samples=4)
    assert load_images("digits", "test", size=2, samples=4).images.shape == (4, 3, 2, 2)


def test_images_of_one_colour_are_normalised_to_zero(tmp_path):
    images = load_images(write_folder(tmp_path, {"a": [gray(51)] * 3}), "test")
    assert images.std == (1, 1, 1)
    pixels, *_ = next(iter(Loader(images, 3)))
    assert pixels.abs().max() < 1e-6


def test_pixels_of_other_depths_are_refused_by_name(tmp_path):
    for number in range(2):
        Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / f"{number}.tiff")
    with pytest.raises(ValueError, match=r"0\.tiff' \(pixels of 32 bits, mode F: expected 8 or 16"):
        load_images(f"imagefolder:{tmp_path}", "test")


def test_folder_without_training_split_normalises_by_its_own(tmp_path):
    uri = write_folder(tmp_path, {"val/a": [gray(10)], "val/b": [gray(30)]})
    np.testing.assert_allclose(load_images(uri, "val").mean, 20 / 255)


@pytest.mark.parametrize(("sides", "expected"), [((12, 12, 40), 12), ((300, 300, 400), 224)])
def test_natural_size_is_the_median_and_bounded(tmp_path, sides, expected):
    uri = write_folder(tmp_path, {"a": [gray(50 * n, side, side + 9) for n, side in enumerate(sides)]})
    assert load_images(uri, "train").images.shape == (3, 3, expected, expected)


def test_resizing_crops_the_centre(tmp_path):
    wide = gray(0, 10, 30)
    wide[:, 10:20] = 200  # the centre square is bright, both sides are black
    uri = write_folder(tmp_path, {"a": [wide, gray(1)]})
    image = load_images(uri, "train", size=5).images[0]
    assert image[:, :, 1:4].float().mean() == 200
    assert load_images(uri, "train", size=20).images.shape[-1] == 20


@pytest.fixture
def folder(tmp_path) -> str:
    rng = np.random.default_rng(0)
    return write_folder(tmp_path, {"a": list(rng.integers(0, 256, (9, 12, 12, 3), dtype=np.uint8))})


def test_large_sets_are_decoded_batch_by_batch(folder, monkeypatch):
    held = load_images(folder, "train", **PLAIN)
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 4 * 3 * 12 * 12)
    lazy = load_images(folder, "train", **PLAIN)
    assert isinstance(lazy.images, Encoded)
    assert lazy.describe() == held.describe()
    for a, b in zip(cat(Loader(lazy, 4, train=True)), cat(Loader(held, 4, train=True)), strict=True):
        assert torch.equal(a, b)
    part, whole = lazy.hold_out(3, 0)[1].take(2), held.hold_out(3, 0)[1].take(2)
    assert torch.equal(cat(Loader(part, 2, workers=0))[0], cat(Loader(whole, 2))[0])


def test_statistics_of_large_sets_take_what_fits(folder, monkeypatch):
    held = load_images(folder, "train")
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 4 * 3 * 12 * 12)
    lazy = load_images(folder, "train")
    spread = held.images[[0, 2, 4, 6]].double() / 255
    np.testing.assert_allclose(lazy.mean, spread.mean((0, 2, 3)))
    assert not np.allclose(lazy.mean, held.mean)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "lazy"])
@pytest.mark.parametrize(
    "content", [b"", b"nothing like an image", encode(gray(3))[:50]], ids=["empty", "foreign", "cut"]
)
def test_broken_image_is_named_in_one_line(folder, monkeypatch, limit, content):
    path = Path(folder.partition(":")[2]) / "a" / "7.png"
    path.write_bytes(content)
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(decoding, "DECODED_AT_ONCE", 2)  # several batches, hence threads
    with pytest.raises(ValueError, match=r"^broken image '.*a/7\.png' .*replace or remove it$") as caught:
        cat(Loader(load_images(folder, "train", size=12, **PLAIN), 2))
    assert "\n" not in str(caught.value)


def test_other_files_and_hidden_folders_are_ignored(folder):
    root = Path(folder.partition(":")[2])
    (root / "a" / "notes.txt").write_text("nine images")
    (root / ".thumbnails").mkdir()
    images = load_images(folder, "train")
    assert (len(images), images.classes) == (9, ("a",))


# ---- torchvision's sets ------------------------------------------------------------------------------------


@pytest.fixture
def torchvision_data(tmp_path, monkeypatch) -> Path:
    """Write tiny sets in the published file formats; only the checksums are let pass."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)

    def dump(path: Path, content: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))

    def part(labels: str, count: int = 4) -> dict[str, object]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, labels: list(range(count))}

    cifar10, cifar100 = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        dump(cifar10 / name, part("labels"))
    dump(cifar10 / "batches.meta", {"label_names": list("abcd")})
    dump(cifar100 / "train", part("fine_labels", 6))
    dump(cifar100 / "test", part("fine_labels"))
    dump(cifar100 / "meta", {"fine_label_names": list("abcdef")})
    stl10 = tmp_path / "stl10_binary"
    stl10.mkdir()
    (stl10 / "class_names.txt").write_text("a\nb\nc\n")
    for split in ("train", "test"):
        rng.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8).tofile(stl10 / f"{split}_X.bin")
        np.array([1, 2, 3], dtype=np.uint8).tofile(stl10 / f"{split}_y.bin")
    return tmp_path


@pytest.mark.parametrize(
    ("uri", "train", "test", "side"), [("cifar10", 20, 4, 32), ("cifar100", 6, 4, 32), ("stl10", 3, 3, 96)]
)
def test_torchvision_sets(torchvision_data, uri, train, test, side):
    images = load_images(uri, "train", data_dir=torchvision_data)
    assert images.images.shape == (train, 3, side, side)
    assert load_images(uri, "test", data_dir=torchvision_data).images.shape[0] == test
    assert images.labels.dtype == torch.int64
    assert images.labels[:3].tolist() == [0, 1, 2]
    assert images.classes[:3] == ("a", "b", "c")
    assert (images.mean == CIFAR_MEAN) == uri.startswith("cifar")
    assert images.flip


def test_cifar_channels_are_in_place(torchvision_data):
    stored = pickle.loads((torchvision_data / "cifar-100-python" / "test").read_bytes())["data"]
    images = load_images("cifar100", "test", data_dir=torchvision_data).images
    np.testing.assert_array_equal(images.numpy(), stored.reshape(-1, 3, 32, 32))


def test_absent_set_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'stl10' is not in .*datasets\.STL10\(.*download=True\)") as caught:
        load_images("stl10", "test", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


# ---- Hugging Face's sets -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def write_table(path: Path, images: list[bytes], labels: list[int]) -> None:
    features = datasets.Features(
        {
            "category": datasets.ClassLabel(names=["cat", "dog"]),
            "picture": datasets.Image(),
            "note": datasets.Value("string"),
        }
    )
    pictures = [{"bytes": content, "path": None} for content in images]
    table = datasets.Dataset.from_dict(
        {"category": labels, "picture": pictures, "note": [""] * len(images)}, features=features
    )
    table.to_parquet(str(path))


def test_hub_set_by_feature_types(hub):
    write_table(hub / "train-00000-of-00001.parquet", [encode(gray(n * 20)) for n in range(4)], [0, 1, 1, 0])
    write_table(hub / "test-00000-of-00001.parquet", [encode(gray(n, 8, 8), "BMP") for n in (7, 9)], [1, -1])
    train, test = load_images(f"hf:{hub}", "train"), load_images(f"hf:{hub}", "test")
    assert train.images.float().mean((1, 2, 3)).tolist() == [0, 20, 40, 60]
    assert train.labels.tolist() == [0, 1, 1, 0]
    assert train.classes == ("cat", "dog")
    assert test.labels.tolist() == [1, -1]
    assert test.images.shape == (2, 3, 12, 12)  # the training images' size
    assert test.mean == train.mean


def test_hub_reads_only_what_is_asked(hub):
    images = [encode(gray(1)), b"broken", encode(gray(3)), b"broken"]
    write_table(hub / "train.parquet", images, [0, 1, 0, 1])
    taken = load_images(f"hf:{hub}", "train", samples=2, size=12, **PLAIN)
    assert taken.sample_ids.tolist() == [0, 2]
    with pytest.raises(ValueError, match="broken image 'hf:.* train row 1'"):
        load_images(f"hf:{hub}", "train", size=12, **PLAIN)


def test_hub_set_without_images(hub):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(hub / "train.parquet"))
    with pytest.raises(ValueError, match="has no column of type Image, only text"):
        load_images(f"hf:{hub}", "train")


def test_hub_folder_without_data(hub):
    (hub / "train.parquet").write_bytes(b"nothing like a table")
    with pytest.raises(FileNotFoundError, match="cannot load 'hf:") as caught:
        load_images(f"hf:{hub}", "train")
    assert "\n" not in str(caught.value)


def test_hub_folder_is_read_without_its_package(hub, monkeypatch):
    images = [encode(gray(n * 20, 9, 9)) for n in range(6)]
    write_table(hub / "train-00000-of-00002.parquet", images[:4], [0, 1, 1, 0])
    write_table(hub / "train-00001-of-00002.parquet", images[4:], [1, -1])
    write_table(hub / "test-00000-of-00001.parquet", images[1:3], [0, 1])
    monkeypatch.setattr("stripe.data.sources.find_tables", lambda folder: {})  # so that the package reads it
    wanted = {split: load_images(f"hf:{hub}", split) for split in ("train", "test")}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for split, other in wanted.items():
        own = load_images(f"hf:{hub}", split)
        assert torch.equal(own.images, other.images)
        assert torch.equal(own.labels, other.labels)
        assert torch.equal(own.sample_ids, other.sample_ids)
        assert (own.mean, own.std, own.classes) == (other.mean, other.std, other.classes)
    (hub / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 2 files of split 'train'"):
        load_images(f"hf:{hub}", "train")


@pytest.mark.skipif(not CIFAR100.exists(), reason="real CIFAR-100 is not in ../shared/data/cifar100")
def test_real_cifar100_without_the_hub_package(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.load_dataset(str(CIFAR100), split="test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    images = load_images(f"hf:{CIFAR100}", "test", samples=200, **PLAIN)
    assert images.classes == tuple(table.features["fine_label"].names)
    for place, row in enumerate(images.sample_ids.tolist()):
        assert np.array_equal(images.images[place].permute(1, 2, 0), np.asarray(table[row]["img"]))
        assert images.labels[place] == table[row]["fine_label"]


def test_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package datasets: .*\[hub\]"):
        load_images("hf:anything", "train")


@pytest.mark.skipif(not CIFAR.exists(), reason="real CIFAR-10 is not in ../shared/data/cifar10")
def test_real_cifar10():
    images = load_images(f"hf:{CIFAR}", "test", samples=100, **PLAIN)
    assert images.images.shape == (100, 3, 32, 32)
    assert images.sample_ids.tolist() == list(range(0, 10_000, 100))
    assert images.classes[6] == "frog"
    assert len(images.labels.unique()) == 10


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["mnist", "digits:8", "hf", "hf:", "imagefolder:", "", "cifar10:x"])
def test_unknown_uri_lists_the_known(uri):
    with pytest.raises(ValueError, match="unknown data URI .* digits, cifar10, cifar100, stl10, imagefolder:DIR"):
        load_images(uri, "train")


def test_unknown_split_lists_the_known():
    with pytest.raises(ValueError, match="unknown split 'val' of 'digits': expected one of train, test"):
        load_images("digits", "val")


@pytest.mark.parametrize("uri", ["imagefolder:nowhere", "hf:./nowhere", "hf:/nowhere"])
def test_missing_folder_is_named(uri):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        load_images(uri, "train")


@pytest.mark.parametrize("count", [0, 1])
def test_empty_and_single_sample_sets_are_refused(tmp_path, count):
    uri = write_folder(tmp_path, {"a": [gray(1)] * count})
    with pytest.raises(ValueError, match=f"has {count} samples in split 'train': at least 2 are needed"):
        load_images(uri, "test")


@pytest.mark.parametrize("samples", [361, 1, 0, -5])
def test_too_many_or_too_few_samples(samples):
    message = f"{samples} samples asked of 'digits', split 'test', which has 360: ask for 2 to 360"
    with pytest.raises(ValueError, match=message):
        load_images("digits", "test", samples=samples)
    with pytest.raises(ValueError, match=message):
        load_images("digits", "test", **PLAIN).take(samples)


@pytest.mark.parametrize("samples", [1, 9, 10])
def test_hold_out_leaves_two_on_each_side(samples):
    with pytest.raises(ValueError, match="which has 10: ask for 2 to 10"):
        random_set(10).hold_out(samples, 0)


@pytest.mark.parametrize(
    "given",
    [{"mean": (0.5,) * 3}, {"std": (0.5,) * 3}, {"mean": (0.5,) * 3, "std": (0.5,)}, PLAIN | {"std": (0, 1, 1)}],
)
def test_an_unusable_mean_and_std(given):
    with pytest.raises(ValueError, match="expected three values each, std above 0"):
        load_images("digits", "test", **given)
