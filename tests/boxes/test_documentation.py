"""The page docs/boxes.md: each line of code with a result is executed, and no format is missing."""

import re
from pathlib import Path

import pytest

import xmodal_interp.boxes as module
from xmodal_interp.boxes import FORMATS, TEXT_FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "boxes.md").read_text()
LINES = re.findall(
    r"^((?:read|write|pixel_boxes|iou|read_text)\(.*\))  # (\[\[.*?\]\])", PAGE, re.MULTILINE
)
(ANSWERS,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
OF_FORMAT = dict(re.split(r" {2,}", line, maxsplit=1) for line in ANSWERS.splitlines())
NAMES = {
    **{name: getattr(module, name) for name in module.__all__},
    **{"size": (640, 480), "resized": (320, 240)},
    **{"square": (0, 0, 640, 640), "padded": (0, -80, 640, 560)},
}


@pytest.mark.parametrize(("code", "result"), LINES, ids=range(len(LINES)))
def test_a_line_has_the_result_of_its_comment(code: str, result: str) -> None:
    if code.startswith("read_text"):
        name = re.search(r'answer, "(.*?)"', code)[1]
        found = eval(code, {**NAMES, "answer": OF_FORMAT[name]})
        assert found["phrase"].tolist() == ["cat"]
        found = found.loc[:, "x0":].dropna(axis=1).to_numpy()
    else:
        found = eval(code, NAMES)
    assert found.tolist() == [pytest.approx(row) for row in eval(result)]


def test_no_format_is_missing() -> None:
    assert {name for name in TEXT_FORMATS if not name.startswith("json")} <= set(OF_FORMAT)
    assert sum(code.startswith("read_text") for code, _ in LINES) == len(OF_FORMAT)
    for name in FORMATS:
        parts = [name] if name.startswith("kosmos2") else name.split(" ", 1)
        for part in parts:
            assert f"`{part}`" in PAGE, part
    assert len(LINES) == PAGE.count("  # [[")
