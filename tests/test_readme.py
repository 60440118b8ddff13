"""Every code block of the README runs and prints what it says; commands run on fewer and smaller images."""

import glob
import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stripe
from stripe.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [shlex.split(line) for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
SCRIPTS = {
    "collect_attention": "collect",
    "fold": "fold",
    "make_figures": "figures",
    "report": "report",
    "train": "train",
    "validate_asr": "validate",
}
FEW = {  # appended to a command's words: argparse takes the last
    "collect": ["--samples", "20", "--workers", "0"],
    "fold": [
        *("--train-samples", "20", "--val-samples", "10", "--test-samples", "10", "--samples", "10", "--batch", "10"),
        *("--workers", "0", "--counts", "0", "1", "--order", "single", "--distill-steps", "1", "--backends"),
    ],
    "train": "--depth 8 --block-name basicblock --epochs 2 --train-samples 80 --record 20 --workers 0".split(),
    "validate": ["--steps", "2", "--train-samples", "60", "--test-samples", "20", "--workers", "0"],
}


def smaller(words, images=Path("none")):
    """Return a command on digits or the folder's images, without weights from elsewhere, and its file names found."""
    places = {"hf:../shared/data/cifar10": "digits", "imagefolder:DIR": f"imagefolder:{images}"}
    words = [places.get(word, word).removesuffix(":pretrained") for word in words]
    words = [str(ROOT / word) if word.endswith("se-resnet20.pt") else word for word in words]
    return list(chain.from_iterable(sorted(glob.glob(word)) if "*" in word else [word] for word in words))


def as_command(words):
    """Return the words of `stripe` that a script's are, shortened."""
    name = SCRIPTS[Path(words[1]).stem] if words[0].endswith("python") else words[1]
    rest = words[2:]
    return [name, *rest, *FEW.get(name, [])]


def starting(*names):
    return [words for words in COMMANDS if words[0] in names]


@pytest.fixture
def images(tmp_path):
    """A folder of images per class."""
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, compared = {}, 0
    for (kind, block), (following, text) in pairwise([*BLOCKS, ("", "")]):
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
            printed = capsys.readouterr().out
            assert printed == (text if following == "text" else "")
            compared += following == "text"
    assert compared == 2
    assert len(names["gates"]) == 9
    assert names["run"].epochs == [1, 2]
    assert names["report"].error < 1e-10
    assert (tmp_path / "stripes.png").exists()
    assert not any("bn" in name and "Batch" in type(m).__name__ for name, m in names["fast"].named_modules())


def test_commands_run_in_order(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stripe.load_example().path, "runs/own")  # which the Python blocks record
    commands = [words for words in starting("python", "stripe")]
    assert len(commands) >= 8
    for words in commands:
        assert main(as_command(smaller(words, images))) == 0, words
    assert stripe.open_run("runs/probe").epochs == [1, 2]
    written = {"report.html", "strength.csv", "runs/folded/folded.onnx", "runs/folded/folded.pt2"}
    assert all(Path(name).stat().st_size > 500 for name in written)
    assert list(Path("figures").glob("cifar10-se-resnet20/stripe-*.png"))


def test_commands_of_several_processes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    path = ROOT / "figures" / "fold-se-resnet20" / "se-resnet20.pt"
    commands = starting("torchrun")
    for _, two, count, script, *rest in commands:
        words = as_command(smaller(["python", script, *rest]))
        words = [str(path) if word.endswith("last.pt") else word for word in words]
        command = [torchrun, two, count, str(ROOT / script), *words[1:]]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert len(commands) == 1
    assert [len(epoch.parts) for epoch in stripe.open_run("runs/two").manifest.epochs] == [2]


def test_targets_of_make_exist():
    targets = [words[1] for words in starting("make")]
    assert len(targets) >= 4
    dry = [shutil.which("make") or "make", "--dry-run", "--directory", str(ROOT)]
    subprocess.run([*dry, *targets], check=True, capture_output=True)
    assert subprocess.run([*dry, "none-such"], check=False, capture_output=True).returncode == 2


def test_every_command_is_one_of_those_that_run():
    known = {"python", "stripe", "torchrun", "make", "source"}
    assert {words[0] for words in COMMANDS} <= known
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text"}


def test_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().split()) < 1500
