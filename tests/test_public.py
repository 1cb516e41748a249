"""The public names, imported when they are used."""

import subprocess
import sys

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


def test_every_public_name_exists() -> None:
    assert "capture" in xi.__all__
    for name in xi.__all__:
        assert getattr(xi, name).__doc__, name
