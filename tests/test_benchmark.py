"""The benchmark script: its report, and what `coverage` says of networks, faults and bad files."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stripe import asr
from stripe.attention import create_attention

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def listed(tmp_path):
    def write(text):
        (tmp_path / "models.txt").write_text(text)
        return str(tmp_path / "models.txt")

    return write


def test_coverage_compares_every_network_and_reports(benchmark, listed, tmp_path, capsys):
    models = listed("# two networks\ntimm:lcnet_050 2\n\ntimm:test_resnet.r160_in1k 0  # none\n")
    assert benchmark.main(["coverage", "--models", models, "--json", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["network", "found", "expected", "verdict"]
    assert lines[1].split() == ["timm:lcnet_050", "2", "2", "ok"]
    assert lines[-1] == "2 of 2 networks as expected"
    report = json.loads((tmp_path / "a.json").read_text())
    assert report.keys() == {"benchmark", "device", "versions", "rows"}
    assert report["benchmark"] == "coverage"
    assert {"python", "stripe", "torch", "timm"} <= report["versions"].keys()
    assert [row["found"] for row in report["rows"]] == [2, 0]
    assert all(row["seconds"] > 0 for row in report["rows"])


def test_a_mismatch_or_a_broken_network_is_exit_code_1_and_hides_no_other(benchmark, listed, capsys):
    models = listed("timm:lcnet_050 3\ntimm:no_such_net 1\ntimm:lcnet_050 2\n")
    assert benchmark.main(["coverage", "--models", models]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["timm:lcnet_050", "2", "3", "mismatch"]
    assert "no_such_net" in lines[2]
    assert "ValueError" in lines[2]
    assert lines[3].endswith("ok")
    assert lines[-1] == "1 of 3 networks as expected"


@pytest.mark.parametrize(("text", "word"), [("timm:a 1\ntimm:b\n", "line 2"), ("timm:a x\n", "line 1"), ("#\n", "no")])
def test_bad_lists_are_one_line_and_exit_code_2(benchmark, listed, capsys, text, word):
    assert benchmark.main(["coverage", "--models", listed(text)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert word in error
    assert "\n" not in error


def test_a_list_that_is_not_there(benchmark, capsys):
    assert benchmark.main(["coverage", "--models", "no/such/file"]) == 2
    assert "no/such/file" in capsys.readouterr().err


def test_the_listed_networks_have_the_gates_their_authors_wrote(benchmark, capsys):
    assert benchmark.main(["coverage", "--models", str(Path(__file__).with_name("networks.txt"))]) == 0
    assert "55 of 55 networks as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        (
            "deploy",
            ["plain", "SE", "ASR", "deployed", "deployed, norm kept (reference)", "fused", "fused, channels-last"],
        ),
        ("train", ["plain", "SE", "ASR", "ASR as bn(x) * v"]),
    ],
)
def test_timings_in_miniature(benchmark, tmp_path, capsys, name, cases):
    words = [name, "--depth", "11", "--batch", "4", "--rounds", "2", "--json", str(tmp_path / "a.json")]
    assert benchmark.main(words) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["case"] for row in report["rows"]] == cases
    for row in report["rows"]:
        assert {"case", "seconds", "min", "max", "baseline", "ratio", "peak_mb"} <= row.keys()
        assert row["min"] <= row["seconds"] <= row["max"]
        assert row["ratio"] == pytest.approx(row["seconds"] / report["rows"][0]["seconds"])


def test_the_benchmarks_naive_asr_computes_what_the_layer_does(benchmark):
    layer = asr.layers.wrap(nn.BatchNorm2d(32), lambda: create_attention("senet", 32))
    x = torch.randn(4, 32, 5, 5)
    torch.testing.assert_close(benchmark.Scaled(layer)(x), layer(x))
    assert not torch.allclose(layer.bn(x), layer(x))
