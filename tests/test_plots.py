"""Figures: what is drawn is what came in, and every text of every figure can be read."""

import inspect
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from stripe import plots
from stripe.plots.drawing import RESOLUTION

HEADLESS = os.environ | {"MPLBACKEND": "Agg"}


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def attention(images: int, channels: int, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 1 / (1 + np.exp(-1.2 * rng.normal(size=channels) - noise * rng.normal(size=(images, channels))))


def squeeze(images: int, channels: int) -> np.ndarray:
    return 3 * np.random.default_rng(1).normal(size=(images, channels)) - 2


def summary(gates: int, epochs: int, name: str = "layer{}.{}.attention_module") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(epoch, name.format(gate // 3 + 1, gate % 3)) for epoch in range(1, epochs + 1) for gate in range(gates)]
    table = pd.DataFrame(rows, columns=["epoch", "gate"])
    table["strength"] = rng.uniform(0.3, 0.9, len(table))
    table["strength_low"], table["strength_high"] = table["strength"] - 0.05, table["strength"] + 0.03
    table["drift"] = np.where(table["epoch"] == 1, np.nan, 0.1 * np.exp(-table["epoch"] / 3.0))
    return table


def metrics(epochs: int) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    loss = {"train_loss": 2 / epoch, "val_loss": 2.5 / epoch}
    return pd.DataFrame({"epoch": epoch, **loss, "train_accuracy": 90 - 60 / epoch, "val_accuracy": 80 - 60 / epoch})


def folds(gates: int) -> pd.DataFrame:
    """A network unfolded and with 1 to `gates` gates folded, in two ways: one loses 2 points a gate, the other 1."""
    ways = (("mean", "none", 2), ("mean", "re-estimated", 1))
    rows = [(0, "none", "none", 90.0), (0, "none", "re-estimated", 99.0)]
    rows += [(k, kind, recovery, 90.0 - k * cost) for k in range(1, gates + 1) for kind, recovery, cost in ways]
    return pd.DataFrame(rows, columns=["folded", "weighting", "recovery", "test"])


def times(gates: int) -> pd.DataFrame:
    """Each folded gate saves a tenth of 10 ms at a batch of 64; a batch of 1 and another backend take as long as 3."""
    cases = [(backend, batch) for backend in ("eager", "compile") for batch in (1, 64)]
    rows = [(k, *case, 10 - k / 10 if case == ("eager", 64) else 3.0) for case in cases for k in range(gates + 1)]
    table = pd.DataFrame(rows, columns=["folded", "backend", "batch", "milliseconds"])
    return table.assign(low=table["milliseconds"] - 0.02, high=table["milliseconds"] + 0.03)


def shares(gates: int, directions: int = 8) -> pd.DataFrame:
    """The k-th direction of gate g holds less than those before it, and the less the later the gate."""
    rows = [(LONG.format(g, 0), k, 1 - 0.5**k / (1 + g)) for g in range(gates) for k in range(1, directions + 1)]
    table = pd.DataFrame(rows, columns=["gate", "directions", "share"])
    return table.assign(share_low=table["share"] - 0.02, share_high=table["share"] + 0.01)


def compact(ranks: Sequence[int] = (0, 1, 2, 4, 8)) -> pd.DataFrame:
    """A network of nine gates and 336 channels, and the cost of k numbers in place of each gate's, or of all gates'."""
    rows = [(math.nan, "", 336, 0.0, 0.0)]
    for k in ranks:
        rows.append((k, "", 9 * k, 0.1 / (1 + k), 1 / (1 + k)))
        rows += [(k, "layer2.1", k, 0.1 / (1 + k / 2), 1 / (1 + k / 2))] if k else []
    table = pd.DataFrame(rows, columns=["k", "source", "numbers", "divergence", "drop"])
    ends = {f"{name}_{end}": table[name] * by for name in ("divergence", "drop") for end, by in END.items()}
    return table.assign(**ends)


END = {"low": 0.8, "high": 1.2}


def pair(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return squeeze(30, channels).std(axis=0), attention(30, channels).std(axis=0)


LONG = "features.{}.{}.block.2.scale_activation"
FIGURES: dict[str, Callable[[], Axes | Figure]] = {
    "heatmap": lambda: plots.stripe_heatmap(attention(200, 64), title="layer1.0.attention_module, epoch 10"),
    "heatmap, one image": lambda: plots.stripe_heatmap(attention(1, 8)),
    "heatmap, not finite": lambda: plots.stripe_heatmap(np.full((5, 8), np.nan)),
    "heatmap, long title": lambda: plots.stripe_heatmap(attention(9, 9), title=f"{LONG} of efficientnet_b0, epoch 12"),
    "before and after": lambda: plots.before_after(squeeze(30, 64), attention(30, 64), std=pair(64), title="layer1.0"),
    "before and after, 8": lambda: plots.before_after(squeeze(30, 8), attention(30, 8), std=pair(8)),
    "before and after alone": lambda: plots.before_after(squeeze(30, 64), attention(30, 64)),
    "grid": lambda: plots.heatmap_grid(
        {(f"layer{g}.se", e): attention(20, 16 * g) for g in (1, 2, 3) for e in (1, 5)}, title="digits"
    ),
    "grid, 20 epochs": lambda: plots.heatmap_grid(
        {(LONG.format(1, 0), epoch): attention(20, 16) for epoch in range(101, 121)}
    ),
    "std": lambda: plots.std_per_channel({"attention": attention(30, 256).std(axis=0)}, title="layer1.0"),
    "std, tiny": lambda: plots.std_per_channel({"attention": 1e-7 * attention(30, 256).std(axis=0)}, title="layer1.0"),
    "std, 5 epochs": lambda: plots.std_per_channel({f"epoch {e}": attention(30, 8).std(axis=0) for e in range(5)}),
    "std, 6 gates": lambda: plots.std_per_channel({LONG.format(g, 0): attention(9, 8 * g)[0] for g in range(1, 7)}),
    "std grid": lambda: plots.std_grid(
        {(f"layer{g}.se", e): attention(30, 64 * g)[0] / e for g in (1, 2, 3) for e in (1, 20)}, title="digits"
    ),
    "std grid, 7 gates": lambda: plots.std_grid(
        {(LONG.format(g, 0), e): attention(9, 8 * g)[0] for g in range(1, 8) for e in (1, 5, 10, 20)}
    ),
    "std grid, 1 gate": lambda: plots.std_grid({("layer1.se", 3): attention(9, 8)[0]}),
    "excitation": lambda: plots.excitation(
        {(f"layer{g}.se", k): attention(30, 64 * g)[k] for g in (1, 2, 3) for k in range(10)}, title="epoch 20"
    ),
    "excitation, 7 gates": lambda: plots.excitation(
        {(LONG.format(g, 0), k): attention(30, 8 * g)[k // 9] for g in range(1, 8) for k in (0, 100)}
    ),
    "directions": lambda: plots.directions(
        {(f"layer{g}.se", k): attention(30, 64 * g)[k] / 8 for g in (1, 2, 3) for k in (1, 2)}, title="epoch 20"
    ),
    "rank curve, 6 gates": lambda: plots.rank_curve(shares(6), title="epoch 20"),
    "rank curve, 20 gates": lambda: plots.rank_curve(shares(20)),
    "scores": lambda: plots.scores(
        {f"layer{g}.se": squeeze(90, 3) for g in (1, 2, 3)},
        shares={"layer1.se": 0.98, "layer2.se": 0.5},
        labels=np.arange(90) % 10,
        title="epoch 20",
    ),
    "scores, 1 gate": lambda: plots.scores({LONG.format(1, 0): squeeze(90, 2) * [1, 0.01]}),
    "ranks": lambda: plots.rank_tradeoff(compact(), title="digits"),
    "ranks, nothing but folded": lambda: plots.rank_tradeoff(compact([0])),
    "fold": lambda: plots.fold_pareto(folds(6), times(6), title="digits"),
    "fold, 54 gates": lambda: plots.fold_pareto(folds(54), times(54)),
    "fold, no latency": lambda: plots.fold_pareto(folds(6)),
    "by gate, 54": lambda: plots.strength_by_gate(summary(54, 1), title="epoch 1"),
    "by gate, 1": lambda: plots.strength_by_gate(summary(1, 1, LONG)),
    "strength, 6 gates": lambda: plots.strength_over_epochs(summary(6, 10), title="digits"),
    "strength, 8 gates, 1 epoch": lambda: plots.strength_over_epochs(summary(8, 1, LONG)),
    "strength, 8 gates of two kinds": lambda: plots.strength_over_epochs(
        summary(8, 3, LONG).assign(gate=lambda table: [f"{name[:-1]}{row % 2}" for row, name in table["gate"].items()])
    ),
    "strength, 54 gates": lambda: plots.strength_over_epochs(summary(54, 20), title="digits"),
    "drift, 6 gates": lambda: plots.drift_over_epochs(summary(6, 10), title="digits"),
    "drift, 1 gate": lambda: plots.drift_over_epochs(summary(1, 3)),
    "drift, 54 gates": lambda: plots.drift_over_epochs(summary(54, 20, LONG)),
    "learned": lambda: plots.learned_over_stripe(*attention(3, 256), title="layer1.0, r = 0.82"),
    "learned, 8 channels": lambda: plots.learned_over_stripe(*attention(3, 8)),
    "scatter": lambda: plots.learned_scatter({"a": attention(2, 64)}, title="layer1.0, r = 0.82"),
    "scatter, 6 gates": lambda: plots.learned_scatter({LONG.format(1, n): attention(2, 64, seed=n) for n in range(6)}),
    "scatter, 20 gates": lambda: plots.learned_scatter({f"layer{n}": attention(2, 64, seed=n) for n in range(20)}),
    "training": lambda: plots.training_curves({name: metrics(20) for name in ("plain", "SE", "ASR(SE)")}, title="a"),
}


def figure_of(drawn: Axes | Figure) -> Figure:
    return drawn if isinstance(drawn, Figure) else drawn.get_figure()


def drawn_texts(fig: Figure, monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """Draw `fig` and return the texts that were really drawn: ticks out of view are not."""
    texts: list[Text] = []
    original = Text.draw

    def spy(self: Text, renderer: object) -> None:
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        original(self, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", spy)
        fig.canvas.draw()
    return texts


def clipped(fig: Figure, texts: list[Text]) -> list[str]:
    width, height = fig.bbox.size
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [t for t, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(a, b) for (a, first), (b, second) in combinations(boxes, 2) if first.overlaps(second)]


# ---- every figure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_readable_and_no_global_setting_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_before = mpl.rcParams.copy()
    fig = figure_of(FIGURES[name]())
    texts = drawn_texts(fig, monkeypatch)
    assert mpl.rcParams == settings_before
    assert texts
    assert min(text.get_fontsize() for text in texts) >= 7
    assert not [text.get_text() for text in texts if "$" in text.get_text()], "exponents are drawn below 7 points"
    assert clipped(fig, texts) == []
    assert overlapping(texts) == []
    assert fig.get_figwidth() == pytest.approx(3.3) or fig.get_figwidth() >= 6.9
    for ax in fig.axes:
        if ax.get_legend():
            assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())


def test_the_readability_check_sees_clipped_and_overlapping_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fig = plt.figure(figsize=(2, 2))
    fig.text(0.9, 0.5, "runs out of the figure")
    fig.text(0.1, 0.5, "one")
    fig.text(0.12, 0.5, "other")
    texts = drawn_texts(fig, monkeypatch)
    assert clipped(fig, texts) == ["runs out of the figure"]
    assert overlapping(texts) == [("one", "other")]


@pytest.mark.parametrize("name", ["before and after", "strength, 6 gates"])
def test_a_figure_renders_to_the_same_bytes_twice(name: str) -> None:
    def png() -> bytes:
        buffer = io.BytesIO()
        figure_of(FIGURES[name]()).savefig(buffer, format="png")
        return buffer.getvalue()

    assert png() == png()


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plots.stripe_heatmap(attention(5, 8), ax=ax),
        lambda ax: plots.std_per_channel({"a": [1, 2]}, ax=ax),
        lambda ax: plots.learned_over_stripe([1, 2], [1, 2], [1, 2], ax=ax),
        lambda ax: plots.learned_scatter({"a": ([1, 2], [1, 2])}, ax=ax),
        lambda ax: plots.strength_by_gate(summary(2, 1), ax=ax),
        lambda ax: plots.strength_over_epochs(summary(2, 2), ax=ax),
        lambda ax: plots.drift_over_epochs(summary(2, 2), ax=ax),
        lambda ax: plots.fold_pareto(folds(2), ax=ax),
    ],
)
def test_given_axes_are_drawn_on_and_returned(draw: Callable[[Axes], Axes]) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert draw(right) is right
    assert right.has_data()
    assert not left.has_data()
    assert len(plt.get_fignums()) == 1


def test_importing_plots_does_not_import_torch() -> None:
    code = "import sys, stripe.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- image x channel -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.floats(0, 1, width=32)))
def test_heatmap_shows_the_values_on_the_scale_given(values: np.ndarray) -> None:
    ax = plots.stripe_heatmap(values, vmin=0, vmax=1)
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), values)
    assert image.get_clim() == (0, 1)
    assert image.get_interpolation() == "nearest"
    assert image.get_cmap().name == "viridis"
    plt.close("all")


def test_first_image_is_the_top_row() -> None:
    ax = plots.stripe_heatmap(attention(5, 8), title="layer1.0")
    assert ax.get_ylim() == (4.5, -0.5)
    assert ax.get_xlim() == (-0.5, 7.5)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("channel index", "image index", "layer1.0")


def colorbar_of(ax: Axes) -> mpl.colorbar.Colorbar:
    return ax.get_images()[0].colorbar


@pytest.mark.parametrize(
    ("low", "high", "extend"), [(0, 1, "neither"), (-0.1, 1, "min"), (0, 1.1, "max"), (-0.1, 1.1, "both")]
)
def test_colour_bar_points_where_values_go_beyond_the_scale(low: float, high: float, extend: str) -> None:
    bar = colorbar_of(plots.stripe_heatmap([[low, high]], vmin=0, vmax=1))
    assert bar.extend == extend
    assert bar.ax.get_ylabel() == "attention"


def test_values_that_are_not_finite_are_grey_and_named() -> None:
    ax = plots.stripe_heatmap([[0.1, np.nan], [np.inf, 0.9]])
    (image,) = ax.get_images()
    colors = image.to_rgba(image.get_array())
    grey = np.all(colors[..., :3] == 0.75, axis=-1)
    np.testing.assert_array_equal(grey, [[False, True], [True, False]])
    assert "grey: not finite" in colorbar_of(ax).ax.get_ylabel()
    assert colorbar_of(ax).extend == "neither"


def test_the_colours_of_a_heatmap_span_its_values() -> None:
    ax = plots.stripe_heatmap([[-3, 5]], label="squeeze")
    assert ax.get_images()[0].get_clim() == (-3, 5)
    assert colorbar_of(ax).ax.get_ylabel() == "squeeze"


@pytest.mark.parametrize("values", [[0.5, 0.5], np.zeros((0, 8)), np.zeros((2, 3, 4))])
def test_heatmap_refuses_what_is_not_a_matrix(values: object) -> None:
    with pytest.raises(ValueError, match=r"values has shape \(.*\); expected \(images, channels\)"):
        plots.stripe_heatmap(values)


def test_before_after_shows_the_first_images_and_channels() -> None:
    before, after = squeeze(30, 64), attention(30, 64)
    fig = plots.before_after(before, after, std=pair(64), title="layer1.0")
    left, right, *_ = fig.axes
    np.testing.assert_array_equal(left.get_images()[0].get_array(), before[:20, :60])
    np.testing.assert_array_equal(right.get_images()[0].get_array(), after[:20, :60])
    assert (left.get_title(), right.get_title()) == ("Before attention module", "After attention module")
    assert [colorbar_of(ax).ax.get_ylabel() for ax in (left, right)] == ["squeeze", "attention"]
    assert fig.get_suptitle() == "layer1.0"


def test_before_after_colours_both_sides_by_one_rule_and_compares_their_std_on_one_axis() -> None:
    values, std = (squeeze(30, 64), attention(30, 64)), pair(64)
    fig = plots.before_after(*values, std=std, images=10, channels=12)
    for top, bottom, shown, deviation in zip(fig.axes[:2], fig.axes[2:4], values, std, strict=True):
        part = shown[:10, :12]
        assert top.get_images()[0].get_clim() == (part.min(), part.max())
        drawn = bottom.patches[0].get_data().values
        np.testing.assert_allclose(drawn, deviation[:12] / (part.max() - part.min()))
        assert bottom.get_xlim() == top.get_xlim() == (-0.5, 11.5)
    left, right = fig.axes[2:4]
    assert left.get_ylabel() == "std over images\n/ colour range"
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 0
    assert left.get_ylim()[1] >= max(ax.patches[0].get_data().values.max() for ax in (left, right))


def test_before_after_sorts_rows_by_class_and_names_the_classes() -> None:
    before, after = squeeze(30, 8), attention(30, 8)
    labels = np.random.default_rng(1).integers(0, 3, 30)
    fig = plots.before_after(before, after, labels=labels, images=12)
    order = sorted(range(12), key=lambda row: (labels[row], row))
    for ax, values in zip(fig.axes[:2], (before, after), strict=True):
        np.testing.assert_array_equal(ax.get_images()[0].get_array(), values[order])
        [lines] = ax.collections
        edges = [segment[0, 1] for segment in lines.get_segments()]
        assert edges == [row - 0.5 for row in range(1, 12) if labels[order[row]] != labels[order[row - 1]]]
    left = fig.axes[0]
    assert [text.get_text() for text in left.get_yticklabels()] == sorted({str(label) for label in labels[:12]})
    assert left.get_ylabel() == "class of the image"
    unknown = plots.before_after(before, after, labels=np.full(30, -1)).axes[0]
    assert unknown.get_ylabel() == "image index"
    np.testing.assert_array_equal(unknown.get_images()[0].get_array(), before[:20])
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); expected \(30,\)"):
        plots.before_after(before, after, labels=labels[:3])


def test_before_after_carries_what_was_measured_in_its_titles() -> None:
    fig = plots.before_after(squeeze(5, 8), attention(5, 8), strength=(0.181, 0.925), cv=(0.61, 0.012))
    assert [ax.get_title().split("\n") for ax in fig.axes[:2]] == [
        ["Before attention module", "strength 0.18, CV 0.610"],
        ["After attention module", "strength 0.93, CV 0.012"],
    ]


@pytest.mark.parametrize(("rows", "columns"), [(10, 10), (4000, 10), (10, 5003), (3001, 5003)])
def test_what_has_no_pixels_is_averaged_and_the_axis_says_so(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).random((rows, columns))
    ax = plots.stripe_heatmap(values)
    [image] = ax.get_images()
    shown = np.asarray(image.get_array())
    ax.figure.canvas.draw()
    room = ax.get_window_extent().size / ax.figure.dpi * RESOLUTION
    assert shown.shape[0] <= 1.05 * room[1]
    assert shown.shape[1] <= 1.05 * room[0]
    counts = []
    for label, held, kept in ((ax.get_ylabel(), rows, shown.shape[0]), (ax.get_xlabel(), columns, shown.shape[1])):
        found = re.search(r"means of (\d+)", label)
        counts.append(int(found[1]) if found else 1)
        assert kept == -(-held // counts[-1])
        assert bool(found) is (held > kept)
    np.testing.assert_allclose(shown[0, 0], values[: counts[0], : counts[1]].mean())
    last = values[(shown.shape[0] - 1) * counts[0] :, (shown.shape[1] - 1) * counts[1] :]
    np.testing.assert_allclose(shown[-1, -1], last.mean())
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, columns - 0.5), (rows - 0.5, -0.5))


def test_a_value_that_is_not_finite_survives_the_averaging() -> None:
    values = np.ones((3000, 10))
    values[1234, 5] = np.nan
    ax = plots.stripe_heatmap(values)
    assert np.isnan(np.asarray(ax.get_images()[0].get_array().filled(np.nan))).sum() == 1
    assert "grey: not finite" in colorbar_of(ax).ax.get_ylabel()


def test_before_after_without_std_has_no_lower_panels() -> None:
    fig = plots.before_after(squeeze(30, 64), attention(30, 64))
    assert [len(ax.get_images()) for ax in fig.axes[:2]] == [1, 1]
    assert not any(ax.patches and ax.get_ylabel().startswith("std") for ax in fig.axes)


def test_before_after_draws_a_constant_gate() -> None:
    fig = plots.before_after(np.zeros((5, 8)), np.full((5, 8), 0.5), std=(np.zeros(8), np.zeros(8)))
    np.testing.assert_array_equal(fig.axes[2].patches[0].get_data().values, np.zeros(8))
    assert fig.axes[2].get_ylim() == pytest.approx((-0.055, 0.055)), "a line at 0 is not hidden by the frame"


def test_before_after_refuses_two_gates() -> None:
    with pytest.raises(ValueError, match=r"squeeze \(5, 8\) and attention \(5, 9\) differ"):
        plots.before_after(squeeze(5, 8), attention(5, 9))
    with pytest.raises(ValueError, match=r"std of attention \(3,\), attention \(8,\)"):
        plots.before_after(squeeze(5, 8), attention(5, 8), std=(np.ones(8), np.ones(3)))


def test_grid_is_gates_by_epochs_on_one_scale_a_gate() -> None:
    panels = {
        (gate, epoch): attention(4, channels, seed=epoch)
        for gate, channels in (("layer2.se", 16), ("layer10.se", 8))
        for epoch in (10, 2)
    }
    del panels["layer10.se", 2]
    fig = plots.heatmap_grid(panels)
    cells, bars = fig.axes[:4], fig.axes[4:]
    shown = [ax.get_images()[0].get_array() if ax.get_images() else None for ax in cells]
    expected = [panels["layer2.se", 2], panels["layer2.se", 10], None, panels["layer10.se", 10]]
    for drawn, values in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(drawn, values)
    for gate, row in (("layer2.se", cells[:2]), ("layer10.se", cells[2:])):
        own = np.concatenate([values.ravel() for (name, _), values in panels.items() if name == gate])
        assert {image.get_clim() for ax in row for image in ax.get_images()} == {(own.min(), own.max())}
    assert [cells[0].get_ylabel(), cells[2].get_ylabel()] == ["layer2\n16 channels", "layer10\n8 channels"]
    assert [cells[0].get_title(), cells[1].get_title()] == ["2", "10"]
    assert [bar.get_ylabel() for bar in bars] == ["attention", "attention"]
    for limits, expected in (((0, 1), (0, 1)), ({"layer2.se": (0.2, 0.3)}, (0.2, 0.3))):
        first = plots.heatmap_grid(panels, limits=limits).axes[0]
        assert first.get_images()[0].get_clim() == expected
    assert not cells[2].get_frame_on()


def test_grid_refuses_nothing_and_names_the_bad_panel() -> None:
    with pytest.raises(ValueError, match="panels is empty"):
        plots.heatmap_grid({})
    with pytest.raises(ValueError, match=r"panels\[\('a', 3\)\] has shape \(8,\)"):
        plots.heatmap_grid({("a", 3): np.ones(8)})


# ---- one value a channel ---------------------------------------------------------------------------------


def test_std_steps_span_each_channel_on_an_axis_with_zero() -> None:
    ax = plots.std_per_channel({"epoch 1": [0.3, 0.1], "epoch 2": [0.2, 0.05]})
    first, second = (patch.get_data() for patch in ax.patches)
    np.testing.assert_array_equal(first.values, [0.3, 0.1])
    np.testing.assert_array_equal(second.values, [0.2, 0.05])
    np.testing.assert_array_equal(first.edges, [-0.5, 0.5, 1.5])
    assert first.baseline is None, "a step down to 0 at the end would look like a value"
    assert ax.get_ylim()[0] < 0
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["epoch 1", "epoch 2"]


def test_one_std_needs_no_legend() -> None:
    assert plots.std_per_channel({"attention": [0.3, 0.1]}).get_legend() is None


def test_std_grid_has_a_panel_a_gate_and_a_line_an_epoch_on_one_axis() -> None:
    panels = {("a.se", 9): [0.1, 0.2], ("b.se", 2): [0.4, 0.3, 0.2], ("a.se", 2): [0.5, 0.6]}
    fig = plots.std_grid(panels, title="digits")
    a, b = fig.axes
    assert (a.get_title(), b.get_title(), fig.get_suptitle()) == ("a", "b", "digits")
    assert [patch.get_data().values.tolist() for patch in a.patches] == [[0.1, 0.2], [0.5, 0.6]]
    assert [patch.get_data().values.tolist() for patch in b.patches] == [[0.4, 0.3, 0.2]]
    assert a.patches[1].get_edgecolor() == b.patches[0].get_edgecolor() != a.patches[0].get_edgecolor()
    assert [line.get_label() for line in fig.legends[0].get_lines()] == ["epoch 2", "epoch 9"]
    assert fig.legends[0].get_lines()[0].get_color() == pytest.approx(b.patches[0].get_edgecolor())
    assert a.get_ylim() == b.get_ylim()
    assert a.get_ylim()[0] < 0 < 0.6 < a.get_ylim()[1]


def test_std_grid_refuses_nothing_and_names_the_bad_panel() -> None:
    with pytest.raises(ValueError, match="panels is empty"):
        plots.std_grid({})
    with pytest.raises(ValueError, match=r"panels\[a, epoch 3\] \(1, 2\); expected \(channels,\)"):
        plots.std_grid({("a", 3): [[1, 2]]})


def test_excitation_has_a_panel_a_gate_and_a_line_a_class() -> None:
    panels = {("a.se", 7): [0.1, 0.2], ("a.se", 0): [0.5, 0.6], ("b.se", 0): [0.4, 0.3, 0.2]}
    fig = plots.excitation(panels, title="epoch 3")
    a, b = fig.axes
    assert (a.get_title(), b.get_title(), fig.get_suptitle()) == ("a", "b", "epoch 3")
    assert [patch.get_data().values.tolist() for patch in a.patches] == [[0.1, 0.2], [0.5, 0.6]]
    assert a.patches[1].get_edgecolor() == b.patches[0].get_edgecolor() != a.patches[0].get_edgecolor()
    assert [line.get_label() for line in fig.legends[0].get_lines()] == ["class 0", "class 7"]
    assert a.get_ylabel() == "mean attention"
    with pytest.raises(ValueError, match="panels is empty"):
        plots.excitation({})


def test_learned_vector_lies_over_the_band_in_the_order_of_the_stripe() -> None:
    learned, mean, std = np.array([0.1, 0.9, 0.4]), np.array([0.5, 0.2, 0.3]), np.array([0.03, 0.01, 0.02])
    ax = plots.learned_over_stripe(learned, mean, std)
    [line], (points, band) = ax.get_lines(), ax.collections
    np.testing.assert_array_equal(points.get_offsets()[:, 1], [0.9, 0.4, 0.1])
    np.testing.assert_array_equal(line.get_ydata(), [0.2, 0.3, 0.5])
    outline = band.get_paths()[0].vertices
    for rank, (low, high) in enumerate([(0.19, 0.21), (0.28, 0.32), (0.47, 0.53)]):
        heights = outline[outline[:, 0] == rank, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))


def test_scatter_has_one_scale_for_both_and_the_line_of_equality() -> None:
    learned, mean = np.array([0.1, 0.9]), np.array([0.3, 0.4])
    ax = plots.learned_scatter({"a": (learned, mean)})
    [points], [equality] = ax.collections, ax.get_lines()
    np.testing.assert_array_equal(points.get_offsets(), [[0.3, 0.1], [0.4, 0.9]])
    np.testing.assert_array_equal(equality.get_xdata(), equality.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < 0.1 < 0.9 < ax.get_xlim()[1]


def test_scatter_tells_gates_apart() -> None:
    ax = plots.learned_scatter({"a.se": ([0.1], [0.3]), "b.se": ([0.6, 0.7], [0.8, 0.9])})
    [points] = ax.collections
    assert points.get_offsets().tolist() == [[0.3, 0.1], [0.8, 0.6], [0.9, 0.7]]
    a, *b = points.get_facecolors()[:, :3].tolist()
    assert a != b[0] == b[1]
    assert [mpl.colors.to_rgb(mark.get_color()) for mark in ax.get_legend().get_lines()] == [tuple(a), tuple(b[0])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xlim() == ax.get_ylim()


def test_vectors_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learned of a \(3,\), stripe of a \(2,\); expected \(channels,\)"):
        plots.learned_scatter({"a": ([1, 2, 3], [1, 2])})
    with pytest.raises(ValueError, match=r"std \(1, 2\)"):
        plots.learned_over_stripe([1, 2], [1, 2], [[1, 2]])


# ---- directions ------------------------------------------------------------------------------------------


def test_the_rank_curve_is_the_table() -> None:
    table = shares(3)
    ax = plots.rank_curve(table)
    for line, band, (_, rows) in zip(ax.get_lines(), ax.collections, table.groupby("gate"), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), rows[["directions", "share"]])
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (rows["share_low"].min(), rows["share_high"].max())
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylabel().endswith("(95 % interval)")


def test_scores_are_drawn_on_one_scale_in_the_colours_of_their_classes() -> None:
    values = np.array([[0.0, 0.0], [3.0, 1.0], [6.0, -1.0]])
    figure = plots.scores({"a.se": values, "b.se": 2 * values}, shares={"a.se": 0.876}, labels=[4, -1, 7])
    first, second = figure.axes
    assert first.get_title() == "a: 87.6 % of the variance"
    assert second.get_title() == "b"
    [points] = second.collections
    np.testing.assert_array_equal(points.get_offsets(), 2 * values)
    colors = [tuple(color[:3]) for color in points.get_facecolors().tolist()]
    assert len(set(colors)) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class 4", "class 7"]
    assert colors[1] == (0.7, 0.7, 0.7)
    assert first.get_aspect() == 1


def test_scores_refuse_nothing_one_direction_and_other_images() -> None:
    with pytest.raises(ValueError, match="panels is empty"):
        plots.scores({})
    with pytest.raises(ValueError, match=r"panels\[a\] \(3, 1\); expected \(3 images, 2 or more directions\)"):
        plots.scores({"a": np.zeros((3, 1))})
    with pytest.raises(ValueError, match=r"expected \(4 images"):
        plots.scores({"a": np.zeros((3, 2))}, labels=[0, 0, 1, 1])


def test_each_way_of_compact_networks_begins_where_all_gates_are_folded() -> None:
    table = compact()
    left, right = plots.rank_tradeoff(table).axes
    for ax, name in ((left, "divergence"), (right, "drop")):
        own, other = (container.lines[0].get_xydata() for container in ax.containers)
        np.testing.assert_array_equal(own, table[(table["source"] == "") & table["k"].notna()][["numbers", name]])
        np.testing.assert_array_equal(other[0], own[0])
        assert other[:, 0].tolist() == [0, 1, 2, 4, 8]
    assert left.get_yscale() == "log"
    with pytest.raises(ValueError, match="table lacks source"):
        plots.rank_tradeoff(table.drop(columns="source"))


# ---- one value a gate and epoch --------------------------------------------------------------------------


def test_strength_lines_and_bands_are_the_table() -> None:
    table = summary(3, 5)
    ax = plots.strength_over_epochs(table.sample(frac=1, random_state=0).sort_values("gate"))
    for line, band, (_, rows) in zip(ax.get_lines(), ax.collections, table.groupby("gate"), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), rows[["epoch", "strength"]])
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (rows["strength_low"].min(), rows["strength_high"].max())
    assert ax.get_ylim() == (0, 1)


def test_few_gates_have_a_legend_without_the_part_all_names_share() -> None:
    ax = plots.strength_over_epochs(summary(4, 2))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["layer1.0", "layer1.1", "layer1.2", "layer2.0"]


@pytest.mark.parametrize(
    ("gates", "shown"),
    [
        (["layer1.0.se"], ["layer1.0.se"]),
        (["se", "layer1.se"], ["se", "layer1.se"]),
        (["layer1.se", "layer1.se#1"], ["layer1.se", "layer1.se#1"]),
        (["a.0.se.gate", "b.0.se.gate"], ["a", "b"]),
    ],
)
def test_shortened_names_stay_different(gates: list[str], shown: list[str]) -> None:
    table = summary(len(gates), 1).assign(gate=gates)
    labels = plots.strength_by_gate(table).get_yticklabels()
    assert [label.get_text() for label in labels] == shown


def test_many_gates_have_a_colour_bar_from_the_first_to_the_last() -> None:
    ax = plots.strength_over_epochs(summary(54, 3))
    bar = ax.get_figure().axes[1]
    assert ax.get_legend() is None
    assert bar.get_ylabel() == "gate 1: layer1.0\ngate 54: layer18.2"
    ticks = bar.get_yticks()
    assert (ticks[0], ticks[-1]) == (1, 54)
    luminance = [np.dot(mpl.colors.to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722]) for line in ax.get_lines()]
    assert (np.diff(luminance) > 0).all(), "depth is told by lightness, whatever the colour vision"


def test_strength_without_interval_or_dead_leaves_gaps() -> None:
    table = summary(2, 3).assign(strength_low=np.nan, strength_high=np.nan)
    table.loc[2, "strength"] = np.nan  # the first gate at the second of three epochs
    ax = plots.strength_over_epochs(table)
    drawn = [line.get_xdata().tolist() for line in ax.get_lines()]
    assert sorted(drawn) == [[1], [1, 2, 3], [3]], "no line is drawn across what is missing"
    plots.strength_by_gate(table[table["epoch"] == 1])
    ax.get_figure().canvas.draw()


def test_strength_by_gate_has_a_row_a_gate_from_the_top() -> None:
    table = summary(5, 1)
    ax = plots.strength_by_gate(table)
    intervals, points = ax.collections
    np.testing.assert_array_equal(points.get_offsets(), np.column_stack([table["strength"], range(5)]))
    intervals = np.array([segment[:, 0] for segment in intervals.get_segments()])
    np.testing.assert_array_equal(intervals, table[["strength_low", "strength_high"]])
    assert ax.get_ylim() == (4.5, -0.5)
    assert ax.get_xlim() == (0, 1)


def test_strength_by_gate_refuses_several_epochs() -> None:
    with pytest.raises(ValueError, match=r"holds epochs \[1, 2\]; expected one row a gate"):
        plots.strength_by_gate(summary(5, 2))


def test_drift_is_the_table_on_a_logarithmic_axis() -> None:
    table = summary(2, 4)
    ax = plots.drift_over_epochs(table)
    for line, (_, rows) in zip(ax.get_lines(), table.groupby("gate"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), rows["drift"].dropna())
    assert ax.get_yscale() == "log"
    ax.get_figure().canvas.draw()
    labels = {text.get_text() for text in ax.get_yticklabels(which="both")}
    assert {"0.03", "0.04", "0.06"} <= labels
    assert not any("e" in label for label in labels)


def test_drift_over_uneven_epochs_is_taken_per_epoch() -> None:
    """A stripe that moves by 0.02 an epoch drifts evenly, however the epochs were chosen that were recorded."""
    epochs = np.array([1, 2, 4, 8, 14])
    moved = np.diff(epochs, prepend=np.nan) * 0.02
    table = pd.DataFrame({"gate": "a", "epoch": epochs, "drift": moved})
    for rows in (table, table.iloc[::-1]):
        ax = plots.drift_over_epochs(rows)
        [line] = ax.get_lines()
        np.testing.assert_allclose(line.get_xydata(), [[epoch, 0.02] for epoch in epochs[1:]])
        assert ax.get_ylabel().startswith("drift per epoch")
        assert [int(tick) for tick in ax.get_xticks()] == list(epochs)
    assert plots.drift_over_epochs(summary(2, 4)).get_ylabel() == "drift since the epoch before"


def test_the_level_of_an_interval_is_named() -> None:
    table = summary(3, 1)
    assert plots.strength_over_epochs(table).get_ylabel() == "stripe strength\n(95 % interval)"
    assert plots.strength_by_gate(table, confidence=0.8).get_xlabel() == "stripe strength\n(80 % interval)"
    alone = table.assign(strength_low=np.nan, strength_high=np.nan)
    assert plots.strength_by_gate(alone).get_xlabel() == "stripe strength\n(no interval)"


def test_the_names_that_tab_shows_are_the_plots() -> None:
    assert dir(plots) == sorted(plots.__all__)
    assert all(callable(getattr(plots, name)) for name in plots.__all__)
    assert "ArrayLike" in str(inspect.signature(plots.stripe_heatmap)), "not what it stands for, ten lines of it"
    assert len(str(inspect.signature(plots.stripe_heatmap))) < 300


def test_drift_of_nothing_but_zero_is_drawn_on_a_linear_axis() -> None:
    ax = plots.drift_over_epochs(summary(2, 4).assign(drift=0.0))
    assert ax.get_yscale() == "linear"


def test_drift_refuses_a_single_epoch() -> None:
    with pytest.raises(ValueError, match="no drift; expected at least two recorded epochs"):
        plots.drift_over_epochs(summary(2, 1))


def lines_of(ax: Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in ax.get_lines() if not line.get_label().startswith("_")}


def points_of(ax: Axes, points: mpl.collections.PathCollection) -> dict[str, list[list[float]]]:
    """Return what was drawn in the colour of each label of the legend."""
    marks = zip(ax.get_legend().get_lines(), ax.get_legend().get_texts(), strict=True)
    names = {mpl.colors.to_rgb(mark.get_markerfacecolor()): text.get_text() for mark, text in marks}
    drawn: dict[str, list[list[float]]] = {}
    for color, place in zip(points.get_facecolors(), points.get_offsets().tolist(), strict=True):
        drawn.setdefault(names[tuple(color[:3])], []).append(place)
    return drawn


def test_folding_is_a_mark_a_variant_over_the_latency_of_the_first_backend_and_the_largest_batch() -> None:
    ax = plots.fold_pareto(folds(6).sample(frac=1, random_state=0), times(6), measure="agreement")
    points, ranges = ax.collections
    drawn = points_of(ax, points)
    assert drawn.keys() == {"mean", "mean, re-estimated"}
    for name, cost in (("mean", 2), ("mean, re-estimated", 1)):
        np.testing.assert_allclose(sorted(drawn[name]), [[10 - k / 10, 90 - cost * k] for k in range(6, 0, -1)])
    np.testing.assert_array_equal(lines_of(ax)["unfolded"], [[10, 90]])
    front = [[9.4 + k / 10, 84 + k] for k in range(7)]  # re-estimating always costs less, the unfolded network least
    np.testing.assert_allclose(lines_of(ax)["Pareto front"], front)
    lengths = [float(np.diff(segment[:, 0])[0]) for segment in ranges.get_segments()]
    np.testing.assert_allclose(lengths, 0.05)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latency (ms, eager, batch of 64)", "test agreement (%)")
    [top] = ax.child_axes
    translated = {label.get_text(): tick for label, tick in zip(top.get_xticklabels(), top.get_xticks(), strict=True)}
    assert translated == pytest.approx({str(k): 10 - k / 10 for k in range(7)})


def test_the_upper_axis_labels_the_ends_and_what_has_room() -> None:
    ax = plots.fold_pareto(folds(54), times(54))
    [top] = ax.child_axes
    shown = [int(label.get_text()) for label in top.get_xticklabels()]
    assert shown[:2] == [0, 54]
    assert 4 <= len(shown) < 12


def test_folding_without_latency_is_drawn_over_the_number_of_gates() -> None:
    ax = plots.fold_pareto(folds(3))
    assert ax.get_xlabel() == "folded gates"
    assert not ax.child_axes
    curves = [line.get_xydata().tolist() for line in ax.get_lines() if len(line.get_xdata()) == 3]
    assert curves == [[[1, 88], [2, 86], [3, 84]], [[1, 89], [2, 88], [3, 87]]]


def test_networks_of_ones_own_are_drawn_by_their_names() -> None:
    variants = pd.DataFrame({"network": ["mine", "folded"], "folded": [0, 9], "validation": [80.0, 79.0]})
    latencies = pd.DataFrame({"network": ["mine", "folded"], "backend": "eager", "batch": 1, "milliseconds": [3.0, 2]})
    ax = plots.fold_pareto(variants, latencies.assign(low=1.5, high=3.5))
    assert ax.collections[0].get_offsets().tolist() == [[2, 79]]
    np.testing.assert_array_equal(lines_of(ax)["unfolded"], [[3, 80]])
    assert ax.get_ylabel() == "validation accuracy (%)"


def test_tables_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"variants lacks validation; expected the tables of stripe.folding.study"):
        plots.fold_pareto(times(2))
    with pytest.raises(ValueError, match=r"variants lacks folded"):
        plots.fold_pareto(folds(2).drop(columns="folded"))
    with pytest.raises(ValueError, match=r"latencies lacks milliseconds, low, high"):
        plots.fold_pareto(folds(2), times(2)[["folded", "backend", "batch"]])
    with pytest.raises(ValueError, match="share neither folded nor network"):
        plots.fold_pareto(folds(2), times(2).rename(columns={"folded": "network"}))


def test_variants_are_told_apart_by_marker_as_well_as_colour() -> None:
    table = pd.concat([folds(2).assign(weighting=f"{n}") for n in range(4)]).query("folded > 0")
    [points, _] = plots.fold_pareto(table, times(2)).collections
    styles = list(
        zip(map(tuple, points.get_facecolors()), (path.vertices.tobytes() for path in points.get_paths()), strict=True)
    )
    assert len(set(styles)) == len({shape for _, shape in styles}) == len({color for color, _ in styles}) == 8


def test_training_curves_are_the_metrics() -> None:
    runs = {"SE": metrics(4), "ASR": metrics(6)}
    fig = plots.training_curves(runs, title="digits")
    [legend] = fig.legends
    named = {text.get_text(): line for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert list(named) == ["SE", "ASR", "validation", "training"]
    for ax, quantity in zip(fig.axes, ("loss", "accuracy"), strict=True):
        for name, rows in runs.items():
            for part, label in (("train", "training"), ("val", "validation")):
                expected = rows[["epoch", f"{part}_{quantity}"]].to_numpy()
                lines = [line for line in ax.get_lines() if np.array_equal(line.get_xydata(), expected)]
                [line] = lines
                assert mpl.colors.same_color(line.get_color(), named[name].get_color())
                assert line.is_dashed() == named[label].is_dashed() == (label == "training")
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "accuracy (%)"]
    assert fig.axes[0].get_legend() is fig.axes[1].get_legend() is None


def test_training_without_validation_is_drawn() -> None:
    fig = plots.training_curves({"SE": metrics(4).assign(val_loss=np.nan, val_accuracy=np.nan)})
    for ax in fig.axes:
        assert len([line for line in ax.get_lines() if len(line.get_xdata())]) == 1


def test_seaborn_is_loaded_by_the_first_figure_that_needs_it() -> None:
    code = (
        "import sys, stripe.plots as p; p.stripe_heatmap([[0, 1]]); before = 'seaborn' in sys.modules; "
        "p.learned_scatter({'a': ([0, 1], [0, 1])}); print(before, 'seaborn' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=HEADLESS)
    assert found.stdout.split() == ["False", "True"]
