"""The public names, imported when they are used."""

import subprocess
import sys

import pandas as pd

import xmodal_interp as xi

LIGHT = """
import sys
import xmodal_interp as xi

heavy = {"torch", "transformers", "pandas", "matplotlib"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
assert set(xi.__all__) == set(dir(xi))
from xmodal_interp import Sample
assert xi.Sample is Sample
assert "torch" in sys.modules
"""


def test_the_package_is_imported_without_what_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_help_of_the_command_line_imports_no_heavy_library() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; "
        "from xmodal_interp.cli.commands import app; "
        "done = CliRunner().invoke(app, ['--help']); assert 'capture' in done.output; "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists() -> None:
    assert "capture" in xi.__all__
    for name in xi.__all__:
        assert getattr(xi, name).__doc__, name


WITHOUT_TRANSFORMERS = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "torchvision", "accelerate"):
            raise ImportError(f"{name} was imported")


sys.meta_path.insert(0, Blocked())
import xmodal_interp as xi
from xmodal_interp import evaluation, figures

import pandas as pd

folder = sys.argv[1]
store = xi.open_store(folder + "/store")
assert xi.check_store(folder + "/store")["ok"].all()
for name, expected in pd.read_pickle(folder + "/tables").items():
    found = getattr(xi, name)(store, **({"queries": "circle"} if "rollout" in name else {}))
    pd.testing.assert_frame_equal(found, expected)
assert len(evaluation.pointing_game(store, [(0, 0, 40, 40)]))
figures.overlay(store[0], "circle", path=folder + "/circle.png")
"""


def test_a_store_is_analysed_without_transformers(tmp_path) -> None:
    """Captured on one machine, analysed on another that has torch, pandas and matplotlib only."""
    vlm = xi.load()
    item = {"image": "docs/scene.png", "prompt": "where is the red circle ?"}
    store = xi.capture_dataset(vlm, [item], tmp_path / "store", progress=False)
    tables = {
        "cross_modal_ratio": xi.cross_modal_ratio(store),
        "attention_entropy": xi.attention_entropy(store),
        "attention_rollout": xi.attention_rollout(store, "circle"),
    }
    pd.to_pickle(tables, tmp_path / "tables")
    arguments = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "circle.png").stat().st_size > 1000
