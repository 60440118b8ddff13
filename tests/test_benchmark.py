"""The benchmark script: every benchmark in miniature, its report, the peers it holds, and what it says of bad input."""

import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stripe import asr
from stripe.attention import create_attention
from stripe.data import load_images
from stripe.store import open_run

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
sys.path.append(str(SCRIPT.parent))

from benchmarks import collect, deploy, fold, reference, runs, stats, tables, timing, train  # noqa: E402
from studies.table import read_text  # noqa: E402


@pytest.fixture(scope="module")
def benchmark(forks):  # whose cases are forked as well
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
    models = listed("# two networks\ntimm:lcnet_050 2 SqueezeExcite\n\ntimm:test_resnet.r160_in1k 0  # none\n")
    assert benchmark.main(["coverage", "--models", models, "--json", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["network", "found", "expected", "counted", "verdict"]
    assert lines[1].split() == ["timm:lcnet_050", "2", "2", "2", "ok"]
    assert lines[3] == "2 of 2 networks as expected"
    report = json.loads((tmp_path / "a.json").read_text())
    assert report.keys() == {"benchmark", "arguments", "device", "versions", "rows"}
    assert report["benchmark"] == "coverage"
    assert {"python", "stripe-observation", "torch", "timm"} <= report["versions"].keys()
    assert [row["found"] for row in report["rows"]] == [2, 0]
    assert all(row["seconds"] > 0 for row in report["rows"])
    table = tables.table(report).drop(columns=["config", "versions", "machine", "version"])
    [row] = table.astype(str).to_numpy().tolist()
    assert row == ["timm", "2", "1", "2", "2", "2 of 2"]  # networks, without a gate, gates, counted, as expected


def test_a_mismatch_or_a_broken_network_is_exit_code_1_and_hides_no_other(benchmark, listed, capsys):
    models = listed("timm:lcnet_050 3\ntimm:no_such_net 1\ntimm:lcnet_050 2\ntimm:lcnet_050 2 ConvBnAct\n")
    assert benchmark.main(["coverage", "--models", models]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["timm:lcnet_050", "2", "3", "-", "mismatch"]
    assert "no_such_net" in lines[2]
    assert "ValueError" in lines[2]
    assert lines[3].endswith("ok")
    assert lines[4].endswith("mismatch")  # the classes named are called another number of times
    assert lines[5] == "1 of 4 networks as expected"


@pytest.mark.parametrize(
    ("text", "word"),
    [("timm:a 1\ntimm:b\n", "line 2"), ("other:a 1\n", "line 1"), ("timm:a x\n", "line 1"), ("#\n", "no")],
)
def test_bad_lists_are_one_line_and_exit_code_2(benchmark, listed, capsys, text, word):
    assert benchmark.main(["coverage", "--models", listed(text)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert word in error
    assert "\n" not in error


def test_a_list_that_is_not_there(benchmark, capsys):
    assert benchmark.main(["coverage", "--models", "no/such/file"]) == 2
    assert "no/such/file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_listed_networks_have_the_gates_their_authors_wrote(benchmark, capsys):
    assert benchmark.main(["coverage", "--models", str(Path(__file__).with_name("networks.txt"))]) == 0
    said = capsys.readouterr().out
    found, tried = map(int, re.search(r"^(\d+) of (\d+) networks as expected", said, re.MULTILINE).groups())
    assert found == tried >= 79  # those of libraries that are not installed are skipped


def test_networks_of_a_library_that_is_not_installed_are_skipped(benchmark, listed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "monai", None)
    assert benchmark.main(["coverage", "--models", listed("monai:UNet/3 0\ntimm:test_resnet.r160_in1k 0\n")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1:] == ["-", "0", "-", "skipped:", "monai", "is", "not", "installed"]
    assert lines[3] == "1 of 1 networks as expected, 1 skipped"


def test_other_libraries_networks_are_called_by_the_name_of_their_input(benchmark, listed, capsys):
    text = "transformers:RegNet 22 RegNetSELayer\ntransformers:GPT2 0\ntorchvision:lraspp_mobilenet_v3_large 9\n"
    assert benchmark.main(["coverage", "--models", listed(text)]) == 0
    assert "3 of 3 networks as expected" in capsys.readouterr().out


def test_a_benchmark_that_is_none(benchmark, capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main(["deply"])
    assert left.value.code == 2
    assert "invalid choice: 'deply'" in capsys.readouterr().err


def test_help_lists_every_benchmark_without_torch(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in benchmark.BENCHMARKS)
    modules = {path.stem for path in (SCRIPT.parent / "benchmarks").glob("*.py")}
    assert benchmark.BENCHMARKS.keys() <= modules
    assert modules - benchmark.BENCHMARKS.keys() == {
        "__init__",
        "libraries",
        "networks",
        "reference",
        "runs",
        "tables",
        "timing",
    }


# ---- in miniature ------------------------------------------------------------------------------------------

SMALL = ["--depth", "11", "--rounds", "2"]
FORMS = [*deploy.FORMS, "fused, onnxruntime"]
TRAINED = ["SE, reference", "SE, stripe", "ASR, reference", "ASR, stripe"]
FOLDED = [f"{name}, {how}" for how in ("eager", "channels-last", "onnxruntime") for name in ("attention", "folded")]
COLLECTED = ["forward", collect.CONTROL, "stripe", *collect.PEERS]
READERS = ["checked read", "stripe", "stripe, rank", "stripe, rows", *stats.PEERS, "stripe, 3 times the samples"]
SLOW = pytest.mark.slow
MINIATURES = [
    pytest.param(
        "torchlens", ["collect", *SMALL, "--samples", "7", "--batch", "4", "--torchlens"], COLLECTED, marks=SLOW
    ),
    ("collect", ["collect", *SMALL, "--samples", "7", "--batch", "4"], COLLECTED[:-1]),
    (
        "squeeze",
        ["collect", *SMALL, "--samples", "7", "--batch", "4", "--squeeze"],
        ["forward", collect.CONTROL, "stripe, squeeze"],
    ),
    ("stats", ["stats", "--epochs", "2", "--samples", "30", "--times", "3", "--gates", "3"], ["read", *READERS]),
    ("train", ["train", *SMALL, "--dataset", "digits", "--batch", "8", "--samples", "16", "--workers", "0"], TRAINED),
    pytest.param("deploy", ["deploy", *SMALL, "--batch", "4"], FORMS, marks=SLOW),
    ("memory", ["memory", *SMALL, "--batch", "4"], ["plain", "plain, kept", "SE", "SE, kept"]),
    ("scaling", ["scaling", "--samples", "30", "60", "--gates", "3", "--rounds", "1"], ["stats, 30", "stats, 60"]),
    pytest.param("fold-mobilenet", ["fold", "--size", "64", "--batch", "64", "--rounds", "2"], FOLDED, marks=SLOW),
    pytest.param("startup", ["startup", "--rounds", "1"], ["python -c pass", "import stripe"], marks=SLOW),
]
COLUMNS = {"case", "seconds", "min", "max", "baseline", "ratio", "ratio_min", "ratio_max", "peak_mb"}


@pytest.mark.parametrize(("record", "words", "cases"), MINIATURES)
def test_in_miniature(benchmark, tmp_path, record, words, cases):
    """Run it; the table that it writes is the one that follows from its record."""
    path, shown = tmp_path / f"{record}.json", tmp_path / f"{record}.csv"
    assert benchmark.main([*words, "--json", str(path), "--csv", str(shown)]) == 0
    report = json.loads(path.read_text())
    assert report.keys() == {"benchmark", "arguments", "device", "versions", "rows"}
    assert [report["benchmark"], *report["arguments"]] == words
    rows = {row["case"]: row for row in report["rows"]}
    assert list(rows)[: len(cases)] == cases
    assert len(rows) == len(report["rows"])
    for row in report["rows"]:
        assert row.keys() >= COLUMNS
        assert row["min"] <= row["seconds"] <= row["max"]
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        stepped = report["benchmark"] == "collect" and row["case"] != "forward"  # may pay less than nothing, by chance
        assert stepped or min(row["min"], row["ratio_min"]) > 0
        assert row["case"] != row["baseline"] or row["ratio_min"] == row["ratio_max"] == 1
        assert record == "startup" or row["peak_mb"] > 10
    table = read_text(shown)
    assert shown.read_text() == tables.tables(tmp_path)[shown.name].to_csv(index=False)
    assert list(table["case"]) == list(rows)
    assert set(table["config"]) == {shlex.join(words[1:])}
    for case, ratio, times in zip(table["case"], table["times as long"], table["seconds"], strict=True):
        assert float(ratio) == pytest.approx(rows[case]["ratio"], rel=0.01)
        assert float(times) == pytest.approx(rows[case]["seconds"], rel=0.01)


def test_sizes_and_rates_in_miniature(benchmark, tmp_path):
    words = ["sizing", "--samples", "100", "--images", "2", "--networks", "SE-ResNet-164"]
    assert benchmark.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    rows = {row["case"].partition(", ")[2]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == ["recording", "writing samples", "writing moments", *(f"stats{word}" for word in STATS)]
    assert all(row.keys() >= COLUMNS and row["seconds"] > 0 for row in rows.values())
    assert 2 * 8064 < rows["writing samples"]["bytes"] < 4 * 8064 + 5000  # zstd finds no more than half in noise
    table = tables.tables(tmp_path)["a.csv"].set_index("case")
    assert set(table["channels"]) == {"8,064"}
    for name, row in rows.items():
        shown = table.loc[f"SE-ResNet-164, {name}"]
        assert float(shown["core hours a million samples"]) == pytest.approx(row["seconds"] * 1e6 / 3600, abs=0.005)
        assert float(shown["samples/s a core"].replace(",", "")) == pytest.approx(1 / row["seconds"], abs=0.5)


STATS = ("", " --rank")


def test_what_was_recorded_wrongly_is_exit_code_1(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(collect, "PEERS", {"feature extractor + pandas": collect._extractor})
    read = collect._recorded

    def changed(name, path):
        found = read(name, path)
        return found if name == "stripe" else {gate: values + 0.01 for gate, values in found.items()}

    monkeypatch.setattr(collect, "_recorded", changed)
    assert benchmark.main(["collect", *SMALL, "--samples", "4", "--batch", "4"]) == 1
    assert "difference of the recorded values: 0.01, expected at most 1e-05: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stats", "--gates", "4"], "--gates 4: expected a multiple of three"),
        (["collect", "--depth", "12"], "depth 12 does not fit bottleneck"),
        (["train", "--dataset", "no", "--depth", "11"], "unknown data URI 'no'"),
    ],
)
def test_bad_input_is_one_line(benchmark, capsys, words, message):
    assert benchmark.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


# ---- timing ------------------------------------------------------------------------------------------------


def counting():
    """Count its own calls."""
    calls = []

    def run():
        calls.append(None)
        return len(calls), os.getpid()

    return run


def holding(megabytes):
    return partial(hold, megabytes)


def hold(megabytes):
    bytes(bytearray(megabytes * 2**20)).count(b"1")


def asking():
    return multiprocessing.get_start_method


def failing():
    raise ValueError("no such thing")


def dying():
    return partial(os._exit, 3)


def test_cases_run_in_processes_of_their_own_once_a_round_and_once_before():
    found = timing.measure({"a": counting, "b": counting}, 3)
    assert [timed.returned[0] for timed in found.values()] == [4, 4]
    assert len({os.getpid(), *(timed.returned[1] for timed in found.values())}) == 3
    assert all(len(timed.seconds) == 3 for timed in found.values())


def test_what_a_case_starts_is_started_as_python_does_by_default():
    default = subprocess.check_output(
        [sys.executable, "-c", "from multiprocessing import *; print(get_start_method())"]
    )
    assert timing.measure({"a": asking}, 0)["a"].returned == default.decode().strip()


def test_peak_memory_is_that_of_the_case():
    found = timing.measure({"large": partial(holding, 200), "small": partial(holding, 1)}, 1)
    assert 350 < found["large"].peak_mb - found["small"].peak_mb < 450  # the array and its copy


@pytest.mark.parametrize(
    ("case", "message"), [(failing, "ValueError: no such thing"), (dying, "its process died, perhaps for want")]
)
def test_a_case_that_fails_is_named(case, message):
    with pytest.raises(ChildProcessError, match=f"case 'b' failed: {message}"):
        timing.measure({"a": counting, "b": case}, 1)


def test_a_case_pays_its_steps_and_what_bare_takes_longer_after_one(monkeypatch):
    done = []
    lasts = {"bare": iter([5, 7, 6, 6, 9, 6]), "a": iter([10, 20, 30]), "b": iter([100, 200])}

    def seconds(call):
        call()
        return next(lasts[done[-1]])

    def steps(name, count):
        for _ in range(count):
            done.append(name)
            yield
        done.append(name)  # closing is a step too

    monkeypatch.setattr(timing, "_seconds", seconds)
    cases = {"a": partial(steps, "a", 2), "b": partial(steps, "b", 1)}
    mean, spent = timing.step_by_step(partial(done.append, "bare"), cases)
    assert done == ["bare", "bare", "a", "bare", "b", "bare", "a", "bare", "b", "bare", "a", "bare"]
    assert mean == 39 / 6
    assert spent == {"a": 60 + (7 - 5) + (6 - 6) + (6 - 9), "b": 300 + (6 - 7) + (9 - 6)}


def test_the_report_holds_medians_and_those_of_the_rounds_ratios():
    found = {"a": timing.Timing([1.0, 2.0, 6.0], 10.0, None), "b": timing.Timing([3.0, 4.0, 9.0], None, None)}
    a, b = timing.report(found, "a", images=8)
    assert (a["seconds"], a["min"], a["max"], a["ratio"], a["peak_mb"], a["images_per_second"]) == (2, 1, 6, 1, 10, 4)
    assert (b["seconds"], b["min"], b["max"], b["ratio"], b["peak_mb"], b["baseline"]) == (4, 3, 9, 2, None, "a")
    assert (b["ratio_min"], b["ratio_max"]) == (1.5, 3)
    uneven = timing.Timing([4.0, 2.0, 6.0], None, None)  # medians 4 and 2, but the rounds are 4, 1 and 1 times as long
    assert uneven.ratio(found["a"]) == 1
    assert uneven.difference(found["a"]) == 0


def test_a_check_that_is_not_a_number_is_wrong():
    assert timing.check("difference", 0.1, 0.1)
    assert not timing.check("difference", 0.2, 0.1)
    assert not timing.check("difference", float("nan"), 0.1)


# ---- peers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return path, runs.write_run(path, 2, 40, [4, 3])


@pytest.mark.parametrize("peer", ["stripe", *stats.PEERS])
def test_every_peer_takes_the_same_means_and_variances(written, peer):
    path, files = written
    columns = ["attention:gate0", "attention:gate1"]
    found = stats._stripe(path) if peer == "stripe" else stats.PEERS[peer](files, columns)
    run = open_run(path)
    values = [run.attention(gate.name, epoch).astype(np.float64) for epoch in (0, 1) for gate in run.gates]
    np.testing.assert_allclose(found[0], np.concatenate([each.mean(0) for each in values]), rtol=1e-5)
    np.testing.assert_allclose(found[1], np.concatenate([each.var(0, ddof=1) for each in values]), rtol=1e-4)
    assert not np.allclose(found[1], np.concatenate([each.var(0) for each in values]), rtol=1e-3)  # ddof matters


def test_the_reference_normalises_as_the_loader_does():
    images = load_images("digits", "train", samples=20, mean=(0.3,) * 3, std=(0.2,) * 3)
    images.images[:] = 200
    picture, label = reference.Pictures(images)[3]
    assert label == images.labels[3]
    torch.testing.assert_close(picture[:, 8:24, 8:24], torch.full((3, 16, 16), (200 / 255 - 0.3) / 0.2))


def test_the_reference_recipe_trains():
    images = load_images("digits", "train", samples=64, mean=(0.3,) * 3, std=(0.2,) * 3)
    network = reference.as_written(train.build("ASR", 11, "senet"))
    assert any(isinstance(module, reference.Scaled) for module in network.modules())
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    reference.train_as_written(network, reference.loader_as_written(images, 32, 0), 1, 0.1, "cpu")
    still = [name for name, weight in network.named_parameters() if torch.equal(weight, before[name])]
    assert still == []


def test_the_benchmarks_naive_asr_computes_what_the_layer_does():
    layer = asr.layers.wrap(nn.BatchNorm2d(32), lambda: create_attention("senet", 32))
    x = torch.randn(4, 32, 5, 5)
    torch.testing.assert_close(reference.Scaled(layer)(x), layer(x))
    assert not torch.allclose(layer.bn(x), layer(x))


def test_the_folded_network_of_the_benchmark_has_no_gate():
    folded, folding = fold._fold("torchvision:mobilenet_v3_small", 64)
    assert len(folding.table) == 9
    assert 0 < folding.error < fold.TOLERANCE
