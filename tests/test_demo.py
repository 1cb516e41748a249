"""The demo on few scenes: its findings, its files, and the user's files that it leaves alone."""

import hashlib
import html
import json
import re
import shutil
from base64 import b64encode
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from xmodal_interp.analysis import cross_modal_ratio
from xmodal_interp.demo import pipeline, run_demo
from xmodal_interp.demo.output_folder import FILE_LIST, staging_folder
from xmodal_interp.demo.pipeline import Findings, held_out_scenes
from xmodal_interp.errors import InputError
from xmodal_interp.reporting.estimates import short
from xmodal_interp.shapes.scenes import COLORS
from xmodal_interp.store import open_store

N_SCENES = 24


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> Findings:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", n_scenes=N_SCENES)


def test_the_model_answers_and_one_head_attends_to_the_object(findings) -> None:
    accuracy = findings.tables["accuracy"].set_index("question_kind")["accuracy"]
    assert set(accuracy.index) == {"color", "shape", "place", "count", "existence", "description"}
    assert accuracy.min() > 0.8
    trained, first = (
        findings.tables[name]["hit"].iloc[0] for name in ("best_head", "best_head_untrained")
    )
    assert trained > 0.9
    assert first < 0.7
    assert findings.tables["pointing"]["hit_chance"].mean() < 0.2


def test_boxes_are_those_of_the_enlarged_scene(findings) -> None:
    sample = open_store(findings.folder / "store")[0]
    scene = held_out_scenes(1)[0]
    assert sample.images[0].size == (4 * scene.width, 4 * scene.height)
    x0, y0, x1, y1 = (round(edge) for edge in sample.labels["box"])
    inside = np.asarray(sample.images[0])[y0:y1, x0:x1]
    color = COLORS[sample.labels["answer"]]
    middle = inside[len(inside) // 2, inside.shape[1] // 2]
    assert np.abs(middle - np.asarray(color)).max() < 40
    outside = np.asarray(sample.images[0])[max(0, y0 - 3), (x0 + x1) // 2]
    assert np.abs(outside - np.asarray(color)).max() > 40


def test_the_demo_computes_with_at_most_four_threads(tmp_path, monkeypatch) -> None:
    during: list[int] = []

    def stopped(*_: object) -> None:
        during.append(torch.get_num_threads())
        raise RuntimeError("stopped")

    monkeypatch.setattr(pipeline, "_run", stopped)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            run_demo(tmp_path / "out")
        assert (during, torch.get_num_threads()) == ([4], 6)
    finally:
        torch.set_num_threads(before)


def test_tables_are_read_back_unchanged(findings) -> None:
    for name, table in findings.tables.items():
        back = pd.read_parquet(findings.folder / "tables" / f"{name}.parquet")
        pd.testing.assert_frame_equal(back, table.rename_axis(None), check_dtype=False)
        assert len(pd.read_csv(findings.folder / "tables" / f"{name}.csv")) == len(table)


def test_the_page_holds_every_picture_and_every_table(findings) -> None:
    page = (findings.folder / "report.html").read_text("utf-8")
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert all(source.startswith("data:image/") for source in sources)
    pictures = [*(findings.folder / "pictures").iterdir()]
    assert len(pictures) == 14
    for picture in pictures:
        assert f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}" in sources
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 16  # not blank
    for name in findings.tables:
        assert f'data-file="{name.replace("_", "-")}.csv"' in page
    assert all(line in html.unescape(page) for line in findings.lines)
    assert (findings.folder / "report.md").exists()


def test_the_page_is_the_report_of_the_store(findings) -> None:
    page = (findings.folder / "report.html").read_text("utf-8")
    table = cross_modal_ratio(open_store(findings.folder / "store"))
    assert f"Share of text attention on the image: {short(table['ratio'].mean())} (95%" in page
    for anchor in ("findings", "glance", "captured", "cross-modal-ratio", "provenance"):
        assert f'<section id="{anchor}">' in page


def test_the_store_contains_the_colour_questions(findings) -> None:
    store = open_store(findings.folder / "store")
    assert len(store) == N_SCENES
    assert {"box", "other_boxes", "answer"} <= set(store[0].labels)


@pytest.fixture
def earlier(findings, tmp_path) -> Path:
    """Return a copy of a demo's folder, with one other file."""
    folder = tmp_path / "again"
    shutil.copytree(findings.folder, folder)
    (folder / "tables" / "mine.csv").write_text("years,of,work")
    return folder


def rewritten(folder: Path, names: tuple[str, ...] = ("report.md",), **options) -> None:
    with staging_folder(folder, **options) as hidden:
        for name in names:
            (hidden / name).parent.mkdir(exist_ok=True)
            (hidden / name).write_text("new")


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_demo_is_replaced_and_other_files_are_kept(earlier) -> None:
    for _ in range(2):
        rewritten(earlier)
        assert files_in(earlier) == {FILE_LIST, "report.md", "tables/mine.csv"}
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
        f"Files of an earlier demo in {str(earlier)!r} have changed: report.md. Choose another "
        "folder, or pass --force to overwrite them."
    )
    assert (earlier / "report.md").read_text() == "my notes"
    rewritten(earlier, force=True)
    assert files_in(earlier) == {FILE_LIST, "report.md", "tables/mine.csv"}


def test_other_files_of_the_same_names_are_left_alone(earlier) -> None:
    with pytest.raises(InputError, match=r"did not write, at the paths of tables/mine\.csv"):
        rewritten(earlier, ("report.md", "tables/mine.csv"))
    assert (earlier / "tables" / "mine.csv").read_text() == "years,of,work"
    assert open_store(earlier / "store")[0].call(0) is not None  # the earlier demo is complete


def test_links_are_not_followed_and_no_file_outside_is_removed(earlier, tmp_path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("work")
    (earlier / "report.md").unlink()
    (earlier / "report.md").symlink_to(precious)
    with pytest.raises(InputError, match=r"have changed: report\.md"):
        rewritten(earlier)
    with pytest.raises(InputError, match="symbolic links"):
        rewritten(earlier, force=True)
    digest = hashlib.sha256(b"work").hexdigest()
    for name in ("../precious.txt", str(precious)):  # a list that another program wrote
        listed = {"made_by": "xmodal demo", "files": {name: digest}}
        (earlier / FILE_LIST).write_text(json.dumps(listed))
        with pytest.raises(InputError, match="contains files that the demo did not write"):
            rewritten(earlier)
    assert precious.read_text() == "work"


def test_a_demo_is_not_written_into_a_store(findings) -> None:
    inside = findings.folder / "store" / "samples"
    for folder in (inside, inside.parent):
        with pytest.raises(InputError, match="belongs to the store"):
            run_demo(folder)


def test_a_folder_with_other_files_is_an_error(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as error:
        run_demo(tmp_path)
    assert str(error.value) == (
        f"{str(tmp_path)!r} contains files that the demo did not write. Choose a new or empty "
        "folder (xmodal demo FOLDER), or pass --force to overwrite files of the same names."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    rewritten(tmp_path, force=True)
    assert files_in(tmp_path) == {FILE_LIST, "report.md", "thesis.tex"}
