"""The report in a real browser: what is shown, read, chosen and sorted is what the run holds; nothing is fetched."""

from __future__ import annotations

import re
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stripe import report, stats
from stripe.asr.validation import RULE, Validation
from stripe.gate import Gate
from stripe.plots.drawing import HEATMAP
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

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page.set_default_timeout(PATIENCE)
        self.noted: list[str] = []
        self.page.on("console", lambda message: self.noted.append(message.text))
        self.page.on("pageerror", lambda error: self.noted.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.noted.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.noted.append(request.url) if "file:" not in request.url else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_function("shown !== null || document.getElementById('heat').hidden")

    def choose(self, gate: str) -> None:
        self.page.get_by_role("button", name=gate, exact=True).click()
        self.settle()

    def settle(self) -> None:
        self.page.evaluate("drawHeatmap()")

    def point(self, x: int, y: int) -> str:
        """Point at the middle of a cell; return what is read there."""
        canvas = self.page.locator("#canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        columns, rows = self.page.evaluate("[shown.panel.width, shown.panel.rows]")
        self.page.mouse.move(box["x"] + (x + 0.5) / columns * box["width"], box["y"] + (y + 0.5) / rows * box["height"])
        return self.page.text_content("#readout")

    def pixels(self) -> np.ndarray:
        """Return the canvas's colours, (rows, columns, 3)."""
        found = self.page.evaluate(
            "(() => { const c = document.getElementById('canvas'); return [c.height, c.width, "
            "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; })()"
        )
        return np.array(found[2], np.uint8).reshape(found[0], found[1], 4)[..., :3]

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


# ---- the heatmap -----------------------------------------------------------------------------------------


def test_the_slider_shows_each_epoch(run, watched):
    gate = GATES[0].name
    values = {epoch: run.attention(gate, epoch) for epoch in EPOCHS}
    low, high = (extreme([extreme(each) for each in values.values()]) for extreme in (np.min, np.max))
    watched.page.focus("#epoch")
    for epoch in reversed(EPOCHS):
        watched.settle()
        assert watched.page.text_content("#epoch-now") == str(epoch)
        assert_same_colors(watched.pixels(), colors_of(values[epoch], low, high))
        watched.page.keyboard.press("ArrowLeft")
    with pytest.raises(AssertionError):
        assert_same_colors(watched.pixels(), colors_of(values[EPOCHS[-1]], low, high))


def test_the_switch_shows_what_was_before_the_gate(run, watched):
    squeeze = run.squeeze(GATES[0].name, 5)
    watched.page.get_by_label("squeeze").check()
    watched.page.select_option("#span", "epoch")
    watched.settle()
    assert_same_colors(watched.pixels(), colors_of(squeeze, squeeze.min(), squeeze.max()))
    assert "squeeze" in watched.point(0, 0)
    watched.page.get_by_label("attention").check()
    watched.settle()
    assert "attention" in watched.point(0, 0)
    assert watched.page.input_value("#span") == "gate"  # each kind keeps its own


def test_colours_span_what_is_asked_for(run, watched):
    values = run.attention(GATES[0].name, 5)
    watched.page.select_option("#span", "unit")
    watched.settle()
    assert_same_colors(watched.pixels(), colors_of(values, 0, 1))
    assert [watched.page.text_content(f"#{end}") for end in ("low", "high")] == ["0", "1"]


@pytest.mark.parametrize("sort", ["recorded", "label", "mean", "sample"])
def test_hover_reads_the_run_in_every_order(run, watched, sort):
    gate, epoch = GATES[2], 5
    values, samples, labels = run.attention(gate.name, epoch), run.samples(epoch), run.labels(epoch)
    keys = {"recorded": np.arange(SAMPLES), "label": labels, "mean": values.mean(1), "sample": samples}
    order = np.argsort(keys[sort], kind="stable")
    watched.choose(gate.name)
    watched.page.select_option("#sort", sort)
    watched.settle()
    step = float(np.ptp(values)) / 508 + 5e-5
    for x, y in ((0, 0), (gate.channels - 1, SAMPLES - 1), (7, 21)):
        read = re.fullmatch(r"sample (\d+) · label (\d) · channel (\d+) · attention ([\d.]+)", watched.point(x, y))
        row = order[y]
        assert [int(text) for text in read.groups()[:3]] == [samples[row], labels[row], x]
        assert float(read[4]) == pytest.approx(values[row, x], abs=step)


def test_arrow_keys_read_values(run, watched):
    watched.page.focus("#canvas")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        watched.page.keyboard.press(key)
    assert f"sample {run.samples(5)[1]} · label {run.labels(5)[1]} · channel 1 ·" in watched.page.text_content(
        "#readout"
    )
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
    assert watched.page.input_value("#gate") == "1"
    assert watched.page.locator("tr[aria-current]").text_content().startswith(f"2{GATES[1].name}")
    assert watched.pixels().shape == (SAMPLES, 32, 3)
    table = stats.summarize(run, gates=[GATES[1].name])
    readouts = watched.page.locator("#curves output").all_text_contents()
    for text, column in zip(readouts, ("strength", "std", "drift"), strict=True):
        assert text.startswith(f"{GATES[1].name} · epoch 5 · {column} ")
        assert float(text.split(f"{column} ")[1].split()[0]) == pytest.approx(table[column].iloc[-1], rel=1e-3)
    assert watched.page.locator("#curves svg path.line").count() == 3 * len(GATES)


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
    assert watched.page.input_value("#gate") == "2"


def test_the_learned_vector_lies_over_the_band(run, watched, validation):
    values = run.attention(GATES[0].name, 5)
    assert watched.page.locator("#stripe svg circle.learned").count() == 1 + GATES[0].channels  # one is the key's
    figure = watched.page.locator("#stripe figure svg")
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    watched.page.mouse.move(box["x"] + 53, box["y"] + 50)
    channel = int(values.mean(0).argmin())
    numbers = [float(text) for text in re.findall(r"[\d.]+", watched.page.text_content("#stripe output"))]
    expected = [
        channel,
        values.mean(0)[channel],
        values.std(0, ddof=1)[channel],
        validation.learned[GATES[0].name][channel],
    ]
    assert numbers == pytest.approx(expected, rel=1e-3)
    assert watched.column("#validation", "verdict") == ["match", "no match", "no match"]
    assert "91.25" in watched.page.text_content("#validation dl")


def test_fold_and_origin_are_told(watched):
    assert watched.column("#fold", "damage") == ["2.5", "10", "0.5"]
    watched.page.locator("#fold th", has_text="damage").get_by_role("button").click()
    assert watched.column("#fold", "damage") == ["0.5", "2.5", "10"]
    told = watched.page.text_content("#about")
    assert all(text in told for text in ("resnet", "digits", "manualSeed", "7", "torch", "stripe report run"))


# ---- other runs ------------------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_they_are(browser, tmp_path):
    texts = {f"key {HOSTILE[0]}": HOSTILE[1], "ends\u2028here": "\u2029"}
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
    assert found.page.is_visible("#grey")
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
    assert found.page.locator("#stripe figure path.observed").count() == 1
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


def test_every_control_is_reached_by_tab_and_shows_it(watched):
    reached: set[str] = set()
    while "canvas" not in reached and len(reached) < 100:
        watched.page.keyboard.press("Tab")
        name, outline = watched.page.evaluate(
            "(e => [e.id || e.name || e.textContent, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        reached.add(name)
        assert outline == "solid"
    assert {"theme", "gate", "epoch", "kind", "sort", "span", "canvas"} <= reached


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
    assert min(found.pixels().shape[:2]) >= 50
    assert "evenly chosen" in found.page.text_content("#heat-note")
    last = open_run(tmp_path / "run").attention("layer3.17.se", 20)
    read = re.fullmatch(r"sample (\d+) · label \d+ · channel (\d+) · attention ([\d.]+)", found.point(30, 30))
    assert float(read[3]) == pytest.approx(last[int(read[1]), int(read[2])], abs=0.003)
    found.page.close()
    assert found.noted == []
