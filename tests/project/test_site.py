"""The site: it builds without warnings, every link leads somewhere, every image is described,
nothing comes from the network.
"""

import json
import subprocess
import sys
import tomllib
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

REPOSITORY = Path(__file__).parents[2]


class Page(HTMLParser):
    """The anchors, links, images and loaded files of an HTML page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.images, self.loaded, self.text = (
            set(),
            [],
            [],
            [],
            path.read_text(encoding="utf-8"),
        )
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        source = values.get("href") if tag == "link" else values.get("src")
        if tag in ("link", "script", "img", "iframe", "video", "source") and source:
            self.loaded.append(source)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("build") / "site"
    command = [sys.executable, "-m", "dlm_core", "site", "--out", out]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_the_front_page_and_every_notebook_are_there(site, pages):
    names = tomllib.loads((REPOSITORY / "notebooks" / "profiles.toml").read_text())
    notebooks = [
        path.relative_to(REPOSITORY) for path in (REPOSITORY / "notebooks").glob("*/*.ipynb")
    ]
    expected = [f"notebooks/{name}.html" for name in names] + [
        str(path.with_suffix(".html"))
        for path in notebooks
        if ".ipynb_checkpoints" not in path.parts
    ]
    front = pages[site / "docs" / "index.html"]
    linked = {
        str((site / "docs" / urlsplit(link).path).resolve()) for link in front.links
    }  # the sidebar lists them all
    for page in expected:
        assert (site / page).exists() and str((site / page).resolve()) in linked
    assert (
        "docs/index.html" in (site / "index.html").read_text() and "00_quickstart.png" in front.text
    )


def test_no_page_names_a_path_of_the_machine_that_built_it(pages):
    for path, page in pages.items():
        assert str(REPOSITORY) not in page.text, path.name


def test_every_internal_link_leads_somewhere(site, pages):
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
            checked += 1
    assert checked > 100


def test_every_image_is_described(pages):
    images = [(path, image) for path, page in pages.items() for image in page.images]
    assert len(images) > 20
    for path, image in images:
        assert image.get("alt", "").strip(), f"{path.name}: {image.get('src')}"


def test_nothing_is_loaded_from_the_network(site, pages):
    for path, page in pages.items():
        for source in page.loaded:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
            assert source.startswith("data:") or (path.parent / urlsplit(source).path).exists(), (
                f"{path.name}: {source}"
            )
    assert any(
        "mathjax/tex-chtml-full.js" in source for page in pages.values() for source in page.loaded
    )
    assert len(list((site / "_static" / "mathjax").rglob("*.woff"))) > 20


def test_the_reference_and_the_search_know_the_attacks(site, pages):
    page = pages[site / "docs" / "api.html"]
    assert {
        "dlm_core.attacks.dlm_plus",
        "dlm_core.observation.Observation",
        "dlm_core.beyond.exact.recover",
    } <= page.ids
    assert "‖Δ‖²" in page.text and "Σ_layers" in page.text  # docstrings keep their notation
    assert "sparsif" in (site / "searchindex.js").read_text()


def test_captions_and_claims_stand_in_the_pages_as_they_are_written(tmp_path, monkeypatch):
    from markdown_it import MarkdownIt

    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    import extension

    wild = "a < b & c_1 *d* $e$ `f` [g](h) <script>alert(1)</script> | \\ ![i](j) &lt; {k}"
    claim = dict.fromkeys(("statement", "criterion", "evidence"), wild)
    claim |= {"whose": "ours", "verdict": "holds", "cause": ""}
    content = {
        "figures/claims.json": {"91_works": {"profile": "quick", "claims": [claim]}},
        "figures/manifest.json": {"91_works.png": {"notebook": "91_works", "caption": wild}},
        "notebooks/91_works.ipynb": {"cells": [{"source": ["# It works"]}]},
    }
    for name, written in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(written))
    monkeypatch.setattr(extension, "REPOSITORY", tmp_path)
    html = MarkdownIt().render(extension.results().replace("<br>", ""))
    written = escape(wild)
    assert html.count(written) == 5, "as description, caption, statement, criterion, evidence"
    assert f'alt="{written}"' in html and f"<em>{written}</em>" in html
