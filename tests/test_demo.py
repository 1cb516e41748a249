"""The demo: it finds what is there, on scenes it was not trained on, and writes one page."""

import pandas as pd
import pytest

from xmodal_interp.demo import run_demo
from xmodal_interp.errors import InputError


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), n_scenes=24)


def test_the_shipped_model_answers_and_a_head_points(findings) -> None:
    accuracy = findings.tables["accuracy"].set_index("question_kind")["accuracy"]
    assert accuracy[["color", "shape", "place", "count", "existence"]].min() > 0.9
    best, random = (findings.tables[f"best_head{s}"].iloc[0]["hit"] for s in ("", "_untrained"))
    assert best > 0.9
    assert random < 0.6


def test_the_page_shows_every_picture_and_links_every_table(findings) -> None:
    page = (findings.folder / "report.html").read_text()
    pictures = list((findings.folder / "pictures").glob("*.png"))
    assert len(pictures) == 13
    for path in pictures:
        assert f'src="pictures/{path.name}"' in page
    for name, table in findings.tables.items():
        assert f'href="tables/{name}.csv"' in page
        assert len(pd.read_parquet(findings.folder / f"tables/{name}.parquet")) == len(table)
    for line in findings.lines:
        assert line.split(":")[0] in page


def test_a_folder_with_other_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as error:
        run_demo(tmp_path)
    assert str(error.value) == (
        f"The demo needs a new or an empty folder; {str(tmp_path)!r} holds other files. Choose "
        "another one: xmodal demo FOLDER."
    )
    assert (tmp_path / "thesis.tex").exists()
