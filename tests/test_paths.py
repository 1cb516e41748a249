"""Paths with ``~``, invalid paths, and indexing of stores."""

import inspect
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.figure_samples import fake
from tests.helpers.real import real, settled
from tests.helpers.store_samples import SETTINGS
from tests.helpers.store_samples import sample as stored
from tests.helpers.synthetic import captured
from xmodal_interp import figures
from xmodal_interp.arguments import user_path
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError, LayerError, PositionError
from xmodal_interp.store import StoreWriter


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tilde_is_expanded_everywhere(home: Path) -> None:
    with StoreWriter("~/runs/one", SETTINGS, images=False) as writer:
        writer.write(stored())
    assert (home / "runs" / "one" / "manifest.json").exists()
    assert len(xi.open_store("~/runs/one")) == 1
    assert xi.check_store("~/runs/one")["ok"].all()
    figures.overlay(fake(), 9, path="~/figure.png")
    assert (home / "figure.png").exists()
    Image.new("RGB", (32, 32)).save(home / "image.png")
    (home / "items.csv").write_text("image,prompt\n~/image.png,what ?\nimage.png,why ?\n")
    for arguments in (
        ["info", "~/runs/one"],
        ["capture", "~/runs/two", "--items", "~/items.csv"],
        ["analyze", "~/runs/two", "sink-rate", "--path", "~/table.csv"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert (home / "table.csv").exists()
    assert not (home / "~").exists()


@pytest.mark.parametrize("path", ["a\0b", 3, None, b"bytes", "\ud800.png", "~nobody-at-all/x"])
def test_invalid_paths_are_errors(path: object) -> None:
    with pytest.raises(InputError):
        user_path(path)


def test_a_store_is_indexed_like_an_array(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", SETTINGS, images=False) as writer:
        for name in "abc":
            writer.write(stored(name))
    store = xi.open_store(tmp_path / "s")
    for index in ([0, 2], (0, -1), np.array([0, 2]), torch.tensor([0, 2]), pd.Series([0, 2])):
        assert [each.name for each in store[index]] == ["a", "c"]
    mask = [True, False, True]
    for index in (mask, np.array(mask), torch.tensor(mask), pd.Series(mask, index=[4, 5, 6])):
        assert [each.name for each in store[index]] == ["a", "c"]
    assert [each.name for each in store[["c", "a"]]] == ["c", "a"]
    assert store[np.int64(1)].name == "b"
    for wrong, error in (([0, 3], PositionError), (mask[:2], PositionError)):
        with pytest.raises(error):
            store[wrong]
    with pytest.raises(LayerError):
        inspect.unwrap(type(store).__getitem__)(store, 1.5)


def test_tables_of_analyses_can_be_written_as_json_tables() -> None:
    sample = captured("llava")
    table = xi.raster_profile(sample)
    written = json.loads(table.to_json(orient="table"))["data"]
    assert [row["index"] for row in written] == table["index"].tolist()


def test_an_error_of_the_processor_is_one_line(tmp_path) -> None:
    """Qwen2-VL's image processor (transformers 5.23, smart_resize) limits aspect ratios to 200."""
    vlm = xi.VLM(real("qwen2_vl")[0], settled("qwen2_vl"))
    narrow = Image.new("RGB", (3000, 10))
    with pytest.raises(InputError) as refusal:
        xi.capture(vlm, narrow, "what ?")
    assert "failed on this input: " in str(refusal.value)
    assert "(images of 3000 x 10 px)" in str(refusal.value)
    narrow.save(tmp_path / "narrow.png")
    arguments = ["--image", str(tmp_path / "narrow.png"), "--prompt", "what ?"]
    result = CliRunner().invoke(
        app, ["capture", str(tmp_path / "s"), "--model", "qwen2_vl", *arguments]
    )
    assert result.exit_code == 1
    assert "\nerror: Qwen2VLProcessor failed on this input: " in result.output
    assert "Traceback" not in result.output
    with pytest.raises(InputError, match="at least one pixel; got 0 x 0 px"):
        xi.capture(vlm, Image.new("RGB", (0, 0)), "what ?")
