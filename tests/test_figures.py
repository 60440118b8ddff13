"""`make_figures.py`: the gallery of the example run, and what lies beside a run's attention."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import stripe
from stripe.cli import main
from stripe.cli.figures import FORMATS
from stripe.examples import EXAMPLE_RUN
from stripe.figures import METADATA, each_figure, file_name
from stripe.gate import Gate
from stripe.store import RunWriter
from tests.conftest import shown_by_todays_matplotlib

LEARNED = 0.5
VARIANTS = [
    {"folded": 0, "weighting": "none", "recovery": "none", "test": 90.0},
    {"folded": 1, "weighting": "mean", "recovery": "none", "test": 88.0},
    {"folded": 1, "weighting": "mean", "recovery": "norms", "test": 89.0},
]
LATENCY = [
    {"folded": folded, "backend": backend, "batch": batch, "milliseconds": batch * (9 - folded), "low": 8, "high": 900}
    for backend in ("eager", "onnxruntime")
    for batch in (1, 128)
    for folded in (0, 1)
]


@pytest.fixture
def example(tmp_path):
    """A small run of three gates and three epochs."""
    rng, gates = np.random.default_rng(0), [Gate(f"layer{n}.se", 4 * n) for n in (1, 2, 3)]
    with RunWriter(tmp_path / "small", model={}, data={}, gates=gates) as writer:
        for epoch in (1, 2, 4):
            with writer.epoch(epoch) as rows:
                rows.append(range(9), None, {gate.name: rng.random((9, gate.channels)) for gate in gates})
    return tmp_path / "small"


def drawn(path):
    """Return every figure of a run by name."""
    return dict(each_figure(path))


def write_validation(run, epoch, learned, gates=None):
    names = gates or [gate.name for gate in stripe.open_run(run).gates]
    content = {"epoch": epoch, "gates": [{"gate": gate, "r": None} for gate in names], "learned": learned}
    (run / "validation.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """The figures that the command draws when it is given nothing, and what it printed last."""
    out = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        assert main(["figures"]) == 0
    return out / "figures" / EXAMPLE_RUN


@shown_by_todays_matplotlib
def test_without_arguments_the_example_is_drawn_as_it_is_committed(gallery):
    committed = Path(__file__).parents[1] / "figures" / EXAMPLE_RUN
    gates = [gate.name for gate in stripe.load_example(EXAMPLE_RUN).gates]
    names = {file.name for file in gallery.iterdir()}
    assert names >= {f"{name}.png" for name in ("grid", "std", "strength-over-epochs", "drift", "training")}
    assert names >= {f"stripe-{gate}.png" for gate in gates}
    assert names == {file.name for file in committed.glob("*.png")}
    for name in names:
        fresh, kept = plt.imread(gallery / name), plt.imread(committed / name)
        assert np.abs(fresh - kept).mean() < 0.01, f"{name} is not what the example shows: run make_figures.py"


def test_the_same_figures_have_the_same_bytes(gallery, tmp_path):
    run = stripe.load_example(EXAMPLE_RUN).path
    assert main(["figures", run, "--out", str(tmp_path)]) == 0
    for file in gallery.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
        assert b"Software" not in file.read_bytes(), "matplotlib's version would change the bytes"


def test_a_run_without_files_beside_it_shows_its_attention_alone(example):
    names = set(drawn(example))
    assert names == {file_name("stripe", gate.name) for gate in stripe.open_run(example).gates} | {
        "grid", "std", "strength", "strength-over-epochs", "drift", "rank-curve", "scores", "directions",
    }  # fmt: skip


def test_std_is_that_of_the_first_and_the_last_epoch(example):
    run = stripe.open_run(example)
    figure = drawn(example)["std"]
    for ax, gate in zip(figure.axes, run.gates, strict=True):
        for patch, epoch in zip(ax.patches, (run.epochs[0], run.epochs[-1]), strict=True):
            expected = run.attention(gate.name, epoch).std(axis=0, ddof=1, dtype=float)
            np.testing.assert_allclose(patch.get_data().values, expected, rtol=1e-6)


def test_a_validation_is_drawn_over_the_stripe_of_its_epoch(example):
    run = stripe.open_run(example)
    gate, epoch = run.gates[0], run.epochs[1]
    learned = {gate.name: [LEARNED] * gate.channels, "elsewhere": [0.1]}
    write_validation(example, epoch, learned, gates=[gate.name, "elsewhere"])
    figures = drawn(example)
    [ax] = figures[file_name("learned", gate.name)].axes
    [line], [points, _] = ax.get_lines(), ax.collections
    np.testing.assert_allclose(line.get_ydata(), np.sort(run.attention(gate.name, epoch).mean(axis=0, dtype=float)))
    assert set(points.get_offsets()[:, 1]) == {LEARNED}
    assert ax.get_title() == f"{gate.name}, r = nan"
    [scatter] = figures["learned-scatter"].axes
    assert len(scatter.collections[0].get_offsets()) == gate.channels
    assert "learned-elsewhere" not in figures


def test_a_validation_of_an_epoch_that_is_not_there_is_left_out(example):
    write_validation(example, 999, {})
    assert not [name for name in drawn(example) if name.startswith("learned")]


def test_a_fold_table_is_drawn_over_the_latency_of_the_largest_batch(example):
    (example / "fold.json").write_text(json.dumps({"measure": "accuracy", "variants": VARIANTS, "latency": LATENCY}))
    ax = drawn(example)["fold-pareto"].axes[0]
    assert ax.collections[0].get_offsets().tolist() == [[8 * 128, 88], [8 * 128, 89]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["unfolded"] == [[9 * 128, 90]]
    (example / "fold.json").write_text(json.dumps({"measure": "agreement", "variants": VARIANTS}))
    ax = drawn(example)["fold-pareto"].axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("folded gates", "test agreement (%)")
    row = {"k": 0, "source": "", "numbers": 0, "divergence": 0.2, "drop": 1.5}
    row |= {f"{name}_{end}": row[name] for name in ("divergence", "drop") for end in ("low", "high")}
    (example / "fold.json").write_text(json.dumps({"measure": "agreement", "ranks": [row]}))
    assert drawn(example)["rank-tradeoff"].axes[1].get_ylabel() == "agreement lost (points)"


@pytest.mark.parametrize(("name", "text"), [("fold.json", '{"rows": []}'), ("validation.json", "{}")])
def test_a_foreign_file_beside_a_run_is_named(example, name, text):
    (example / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}' lacks '.*': write it anew, or move it away"):
        drawn(example)


FORMS = [
    "", "{", "[]", "[1]", "1", "null", '"x"', "[" * 5000, "epoch,lr", "a,b\n1,2\n", "epoch\n1,2,3\n",
    '{"gates": 3}', '{"gates": [3]}', '{"gates": [], "learned": 3}',
    '{"gates": [], "learned": {"layer1.0": "x"}, "epoch": 1}',
    '{"variants": 3, "measure": 1}', '{"variants": [{"x": 1}]}',
    '{"variants": [{"folded": "x", "test": []}], "measure": "accuracy"}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["fold.json", "validation.json", "metrics.csv"])
def test_a_file_of_any_other_form_is_named_in_one_line(example, name):
    said = []
    for text in FORMS:
        (example / name).write_text(text)
        try:
            drawn(example)
        except ValueError as error:
            said.append(str(error))
    assert len(said) >= 8
    assert all(f"{name}' " in each and "write it anew" in each and each.isprintable() for each in said)


@pytest.mark.parametrize(
    ("gate", "name"),
    [
        ("layer1.0.se#1", "stripe-layer1.0.se#1"),
        ("../../etc/x", "stripe-.._.._etc_x-85ee4fc2"),
        ("a b:c", "stripe-a_b_c-ed937dc4"),
        ("", "stripe-"),
    ],
)
def test_a_gates_name_never_leads_out_of_the_directory(gate, name):
    assert file_name("stripe", gate) == name


def test_draw_gives_the_files_in_every_format_and_closes_its_figures_alone(example, tmp_path):
    mine = plt.figure()
    others = plt.get_fignums()
    paths = stripe.figures.draw(example, tmp_path / "out", gates=["layer2.se"], formats=["png", "svg"])
    assert sorted(paths) == sorted((tmp_path / "out").iterdir()), "no unfinished file is left"
    assert [path.name for path in paths[:4]] == ["stripe-layer2.se.png", "stripe-layer2.se.svg", "grid.png", "grid.svg"]
    assert plt.get_fignums() == others
    plt.close(mine)


def test_what_cannot_be_drawn_is_refused_before_anything_is_written(example, tmp_path):
    with pytest.raises(ValueError, match="format 'gif': expected some of png, pdf, svg"):
        stripe.figures.draw(example, tmp_path / "out", formats=["png", "gif"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="'nowhere'"):
        stripe.figures.draw(example, tmp_path / "out", gates=["nowhere"])
    assert tuple(METADATA) == FORMATS, "the command offers what can be written"


def test_a_figure_that_cannot_be_finished_leaves_the_earlier_file(tmp_path, monkeypatch):
    [path] = stripe.figures.save(plt.figure(), tmp_path / "a")
    before = path.read_bytes()
    figure = plt.figure()
    figure.text(0.5, 0.5, "$\\no such command$")  # which matplotlib finds out while it writes
    with pytest.raises(ValueError, match="no such command"):
        stripe.figures.save(figure, tmp_path / "a")
    plt.close(figure)
    assert path.read_bytes() == before


def test_figures_go_to_a_directory_of_the_runs_name(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["figures", str(example)]) == 0
    assert (tmp_path / "figures/small/grid.png").exists()


def test_excitation_is_drawn_where_there_are_classes(tmp_path, example):
    """Each line is the mean over the images of a class, from the rows; without labels there is no such figure."""
    assert "excitation" not in drawn(example)
    values, labels = np.random.default_rng(0).random((30, 5)), np.arange(30) % 3 - 1  # a third is unknown
    with RunWriter(tmp_path / "labelled", model={}, data={}, gates=[Gate("se", 5)]) as writer:
        with writer.epoch(20) as rows:
            for half in (slice(0, 11), slice(11, 30)):
                rows.append(range(30)[half], labels[half], {"se": values[half]})
    [ax] = drawn(tmp_path / "labelled")["excitation"].axes
    for label, line in enumerate(ax.patches):
        np.testing.assert_allclose(line.get_data().values, values[labels == label].mean(axis=0), rtol=1e-6)
    assert len(ax.patches) == 2
