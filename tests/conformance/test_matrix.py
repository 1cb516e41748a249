"""The stored support matrix and its page agree with measurements of the installed versions."""

import pandas as pd
import pytest

from tests.conformance.matrix import DOCUMENT, STALE, STORED, TABLE, versions
from tests.helpers.model_types import types
from xmodal_interp.models import FAMILIES, support


def test_the_table_has_all_types_and_the_versions() -> None:
    assert set(STORED["types"]) == set(types()), f"{TABLE.name} {STALE}"
    assert STORED["versions"] == versions(), f"{TABLE.name} {STALE}"


def test_the_page_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == support.markdown(), f"{DOCUMENT.name} {STALE}"


def test_the_table_has_a_row_per_type_and_current_rules() -> None:
    table = support.families()
    assert table["model_type"].tolist() == sorted(types())
    assert table.attrs == versions()
    llava = table.set_index("model_type").loc["llava"]
    assert llava.to_dict() == {
        "layers": "vision.self: 2, language.self: 2",
        "without_matrix": "",
        "as_probabilities": "",
        "worst_error": pytest.approx(5e-7, abs=5e-7),
        "generation": "same",
        "geometry": "Chosen",
        "videos": "",
        "processor": "LlavaProcessor",
        "note": "",
    }
    for row in table.itertuples():
        assert row.geometry == FAMILIES[row.model_type].rule
        assert row.geometry != "none" or row.note
        assert bool(row.videos) == (FAMILIES[row.model_type].video is not None)


def test_rules_are_read_when_the_table_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.FAMILIES, "llava", FAMILIES["evolla"])
    table: pd.DataFrame = support.families().set_index("model_type")
    assert table.loc["llava", "geometry"] == "none"
    assert table.loc["llava", "note"] == FAMILIES["evolla"].reason.rstrip(".")
