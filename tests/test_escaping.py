"""User text is printed literally: terminal, Markdown, SVG, CSV."""

import dataclasses
from xml.etree import ElementTree

import jinja2
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.helpers.figure_samples import fake
from tests.helpers.store_samples import sample as stored
from xmodal_interp import figures
from xmodal_interp.cli import printing
from xmodal_interp.cli.commands import app
from xmodal_interp.demo.report import _template
from xmodal_interp.escaping import for_spreadsheets, markdown_escaped, printable
from xmodal_interp.store import StoreWriter

HOSTILE = "[/x] [bold]a[/] \x1b[31mred \x00\x0b\u2028 \u202eback $x$ <b>&| `c` =1+1"


@pytest.mark.parametrize("arguments", [["check", "[/x]"], ["analyze", "[row, col]", "sink-rate"]])
def test_markup_in_messages_is_escaped(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert arguments[1] in result.output.replace("\n", " ")


def test_control_characters_are_escaped(tmp_path, monkeypatch) -> None:
    out = Console(width=400, file=(tmp_path / "out").open("w"))
    monkeypatch.setattr(printing, "out", out)
    printing.say(HOSTILE, to=out)
    printing.show(pd.DataFrame({"[/x]": [HOSTILE]}))
    out.file.close()
    line, _, cell = (tmp_path / "out").read_text().splitlines()
    shown = r"[/x] [bold]a[/] \x1b[31mred \x00\x0b\u2028 \u202eback $x$ <b>&| `c` =1+1"
    assert line.strip() == cell.strip() == shown


def test_markup_in_settings_of_a_store_is_escaped(tmp_path) -> None:
    question = HOSTILE.replace("\x00", "")
    hostile = dataclasses.replace(stored(), question=question)
    with StoreWriter(tmp_path / "store", {"model": "[/x]"}, images=False) as writer:
        writer.write(hostile)
    result = CliRunner().invoke(app, ["info", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    assert "[/x]" in result.output


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_figures_with_hostile_text_are_valid_files(tmp_path, ending: str) -> None:
    made = fake()
    tokens = made.tokens.assign(token=[HOSTILE] * len(made))
    sample = dataclasses.replace(made, question=HOSTILE, answer=HOSTILE, tokens=tokens)
    box = {HOSTILE: (0.0, 0.0, 10.0, 10.0)}
    for name, draw in {
        "overlays": lambda path: figures.overlays(sample, [8, 9], boxes=box, path=path),
        "maps": lambda path: figures.map_overlays(
            sample, {HOSTILE: np.full(6, 0.1)}, HOSTILE, title=HOSTILE, path=path
        ),
        "matrix": lambda path: figures.attention_matrix(sample, 0, path=path),
        "mask": lambda path: figures.mask_structure(sample, 0, path=path),
        "before_after": lambda path: figures.before_after(sample, sample, 9, path=path),
    }.items():
        path = tmp_path / f"{name}.{ending}"
        draw(path)
        if ending == "svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            written = path.read_bytes()
            assert written.startswith(b"%PDF-")
            assert written.rstrip().endswith(b"%%EOF")


def test_formulas_are_escaped_and_numbers_are_not_changed() -> None:
    table = pd.DataFrame({"token": ["=1+1", "-", "+x", "@y", "plain", None], "value": -1.5})
    safe = for_spreadsheets(table)
    assert safe["token"].tolist()[:5] == ["'=1+1", "-", "'+x", "'@y", "plain"]
    assert safe["value"].tolist() == [-1.5] * 6
    assert table["token"][0] == "=1+1"


def test_formulas_are_escaped_in_csv_files(tmp_path) -> None:
    table = pd.DataFrame({"token": ["=1+1"], "value": [-1.0]})
    printing.write(table, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "token,value\n'=1+1,-1.0\n"


def test_markdown_is_escaped() -> None:
    assert markdown_escaped("a|b\n# *c* <i>") == r"a\|b\\n\# \*c\* \<i\>"
    plain = jinja2.Environment(loader=jinja2.FunctionLoader(_template), trim_blocks=True)
    plain.filters["md"] = lambda value: markdown_escaped(str(value))
    content = {"model": "<script>|", "model_class": "M", "n_weights": 1, "n_asked": 1}
    tables = {"t": {"columns": ["a|b"], "rows": [["x|y", "[l](u)"]]}}
    page = plain.get_template("report.md").render(
        **content, lines=["a\n# b"], pictures=[("p.png", "[t]", "<img src=x>")], tables=tables
    )
    assert "<" not in page.replace(r"\<", "")
    assert r"x\|y | \[l\](u)" in page
    assert "\n# b" not in page


def test_printable_keeps_visible_characters() -> None:
    text = "naïve 日本語 👩\u200d🔬 a\u00a0b\nc\td"
    assert printable(text) == text
    assert printable("a\nb", lines=False) == r"a\nb"
    assert printable("half of a pair: \ud83d") == r"half of a pair: \ud83d"
