"""Notebooks run from top to bottom and are kept without outputs; what they show is escaped; frames fit seaborn."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from nbclient import NotebookClient

import stripe
from stripe.asr.validation import RULE, Validation
from stripe.gate import Gate, Gates
from stripe.store import RunWriter

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {
    "EPOCHS, IMAGES = 8, None": "EPOCHS, IMAGES = 1, 64",
    "steps=100": "steps=2",
    "test=test)": "test=test, learning_steps=2)",
}
HOSTILE = "<script>alert('&')</script>"
GATES = [Gate(HOSTILE, 4), Gate("layer2.se", 8)]


@pytest.fixture
def run(tmp_path):
    """Two gates, two epochs, nine samples, squeeze; hostile names."""
    rng = np.random.default_rng(0)
    with RunWriter(
        tmp_path / "run", model={"arch": HOSTILE, "long": [0.1] * 40}, data={"uri": "digits"}, gates=GATES, squeeze=True
    ) as writer:
        for epoch in (1, 3):
            values = {gate.name: rng.random((9, gate.channels)) for gate in GATES}
            with writer.epoch(epoch) as rows:
                rows.append(range(9), [*range(8), -1], values, values)
    return stripe.open_run(tmp_path / "run")


@pytest.fixture
def validation(run):
    observed = {gate.name: run.attention(gate.name, 3) for gate in run.gates}
    vectors = {gate: values.mean(axis=0, dtype=float) for gate, values in observed.items()}
    measures = ["distance", "limit", "random", "distance_best", "distance_untrained", "p_adjusted"]
    table = pd.DataFrame({name: [0.25, 0.5] for name in [*measures, "kl_learned", "kl_stripe", "kl_removed", "r"]})
    table.insert(0, "gate", list(vectors))
    table.insert(1, "channels", [len(vector) for vector in vectors.values()])
    table["verdict"] = ["match", "trivial"]
    accuracies = {"attention": 91.0, HOSTILE: 12.3}
    return Validation("same", RULE, 3, 20, table, accuracies, vectors, observed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as under JupyterLab
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        for usual, small in SMALL.items():
            cell.source = cell.source.replace(usual, small)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output for cell in code for output in cell.outputs if output.output_type != "stream"]
    assert not any(output.output_type == "error" for output in shown)
    assert sum("image/png" in output.data for output in shown) >= 1
    assert sum("text/html" in output.data for output in shown) >= 1


def test_notebooks_are_small_in_tests_and_short():
    texts = {path: path.read_text() for path in NOTEBOOKS}
    assert len(texts) == 3
    assert sum("EPOCHS, IMAGES = 8, None" in text for text in texts.values()) == 2
    assert sum("steps=100" in text for text in texts.values()) == 1
    assert sum("test=test)" in text for text in texts.values()) == 1
    for path, text in texts.items():
        assert len(nbformat.reads(text, as_version=4).cells) <= 20, path


# ---- what objects show -----------------------------------------------------------------------------------


def visible(html):
    """Return what a reader sees, the text without tags; no name has become one."""
    assert "<script" not in html
    return re.sub(r"<[^>]*>", " ", html)


def test_a_run_shows_how_it_was_made_and_its_gates(run):
    text = visible(run._repr_html_())
    for part in ("uri digits", "attention and squeeze of 9 samples", "1, 3", "2, 12 channels", "layer2.se"):
        assert part in text
    assert text.count("&lt;script&gt;") == 2, "the model and a gate"
    assert "long" not in text


def test_a_run_of_many_gates_shows_some_and_a_run_of_moments_says_so(tmp_path):
    gates = [Gate(f"stage{n}", 2) for n in range(30)]
    RunWriter(tmp_path, model={}, data={}, gates=gates, contents="moments").close()
    text = visible(stripe.open_run(tmp_path)._repr_html_())
    assert "stage0" in text
    assert "stage29" in text
    assert "stage15" not in text
    assert " moments" in text
    assert "samples" not in text


def test_a_validation_shows_distances_beside_their_controls_and_explains_them(validation):
    text = visible(validation._repr_html_())
    for part in (
        "distance",
        "random",
        "best",
        "KL removed",
        "12.3",
        "91.0",
        "20 steps",
        "Of 2 gates: 1 match, 1 trivial",
    ):
        assert part in text
    assert text.count("&lt;script&gt;") == 3, "a gate, an accuracy, and the same accuracy in the conclusion"
    assert "mean_abs_z" not in text
    assert "nothing was there to learn" in text, "what a verdict means"


def test_a_list_of_gates_shows_itself_as_a_table():
    model = stripe.models.create_model("resnet", depth=11, module="senet").eval()
    gates = stripe.find_gates(model, torch.rand(2, 3, 16, 16))
    assert isinstance(gates, list)
    head, *rows = repr(gates).splitlines()
    assert head.split() == ["name", "channels", "form", "site", "source", "before"]
    assert [row.split()[:2] for row in rows] == [["layer1.0", "64"], ["layer2.0", "128"], ["layer3.0", "256"]]
    assert "<td>layer2.0.attention_module</td>" in gates._repr_html_()
    assert (repr(gates[:0]), repr(type(gates)())) == ("[]", "no gates")
    assert "&lt;b&gt;" in Gates([Gate("<b>", 3)])._repr_html_()
    assert repr(gates[0]) == "Gate('layer1.0': 64 channels, multiplicative, from layer1.0.attention_module)"
    table = stripe.gates.table(gates)
    assert table["name"].tolist() == ["layer1.0", "layer2.0", "layer3.0"]
    assert table["channels"].tolist() == [64, 128, 256]
    assert table["after"][0] == "layer2.0.conv1, layer2.0.downsample.0"
    assert stripe.gates.table([]).columns.tolist() == table.columns.tolist()


# ---- tidy frames -----------------------------------------------------------------------------------------


def points_of(grid):
    """Return every point that a relplot drew, (points, 2)."""
    return np.concatenate([np.asarray(dots.get_offsets()) for ax in grid.axes.flat for dots in ax.collections])


def test_seaborn_draws_the_frames_as_they_are(run, validation):
    summary = stripe.stats.summarize(run)
    samples = pd.concat(run.to_pandas(gate.name, epoch) for gate in run.gates for epoch in run.epochs)
    kinds = {"hue": "gate", "col": "epoch"}
    frames = [
        (summary, "strength", "std", kinds),
        (samples, "squeeze", "attention", kinds),
        (validation.table, "kl_learned", "distance", {"hue": "gate", "style": "verdict"}),
    ]
    for frame, x, y, names in frames:
        grid = sns.relplot(frame, x=x, y=y, **names)
        drawn = sorted(map(tuple, points_of(grid)))
        np.testing.assert_allclose(drawn, sorted(map(tuple, frame[[x, y]].to_numpy(float))), rtol=1e-6)
        assert len(drawn) == len(frame)
    plt.close("all")


def test_the_package_says_that_it_is_typed():
    assert (Path(stripe.__file__).parent / "py.typed").is_file()
