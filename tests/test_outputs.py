"""Networks whose output is no bare tensor, and networks of other origins than files, in every command."""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

from stripe.cli import main
from stripe.models import read_checkpoint
from stripe.store import open_run
from stripe.training import evaluate

NETWORKS = """
import dataclasses, os, sys
import torch
from torch import nn
from torch.nn import functional as F

class Gated(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 10)
        self.form = form
    def forward(self, images):
        features = self.convolution(images)
        features = features * self.linear(features.mean((2, 3))).sigmoid()[..., None, None]
        scores = self.head(F.relu(features).mean((2, 3)))
        auxiliary = {"out": scores, "aux": features}
        return {"tuple": (scores,), "mapping": {"logits": scores}, "auxiliary": auxiliary}[self.form]

def a_tuple():
    return Gated("tuple")

def a_mapping():
    return Gated("mapping")

def with_auxiliary():
    return Gated("auxiliary")

def elsewhere():
    os.chdir("/")
    sys.path.insert(0, "/nowhere")
    return Gated("tuple")
"""
DIGITS = ["--dataset", "digits"]
FORMS = ("directory of transformers", "a_tuple", "a_mapping", "with_auxiliary")


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Return what --ckpt is to be given for each form of output."""
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)

    def name(form):
        if form in FORMS[1:]:
            return f"my_networks:{form}"
        return f"hf:{save_regnet(tmp_path / 'regnet')}"

    return name


def save_regnet(path, **processing):
    torch.manual_seed(0)
    configuration = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="y", num_labels=10
    )
    network = transformers.RegNetForImageClassification(configuration).eval()
    network.save_pretrained(path)
    if processing:
        (path / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ConvNextImageProcessor", **processing})
        )
    return path


def by_hand(model, images):
    """The scores (N, 10) of a network whatever it puts them into."""
    with torch.no_grad():
        output = model(images)
    return output[0] if isinstance(output, tuple) else output["out"] if "out" in output else output["logits"]


@pytest.mark.parametrize("form", FORMS)
def test_every_command_takes_outputs_that_are_no_bare_tensor(named, tmp_path, form, capsys):
    from stripe.data import Loader, load_images

    spec = named(form)
    network = ["--ckpt", spec, *DIGITS]
    few = ["--train-samples", "60", "--test-samples", "20"]
    fold = ["--val-samples", "20", "--samples", "30", "--backends", "--counts", "1", "--weightings", "mean"]
    assert main(["collect", *network, "--samples", "12", "--out", "run"]) == 0
    assert main(["fold", *network, "--run", "run", *few, *fold, "--onnx", "--out", "folded"]) == 0
    assert main(["validate", *network, "--run", "run", *few, "--steps", "2", "--out", "match"]) == 0
    capsys.readouterr()
    assert main(["train", "-e", "--resume", spec, *DIGITS, "--json", "scores.json"]) == 0
    said = capsys.readouterr().out
    assert ("running the code of" in said) == (form != FORMS[0])

    model = read_checkpoint(spec).model
    images = load_images("digits", "test")
    [(batch, labels, _)] = Loader(images, len(images))
    expected = 100 * (by_hand(model, batch).argmax(1) == labels).double().mean().item()
    assert json.loads(Path("scores.json").read_text())["accuracy"] == pytest.approx(expected)
    gates = open_run("run").gates
    assert len(gates) == (2 if form == FORMS[0] else 1)
    variants = pd.read_csv("folded/variants.csv")
    assert variants["error"].dropna().max() < 1e-6
    assert len(pd.read_csv("match/validation.csv")) == len(gates)


def test_a_directory_of_transformers_tells_the_input_of_its_network(tmp_path):
    processing = {"size": {"shortest_edge": 48}, "crop_pct": 0.9, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3}
    path = save_regnet(tmp_path / "told", **processing)
    checkpoint = read_checkpoint(f"hf:{path}")
    assert isinstance(checkpoint.model, transformers.RegNetForImageClassification)
    assert not checkpoint.model.training
    assert checkpoint.description["data"] == {"size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.4] * 3}
    assert read_checkpoint(f"hf:{save_regnet(tmp_path / 'silent')}").description["data"] == {}


@pytest.mark.parametrize("content", ["nothing", "no weights", "code of its own"])
def test_what_is_no_network_of_transformers_is_one_line(tmp_path, content, capsys):
    path = tmp_path / "network"
    if content == "nothing":
        path.mkdir()
    else:
        save_regnet(path)
    if content == "no weights":
        (path / "model.safetensors").unlink()
    if content == "code of its own":
        configuration = json.loads((path / "config.json").read_text())
        configuration |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
        (path / "config.json").write_text(json.dumps(configuration))
        (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main(["collect", "--ckpt", f"hf:{path}", "--list-gates"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: cannot build 'hf:{path}'")
    assert not (tmp_path / "ran").exists()


def test_a_factory_may_change_the_directory(named, tmp_path):
    before = list(sys.path)
    named("a_tuple")
    assert main(["collect", "--ckpt", "my_networks:elsewhere", *DIGITS, "--samples", "4", "--out", "run"]) == 0
    assert (tmp_path / "run" / "run.json").exists()
    assert os.getcwd() == str(tmp_path)
    assert sys.path == before


def test_unknown_labels_are_left_out_of_an_evaluation():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    images, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    hidden = labels.clone()
    hidden[::3] = -1
    known = hidden >= 0
    found = evaluate(model, list(zip(images.split(7), hidden.split(7), strict=True)))
    wanted = evaluate(model, list(zip(images[known].split(7), labels[known].split(7), strict=True)))
    assert found.samples == int(known.sum())
    assert found.accuracy == wanted.accuracy
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert found != evaluate(model, list(zip(images.split(7), labels.split(7), strict=True)))
    with pytest.raises(ValueError, match="no sample with a label"):
        evaluate(model, [(images, torch.full((40,), -1))])
