"""The documentation site builds with strict links, and requests nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_in_the_site(site) -> None:
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        name = page.relative_to(docs).with_suffix("")
        built = site / ("index.html" if name == Path("index") else f"{name}/index.html")
        assert built.is_file(), name


def test_pages_request_nothing_from_other_hosts(site) -> None:
    loads = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:)?//")
    styles = re.compile(
        r"<link\b(?=[^>]*rel=\"?(?:stylesheet|preconnect|icon))[^>]*href=\"?(https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text("utf-8")
        assert not loads.search(text), page
        assert not styles.search(text), page


def test_functions_are_documented_with_their_parameters(site) -> None:
    """The function of a module with the same name is shown, and text is free of markup."""
    for page, function, parameter in (
        ("analysis", "time_alignment", "calls"),
        ("figures", "time_panels", "panels"),
        ("evaluation", "known_heads", "table"),
        ("capture", "capture", "vlm"),
    ):
        text = (site / "api" / page / "index.html").read_text("utf-8")
        body = re.split(rf'<h2 id="[\w.]*\.{function}" class="doc doc-heading">', text)[1]
        assert f"<code>{parameter}</code>" in body.split('class="doc doc-heading">')[0]
        assert not re.search(r":(?:func|class|meth|mod):", text)
