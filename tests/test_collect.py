"""`collect` on networks that nobody prepared: their gates listed, chosen, explained; moments; factories."""

import numpy as np
import pandas as pd
import pytest
import torch

from stripe.cli import main
from stripe.data import Loader, load_images
from stripe.models import create_model, read_checkpoint
from stripe.store import open_run
from tests.conftest import randomize

DIGITS = ["--dataset", "digits"]
FACTORY = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self, gated=True):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear, self.gated = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), gated
    def forward(self, images):
        features = self.convolution(images)
        gate = self.linear(features.mean((2, 3)))
        return features * (gate.sigmoid() if self.gated else gate)[..., None, None]

def plain():
    return Gated(gated=False)

class Softplus(Gated):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 10)
    def forward(self, images):
        features = self.convolution(images)
        gate = nn.functional.softplus(self.linear(features.mean((2, 3))))
        return self.head((features * gate[..., None, None]).mean((2, 3)))

def fails():
    raise KeyError("no\\nweights")

def number():
    return 7
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module of the user's own in the current directory."""
    (tmp_path / "own_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_networks", raising=False)
    return "own_networks"


def collect(*words):
    return main(["collect", *map(str, words)])


def fails(capsys, *words):
    assert collect(*words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_gates_are_listed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert collect("--ckpt", "timm:lcnet_050", "--list-gates") == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "timm:lcnet_050: 2 gates"
    assert header.split() == ["name", "channels", "form", "layout", "source", "before", "after"]
    assert rows[0].split() == [
        "blocks.5.0.se", "128", "multiplicative", "NCHW", "blocks.5.0.se.gate", "blocks.5.0.bn1", "blocks.5.0.conv_pw",
    ]  # fmt: skip
    assert len(rows) == 2
    assert not list(tmp_path.iterdir())


def test_explaining_tells_what_was_rejected(factory, capsys):
    assert collect("--ckpt", f"{factory}:Gated", "--explain", "--size", 16) == 0
    printed = capsys.readouterr().out
    assert "0 products and sums rejected" in printed
    assert "1 gates" in printed
    assert collect("--ckpt", f"{factory}:plain", "--explain", "--size", 16) == 2
    out, error = capsys.readouterr()
    assert "1 products and sums rejected" in out
    assert out.splitlines()[0] == f"running the code of {factory}:plain, which builds the network"
    assert out.splitlines()[2].split() == ["site", "op", "shape", "scaled", "reason"]
    assert "(3, 6, 1, 1)".replace("(", "").replace(",", "").replace(")", "") in out
    assert "not normalised" in error


def test_a_network_without_a_gate_says_what_was_looked_at(factory, tmp_path, capsys):
    message = fails(capsys, "--ckpt", f"{factory}:plain", *DIGITS, "--samples", 4, "--out", tmp_path / "run")
    assert "no gate" in message
    assert "1 products" in message
    assert "1 x not normalised" in message
    assert not (tmp_path / "run").exists()


def test_a_function_named_as_bounded_makes_a_gate_in_the_commands(factory, tmp_path, capsys):
    words = ["--ckpt", f"{factory}:Softplus", *DIGITS, "--samples", "12"]
    assert "1 x not normalised" in fails(capsys, *words, "--out", "run")
    assert collect(*words, "--normaliser", "softplus", "--out", "run") == 0
    few = ["--train-samples", "60", "--val-samples", "20", "--test-samples", "20", "--counts", "1", "--backends"]
    with pytest.warns(UserWarning, match="not normalised"):
        assert main(["fold", *words, *few, "--weightings", "mean", "--out", "none"]) == 2
    assert main(["fold", *words, *few, "--weightings", "mean", "--normaliser", "softplus", "--out", "folded"]) == 0
    run = open_run("run")
    model = read_checkpoint(f"{factory}:Softplus").model
    with torch.no_grad():
        [(images, *_)] = Loader(load_images("digits", run.data["split"], samples=12), 12)
        expected = torch.nn.functional.softplus(model.linear(model.convolution(images).mean((2, 3))))
    np.testing.assert_allclose(run.attention(run.gates[0], 0), expected, rtol=1e-4)


def test_an_input_that_is_too_small_for_some_gates_is_said(capsys):
    words = ["--ckpt", "torchvision:mobilenet_v3_small", "--list-gates", "--size"]
    with pytest.warns(UserWarning, match="twice the size, 64x64; the other gates were found"):
        assert collect(*words, 32) == 0
    assert "6 gates" in capsys.readouterr().out
    assert collect(*words, 96) == 0
    assert "9 gates" in capsys.readouterr().out


def test_patterns_choose_gates(tmp_path, capsys):
    words = ["--ckpt", "timm:lcnet_050", *DIGITS, "--samples", 4, "--size", 64]
    assert collect(*words, "--gates", "*.5.1.*", "--out", tmp_path / "run") == 0
    assert [gate.name for gate in open_run(tmp_path / "run").gates] == ["blocks.5.1.se"]
    message = fails(capsys, *words, "--gates", "*.5.1.*", "layer1*", "--out", tmp_path / "b")
    assert "'layer1*'" in message
    assert "blocks.5.0.se, blocks.5.1.se" in message
    assert not (tmp_path / "b").exists()


def test_images_are_as_the_network_wants_them(tmp_path, factory):
    for name, words in {"own": [], "asked": ["--size", 64]}.items():
        words = ["--ckpt", "timm:tf_mobilenetv3_small_075", *DIGITS, "--samples", 2, "--out", tmp_path / name, *words]
        assert collect(*words) == 0
    own, asked = open_run(tmp_path / "own").data, open_run(tmp_path / "asked").data
    assert (own["size"], asked["size"]) == (224, 64)
    assert own["mean"] == asked["mean"] == [0.5, 0.5, 0.5]
    assert collect("--ckpt", f"{factory}:Gated", *DIGITS, "--samples", 2, "--out", tmp_path / "made") == 0
    assert open_run(tmp_path / "made").data["size"] == 32


@pytest.mark.equal_bits
def test_moments_are_those_of_the_rows(factory, tmp_path, capsys):
    words = ["--ckpt", f"{factory}:Gated", *DIGITS, "--samples", 40, "--batch", 7]
    assert collect(*words, "--out", tmp_path / "rows") == 0
    assert collect(*words, "--out", tmp_path / "moments", "--moments-only", "--by-label") == 0
    whole, run = open_run(tmp_path / "rows"), open_run(tmp_path / "moments")
    [(key, found)], expected = run.moments().items(), whole.moments()
    np.testing.assert_allclose(found.mean, expected[key].mean, rtol=1e-12)
    np.testing.assert_allclose(found.m2, expected[key].m2, rtol=1e-12)
    assert found.classes.counts.sum() == found.count == 40
    assert run.model == {"arch": "own_networks:Gated"}
    for name in ("rows", "moments"):
        assert main(["stats", str(tmp_path / name), "--csv", str(tmp_path / f"{name}.csv")]) == 0
    rows, moments = (pd.read_csv(tmp_path / f"{name}.csv").iloc[0] for name in ("rows", "moments"))
    assert moments["strength"] == pytest.approx(rows["strength"], rel=1e-12)
    assert moments["label_share"] == pytest.approx(rows["label_share"], rel=1e-12)
    assert np.isnan(moments["rank"])
    assert main(["figures", str(tmp_path / "moments"), "--out", str(tmp_path / "figures")]) == 2
    assert "moments only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ckpt", "own_networks:Gated"], "--out"),
        (["--ckpt", "own_networks:Gated", "--by-label", "--out", "run"], "--moments-only"),
        (["--ckpt", "own_networks:Gated", *DIGITS, "--moments-only", "--squeeze", "--out", "run"], "leave out squeeze"),
        (["--ckpt", "own_networks:fails", "--list-gates"], "KeyError"),
        (["--ckpt", "own_networks:number", "--list-gates"], "torch.nn.Module"),
        (["--ckpt", "own_networks:absent", "--list-gates"], "absent"),
        (["--ckpt", "no_such_module:net", "--list-gates"], "no_such_module"),
        (["--ckpt", "timm:no_such_net", "--list-gates"], "no_such_net"),
    ],
)
def test_bad_words_are_one_line(factory, tmp_path, words, expected, capsys):
    assert expected in fails(capsys, *words)
    assert not (tmp_path / "run").exists()


# ---- going on after an interruption ----


@pytest.fixture
def checkpoints(tmp_path):
    """Three epochs of a training on digits."""
    network = {"arch": "resnet", "depth": 11, "module": "senet"}
    paths = [tmp_path / f"epoch={epoch:04d}.pt" for epoch in (1, 2, 5)]
    described = {"model": network, "data": {"uri": "digits"}}
    for path in paths:
        content = {"state_dict": randomize(create_model(**network)).state_dict(), "description": described}
        torch.save(content, path)
    return paths


def parquet(path):
    return {str(part.relative_to(path)): part.read_bytes() for part in sorted(path.rglob("*.parquet"))}


@pytest.mark.equal_bits
def test_resuming_skips_what_is_finished_and_ends_in_the_same_bytes(tmp_path, checkpoints, capsys):
    words = ["--samples", 30, "--batch", 20]
    assert collect("--ckpt", *checkpoints, *words, "--out", tmp_path / "whole", "--resume") == 0
    assert "skipped" not in capsys.readouterr().out
    assert collect("--ckpt", *checkpoints[:2], *words, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert collect("--ckpt", *checkpoints, *words, "--out", tmp_path / "run", "--resume") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in out] == [
        f"epoch 1 is there, {checkpoints[0]} is skipped",
        f"epoch 2 is there, {checkpoints[1]} is skipped",
        f"epoch 5, 3 gates; network {checkpoints[2]}; data digits, split test, 30 images",
    ]
    assert parquet(tmp_path / "run") == parquet(tmp_path / "whole")
    assert len(parquet(tmp_path / "whole")) == 3
    assert open_run(tmp_path / "run").epochs == [1, 2, 5]


def test_resuming_another_recording_is_refused(tmp_path, checkpoints, capsys):
    assert collect("--ckpt", checkpoints[0], "--samples", 10, "--out", tmp_path / "run") == 0
    words = ["--ckpt", *checkpoints, "--samples", 10, "--split", "train", "--out", tmp_path / "run", "--resume"]
    assert "choose another run" in fails(capsys, *words)
    words[words.index("--split") :] = ["--samples", 12, "--out", tmp_path / "run", "--resume"]
    assert "epoch 1" in (said := fails(capsys, *words))
    assert "holds 10 samples, this recording would hold 12: go on with --samples 10" in said
    assert open_run(tmp_path / "run").epochs == [1]
    assert "--resume" in fails(capsys, "--ckpt", checkpoints[0], "--out", tmp_path / "run", "--resume", "--overwrite")


def test_a_broken_checkpoint_is_found_before_anything_is_recorded(tmp_path, checkpoints, capsys):
    checkpoints[2].write_bytes(checkpoints[2].read_bytes()[:-100])
    assert "epoch=0005.pt" in fails(capsys, "--ckpt", *checkpoints, "--samples", 10, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
