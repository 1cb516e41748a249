"""The demo on few scenes: what it finds, what it writes, and what it never touches."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from xmodal_interp.demo import run_demo
from xmodal_interp.demo.running import Findings, _make_room
from xmodal_interp.errors import InputError
from xmodal_interp.store import open_store

N_SCENES = 24


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> Findings:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", n_scenes=N_SCENES)


def test_the_model_sees_and_one_head_points(findings) -> None:
    accuracy = findings.tables["accuracy"].set_index("question_kind")["accuracy"]
    assert set(accuracy.index) == {"color", "shape", "place", "count", "existence", "description"}
    assert accuracy.min() > 0.8
    trained, first = (
        findings.tables[name]["hit"].iloc[0] for name in ("best_head", "best_head_untrained")
    )
    assert trained > 0.9
    assert first < 0.7
    assert findings.tables["pointing"]["hit_chance"].mean() < 0.2


def test_tables_can_be_read_back_as_they_were(findings) -> None:
    for name, table in findings.tables.items():
        back = pd.read_parquet(findings.folder / "tables" / f"{name}.parquet")
        pd.testing.assert_frame_equal(back, table, check_dtype=False)
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
            assert len(image.convert("RGB").getcolors(2**24)) > 16  # something is drawn
    links = re.findall(r'href="(tables/[^"]+)"', page)
    assert all((findings.folder / link).exists() for link in links)
    assert {Path(link).stem for link in links} == set(findings.tables)
    assert (findings.folder / "report.md").exists()


def test_the_store_holds_the_questions_about_colour(findings) -> None:
    store = open_store(findings.folder / "store")
    assert len(store) == N_SCENES
    assert {"box", "other_boxes", "answer"} <= set(store[0].labels)


def test_an_earlier_demo_is_replaced(findings, tmp_path) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(findings.folder / ".xmodal-demo", folder)
    (folder / "report.md").write_text("old")
    _make_room(folder)
    assert [path.name for path in folder.iterdir()] == [".xmodal-demo"]


def test_a_folder_with_other_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as error:
        run_demo(tmp_path)
    assert str(error.value) == (
        f"The demo needs a new or an empty folder; {str(tmp_path)!r} holds other files. Choose "
        "another one: xmodal demo FOLDER."
    )
    assert (tmp_path / "thesis.tex").exists()
