"""Images from a user's own folder: grey ones for networks of one channel, broken ones, and which row is which file."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stripe.cli import main
from stripe.data import Loader, load_images
from stripe.models import read_checkpoint
from stripe.store import open_run
from tests.runs import record, refused, writer

NETWORK = """
import torch
from torch import nn

class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 6), nn.Linear(6, 2)
    def forward(self, images):
        features = self.convolution(images)
        features = features * self.linear(features.mean((2, 3))).sigmoid()[..., None, None]
        return self.head(features.mean((2, 3)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve pictures of two classes, in colour, in grey and in grey of 16 bits, and a network of one channel."""
    draw = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape, kind = [((20, 24, 3), np.uint8), ((20, 24), np.uint8), ((20, 24), np.uint16)][number % 3]
        Image.fromarray(draw.integers(0, np.iinfo(kind).max, shape).astype(kind)).save(path)
    (tmp_path / "grey_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "grey_network", raising=False)
    return tmp_path / "pictures"


def grey_of(path):
    """A picture in grey of 8 bits, as Pillow and the higher byte have it."""
    with Image.open(path) as image:
        if image.mode == "RGB":
            return np.asarray(image.convert("L"))
        pixels = np.asarray(image)
        return (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels


# ---- one channel ------------------------------------------------------------------------------------------


def test_grey_images_have_one_channel_normalised_by_its_own_mean(folder):
    images = load_images(f"imagefolder:{folder}", "train", channels=1)
    assert images.images.shape == (12, 1, 20, 20)
    for row, name in images.files.items():
        np.testing.assert_array_equal(images.images[row, 0], grey_of(folder / name)[:, 2:22])
    pixels = images.images.double() / 255
    np.testing.assert_allclose([images.mean, images.std], [[pixels.mean()], [pixels.std(correction=0)]])
    [(batch, *_)] = Loader(images, 12)
    torch.testing.assert_close(batch.double(), (pixels - images.mean[0]) / images.std[0], rtol=1e-5, atol=1e-5)


def test_images_in_memory_turn_grey_as_pillow_turns_files():
    colour, grey = (load_images("digits", "test", channels=channels) for channels in (3, 1))
    torch.testing.assert_close(grey.images[:, 0], colour.images[:, 0])
    many = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    from stripe.data.decoding import sized

    found = sized(many, torch.arange(50), 8, 1)
    wanted = [np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).convert("L")) for each in many]
    np.testing.assert_array_equal(found[:, 0], wanted)


@pytest.mark.parametrize(("options", "word"), [({"channels": 2}, "2 channels"), ({"mean": [0.5] * 2}, "2 channels")])
def test_other_numbers_of_channels_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        load_images("digits", "test", **options)


@pytest.mark.parametrize("dataset", ["digits", "pictures"])
def test_a_network_of_one_channel_is_recorded_folded_and_tested(folder, dataset):
    data = ["--dataset", "digits" if dataset == "digits" else f"imagefolder:{folder}"]
    network = ["--ckpt", "grey_network:Grey", *data]
    assert main(["collect", *network, "--samples", "10", "--out", "run"]) == 0
    run = open_run("run")
    assert len(run.data["mean"]) == len(run.data["std"]) == 1
    with torch.inference_mode():
        model = read_checkpoint("grey_network:Grey").model
        loader = Loader(load_images(run.data["uri"], "test", samples=10, channels=1), 10)
        features = model.convolution(next(iter(loader))[0])
        wanted = model.linear(features.mean((2, 3))).sigmoid()
    np.testing.assert_allclose(run.attention(run.gates[0], 0), wanted, atol=1e-6)
    fold = ["--val-samples", "4", "--samples", "6", "--backends", "--counts", "1", "--weightings", "mean"]
    assert main(["fold", *network, *fold, "--out", "folded"]) == 0
    assert main(["collect", "--ckpt", "grey_network:Grey", "--list-gates"]) == 0
    if dataset == "pictures":
        assert main(["train", "-e", "--resume", "grey_network:Grey", *data]) == 0


def test_a_network_of_timm_with_one_channel_tells_one_mean():
    import timm

    from stripe.models.zoo import _describe

    described = _describe(timm.create_model("resnet18", in_chans=1), "timm:resnet18")["data"]
    assert (described["channels"], len(described["mean"])) == (1, 1)
    assert "channels" not in _describe(timm.create_model("resnet18"), "timm:resnet18")["data"]


# ---- which row is which file ------------------------------------------------------------------------------


def test_a_run_knows_the_file_of_every_row(folder):
    assert main(["collect", "--ckpt", "grey_network:Grey", "--dataset", f"imagefolder:{folder}", "--out", "run"]) == 0
    run = open_run("run")
    assert sorted(run.files.values()) == sorted(os.path.relpath(path, folder) for path in folder.rglob("*.png"))
    labels = dict(zip(run.samples(0).tolist(), run.labels(0).tolist(), strict=True))
    assert {sample: "ab".index(name[0]) for sample, name in run.files.items()} == labels


def test_names_of_files_are_kept_whatever_they_hold_and_never_changed(tmp_path):
    names = {0: 'a,"b"\n.png', 7: "ü/Ω.png", 3: "gone \udcff.png"}
    path = record(tmp_path / "run", 1, files=names)
    assert open_run(path).files == names | {3: "gone \\udcff.png"}
    record(path, 2, files=names | {8: "c.png"})
    assert open_run(path).files[8] == "c.png"
    with refused(ValueError, "sample 7 is 'ü/Ω.png', this recording that it is 'x.png'"):
        writer(path, files={7: "x.png"})
    assert open_run(path).files[7] == "ü/Ω.png"


def test_a_run_without_files_names_none_and_a_damaged_list_is_told(tmp_path):
    path = record(tmp_path, 1)
    assert open_run(path).files == {}
    (path / "files.csv").write_text("sample,file\n1,a.png\nb.png\n")
    with pytest.raises(ValueError, match="files.csv is damaged"):
        _ = open_run(path).files


# ---- broken images ----------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder):
    whole = (folder / "a" / "04.png").read_bytes()
    (folder / "a" / "04.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "03.png").write_text("no image")
    return folder


def test_broken_images_are_left_out_on_request_and_counted(broken):
    with pytest.raises(ValueError, match="broken image"):
        load_images(f"imagefolder:{broken}", "train")
    with pytest.warns(UserWarning, match="2 of 12 images are broken and left out: .*04.png.*03.png"):
        images = load_images(f"imagefolder:{broken}", "train", skip_broken=True)
    assert len(images) == len(images.files) == 10
    assert len(images.skipped) == 2
    assert not {os.path.join("a", "04.png"), os.path.join("b", "03.png")} & set(images.files.values())
    with pytest.warns(UserWarning, match="left out"):
        some = load_images(f"imagefolder:{broken}", "train", samples=5, skip_broken=True)
    assert len(some) == 5
    assert set(some.files.items()) <= set(images.files.items())  # ids are those of the whole folder


@pytest.mark.filterwarnings("ignore:.*left out")
def test_collect_skips_broken_images_only_when_asked(broken, capsys):
    words = ["collect", "--ckpt", "grey_network:Grey", "--dataset", f"imagefolder:{broken}", "--out", "run"]
    assert main(words) == 2
    assert "broken image" in capsys.readouterr().err
    assert main([*words, "--skip-broken"]) == 0
    assert len(open_run("run").samples(0)) == 10
