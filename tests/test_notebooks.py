"""Notebooks run and are kept with their outputs; what objects show is escaped; seaborn draws the frames as they are."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import run_notebooks
import seaborn as sns
import torch

import stripe
from stripe.asr.validation import RULE, Validation
from stripe.gate import Gate, Gates
from stripe.store import RunWriter
from tests.conftest import shown_by_todays_matplotlib

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {
    "EPOCHS, IMAGES = 8, None": "EPOCHS, IMAGES = 1, 64",
    "steps=100": "steps=2",
    "test=test)": "test=test, learning_steps=2)",
    '{"depth": 11,': '{"depth": 8, "block": "basicblock",',
    'where="bn3"': 'where="bn2"',
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


@shown_by_todays_matplotlib
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_notebooks_that_train_run_on_less(path):  # the first one, of the example, is run as it is below
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for usual, small in SMALL.items():
            cell.source = cell.source.replace(usual, small)
    shown = [output for cell in run_notebooks.run(notebook).cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 1
    assert sum("text/html" in output.get("data", {}) for output in shown) >= 1


def test_notebooks_are_small_in_tests_and_short():
    texts = {path: path.read_text() for path in NOTEBOOKS}
    assert len(texts) == 4
    assert sum("EPOCHS, IMAGES = 8, None" in text for text in texts.values()) == 3
    assert sum("steps=100" in text for text in texts.values()) == 1
    assert sum("test=test)" in text for text in texts.values()) == 1
    assert sum('{\\"depth\\": 11,' in text for text in texts.values()) == 3
    assert sum('where=\\"bn3\\"' in text for text in texts.values()) == 1
    for path, text in texts.items():
        assert len(nbformat.reads(text, as_version=4).cells) <= 20, path
        assert len(text) < 1_000_000, path


# ---- what notebooks are kept with ------------------------------------------------------------------------


class Cells(HTMLParser):
    """The texts of a table's cells, row by row; a number where it is one."""

    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def outputs_of(notebook):
    """Return what each cell shows: the cells of its tables, and figures as 16 x 16 mean colours."""
    found = []
    for cell in notebook.cells:
        shown = [output.data for output in cell.get("outputs", []) if "data" in output]
        tables = [Cells(data["text/html"]).rows for data in shown if "<table" in data.get("text/html", "")]
        pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
        found.append((tables, [coarse(plt.imread(io.BytesIO(picture))[..., :3]) for picture in pictures]))
    return found


def coarse(picture):
    rows, columns = (np.linspace(0, size, 17).astype(int) for size in picture.shape[:2])
    return np.array([[picture[a:b, c:d].mean((0, 1)) for c, d in pairwise(columns)] for a, b in pairwise(rows)])


def is_number(text):
    return re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text) is not None


def differences(kept, fresh, *, rtol):
    """Say which cells show something else: other words or shapes, numbers off by more than `rtol`, another picture."""
    for number, (mine, its) in enumerate(zip(outputs_of(kept), outputs_of(fresh), strict=True)):
        texts, others = (np.array([text for table in part[0] for row in table for text in row]) for part in (mine, its))
        if texts.shape != others.shape or len(mine[1]) != len(its[1]):
            yield f"cell {number}: tables or figures of another size"
            continue
        numbers = [is_number(a) and is_number(b) for a, b in zip(texts, others, strict=True)]
        if not np.allclose(texts[numbers].astype(float), others[numbers].astype(float), rtol=rtol, atol=1e-9):
            yield f"cell {number}: other numbers"
        if (texts != others)[~np.array(numbers, bool)].any():
            yield f"cell {number}: other words"
        for before, after in zip(mine[1], its[1], strict=True):
            if np.abs(before - after).mean() > 0.02:
                yield f"cell {number}: another picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_outputs_and_a_conclusion_and_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.cells[-1].source.startswith("## What was ")
    assert sum(len(figures) for _, figures in outputs_of(notebook)) >= 1
    assert sum(len(tables) for tables, _ in outputs_of(notebook)) >= 2
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@shown_by_todays_matplotlib
def test_the_notebook_of_the_example_shows_what_a_fresh_run_shows():
    path = next(path for path in NOTEBOOKS if path.stem.startswith("01"))
    kept = nbformat.read(path, as_version=4)
    fresh = run_notebooks.run(copy.deepcopy(kept))
    assert list(differences(kept, fresh, rtol=1e-3)) == []
    for old, new in (("0.919", "0.819"), ("layer2.0", "layer9.0")):
        changed = nbformat.reads(nbformat.writes(fresh).replace(old, new), as_version=4)
        assert list(differences(kept, changed, rtol=1e-3))
    pictures = [
        output for cell in fresh.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    pictures[1].data["image/png"] = pictures[2].data["image/png"]
    assert any("picture" in each for each in differences(kept, fresh, rtol=1e-3))


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_notebooks_that_train_show_tables_of_the_same_form(path):
    """Another machine rounds otherwise, and a training follows: numbers may differ, and words that follow from them."""
    kept = nbformat.read(path, as_version=4)
    found = list(differences(kept, run_notebooks.run(copy.deepcopy(kept)), rtol=np.inf))
    assert [each for each in found if "size" in each] == []


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
