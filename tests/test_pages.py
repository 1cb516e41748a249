"""Pages of the documentation: their code runs, and no name of the package is missing.

The ``python`` blocks of a page are executed from top to bottom with the same names, in a folder
with ``docs/scene.png``. Those after a line ``<!-- not run: REASON -->`` are only compiled.
"""

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from PIL import Image

import xmodal_interp as xi

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["index.md", "how-to.md", "gallery.md"]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>\S.*?) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL
)


def executed(page: str, folder: Path) -> dict:
    """Execute the code of a page in a folder; return its names."""
    (folder / "docs").mkdir()
    (folder / "docs" / "scene.png").write_bytes((DOCS / "scene.png").read_bytes())
    names: dict = {"__name__": "page"}
    for block in BLOCK.finditer((DOCS / page).read_text("utf-8")):
        code = compile(block["code"], page, "exec")
        if block["reason"] is None:
            exec(code, names)
    plt.close("all")
    return names


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_writes_its_files(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    executed(page, tmp_path)
    text = (DOCS / page).read_text("utf-8")
    blocks = [block["code"] for block in BLOCK.finditer(text) if block["reason"] is None]
    files = re.findall(r'"([\w/]+\.(?:png|csv|html|gif|parquet))"', "".join(blocks))
    assert files
    assert all((tmp_path / file).stat().st_size > 0 for file in files)


def test_every_figure_is_in_the_gallery_and_every_picture_exists() -> None:
    text = (DOCS / "gallery.md").read_text("utf-8")
    functions = [name for name in xi.figures.__all__ if name[0].islower()]
    assert [name for name in functions if f"figures.{name}(" not in text] == []
    pictures = re.findall(r"\]\((gallery/\w+\.png)\)", text)
    assert {Path(name).name for name in pictures} == {
        path.name for path in (DOCS / "gallery").iterdir()
    }
    for name in pictures:
        with Image.open(DOCS / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 16  # not blank
        assert f'path="{Path(name).name}"' in text


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    written = "".join(page.read_text("utf-8") for page in (DOCS / "api").iterdir())
    shown = set(re.findall(r"^::: xmodal_interp\.(\S+)$", written, re.MULTILINE))
    last = {name.rpartition(".")[2] for name in shown}
    packages = {"analysis", "attention", "demo", "evaluation", "figures", "hooks", "models"}
    packages |= {"reporting", "shapes", "store", "viewer", "boxes"}
    assert set(xi.__all__) - packages <= last
    for module in (xi.evaluation, xi.figures, xi.boxes):
        assert set(module.__all__) <= last, module.__name__
