"""Write the documentation as one site: README, notebooks, the pages beside the records and the API reference.

pdoc renders the site and makes it searchable. Each page becomes the docstring of a module in a temporary package,
`guide`. Nothing on the site is loaded from elsewhere, so it can be read offline.
"""

import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build/docs"
LINK = re.compile(r"```.*?```|`[^`\n]*`|(\]\(|\b(?:src|href)=\")([^)\"#\s]*)(#[^)\"\s]*)?(?=[)\"])", re.DOTALL)
"""A link in Markdown or HTML: opening, target, anchor; or a piece of code, in which nothing is a link."""
TARGET = re.compile(r"[a-z]+:|//")  # a target that begins like this leads to another site
REDIRECT = (
    '<!doctype html><meta charset="utf-8"><title>stripe</title><meta http-equiv="refresh" content="0; url=guide.html">'
)
PRIVATE = re.compile(r'<a href="[^"]*#_[^"]*">(.*?)</a>', re.DOTALL)
"""A link that pdoc makes to a private class, which has no page on the site."""

WRAPPING = re.compile(r"<style.*?</style>|</?div[^>]*>", re.DOTALL)
"""What pandas puts around a table; Markdown after it would not be rendered."""
BLANK = re.compile(r"\n(?:[ \t]*\n)+")
CSS = ".pdoc img { max-width: 100%; } .pdoc table { display: block; overflow-x: auto; }"

HIDDEN = ("!stripe.cli",)  # the reference of the commands is their --help


@dataclass(frozen=True)
class Page:
    """A page of the guide: its path in the repository, its module, its Markdown and the files it comes with."""

    source: str
    module: str
    text: str
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The page's path on the site."""
        return f"{self.module.replace('.', '/')}.html"


def main() -> int:
    """Parse the command line and write the site."""
    parser = argparse.ArgumentParser(description="Write README, notebooks, pages and API reference as one site.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the site goes; replaced")
    write_site(parser.parse_args().out)
    return 0


def write_site(out: Path) -> None:
    """Write the site into a folder, which is replaced; ValueError for a page that links to a missing file."""
    pages = list(read_pages())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        site, guide = Path(folder, "site"), Path(folder, "modules", "guide")
        (site / "guide").mkdir(parents=True)
        guide.mkdir(parents=True)
        for page in pages:
            name = page.module.partition(".")[2] or "__init__"
            text = f"__docformat__ = 'markdown'\n__doc__ = {relinked(page, pages, site)!r}\n"
            (guide / f"{name}.py").write_text(text, encoding="utf-8")
        render(guide.parent, site)
        (site / "index.html").write_text(REDIRECT, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        site.rename(out)
    print(f"{out / 'index.html'}: {len(pages)} pages and the API reference")


def read_pages() -> Iterable[Page]:
    """Yield the pages of the guide, the README first."""
    yield Page("README.md", "guide", (ROOT / "README.md").read_text(encoding="utf-8"))
    yield Page("CHANGELOG.md", "guide.changes", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        yield read_notebook(notebook)
    for text in sorted((ROOT / "figures").glob("*/README.md")):
        name = f"guide.records_{slug(text.parent.name)}"
        yield Page(text.relative_to(ROOT).as_posix(), name, text.read_text(encoding="utf-8"))


def read_notebook(path: Path) -> Page:
    """Read a notebook as Markdown, with the images that its cells produced."""
    import nbformat
    from nbconvert import MarkdownExporter

    module = f"guide.notebook_{slug(path.stem)}"
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for output in (each for cell in notebook.cells for each in cell.get("outputs", []) if "data" in each):
        if "text/html" in output.data:
            output.data["text/html"] = " ".join(WRAPPING.sub("", output.data["text/html"]).split())
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    text = BLANK.sub("\n\n", text)
    files = {f"{slug(path.stem)}-{name}": content for name, content in resources.get("outputs", {}).items()}
    for name in resources.get("outputs", {}):
        text = text.replace(f"]({name})", f"](../files/{slug(path.stem)}-{name})")
    return Page(path.relative_to(ROOT).as_posix(), module, text, files)


def relinked(page: Page, pages: Iterable[Page], site: Path) -> str:
    """Return a page's text with links to pages of the site or to copies of files; ValueError for a dead link."""
    addresses = {other.source: other.address for other in pages}
    for name, content in page.files.items():
        write(site / "files" / name, content)

    def lead(found: re.Match[str]) -> str:
        opening, target, anchor = found[1], found[2], found[3] or ""
        if not target or TARGET.match(target) or target.startswith("../files/"):
            return found[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.source), target))
        if place not in addresses and not (ROOT / place).is_file():
            raise ValueError(f"{page.source} links to '{target}', which is not there: mend the link")
        if place not in addresses:
            write(site / "files" / place, (ROOT / place).read_bytes())
        led = addresses.get(place, f"files/{place}")
        return opening + posixpath.relpath(led, posixpath.dirname(page.address) or ".") + anchor

    return LINK.sub(lead, page.text)


def render(modules: Path, site: Path) -> None:
    """Let pdoc render the guide and the package in a process of its own, since it imports and changes modules."""
    code = (
        "import importlib, pathlib, pdoc, pkgutil, stripe\n"
        "packages = [each.name for each in pkgutil.iter_modules(stripe.__path__, 'stripe.') if each.ispkg]\n"
        "for room in (stripe, *map(importlib.import_module, packages)):\n"
        "    if hasattr(room, '__getattr__'):\n"  # such a package imports its names only on first use
        "        vars(room).update({name: getattr(room, name) for name in room.__all__})\n"
        "choices = {'docformat': 'google', 'footer_text': 'stripe ' + stripe.__version__, 'search': True}\n"
        "pdoc.render.configure(**choices, template_directory=pathlib.Path('templates').absolute())\n"
        f"pdoc.pdoc('guide', 'stripe', *{HIDDEN!r}, output_directory=pathlib.Path({str(site)!r}))\n"
    )
    path = os.pathsep.join([str(modules), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
    write(modules / "templates/custom.css", CSS.encode())
    python = [sys.executable, "-W", "error::UserWarning:pdoc.doc"]
    subprocess.run([*python, "-c", code], env=environment, cwd=modules, check=True)
    for page in site.rglob("*.html"):
        page.write_text(PRIVATE.sub(r"\1", page.read_text(encoding="utf-8")), encoding="utf-8")


def slug(name: str) -> str:
    """Return a name in which every character may be part of a module's name."""
    return re.sub(r"\W", "_", name)


def write(path: Path, content: bytes) -> None:
    """Write a file, and make its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main())
