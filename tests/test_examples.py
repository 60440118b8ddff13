"""The run that ships with the package, and the script that made it of a larger one."""

import tomllib
from pathlib import Path

import make_example
import numpy as np
import pytest

import stripe
from stripe.gate import Gate
from stripe.store import RunWriter

ROOT = Path(__file__).parents[1]
NAME = "cifar10-se-resnet20"
GATES = [Gate("a.se", 8), Gate("b.se", 16), Gate("c.se", 4)]
EPOCHS, SAMPLES = (1, 2, 5), 60


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of three gates, three epochs and sixty samples, attention and squeeze, with training curves."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("runs") / "whole"
    about = {"model": {"arch": "resnet"}, "data": {"uri": "digits"}, "seeds": {"manualSeed": 3}}
    with RunWriter(path, gates=GATES, squeeze=True, **about) as writer:
        for epoch in EPOCHS:
            with writer.epoch(epoch) as rows:
                stripe_of = {gate.name: rng.random(gate.channels) for gate in GATES}
                attention = {name: s + 0.1 * rng.random((SAMPLES, len(s))) for name, s in stripe_of.items()}
                squeeze = {name: 1 - values for name, values in attention.items()}
                rows.append(np.arange(100, 100 + SAMPLES), np.arange(SAMPLES) % 10, attention, squeeze)
    (path / "metrics.csv").write_text("epoch\n1\n")
    return path


def thinned(*words):
    """Run the script's command; return its exit code."""
    return make_example.main([str(word) for word in words])


def test_the_example_holds_what_notebooks_and_gallery_need():
    run = stripe.load_example(NAME)
    assert len(run.gates) >= 3
    assert len(run.epochs) >= 5
    assert run.manifest.squeeze
    assert run.model["module"] == "senet"
    for epoch in run.epochs:
        assert len(run.samples(epoch)) == 500
        assert set(run.labels(epoch)) == set(range(10))
    table = stripe.stats.summarize(run, epochs=run.epochs[-1:])
    assert table["strength"].between(0.05, 0.999).all()
    assert (table["flags"] == "").all()


def test_the_example_is_small_and_holds_no_image():
    files = [
        file for file in Path(stripe.load_example(NAME).path).rglob("*") if file.is_file() and file.name != ".lock"
    ]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert {file.suffix for file in files} == {".csv", ".json", ".parquet"}
    columns = stripe.load_example(NAME).manifest.arrow_schema.names
    assert {name.partition(":")[0] for name in columns} == {"sample", "label", "attention", "squeeze"}


def test_the_example_is_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["stripe"]
    shipped = {file for pattern in patterns for file in (ROOT / "stripe").glob(pattern)}
    files = {file for file in (ROOT / "stripe/examples" / NAME).rglob("*") if file.is_file() and file.name != ".lock"}
    assert len(files) >= 7
    assert files <= shipped
    assert not files <= {file for file in shipped if file.suffix == ".json"}


def test_an_unknown_example_lists_the_names():
    with pytest.raises(ValueError, match=rf"no example 'cifar100'; expected one of .*{NAME}"):
        stripe.load_example("cifar100")
    with pytest.raises(ValueError, match="no example '../store'"):
        stripe.load_example("../store")


def test_thinning_keeps_the_chosen_values(recorded, tmp_path):
    words = ["--epochs", 1, 5, "--gates", "c.se", "a.se", "--samples", 20, "--out", tmp_path / "small"]
    assert thinned(recorded, *words) == 0
    whole, small = stripe.open_run(recorded), stripe.open_run(tmp_path / "small")
    assert small.epochs == [1, 5]
    assert [gate.name for gate in small.gates] == ["a.se", "c.se"]
    assert (small.model, small.data, small.manifest.seeds) == (whole.model, whole.data, whole.manifest.seeds)
    ids = small.samples(5)
    assert len(ids) == 20
    assert (ids[0], ids[-1]) == (100, 100 + SAMPLES - 1), "spread over the whole"
    for gate, epoch in (("a.se", 1), ("c.se", 5)):
        np.testing.assert_array_equal(small.attention(gate, epoch), whole.attention(gate, epoch)[ids - 100])
        np.testing.assert_array_equal(small.squeeze(gate, epoch), whole.squeeze(gate, epoch)[ids - 100])
    assert not np.array_equal(small.attention("a.se", 1), small.attention("a.se", 5))
    np.testing.assert_array_equal(small.labels(5), (ids - 100) % 10)
    assert (tmp_path / "small/metrics.csv").read_text() == "epoch\n1\n"


def test_float16_leaves_strengths_as_they_are(recorded, tmp_path):
    assert thinned(recorded, "--dtype", "float16", "--out", tmp_path / "half") == 0
    whole, half = (stripe.stats.summarize(stripe.open_run(path))["strength"] for path in (recorded, tmp_path / "half"))
    assert not whole.equals(half)
    np.testing.assert_allclose(half, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", 3], "lacks epoch 3; it has [1, 2, 5]"),
        (["--gates", "d.se"], "lacks d.se; it has a.se, b.se, c.se"),
        (["--dtype", "int8"], "dtype 'int8'"),
    ],
)
def test_thinning_refuses_in_one_line_and_writes_nothing(recorded, tmp_path, capsys, words, message):
    assert thinned(recorded, *words, "--out", tmp_path / "small") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "small/run.json").exists()


def test_thinning_never_writes_into_what_is_there(recorded, tmp_path, capsys):
    assert thinned(recorded, "--out", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
