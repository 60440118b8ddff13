"""The documentation's site: whole, without a dead link, without anything from elsewhere, searchable."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("pdoc")
pytest.importorskip("nbconvert")
import make_docs

CHROMIUM = shutil.which("chromium")


class Links(HTMLParser):
    """What a page refers to, what it loads, and the anchors it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if attributes.get("src"):
            self.loaded.append(attributes["src"])
        if tag == "link" and attributes.get("href"):
            self.loaded.append(attributes["href"])


def dead_links(site):
    """Every link of a site that leads to no file, or to no such place in it, as 'page: link'."""
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            led = (path.parent / unquote(target.path)).resolve() if target.path else path
            anchors = pages[led].anchors if led in pages else set()
            if not led.is_file() or (target.fragment and unquote(target.fragment) not in anchors):
                yield f"{path.relative_to(site)}: {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    make_docs.write_site(out)
    return out.resolve()


def test_no_link_is_dead(site):
    assert list(dead_links(site)) == []
    kinds = {path.parent.name for path in site.rglob("*.html")}
    assert {"guide", "stripe"} <= kinds


def test_notebooks_and_figures_are_shown_whole(site):
    """Markdown that was not read as such would stand there as it is written."""
    for path in site.glob("guide/notebook_*.html"):
        text = re.sub(r'(?s)<div class="pdoc-code.*?</div>', "", path.read_text())  # what shows the page's source
        assert "<img" in text
        assert "<table" in text
        assert not re.search(r"!\[png\]|(?m:^## )", text), path.name
        assert "max-width:100%" in text.replace(" ", "")


def test_a_dead_link_would_be_found(tmp_path):
    (tmp_path / "a.html").write_text('<a id="x" href="b.html">b</a><a href="a.html#y">y</a><a href="#x">x</a>')
    assert list(dead_links(tmp_path.resolve())) == ["a.html: b.html", "a.html: a.html#y"]


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for each in Links(path.read_text()).loaded:
            assert not urlsplit(each).netloc, f"{path.name} loads {each}"


def test_every_page_and_every_public_name_is_there(site):
    root = Path(make_docs.ROOT)
    sources = [*root.glob("notebooks/*.ipynb"), *root.glob("figures/*/README.md"), root / "README.md"]
    assert {page.source for page in make_docs.read_pages()} >= {str(each.relative_to(root)) for each in sources}
    api = Links((site / "stripe.html").read_text()).anchors
    assert {"Run", "Recorder", "find_gates", "open_run", "fold", "Gate"} <= api
    assert {"insert", "deploy", "validate"} <= Links((site / "stripe/asr.html").read_text()).anchors
    assert {"study", "fold", "GateUse"} <= Links((site / "stripe/folding.html").read_text()).anchors
    drawn = Links((site / "stripe/plots.html").read_text()).anchors
    assert {"stripe_heatmap", "before_after"} <= drawn


def test_a_link_to_nowhere_is_refused_and_code_is_no_link(tmp_path):
    page = make_docs.Page("README.md", "guide", "[a](no/such/file.md)")
    with pytest.raises(ValueError, match=r"README.md links to 'no/such/file.md'"):
        make_docs.relinked(page, [page], tmp_path)
    text = "`table[0](x)` and [licence](LICENSE)\n```\na[0](y)\n```\n"
    page = make_docs.Page("README.md", "guide", text)
    assert make_docs.relinked(page, [page], tmp_path) == text.replace("(LICENSE)", "(files/LICENSE)")
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["LICENSE"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium")
def test_a_browser_without_a_network_finds_a_name_by_searching(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        page = browser.new_context(offline=True).new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.wait_for_url("**/guide.html")
        assert page.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
        page.get_by_role("searchbox").fill("find_gates")
        page.locator(".search-result a").first.wait_for(timeout=60_000)
        assert "find_gates" in page.locator("main").inner_text()
        browser.close()
    assert wrong == []
