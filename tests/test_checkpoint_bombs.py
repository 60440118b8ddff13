"""Checkpoints that would take far more memory than they have bytes, fetch something or run something: measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stripe.models import load_checkpoint, read_checkpoint
from tests import measured
from tests.runs import refused

ROOT = Path(__file__).parents[1]
ROOM = 50  # MB above four times the file
TRIED = "checkpoints mutated or made up: read or refused in one line, in 4 times the file + 50 MB; no socket, no code"


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(100, 5100, 1250))])
def test_memory_follows_the_files_size(tmp_path, record_property, first):
    count = 1250 if first else 60
    command = [sys.executable, "-m", "tests.measured", str(tmp_path), str(first), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["events"] == []
    assert found["unclear"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "a.safetensors"}
    assert max(found["worst"].values()) <= ROOM, done.stderr
    assert 0 < found["refused"] < count  # some were harmless
    record_property(TRIED, count)


def made(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "a.pt").write_bytes(content)
    return tmp_path / "a.pt"


def test_honest_archives_of_every_kind_are_read(tmp_path):
    """The control: what torch.save writes, and the same packed again, is no archive of two directories."""
    load_checkpoint(made(tmp_path, measured.BASES["zip"]))
    load_checkpoint(made(tmp_path, measured.archive(measured.entries_of(measured.BASES["zip"]))))
    torch.save(measured.checkpoint(), tmp_path / "named.pt")
    assert read_checkpoint(tmp_path / "named.pt").epoch == 1
    many = {f"{i}": torch.zeros(1) for i in range(5_000)}
    with refused(ValueError, "not a CIFAR ResNet's weights"):  # read, and no network of ours
        load_checkpoint(made(tmp_path, measured.saved(many)))


@pytest.mark.parametrize("name", ["archive/DATA.PKL", "archive/Data.pkl", "archive/data.pkl\0x", "archive/data.pkl"])
def test_names_in_an_archive_are_compared_as_torchs_reader_does(tmp_path, name):
    call = b"\x80\x02c__builtin__\nbytearray\nK\x01\x85R."
    with refused(ValueError, "a.pt"):
        load_checkpoint(made(tmp_path, measured.with_pickle(call, name)))


def test_an_archive_of_two_directories_is_refused(tmp_path):
    honest = measured.BASES["zip"]
    with refused(ValueError, "one directory at its end"):
        load_checkpoint(made(tmp_path, measured.two_directories(measured.with_pickle(b"N."), honest)))
    with refused(ValueError, "one directory at its end"):
        load_checkpoint(made(tmp_path, honest + b"PK\5\6"))


@pytest.mark.parametrize("shape", [(2**20, 0), (0, 2**20)])
def test_empty_tensors_declare_no_classes(tmp_path, shape):
    state = measured.WEIGHTS | {"zero": torch.zeros(shape)}
    network = measured.NETWORK | {"num_classes": 2**20}
    with refused(ValueError, "num_classes 1048576"):
        load_checkpoint(made(tmp_path, measured.saved({"state_dict": state, "description": {"model": network}})))


def test_what_a_file_declares_is_compared_with_its_weights_before_it_is_built(tmp_path, monkeypatch):
    state = measured.WEIGHTS | {"rows": torch.zeros(2**18, 1, dtype=torch.bool)}
    network = measured.NETWORK | {"num_classes": 2**18}
    path = made(tmp_path, measured.saved({"state_dict": state, "description": {"model": network}}))
    with refused(ValueError, "weights do not fit"):
        load_checkpoint(path)
    peak, refusal = measured.peak_of(path)
    assert peak < ROOM
    assert "weights do not fit" in refusal


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "fcos_resnet50_fpn"])
def test_a_network_that_a_file_declares_brings_no_backbone(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **_: asked.append(a))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **_: asked.append(a))
    network = {"arch": f"torchvision:{name}", "num_classes": 10}
    with refused(ValueError, "weights do not fit"):
        load_checkpoint(made(tmp_path, measured.saved(measured.checkpoint(description={"model": network}))))
    assert asked == []


def test_a_key_with_and_without_its_prefix_is_refused(tmp_path):
    state = measured.WEIGHTS | {"module.fc.weight": torch.zeros(10, 256)}
    with refused(ValueError, "two weights are named 'fc.weight'"):
        load_checkpoint(made(tmp_path, measured.saved({"state_dict": state})))
    prefixed = {f"module.{key}": value for key, value in measured.WEIGHTS.items()}
    load_checkpoint(made(tmp_path, measured.saved({"state_dict": prefixed})))


def test_keys_are_shown_without_control_characters_and_short(tmp_path):
    state = measured.WEIGHTS | {f"layer1.0.attention_module.\x1b[2J{i}": torch.zeros(1) for i in range(50_000)}
    with refused(ValueError, "a.pt"):
        load_checkpoint(made(tmp_path, measured.saved({"state_dict": state})))
    nan = measured.WEIGHTS | {"\x1b]0;title\x07": torch.full((1,), torch.nan)}
    with pytest.raises(ValueError, match="not numbers") as error:
        load_checkpoint(made(tmp_path, measured.saved({"state_dict": nan})))
    assert str(error.value).isprintable()
