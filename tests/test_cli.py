"""Every command end to end on a tiny set, and what it says of bad input: one line, exit code 2, nothing half done."""

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
import torch

from stripe.cli import COMMANDS, main
from stripe.data import Loader, load_images
from stripe.figures import read_log
from stripe.gates import find_gates
from stripe.models import create_model
from stripe.recorder import Recorder
from stripe.store import open_run
from tests.conftest import randomize

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train": "train",
    "collect": "collect_attention",
    "figures": "make_figures",
    "validate": "validate_asr",
    "fold": "fold",
    "report": "report",
    "demo": "demo",
}
SMALL = (
    "--dataset digits --depth 8 --block-name basicblock --train-samples 60 --train-batch 20 --epochs 2 --val-samples 10"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An SE network trained for two epochs with recording, as `train` leaves it."""
    path = tmp_path_factory.mktemp("cli") / "se"
    assert main(["train", *SMALL, "--module", "senet", "--record", "30", "--squeeze", "-c", str(path)]) == 0
    return path


def fails(capsys, *words):
    """Run a command that must fail on bad input; return its one line."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# ---- the path through the product ------------------------------------------------------------------------


def test_train_leaves_metrics_checkpoints_and_a_run(trained):
    assert list(pd.read_csv(trained / "metrics.csv")["epoch"]) == [1, 2]
    files = {path.name for path in (trained / "checkpoints").iterdir()}
    assert files - {".lock"} == {"last.pt", "best.pt", "epoch=0001.pt", "epoch=0002.pt"}
    run = open_run(trained)
    assert run.epochs == [1, 2]
    assert run.attention("layer3.0", 2).shape == (30, 64)
    assert run.squeeze("layer3.0", 2).shape == (30, 64)
    assert run.data["uri"] == "digits"
    assert set(run.data) == {"uri", "split", "size", "mean", "std"}


def test_collecting_from_the_checkpoints_repeats_what_training_recorded(trained, tmp_path, capsys):
    checkpoints = [str(trained / "checkpoints" / f"epoch=000{epoch}.pt") for epoch in (2, 1)]
    assert main(["collect", "--ckpt", *checkpoints, "--samples", "30", "--out", str(tmp_path / "run")]) == 0
    run, recorded = open_run(tmp_path / "run"), open_run(trained)
    assert run.epochs == [1, 2]
    np.testing.assert_array_equal(run.samples(1), recorded.samples(1))
    for epoch in run.epochs:
        np.testing.assert_allclose(run.attention("layer2.0", epoch), recorded.attention("layer2.0", epoch), atol=1e-6)
    assert not np.allclose(run.attention("layer2.0", 1), recorded.attention("layer2.0", 2), atol=1e-6)


def test_pandas_polars_and_duckdb_read_a_run(trained):
    folder = trained / "attention"
    expected = open_run(trained).attention("layer1.0", 2)
    frame = pd.read_parquet(folder)
    rows = frame[frame["epoch"].astype(int) == 2]["attention:layer1.0"]
    np.testing.assert_array_equal(np.stack(list(rows)), expected)
    table = (
        polars.scan_parquet(folder / "**/*.parquet", hive_partitioning=True).filter(polars.col("epoch") == 2).collect()
    )
    np.testing.assert_array_equal(np.stack(table["attention:layer1.0"].to_list()), expected)
    query = f"""select "attention:layer1.0" from read_parquet('{folder}/**/*.parquet', hive_partitioning = true)
                where epoch::int = 2"""
    np.testing.assert_array_equal(np.array([row[0] for row in duckdb.sql(query).fetchall()], np.float32), expected)


def test_figures_of_every_kind_in_every_format(trained, tmp_path, capsys):
    words = ["figures", str(trained), "--out", str(tmp_path), "--format", "png", "pdf", "svg"]
    assert main([*words, "--gates", "layer1.0", "layer3.0"]) == 0
    names = {
        "stripe-layer1.0",
        "stripe-layer3.0",
        "grid",
        "std",
        "strength",
        "strength-over-epochs",
        "drift",
        "excitation",
        "training",
        "rank-curve",
        "scores",
        "directions",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("png", "pdf", "svg")
    }
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*words, "--gates", "layer1.0", "layer3.0"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_figures_of_a_run_of_one_epoch_without_squeeze(trained, tmp_path, capsys):
    checkpoint = str(trained / "checkpoints/last.pt")
    assert main(["collect", "--ckpt", checkpoint, "--samples", "20", "--out", str(tmp_path / "run")]) == 0
    assert main(["figures", str(tmp_path / "run"), str(trained), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/run/stripe-layer1.0.png").exists()
    assert not (tmp_path / "out/run/drift.png").exists()
    assert (tmp_path / "out/se/drift.png").exists()


def test_the_reference_codes_log_is_plotted(tmp_path, capsys):
    header = "\t".join(["Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.", ""])
    rows = "\n".join(f"0.100000\t{3 - e:.6f}\t{3.1 - e:.6f}\t{10 * e:.6f}\t{9 * e:.6f}\t" for e in range(3))
    (tmp_path / "log.txt").write_text(f"{header}\n{rows}\n")
    log = read_log(tmp_path / "log.txt")
    assert list(log["val_accuracy"]) == [0, 9, 18]
    assert list(log["epoch"]) == [1, 2, 3]
    assert main(["figures", str(tmp_path / "log.txt"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/training.png").exists()
    (tmp_path / "notes.txt").write_text("a\tb\n1\t2\n")
    assert "lacks Learning Rate" in fails(capsys, "figures", tmp_path / "notes.txt", "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_stats_prints_and_writes_the_table(trained, tmp_path, capsys):
    words = ["--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]
    assert main(["stats", str(trained), *words]) == 0
    assert "strength_low" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 6
    assert table["strength"].between(0, 1).all()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows[0]["drift"] is None
    assert rows[-1]["drift"] == pytest.approx(table["drift"].iloc[-1])


def test_validate_writes_its_findings_and_can_demand_a_match(trained, tmp_path, capsys):
    words = ["validate", "--ckpt", trained / "checkpoints/last.pt", "--run", trained, "--steps", 3]
    words += ["--train-samples", 40, "--test-samples", 20, "--batch", 20, "--out", tmp_path]
    words = [str(word) for word in words]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("distance", "KL removed", "Of 3 gates", "with the stripes"))
    content = json.loads((tmp_path / "validation.json").read_text())
    assert content["accuracies"].keys() == {"attention", "learned", "stripe", "removed"}
    assert content["epoch"] == 2
    assert len(pd.read_csv(tmp_path / "validation.csv")) == 3
    assert {path.name for path in tmp_path.glob("*.png")} >= {"learned-layer1.0.png", "learned-scatter.png"}
    assert not content["matched"]
    assert main([*words, "--require-match"]) == 1


@pytest.mark.equal_bits
def test_resuming_with_recording_ends_where_an_undisturbed_training_does(trained, tmp_path, capsys):
    words = ["train", *SMALL, "--module", "senet", "--record", "30", "--squeeze", "-c", str(tmp_path)]
    short = words.copy()
    short[short.index("--epochs") + 1] = "1"
    assert main(short) == 0
    assert main([*words, "--resume", str(tmp_path / "checkpoints/last.pt")]) == 0
    assert (tmp_path / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    np.testing.assert_array_equal(
        open_run(tmp_path).attention("layer1.0", 2), open_run(trained).attention("layer1.0", 2)
    )


def test_asr_training_and_evaluation_of_a_checkpoint(tmp_path, capsys):
    words = ["--module", "senet", "--use-asr", "--psi-init", "normal", "--psi-no-decay", "--scheduler", "cosine"]
    assert main(["train", *SMALL, *words, "-c", str(tmp_path / "asr"), "--json", str(tmp_path / "a.json")]) == 0
    checkpoint = str(tmp_path / "asr/checkpoints/last.pt")
    assert main(["train", "-e", "--resume", checkpoint, "--json", str(tmp_path / "b.json")]) == 0
    trained, tested = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert tested["accuracy"] == trained["accuracy"]
    assert tested["loss"] == pytest.approx(trained["loss"], rel=1e-5)


def test_directories_are_named_as_the_reference_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", *SMALL, "--epochs", "1", "--module", "eca", "--use-asr", "--use-both"]
    assert main(words) == 0
    assert main([*words, "--use-timestamp"]) == 0
    names = sorted(path.name for path in Path("checkpoints").iterdir())
    assert names[0] == "digits-resnet8-eca-asr-both"
    assert names[1].startswith("digits-resnet8-eca-asr-both-20")


def test_demo_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS["demo"], "NETWORK", {"depth": 8, "block": "basicblock", "module": "senet"})
    words = ["--epochs", "1", "--asr-epochs", "1", "--steps", "2", "--train-samples", "80"]
    words += ["--out", tmp_path / "demo", "--figures", tmp_path / "figures", "--json", tmp_path / "demo.json"]
    for folder in ("demo/checkpoints", "demo-asr"):  # an earlier demo, which is replaced
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "demo/metrics.csv").write_text("epoch\n")
    assert main(["demo", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("strength", "verdict", "SE", "ASR deployed", "attention removed", "images/s", "In short", "cv:")
    )
    summary = json.loads((tmp_path / "demo.json").read_text())
    assert len(summary["gates"]) == 3
    assert summary["accuracy"].keys() == {"SE", "ASR deployed", "attention removed"}
    assert (tmp_path / "figures/stripe-layer1.0.png").exists()


# ---- help ------------------------------------------------------------------------------------------------


def test_every_command_has_its_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert f"example: stripe {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: stripe" in capsys.readouterr().out


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_script_is_its_command(command):
    script = ROOT / "scripts" / f"{SCRIPTS[command]}.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert COMMANDS[command].SUMMARY.split(",")[0] in " ".join(result.stdout.split())
    assert f"example: {script.name} " in " ".join(result.stdout.split())


# ---- bad input -------------------------------------------------------------------------------------------


def test_checkpoints_that_are_none(trained, tmp_path, capsys):
    whole = (trained / "checkpoints/last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.pt").write_text("hello")
    out = tmp_path / "run"
    for name, words in {"absent.pt": "not found", "cut.pt": "not a readable", "foreign.pt": "foreign.pt"}.items():
        assert words in fails(capsys, "collect", "--ckpt", tmp_path / name, "--out", out)
    assert not out.exists()


def test_a_network_without_a_gate(tmp_path, capsys):
    torch.save(create_model("resnet", depth=11).state_dict(), tmp_path / "plain.pt")
    assert "no gate" in fails(
        capsys,
        "collect",
        "--ckpt",
        tmp_path / "plain.pt",
        "--dataset",
        "digits",
        "--samples",
        4,
        "--out",
        tmp_path / "run",
    )
    assert not (tmp_path / "run").exists()
    words = ["train", *SMALL, "--record", "5", "-c", tmp_path / "a"]
    assert "no gate" in fails(capsys, *words)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataset", "mnist"], "digits"),
        (["--record-split", "validation", "--record", "5", "--module", "senet"], "test"),
        (["--module", "sent"], "senet"),
        (["--arch", "vgg"], "resnet"),
        (["--block-name", "wide"], "bottleneck"),
        (["--scheduler", "linear"], "cosine"),
        (["--amp", "int8"], "bf16"),
        (["--train-samples", "5000"], "1437"),
        (["--train-samples", "1"], "1"),
        (["--record", "999", "--module", "senet"], "360"),
        (["--dataset", "imagefolder:/no/such/folder"], "/no/such/folder"),
        (["-e"], "--resume"),
        (["--resume", "no/such.pt"], "no/such.pt"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(words, expected, tmp_path, capsys):
    out = tmp_path / "run"
    assert expected in fails(capsys, "train", *SMALL, "-c", out, *words)
    assert not (out / "metrics.csv").exists()


def test_a_training_or_an_epoch_that_is_there_already(trained, tmp_path, capsys):
    before = (trained / "metrics.csv").read_bytes()
    assert "resume" in fails(capsys, "train", *SMALL, "--module", "senet", "-c", trained)
    assert (trained / "metrics.csv").read_bytes() == before
    words = ["collect", "--ckpt", trained / "checkpoints/last.pt", "--samples", 20, "--out", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0
    assert "--overwrite" in fails(capsys, *words)
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0
    last, second = trained / "checkpoints/last.pt", trained / "checkpoints/epoch=0002.pt"
    assert "both epoch 2" in fails(capsys, "collect", "--ckpt", last, second, "--out", tmp_path / "two")


def test_runs_that_are_none(tmp_path, capsys):
    assert "absent" in fails(capsys, "stats", tmp_path / "absent")
    assert "not a run" in fails(capsys, "figures", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_gate_or_epoch_of_a_run(trained, tmp_path, capsys):
    assert "layer1.0" in fails(capsys, "figures", trained, "--gates", "layer9", "--out", tmp_path / "out")
    assert "epoch 7" in fails(capsys, "figures", trained, "--epoch", 7, "--out", tmp_path / "out")


def test_a_full_disk_while_recording(trained, tmp_path):
    """A file size limit in a child process stands for a full disk: the write fails, one line comes, no epoch stays."""
    code = (
        "import resource, signal, sys; from stripe.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["collect", "--ckpt", trained / "checkpoints/last.pt", "--samples", "300", "--out", tmp_path / "run"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert open_run(tmp_path / "run").epochs == []


def test_nan_attention_is_named_in_the_table(tmp_path, capsys):
    model = randomize(create_model("resnet", depth=11, module="senet"))
    loader = Loader(load_images("digits", "test", samples=10), 5)
    gates = find_gates(model, next(iter(loader))[0])
    with torch.no_grad():
        model.layer2[0].attention_module.fc2.bias[3] = float("nan")
    run = str(tmp_path / "run")
    with Recorder(model, gates, run) as recorder:
        recorder.record(loader)
    capsys.readouterr()
    assert main(["stats", run, "--csv", str(tmp_path / "a.csv")]) == 0
    flags = pd.read_csv(tmp_path / "a.csv", keep_default_na=False).set_index("gate")["flags"]
    assert "nonfinite" in flags["layer2.0"]
    assert "nonfinite" not in flags["layer1.0"]
    assert "nonfinite" in capsys.readouterr().out


def test_interruption_is_exit_code_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["stats"], "run", interrupted)
    assert main(["stats", "run"]) == 130
    assert "kept" in capsys.readouterr().err
