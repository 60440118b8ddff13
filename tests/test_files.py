"""Replacing files: whole or not at all, also on a full disk, through links, and where there is no regular file."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from stripe.files import replaced, write_json, write_text


def test_a_file_is_replaced_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "first")
    write_text(path, "second\n")
    assert path.read_text() == "second\n"
    assert [each.name for each in path.parent.iterdir()] == ["c.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "c.txt"
    write_text(path, "first")

    def fail():
        with replaced(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "first"
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["c.txt"]


def test_readers_see_one_content_or_the_other(tmp_path):
    path, contents = tmp_path / "c.txt", {"a" * 500_000, "b" * 500_000}
    write_text(path, "a" * 500_000)
    writer = threading.Thread(target=lambda: [write_text(path, text) for text in sorted(contents) * 20])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen <= contents


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from stripe.files import replaced, write_json
from stripe.folding import save_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
network, path = torch.nn.Linear(100, 100), Path(sys.argv[2])
def save():
    with replaced(path) as partial, partial.open("wb") as file:
        torch.save(network.state_dict(), file)
try:
    {"json": lambda: write_json(path, {"x": "y" * 5000}), "pt": save,
     "safetensors": lambda: save_weights(network, path)}[sys.argv[1]]()
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["json", "pt", "safetensors"])
def test_a_disk_without_room_keeps_the_old_file_and_is_named(tmp_path, kind):
    path = tmp_path / f"old.{kind}"
    path.write_text("old")
    words = [sys.executable, "-c", LIMITED, kind, path]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"'{path}' could not be written" in said
    assert "File too large" in said
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_of_another_file_keeps_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replaced(tmp_path / "new.txt"):
        (tmp_path / "other").read_text()


def test_a_folder_in_the_way_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}' could not be written"):
        write_text(tmp_path, "x")


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".partial-c.txt").symlink_to(precious)
    write_text(tmp_path / "c.txt", "new")
    assert precious.read_text() == "mine"
    assert (tmp_path / "c.txt").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=10)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_json_is_json(tmp_path):
    content = {"a": [1.5, float("nan"), {"b": float("-inf")}], "c": (np.float64("nan"), None, True, "NaN")}
    write_json(tmp_path / "a.json", content)
    strict = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert strict == {"a": [1.5, None, {"b": None}], "c": [None, None, True, "NaN"]}


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
