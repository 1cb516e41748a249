"""The demo never touches what is not its own."""

import pytest

from xmodal_interp.demo import run_demo
from xmodal_interp.errors import InputError


def test_a_folder_with_other_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as error:
        run_demo(tmp_path)
    assert str(error.value) == (
        f"The demo needs a new or an empty folder; {str(tmp_path)!r} holds other files. Choose "
        "another one: xmodal demo FOLDER."
    )
    assert (tmp_path / "thesis.tex").exists()
