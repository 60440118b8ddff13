"""The fold command on a network trained on the digits: tables, files, choices, and what it says of bad input."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image

from stripe.cli import main
from stripe.data import Loader, load_images
from stripe.gates import find_gates
from stripe.models import create_model, load_checkpoint
from stripe.training import evaluate
from tests.test_cli import fails

TRAIN = (
    "--dataset digits --depth 8 --block-name basicblock --module senet"
    " --train-samples 400 --train-batch 20 --epochs 4 --scheduler cosine"
).split()
FOLD = ("--learning-steps 5 --train-samples 200 --train-batch 20 --test-samples 60 --samples 40 --batch 60").split()
PLAIN = {"depth": 8, "block": "basicblock"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("fold") / "se"
    assert main(["train", *TRAIN, "--record", "30", "-c", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def folded(trained, tmp_path_factory):
    """All gates folded, by every means that changes no convolution, with the run's stripes as means."""
    out = tmp_path_factory.mktemp("fold") / "out"
    words = [
        *FOLD,
        "--weightings",
        "mean",
        "energy",
        "fisher",
        "learned",
        "--run",
        trained,
        "--order",
        "greedy",
        "--distill-steps",
        "1",
        "--recover-each",
        "--onnx",
        "--out",
        out,
    ]
    assert main(["fold", "--ckpt", *map(str, [trained / "checkpoints" / "last.pt", *words])]) == 0
    return out


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    words = ["fold", "--ckpt", "torchvision:mobilenet_v3_small", "--dataset", "digits", "--out", str(tmp_path / "out")]
    missing = "mps" if torch.cuda.is_available() else "cuda"
    assert main([*words, "--device", missing]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"--device {missing}" in line
    assert not (tmp_path / "out").exists()


def test_every_step_has_its_accuracies(trained, folded):
    table = pd.read_csv(folded / "variants.csv", keep_default_na=False)
    recoveries = ["none", "re-estimated", "distilled"]
    expected = [(0, "none", recovery) for recovery in recoveries]
    expected += [
        (k, kind, each) for k in (1, 2, 3) for kind in ("mean", "energy", "fisher", "learned") for each in recoveries
    ]
    assert list(table[["folded", "weighting", "recovery"]].itertuples(index=False, name=None)) == expected
    test = load_images("digits", "test", samples=60)
    plain = evaluate(load_checkpoint(trained / "checkpoints" / "last.pt"), Loader(test, 60)).accuracy
    assert table["test"][0] == pytest.approx(plain)
    assert table["test"].nunique() > 1
    assert (table["error"] < 1e-12).all()
    assert list(table["last"][3::12]) == list(pd.read_csv(folded / "gates.csv").sort_values("place")["gate"])


def test_the_folded_network_is_a_plain_checkpoint(folded):
    model = load_checkpoint(folded / "folded.pt")
    plain = create_model("resnet", **PLAIN)
    plain.load_state_dict(model.state_dict(), strict=True)
    images = next(iter(Loader(load_images("digits", "test", samples=4), 4)))[0]
    assert find_gates(model, images) == []
    program = torch.export.load(folded / "folded.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images))
        assert not torch.allclose(plain.train()(images), model(images))
    chosen = pd.read_csv(folded / "variants.csv", keep_default_na=False)
    test = evaluate(model, Loader(load_images("digits", "test", samples=60), 60)).accuracy
    three = chosen[chosen["folded"] == 3]
    nearest = three.sort_values("divergence").iloc[0]
    assert test == pytest.approx(nearest["test"])
    assert nearest["divergence"] < three[three["recovery"] == "re-estimated"]["divergence"].min()


def test_tables_hold_predictors_latencies_and_onnx(folded):
    content = json.loads((folded / "fold.json").read_text())
    assert content["measure"] == "accuracy"
    assert [row["gate"] for row in content["gates"]] == ["layer1.0", "layer2.0", "layer3.0"]
    assert {row["direction"] for row in content["gates"]} == {"back"}
    assert content["gates"][0]["into"] == "layer1.0.bn2.weight, layer1.0.bn2.bias"
    predictors = {"foretold", "1 - strength", "within", "CV", "energy error"}
    assert {row["predictor"] for row in content["predictors"]} == predictors
    latency = pd.DataFrame(content["latency"])
    assert list(latency["folded"]) == [0, 1, 2, 3] * 2
    assert (latency["milliseconds"] > 0).all()
    before, after = content["onnx"]
    assert before["nodes"] - after["nodes"] >= 3 * 5  # mean, two linear layers, two activations
    assert 0 <= after["relative_error"] < 1e-4
    assert "Sigmoid" in before["operators"]
    assert "Sigmoid" not in after["operators"]
    assert (folded / "tradeoff.png").stat().st_size > 5000


def test_every_column_but_names_is_explained(folded):
    content = json.loads((folded / "fold.json").read_text())
    tables = {name: rows for name, rows in content.items() if isinstance(rows, list)}
    assert set(tables) == {"gates", "variants", "predictors", "latency", "onnx"}
    for name, rows in tables.items():
        unexplained = {column for row in rows for column in row} - set(content["legend"][name])
        assert unexplained <= {"gate", "backend", "batch", "folded", "file"}, name


def test_keep_leaves_the_most_sensitive_gates(trained, tmp_path):
    words = ["--ckpt", trained / "checkpoints" / "last.pt", *FOLD, "--keep", "1", "--backends", "--out", tmp_path]
    words += ["--weightings", "mean", "matrix"]
    assert main(["fold", *map(str, words)]) == 0
    gates = pd.read_csv(tmp_path / "gates.csv", keep_default_na=False)
    assert gates[gates["direction"] == ""]["place"].tolist() == [3]
    by_damage = gates.astype({"damage": float}).sort_values("damage")
    assert by_damage["place"].tolist() == [1, 2, 3]
    assert not (tmp_path / "folded.pt").exists()
    assert not (tmp_path / "latency.csv").exists()
    table = pd.read_csv(tmp_path / "variants.csv", keep_default_na=False)
    assert list(table["folded"]) == [0, 2, 2, 0, 2]
    assert list(table["weighting"])[:3] == ["none", "mean", "matrix"]
    assert list(table["recovery"]) == [*["none"] * 3, *["re-estimated"] * 2]
    assert (table["error"] < 1e-12).all()
    model = torch.export.load(tmp_path / "folded.pt2").module()
    assert sum("sigmoid" in str(node.target) for node in model.graph.nodes) == 1


def test_a_few_scores_take_the_place_of_attention(trained, tmp_path, capsys):
    words = ["--ckpt", trained / "checkpoints" / "last.pt", *FOLD, "--rank", "0", "1", "--shared", "layer2.0", "--onnx"]
    assert main(["fold", *map(str, words), "--max-drop", "100", "--out", str(tmp_path)]) == 0
    assert "chosen: k0" in capsys.readouterr().out
    ranks, latency, onnx = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("ranks", "latency", "onnx"))
    names = ["original", "k0", "k1", "k1-layer2.0"]
    assert list(ranks["network"]) == list(latency["network"]) == [file.removesuffix(".onnx") for file in onnx["file"]]
    assert list(ranks["network"]) == names
    original, none, own, shared = onnx["nodes"]
    assert none < shared < own
    assert none < original
    assert (tmp_path / "ranks.png").stat().st_size > 5000
    assert find_gates(load_checkpoint(tmp_path / "folded.pt"), torch.randn(2, 3, 32, 32)) == []
    assert json.loads((tmp_path / "fold.json").read_text())["ranks"][1]["numbers"] == 0
    assert main(["fold", *map(str, words[:-3]), "--backends", "--max-drop", "0", "--out", str(tmp_path / "b")]) == 0
    chosen = capsys.readouterr().out.partition("chosen: ")[2].split()[0]
    program = torch.export.load(tmp_path / "b" / "folded.pt2").module()
    assert program(torch.randn(5, 3, 32, 32)).shape == (5, 10)
    assert (tmp_path / "b" / "folded.pt").exists() == (chosen == "k0")


@pytest.mark.equal_bits
def test_a_network_of_other_classes_is_measured_by_agreement(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        for number in range(6):
            path = tmp_path / "images" / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "a.pt")
    words = ["--ckpt", tmp_path / "a.pt", "--arch", "torchvision:mobilenet_v3_small", "--counts", "9", "--backends"]
    words += ["--learning-steps", "5"]
    words += ["--dataset", f"imagefolder:{tmp_path}/images", "--out", tmp_path / "out"]
    assert main(["fold", *map(str, words)]) == 0
    told, first = capsys.readouterr().out.splitlines()[:2]
    assert told.startswith(f"network {tmp_path}/a.pt; data imagefolder:{tmp_path}/images, split train")
    assert first.split() == "0 folded none none validation: divergence 0, 100.00 %; test: 0, 100.00 %".split()
    assert json.loads((tmp_path / "out" / "fold.json").read_text())["measure"] == "agreement"


FACTORY = """
import torch
from torch import nn
from timm.layers import SEModule

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.se, self.head = nn.Conv2d(3, 8, 3), SEModule(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.head(self.se(self.conv(x)))
        return {"mask": x, "score": x.mean((2, 3))}

def make():
    return Net().eval()
"""


def test_a_network_of_several_outputs_is_measured_by_what_it_gives(tmp_path, monkeypatch, capsys):
    (tmp_path / "several.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "--ckpt",
        "several:make",
        "--dataset",
        "digits",
        *FOLD,
        "--keep",
        "0",
        "--backends",
        "--onnx",
        "--onnx-batch",
        "2",
    ]
    opset = "18" if torch.__version__ < "2.7" else "19"  # torch 2.6 writes no other
    assert main(["fold", *map(str, words), "--opset", opset, "--out", str(tmp_path / "out")]) == 0
    assert "cosine" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "fold.json").read_text())["measure"] == "cosine"
    assert "expected free, or a number" in fails(capsys, "fold", *words[:-1], "two", "--out", tmp_path / "out")
    assert "--outputs boxes" in fails(capsys, "fold", *words, "--outputs", "boxes", "--out", tmp_path / "out")


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    ckpt = ["fold", "--ckpt", trained / "checkpoints" / "last.pt", *FOLD, "--out", tmp_path / "out"]
    assert "invalid choice: 'random'" in fails(capsys, *ckpt, "--order", "random")
    assert "--backends tflite: expected some of" in fails(capsys, *ckpt, "--backends", "tflite")
    assert "give one of them" in fails(capsys, *ckpt, "--keep", "1", "--max-drop", "1")
    assert "--shared says where" in fails(capsys, *ckpt, "--rank", "0", "--shared")
    assert "--rank -1: expected" in fails(capsys, *ckpt, "--rank", "1", "-1")
    assert "--counts, --order: not with --rank" in fails(
        capsys, *ckpt, "--rank", "1", "--counts", "1", "--order", "greedy"
    )
    assert "--weightings: not with --rank" in fails(capsys, *ckpt, "--rank", "1", "--weightings", "mean")
    assert "no gate is named 'layer9'" in fails(capsys, *ckpt, "--rank", "1", "--shared", "layer9")
    assert "--distill-steps -1" in fails(capsys, *ckpt, "--distill-steps", "-1")
    assert "4 gates to fold: expected 0 to 3" in fails(capsys, *ckpt, "--counts", "4")
    assert "-6 gates to fold: expected 0 to 3" in fails(capsys, *ckpt, "--keep", "9")
    plain = tmp_path / "plain.pt"
    torch.save({"state_dict": create_model("resnet", **PLAIN).state_dict()}, plain)
    words = ["fold", "--ckpt", plain, *FOLD, "--out", tmp_path / "out"]
    assert "name one with --dataset" in fails(capsys, *words)
    assert "has no gate to fold" in fails(capsys, *words, "--dataset", "digits")
    assert main(["collect", "--ckpt", str(trained / "checkpoints" / "last.pt"), "--samples", "9", "--gates", "layer1.0",
                 "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    assert "the means lack gates layer2.0, layer3.0" in fails(capsys, *ckpt, "--run", tmp_path / "run")
    assert not (tmp_path / "out").exists()
