"""What every command has in common: which data it takes, what it says it used, and how it meets a terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import stripe
from stripe.cli import COMMANDS, SHELLS, build_parser, main, options
from stripe.models import create_model
from stripe.stats import COLUMNS, SUMMARY
from tests.conftest import randomize
from tests.test_cli import SMALL, fails

EXAMPLE = stripe.load_example("cifar10-se-resnet20").path
NETWORK = {"arch": "resnet", "depth": 11, "module": "senet"}


def checkpoint(path, **data):
    """Write an SE network that says of its data what is given."""
    content = {"state_dict": randomize(create_model(**NETWORK)).state_dict()}
    torch.save(content | {"description": {"model": NETWORK, "data": data}}, path)
    return path


# ---- which data ----


def test_a_checkpoints_own_data_set_is_taken_and_said(tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", uri="digits")
    assert main(["collect", "--ckpt", str(path), "--samples", "4", "--out", str(tmp_path / "run")]) == 0
    assert f"network {path}; data digits, split test, 4 images" in capsys.readouterr().out
    assert stripe.open_run(tmp_path / "run").data["uri"] == "digits"


@pytest.mark.parametrize(
    ("data", "expected"),
    [({}, "does not say which data set"), ({"uri": 7}, "does not say"), ({"uri": "hf:someone/images"}, "--dataset hf:"),
     ({"uri": "hf:../no/such/folder"}, "'../no/such/folder'"), ({"uri": "imagefolder:none"}, "--dataset imagefolder:")],
)  # fmt: skip
def test_without_a_data_set_of_its_own_a_command_asks_and_fetches_nothing(tmp_path, capsys, data, expected):
    path, out = checkpoint(tmp_path / "a.pt", **data), tmp_path / "out"
    for words in (["collect", "--samples", 4], ["fold"], ["validate", "--run", EXAMPLE]):
        line = fails(capsys, words[0], "--ckpt", path, *words[1:], "--out", out)
        assert "--dataset" in line
        assert expected in line
    assert not out.exists()
    words = ["collect", "--ckpt", path, "--dataset", "digits", "--samples", 4, "--out", out]
    assert main([str(word) for word in words]) == 0


def test_gates_are_listed_without_any_data_set(tmp_path, capsys):
    listed = []
    for data in ({}, {"uri": "digits"}):
        path = checkpoint(tmp_path / "a.pt", **data)
        assert main(["collect", "--ckpt", str(path), "--size", "32", "--list-gates"]) == 0
        listed.append(capsys.readouterr().out)
    assert "3 gates" in listed[0]
    assert listed[0] == listed[1]


def test_training_without_words_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "train")
    assert "--dataset" in line
    example = line.partition("stripe train ")[2].split()
    build_parser().parse_args(["train", *example])
    assert not list(tmp_path.iterdir())


def test_training_prints_what_it_uses_and_how_well_it_does(tmp_path, capsys):
    assert main(["train", *SMALL, "--module", "senet", "-c", str(tmp_path)]) == 0
    first, *epochs, _, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("network resnet, depth 8, ")
    assert "digits, split train, 50 images; digits, split train, 10 images; digits, split test, 360 images" in first
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert len(epochs) == len(metrics) == 2
    for line, accuracy in zip(epochs, metrics["val_accuracy"], strict=True):
        assert line.endswith(f"validation accuracy {accuracy:.2f} %")


def test_a_training_that_goes_on_takes_the_data_set_it_began_with(tmp_path, capsys):
    assert main(["train", *SMALL, "-c", str(tmp_path)]) == 0
    words = ["train", *SMALL[2:], "-c", str(tmp_path), "--resume", str(tmp_path / "checkpoints/last.pt")]
    words[words.index("--epochs") + 1] = "3"
    assert main(words) == 0
    assert "data digits" in capsys.readouterr().out


# ---- help, version, completion ----


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_bare_stripe_shows_its_help():
    for words in ([], ["--help"]):
        shown = python("-m", "stripe", *words)
        assert shown.returncode == 0
        assert shown.stderr == ""
        assert shown.stdout.startswith("usage: stripe ")
        assert all(f"\n    {name} " in shown.stdout for name in COMMANDS)


def test_the_version_is_told_by_every_command(capsys):
    for words in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"stripe {stripe.__version__}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_a_script_of_that_shell(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--completion", shell])
    assert ended.value.code == 0
    assert "moments" in capsys.readouterr().out


def test_bash_completes_commands_and_choices(tmp_path):
    (tmp_path / "stripe.bash").write_text(python("-m", "stripe", "--completion", "bash").stdout)
    for line, expected in {"stripe fi": "figures", "stripe validate --protocol se": "separate"}.items():
        words = line.split()
        code = (
            f"source {tmp_path}/stripe.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_stripe; "
            'echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("validate", "{same,both,separate}"),
        ("train", "{step,cosine,onecycle}"),
        ("train", "{no,bf16,fp16}"),
        ("train", "{bottleneck,basicblock}"),
        ("fold", "{single,greedy,foretold}"),
        ("collect", "{float32,float16}"),
        ("figures", "{png,pdf,svg}"),
    ],
)
def test_help_shows_what_can_be_chosen(command, shown, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert shown in capsys.readouterr().out


def test_the_choices_are_those_that_python_takes(tmp_path, capsys):
    """A word that is none is refused by the parser, and the same word by the rooms: neither knows more."""
    from stripe.asr import protocols
    from stripe.cli.validate import PROTOCOLS
    from stripe.models.resnet import BLOCKS

    assert set(build_parser().parse_args(["train"]).block_name.split()) <= set(BLOCKS)
    assert all(callable(getattr(protocols, name)) for name in PROTOCOLS)
    line = fails(capsys, "train", "--block-name", "wide")
    assert all(name in line for name in BLOCKS)


# ---- files and devices ----


def test_a_dash_prints_the_figures_alone(capsys):
    assert main(["stats", EXAMPLE, "--epoch", "20", "--json", "-"]) == 0
    out, told = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [row["gate"] for row in rows][:2] == ["layer1.0", "layer2.0"]
    assert "layer1.0" in told
    assert not Path("-").exists()


def test_home_is_where_a_tilde_points(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "a.pt", uri="digits")
    assert main(["collect", "--ckpt=~/a.pt", "--samples=4", "--out=~/kept/run"]) == 0
    assert main(["stats", "~/kept/run", "--csv=~/kept/a.csv", "--json=~/kept/a.json"]) == 0
    assert main(["figures", "~/kept/run", "--gates", "layer1*", "--out=~/kept/figures"]) == 0
    assert {each.name for each in (tmp_path / "kept").iterdir()} == {"run", "a.csv", "a.json", "figures"}
    assert stripe.open_run("~/kept/run").epochs == [0]
    assert not (tmp_path / "~").exists()
    assert path.exists()


def test_devices(tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", uri="digits")
    words = ["collect", "--ckpt", path, "--samples", 4, "--out", tmp_path / "run", "--device"]
    assert "expected cpu" in fails(capsys, *words, "gpu")
    if not torch.accelerator.is_available():
        assert "this machine has the cpu alone" in fails(capsys, *words, "cuda")
    assert main([str(word) for word in [*words, "cpu"]]) == 0


def test_bars_are_drawn_on_terminals_alone(monkeypatch, tmp_path, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["train", *SMALL, "-c", str(tmp_path / str(drawn))]) == 0
        assert ("images/s" in stream.getvalue()) is drawn


# ---- tables ----


def test_stats_takes_gates_and_epochs(capsys, tmp_path):
    words = ["stats", EXAMPLE, "--csv", str(tmp_path / "a.csv")]
    assert main(words) == 0
    whole = pd.read_csv(tmp_path / "a.csv")
    assert main([*words, "--gates", "layer1.*", "layer3.1", "--epoch", "2", "20"]) == 0
    some = pd.read_csv(tmp_path / "a.csv")
    assert list(some["gate"].unique()) == ["layer1.0", "layer3.1"]
    chosen = whole["gate"].isin(some["gate"].unique()) & whole["epoch"].isin([2, 20])
    pd.testing.assert_frame_equal(some, whole[chosen].reset_index(drop=True))
    assert "layer1.0" in fails(capsys, "stats", EXAMPLE, "--gates", "layer9*")
    assert "no epoch 7" in fails(capsys, "stats", EXAMPLE, "--epoch", 7)


def test_tables_explain_their_columns(capsys):
    assert main(["stats", EXAMPLE, "--epoch", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"run {EXAMPLE}; network resnet, depth 20, ")
    assert printed[0].endswith("split test")
    assert {line.split()[0] for line in printed[-len(SUMMARY) :] if not line.startswith(" ")} <= set(SUMMARY)
    legend = options.legend(COLUMNS)
    assert all(f"{name} " in legend for name in SUMMARY)
    assert max(map(len, legend.splitlines())) <= options.LINE
