"""The demo on few scenes: its results, the files it writes, and files that it must not change."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from xmodal_interp.demo import run_demo
from xmodal_interp.demo.placing import MARK, workshop
from xmodal_interp.demo.running import Findings
from xmodal_interp.errors import InputError
from xmodal_interp.store import open_store

N_SCENES = 24


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> Findings:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", n_scenes=N_SCENES)


def test_accuracy_of_the_model_and_of_its_best_head(findings) -> None:
    accuracy = findings.tables["accuracy"].set_index("question_kind")["accuracy"]
    assert set(accuracy.index) == {"color", "shape", "place", "count", "existence", "description"}
    assert accuracy.min() > 0.8
    trained, first = (
        findings.tables[name]["hit"].iloc[0] for name in ("best_head", "best_head_untrained")
    )
    assert trained > 0.9
    assert first < 0.7
    assert findings.tables["pointing"]["hit_chance"].mean() < 0.2


def test_tables_can_be_read_back(findings) -> None:
    for name, table in findings.tables.items():
        back = pd.read_parquet(findings.folder / "tables" / f"{name}.parquet")
        pd.testing.assert_frame_equal(back, table.rename_axis(None), check_dtype=False)
        assert len(pd.read_csv(findings.folder / "tables" / f"{name}.csv")) == len(table)


def test_the_page_shows_every_picture_and_links_every_table(findings) -> None:
    page = (findings.folder / "report.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert sorted(shown) == sorted(
        path.relative_to(findings.folder).as_posix()
        for path in (findings.folder / "pictures").iterdir()
    )
    assert len(shown) == 14
    for picture in shown:
        with Image.open(findings.folder / picture) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 16  # not blank
    links = re.findall(r'href="(tables/[^"]+)"', page)
    assert all((findings.folder / link).exists() for link in links)
    assert {Path(link).stem for link in links} == set(findings.tables)
    assert (findings.folder / "report.md").exists()


def test_the_store_holds_the_questions_about_colour(findings) -> None:
    store = open_store(findings.folder / "store")
    assert len(store) == N_SCENES
    assert {"box", "other_boxes", "answer"} <= set(store[0].labels)


@pytest.fixture
def earlier(findings, tmp_path) -> Path:
    """A copy of a demo's output folder with an additional file of the user."""
    folder = tmp_path / "again"
    shutil.copytree(findings.folder, folder)
    (folder / "tables" / "mine.csv").write_text("years,of,work")
    return folder


def rewritten(folder: Path, names: tuple[str, ...] = ("report.md",), **options) -> None:
    with workshop(folder, **options) as hidden:
        for name in names:
            (hidden / name).parent.mkdir(exist_ok=True)
            (hidden / name).write_text("new")


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_demo_is_replaced_and_other_files_are_kept(earlier) -> None:
    for _ in range(2):
        rewritten(earlier)
        assert files_in(earlier) == {MARK, "report.md", "tables/mine.csv"}
        assert (earlier / "report.md").read_text() == "new"
        assert (earlier / "tables" / "mine.csv").read_text() == "years,of,work"
    assert not (earlier / "pictures").exists()


def test_a_failed_demo_keeps_the_earlier_one(earlier, tmp_path) -> None:
    before = files_in(earlier)
    for folder in (earlier, tmp_path / "new"):
        with pytest.raises(FileNotFoundError):
            rewritten(folder, ("report.md", "no/such/folder"))
    assert files_in(earlier) == before
    assert not (tmp_path / "new").exists()


def test_changed_files_are_not_overwritten(earlier) -> None:
    (earlier / "report.md").write_text("my notes")
    with pytest.raises(InputError) as error:
        rewritten(earlier)
    assert str(error.value) == (
        f"The demo replaces only files that it made. In {str(earlier)!r} some were changed since: "
        "report.md. Choose another folder, or pass --force to overwrite them."
    )
    assert (earlier / "report.md").read_text() == "my notes"
    rewritten(earlier, force=True)
    assert files_in(earlier) == {MARK, "report.md", "tables/mine.csv"}


def test_other_files_of_the_same_names_are_not_overwritten(earlier) -> None:
    with pytest.raises(InputError, match=r"other ones of the same names: tables/mine\.csv"):
        rewritten(earlier, ("report.md", "tables/mine.csv"))
    assert (earlier / "tables" / "mine.csv").read_text() == "years,of,work"
    assert open_store(earlier / "store")[0].call(0) is not None  # the earlier demo is complete


def test_links_are_not_followed_and_no_file_outside_is_removed(earlier, tmp_path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("work")
    (earlier / "report.md").unlink()
    (earlier / "report.md").symlink_to(precious)
    with pytest.raises(InputError, match=r"changed since: report\.md"):
        rewritten(earlier)
    with pytest.raises(InputError, match="symbolic links"):
        rewritten(earlier, force=True)
    digest = hashlib.sha256(b"work").hexdigest()
    for name in ("../precious.txt", str(precious)):  # a forged list of files
        listed = {"made_by": "xmodal demo", "files": {name: digest}}
        (earlier / MARK).write_text(json.dumps(listed))
        with pytest.raises(InputError, match="holds other files"):
            rewritten(earlier)
    assert precious.read_text() == "work"


def test_a_demo_inside_a_store_is_an_error(findings) -> None:
    inside = findings.folder / "store" / "samples"
    for folder in (inside, inside.parent):
        with pytest.raises(InputError, match="must not be written into a store"):
            run_demo(folder)


def test_a_folder_with_other_files_is_an_error(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as error:
        run_demo(tmp_path)
    assert str(error.value) == (
        f"The demo needs a new or an empty folder; {str(tmp_path)!r} holds other files. Choose "
        "another one: xmodal demo FOLDER. Or pass --force to overwrite files of the same names."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    rewritten(tmp_path, force=True)
    assert files_in(tmp_path) == {MARK, "report.md", "thesis.tex"}
