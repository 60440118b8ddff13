"""The report in a real browser: what is shown, read, chosen and sorted is what the run holds; nothing is fetched."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stripe import report, stats
from stripe.asr.validation import RULE, Validation
from stripe.gate import Gate
from stripe.plots.drawing import HEATMAP
from stripe.stats.verdicts import VERDICTS
from stripe.store import Run, open_run
from tests.runs import writer
from tests.test_report import HOSTILE, record_named

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium")

GATES = tuple(Gate(f"layer{i}.0.se", 16 * i) for i in (1, 2, 3))
SAMPLES, EPOCHS = 40, (1, 2, 5)
PATIENCE = 120_000  # milliseconds that a busy machine may take for a step of the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("browser") / "run"
    rng = np.random.default_rng(0)
    ids = rng.permutation(500)[:SAMPLES]
    with writer(path, gates=GATES, squeeze=True, seeds={"manualSeed": 7}) as run:
        for epoch in EPOCHS:
            noise = {gate.name: rng.normal(0, 1 / epoch, (SAMPLES, gate.channels)) for gate in GATES}
            stripe = {gate.name: np.linspace(-2, 2, gate.channels) / gate.channels**0.5 for gate in GATES}
            values = {name: (1 / (1 + np.exp(-stripe[name] - each))).astype(np.float32) for name, each in noise.items()}
            with run.epoch(epoch) as rows:
                rows.append(ids, ids % 4, values, {name: 3 * each for name, each in noise.items()})
    return open_run(path)


@pytest.fixture(scope="module")
def validation(run: Run) -> Validation:
    """Vectors that match the stripe of the first gate and not that of the others."""
    observed = {gate.name: run.attention(gate.name, 5) for gate in GATES}
    rng = np.random.default_rng(1)
    stripes = {name: values.mean(0) for name, values in observed.items()}
    learned = {n: s + rng.normal(0, 0.01, s.size) if n == GATES[0].name else s[::-1] for n, s in stripes.items()}
    rows = [
        {"gate": n, "channels": v.size, "distance": np.square(v - stripes[n]).sum() / np.square(stripes[n]).sum()}
        | {"limit": 0.001, "distance_untrained": 0.1, "distance_best": 0.0, "random": 0.1}
        | {
            "kl_learned": 0.1,
            "kl_stripe": 0.0,
            "kl_removed": 0.2,
            "p_adjusted": 0.01 if n == GATES[0].name else 0.5,
            "r": np.corrcoef(v, stripes[n])[0, 1],
        }
        | {"verdict": "match" if n == GATES[0].name else "no match"}
        for n, v in learned.items()
    ]
    return Validation("same", RULE, 5, 100, pd.DataFrame(rows), {"attention": 91.25}, learned, observed)


FOLD = {
    "measure": "accuracy",
    "rows": [{"gate": g.name, "damage": d} for g, d in zip(GATES, (2.5, 10, 0.5), strict=True)],
}


@pytest.fixture(scope="module")
def written(run: Run, validation: Validation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return report.write(run, path, validation=validation.to_dict(), fold=FOLD, command="stripe report run")


class Watched:
    """A page that notes whatever it says, asks for or pops up."""

    def __init__(self, browser: Browser, path: Path, *, link: str = "", **options: Any) -> None:
        self.page: Page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page.set_default_timeout(PATIENCE)
        self.noted: list[str] = []
        self.page.on("console", lambda message: self.noted.append(message.text))
        self.page.on("pageerror", lambda error: self.noted.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.noted.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.noted.append(request.url) if "file:" not in request.url else None)
        self.page.goto(path.as_uri() + link)
        self.settle()

    def choose(self, gate: str) -> None:
        self.page.get_by_role("button", name=gate, exact=True).first.click()
        self.settle()

    def settle(self) -> None:
        self.page.evaluate("drawHeatmaps()")

    def point(self, x: int, y: int, panel: int = -1) -> str:
        """Point at the middle of a cell of a panel; return what is read there."""
        cells = self.page.locator("#panels svg").nth(panel)
        cells.scroll_into_view_if_needed()
        box = cells.bounding_box()
        left, top = self.page.evaluate(
            "([x, y, panel]) => { const { axes } = views.at(panel); return [axes.px(x + 0.5), axes.py(y + 0.5)]; }",
            [x, y, panel],
        )
        scale = box["width"] / self.page.evaluate("views[0].axes.width")
        self.page.mouse.move(box["x"] + scale * left, box["y"] + scale * top)
        return self.page.text_content("#readout")

    def pixels(self, panel: int = -1) -> np.ndarray:
        """Return the colours of a panel's cells, (rows, columns, 3)."""
        found = self.page.evaluate(
            "panel => { const c = views.at(panel).canvas; return [c.height, c.width, "
            "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }",
            panel,
        )
        return np.array(found[2], np.uint8).reshape(found[0], found[1], 4)[..., :3]

    def texts(self) -> list[str]:
        """Return what is written in each panel."""
        panels = self.page.locator("#panels svg")
        return [" ".join(panels.nth(i).locator("text").all_text_contents()) for i in range(panels.count())]

    def column(self, section: str, name: str) -> list[str]:
        """Return the texts of a table's column, as the rows stand."""
        heads = self.page.locator(f"{section} thead th").all_text_contents()
        return self.page.locator(f"{section} tbody tr td:nth-child({heads.index(name) + 1})").all_text_contents()


@pytest.fixture
def watched(browser: Browser, written: Path) -> Iterator[Watched]:
    found = Watched(browser, written)
    yield found
    found.page.close()
    assert found.noted == []


def colors_of(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return HEATMAP(np.clip((values - low) / (high - low), 0, 1), bytes=True)[..., :3]


def assert_same_colors(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 12  # two of viridis's 256 steps


def middle(*values: np.ndarray) -> tuple[float, float]:
    """Return between which values the middle 99 % lie."""
    return tuple(np.quantile(np.concatenate([each.ravel() for each in values]), [0.005, 0.995], method="inverted_cdf"))


# ---- the heatmaps ----------------------------------------------------------------------------------------


def test_before_and_after_stand_side_by_side_at_every_epoch(run, watched):
    gate = GATES[0].name
    kinds = [{epoch: read(gate, epoch) for epoch in EPOCHS} for read in (run.squeeze, run.attention)]
    watched.page.focus("#epoch")
    for epoch in reversed(EPOCHS):
        watched.settle()
        assert watched.page.text_content("#epoch-now") == str(epoch)
        for panel, values in enumerate(kinds):
            assert_same_colors(watched.pixels(panel), colors_of(values[epoch], *middle(*values.values())))
        watched.page.keyboard.press("ArrowLeft")
    with pytest.raises(AssertionError):
        assert_same_colors(watched.pixels(), colors_of(kinds[1][EPOCHS[-1]], *middle(*kinds[1].values())))


def test_each_panel_says_its_strength(run, watched):
    texts = watched.texts()
    for text, values in zip(texts, (run.squeeze(GATES[0].name, 5), run.attention(GATES[0].name, 5)), strict=True):
        found = re.search(r"strength ([\d.]+) · CV ([\d.]+)", text)
        expected = [stats.stripe_strength(values).strength, stats.coefficient_of_variation(values)]
        assert [float(number) for number in found.groups()] == pytest.approx(expected, rel=1e-3)
    assert [text.index("epoch 5") > 0 for text in texts] == [True, True]
    assert ["Before the gate" in text for text in texts] == [True, False]


def test_the_first_epoch_stands_beside_the_chosen_one(run, watched):
    watched.page.select_option("#view", "epochs")
    watched.settle()
    first, last = (run.attention(GATES[0].name, epoch) for epoch in (1, 5))
    span = middle(*(run.attention(GATES[0].name, epoch) for epoch in EPOCHS))
    assert_same_colors(watched.pixels(0), colors_of(first, *span))
    assert_same_colors(watched.pixels(1), colors_of(last, *span))
    with pytest.raises(AssertionError):
        assert_same_colors(watched.pixels(0), colors_of(last, *span))
    texts = watched.texts()
    assert ["epoch 1" in text for text in texts] == [True, False]


def test_colours_span_what_is_asked_for(run, watched):
    values = run.attention(GATES[0].name, 5)
    watched.page.select_option("#span", "unit")
    watched.settle()
    assert_same_colors(watched.pixels(), colors_of(values, 0, 1))
    watched.page.select_option("#span", "panel")
    watched.settle()
    assert_same_colors(watched.pixels(), colors_of(values, *middle(values)))


@pytest.mark.parametrize("rows", ["recorded", "label", "mean", "sample"])
def test_hover_reads_the_run_in_every_order(run, watched, rows):
    gate, epoch = GATES[2], 5
    values, squeeze = run.attention(gate.name, epoch), run.squeeze(gate.name, epoch)
    samples, labels = run.samples(epoch), run.labels(epoch)
    keys = {"recorded": np.arange(SAMPLES), "label": labels, "mean": values.mean(1), "sample": samples}
    order = np.argsort(keys[rows], kind="stable")
    watched.choose(gate.name)
    watched.page.select_option("#rows", rows)
    watched.settle()
    pattern = r"sample (\d+) · label (\d) · channel (\d+) · squeeze (-?[\d.e-]+) · attention ([\d.]+)"
    for x, y, panel in ((0, 0, 0), (gate.channels - 1, SAMPLES - 1, 1), (7, 21, 0)):
        read = re.fullmatch(pattern, watched.point(x, y, panel))
        row = order[y]
        assert [int(text) for text in read.groups()[:3]] == [samples[row], labels[row], x]
        for text, its in ((read[4], squeeze), (read[5], values)):
            assert float(text) == pytest.approx(its[row, x], abs=float(np.ptp(its) / 508 + 5e-4 * abs(its[row, x])))


def test_arrow_keys_read_values(run, watched):
    watched.page.locator("#panels svg").last.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        watched.page.keyboard.press(key)
    read = watched.page.text_content("#readout")
    assert f"sample {run.samples(5)[1]} · label {run.labels(5)[1]} · channel 1 ·" in read
    assert watched.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


# ---- tables and curves -----------------------------------------------------------------------------------


def test_the_overview_sorts_by_click_and_key(run, watched):
    table = stats.summarize(run, epochs=[5]).set_index("gate")["strength"]
    names = [gate.name for gate in GATES]
    assert watched.column("#table", "gate") == names
    shown = [float(text) for text in watched.column("#table", "strength")]
    np.testing.assert_allclose(shown, table[names], rtol=1e-3)
    head = watched.page.locator("#table th", has_text="strength")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert watched.column("#table", "gate") == list(table.sort_values().index)
    watched.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert watched.column("#table", "gate") == list(table.sort_values(ascending=False).index)
    watched.page.locator("#table th", has_text="channels").get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert watched.column("#table", "gate") == names


def test_choosing_a_gate_moves_every_figure(run, watched):
    watched.choose(GATES[1].name)
    assert watched.page.input_value("#gate") == GATES[1].name
    assert watched.page.locator("tr[aria-current]").text_content().startswith(f"2{GATES[1].name}")
    assert [watched.pixels(panel).shape for panel in (0, 1)] == [(SAMPLES, 32, 3)] * 2
    table = stats.summarize(run, gates=[GATES[1].name])
    readouts = watched.page.locator("#curves output").all_text_contents()
    for text, column in zip(readouts, ("strength", "cv", "std", "drift"), strict=True):
        assert text.startswith(f"{GATES[1].name} · epoch 5 · {column} ")
        assert float(text.split(f"{column} ")[1].split()[0]) == pytest.approx(table[column].iloc[-1], rel=1e-3)
    assert watched.page.locator("#curves svg path.line").count() == 4 * len(GATES)


def test_a_curve_reads_and_chooses_the_nearest_line(run, watched):
    strength = stats.summarize(run).query("epoch == 1").set_index("gate")["strength"]
    chart = watched.page.locator("#curves svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    watched.page.mouse.move(box["x"] + 54, box["y"] + 8 + (1 - strength[GATES[2].name]) * (230 - 38 - 8))
    text = watched.page.locator("#curves output").first.text_content()
    assert text.startswith(f"{GATES[2].name} · epoch 1 · strength")
    watched.page.mouse.down()
    watched.page.mouse.up()
    assert watched.page.input_value("#gate") == GATES[2].name


def test_the_learned_vector_lies_over_the_band(run, watched, validation):
    values = run.attention(GATES[0].name, 5)
    figure = watched.page.locator("#stripe figure svg").first
    assert figure.locator("circle").count() == 1 + GATES[0].channels  # one is the key's
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    watched.page.mouse.move(box["x"] + 53, box["y"] + 50)
    channel = int(values.mean(0).argmin())
    numbers = [
        float(text) for text in re.findall(r"[\d.]+", watched.page.locator("#stripe output").first.text_content())
    ]
    expected = [
        channel,
        values.mean(0)[channel],
        values.std(0, ddof=1)[channel],
        validation.learned[GATES[0].name][channel],
    ]
    assert numbers == pytest.approx(expected, rel=1e-3)
    assert watched.column("#validation", "verdict")[:3] == ["match", "no match", "no match"]
    told = watched.page.text_content("#validation")
    assert all(text in told for text in ("91.25", validation.conclusion(), VERDICTS["no match"]))
    assert VERDICTS["trivial"] not in told


def test_fold_and_origin_are_told(watched):
    assert watched.column("#fold", "damage") == ["2.5", "10", "0.5"]
    watched.page.locator("#fold th", has_text="damage").get_by_role("button").click()
    assert watched.column("#fold", "damage") == ["0.5", "2.5", "10"]
    told = watched.page.text_content("#about")
    assert all(text in told for text in ("resnet", "digits", "manualSeed", "7", "torch", "stripe report run"))


def test_the_table_follows_the_epoch(run, watched):
    shown = {}
    watched.page.focus("#epoch")
    for epoch in reversed(EPOCHS):
        table = stats.summarize(run, epochs=EPOCHS).query("epoch == @epoch").set_index("gate")
        for title, column in (("strength", "strength"), ("CV", "cv"), ("std", "std"), ("label share", "label_share")):
            shown[epoch] = [float(text) for text in watched.column("#table", title)]
            np.testing.assert_allclose(shown[epoch], table[column], rtol=2e-3)
        watched.page.keyboard.press("ArrowLeft")
    assert shown[1] != shown[5]


def test_heads_explain_themselves_on_hover_and_focus(watched):
    tip, head = watched.page.locator("#tip"), watched.page.get_by_role("button", name="label share")
    assert not tip.is_visible()
    head.hover()
    assert tip.text_content() == stats.COLUMNS["label_share"]
    assert head.get_attribute("aria-describedby") == "tip"
    watched.page.mouse.move(0, 0)
    assert not tip.is_visible()
    head.focus()
    assert tip.is_visible()
    assert head.get_attribute("aria-describedby") == "tip"
    watched.page.keyboard.press("Escape")
    assert not tip.is_visible()
    watched.page.keyboard.press("Tab")
    assert tip.text_content() == stats.COLUMNS["sample_share"]
    explained = watched.page.locator("#validation th button[data-tip]").all_text_contents()
    assert {"distance", "limit", "kl stripe"} <= set(explained)
    for title in ("Stripe strength", "Excitation per class"):
        watched.page.get_by_role("button", name=title, exact=True).focus()
        assert len(tip.text_content()) > 40


def test_the_excitation_per_class_reads_the_means_of_classes(run, watched):
    values, labels = run.attention(GATES[0].name, 5), run.labels(5)
    figure = watched.page.locator("#stripe figure").last
    assert figure.locator("path.line").count() == 2 * 4  # the key names each class
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    watched.page.mouse.move(box["x"] + 53, box["y"] + 100)
    read = re.fullmatch(r"class (\d) · channel (\d+) · mean ([\d.]+)", figure.locator("output").text_content())
    label, channel = int(read[1]), int(read[2])
    assert channel == values.mean(0).argmin()
    assert float(read[3]) == pytest.approx(values[labels == label, channel].mean(), abs=2e-3)
    assert float(read[3]) != pytest.approx(values[labels != label, channel].mean(), abs=2e-3)


def test_the_rank_curve_reads_the_share_of_the_first_directions(run, watched):
    figure = watched.page.locator("#stripe figure").filter(has_text="Rank curve")
    assert figure.locator("circle").count() == 8
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    watched.page.mouse.move(box["x"] + 53, box["y"] + 100)
    told = figure.locator("output").text_content()
    read = re.search(r", 1 · ([\d.]+) of the variance \(([\d.]+) to ([\d.]+)\)", told)
    found = stats.spectrum(run.attention(GATES[0].name, 5), sample_ids=run.samples(5))
    expected = found.shares[0], found.low[0], found.high[0]
    assert [float(text) for text in read.groups()] == pytest.approx(expected, abs=2e-3)


def test_training_curves_are_those_of_the_run(browser, run, written, watched, tmp_path):
    assert not watched.page.is_visible("#training")
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "metrics.csv").write_text(
        "epoch,train_loss,val_loss,val_accuracy\n1,2,1.5,40\n2,1,1.25,60\n5,0.5,1.125,70\n"
    )
    found = Watched(browser, report.write(open_run(copy), tmp_path / "report.html"))
    outputs = found.page.locator("#training output")
    assert outputs.all_text_contents() == ["validation · epoch 5 · loss 1.125", "validation · epoch 5 · accuracy 70"]
    assert found.page.locator("#training figure").first.locator("path.line").count() == 2 * 2
    found.page.focus("#epoch")
    found.page.keyboard.press("ArrowLeft")
    assert outputs.first.text_content() == "validation · epoch 2 · loss 1.25"
    found.page.close()
    assert found.noted == []


# ---- what can be taken along -----------------------------------------------------------------------------


def test_the_link_keeps_what_is_chosen(browser, written, watched):
    def chosen(found: Watched) -> list[object]:
        values = [found.page.input_value(f"#{name}") for name in ("gate", "epoch", "view", "rows", "span")]
        sorts = found.page.locator("#table th").evaluate_all("heads => heads.map(head => head.ariaSort)")
        return [*values, sorts, found.page.text_content("#theme"), found.column("#table", "gate")]

    usual = chosen(watched)
    watched.choose(GATES[1].name)
    watched.page.focus("#epoch")
    watched.page.keyboard.press("ArrowLeft")
    for name, value in (("view", "epochs"), ("rows", "label"), ("span", "unit")):
        watched.page.select_option(f"#{name}", value)
    for _ in range(2):
        watched.page.locator("#table th", has_text="strength").get_by_role("button").click()
    watched.page.locator("#theme").click()
    watched.page.wait_for_url("**theme=light**")
    assert all(before != after for before, after in zip(usual[:-1], chosen(watched)[:-1], strict=True))
    opened = Watched(browser, written, link=watched.page.evaluate("location.hash"))
    assert chosen(opened) == chosen(watched)
    strange = Watched(browser, written, link="#gate=none&epoch=7&view=&rows=constructor&sort=x up&theme=pink&more=1")
    assert chosen(strange) == usual
    for found in (opened, strange):
        found.page.close()
        assert found.noted == []


def downloaded(found: Watched, label: str, to: Path) -> Path:
    with found.page.expect_download() as download:
        found.page.get_by_role("button", name=label, exact=True).click()
    to = to / download.value.suggested_filename
    download.value.save_as(to)
    return to


def test_tables_are_taken_along_as_csv(run, watched, validation, tmp_path):
    found = pd.read_csv(downloaded(watched, "Save the table of all epochs as CSV", tmp_path))
    expected = stats.summarize(run).sort_values(["gate", "epoch"])
    assert list(zip(found["gate"], found["epoch"], strict=True)) == list(
        zip(expected["gate"], expected["epoch"], strict=True)
    )
    for name in ("strength", "strength_low", "cv", "std", "drift", "sample_share"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
    gates = pd.read_csv(downloaded(watched, "Save gates as CSV", tmp_path))
    assert list(gates["verdict"]) == list(validation.table["verdict"])


@pytest.mark.parametrize("label", ["Save the heatmaps as PNG", "Save Stripe strength as PNG"])
def test_figures_are_taken_along_as_png(watched, tmp_path, label):
    picture = plt.imread(downloaded(watched, label, tmp_path))[..., :3]
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    colors, counts = np.unique((255 * picture).astype(np.uint8).reshape(-1, 3), axis=0, return_counts=True)
    assert counts.max() < 0.99 * counts.sum()
    if "heatmaps" in label:
        cells = watched.pixels().reshape(-1, 3)
        there = {tuple(color) for color in colors[counts > 50]}
        assert np.mean([tuple(cell) in there for cell in cells]) > 0.95
        assert np.mean([tuple(255 - cell) in there for cell in cells]) < 0.05


PAPERS = {"A4": 210, "Letter": 216}  # millimetres wide, of which the margins take 24


def beyond(page: Page) -> list[str]:
    """Return the texts of cells and drawings that do not lie within the page's width and their own box."""
    return page.evaluate(
        "() => [...document.querySelectorAll('th, td, .drawing, p, dd')].filter(e => e.checkVisibility() && ("
        "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 || "
        "e.closest('.box') && e.getBoundingClientRect().right > e.closest('.box').getBoundingClientRect().right + 1"
        ")).map(e => e.textContent)"
    )


@pytest.mark.parametrize("paper", PAPERS)
def test_print_cuts_nothing(watched, tmp_path, paper):
    width = int((PAPERS[paper] - 24) / 25.4 * 96)
    watched.page.set_viewport_size({"width": width, "height": 1000})
    assert beyond(watched.page)  # on the screen tables scroll
    watched.page.emulate_media(media="print")
    assert beyond(watched.page) == []
    pdfium = pytest.importorskip("pypdfium2")
    watched.page.set_viewport_size({"width": 1280, "height": 900})
    watched.page.pdf(path=tmp_path / "page.pdf", format=paper)
    pages = [page.get_textpage().get_text_bounded() for page in pdfium.PdfDocument(tmp_path / "page.pdf")]
    text = "".join(" ".join(pages).split())
    heads = watched.page.locator("th").all_text_contents()
    assert len(heads) > 20
    for each in [*heads, *watched.page.locator("td").all_text_contents(), "stripe report run"]:
        assert "".join(each.split()) in text, each


# ---- two runs --------------------------------------------------------------------------------------------


def test_two_runs_are_compared(browser, run, tmp_path):
    rng = np.random.default_rng(3)
    gates = (GATES[1], Gate("other", 5))
    with writer(tmp_path / "other", gates=gates) as second:
        for epoch in (1, 4):
            with second.epoch(epoch) as rows:
                rows.append(range(9), None, {gate.name: rng.random((9, gate.channels)) for gate in gates})
    other = open_run(tmp_path / "other")
    found = Watched(browser, report.write(run, tmp_path / "report.html", other=other))
    assert found.column("#table", "run") == ["A", "A", "B", "A", "B"]
    table = [stats.summarize(each).groupby("gate")["strength"].last() for each in (run, other)]
    strengths = [table[0][GATES[0].name], table[0][GATES[1].name], table[1][GATES[1].name], table[0][GATES[2].name]]
    np.testing.assert_allclose([float(x) for x in found.column("#table", "strength")[:4]], strengths, rtol=2e-3)
    assert float(found.column("#table", "against A")[2]) == pytest.approx(strengths[2] - strengths[1], abs=2e-4)
    assert found.column("#table", "against A")[:2] == ["–", "–"]
    found.choose(GATES[1].name)
    assert [found.pixels(panel).shape for panel in (0, 1)] == [(SAMPLES, 32, 3), (9, 32, 3)]
    assert ["epoch 5" in text for text in found.texts()] == [True, False]
    assert ["epoch 4" in text for text in found.texts()] == [False, True]
    assert found.page.locator("#curves figure").first.locator("path.dashed").count() == 2
    found.choose("other")
    assert len(found.texts()) == 1
    found.page.close()
    assert found.noted == []


# ---- other runs ------------------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_they_are(browser, tmp_path):
    texts = {f"key {HOSTILE[0]}": HOSTILE[1], "ends\u2028here": "\u2029", "list": [{"a": HOSTILE[0]}]}
    found = Watched(
        browser,
        report.write(
            record_named(tmp_path / "run", HOSTILE, model=texts),
            tmp_path / "report.html",
            fold={"rows": [{HOSTILE[1]: HOSTILE[0]}], HOSTILE[0]: HOSTILE[1]},
        ),
    )
    assert found.column("#table", "gate") == list(HOSTILE)
    assert found.page.locator("#gate option").count() == len(HOSTILE)
    assert found.page.locator("img, iframe, object").count() == 0
    assert found.page.locator("script").count() == 2
    assert found.column("#fold", HOSTILE[1]) == [HOSTILE[0]]
    assert HOSTILE[0] in found.page.text_content("#about")
    for name in HOSTILE:
        found.choose(name)
        assert found.page.text_content("#stripe-note").startswith(name)
    found.choose(HOSTILE[0])
    assert found.point(2, 3).endswith("not finite")
    assert "grey: not finite" in found.page.text_content("#panels")
    with pytest.raises(Exception, match="TrustedHTML"):
        found.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    found.page.close()
    assert [text for text in found.noted if "TrustedHTML" not in text] == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_moments_alone_are_shown_without_heatmap(browser, tmp_path, epochs):
    with writer(tmp_path / "run", contents="moments") as run:
        for number in range(epochs):
            with run.epoch(number) as epoch:
                epoch.append(
                    range(9),
                    None,
                    {"layer1.0.se": 0.2 + np.eye(9, 4) / 2, "layer2.0.se": np.eye(9, 3) * number / 2 + 0.2},
                )
    found = Watched(browser, report.write(open_run(tmp_path / "run"), tmp_path / "report.html"))
    assert not found.page.is_visible("#heat")
    assert "moments alone" in found.page.text_content("#no-heat")
    assert found.page.locator("#stripe figure:visible path.line").count() == 2  # one is the key's
    assert found.column("#table", "flags") == ["", "dead" if epochs == 1 else ""]
    assert ("two recorded epochs" in found.page.text_content("#curves")) == (epochs == 1)
    found.page.close()
    assert found.noted == []


# ---- for eyes and hands ----------------------------------------------------------------------------------


def background(found: Watched) -> int:
    """Return how bright the page's ground is, 0 to 255."""
    return int(re.findall(r"\d+", found.page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])


def test_dark_is_the_systems_or_chosen(browser, written):
    light, dark = (Watched(browser, written, color_scheme=scheme) for scheme in ("light", "dark"))
    assert background(light) > 200 > 60 > background(dark)
    theme = light.page.locator("#theme")
    theme.click()
    assert background(light) > 200
    theme.click()
    assert background(light) < 60
    theme.click()
    assert background(light) > 200
    dark.page.locator("#theme").click()
    assert background(dark) > 200
    for found in (light, dark):
        found.page.close()
        assert found.noted == []


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_out_of_the_page_or_is_too_small(browser, written, width):
    found = Watched(browser, written, viewport={"width": width, "height": 800})
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = found.page.evaluate(
        "[...document.querySelectorAll('body *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11
    if width == 400:  # the long lines and tables do not fit, so each scrolls in its own box
        assert found.page.evaluate("(b => b.scrollWidth > b.clientWidth)(document.querySelector('.box'))")
    found.page.set_viewport_size({"width": 700, "height": 800})
    found.page.wait_for_function("document.querySelector('#curves svg').viewBox.baseVal.width <= 660")
    found.page.close()
    assert found.noted == []


BROKEN_WORDS = """() => {
    const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const { data, parentElement } = walker.currentNode;
        if (!parentElement.checkVisibility() || parentElement.closest("script, dd, svg, noscript")) continue;
        for (const { 0: word, index } of data.matchAll(/[\\p{L}\\d]+/gu)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, index);
            range.setEnd(walker.currentNode, index + word.length);
            if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) broken.push(word);
        }
    }
    return broken;
}"""


def test_a_phone_breaks_no_word(browser, written):
    found = Watched(browser, written, viewport={"width": 390, "height": 800})
    assert found.page.evaluate(BROKEN_WORDS) == []
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
    found.page.evaluate("document.body.style.overflowWrap = 'anywhere'; document.body.style.width = '60px'")
    assert found.page.evaluate(BROKEN_WORDS)
    found.page.close()
    assert found.noted == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, which looks for what keeps people with disabilities out."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("no npm on the PATH: install Node.js")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]
    installed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if installed.returncode:
        pytest.skip(f"npm cannot install axe-core here: {installed.stderr[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_no_violation(browser, written, axe, scheme, width):
    found = Watched(browser, written, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True)
    found.page.evaluate(axe)

    def violations() -> list[str]:
        told = found.page.evaluate("axe.run()")["violations"]
        return [f"{each['id']}: {node['html'][:120]}" for each in told for node in each["nodes"]]

    found.page.get_by_role("button", name="label share").focus()  # an explanation is part of the page
    assert violations() == []
    found.page.evaluate("document.querySelector('#gate').parentElement.replaceWith(document.querySelector('#gate'))")
    assert any("select-name" in each for each in violations())
    found.page.close()
    assert found.noted == []


def test_every_control_is_reached_by_tab_and_shows_it(watched):
    reached: set[str] = set()
    while "observed stripe" not in reached and len(reached) < 100:
        watched.page.keyboard.press("Tab")
        name, outline = watched.page.evaluate(
            "[document.activeElement].flatMap(e => "
            "[e.id || e.getAttribute('role') || e.textContent.toLowerCase(), getComputedStyle(e).outlineStyle])"
        )
        reached.add(name)
        assert outline == "solid"
    assert {"theme", "gate", "epoch", "view", "rows", "span", "img", "png", "csv"} <= reached


# ---- at full size ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_largest_run_is_a_page_under_10_mb(browser, tmp_path):
    """54 gates, 8,064 channels, 20 epochs, 500 images, attention and squeeze: prints size and memory."""
    gates = [Gate(f"layer{1 + i // 18}.{i % 18}.se", 64 * 2 ** (i // 18)) for i in range(54)]
    rng = np.random.default_rng(0)
    stripes = {gate.name: rng.normal(size=gate.channels) for gate in gates}
    with writer(tmp_path / "run", gates=gates, squeeze=True) as run:
        for number in range(1, 21):
            with run.epoch(number) as epoch:
                noise = {n: rng.normal(0, 0.3, (500, s.size)).astype(np.float32) for n, s in stripes.items()}
                attention = {n: 1 / (1 + np.exp(-stripes[n].astype(np.float32) - each)) for n, each in noise.items()}
                epoch.append(np.arange(500), np.arange(500) % 100, attention, noise)
    page = report.write(open_run(tmp_path / "run"), tmp_path / "report.html")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"\n{page.stat().st_size / 1e6:.2f} MB, {memory:.0f} MB of memory at most\n")
    assert 5e6 < page.stat().st_size < 10e6
    found = Watched(browser, page)
    found.choose("layer3.17.se")
    assert min(found.pixels().shape[:2]) >= 45
    assert "evenly chosen" in found.page.text_content("#heat-note")
    found.page.locator("#stripe figure svg").last.hover()
    assert "10 of 100 classes" in found.page.locator("#stripe output").last.text_content()
    last = open_run(tmp_path / "run").attention("layer3.17.se", 20)
    pattern = r"sample (\d+) · label \d+ · channel (\d+) · squeeze \S+ · attention ([\d.]+)"
    read = re.fullmatch(pattern, found.point(30, 30))
    assert float(read[3]) == pytest.approx(last[int(read[1]), int(read[2])], abs=0.003)
    found.page.close()
    assert found.noted == []
