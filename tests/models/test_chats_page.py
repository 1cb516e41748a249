"""The page docs/chats.md: its code is executed in order, and its comments are the values."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xmodal_interp.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "chats.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "scene.png").write_bytes((ROOT / "docs" / "scene.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_code_runs_and_has_the_values_of_its_comments() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    checked = 0
    for block in blocks:
        exec(block, names)
        for code, value in re.findall(r"^(\S.*?)  +# (['{].*)$", block, re.MULTILINE):
            assert eval(code, names) == ast.literal_eval(value), code
            checked += 1
    assert (len(blocks), checked) == (8, 4)
    sample = names["xi"].capture(names["xi"].load(), prompt=names["chat"], max_new_tokens=3)
    rows = sample.tokens.loc[sample.where(role="assistant")]
    assert rows["token"].tolist() == ["top", "left"]
    assert len(sample.where("image", turn=1)) == 144
    assert sample.answer


@pytest.mark.usefixtures("folder")
def test_the_commands_run() -> None:
    commands = [" ".join(each.split()) for each in re.findall(r"`(xmodal [^`]*)`", PAGE)]
    assert len(commands) == 2
    Path("llava.json").write_text(
        '[{"image": "docs/scene.png", "conversations": [{"from": "human", "value": "<image>\\n'
        'where is the green cross ?"}, {"from": "gpt", "value": "top left"}]}]'
    )
    for command in commands:
        shown = CliRunner().invoke(app, shlex.split(command)[1:])
        assert shown.exit_code == 0, shown.output
